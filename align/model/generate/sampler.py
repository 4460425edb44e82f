"""From logits to completions: which token is drawn, when a completion ends, what its text is.

Each completion draws its random numbers from a stream of its own, keyed by (the prompt's seed, its number in the
group): one uniform number per token, turned into a token by inverting the cumulative distribution. So who shares its
batch has no part in its randomness.

At temperature 0 (greedy) log-probabilities are those of temperature 1: there is no distribution at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from align.errors import EngineError
from align.protocols.ends import special_tokens, texts_of
from align.protocols.fleet import Completion, Sampling


@dataclass
class Row:
    """One completion in the making. version: that draws it. uniforms: f64[max_tokens], its whole stream."""

    version: int
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: Literal["eos", "stop", "length"] | None = None


def new_row(seed: int, number: int, version: int, max_tokens: int) -> Row:
    """For completion `number` of the prompt with this seed: its stream is f64[max_tokens] in [0, 1)."""
    key = np.array([seed, number], dtype=np.uint64)
    return Row(version, np.random.Generator(np.random.Philox(key=key)).random(max_tokens))


class Sampler:
    """tokenizer: of transformers. end_ids: tokens that end a turn."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]):
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self._special = special_tokens(tokenizer)

    def draw(self, rows: list[Row], logits: Tensor, sampling: Sampling) -> Tensor:
        """Append a token and its log-probability f32 to each row, and say of those that end by what; the tokens i64[B].

        logits: f32[B, V]. Raises EngineError where they are not finite.
        """
        logps = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
        if not torch.isfinite(logps.max(dim=-1).values).all():
            raise EngineError(
                f"version {rows[0].version} gives logits that are not finite",
                remedy="the policy has diverged: lower optim.lr, or continue from an earlier checkpoint",
            )
        if sampling.temperature == 0:
            tokens = logps.argmax(-1)
        else:
            cumulative = logps.double().exp().cumsum(-1)
            draws = [row.uniforms[len(row.tokens)] for row in rows]
            # scaled by the total, which differs from 1 by rounding: the last token with probability 0 is never drawn
            points = torch.tensor(draws, dtype=torch.float64, device=logps.device)[:, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=logps.shape[-1] - 1)
        chosen = logps.gather(-1, tokens[:, None])[:, 0].tolist()
        for row, token, logp in zip(rows, tokens.tolist(), chosen, strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
            self._check_finish(row, token, sampling)
        return tokens

    def _check_finish(self, row: Row, token: int, sampling: Sampling) -> None:
        if token in self.end_ids:
            row.finish = "eos"
        elif token in sampling.stop_token_ids or self._holds_stop(row, sampling.stop):
            row.finish = "stop"
        elif len(row.tokens) >= sampling.max_tokens:
            row.finish = "length"

    def _holds_stop(self, row: Row, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # a stop string of n bytes ends in the newest token, so it lies within the last n tokens (each has a byte)
        reach = max(len(text.encode()) for text in stop) + 4
        tail = self.decode(row.tokens[-reach:])
        marked = [text for text in stop if any(token in text for token in self._special)]
        raw = self.decode(row.tokens[-reach:], skip_special=False) if marked else ""
        return any(text in (raw if text in marked else tail) for text in stop)

    def completion(self, row: Row) -> Completion:
        """What a row that has ended is."""
        assert row.finish is not None
        text, raw = texts_of(row.tokens, self.end_ids, self.decode)
        return Completion(
            token_ids=np.array(row.tokens, dtype=np.int64),
            logps=np.array(row.logps, dtype=np.float32),
            versions=np.full(len(row.tokens), row.version, dtype=np.int32),
            text=text,
            finish=row.finish,
            raw=raw,
        )

    def decode(self, tokens: list[int], skip_special: bool = True) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text
