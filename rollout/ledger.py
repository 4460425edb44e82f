"""Which engine has which request: routing, and what becomes of the requests of an engine that is lost. Arithmetic only.

Engines are numbers. Every start of an engine is a new incarnation of it: an answer counts only where it comes from the
incarnation that has the request now, so nothing is taken twice, however late a process that was given up answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.protocols.fleet import PromptItem
from rollout.base import Request

PREFIX_LENGTHS = (4096, 1024, 256, 64, 16)
"""Prompts share what an engine has cached of one where they begin with the same tokens, so many or the whole prompt."""

Routed = dict[int, list[Request]]
"""Requests by engine, those of each engine in the order in which they were admitted."""


@dataclass(slots=True)
class _Held:
    request: Request
    engine: int
    incarnation: int


class Ledger:
    """Requests that are admitted and not finished, over `engines` engines, none of which serves at first."""

    def __init__(self, engines: int):
        self.incarnations = [0] * engines
        self._serving = [False] * engines
        self._load = [0] * engines  # tokens that may still have to be computed, at most
        self._held: dict[int, _Held] = {}
        self._waiting: list[Request] = []  # no engine serves
        self._losses: dict[int, int] = {}  # by ticket: how often its engine was lost
        self._prefixes: dict[bytes, int] = {}  # -> the engine that computed it last

    def admit(self, requests: Sequence[Request], *, in_turn: bool = False) -> Routed:
        """Where to send these requests.

        All engines idle, or `in_turn`: request i goes to engine i mod W, so which engine draws a group, and in which
        company, is a function of the list alone. Else to the engine with the least left to compute, of which what it
        knows of the prompt's beginning is taken off.
        """
        serving = self.serving
        if not serving:
            self._waiting += requests
            return {}
        in_turn |= len(serving) == len(self._serving) and not any(self._load)
        routed: Routed = {}
        for number, request in enumerate(requests):
            engine = serving[number % len(serving)] if in_turn else self._best(serving, request)
            routed.setdefault(engine, []).append(request)
            self._held[request.ticket] = _Held(request, engine, self.incarnations[engine])
            self._load[engine] += _cost(request)
            self._prefixes |= dict.fromkeys(_prefixes(request.prompt), engine)
        return routed

    def finish(self, ticket: int, engine: int, incarnation: int) -> Request | None:
        """The request that is done; None where that incarnation does not have it, or no longer."""
        held = self._held.get(ticket)
        if held is None or (held.engine, held.incarnation) != (engine, incarnation):
            return None
        self._drop(ticket)
        return held.request

    def forget(self, tickets: Sequence[int]) -> dict[int, list[int]]:
        """Give unfinished requests up; their tickets by the engine that has them."""
        wanted = set(tickets)
        self._waiting = [request for request in self._waiting if request.ticket not in wanted]
        for ticket in wanted - self._held.keys():
            self._losses.pop(ticket, None)
        dropped: dict[int, list[int]] = {}
        for ticket in sorted(wanted & self._held.keys()):
            dropped.setdefault(self._held[ticket].engine, []).append(ticket)
            self._drop(ticket)
        return dropped

    def serve(self, engine: int) -> Routed:
        """The engine serves from now on; where to send what waited for one."""
        self._serving[engine] = True
        waiting, self._waiting = self._waiting, []
        return self.admit(waiting)

    def lose(self, engine: int) -> list[Request]:
        """The engine serves no more; the requests it had, to be admitted again, in the order of their tickets."""
        self._serving[engine] = False
        self.incarnations[engine] += 1
        self.forget_prefixes(engine)
        lost = [held.request for _, held in sorted(self._held.items()) if held.engine == engine]
        for request in lost:
            losses = self._losses.get(request.ticket, 0)
            self._drop(request.ticket)
            self._losses[request.ticket] = losses + 1
        return lost

    def losses(self, request: Request) -> int:
        """How often an engine was lost while it had this request."""
        return self._losses.get(request.ticket, 0)

    def forget_prefixes(self, engine: int | None = None) -> None:
        """What was cached is of no use any more: of one engine, or (a new version) of all."""
        kept = {} if engine is None else {p: e for p, e in self._prefixes.items() if e != engine}
        self._prefixes = kept

    @property
    def serving(self) -> list[int]:
        """The engines that take requests now."""
        return [engine for engine, serves in enumerate(self._serving) if serves]

    @property
    def unfinished(self) -> int:
        return len(self._held) + len(self._waiting)

    def _best(self, serving: Sequence[int], request: Request) -> int:
        known, tokens = -1, 0
        for prefix in _prefixes(request.prompt):
            if prefix in self._prefixes:
                known, tokens = self._prefixes[prefix], len(prefix) // 8
                break
        return min(serving, key=lambda engine: (self._load[engine] - (tokens if engine == known else 0), engine))

    def _drop(self, ticket: int) -> None:
        held = self._held.pop(ticket)
        self._load[held.engine] -= _cost(held.request)
        self._losses.pop(ticket, None)


def _cost(request: Request) -> int:
    return len(request.prompt.token_ids) + request.group_size * request.sampling.max_tokens


def _prefixes(prompt: PromptItem) -> Iterator[bytes]:
    """The beginnings of a prompt by which others may find it, the longest first; 8 bytes a token. Where a medium begins
    stands its key: other pictures have the same tokens."""
    ids = np.array(prompt.token_ids, dtype=np.int64)
    for medium in prompt.media:
        ids[medium.start] = int.from_bytes(hashlib.blake2b(medium.key.encode(), digest_size=7).digest(), "little")
    yield ids.tobytes()
    for length in PREFIX_LENGTHS:
        if length < len(ids):
            yield ids[:length].tobytes()
