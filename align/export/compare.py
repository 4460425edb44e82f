"""How far two models are apart on the same tokens, and how far they may be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import ExportError
from align.model.score_head import has_score_head, score

SEQUENCES, LENGTH = 4, 64


@dataclass(frozen=True)
class Bound:
    """What a cast to a dtype may cost, measured over the positions of random token sequences.

    kl: mean over positions of KL(before || after) in nats; top1: share of positions with the same most likely token.
    logp: mean over tokens of |difference of their log-probability|, where only those are known.

    Why these figures. Rounding a weight to p bits puts a relative error of up to 2^-p on it, hence an error e on the
    logits that grows with depth; KL is then near e^2 / 2, and the best token changes where the two best are closer than
    e. Measured on random-weight models of 2 to 24 layers with adapters that move them by 0.3 to 0.6 nats: float32 1e-13
    to 3e-12 nats (the order of summation), float16 1e-7 to 1e-6, bfloat16 6e-6 to 7e-5 with the same best token at 96 %
    of positions or more. On SmolLM2-135M-Instruct (30 layers, pretrained), base and with an adapter that moves it by
    6e-4 nats: float32 5e-11, float16 6e-6, bfloat16 1e-4 to 2e-4, the same best token at 98 % or more. Random weights
    are the hard case for top1, peaked distributions for kl: the bounds leave a factor of 25 to 2000 for them.

    They are no proof of an adapter: on the pretrained model a forgotten module of it costs 6e-7, a scale that is twice
    too large 6e-4, and rounding to bfloat16 2e-4. `merge_proof` compares weights.
    """

    kl: float
    top1: float
    logp: float


BOUNDS = {
    torch.float32: Bound(kl=1e-7, top1=0.99, logp=1e-4),
    torch.float16: Bound(kl=3e-4, top1=0.97, logp=2e-2),
    torch.bfloat16: Bound(kl=5e-3, top1=0.90, logp=1e-1),
}


@dataclass(frozen=True)
class Distance:
    """KL(before || after) in nats over positions: mean and largest; share of positions with equal best token."""

    kl_mean: float
    kl_max: float
    top1: float


# settings of a config that name the tokens which stand for media or stand around them
MEDIA_TOKENS = re.compile(r"^(boi|eoi|boa|eoa|.*(image|video|audio|vision).*)_token_(id|index)$")
Sample = np.ndarray | Mapping[str, Tensor]  # token ids i64[n], or what a processor made of a picture and a text


def random_tokens(config: Any, seed: int) -> list[np.ndarray]:
    """i64[n] token sequences, uniform over the vocabulary of a transformers config, marks of media left out; n leaves
    room for one more."""
    text = config.get_text_config()
    length = min(LENGTH, int(getattr(text, "max_position_embeddings", None) or LENGTH + 1) - 1)
    generator = np.random.default_rng([seed, text.vocab_size])
    marks = [value for name, value in config.to_dict().items() if MEDIA_TOKENS.match(name) and isinstance(value, int)]
    words = np.setdiff1d(np.arange(text.vocab_size), marks)
    return [words[generator.integers(0, len(words), length)] for _ in range(SEQUENCES)]


@torch.no_grad()
def log_probabilities(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """f32[n, V] per sample on the CPU: the distribution after each token.

    Of a model with a score head f32[n * K, 2], by output: how likely the text up to each token is preferred to one of
    score 0, and not. That tells any difference in scores, whatever they mean.
    """
    device = next(model.parameters()).device
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for sample in samples:
        if isinstance(sample, Mapping):
            inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in sample.items()}
        else:
            inputs = {"input_ids": torch.as_tensor(sample, device=device)[None]}
        inputs["use_cache"] = False
        if has_score_head(plain):
            scores = score(plain, plain.base_model(**inputs).last_hidden_state[0]).reshape(-1, 1)
            logits = torch.cat([scores, torch.zeros_like(scores)], dim=-1)
        else:
            logits = _logits(model, inputs)
        found.append(torch.log_softmax(logits, dim=-1).cpu())
    return found


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """f32[n, V]. Raises ExportError where a picture, as its processor made it ready, does not fit the model."""
    try:
        logits: Tensor = model(**inputs).logits[0].float()
    except (RuntimeError, ValueError) as error:
        if set(inputs) == {"input_ids", "use_cache"}:
            raise
        raise ExportError(
            f"the model cannot read a picture as its processor makes it ready: {error}",
            remedy="check that the processor's files are those of this model",
        ) from error
    return logits


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> Distance:
    """Compare f32[n, V] log-probabilities position by position. Raises ExportError where they are not finite."""
    # normalised again in float64: a float32 sum that misses 1 by 1e-7 would enter KL in first order
    p, q = (torch.log_softmax(torch.cat(list(logps)).double(), dim=-1) for logps in (before, after))
    if not (torch.isfinite(p).all() and torch.isfinite(q).all()):
        raise ExportError(
            "log-probabilities are not finite", remedy="the policy has diverged: use an earlier checkpoint"
        )
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return Distance(float(kl.mean()), float(kl.max()), float(top1))


def require_close(measured: Distance, bound: Bound, what: str, dtype: torch.dtype) -> None:
    """Raise ExportError where a distance is beyond the bound."""
    if measured.kl_mean <= bound.kl and measured.top1 >= bound.top1:
        return
    raise ExportError(
        f"{what} differs from what was trained beyond {str(dtype).removeprefix('torch.')}'s bounds: mean KL "
        f"{measured.kl_mean:.2e} (at most {bound.kl:.0e}), same best token at {measured.top1:.1%} of positions (at "
        f"least {bound.top1:.0%})",
        remedy="nothing was written; choose dtype float32, or report this model",
    )
