"""Rows as the model sees them, for a person: the rendered text, what is scored in it marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from align.data.audit import DataReport
from align.data.tokenizer import ChatTokenizer
from align.protocols.fleet import PromptItem
from align.protocols.trees import Segment, Tree

BEGIN, END = "⟦", "⟧"
LONGEST = 1500  # characters of a text that are shown; the middle of a longer one is left out


def shown_rows(
    items: Sequence[Tree | PromptItem], report: DataReport, tokenizer: ChatTokenizer, count: int
) -> list[str]:
    """The first `count` rows of each source; without a count one of each whose columns were guessed."""
    lines: list[str] = []
    begin = 0
    for source in report.sources:
        wanted = min(count or int(source.guessed), source.used)
        for item in items[begin : begin + wanted]:
            lines += [f"as the model sees {item.origin}, scored tokens in {BEGIN}{END}:", *shown_row(item, tokenizer)]
        begin += source.used
    return lines


def shown_row(item: Tree | PromptItem, tokenizer: ChatTokenizer) -> list[str]:
    """Its text in lines; of a pair also its sides."""
    if isinstance(item, PromptItem):
        return _block(tokenizer.decode(item.token_ids.tolist(), skip_special_tokens=False))
    lines = _block(_marked(item.trunk, tokenizer))
    names = ("chosen", "rejected") if len(item.branches) == 2 else ("completion",) * len(item.branches)
    for name, branch in zip(names, item.branches, strict=True):
        lines += [f"  {name}:", *_block(_marked(branch, tokenizer))]
    return lines


def _marked(segment: Segment, tokenizer: ChatTokenizer) -> str:
    mask = np.asarray(segment.loss_mask, dtype=bool)
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    parts = []
    for start, end in pairwise(edges):
        text = tokenizer.decode(segment.token_ids[start:end].tolist(), skip_special_tokens=False)
        parts.append(f"{BEGIN}{text}{END}" if end > start and mask[start] else text)
    return "".join(parts)


def _block(text: str) -> list[str]:
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} [... {len(text) - LONGEST} characters ...] {text[-half:]}"
    return [f"  | {line}" for line in text.removesuffix("\n").split("\n")]
