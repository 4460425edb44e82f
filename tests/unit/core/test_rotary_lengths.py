"""Rotary frequencies that depend on a row's length: a sequence is computed as by itself, whatever it is beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.packing import collate
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.model.probe.rotary_lengths import lengths_of
from align.protocols.trees import Segment, Tree
from tests.unit.check.test_layout_notes import LONGROPE
from tests.unit.core.families import BASE, make_family

DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
KINDS = {"longrope": ("phi3", LONGROPE | {"sliding_window": None}), "dynamic": ("llama", DYNAMIC)}


def make(kind: str) -> Any:
    """Loud enough that other frequencies show."""
    name, options = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **(BASE | options)), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def segment(rng: np.random.Generator, n: int, *, scored: bool) -> Segment:
    return Segment(rng.integers(0, 97, n), np.full(n, scored))


def trees() -> list[Tree]:
    """Sequences of 14, 12, 60, 31 and 39 tokens; those of the last tree lie on both sides of 32."""
    rng = np.random.default_rng(0)
    sizes = ((8, (6, 4)), (40, (20,)), (30, (1, 9)))
    return [
        Tree(n, segment(rng, trunk, scored=False), tuple(segment(rng, b, scored=True) for b in branches))
        for n, (trunk, branches) in enumerate(sizes)
    ]


def alone(kind: str, trees: list[Tree]) -> list[torch.Tensor]:
    """By transformers' own forward of a model that has seen nothing before."""
    found = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor(np.concatenate([tree.trunk.token_ids, branch.token_ids]))[None]
            logps = make(kind)(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(-1, ids[0, 1:, None])[len(tree.trunk) - 1 :, 0])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_each_sequence_has_its_own_frequencies(kind: str, layout: Any) -> None:
    module = PolicyModule(make(kind))
    probe(module)
    assert module.layout == "shared" and module.lengths is not None and module.lengths.limit == 32
    module.use(layout, "sdpa")
    own = alone(kind, trees())
    for _ in range(2):  # what was computed before changes nothing
        for part in (trees(), trees()[:1], trees()[1:]):
            batch = collate(part)
            first = sum(len(tree.branches) for tree in trees()[: part[0].id])
            found = module(batch).logps
            for sequence in range(batch.sequences):
                torch.testing.assert_close(
                    found[batch.sequence_ids == sequence], own[first + sequence], atol=1e-5, rtol=0
                )


@pytest.mark.parametrize("limit", [16, 32])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_row_just_within_the_limit_is_not_rotated_as_the_longer_one_before_it(layout: Any, limit: int) -> None:
    """transformers' dynamic frequencies shrink again only below the original length: at it, they stay grown. A limit of
    16 is below the lengths of the probe itself."""
    options = DYNAMIC | {"max_position_embeddings": limit}

    def made() -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(BASE | options)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
        return model.eval()

    module = PolicyModule(made())
    probe(module)
    assert module.lengths is not None and module.lengths.limit == limit
    module.use(layout, "sdpa")
    rng = np.random.default_rng(1)
    for sizes in ((limit,), (limit + 20,), (limit, 5), (limit + 20, limit + 3), (limit + 3,), (limit,)):
        rows = [
            Tree(n, segment(rng, 4, scored=False), (segment(rng, size - 4, scored=True),))
            for n, size in enumerate(sizes)
        ]
        batch = collate(rows)
        found = module(batch).logps
        for n, row in enumerate(rows):
            ids = torch.tensor(np.concatenate([row.trunk.token_ids, row.branches[0].token_ids]))[None]
            logps = made()(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            torch.testing.assert_close(
                found[batch.sequence_ids == n], logps.gather(-1, ids[0, 1:, None])[3:, 0], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_batch_with_a_long_sequence_are_those_of_its_sequences_alone(kind: str) -> None:
    module = PolicyModule(make(kind))
    probe(module)
    (gradient,) = torch.autograd.grad(
        module(collate(trees())).logps.sum(), module.model.model.layers[0].mlp.down_proj.weight
    )
    total = torch.zeros_like(gradient)
    for tree in trees():
        for branch in tree.branches:
            model = make(kind)
            ids = torch.tensor(np.concatenate([tree.trunk.token_ids, branch.token_ids]))[None]
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            total += torch.autograd.grad(
                logps[len(tree.trunk) - 1 :].sum(), model.model.layers[0].mlp.down_proj.weight
            )[0]
    torch.testing.assert_close(gradient, total, atol=1e-4 * float(total.abs().max()), rtol=0)


def test_usual_frequencies_depend_on_no_length() -> None:
    for family in ("qwen3", "gemma3_text", "deepseek_v3"):
        assert lengths_of(make_family(family).model) is None
