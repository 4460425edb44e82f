"""What a stage's user must hear of its rewards while they run: calls that failed, and text that they do not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget, Scorer, ScoreTable

_TOKENS = 5  # named in a note
_STRIPPED = "/stripped"
_FAILED = "/failed_calls"


class NotedScorer:
    """A Scorer that tells, once a stage each, of the first failed call of a reward and of the first completions whose
    special tokens its rewards do not see; `finish` tells of how many there were in all.

    special: the tokenizer's special tokens; tell: receives lines.
    """

    def __init__(self, scorer: Scorer, stage_id: str, special: frozenset[str], tell: Callable[[str], None]):
        self._scorer, self._stage, self._special, self._tell = scorer, stage_id, special, tell
        self._told: dict[str, int] = {}  # by note: the number that it was told with
        self._counts: Counter[str] = Counter()
        self._completions = 0

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        table = await self._scorer.score(groups, budget)
        self._completions += sum(len(group.completions) for group in groups)
        for name, value in table.metrics.items():
            if name.startswith("reward/") and name.endswith((_STRIPPED, _FAILED)) and value:
                self._counts[name.removeprefix("reward/")] += int(value)
        for name, note in table.notes.items():
            if name not in self._told:
                self._told[name] = self._counts[name]
                self._tell(f"{self._stage}: {note}")
        self._tell_stripped(groups)
        return table

    def _tell_stripped(self, groups: Sequence[Group]) -> None:
        new = [name for name in self._counts if name.endswith(_STRIPPED) and name not in self._told]
        if not new:
            return
        rewards = ", ".join(name.removesuffix(_STRIPPED) for name in new)
        self._tell(
            f"{self._stage}: {self._counts[new[0]]} of {self._completions} completions hold special tokens "
            f"({self._tokens(groups)}) that are taken out of the text which {rewards} read; `text: raw` at a reward "
            "shows it what was generated"
        )
        self._told |= {name: self._counts[name] for name in new}

    def _tokens(self, groups: Sequence[Group]) -> str:
        marked = [(c.raw, c.text) for group in groups for c in group.completions if c.raw is not None]
        lost = {token for token in self._special if any(raw.count(token) > text.count(token) for raw, text in marked)}
        named = sorted(lost)
        return ", ".join(named[:_TOKENS]) + (f" and {len(named) - _TOKENS} more" if len(named) > _TOKENS else "")

    def finish(self) -> None:
        """The stage is over: what came after the notes."""
        for name, told in self._told.items():
            count = self._counts[name]
            if count > told and name.endswith(_STRIPPED):
                reward = name.removesuffix(_STRIPPED)
                self._tell(
                    f"{self._stage}: {reward} read {count} of {self._completions} completions without their special "
                    "tokens"
                )
            elif count > told:
                reward = name.removesuffix(_FAILED)
                self._tell(f"{self._stage}: in all {count} calls of reward {reward} failed")

    async def close(self) -> None:
        await self._scorer.close()
