"""The usable rows of one source, tokenised, as the trees and prompts that stages take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from align.data.audit import SourceReport
from align.data.encoded import Encoded, Tokens
from align.data.records import Kind, Record
from align.data.seen import Messages
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.trees import Segment, Tree


@dataclass(frozen=True)
class Kept:
    """A usable row as it was read. folder: where its media are looked for."""

    origin: str
    record: Record
    margin: float | None
    folder: Path | None


@dataclass
class Table:
    """Usable rows of one source, tokenised. rows: for prompts, (messages, values, template variables); answers: of
    pairs that rewards are to judge, the same and both completions' texts; weights f32[kept]; margins f32[kept], NaN
    where a row gives none. records: of the kept rows, where they are asked for. files: SHA-256 of every file that a
    medium was read from, by path. labels f32[kept, C]: of labelled rows, the values of `label_columns`, NaN where a row
    gives none."""

    kind: Kind
    report: SourceReport
    encoded: list[Encoded]
    origins: list[str]
    weights: np.ndarray
    desirable: np.ndarray
    margins: np.ndarray
    rows: list[tuple[Messages, dict[str, Any], Mapping[str, Any]]] | None = None
    answers: list[tuple[Messages, dict[str, Any], tuple[str, str]]] | None = None
    files: dict[str, str] = field(default_factory=dict)
    records: list[Kept] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    label_columns: tuple[str, ...] = ()

    def group(self, row: int, number: int) -> Group:
        """A pair as what a reward sees: its prompt, and two completions that nobody sampled."""
        assert self.answers is not None
        e, (messages, values, texts) = self.encoded[row], self.answers[row]
        sides = zip(e.branches, texts, strict=True)
        completions = tuple(_brought(side.ids, text) for side, text in sides)
        return Group(self._prompt(row, number, messages, values), completions)

    def item(self, row: int, number: int, weighted: bool) -> Tree | PromptItem:
        e = self.encoded[row]
        if self.rows is not None:
            return self._prompt(row, number, *self.rows[row])
        columns: dict[str, float] = {"weight": float(self.weights[row])} if weighted else {}
        if self.kind == "unpaired":
            columns["desirable"] = float(self.desirable[row])
        if self.kind == "labelled" and not np.isnan(self.labels[row]).any():
            columns |= dict(zip(self.label_columns, self.labels[row].tolist(), strict=True))
        trunk = _segment(e.trunk, {} if e.branches else columns)
        pair = columns if self.kind == "pair" else {}
        if self.kind == "pair" and not np.isnan(self.margins[row]):
            pair = columns | {"margin": float(self.margins[row])}
        return Tree(number, trunk, tuple(_segment(b, columns) for b in e.branches), pair, self.origins[row])

    def _prompt(
        self,
        row: int,
        number: int,
        messages: Messages,
        values: dict[str, Any],
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> PromptItem:
        trunk, weight = self.encoded[row].trunk, float(self.weights[row])
        return PromptItem(
            number, trunk.ids, 0, messages, values, self.origins[row], trunk.media, weight, dict(arguments)
        )


def _brought(ids: np.ndarray, text: str) -> Completion:
    """An answer that a row brought, which no version sampled."""
    return Completion(ids, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), text, "eos")


def _segment(tokens: Tokens, columns: dict[str, float]) -> Segment:
    return Segment(tokens.ids, tokens.mask, columns=columns, media=tokens.media)
