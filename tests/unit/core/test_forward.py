"""The packed forward is the model's own forward, whatever the layout and the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.microbatches import plan_microbatches
from align.data.packing import collate, global_counts, mark_nll
from align.errors import ModelError
from align.losses import configure
from align.losses.base import LossInputs
from align.model.fused.exchange import fuse
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.protocols.trees import Tree
from tests.unit.core.trees import conversation, group, pair, unpaired

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 6},
}


def make_model(family: str, seed: int = 0, **options: Any) -> Any:
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{**FAMILIES.get(family, {}), **options},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def padded_logps(model: Any, tree: Tree) -> list[torch.Tensor]:
    """Log-probabilities of the scored tokens of each sequence, one plain forward a sequence."""
    model.set_attn_implementation("sdpa")
    out = []
    for branch in tree.branches or (None,):
        ids = np.concatenate([tree.trunk.token_ids, branch.token_ids]) if branch else tree.trunk.token_ids
        mask = np.concatenate([tree.trunk.loss_mask, branch.loss_mask]) if branch else tree.trunk.loss_mask
        logits = model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.as_tensor(ids)[1:, None])[:, 0]
        out.append(chosen[torch.as_tensor(mask)[1:]])
    model.set_attn_implementation("align_packed")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probs_and_gradients_equal_one_forward_per_sequence(family: str) -> None:
    rng = np.random.default_rng(3)
    trees = [conversation(rng, 0), pair(rng, 1), group(rng, 2), pair(rng, 3), conversation(rng, 4)]
    model = make_model(family)
    module = PolicyModule(model)
    packed = module(collate(trees)).logps
    plain = torch.cat([torch.cat(padded_logps(model, tree)) for tree in trees])
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=1e-5)

    cotangent = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    packed_grads = torch.autograd.grad((packed * cotangent).sum(), list(model.parameters()))
    plain_grads = torch.autograd.grad((plain * cotangent).sum(), list(model.parameters()))
    for mine, theirs in zip(packed_grads, plain_grads, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        assert ((mine - theirs).abs().max() / scale) < 1e-4


def test_the_probe_catches_a_layer_that_looks_at_its_neighbours() -> None:
    model = make_model("qwen3")
    layer = model.model.layers[0].mlp  # rolled around the end: the first token sees the last
    layer.register_forward_hook(lambda module, args, out: out + 0.5 * out.roll(1, dims=1))
    with pytest.raises(ModelError, match=r"looks beyond the causal prefix: what model\.layers\.0\.mlp"):
        probe(PolicyModule(model))


# One per kind of record; every option of every loss is split on tensors in tests/unit/losses/test_splits.py.
CASES = [
    ("sft", {"variant": "dft"}, conversation),
    ("dpo", {}, pair),
    ("orpo", {}, pair),  # scores its prompt too
    ("kto", {"variant": "apo_zero_unpaired"}, unpaired),
    ("grpo", {"kl": 0.1, "entropy_bonus": 0.01}, group),
]


@pytest.mark.parametrize(("name", "options", "make"), CASES)
def test_any_split_into_microbatches_gives_the_same_loss_and_gradient(name: str, options: dict, make: Any) -> None:
    rng = np.random.default_rng(5)
    trees = [make(rng, i) for i in range(6)]
    module = PolicyModule(make_model("qwen3"))
    chosen = configure(name, options)
    trees = [mark_nll(tree, chosen.needs.nll) for tree in trees]
    counts = global_counts(trees)

    def run(max_tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        total = torch.zeros(())
        module.zero_grad()
        for part in plan_microbatches(trees, max_tokens, keep_together=chosen.needs.record == "pair"):
            batch = collate(part)
            outputs = module(batch, want=chosen.needs.head)
            reference = outputs.logps.detach() * 0.9 if chosen.needs.reference else None
            loss = chosen(LossInputs(outputs, batch, counts, reference_logps=reference)).loss
            loss.backward()
            total = total + loss.detach()
        return total, [p.grad.clone() for p in module.parameters() if p.grad is not None]

    whole, whole_grads = run(10_000)
    split, split_grads = run(1)
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-6)
    scale = max(g.abs().max() for g in whole_grads)
    assert max((a - b).abs().max() for a, b in zip(whole_grads, split_grads, strict=True)) / scale < 1e-5


def test_a_batch_without_a_scored_token_has_a_forward_and_a_gradient_of_zero() -> None:
    """A step whose every completion was masked (truncated, failed scores)."""
    tree = pair(np.random.default_rng(0), 0)
    silent = [replace(branch, loss_mask=np.zeros(len(branch), bool)) for branch in tree.branches]
    module = PolicyModule(make_model("qwen3"))
    fuse(module.model)
    out = module(collate([replace(tree, branches=tuple(silent))]), want=("entropy", "log_sum_sq"))
    assert out.logps.shape == (0,)
    out.logps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
