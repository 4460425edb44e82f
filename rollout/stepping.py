"""An engine at work in a thread of its own: commands go in and are answered at once, reports of what happened come out.

Commands are taken between two steps, in the order in which they were given. A publication that must wait for running
requests holds up the commands behind it, and only those: requests given after a version are sampled from it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from align.errors import AlignError
from align.protocols.fleet import Completion, FailedPrompt, Group
from align.protocols.trainer import Publication
from align.protocols.trees import Medium
from rollout.base import Engine, Request


@dataclass(frozen=True, slots=True)
class Refusal:
    """A FailedPrompt without the prompt, which the asker has."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A Group without the prompt, which the asker has. prompt_ids: of the prompt that the completions follow, i64[n],
    with the media that stand in them, where it is not as it was asked: what an episode's environment adds to it when it
    begins is seen by the policy, and must be by the trainer."""

    completions: tuple[Completion, ...]
    prompt_ids: np.ndarray | None = None
    media: tuple[Medium, ...] = ()


Result = Drawn | Refusal
"""What became of a request: its G completions, or why there are none."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The command to drop requests."""

    tickets: tuple[int, ...]


Command = Sequence[Request] | Publication | Abandon


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the report before.

    finished: by ticket. published: by version, the digest held or why it was not loaded. progress: steps and commands
    done since the start. busy: whether there is work. error: ours, which another start would meet again. failure: of
    the engine, in one line, after which it works no more.
    """

    finished: tuple[tuple[int, Result], ...] = ()
    published: tuple[tuple[int, str | AlignError], ...] = ()
    progress: int = 0
    busy: bool = False
    error: AlignError | None = None
    failure: str | None = None


class Stepper:
    """Makes an engine, and steps it while it has work, in one thread from its making to its closing.

    Raises (from the constructor): whatever `make` raises.
    """

    def __init__(self, make: Callable[[], Engine]):
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._asked: dict[int, Request] = {}  # requests that the engine has not answered
        self._finished: list[tuple[int, Result]] = []
        self._published: list[tuple[int, str | AlignError]] = []
        self._progress = 0
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        try:
            self._engine = self._thread.submit(make).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._work = self._thread.submit(self._run)
        self._work.add_done_callback(lambda _: self._tell())

    def give(self, command: Command) -> None:
        """Add a command to the queue; what comes of it is in a report."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def report(self, timeout_s: float) -> Report:
        """Wait until there is something to report, at most `timeout_s`; answers while the engine computes."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._published or self._work.done(), timeout_s)
            finished, self._finished = self._finished, []
            published, self._published = self._published, []
            progress = self._progress
        error, failure = self._end()
        busy = bool(self._commands) or self._engine.running > 0
        return Report(tuple(finished), tuple(published), progress, busy, error, failure)

    def close(self) -> None:
        """Stop after the step that runs, and free the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.submit(self._engine.close).result()
        self._thread.shutdown()

    # ------------------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._commands or self._engine.running or self._closing)
                if self._closing:
                    return
            while self._commands and self._take(self._commands[0]):
                self._commands.popleft()
                self._tell(progress=1)
            if self._engine.running:
                answers = self._engine.step()
                self._tell([(ticket, drawn(self._asked.pop(ticket), answer)) for ticket, answer in answers], progress=1)

    def _take(self, command: Command) -> bool:
        """Carry a command out; False where it must wait for requests that run."""
        if isinstance(command, Abandon):
            self._engine.abandon(command.tickets)
            for ticket in command.tickets:
                self._asked.pop(ticket, None)
        elif not isinstance(command, Publication):
            self._asked |= {request.ticket: request for request in command}
            self._engine.add(command)
        elif self._engine.running and not self._engine.accepts(command):
            return False
        else:
            self._publish(command)
        return True

    def _publish(self, publication: Publication) -> None:
        held: str | AlignError
        try:
            held = self._engine.publish(publication)
        except AlignError as error:
            held = error
        with self._changed:
            self._published.append((publication.version, held))

    def _tell(self, finished: Sequence[tuple[int, Result]] = (), progress: int = 0) -> None:
        with self._changed:
            self._finished += finished
            self._progress += progress
            self._changed.notify_all()

    def _end(self) -> tuple[AlignError | None, str | None]:
        """(our error, the engine's failure) that ended the thread's work; nothing while it goes on."""
        ended = self._work.exception() if self._work.done() else None
        if ended is None or isinstance(ended, AlignError):
            return ended, None
        return None, f"{type(ended).__name__}: {first_line(ended)}"


def drawn(request: Request, answer: Group | FailedPrompt) -> Result:
    """An answer to a request as it is sent; `answered` makes it whole again."""
    if isinstance(answer, FailedPrompt):
        return Refusal(answer.cause, answer.message)
    asked, seen = request.prompt, answer.prompt
    if np.array_equal(asked.token_ids, seen.token_ids) and asked.media == seen.media:
        return Drawn(answer.completions)
    return Drawn(answer.completions, seen.token_ids, seen.media)


def answered(request: Request, result: Result) -> Group | FailedPrompt:
    """What became of a request, with its prompt as the completions follow it."""
    prompt = request.prompt
    if isinstance(result, Refusal):
        return FailedPrompt(prompt, result.cause, result.message)
    if result.prompt_ids is not None:
        prompt = replace(prompt, token_ids=result.prompt_ids, media=result.media)
    return Group(prompt, result.completions)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
