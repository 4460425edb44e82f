"""What combiners remember is in the checkpoint, and what they weigh decides which groups carry signal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.protocols.fleet import Group
from align.protocols.scorer import ScoreTable
from align.recipe.objectives import Objectives
from align.stages.groups import carries_signal
from tests.unit.stages.online_run import Run
from tests.unit.stages.plain import PlainScorer, prompt
from tests.unit.stages.test_online import completion

CONFIGS = {
    "lagrangian": {"constraints": {"length": {"max": -2.0, "lr": 0.5}}},
    "chebyshev": {"mu": 0.5, "schedule": {"odd": [[0, 0.1], [12, 2.0]]}},
    "hypervolume": {"reference_point": {"length": -6, "odd": -0.1}},
}


def scorer() -> PlainScorer:
    return PlainScorer(
        length=lambda group, c: -float(len(c.token_ids)),
        odd=lambda group, c: float(c.token_ids.sum() % 2),
    )


class Killed(Exception): ...


@pytest.mark.parametrize("refill", [0.0, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_and_resumed_stage_repeats_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, name: str, refill: float
) -> None:
    settings = {"objectives": Objectives.model_validate({"combine": name, **CONFIGS[name]}), "refill": refill}
    whole = Run(tmp_path / "whole", scorer=scorer(), **settings)
    whole()
    first = Run(tmp_path / "broken", scorer=scorer(), **settings)

    def kill(step: int) -> None:
        if step == 10:
            raise Killed

    first.trainer.during_step = kill
    with pytest.raises(Killed):
        first()
    second = Run(tmp_path / "broken", scorer=scorer(), **settings)
    second()
    assert second.trainer.calls[0] == "publish 8"
    kept = [line for line in first.lines.timeless() if line[0] <= 8]
    assert kept + second.lines.timeless() == whole.lines.timeless()
    advantages = [[b.advantages for t in trees for b in t.branches] for trees in whole.trainer.trees[8:]]
    again = [[b.advantages for t in trees for b in t.branches] for trees in second.trainer.trees]
    for one, two in zip(advantages, again, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    state = json.loads((tmp_path / "whole/grpo/checkpoints/step-000012/state.json").read_text())
    assert state["extra"]["objectives"] == second.stage.objective_state != {}


def signal(config: dict, state: dict, scores: list[list[float]], step: int = 0) -> bool:
    group = Group(prompt(0), tuple(completion(3) for _ in scores))
    table = ScoreTable(("correct", "length"), np.asarray(scores, np.float32), ("reward", "cost"))
    return carries_signal(group, table, Objectives.model_validate(config), "mask", 0.0, state, step)


LIMITED = {"combine": "lagrangian", "constraints": {"length": {"max": 4}}}


def test_a_group_that_differs_in_a_constrained_cost_alone_teaches_where_its_multiplier_is_above_0() -> None:
    lengths = [[1.0, 3.0], [1.0, 9.0]]
    assert not signal(LIMITED, {}, lengths) and not signal(LIMITED, {"lambda": {"length": 0.0}}, lengths)
    assert signal(LIMITED, {"lambda": {"length": 0.5}}, lengths)
    assert signal(LIMITED, {}, [[1.0, 3.0], [0.0, 3.0]])


def test_a_group_that_differs_behind_a_closed_gate_or_under_a_weight_of_0_teaches_nothing() -> None:
    lengths = [[0.0, 3.0], [0.0, 9.0]]
    assert signal({}, {}, lengths)
    assert not signal({"gates": {"length": {"when": "correct", "at_least": 1}}}, {}, lengths)
    rising = {"schedule": {"length": [[10, 0.0], [20, 1.0]]}}
    assert not signal(rising, {}, lengths, step=10) and signal(rising, {}, lengths, step=11)


@pytest.mark.parametrize("name", ["chebyshev", "hypervolume"])
def test_a_utility_without_a_state_asks_whether_any_objective_differs(name: str) -> None:
    config = {"combine": name, "reference_point": {"correct": 0, "length": 10}}
    assert signal(config, {}, [[1.0, 3.0], [1.0, 9.0]]) and not signal(config, {}, [[1.0, 3.0], [1.0, 3.0]])
