"""How the transformers engine may read a batch of prompts: found by trying, for each model, what leaves rows alone.

    padded    prompts of all lengths in one batch, shorter ones padded on the left, with a cache
    equal     prompts of one length a batch, with a cache: a layer that carries a state from token to token (Mamba,
              linear attention, convolutions) carries that of the padding too
    uncached  prompts of one length a batch, everything computed again for each token: the model's cache is none that
              the engine can repeat and select rows of, or it continues other than the model's own forward

What padding holds must not matter: that is asked exactly, in every dtype. Values are held against the model's own
forward of each row alone: to 1e-3 in float32; in half precision, where that forward itself is off by its rounding,
against several times what a batch alone changes in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from align.errors import Unsupported

log = logging.getLogger(__name__)

Reading = Literal["padded", "equal", "uncached"]

SHORT, LONG, AHEAD = 5, 11, 4  # tokens of two prompts, and of what follows each
FLOAT32_BOUND, LOW_BOUND, LOW_FACTOR = 1e-3, 0.25, 8.0
# what a forward may raise that takes no such cache or mask
FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


@torch.no_grad()
def find_reading(model: Any, device: str) -> Reading:
    """The best way to read prompts that gives each row what it has alone. Raises Unsupported where there is none."""
    vocabulary = model.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    rows = [torch.tensor(rng.integers(0, min(vocabulary, 200), (1, n + AHEAD)), device=device) for n in (LONG, SHORT)]
    alone = torch.cat([_tail(_whole(model, row)) for row in rows])
    tried: list[str] = []
    ways: dict[Reading, Callable[[], Tensor]] = {
        "padded": lambda: _padded(model, rows),
        "equal": lambda: torch.cat([_cached(model, row.expand(2, -1), None)[:1] for row in rows]),
        "uncached": lambda: torch.cat([_tail(_whole(model, row.expand(2, -1)))[:1] for row in rows]),
    }
    bound = _bound(model, alone, ways["uncached"])
    for way, compute in ways.items():
        try:
            difference = (compute() - alone).abs()
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            tried.append(f"{way}: {type(error).__name__} {str(error).strip().splitlines()[0] if str(error) else ''}")
            continue
        if bool(torch.isfinite(difference).all()) and bound(difference):
            if tried:
                log.warning("%s reads prompts %s. %s", type(model).__name__, WORDS[way], "; ".join(tried))
            return way
        tried.append(
            f"{way}: log-probabilities differ by up to {difference.max().item():.3g} from those of a row alone"
        )
    raise Unsupported(
        f"{type(model).__name__} cannot be sampled from with transformers: {'; '.join(tried)}",
        where="rollout.name",
        remedy="use rollout.name=vllm",
    )


WORDS: dict[Reading, str] = {
    "padded": "of all lengths in one batch",
    "equal": "of one length a batch, which is slower",
    "uncached": "of one length a batch and without a cache, which is much slower",
}


def _bound(model: Any, alone: Tensor, batched: Callable[[], Tensor]) -> Callable[[Tensor], bool]:
    if next(model.parameters()).dtype == torch.float32:
        return lambda difference: difference.max().item() <= FLOAT32_BOUND
    noise = (batched() - alone).abs().mean().item()
    return lambda difference: difference.mean().item() <= max(LOW_BOUND, LOW_FACTOR * noise)


def _whole(model: Any, ids: Tensor) -> Tensor:
    """Logits f32[B, L, V] of the model's own forward."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _tail(logits: Tensor) -> Tensor:
    """Log-probabilities f32[B, AHEAD + 1, V] at the end of the prompt and after each token ahead."""
    return torch.log_softmax(logits[:, -AHEAD - 1 :], -1)


def _cached(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probabilities f32[B, AHEAD + 1, V]: the prompts read at once, then a token at a time, from a cache whose rows
    were repeated and selected as sampling does. ids i64[B, L]."""
    prompt, ahead = ids[:, :-AHEAD], ids[:, -AHEAD:]
    mask = torch.ones_like(prompt) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=prompt, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, found = out.past_key_values, [out.logits[:, -1].float()]
    take_rows(cache, torch.arange(len(ids), device=ids.device).repeat_interleave(2))
    take_rows(cache, torch.arange(0, 2 * len(ids), 2, device=ids.device))
    position = positions[:, -1:] + 1
    for token in ahead.split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        out = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        cache, position = out.past_key_values, position + 1
        found.append(out.logits[:, -1].float())
    return torch.log_softmax(torch.stack(found, 1), -1)


def take_rows(cache: Any, rows: Tensor) -> None:
    """Give a cache these of its rows i64[B], repeated and left out as they are. What beam search calls, because it
    alone is offered for states of layers as for keys and values."""
    cache.reorder_cache(rows)


def longest_row(config: Any) -> int | None:
    """Tokens beyond which a row's rotary frequencies are others than at its beginning; None where they never are.

    With them a row depends on the longest one of its batch, and its cached keys are of another kind than its new ones.
    """
    text = config.get_text_config()
    stated = getattr(text, "rope_parameters", None) or {}
    each = [one for one in (stated, *stated.values()) if isinstance(one, dict)]
    limits = [
        one.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for one in each
        if "dynamic" in str(one.get("rope_type")) or one.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def _padded(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """`_cached` of rows of unequal length; values that depend on what the padding holds are not finite."""
    longest = max(row.shape[1] for row in rows)
    gaps = [longest - row.shape[1] for row in rows]
    mask = torch.tensor([[0] * gap + [1] * (longest - gap - AHEAD) for gap in gaps], device=rows[0].device)
    vocabulary = model.config.get_text_config().vocab_size
    values = []
    for padding in (0, vocabulary // 2):
        ids = torch.cat([pad(row, (gap, 0), value=padding) for row, gap in zip(rows, gaps, strict=True)])
        values.append(_cached(model, ids, mask))
    same = torch.allclose(values[0], values[1], rtol=0, atol=1e-6)
    return values[0] if same else torch.full_like(values[0], torch.nan)
