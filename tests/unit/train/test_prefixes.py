"""An update over rows that begin alike is the update over the same rows, each computed alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from align.protocols.trees import Segment, Tree
from align.recipe.adapter import Adapter
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.pictures import Workshop, open_workshop
from tests.unit.core.trees import segment, unpaired
from tests.unit.train.test_media import make_spec

TRAINED = Adapter(rank=4, alpha=8, targets=r".*(language_model.*_proj|visual.*(qkv|fc1))", tune={"vision": "lora"})
ALIKE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop("qwen2_vl", tmp_path_factory.mktemp("media"))


def joined(*segments: Segment) -> Segment:
    """Segments one after another; only the first has media."""
    tokens, masks = ([getattr(s, name) for s in segments] for name in ("token_ids", "loss_mask"))
    return Segment(np.concatenate(tokens), np.concatenate(masks), media=segments[0].media)


def conversations(shop: Workshop) -> list[Tree]:
    """Three questions about one picture, two about another after the same words, one about none."""
    rng = np.random.default_rng(3)
    beginnings = [shop.segment(np.random.default_rng(8), 16, picture) for picture in (0, 1)]
    beginnings = [beginnings[0]] * 3 + [beginnings[1]] * 2 + [shop.segment(rng, 8)]
    ends = [(shop.segment(rng, 3 + n), shop.segment(rng, 3, scored=True)) for n in range(6)]
    return [Tree(n, joined(start, *end)) for n, (start, end) in enumerate(zip(beginnings, ends, strict=True))]


def completions(shop: Workshop) -> list[Tree]:
    """Labelled completions of two prompts."""
    rng = np.random.default_rng(4)
    prompts = [shop.segment(rng, 20), shop.segment(rng, 18, 0)]
    said = [replace(segment(rng, 3, scored=True), columns={"desirable": float(n // 2 % 2)}) for n in range(6)]
    return [replace(unpaired(rng, n), trunk=prompts[n % 2], branches=(branch,)) for n, branch in enumerate(said)]


@pytest.mark.parametrize("loss", ["sft", "kto"])
def test_rows_that_begin_alike_train_as_rows_apart(shop: Workshop, loss: str) -> None:
    trees = (conversations if loss == "sft" else completions)(shop)
    spec = make_spec(shop.folder, TRAINED, loss, max_tokens=400, reference="start" if loss == "kto" else None)
    found = {}
    for shared in (True, False):
        trainer = PolicyTrainer(spec)
        trainer.packer.may_share = shared
        metrics = [trainer.step(trees, step=n, progress=n / 10) for n in range(2)]
        metrics.append(trainer.evaluate(trees))
        weights = torch.cat([p.detach().flatten() for p in trainable(trainer.module).values()])
        found[shared] = (metrics, weights)
    (together, weights), (apart, others) = found[True], found[False]
    torch.testing.assert_close(weights, others, **ALIKE)
    for one, other in zip(together, apart, strict=True):
        of_results = [name for name in one if not name.startswith(("time/", "tokens/"))]
        assert "loss/total" in of_results
        for name in of_results:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    assert together[0]["tokens/trained"] < 0.8 * apart[0]["tokens/trained"]


def test_groups_of_one_completion_are_left_alone(shop: Workshop) -> None:
    trainer = PolicyTrainer(make_spec(shop.folder, TRAINED, "grpo", reference=None, trainable=False))
    assert not trainer.packer.shares_prefixes
