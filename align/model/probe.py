"""The two-tree probe: which layout computes what the model's own forward computes. It decides, not a list of names.

At load, two small random trees, one of them on a picture where the model takes images, are run through the packed
forward, kernel by kernel, and where none agrees through the unshared one. A layer that carries state, attends both
ways, or treats positions specially shows here, whatever its name. Sliding windows are made small for it, so that two
small trees reach beyond them.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from align.errors import ModelError, UserError
from align.mediastore import read_tensors
from align.model.attention import kernels_for
from align.model.media import merged
from align.model.places import type_ids
from align.model.policy_module import PolicyModule, set_attention, text_backbone
from align.model.probe_rows import Alone, picture_prompt, two_tree_batch
from align.model.score_head import HEAD, has_score_head, score
from align.types import TokenBatch

log = logging.getLogger(__name__)

Layout = Literal["shared", "unshared"]

WINDOW = 4  # of layers with a sliding window, for the time of the probe
FLOAT32_BOUND = 1e-3  # largest difference
LOW_BOUND, LOW_FACTOR = 0.05, 6.0  # mean difference, alone and in units of the model's own noise
# what a forward may raise that a model was not written for
FAILURES = (UserError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)


@torch.no_grad()
def probe(module: PolicyModule) -> float:
    """Choose the module's layout and attention, and return the largest difference from the model's own forward.

    Own means alone, in a row, with transformers' eager attention and positions. float32 must agree to 1e-3; in low
    precision the mean difference is held against what padding alone does to the model's own forward.
    Raises ModelError where no layout agrees, or where the forward gives other values each time (dropout left on).
    """
    model = module.model
    device = next(model.parameters()).device
    what = "scores" if has_score_head(model) else "log-probabilities"
    was_training = module.training
    tried: list[str] = []
    module.eval()
    try:
        with _small_windows(model), picture_prompt(module) as prompt:
            vocabulary = model.config.get_text_config().vocab_size
            batch, plain = two_tree_batch(vocabulary, device, model=model, prompt=prompt)
            bound = _Bound(module, plain)
            for layout, attention in _candidates(module):
                module.use(layout, attention)
                difference, fault = bound.compare(batch)
                if fault is None:
                    _report(module, tried)
                    return difference
                tried.append(f"{layout} ({attention}): {fault}")
    finally:
        module.train(was_training)
    raise ModelError(
        f"{type(model).__name__} gives other {what} in packed trees than alone, and also where each sequence has a row "
        f"of its own: its layers look beyond the causal prefix, or its values change from call to call. "
        f"Tried {'; '.join(tried)}",
        remedy="choose a causal language model, and one without dropout outside training",
    )


def _candidates(module: PolicyModule) -> Iterator[tuple[Layout, str]]:
    """Layouts and attentions to try, best first."""
    weight = next(module.model.parameters())
    dropout = module.trains_with_attention_dropout()
    for kernel in kernels_for(module.wanted_attention, weight.device, module.autocast or weight.dtype, dropout=dropout):
        yield "shared", kernel
    yield "unshared", "sdpa"
    yield "unshared", "eager"


def _report(module: PolicyModule, tried: list[str]) -> None:
    if module.layout == "unshared":
        log.warning(
            "%s is computed a sequence a row, trunks repeated: packed trees do not serve it. %s",
            type(module.model).__name__,
            "; ".join(tried),
        )
    elif tried:
        log.info("attention: %s. %s", module.attention, "; ".join(tried))


class _Bound:
    """The model's own values for the probe's sequences, and how far from them another computation may be."""

    def __init__(self, module: PolicyModule, plain: list[Alone]):
        self.module = module
        implementation = module.model.config.get_text_config()._attn_implementation
        set_attention(module.model, "eager")
        try:
            self.own = torch.cat([_own_values(module, [sequence]) for sequence in plain])
            again = torch.cat([_own_values(module, [sequence]) for sequence in plain])
            padded = _own_values(module, plain)
        finally:
            set_attention(module.model, implementation)
        low = module.autocast is not None or next(module.model.parameters()).dtype != torch.float32
        self.low = max(LOW_BOUND, LOW_FACTOR * (padded - self.own).abs().mean().item()) if low else None
        if self._fault(again) is not None:
            raise ModelError(
                f"{type(module.model).__name__} gives other values each time it is asked the same: its forward is "
                "random outside training, for instance by dropout that is left on",
                remedy="set the model's dropout to 0 in its config.json",
            )

    def compare(self, batch: TokenBatch) -> tuple[float, str | None]:
        """Largest difference of the module's values in its present layout, and what is wrong with them, if anything."""
        try:
            outputs = self.module(batch, want=("scores",) if has_score_head(self.module.model) else ())
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            return math.inf, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        scores = has_score_head(self.module.model)
        found = _unit_scores(self.module.model, outputs.scores) if scores else outputs.logps
        return (found - self.own).abs().max().item(), self._fault(found)

    def _fault(self, found: Tensor) -> str | None:
        difference = (found - self.own).abs()
        largest, mean = difference.max().item(), difference.mean().item()
        if not math.isfinite(largest):
            return "values that are not finite"
        if self.low is None:
            return None if largest <= FLOAT32_BOUND else f"largest difference {largest:.3g}"
        return None if mean <= self.low else f"mean difference {mean:.3g}, more than {self.low:.2g}"


@contextmanager
def _small_windows(model: Any) -> Iterator[None]:
    """Sliding windows and attention chunks of WINDOW tokens, wherever model and configuration have longer ones."""
    owners = {
        id(owner): owner for m in model.modules() for owner in (m, getattr(m, "config", None)) if owner is not None
    }
    changed: list[tuple[Any, str, int]] = []
    try:
        for owner in owners.values():
            for name in ("sliding_window", "attention_chunk_size"):
                value = getattr(owner, name, None)
                if type(value) is int and value > WINDOW:
                    changed.append((owner, name, value))
                    setattr(owner, name, WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _own_values(module: PolicyModule, rows: list[Alone]) -> Tensor:
    """Under the model's own forward, padded on the right to the longest row: scores f32[S * K] of the last tokens, as
    `_unit_scores`, or log-probabilities f32[N] of the branches' tokens."""
    model, longest = module.model, max(len(row.tokens) for row in rows)
    device = next(model.parameters()).device
    gaps = [longest - len(row.tokens) for row in rows]
    ids = torch.tensor([row.tokens + row.tokens[-1:] * gap for row, gap in zip(rows, gaps, strict=True)], device=device)
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps], device=device)
    kwargs = ({"attention_mask": mask} if len(rows) > 1 else {}) | _own_media(model, rows, ids)
    context = nullcontext() if module.autocast is None else torch.autocast(device.type, dtype=module.autocast)
    if has_score_head(model):
        with context:
            backbone = model.base_model if any(row.media for row in rows) else text_backbone(model)
            hidden = backbone(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
        last = [len(row.tokens) - 1 for row in rows]
        return _unit_scores(model, score(model, hidden[range(len(rows)), last]))
    with context:
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits[:, :-1].float()
    log_p = torch.log_softmax(logits / module.transform.temperature, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([one[row.trunk - 1 : len(row.tokens) - 1] for one, row in zip(log_p, rows, strict=True)])


def _own_media(model: Any, rows: list[Alone], ids: Tensor) -> dict[str, Tensor]:
    """What the model's own forward takes for the media in rows of ids i64[B, L], as a processor would return it."""
    media = [medium for row in rows for medium in row.media]
    if not media:
        return {}
    known = inspect.signature(model.base_model.forward).parameters
    at = [[medium.start for medium in row.media] for row in rows]
    types = [type_ids(model.config, one, row.media, a) for one, row, a in zip(ids.cpu().numpy(), rows, at, strict=True)]
    tensors = merged([read_tensors(medium) for medium in media])
    tensors |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), torch.as_tensor(np.stack(types)))
    return {name: tensor.to(ids.device) for name, tensor in tensors.items() if name in known}


def _unit_scores(model: Any, scores: Tensor | None) -> Tensor:
    """f32[S * K]: scores in units of the head's length, so that a small fresh head hides no difference."""
    assert scores is not None
    weight = next(getattr(model, HEAD).parameters())
    return (scores / weight.norm().clamp(min=1e-12)).flatten()
