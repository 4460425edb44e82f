"""What a model does to its logits after the output embedding, found by asking its own forward.

Configurations name scales and caps, and the same name means a factor in one model and a divisor in another (Granite's
`logits_scaling` and HyperCLOVA X's), or nothing at all. So the model's own forward is run with its decoder set aside:
given hidden states go in, logits come out, and what is claimed of them must give the same, at small and at large
hidden states, where a cap shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from align.errors import ModelError
from align.model.head import LogitTransform
from align.model.output_embedding import output_of

FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SIZES = (0.1, 3.0, 100.0)  # of the hidden states
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_BOUND = 0.02
FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)


def logit_transform(model: Any, temperature: float) -> LogitTransform:
    """The transform whose logits are the model's own.

    Where the own forward cannot be run so, the first that the configuration names, unproved: the probe of the whole
    model is to come. Raises ModelError where none that is known gives the model's logits.
    """
    candidates = list(_candidates(model.config))
    own = None if model.get_output_embeddings() is None else _own(model)
    if own is None:
        return LogitTransform(temperature, candidates[0].scale, candidates[0].softcap)
    hidden, logits = own
    with torch.no_grad():
        rows, weight, bias = output_of(model, hidden)
        if rows.shape[-1] != weight.shape[-1]:
            raise ModelError(
                f"{type(model).__name__} has hidden states of {rows.shape[-1]} and an output embedding that takes "
                f"{weight.shape[-1]}: what stands between the two is not known",
                remedy="choose a model whose logits are its output embedding's, perhaps scaled and capped",
            )
        raw = linear(rows, weight, bias)
        errors = [_error(one.apply(raw.clone()), logits) for one in candidates]
    best = min(range(len(candidates)), key=lambda n: errors[n])
    # in the dtype of the model's own forward: `output_of` keeps DoRA's product in float32
    if errors[best] > BOUNDS.get(hidden.dtype, LOW_BOUND):
        raise ModelError(
            f"{type(model).__name__} does something to its hidden states or logits around the output embedding that is "
            f"not known: the nearest of {len(candidates)} scales and caps is off by {errors[best]:.2g} of its logits",
            remedy="choose a model whose logits are its output embedding's, perhaps scaled and capped",
        )
    return LogitTransform(temperature, candidates[best].scale, candidates[best].softcap)


def _candidates(config: Any) -> Iterator[LogitTransform]:
    """Scales and caps that the configuration may mean, the likeliest first."""
    text = config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[tuple[str, float]]:
        found = [(name, getattr(one, name, None)) for one in (text, config) for name in names]
        return [(name, float(v)) for name, v in found if type(v) in (int, float) and v]

    scales = [1 / v if name == "logits_scaling" else v for name, v in numbers(FACTORS)]
    scales += [1 / scale for scale in scales]
    caps: list[float | None] = [v for _, v in numbers(CAPS)]
    for cap, scale in itertools.product(dict.fromkeys([*caps, None]), dict.fromkeys([*scales, 1.0])):
        yield LogitTransform(1.0, scale, cap)


def _error(found: Tensor, own: Tensor) -> float:
    """The largest of the rows, relative to the row's own length; infinite where shapes differ, or what is a number."""
    if found.shape != own.shape:
        return math.inf
    worst = ((found - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12)).max().item()
    return worst if math.isfinite(worst) else math.inf


@torch.no_grad()
def _own(model: Any) -> tuple[Tensor, Tensor] | None:
    """Hidden states [n, D] and the logits f32[n, V] that the model's own forward makes of them; None where it will not
    be run so."""
    weight = next(model.get_output_embeddings().parameters())
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.cat([size * torch.randn(2, width, generator=generator) for size in SIZES])
    hidden = hidden.to(weight.device, weight.dtype)
    was_training = model.training
    model.eval()
    try:
        with _answering(model.base_model, hidden[None]) as asked:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits = model(input_ids=ids, use_cache=False).logits
    except FAILURES:
        return None
    finally:
        model.train(was_training)
    usual = isinstance(logits, Tensor) and logits.shape[:2] == (1, len(hidden))
    return (hidden, logits[0].float()) if usual and asked else None


class _Answer:
    """What a decoder returns, with nothing in it but hidden states."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]


@contextmanager
def _answering(decoder: Any, hidden: Tensor) -> Iterator[list[bool]]:
    """Inside the block the decoder answers with these hidden states, whatever it is asked; yields whether it was."""
    before, asked = vars(decoder).get("forward"), list[bool]()

    def forward(*args: Any, **kwargs: Any) -> _Answer:
        asked.append(True)
        return _Answer(hidden)

    decoder.forward = forward
    try:
        yield asked
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
