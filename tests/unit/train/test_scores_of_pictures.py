"""Classifiers and reward models on pictures: the same head, on the same forward of packed trees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.packing import collate, text_positions
from align.model.media.placeholders import positions_of, type_ids
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.model.score_head import load_score_model
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.labels import Labels
from align.recipe.parts import LossTerm, Optim
from align.train.spec import TrainerSpec
from align.train.trainer import PolicyTrainer
from tests.tiny_vlms import FAMILIES
from tests.unit.core.pictures import Workshop, open_workshop
from tests.unit.core.test_families_media import by_hand

F32 = torch.float32
LABELS = Labels(("first", "second", "third"), "single_label")
LANGUAGE = r"(.*\.)?(language_model|text_model)\..*(q_proj|v_proj|down_proj)"
TYPES = {"gemma3": "token_type_ids", **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")}


def labelled_pictures(shop: Workshop, rows: int, seed: int) -> list[Tree]:
    """Random text around a picture, whose number is the label."""
    rng, found = np.random.default_rng(seed), []
    for number in range(rows):
        segment = shop.segment(rng, int(rng.integers(4, 9)), number % 3)
        found.append(Tree(number, replace(segment, columns={"class": float(number % 3)})))
    return found


@torch.no_grad()
def own_scores(shop: Workshop, head: torch.Tensor, trees: list[Tree]) -> torch.Tensor:
    """f32[S, K] by the model's own forward, a sequence at a time."""
    found = []
    for tree in trees:
        ids, media = tree.trunk.token_ids, list(tree.trunk.media)
        types = type_ids(shop.model.config, ids, media, [medium.start for medium in media])
        name = TYPES.get(shop.model.config.model_type)
        kwargs = {name: torch.tensor(types)[None]} if name else {}
        kwargs |= by_hand(shop, [media])
        hidden = shop.model.model(input_ids=torch.tensor(ids)[None], use_cache=False, **kwargs).last_hidden_state
        found.append(hidden[0, -1] @ head.T)
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_of_pictures_equal_those_of_the_models_own_forward(family: str, tmp_path: Path) -> None:
    shop = open_workshop(family, tmp_path)
    model = load_score_model(shop.folder, dtype=F32, seed=5, labels=LABELS, attention="eager")
    trees = labelled_pictures(shop, 5, seed=0)
    module = PolicyModule(model).eval()
    assert probe(module) < 1e-4
    with torch.no_grad():
        said = module(collate(trees, positions_of(model, text_positions)), want=("scores",)).scores
    wanted = own_scores(shop, model.score.weight, trees)
    torch.testing.assert_close(said, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2, "pictures and texts differ, and so must scores"


def spec(shop: Workshop, loss: str, labels: Labels | None) -> TrainerSpec:
    return TrainerSpec(
        model=Model(path=str(shop.folder), dtype="float32"), base=str(shop.folder), labels=labels,
        adapter_config=Adapter(rank=4, alpha=8.0, targets=LANGUAGE), losses=(LossTerm(name=loss),),
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0), total_updates=20, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_a_classifier_learns_which_picture_it_sees(family: str, tmp_path: Path) -> None:
    shop = open_workshop(family, tmp_path)
    trainer = PolicyTrainer(spec(shop, "classify", LABELS))
    train, held = labelled_pictures(shop, 24, seed=0), labelled_pictures(shop, 9, seed=1)
    for step in range(20):
        trainer.step(train, step=step, progress=step / 20)
    metrics = trainer.evaluate(held)
    assert metrics["accuracy"] == metrics["f1_macro"] == metrics["f1/second"] == 1.0
    assert [int(rows[0].argmax()) for rows in trainer.scores(held)] == [n % 3 for n in range(9)]


def test_a_reward_model_prefers_the_answer_with_the_right_picture(tmp_path: Path) -> None:
    shop = open_workshop("qwen2_5_vl", tmp_path)
    trainer = PolicyTrainer(spec(shop, "reward_model", None))

    def pairs(rows: int, seed: int) -> list[Tree]:
        rng = np.random.default_rng(seed)
        return [Tree(n, shop.segment(rng, 4), tuple(shop.segment(rng, 4, k) for k in (0, 2))) for n in range(rows)]

    for step in range(12):
        trainer.step(pairs(8, 0), step=step, progress=step / 12)
    assert trainer.evaluate(pairs(6, 1))["rewards/accuracies"] == 1.0
