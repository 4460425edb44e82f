"""Training on pictures: what is computed once and kept, when it must not be, checkpointing and autocast, and two ranks
of which one has all the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train.ranks import Ranks
from align.train.spec import TrainerSpec
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.pictures import Workshop, open_workshop

LANGUAGE = Adapter(rank=4, alpha=8, targets=r".*(language_model|text_model).*_proj")
EVERYWHERE = Adapter(
    rank=4, alpha=8, targets=r".*(language_model.*_proj|visual.*(qkv|fc1|fc2))", tune={"vision": "lora"}
)
FULL = Adapter(kind="full", tune={"vision": "full", "projector": "full"})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop("qwen2_vl", tmp_path_factory.mktemp("media"))


def make_spec(folder: Path, adapter: Adapter, loss: str = "dpo", **changes: Any) -> TrainerSpec:
    spec = TrainerSpec(
        model=Model(path=str(folder), dtype="float32"),
        base=str(folder),
        adapter_config=adapter,
        losses=(LossTerm(name=loss),),
        # a large eps: the update is then a smooth function of the gradient, so weights are compared, not signs
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0, eps=1e-2, max_grad_norm=0.5),
        total_updates=10,
        max_tokens=60,
        reference="start" if loss == "dpo" else None,
        threads=1,
    )
    return replace(spec, **changes)


def pairs(shop: Workshop) -> list[Tree]:
    """Two pairs on the same picture, one on another picture and on the first one again, one of text alone."""
    rng = np.random.default_rng(4)
    trunks = [shop.segment(rng, 5, 0), shop.segment(rng, 4, 0), shop.segment(rng, 6, 1, 0), shop.segment(rng, 7)]
    return [Tree(n, trunk, tuple(shop.segment(rng, k, scored=True) for k in (4, 3))) for n, trunk in enumerate(trunks)]


def text_with_one_picture(shop: Workshop) -> list[Tree]:
    rng = np.random.default_rng(5)
    trunks = [shop.segment(rng, 6, 2), *(shop.segment(rng, 40) for _ in range(3))]
    return [Tree(n, trunk, tuple(shop.segment(rng, k, scored=True) for k in (4, 3))) for n, trunk in enumerate(trunks)]


def tower_runs(trainer: PolicyTrainer) -> list[int]:
    """Grows by the number of pictures at each run of the policy's tower from now on."""
    runs: list[int] = []
    trainer.module.model.base_model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    return runs


def train(trainer: PolicyTrainer, trees: list[Tree], steps: int = 2) -> tuple[list[dict[str, float]], torch.Tensor]:
    metrics = [trainer.step(trees, step=n, progress=n / 10) for n in range(steps)]
    kept = [{k: v for k, v in one.items() if not k.startswith("time/")} for one in metrics]
    return kept, torch.cat([p.detach().flatten() for p in trainable(trainer.module).values()])


def test_a_frozen_tower_runs_once_for_each_picture_in_all_passes_microbatches_and_steps(shop: Workshop) -> None:
    trainer = PolicyTrainer(make_spec(shop.folder, LANGUAGE))
    runs, trees = tower_runs(trainer), pairs(shop)
    metrics, _ = train(trainer, trees)
    assert metrics[0]["train/microbatches"] > 1
    assert sum(runs) == 2 and trainer.module.media is not None
    seen = sum(shop.pictures[n].patches for n in (0, 1))
    assert [one["tokens/patches"] for one in metrics] == [seen, 0]
    trainer.evaluate(trees)
    trainer.logps(trees)
    assert sum(runs) == 2


def test_kept_features_change_no_number(shop: Workshop) -> None:
    (kept, weights), (afresh, same) = (
        train(PolicyTrainer(make_spec(shop.folder, LANGUAGE, media_cache_mb=size)), pairs(shop)) for size in (1024, 0)
    )
    assert torch.allclose(weights, same, atol=1e-6, rtol=0)
    assert afresh[1].pop("tokens/patches") > kept[1].pop("tokens/patches") == 0
    for name, value in kept[1].items():
        assert value == pytest.approx(afresh[1][name], abs=1e-6), name


def test_what_is_kept_of_a_picture_does_not_depend_on_what_it_first_stood_beside(shop: Workshop) -> None:
    trees = pairs(shop)
    found = []
    for first in (trees[2], trees[0]):  # the first picture behind another one, and alone
        trainer = PolicyTrainer(make_spec(shop.folder, LANGUAGE))
        trainer.logps([first])
        found.append(trainer.logps([trees[0]]))
    for one, other in zip(*(logps[0] for logps in found), strict=True):
        assert np.array_equal(one, other)


def test_the_oldest_features_go_where_they_would_not_fit(shop: Workshop) -> None:
    trainer = PolicyTrainer(make_spec(shop.folder, LANGUAGE))
    media = trainer.module.media
    assert media is not None
    runs, trees = tower_runs(trainer), pairs(shop)
    slots = int((shop.tokens["qwen2_vl-0"] == shop.model.config.image_token_id).sum())
    media.limit = slots * 64 * 4  # of float32: the first picture's, and no more
    media._kept.clear()
    media._bytes = 0
    for _ in range(2):
        trainer.logps(trees[:1])
    assert sum(runs) == 1 and media._bytes == media.limit
    trainer.logps(trees)
    assert media._bytes <= media.limit


@pytest.mark.parametrize("adapter", [EVERYWHERE, FULL], ids=["lora on the tower", "full"])
def test_a_tower_that_learns_runs_in_every_pass_and_differs_from_the_references(
    shop: Workshop, adapter: Adapter
) -> None:
    trainer = PolicyTrainer(make_spec(shop.folder, adapter))
    runs, trees = tower_runs(trainer), pairs(shop)[:2]
    towers = {n: p for n, p in trainable(trainer.module).items() if "visual" in n}
    before = {name: p.detach().clone() for name, p in towers.items()}
    metrics, _ = train(trainer, trees, steps=3)
    passes = 2 if adapter is EVERYWHERE else 1  # policy and reference; a full policy's reference is another model
    assert sum(runs) == passes * sum(int(one["train/microbatches"]) for one in metrics)
    assert towers and all(not torch.equal(before[name], p) for name, p in towers.items())
    # the reference stays where it was, tower and all: else the margin would be that of the language model alone
    with trainer.policy.reference() as reference:
        fresh = PolicyTrainer(make_spec(shop.folder, adapter))
        batch = fresh.packer.packed(fresh.packer.planned(trees)[0])
        torch.testing.assert_close(reference(batch).logps, fresh.module(batch).logps, atol=1e-6, rtol=1e-6)


def test_dropout_in_a_frozen_tower_keeps_nothing(shop: Workshop) -> None:
    trainer = PolicyTrainer(make_spec(shop.folder, LANGUAGE, loss="sft"))
    media = trainer.module.media
    assert media is not None and media.constant()
    trainer.module.model.base_model.visual.blocks[0].attn.attention_dropout = 0.1
    trainer.module.train()
    assert not media.constant()
    trainer.module.eval()
    assert media.constant()


@pytest.mark.parametrize("adapter", [LANGUAGE, FULL], ids=["lora", "full"])
def test_checkpointing_changes_nothing(shop: Workshop, adapter: Adapter) -> None:
    found = []
    for checkpointing in (False, True):
        model = Model(path=str(shop.folder), dtype="float32", gradient_checkpointing=checkpointing)
        found.append(train(PolicyTrainer(make_spec(shop.folder, adapter, model=model)), pairs(shop)))
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("adapter", [LANGUAGE, FULL], ids=["lora", "full under autocast"])
def test_bfloat16_trains(shop: Workshop, adapter: Adapter) -> None:
    model = Model(path=str(shop.folder), dtype="bfloat16")
    metrics, _ = train(PolicyTrainer(make_spec(shop.folder, adapter, model=model)), pairs(shop))
    exact, _ = train(PolicyTrainer(make_spec(shop.folder, adapter)), pairs(shop))
    assert metrics[1]["loss/total"] == pytest.approx(exact[1]["loss/total"], abs=0.05)


# ------------------------------------------------------------------------------------------------- ranks

RANKED: dict[str, tuple[Adapter, Callable[[Workshop], list[Tree]]]] = {
    "pictures on one rank, lora": (LANGUAGE, text_with_one_picture),
    "pictures on one rank, full": (FULL, text_with_one_picture),
    "pictures on both, full": (FULL, pairs),
}


def run_case(shop: Workshop, case: str, ranks: Ranks) -> tuple[list[dict[str, float]], torch.Tensor, int]:
    """Metrics, weights, and how often the policy's tower ran."""
    adapter, trees = RANKED[case]
    trainer = PolicyTrainer(make_spec(shop.folder, adapter), ranks=ranks)
    runs = tower_runs(trainer)
    return *train(trainer, trees(shop)), len(runs)


def work(rank: int, shop: Workshop, folder: Path) -> None:
    ranks = Ranks.join(rank, 2, init_method=f"file://{folder}/meet", limit_s=60.0)
    torch.save({case: run_case(shop, case, ranks) for case in RANKED}, folder / f"rank{rank}.pt")
    os._exit(0)


@pytest.mark.slow
def test_two_ranks_are_one_though_one_has_all_the_pictures(shop: Workshop, tmp_path: Path) -> None:
    plain = Workshop(shop.folder, None, shop.store, shop.pictures, shop.tokens)  # without a model to pickle
    running = start_processes(work, (plain, tmp_path), nprocs=2, start_method="spawn", join=False)
    alone = {case: run_case(shop, case, Ranks()) for case in RANKED}
    while not running.join(timeout=60):
        pass
    found: list[Any] = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]  # noqa: TID251
    for case, (metrics, weights, _) in alone.items():
        for both in found:
            assert torch.allclose(both[case][1], weights, atol=1e-6, rtol=0), case
            for one, other in zip(both[case][0], metrics, strict=True):
                assert one["loss/total"] == pytest.approx(other["loss/total"], abs=1e-6)
                assert one["tokens/scored"] == other["tokens/scored"]
    assert sorted(one["pictures on one rank, lora"][2] for one in found) == [0, 1], "kept from the first step on"
    # a tower that learns runs on both at the same times: for nothing, where a rank has text alone
    assert len({one["pictures on one rank, full"][2] for one in found}) == 1
    assert alone["pictures on one rank, full"][2] == 2
