"""An update that has nothing to teach changes no weight and says so; one that has something is never taken for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, twins
from align.protocols.trees import Medium, Segment, Tree
from align.train.signal import Signal
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import group, labelled, pair, segment, unpaired
from tests.unit.train.test_trainer import make_spec, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("qwen3")
    model.config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder


def trainer_of(base: Path, loss: str, **options: Any) -> PolicyTrainer:
    needs_reference = loss in ("dpo", "kto", "modpo") or "kl" in options
    return PolicyTrainer(
        make_spec(base, loss, loss_options=options, reference="start" if needs_reference else None, max_tokens=60)
    )


def equal_pairs(n: int = 3) -> list[Tree]:
    """Pairs that differ no more: what a cut to max_length leaves of some."""
    rng = np.random.default_rng(1)
    pairs = [pair(rng, i) for i in range(n)]
    return [replace(tree, branches=(tree.branches[0],) * 2, columns={"margin": 0.1}) for tree in pairs]


def with_advantages(tree: Tree, *values: float, scored: bool = True) -> Tree:
    branches = [
        replace(b, advantages=np.full(len(b), a, np.float32), loss_mask=np.full(len(b), scored))
        for b, a in zip(tree.branches, values, strict=True)
    ]
    return replace(tree, branches=tuple(branches))


def groups(scored: bool = True, advantages: tuple[float, ...] = (0.0,) * 4) -> list[Tree]:
    rng = np.random.default_rng(2)
    return [with_advantages(group(rng, i), *advantages, scored=scored) for i in range(3)]


def alike(advantages: tuple[float, ...]) -> list[Tree]:
    """Groups whose completions are all the same tokens: a policy that has collapsed, under a reward that is not."""
    return [
        with_advantages(replace(tree, branches=(tree.branches[0],) * 4), *advantages)
        for tree in groups(advantages=(0.0,) * 4)
    ]


NOTHING: list[Any] = [
    pytest.param("grpo", {}, groups(scored=False), id="every completion is masked"),
    pytest.param("grpo", {}, groups(), id="every advantage is zero"),
    pytest.param("grpo", {"surrogate": "cispo"}, groups(), id="every advantage is zero, cispo"),
    pytest.param("grpo", {"kl": 0.1}, groups(scored=False), id="masked, with a KL"),
    pytest.param("grpo", {}, alike((1.2, -0.4, -0.5, -0.3)), id="equal completions"),
    pytest.param("dpo", {}, equal_pairs(), id="equal sides"),
    *(pytest.param("dpo", {"variant": v}, equal_pairs(), id=f"equal sides, {v}") for v in ("hinge", "ipo", "aot")),
    pytest.param("simpo", {}, equal_pairs(), id="equal sides, simpo"),
    pytest.param("modpo", {}, equal_pairs(), id="equal sides, modpo"),
    pytest.param("reward_model", {}, equal_pairs(), id="equal sides, reward model"),
    pytest.param("cpo", {"nll_weight": 0.0}, equal_pairs(), id="equal sides, cpo"),
    pytest.param(
        "kto",
        {"undesirable_weight": 0.0},
        [unpaired(np.random.default_rng(3), 2 * i) for i in range(3)],
        id="kto, all of weight 0",
    ),
]


@pytest.mark.parametrize(("loss", "options", "trees"), NOTHING)
def test_an_update_without_signal_moves_nothing_and_says_so(
    base: Path, loss: str, options: dict[str, Any], trees: list[Tree]
) -> None:
    trainer = trainer_of(base, loss, **options)
    live = {
        "grpo": groups(advantages=(1.0, -1.0, 0.5, -0.5)),
        "kto": [unpaired(np.random.default_rng(5), 2 * i + 1) for i in range(3)],
    }
    rng = np.random.default_rng(7)
    other = live.get(loss) or [replace(pair(rng, i), columns={"margin": 0.1}) for i in range(3)]
    assert trainer.step(other, step=0, progress=0.0)["train/idle"] == 0.0
    before = weights(trainer)  # AdamW has moments now, which would go on by themselves
    metrics = trainer.step(trees, step=1, progress=0.1)
    assert metrics["train/idle"] == 1.0 and metrics["optim/skipped"] == 0.0
    assert not any(name.startswith("signal/") for name in metrics)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


SOMETHING: list[Any] = [
    pytest.param("dpo", {}, [*equal_pairs(), replace(pair(np.random.default_rng(4), 9), id=9)], id="one pair differs"),
    pytest.param("dpo", {"variant": "apo_down"}, equal_pairs(), id="a loss of one side too"),
    pytest.param("cpo", {}, equal_pairs(), id="a likelihood of the chosen side"),
    pytest.param("orpo", {"nll": "response"}, equal_pairs(), id="orpo's likelihood"),
    pytest.param("orpo", {}, equal_pairs(), id="orpo's likelihood of the prompt too"),
    pytest.param("reward_model", {"centre": 0.1}, equal_pairs(), id="scores drawn to the centre"),
    pytest.param("grpo", {"entropy_bonus": 0.01}, groups(), id="an entropy bonus"),
    pytest.param("grpo", {}, alike((1.0, 0.5, 0.5, 0.0)), id="equal completions, advantages that do not cancel"),
    pytest.param("grpo", {}, groups(advantages=(0.0, 0.0, 1e-3, 0.0)), id="one small advantage"),
    pytest.param("classify", {}, [labelled(np.random.default_rng(1), i) for i in range(3)], id="labels"),
]


@pytest.mark.parametrize(("loss", "options", "trees"), SOMETHING)
def test_an_update_with_any_signal_is_made(base: Path, loss: str, options: dict[str, Any], trees: list[Tree]) -> None:
    trainer = trainer_of(base, loss, **options)
    if loss == "classify":
        trainer = PolicyTrainer(replace(trainer.spec, labels=None))
        trees = [replace(t, trunk=replace(t.trunk, columns={"targets/0": 1.0 + t.id})) for t in trees]
    before = weights(trainer)
    metrics = trainer.step(trees, step=0, progress=0.0)
    assert metrics["train/idle"] == 0.0
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_kl_teaches_as_soon_as_the_policy_has_left_its_reference(base: Path) -> None:
    trainer = trainer_of(base, "grpo", kl=0.1)
    assert trainer.step(groups(), step=0, progress=0.0)["train/idle"] == 1.0, "at the start it is the reference"
    trainer.step(groups(advantages=(1.0, -1.0, 0.5, -0.5)), step=1, progress=0.1)
    assert trainer.step(groups(), step=2, progress=0.2)["train/idle"] == 0.0


@pytest.mark.parametrize("max_tokens", [10_000, 100, 60])
def test_equal_completions_of_a_group_that_is_cut_into_microbatches_cancel_all_the_same(
    base: Path, max_tokens: int
) -> None:
    rng = np.random.default_rng(2)
    branch = segment(rng, 40, scored=True, rollout=True)
    tree = with_advantages(
        Tree(0, segment(rng, 20, scored=False), (branch,) * 8), 1.2, -0.4, -0.5, -0.3, 1.0, -1.0, 0.5, -0.5
    )
    trainer = PolicyTrainer(make_spec(base, "grpo", max_tokens=max_tokens))
    before = weights(trainer)
    metrics = trainer.step([tree], step=0, progress=0.0)
    assert metrics["train/microbatches"] == {10_000: 1, 100: 4, 60: 8}[max_tokens]
    assert metrics["train/idle"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_small_pulls_at_many_tokens_are_a_signal_beside_large_ones_that_cancel() -> None:
    rng = np.random.default_rng(6)
    short, long = (segment(rng, n, scored=True) for n in (1, 4000))
    trees = [Tree(0, segment(rng, 4, scored=False), (short, short)), Tree(1, segment(rng, 4, scored=False), (long,))]
    batch = collate(trees)
    for pull, carries in ((2e-6, True), (0.0, False)):
        logps = torch.zeros(len(batch.labels), requires_grad=True)
        pulls = torch.cat([torch.tensor([1.0, -1.0 - 1e-7]), torch.full((4000,), pull)])
        signal = Signal(trees)
        outputs = HeadOutputs(logps=logps * 1.0)
        signal.watch(outputs, batch)
        (outputs.logps * pulls).sum().backward()
        assert signal.carried() is carries


def test_sequences_are_twins_only_with_equal_tokens_scored_places_and_media() -> None:
    rng = np.random.default_rng(0)
    one = segment(rng, 5, scored=True)
    unscored = replace(one, loss_mask=np.array([True, True, False, True, True]))
    pictures = [replace(one, media=(Medium("image", key, "store", 1, 2, 4),)) for key in ("a", "b", "a")]
    trunk = segment(rng, 4, scored=False)
    trees = [Tree(0, trunk, (one, unscored, one)), Tree(1, trunk, tuple(pictures)), Tree(2, trunk, (one,))]
    a, b, c, d, e, f, g = twins(trees).tolist()
    assert a == c == g and d == f, "of whichever tree"
    assert len({a, b, d, e}) == 4
    whole = Segment(np.concatenate([trunk.token_ids, one.token_ids]), np.concatenate([trunk.loss_mask, one.loss_mask]))
    assert twins([Tree(7, whole)]).tolist() == [a], "however it is cut"
    assert twins([Tree(0, one, (one,))]).tolist() != twins([Tree(0, trunk, (one,))]).tolist()
