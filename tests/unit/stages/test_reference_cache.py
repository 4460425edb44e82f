"""Cached reference log-probabilities: stored by content, never stale, never damaged, resumed bit for bit."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, mark_nll
from align.errors import Interrupted
from align.protocols.trainer import Metrics
from align.protocols.trees import Medium, Segment, Tree
from align.recipe.adapter import Adapter
from align.recipe.parts import Optim
from align.recipe.schema import Recipe
from align.stages import reference_cache
from align.stages.backend import Start
from align.stages.owned import sweep
from align.stages.reference_cache import ReferenceCache, attached, tree_digest, weights_digest
from tests.unit.core.trees import conversation, pair
from tests.unit.stages import test_pipeline as pipeline
from tests.unit.stages.plain import PlainTrainer

LORA = Adapter(rank=4, alpha=8)


def make_cache(folder: Path, trainer: Any, facts: Any, said: list[str] | None = None, **options: Any) -> ReferenceCache:
    say = (said if said is not None else []).append
    return ReferenceCache(
        folder, facts, trainer, "dpo: reference log-probabilities", options.pop("chunk_tokens", 30), say, **options
    )


# ------------------------------------------------------------------------------------------------- what trees carry


def test_a_batch_has_the_values_of_exactly_the_tokens_that_it_scores() -> None:
    rng = np.random.default_rng(1)
    trees = [conversation(rng, 0), conversation(rng, 1)]
    values = [rng.normal(size=int(tree.trunk.loss_mask.sum())).astype(np.float32) for tree in trees]
    batch = collate([attached(tree, v) for tree, v in zip(trees, values, strict=True)])
    assert batch.reference_logps is not None and batch.reference_logps.dtype == torch.float32
    assert np.array_equal(batch.reference_logps.numpy(), np.concatenate(values))
    assert torch.equal(batch.to("cpu").reference_logps, batch.reference_logps)
    assert collate(trees).reference_logps is None and collate(trees).to("cpu").reference_logps is None


def test_tokens_that_only_the_likelihood_term_covers_get_a_value_that_no_reference_loss_reads() -> None:
    tree = pair(np.random.default_rng(2), 0)
    sizes = [len(branch) for branch in tree.branches]
    marked = mark_nll(attached(tree, np.arange(1, 1 + sum(sizes), dtype=np.float32)), "prompt_and_chosen")
    batch = collate([marked])
    assert batch.reference_logps is not None and batch.reference_logps.shape == batch.labels.shape
    assert batch.reference_logps[batch.loss_mask].tolist() == list(range(1, 1 + sum(sizes)))
    assert not batch.reference_logps[~batch.loss_mask].any() and (~batch.loss_mask).sum() == len(tree.trunk) - 1


# ------------------------------------------------------------------------------------------------- the store


class Counting:
    """Log-probabilities that are arithmetic of a tree's tokens; keeps what it was asked."""

    def __init__(self, shift: float = 0.0) -> None:
        self.asked: list[list[int]] = []
        self.shift = shift

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        self.asked.append([tree.id for tree in trees])
        found = []
        for tree in trees:
            context = float(tree.trunk.token_ids.sum())
            segments = tree.branches or (tree.trunk,)
            found.append([-(s.token_ids[s.loss_mask] + context + self.shift).astype(np.float32) for s in segments])
        return found


def pairs(n: int = 5) -> list[Tree]:
    rng = np.random.default_rng(3)
    return [pair(rng, i) for i in range(n)]


def values_of(trees: Sequence[Tree]) -> list[list[float]]:
    return [[float(x) for branch in tree.branches for x in branch.reference_logps] for tree in trees]


def test_a_second_run_takes_the_values_from_the_file_and_says_so(tmp_path: Path) -> None:
    first, second, said = Counting(), Counting(), []
    made = asyncio.run(make_cache(tmp_path, first, {}, said).attach(pairs()))
    [file] = tmp_path.iterdir()
    assert file.suffix == ".safetensors" and len(file.stem) == 64
    again = asyncio.run(make_cache(tmp_path, second, {}, said).attach(pairs()))
    assert values_of(again) == values_of(made) and second.asked == []
    assert [t.id for t in again] == [0, 1, 2, 3, 4]
    assert "computing them for 5 trees" in said[0]
    assert "computed for 5 trees in " in said[1] and said[1].endswith(" s")
    assert said[2].startswith("dpo: reference log-probabilities: from the cache, 0.") and len(said) == 3


def test_equal_rows_are_computed_once_and_rows_keep_their_order_ids_and_columns(tmp_path: Path) -> None:
    trainer, rows = Counting(), pairs(3)
    heavier = replace(rows[1], id=3, columns={"weight": 2.0}, origin="other.jsonl:7")
    made = asyncio.run(make_cache(tmp_path, trainer, {}).attach([*rows, heavier]))
    assert len([number for chunk in trainer.asked for number in chunk]) == 3
    assert values_of(made)[3] == values_of(made)[1] and made[3].columns == {"weight": 2.0} and made[3].id == 3
    assert tree_digest(heavier) == tree_digest(rows[1])


def changed_token(tree: Tree) -> Tree:
    ids = tree.trunk.token_ids.copy()
    ids[0] += 1
    return replace(tree, trunk=replace(tree.trunk, token_ids=ids))


def changed_mask(tree: Tree) -> Tree:
    mask = tree.branches[1].loss_mask.copy()
    mask[0] = False
    return replace(tree, branches=(tree.branches[0], replace(tree.branches[1], loss_mask=mask)))


def moved_boundary(tree: Tree) -> Tree:
    """The same tokens in the same order, one of them in the trunk instead of in the branch."""
    first, second = tree.branches
    trunk = Segment(np.append(tree.trunk.token_ids, first.token_ids[0]), np.append(tree.trunk.loss_mask, True))
    shorter = Segment(first.token_ids[1:], first.loss_mask[1:])
    return replace(tree, trunk=trunk, branches=(shorter, second))


def pictured(tree: Tree, key: str) -> Tree:
    """The same tokens, a picture behind one of them."""
    return replace(tree, trunk=replace(tree.trunk, media=(Medium("image", key, "/store", 0, 1, 4),)))


def test_the_same_tokens_on_another_picture_are_another_tree() -> None:
    assert tree_digest(pictured(pairs()[0], "a")) == tree_digest(pictured(pairs()[0], "a"))
    assert tree_digest(pictured(pairs()[0], "a")) != tree_digest(pictured(pairs()[0], "b"))


@pytest.mark.parametrize(
    "change",
    [
        lambda trees: [changed_token(trees[0]), *trees[1:]],
        lambda trees: [*trees[:-1], changed_mask(trees[-1])],
        lambda trees: [moved_boundary(trees[0]), *trees[1:]],
        lambda trees: trees[:-1],
        lambda trees: [replace(trees[0], branches=trees[0].branches[::-1]), *trees[1:]],
        lambda trees: [pictured(trees[0], "a picture"), *trees[1:]],
    ],
    ids=["a token", "a scored token", "a boundary", "a row less", "chosen and rejected swapped", "a picture"],
)
def test_other_data_has_another_key(change: Callable[[list[Tree]], list[Tree]]) -> None:
    cache = make_cache(Path(), Counting(), {})
    assert cache.key([tree_digest(t) for t in pairs()]) != cache.key([tree_digest(t) for t in change(pairs())])


def test_other_weights_have_another_key_whatever_name_size_and_date_say(tmp_path: Path) -> None:
    base, peft = tmp_path / "base", tmp_path / "adapter"
    for folder, files in ((base, ("config.json", "model.safetensors", "tokenizer.json")),
                          (peft, ("adapter_config.json", "adapter_model.safetensors"))):  # fmt: skip
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(b"one")
    (base / "code").mkdir()
    (base / "code" / "modeling.py").write_bytes(b"one")
    before = weights_digest(Start(base, peft, LORA))
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        times = path.stat()
        path.write_bytes(b"two")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert weights_digest(Start(base, peft, LORA)) != before, path
        path.write_bytes(b"one")
    assert weights_digest(Start(base, peft, LORA)) == before
    assert weights_digest(Start(base, None, LORA)) != before
    (base / "README.md").write_text("words")
    assert weights_digest(Start(base, peft, LORA)) == before


def test_a_new_format_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(Path(), Counting(), {})
    before = cache.key([])
    monkeypatch.setattr(reference_cache, "FORMAT", reference_cache.FORMAT + 1)
    assert cache.key([]) != before


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.slow
def test_no_damaged_byte_is_ever_used(tmp_path: Path) -> None:
    rows = pairs(2)
    made = values_of(asyncio.run(make_cache(tmp_path, Counting(), {}).attach(rows)))
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        said: list[str] = []
        trainer = Counting()
        found = asyncio.run(make_cache(tmp_path, trainer, {}, said, chunk_tokens=1000).attach(rows))
        assert values_of(found) == made, at
        refused = [line for line in said if "is damaged" in line]
        # a space in the header's padding may go unnoticed; whatever is noticed is said once and computed again
        assert (len(refused), len(trainer.asked)) in ((0, 0), (1, 1)), (at, said)
        assert refused or whole[at : at + 1] in (b" ", b"{"), at
        asyncio.run(make_cache(tmp_path, trainer := Counting(), {}).attach(rows))
        assert trainer.asked == [], "it was made again"


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1], ids=["empty", "a stump", "half", "all but a byte"])
def test_a_truncated_file_is_said_once_and_made_again(tmp_path: Path, keep: float) -> None:
    asyncio.run(make_cache(tmp_path, Counting(), {}).attach(pairs()))
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    said: list[str] = []
    asyncio.run(make_cache(tmp_path, Counting(), {}, said).attach(pairs()))
    assert sum("is damaged" in line for line in said) == 1 and str(file) in said[0]
    asyncio.run(make_cache(tmp_path, Counting(), {}, said := []).attach(pairs()))
    assert len(said) == 1 and "from the cache" in said[0]


def test_a_file_under_another_files_name_is_refused(tmp_path: Path) -> None:
    """Neither a renamed file is believed nor one whose key was forged and whose trees are not ours."""
    one, two = make_cache(tmp_path, Counting(), {}), make_cache(tmp_path, Counting(), {"other": 1}, said := [])
    asyncio.run(one.attach(pairs()))
    digests = [tree_digest(t) for t in pairs()]
    (tmp_path / f"{one.key(digests)}.safetensors").rename(tmp_path / f"{two.key(digests)}.safetensors")
    asyncio.run(two.attach(pairs()))
    assert "its checksum differs" in said[0]
    key = two.key(digests)
    path = tmp_path / f"{key}.safetensors"
    assert two._load(path, key, digests) is not None and two._load(path, key, digests[::-1]) is None
    assert "made for other trees" in said[-1]


def test_values_that_are_not_finite_are_used_as_they_are_and_not_kept(tmp_path: Path) -> None:
    asyncio.run(make_cache(tmp_path, Counting(math.nan), {}, said := []).attach(pairs()))
    assert not list(tmp_path.iterdir()) and "not finite" in said[-1]


# ------------------------------------------------------------------------------------------------- while it is computed


def test_trees_are_computed_in_bounded_chunks_and_progress_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "PROGRESS_S", 0.0)
    trainer, rows = Counting(), pairs(8)
    asyncio.run(make_cache(tmp_path, trainer, {}, said := [], chunk_tokens=40).attach(rows))
    assert [number for chunk in trainer.asked for number in chunk] == list(range(8)) and len(trainer.asked) > 2
    assert all(sum(rows[i].tokens for i in ids) <= 40 or len(ids) == 1 for ids in trainer.asked)
    progress = [line for line in said if " of 8 trees, about " in line]
    assert len(progress) == len(trainer.asked) - 1 and progress[0].endswith(" s left")


def test_a_stop_ends_the_pass_at_the_next_chunk_and_leaves_no_file(tmp_path: Path) -> None:
    trainer = Counting()

    def stop_after_two() -> None:
        if len(trainer.asked) == 2:
            raise Interrupted("stopped")

    cache = make_cache(tmp_path, trainer, {}, chunk_tokens=1, raise_if_stopped=stop_after_two)
    with pytest.raises(Interrupted):
        asyncio.run(cache.attach(pairs()))
    assert len(trainer.asked) == 2 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- in a run


class Leaning(PlainTrainer):
    """Steps and evaluation depend on the reference values that the trees carry, and these on its weight."""

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        self.w += 1e-3 * sum(float(b.reference_logps.sum()) for tree in trees for b in tree.branches)
        return await super().step(trees, step=step, progress=progress)

    async def evaluate(self, trees: Sequence[Tree]) -> Metrics:
        return {"loss/total": self.w + sum(float(b.reference_logps.sum()) for tree in trees for b in tree.branches)}

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        self.calls.append("logps")
        return await super().logps(trees)

    async def restore(self, folder: Path) -> None:
        self.calls.append("restore")
        await super().restore(folder)


class LeaningBackend(pipeline.PlainBackend):
    async def trainer(self, job: Any) -> Leaning:
        self.jobs.append(job)
        trainer = Leaning()
        self.trainers.append(trainer)
        self.prepare(trainer, job)
        return trainer


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [{"prompt": f"{n}?", "chosen": "yes" * (n + 1), "rejected": "no, I will not"} for n in range(8)]
    for name, some in (("pairs", rows), ("held", rows[5:]), ("words", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = str(tmp_path / "pairs.jsonl")
    scratch = {
        "config": {"model_type": "qwen3"},
        "tokenizer": {"train_on": str(tmp_path / "words.jsonl"), "vocab_size": 300},
    }
    stage = {"id": "dpo", "kind": "preference", "reference": "cached", "data": data, "batch": {"pairs": 4}, "steps": 7,
             "save": {"every": 2}, "eval": {"data": str(tmp_path / "held.jsonl"), "every": 3}}  # fmt: skip
    return Recipe.model_validate(
        {"name": "whole", "output": str(tmp_path / "runs"), "model": scratch, "stages": [stage]}
    )


def timeless(lines: Any) -> dict[int, Metrics]:
    return dict(lines.timeless())


@pytest.mark.parametrize("keep_file", [True, False], ids=["with the file", "without the file"])
def test_a_killed_stage_goes_on_bit_for_bit(recipe: Recipe, keep_file: bool) -> None:
    _, whole = pipeline.start(recipe, LeaningBackend())
    cache = Path(recipe.output) / ".cache" / "reference"
    assert len(list(cache.iterdir())) == 2, "one file for the data, one for the evaluation"
    recipe = recipe.model_copy(update={"name": "killed"})
    child = os.fork()
    if child == 0:  # the run in a process of its own, killed in the fourth of its seven steps
        backend = LeaningBackend()
        backend.prepare = lambda trainer, job: setattr(
            trainer, "during_step", lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 3 else None
        )
        try:
            pipeline.start(recipe, backend)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    sweep()  # what a killed process leaves in memory goes with the next start of `align run`
    if not keep_file:
        for file in cache.iterdir():
            file.unlink()
    backend = LeaningBackend()
    _, resumed = pipeline.start(recipe, backend, resume=True)
    assert "dpo: continues from step 2" in resumed.messages
    assert timeless(resumed) == {k: v for k, v in timeless(whole).items() if k > 2}
    calls = backend.trainers[0].calls
    assert calls[0] == ("restore" if keep_file else "logps") and calls.count("restore") == 1
    if not keep_file:
        assert "logps" not in calls[calls.index("restore") :], "values are those of the start, not of the checkpoint"
    said = [line for line in resumed.messages if "reference log-probabilities" in line]
    assert all(("from the cache" in line) == keep_file for line in said) and len(said) == (2 if keep_file else 4)


def test_runs_beside_each_other_share_the_values_and_another_learning_rate_changes_no_key(recipe: Recipe) -> None:
    pipeline.start(recipe, LeaningBackend())
    stage = recipe.stages[0].model_copy(update={"optim": Optim(lr=3e-5)})
    backend = LeaningBackend()
    _, lines = pipeline.start(recipe.model_copy(update={"name": "second", "stages": (stage,)}), backend)
    assert "logps" not in backend.trainers[0].calls
    assert any(line.startswith("dpo: reference log-probabilities: from the cache, 0.") for line in lines.messages)
    assert any(line.startswith("dpo (eval): reference log-probabilities: from the cache") for line in lines.messages)


def chat_pairs(folder: Path, first: str) -> None:
    """Eight rows of messages, to which a chat template is applied; the first prompt is `first`."""
    rows = [
        {
            "prompt": [{"role": "user", "content": first if n == 0 else f"{n}?"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_another_row_another_template_or_other_weights_are_computed_anew(recipe: Recipe, tmp_path: Path) -> None:
    model = recipe.model
    template = (Path(reference_cache.__file__).parents[1] / "data" / "templates" / "chatml.jinja").read_text()
    (tmp_path / "mine.jinja").write_text(template.replace("<|im_start|>", "<|im_start|>!"))
    mine = model.model_copy(update={"chat_template": str(tmp_path / "mine.jinja")})
    other = model.model_copy(update={"config": {"model_type": "qwen3", "rope_theta": 5.0}})
    runs = [("hi", model, True), ("hi", model, False), ("ho", model, True), ("ho", mine, True), ("ho", other, True)]
    for number, (first, changed, computed) in enumerate(runs):
        chat_pairs(tmp_path, first)
        backend = LeaningBackend()
        pipeline.start(recipe.model_copy(update={"name": f"run-{number}", "model": changed}), backend)
        assert ("logps" in backend.trainers[0].calls) == computed, number
        held = [c for c in backend.trainers[0].calls if c == "logps"]
        assert len(held) == {0: 2, 1: 0, 2: 1, 3: 1, 4: 2}[number], "plain-text rows of the evaluation have no template"
