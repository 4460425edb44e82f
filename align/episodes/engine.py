"""An engine whose completions are episodes: it wraps one that samples turns, and is one itself (`rollout.base.Engine`).

Two threads. The caller's steps the engine inside; one of ours runs the episodes as coroutines (`episode.py`), each with
an environment in a process of its own. An episode that wants a turn leaves a request and waits; the next step takes
all requests that lie there. So whoever is ready is sampled together, and nobody waits for anybody's tool.

With `lockstep` a step takes requests only when every live episode has left one, in the order of groups and episodes:
where environments are functions of their seeds, a list of prompts then gives the same episodes, bit for bit.

Each turn is sampled by the newest version that the engine serves then, as `versions` of a completion say; a turn that
runs finishes as the engine inside does it. Whole weights that are drained wait for the open episodes too.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.episodes.engine_loop import EpisodeLoop, Wanted
from align.episodes.spec import EpisodeSpec
from align.errors import AlignError, EngineError, PluginError
from align.protocols.fleet import FailedPrompt, Group
from align.protocols.trainer import Publication
from align.protocols.trees import Medium
from rewards.api import PluginError as RewardsPluginError
from rollout.base import Answer, Engine, EngineSpec, Request, check_sampling

WAIT_S = 0.05  # for something to happen, before the caller may look for commands


@dataclass(frozen=True, slots=True)
class _Turn:
    """What the engine inside samples, and the outer request that it is for. wanted: the turn of an episode; None where
    the request wants a plain answer."""

    wanted: Wanted | None
    ticket: int


class EpisodeEngine:
    """See `rollout.base.Engine`; `inner` is closed with it.

    Raises:
        PluginError: the environment cannot be loaded. Unsupported: the chat template cannot be continued turn by turn,
            see `align.episodes.joins`.
    """

    def __init__(self, spec: EngineSpec, inner: Engine):
        assert isinstance(spec.environment, EpisodeSpec), "an engine of episodes has their environment"
        self._inner, self._spec = inner, spec
        self._tickets = itertools.count()
        self._turns: dict[int, _Turn] = {}  # by the inner engine's ticket
        self._open: set[int] = set()  # outer tickets that are unanswered
        self._happened = threading.Condition()
        self._changed = False
        self._answers: deque[Answer] = deque()
        try:
            self._loop = EpisodeLoop(spec.environment, spec.max_model_len or 1 << 30, self._notice, self._answer)
        except BaseException:
            inner.close()
            raise

    # ---------------------------------------------------------------------------------- told by the episodes' thread

    def _notice(self) -> None:
        """A turn is wanted, or something else changed."""
        with self._happened:
            self._changed = True
            self._happened.notify_all()

    def _answer(self, answer: Answer) -> None:
        with self._happened:
            self._answers.append(answer)
            self._happened.notify_all()

    # ---------------------------------------------------------------------------------------------- asked by the caller

    @property
    def version(self) -> int | None:
        return self._inner.version

    @property
    def running(self) -> int:
        return len(self._open)

    def add(self, requests: Sequence[Request]) -> None:
        if self._inner.version is None:
            raise EngineError("the engine was asked to generate before a version was published to it")
        for request in requests:
            check_sampling(request.group_size, request.sampling)
        if not self._open:
            self._continues(False)
        self._open |= {request.ticket for request in requests}
        self._loop.begin([request for request in requests if not request.plain])
        self._sample({request.ticket: request for request in requests if request.plain})

    def _sample(self, plain: Mapping[int, Request]) -> None:
        for ticket, request in plain.items():
            own = next(self._tickets)
            self._turns[own] = _Turn(None, ticket)
            self._inner.add([replace(request, ticket=own)])

    def step(self) -> list[Answer]:
        self._raise_failure()
        self._take_wanted()
        if self._inner.running:
            for ticket, answer in self._inner.step():
                self._hand_back(ticket, answer)
        else:
            with self._happened:
                self._happened.wait_for(lambda: self._changed or self._answers, WAIT_S)
                self._changed = False
        self._raise_failure()
        return self._finished()

    def _take_wanted(self) -> None:
        """Hand the turns that lie there to the engine inside; under lockstep all of them, or none."""
        if self._loop.lockstep and self._inner.running:
            return
        requests = []
        for one in self._loop.take():
            ticket = next(self._tickets)
            self._turns[ticket] = _Turn(one, one.ticket)
            requests.append(Request(ticket, one.prompt, 1, one.sampling))
        if not requests:
            return
        self._inner.add(requests)
        self._continues(True)

    def _hand_back(self, ticket: int, answer: Group | FailedPrompt) -> None:
        turn = self._turns.pop(ticket)
        if turn.wanted is None:
            self._answer((turn.ticket, answer))
            return
        self._loop.sampled(turn.wanted, answer.completions[0] if isinstance(answer, Group) else answer)

    def _finished(self) -> list[Answer]:
        with self._happened:
            answers, self._answers = list(self._answers), deque()
        found = [(ticket, answer) for ticket, answer in answers if ticket in self._open]
        self._open -= {ticket for ticket, _ in found}
        return found

    def _continues(self, whether: bool) -> None:
        """Tell an engine that keeps what prompts have in common whether what comes continues what it has."""
        if hasattr(self._inner, "continuing"):
            self._inner.continuing = whether

    def _raise_failure(self) -> None:
        if (failure := self._loop.failure) is None:
            return
        if isinstance(failure, AlignError):
            raise failure
        if isinstance(failure, RewardsPluginError):
            raise PluginError(failure.what, where=failure.where, remedy=failure.remedy) from failure
        raise EngineError(f"playing episodes failed: {type(failure).__name__}: {failure}") from failure

    def abandon(self, tickets: Sequence[int]) -> None:
        dropped = set(tickets) & self._open
        self._open -= dropped
        self._loop.abandon(dropped)
        turns = [ticket for ticket, turn in self._turns.items() if turn.ticket in dropped]
        self._inner.abandon(turns)
        for ticket in turns:
            del self._turns[ticket]

    def accepts(self, publication: Publication) -> bool:
        drained = publication.kind == "adapter" or self._spec.in_flight
        return (drained or not self._open) and (not self._inner.running or self._inner.accepts(publication))

    def publish(self, publication: Publication) -> str:
        return self._inner.publish(publication)

    def logps(self, token_ids: Sequence[np.ndarray], media: Sequence[Sequence[Medium]] = ()) -> list[np.ndarray]:
        return self._inner.logps(token_ids, media)

    def close(self) -> None:
        self._loop.close()
        self._inner.close()


def wrap(spec: EngineSpec, inner: Engine) -> Any:
    """What `rollout.base.make_engine` calls for a spec with an environment."""
    return EpisodeEngine(spec, inner)
