"""One live episode, as its parent sees it: what is asked of it, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from rewards import wire
from rewards.environments.channel import Channel
from rewards.environments.content import MAX_IMAGES_BYTES, well_formed

log = logging.getLogger(__name__)

Kind = Literal["value", "raised", "timeout", "died", "protocol", "too_large"]
REAP_SECONDS = 15.0  # for everything of an episode to be gone; the kernel may hold a process that waits for a disk
_STATUS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an action came to.

    kind: "value"; "raised": user code did, message says what, where is "file:line"; "timeout"; "died": the process
    ended; "protocol": it sent what is no answer; "too_large": the answer is longer than it may be.
    value: of a tool text or a list of content parts; of `reset` and `respond` text, a list of messages, or None; of
    `reward` {"values": {objective: number or None}, "errors": [[objective or None, cause, message]], "info": {}}; of
    `state` plain JSON. message: of any kind but "value", for the model or the log. done: the episode is over.
    seconds: that it took. lost: the process is gone, and the episode with it. was_none: a tool returned None.
    """

    kind: Kind
    value: Any = None
    message: str = ""
    done: bool = False
    seconds: float = 0.0
    lost: bool = False
    was_none: bool = False
    where: str = ""


class Live:
    """An episode's process, given by `Host.open`. One request at a time; what is lost stays lost, and says so.

    Every method gives an Outcome whatever user code does. RuntimeError where a request is still outstanding.
    """

    def __init__(
        self, talk: socket.socket, control: socket.socket, most: int, grace_s: float, ended: Callable[[Live], None]
    ):
        self._channel = Channel(talk, most + MAX_IMAGES_BYTES + (1 << 16))
        self._control = control
        control.setblocking(False)
        self._grace_s = grace_s
        self._ended = ended
        self._next = 0
        self._busy = False
        self._lost: tuple[Kind, str] | None = None
        self._burial: asyncio.Task[dict[str, Any]] | None = None
        self.pid = 0

    async def greet(self, seconds: float) -> str | None:
        """Waits for the process; why there is none, None where there is. TimeoutError after so many seconds,
        ConnectionError where nobody says why: the warm process has ended."""
        self._busy = True  # its socket is not closed under it
        try:
            answer = await asyncio.wait_for(self._channel.receive(), seconds)
        finally:
            self._busy = False
        if answer is not None and isinstance(answer.get("ready"), int):
            self.pid = answer["ready"]
            return None
        abandoned = self._lost is not None
        said = await self._gone()
        if abandoned or ("refused" not in said and not said.get("status")):
            raise ConnectionError
        return str(said.get("refused") or f"its process {_how(said)}")

    async def reset(self, row: Mapping[str, Any], seed: int, episode_seed: int, timeout_s: float) -> Outcome:
        """Makes the object and calls its `reset`. The same seed for all episodes of a group; episode_seed differs."""
        return await self._one("reset", timeout_s, row=row, seed=seed, episode_seed=episode_seed)

    async def calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]], timeout_s: float) -> list[Outcome]:
        """Outcomes of calls (tool, arguments), in their order. Plain methods run one after another, coroutines side by
        side after them, each under its own deadline; none behind a plain one that took too long. Arguments are as
        `check_arguments` lets them pass."""
        if not calls:
            return []
        return await self._ask("calls", len(calls), timeout_s, {"calls": [[name, given] for name, given in calls]})

    async def respond(self, reply: str, timeout_s: float) -> Outcome:
        """The next user turn after a reply that calls no tool; value None ends the episode."""
        return await self._one("respond", timeout_s, reply=reply)

    async def reward(self, timeout_s: float) -> Outcome:
        """What the environment's `reward` says; see `Outcome.value`."""
        return await self._one("reward", timeout_s)

    async def state(self, timeout_s: float) -> Outcome:
        """Its `state`; value None where it has none."""
        return await self._one("state", timeout_s)

    async def close(self, timeout_s: float) -> Outcome:
        """Calls the environment's `close`; then its process, everything that it started and its files are gone. May be
        called twice."""
        outcome = Outcome("value")
        if self._lost is None and not self._busy:
            outcome = await self._one("close", timeout_s)
        if self._lost is None:
            self._lose("died", "the episode was closed")
        await self._gone()
        return outcome

    # ------------------------------------------------------------------------------------------------ one request

    async def _one(self, op: str, timeout_s: float, **request: Any) -> Outcome:
        return (await self._ask(op, 1, timeout_s, request))[0]

    async def _ask(self, op: str, parts: int, timeout_s: float, request: Mapping[str, Any]) -> list[Outcome]:
        if self._busy:
            raise RuntimeError(f"{op} was asked of an episode that still answers another request")
        if self._lost is not None:
            return self._all_lost(parts, 0.0)
        number, self._next = self._next, self._next + 1
        try:
            frame = wire.encode({"id": number, "op": op, "timeout_s": timeout_s, **request})
        except (TypeError, ValueError, RecursionError) as error:
            return [Outcome("raised", message=f"{op} cannot be sent: {error}")] * parts
        self._busy = True
        try:
            return await self._answers(number, frame, parts, timeout_s)
        except BaseException:  # cancelled: what still comes would answer the next request
            self._lose("died", "a request was given up")
            raise
        finally:
            self._busy = False

    async def _answers(self, number: int, frame: bytes, parts: int, timeout_s: float) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        begun = time.monotonic()
        try:
            await asyncio.wait_for(self._channel.send(frame), timeout_s + self._grace_s)
            while len(found) < parts:
                answer = await asyncio.wait_for(self._channel.receive(), timeout_s + self._grace_s)
                if answer is None:
                    break
                part, outcome = _read(answer, number, parts)
                if part in found:
                    raise wire.ProtocolError(f"a second answer to part {part}")
                found[part] = outcome
                begun = time.monotonic()
        except TimeoutError:
            self._lose("timeout", f"not done after {timeout_s:g} s, and did not end; its process was killed")
        except wire.ProtocolError as error:
            self._lose("protocol", f"its process sent {error}; it was killed")
        except OSError:
            pass
        if len(found) < parts:
            await self._gone()
        rest = self._all_lost(parts, time.monotonic() - begun)
        return [found.get(part, rest[part]) for part in range(parts)]

    def _all_lost(self, parts: int, seconds: float) -> list[Outcome]:
        kind, message = self._lost or ("died", "")
        return [Outcome(kind, message=message, seconds=seconds, lost=True)] * parts

    # ------------------------------------------------------------------------------------------------ its end

    async def _gone(self) -> dict[str, Any]:
        """Waits until nothing is left of the process; what its keeper said."""
        if self._burial is None:
            self._burial = asyncio.create_task(self._bury())
        return await asyncio.shield(self._burial)

    async def _bury(self) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self._lost is None:  # it closed its connection, or has ended: the keeper knows
            said = await self._packet(_STATUS_SECONDS) or {}
            self._lose("died", f"its process {_how(said)}")
        until = time.monotonic() + REAP_SECONDS
        while (packet := await self._packet(until - time.monotonic())) is not None:  # the keeper ends last
            said = said or packet
        if time.monotonic() > until:
            log.warning("an episode's process %d is not gone %g s after it was killed", self.pid, REAP_SECONDS)
        self._close_sockets()
        return said

    async def _packet(self, seconds: float) -> dict[str, Any] | None:
        """What the keeper says; None where it has ended, or says nothing for so long."""
        loop = asyncio.get_running_loop()
        try:
            packet = await asyncio.wait_for(loop.sock_recv(self._control, 1 << 16), max(0.0, seconds))
            return dict(json.loads(packet)) if packet else None
        except (TimeoutError, OSError, ValueError):
            return None

    def _lose(self, kind: Kind, message: str) -> None:
        """The first cause is kept. The keeper sees the end of its connection, and ends everything."""
        self._lost = self._lost or (kind, message)
        self._channel.hang_up()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def abandon(self) -> None:
        """Without waiting, and without an event loop: the keeper ends what there is."""
        self._lose("died", "the host was closed")
        if not self._busy and self._burial is None:  # who waits sees the end of its connection
            self._close_sockets()

    def _close_sockets(self) -> None:
        self._channel.close()
        self._control.close()
        self._ended(self)


def _how(said: Mapping[str, Any]) -> str:
    status = said.get("status")
    if status is None:
        return "closed its connection"
    try:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    except ValueError:
        how = f"was ended by signal {-status}"
    return how + (f"; last output: {said['tail']}" if said.get("tail") else "")


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "message": str, "where": str, "done": bool, "was_none": bool, "seconds": (int, float),
}  # fmt: skip


def _read(answer: Mapping[str, Any], number: int, parts: int) -> tuple[int, Outcome]:
    """The part that an answer is of, and the outcome. ProtocolError where it is no answer to this request: the process
    is shared with the environment, whose code may have written it."""
    part = answer.get("part")
    if answer.get("id") != number or not isinstance(part, int) or not 0 <= part < parts:
        raise wire.ProtocolError("an answer to what was not asked")
    kind = answer.get("kind")
    if kind not in get_args(Kind):
        raise wire.ProtocolError(f"an answer of the unknown kind {kind!r}")
    if not all(isinstance(answer.get(name), sort) for name, sort in _FIELDS.items()):
        raise wire.ProtocolError("an answer without all its fields")
    return part, Outcome(cast(Kind, kind), **well_formed({name: answer.get(name) for name in ("value", *_FIELDS)}))
