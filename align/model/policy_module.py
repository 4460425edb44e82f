"""Backbone and fused head as one module: forward(TokenBatch) -> HeadOutputs.

One module, because sharding strategies gather parameters around a module's forward, and the head's recompute in the
backward pass must gather again. The transformers model stays whole inside it, so that peft, saving and merging see
the layout they know.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ModelError, Unsupported
from align.model.attention import NAME, plan_attention
from align.model.head import LogitTransform, fused_head
from align.model.score_head import HEAD, has_score_head, score
from align.types import HeadOutputs, TokenBatch


class PolicyModule(nn.Module):
    """A causal language model whose forward runs over packed trees and never makes logits.

    Args:
        model: a transformers causal LM; peft layers may have been injected into it.
        temperature: log-probabilities are those of softmax(logits / temperature); 1.0 except for online stages.
        autocast: compute dtype for float32 master weights (full fine-tuning in bfloat16), or None.
    """

    def __init__(self, model: Any, *, temperature: float = 1.0, autocast: torch.dtype | None = None):
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.transform = logit_transform(model.config, temperature)
        model.config.use_cache = False
        model.set_attn_implementation(NAME)

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        """HeadOutputs with logps f32[N], and of entropy and log_sum_sq f32[N] those named in `want`. A model with a
        score head gives scores f32[S, K] where they are wanted, and nothing else."""
        device = batch.token_ids.device
        context = nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)
        with context:
            hidden = self.model.base_model(
                input_ids=batch.token_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                align_plan=plan_attention(batch),
            ).last_hidden_state.squeeze(0)
        if has_score_head(self.model):
            wanted = score(self.model, hidden.index_select(0, batch.score_at)) if "scores" in want else None
            return HeadOutputs(logps=hidden.new_zeros(0, dtype=torch.float32), scores=wanted)
        weight, bias = output_embedding(self.model)
        scored = hidden.index_select(0, batch.predict_at).to(self.autocast or weight.dtype)
        return fused_head(
            scored,
            weight.to(scored.dtype),
            batch.labels,
            bias=None if bias is None else bias.to(scored.dtype),
            transform=self.transform,
            want=want,
        )


def logit_transform(config: Any, temperature: float) -> LogitTransform:
    """What the model's own forward does to its logits, by its config (Gemma's cap, Cohere's and Granite's scale)."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitTransform(temperature, scale, getattr(text, "final_logit_softcapping", None))


def output_embedding(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias of the language model head, with a LoRA on it folded in (gradients reach A and B)."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return head.weight, head.bias
    adapters = [name for name in getattr(head, "active_adapters", []) if name in head.lora_A]
    base = head.get_base_layer()
    weight = base.weight
    if getattr(head, "disable_adapters", False) or head.merged:
        return weight, base.bias
    for name in adapters:
        if not isinstance(head.lora_dropout[name], nn.Identity):
            raise Unsupported("LoRA dropout on the language model head", remedy="set adapter.dropout to 0")
        delta = head.lora_B[name].weight @ head.lora_A[name].weight
        weight = weight + (head.scaling[name] * delta).to(weight.dtype)
    return weight, base.bias


def two_tree_batch(vocabulary: int, device: torch.device | str, seed: int = 0) -> tuple[TokenBatch, list[list[int]]]:
    """Two random trees of two branches as a packed batch, and the same four sequences as plain token lists."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(7, (5, 3)), (4, (6, 1))]
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    predict_at: list[int] = []
    labels: list[int] = []
    sequence_ids: list[int] = []
    score_at: list[int] = []
    plain: list[list[int]] = []
    for trunk_size, branch_sizes in sizes:
        trunk = torch.randint(0, vocabulary, (trunk_size,), generator=generator).tolist()
        start = len(tokens)
        tokens += trunk
        positions += range(trunk_size)
        segments.append((start, start + trunk_size, -1, -1))
        for size in branch_sizes:
            branch = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
            at = len(tokens)
            tokens += branch
            positions += range(trunk_size, trunk_size + size)
            segments.append((at, at + size, start, start + trunk_size))
            predict_at += [start + trunk_size - 1, *range(at, at + size - 1)]
            labels += branch
            sequence_ids += [len(plain)] * size
            score_at.append(len(tokens) - 1)
            plain.append(trunk + branch)
    n = len(labels)
    bounds = torch.tensor(segments, dtype=torch.int32)
    batch = TokenBatch(
        token_ids=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        query_start=bounds[:, 0],
        query_end=bounds[:, 1],
        parent_start=bounds[:, 2],
        parent_end=bounds[:, 3],
        predict_at=torch.tensor(predict_at),
        labels=torch.tensor(labels),
        sequence_ids=torch.tensor(sequence_ids),
        loss_mask=torch.ones(n, dtype=torch.bool),
        nll_mask=torch.ones(n, dtype=torch.bool),
        advantages=torch.zeros(n),
        behavior_logps=torch.zeros(n),
        versions=torch.zeros(n, dtype=torch.int32),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        score_at=torch.tensor(score_at),
    )
    return batch.to(device), plain


@torch.no_grad()
def probe(module: PolicyModule) -> float:
    """Compare the packed forward with the model's own padded forward on two trees; return the largest difference.

    A model whose layers carry state, attend both ways or treat positions specially shows here, whatever its name.
    Raises ModelError where the two differ by more than the dtype's noise.
    """
    model = module.model
    was_training = module.training
    module.eval()
    device = next(model.parameters()).device
    batch, plain = two_tree_batch(model.config.get_text_config().vocab_size, device)
    scores = has_score_head(model)
    packed = _unit_scores(model, module(batch, want=("scores",)).scores) if scores else module(batch).logps
    try:
        model.set_attn_implementation("sdpa")
        one = _plain_scores if scores else _plain_logps
        padded = torch.cat([one(module, tokens, device) for tokens in plain])
    finally:
        model.set_attn_implementation(NAME)
        module.train(was_training)
    if not scores:
        scored = [len(tokens) - prefix for tokens, prefix in zip(plain, (7, 7, 4, 4), strict=True)]
        ends = torch.tensor([len(tokens) - 1 for tokens in plain]).cumsum(0).tolist()
        padded = torch.cat([padded[end - n : end] for end, n in zip(ends, scored, strict=True)])
    difference = (packed - padded).abs().max().item()
    low_precision = module.autocast is not None or next(model.parameters()).dtype != torch.float32
    if not math.isfinite(difference) or difference > (0.25 if low_precision else 1e-3):
        raise ModelError(
            f"{type(model).__name__} gives other {'scores' if scores else 'log-probabilities'} in packed trees than "
            f"alone (largest difference {difference:.3g}): its layers look beyond the causal prefix, or carry state",
            remedy="this version trains plain causal attention only; choose another model",
        )
    return difference


def _plain_logps(module: PolicyModule, tokens: list[int], device: torch.device) -> Tensor:
    """Log-probabilities f32[n - 1] of a sequence under the model's own forward, logits and all."""
    ids = torch.tensor([tokens], device=device)
    context = nullcontext() if module.autocast is None else torch.autocast(device.type, dtype=module.autocast)
    with context:
        logits = module.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    log_p = torch.log_softmax(logits / module.transform.temperature, dim=-1)
    return log_p.gather(-1, ids[0, 1:, None])[:, 0]


def _plain_scores(module: PolicyModule, tokens: list[int], device: torch.device) -> Tensor:
    """Score f32[K] of a sequence's last token under the backbone's own forward, as `_unit_scores`."""
    ids = torch.tensor([tokens], device=device)
    context = nullcontext() if module.autocast is None else torch.autocast(device.type, dtype=module.autocast)
    with context:
        hidden = module.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return _unit_scores(module.model, score(module.model, hidden[:, -1]))


def _unit_scores(model: Any, scores: Tensor | None) -> Tensor:
    """f32[S * K]: scores in units of the head's length, so that a small fresh head hides no difference."""
    assert scores is not None
    weight = next(getattr(model, HEAD).parameters())
    return (scores / weight.norm().clamp(min=1e-12)).flatten()
