from __future__ import annotations

import asyncio
import json
from itertools import chain
from pathlib import Path

import pytest

from align.data.order import BatchPlan
from align.errors import Interrupted, RecipeError
from align.recipe.parts import Best, Save
from align.stages.checkpoint import list_checkpoints
from align.stages.loop import Loop, StageResult, every_steps, latest_checkpoint
from align.stages.offline import PreparedBatches, offline_evaluation, offline_turn
from tests.unit.stages.plain import Lines, PlainTrainer, tree

TREES = [tree(n) for n in range(7)]


def make(folder: Path, total: int = 10, **settings) -> tuple[Loop, PlainTrainer, Lines]:
    trainer, lines = PlainTrainer(), Lines()
    loop = Loop(
        stage_id="sft",
        kind="sft",
        total=total,
        folder=folder,
        trainer=trainer,
        report=lines,
        stop=asyncio.Event(),
        save=settings.pop("save", Save(every=3, keep=2)),
        artefact="adapter",
        evaluate=offline_evaluation(trainer, TREES[:2]),
        **settings,
    )
    return loop, trainer, lines


async def run(loop: Loop) -> StageResult:
    await loop.restore(latest_checkpoint(loop.folder, loop.report))
    return await loop.run(
        offline_turn(loop.trainer, PreparedBatches(TREES, BatchPlan(rows=7, size=3, seed=5, steps=loop.total)))
    )


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(7, 100, 7), ("10%", 100, 10), ("10%", 25, 3), ("1%", 10, 1), ("50%", 3, 2), ("100%", 9, 9)],
)
def test_a_percentage_becomes_whole_turns(every: int | str, total: int, steps: int) -> None:
    assert every_steps(every, total) == steps


def test_a_stage_reports_every_turn_and_writes_its_artefact(tmp_path: Path) -> None:
    loop, trainer, lines = make(tmp_path)
    result = asyncio.run(run(loop))
    assert [step for _, step, _ in lines.steps] == list(range(1, 11))
    assert result.steps == 10 and result.tokens == (3 * 7 + 3) * 4
    assert json.loads((tmp_path / "adapter" / "w.json").read_text()) == trainer.w
    assert result.artefacts == {"adapter": str(tmp_path / "adapter")}
    assert all(rows == sorted(rows) for rows in trainer.seen), "a batch is in order of tree id"
    assert [sorted(chain.from_iterable(trainer.seen[k : k + 3])) for k in (0, 3, 6)] == [list(range(7))] * 3
    assert [p.name for p in list_checkpoints(loop.checkpoints)] == ["step-000009", "step-000010"]


def test_a_resumed_stage_repeats_the_undisturbed_one(tmp_path: Path) -> None:
    whole, trainer, lines = make(tmp_path / "whole", eval_every=2)
    asyncio.run(run(whole))

    class Killed(Exception): ...

    def kill(step: int) -> None:
        if step == 7:
            raise Killed

    broken, first, before = make(tmp_path / "broken", eval_every=2)
    first.during_step = kill
    with pytest.raises(Killed):
        asyncio.run(run(broken))
    again, second, after = make(tmp_path / "broken", eval_every=2)
    result = asyncio.run(run(again))

    assert again.state.step == 10 and result.tokens == whole.state.tokens
    assert second.w == trainer.w
    kept = [line for line in before.timeless() if line[0] <= 6]
    assert kept + after.timeless() == lines.timeless()
    assert "continues from step 6" in after.messages[0]


def test_a_stop_finishes_the_turn_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    loop, trainer, _ = make(tmp_path)
    trainer.during_step = lambda step: loop.stop.set() if step == 3 else None
    with pytest.raises(Interrupted) as caught:
        asyncio.run(run(loop))
    assert caught.value.exit_code == 130
    assert "step 4 of 10" in str(caught.value) and "--resume" in str(caught.value)
    assert [p.name for p in list_checkpoints(loop.checkpoints)] == ["step-000003", "step-000004"]
    assert not (tmp_path / "adapter").exists()


def test_a_stop_in_the_last_turn_lets_the_stage_finish(tmp_path: Path) -> None:
    loop, trainer, _ = make(tmp_path)
    trainer.during_step = lambda step: loop.stop.set() if step == 9 else None
    assert asyncio.run(run(loop)).steps == 10
    assert (tmp_path / "adapter" / "w.json").is_file()


def test_a_stop_that_comes_while_evaluating_is_saved_too(tmp_path: Path) -> None:
    loop, _, _ = make(tmp_path, eval_every=5)
    evaluate = loop.evaluate
    assert evaluate is not None

    async def stopped_meanwhile() -> dict[str, float]:
        loop.stop.set()
        return await evaluate()

    loop.evaluate = stopped_meanwhile
    with pytest.raises(Interrupted, match="step 5 of 10"):
        asyncio.run(run(loop))
    assert [p.name for p in list_checkpoints(loop.checkpoints)][-1] == "step-000005"


def test_a_stop_at_a_regular_checkpoint_still_weighs_it_against_the_best(tmp_path: Path) -> None:
    save = Save(every=2, keep=1, best=Best(metric="eval/loss", mode="max"))
    whole, _, lines = make(tmp_path / "whole", save=save)
    asyncio.run(run(whole))
    first, trainer, before = make(tmp_path / "stopped", save=save)
    trainer.during_step = lambda step: first.stop.set() if step == 3 else None
    with pytest.raises(Interrupted):
        asyncio.run(run(first))
    again, _, after = make(tmp_path / "stopped", save=save)
    asyncio.run(run(again))
    assert before.timeless() + after.timeless() == lines.timeless()
    assert again.state.best == whole.state.best


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    loop, trainer, _ = make(tmp_path)
    trainer.during_step = lambda step: loop.stop.set() if step == 6 else None
    with pytest.raises(Interrupted):
        asyncio.run(run(loop))
    (loop.checkpoints / "step-000007" / "manifest.json").unlink()
    again, second, lines = make(tmp_path)
    asyncio.run(run(again))
    assert "step-000007" in lines.messages[0] and "ignored" in lines.messages[0]
    assert second.calls[0] == "step 6"


def test_evaluation_comes_at_the_start_then_every_n_and_at_the_end(tmp_path: Path) -> None:
    loop, _, lines = make(tmp_path, eval_every=4, eval_at_start=True)
    result = asyncio.run(run(loop))
    assert [step for step, _ in lines.of("eval/loss")] == [0, 4, 8, 10]
    assert result.metrics["eval/accuracies"] == lines.of("eval/accuracies")[-1][1]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    best = Best(metric="eval/loss", mode="max")
    loop, trainer, lines = make(tmp_path, total=12, save=Save(every=2, keep=1, best=best))
    result = asyncio.run(run(loop))
    values = dict(lines.of("eval/loss"))
    assert set(values) == {2, 4, 6, 8, 10, 12}, "the metric is computed wherever a checkpoint is weighed"
    chosen = max(values, key=lambda step: values[step])
    assert chosen != 12 and loop.state.best == (values[chosen], chosen)
    assert [p.name for p in list_checkpoints(loop.checkpoints)] == [f"step-{chosen:06d}", "step-000012"]
    assert json.loads((Path(result.artefacts["best_adapter"]) / "w.json").read_text()) != trainer.w


def test_the_best_by_a_loss_is_the_least_without_a_word_about_it(tmp_path: Path) -> None:
    loop, _, lines = make(tmp_path, total=12, save=Save(every=2, keep=1, best=Best(metric="eval/loss")))
    asyncio.run(run(loop))
    values = dict(lines.of("eval/loss"))
    chosen = min(values, key=lambda step: values[step])
    assert len(set(values.values())) > 1 and loop.state.best == (values[chosen], chosen)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("eval/loss", "min"),
        ("eval/loss/nll", "min"),
        ("eval/mse", "min"),
        ("eval/policy/kl", "min"),
        ("eval/accuracies", "max"),
        ("eval/f1_macro", "max"),
        ("eval/rewards/margins", "max"),
        ("eval/weight_loss_advice", "max"),
    ],
)
def test_the_name_of_a_metric_says_which_checkpoint_is_the_best_until_the_recipe_does(metric: str, mode: str) -> None:
    assert Best.model_validate({"metric": metric}).mode == mode
    assert Best.model_validate({"metric": metric, "mode": "max"}).mode == "max"


def test_a_best_metric_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    loop, _, _ = make(tmp_path, save=Save(every=2, best=Best(metric="eval/acuracy")))
    with pytest.raises(RecipeError) as caught:
        asyncio.run(run(loop))
    assert "eval/acuracy" in str(caught.value) and "eval/accuracies" in str(caught.value)
