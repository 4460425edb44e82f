"""A stage that trains nothing says so: at once, ever more rarely, at its end, and in the run's files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rich.console import Console

from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.trainer import Metrics
from align.recipe.parts import Save
from align.report.table import stage_table
from align.stages.idle import closing_lines, told, why_idle
from align.stages.loop import Loop, StageResult, latest_checkpoint
from align.stages.lost_words import lost_words
from tests.unit.stages.online_run import Run
from tests.unit.stages.plain import Lines, PlainFleet, PlainTrainer

DEAD = {"train/idle": 1.0, "completion/masked": 1.0, "completion/truncated": 1.0, "tokens/trained": 8.0}
ALIVE = {"train/idle": 0.0, "tokens/trained": 8.0}


def run_loop(folder: Path, dead: set[int], total: int = 20, stop_after: int | None = None) -> tuple[StageResult, Lines]:
    lines, stop = Lines(), asyncio.Event()
    loop = Loop(
        stage_id="grpo",
        kind="online",
        total=total,
        folder=folder,
        trainer=PlainTrainer(),
        report=lines,
        stop=stop,
        save=Save(every=3),
        artefact="adapter",
    )

    async def turn(step: int) -> Metrics:
        if step == stop_after:
            raise RuntimeError("killed")
        return dict(DEAD if step in dead else ALIVE)

    async def whole() -> StageResult:
        await loop.restore(latest_checkpoint(folder, lines))
        return await loop.run(turn)

    return asyncio.run(whole()), lines


def test_the_first_step_that_trains_nothing_is_told_at_once_and_later_ones_ever_more_rarely(tmp_path: Path) -> None:
    result, lines = run_loop(tmp_path, set(range(20)))
    said = [line for line in lines.messages if "trained nothing" in line]
    assert [line.partition(" trained")[0] for line in said] == [f"grpo: step {n}" for n in (1, 4, 16)]
    assert "cut off by `rollout.max_tokens`" in said[0] and "(4 such steps so far)" in said[1]
    assert lines.messages[-2].startswith("grpo: nothing was trained in any of its 20 steps")
    assert sum(result.idle.values()) == 20 and result.to_json()["idle"] == result.idle


def test_engines_that_were_lost_are_said_beside_the_step(tmp_path: Path) -> None:
    lost = {"rollout/restarts": 1.0, "rollout/reissued": 3.0}
    assert lost_words("grpo", 4, {**ALIVE, **lost}) == (
        "grpo: step 4: 1 engine was lost and started again (3 groups are sampled again); what they printed last is in "
        "the run's logs/"
    )
    assert "2 reward actors were lost" in str(lost_words("grpo", 4, {"reward/restarts": 2.0}))
    assert lost_words("grpo", 4, {**ALIVE, "rollout/restarts": 0.0}) is None


def test_a_stage_that_trains_says_nothing(tmp_path: Path) -> None:
    result, lines = run_loop(tmp_path, set())
    assert lines.messages == [] and "idle" not in result.to_json()


def test_a_resumed_stage_counts_what_it_had_counted(tmp_path: Path) -> None:
    whole, _ = run_loop(tmp_path / "whole", {1, 2, 9}, total=12)
    with pytest.raises(RuntimeError, match="killed"):
        run_loop(tmp_path / "cut", {1, 2, 9}, total=12, stop_after=7)
    result, lines = run_loop(tmp_path / "cut", {1, 2, 9}, total=12)
    assert result.idle == whole.idle and sum(result.idle.values()) == 3
    assert "grpo: 3 of 12 steps trained nothing" in lines.messages


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"train/idle": 2.0, "train/updates": 3.0}, None),  # one update of the turn trained
        ({"loss/total": 0.0}, None),  # a trainer that says nothing of it
        ({**DEAD, "completion/truncated": 0.5}, "left out: cut off, empty, without a score"),
        ({**DEAD, "completion/truncated": 0.0, "advantage/missing": 1.0}, "no completion has a score"),
        ({"train/idle": 1.0, "groups/total": 4.0, "groups/dead": 4.0}, "scored alike"),
        ({"train/idle": 1.0, "groups/total": 4.0, "groups/dead": 1.0}, "all completions of a group"),
        ({"train/idle": 0.0, "train/updates": 0.0, "completion/mean_length": 0.0}, "every completion is empty"),
        ({"train/idle": 1.0}, "both sides of the pairs"),
    ],
)
def test_the_reason_is_named(metrics: Metrics, reason: str | None) -> None:
    found = why_idle(metrics)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_lines_become_rare() -> None:
    assert [n for n in range(1, 300) if told(n)] == [1, 4, 16, 64, 256]
    assert closing_lines("sft", 5, {}) == []


def test_the_closing_table_has_a_column_for_it_where_there_is_one() -> None:
    stages = {"a": {"steps": 5, "idle": {"why": 3, "other": 2}, "metrics": {}}, "b": {"steps": 5, "metrics": {}}}
    for shown, some in ((True, stages), (False, {"b": stages["b"]})):
        console = Console(width=100)
        with console.capture() as text:
            console.print(stage_table({"stages": some}))
        assert ("without training" in text.get()) == shown


class Silent(PlainFleet):
    """Every completion is empty."""

    def _group(self, item: PromptItem, group_size: int) -> Group:
        group = super()._group(item, group_size)
        nothing = [Completion(c.token_ids[:0], c.logps[:0], c.versions[:0], "", "eos") for c in group.completions]
        return Group(item, tuple(nothing))


def test_a_policy_that_answers_nothing_does_not_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, total=3, fleet=Silent())
    result = run()
    assert run.trainer.seen == [] and sum(result.idle.values()) == 3
    assert "every completion is empty" in run.lines.messages[0]
