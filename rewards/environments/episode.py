"""An episode's own process: reads requests, runs the environment's code under their deadlines, and answers each part.

A request is {"id", "op", "timeout_s", ...}; each of its parts (a call, or the one thing asked for) is answered by
{"id", "part", "kind", "value", "message", "where", "done", "was_none", "seconds"} as soon as it is there.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rewards import wire
from rewards.environments import content
from rewards.environments.arguments import converted
from rewards.environments.deadline import Expired, Runner
from rewards.environments.members import taken
from rewards.environments.spec import Loaded
from rewards.verdict import judge

_HERE = str(Path(__file__).parent)
_SHORTEST_S = 0.05
Outcome = dict[str, Any]


class Episode:
    """One object of the environment and what is asked of it.

    most: bytes that one answer may have on the wire, beside its images.
    """

    def __init__(self, loaded: Loaded, sock: socket.socket, most: int):
        self.loaded = loaded
        self.thing: Any = None
        self._trl = loaded.spec.signature == "trl"
        self._sock = sock
        self._most = most
        self._own = os.getpid()
        self._runner = Runner()

    def serve(self) -> None:
        """Until the parent closes."""
        self._write({"ready": self._own})
        while True:
            self._runner.wait_for(self._sock)
            if (request := wire.receive(self._sock)) is None:
                return
            if request["op"] == "calls":
                self._calls(request)
                continue
            work = {
                "reset": self._reset, "respond": self._respond, "reward": self._reward, "state": self._state,
                "close": self._close,
            }[request["op"]]  # fmt: skip
            self._send(request, 0, self._act(partial(work, request), request["timeout_s"]))

    # ------------------------------------------------------------------------------------------------ what is asked

    def _reset(self, request: Mapping[str, Any], until: float) -> Any:
        seed_all(request["seed"])
        self.thing = self._run(self.loaded.make, until)
        if not self.loaded.has["reset"]:
            return None
        given = {name: request[name] for name in ("row", "seed", "episode_seed")}
        if self._trl:
            given = taken(self.thing.reset, request["row"])
        else:
            given = {name: given[name] for name in self.loaded.resets}
        return content.turn(self._run(partial(self.thing.reset, **given), until))

    def _respond(self, request: Mapping[str, Any], until: float) -> Any:
        return content.turn(self._run(partial(self.thing.respond, request["reply"]), until))

    def _reward(self, request: Mapping[str, Any], until: float) -> Any:
        result = self._run(self.thing.get_reward if self._trl else self.thing.reward, until)
        names = list(self.loaded.objectives)
        verdict = judge([result], 1, self.loaded.objectives)
        errors = [[None if k < 0 else names[k], cause, message] for _, k, cause, message in verdict.errors]
        return {"values": dict(zip(names, verdict.values[0], strict=True)), "errors": errors,
                "info": verdict.infos.get(0, {})}  # fmt: skip

    def _state(self, request: Mapping[str, Any], until: float) -> Any:
        if self._trl:
            return content.attributes(self.thing)
        return content.plain(self._run(self.thing.state, until)) if self.loaded.has["state"] else None

    def _close(self, request: Mapping[str, Any], until: float) -> Any:
        if self.loaded.has["close"] and self.thing is not None:
            self._run(self.thing.close, until)

    # ------------------------------------------------------------------------------------------------ calls of tools

    def _calls(self, request: Mapping[str, Any]) -> None:
        """Plain methods in their order, then coroutines side by side; none behind one after which the episode is over,
        nor behind one that took too long: a turn of hanging calls costs one deadline, however many they are."""
        seconds: float = request["timeout_s"]
        over: Outcome | None = None
        beside: list[tuple[int, Callable[[], Awaitable[Any]]]] = []
        for part, (name, arguments) in enumerate(request["calls"]):
            tool = self.loaded.tools.get(name)
            if tool is not None and tool.is_async:
                beside.append((part, partial(self._start, name, arguments)))
            else:
                work = partial(self._run, partial(self._start, name, arguments))
                outcome = over or self._act(work, seconds, tool=True)
                over = over or not_called(outcome, name)
                self._send(request, part, outcome)
        if over is not None:
            for part, _ in beside:
                self._send(request, part, over)
        elif beside:
            self._side_by_side(request, beside, seconds)

    def _start(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the tool gives; a coroutine where it is one."""
        tool = self.loaded.tools.get(name)
        if tool is None:
            raise LookupError(f"there is no tool {name!r}; there are: {', '.join(self.loaded.tools) or 'none'}")
        function = tool.of(self.thing)
        return function(**(dict(arguments) if self._trl else converted(function, arguments)))

    def _side_by_side(
        self, request: Mapping[str, Any], calls: Sequence[tuple[int, Callable[[], Awaitable[Any]]]], seconds: float
    ) -> None:
        started = time.monotonic()
        ended: dict[int, tuple[Any, BaseException | None, float]] = {}

        def settle(number: int, value: Any, error: BaseException | None) -> None:
            ended[number] = value, error, time.monotonic() - started

        def again(number: int, _: float) -> Any:
            value, error, _ = ended[number]
            if error is not None:
                raise error
            return value

        self._runner.together([start for _, start in calls], seconds, settle)
        for number, (part, _) in enumerate(calls):
            outcome = self._act(partial(again, number), seconds, tool=True)
            self._send(request, part, {**outcome, "seconds": ended[number][2]})

    # ------------------------------------------------------------------------------------------------ one action

    def _run(self, function: Callable[[], Any], until: float) -> Any:
        return self._runner.call(function, max(_SHORTEST_S, until - time.monotonic()))

    def _act(self, work: Callable[[float], Any], seconds: float, *, tool: bool = False) -> Outcome:
        """One action and whether the episode is done after it. SystemExit and KeyboardInterrupt are errors of it."""
        started = time.monotonic()
        outcome: Outcome = {
            "kind": "value",
            "value": None,
            "was_none": False,
            "done": False,
            "message": "",
            "where": "",
        }
        try:
            value = work(started + seconds)
            outcome["was_none"] = tool and value is None
            outcome["value"] = content.answer(value, self._trl) if tool else value
        except Expired:
            outcome.update(kind="timeout", message=f"not done after {seconds:g} s")
        except BaseException as error:  # noqa: BLE001  whatever user code raises is its answer
            outcome.update(failed(error))
        try:
            outcome["done"] = self._is_done(started + seconds)
        except BaseException as error:  # noqa: BLE001
            late = {"kind": "timeout", "message": f"`done` took more than {seconds:g} s"}
            outcome.update(value=None, **(late if isinstance(error, Expired) else failed(error, "`done` raised ")))
        return {**outcome, "seconds": time.monotonic() - started}

    def _is_done(self, until: float) -> bool:
        """TRL has no such member: there the attribute is the user's own."""
        if self._trl or self.thing is None:
            return False
        if not self.loaded.has["done"] and "done" not in getattr(self.thing, "__dict__", ()):
            return False

        def read() -> Any:
            try:
                found = self.thing.done
            except AttributeError:
                if isinstance(getattr(type(self.thing), "done", None), property):
                    raise
                return False  # annotated, and not set yet
            return found() if callable(found) else found

        return bool(self._run(read, until))

    # ------------------------------------------------------------------------------------------------ what is sent

    def _send(self, request: Mapping[str, Any], part: int, outcome: Outcome) -> None:
        head = {"id": request["id"], "part": part}
        value = outcome["value"]
        why: Outcome = {"kind": "too_large", "value": None, "message": f"returned more than {self._most:,} bytes"}
        if isinstance(value, str) and len(value) > self._most:  # not written at all
            self._write({**head, **outcome, **why})
            return
        try:
            frame = wire.encode({**head, **outcome})
        except (TypeError, ValueError, RecursionError, MemoryError) as error:
            self._write({**head, **outcome, "value": None, **failed(error)})
            return
        images = content.image_bytes(value)
        if images > content.MAX_IMAGES_BYTES:
            why["message"] = f"returned images of more than {content.MAX_IMAGES_BYTES:,} bytes"
        fits = len(frame) - images <= self._most and images <= content.MAX_IMAGES_BYTES
        self._write_frame(frame) if fits else self._write({**head, **outcome, **why})

    def _write(self, message: Mapping[str, Any]) -> None:
        self._write_frame(wire.encode(message))

    def _write_frame(self, frame: bytes) -> None:
        if os.getpid() != self._own:  # a fork that user code made, and that came back from it
            os._exit(0)
        self._sock.sendall(frame)


def not_called(before: Outcome, tool: str) -> Outcome | None:
    """Of the calls behind one of their turn, by its outcome; None where they are made."""
    same = {"was_none": False, "where": "", "seconds": 0.0}
    if before["done"]:
        return {"kind": "value", "value": "not called: the episode is over", "done": True, "message": "", **same}
    if before["kind"] == "timeout":
        return {"kind": "timeout", "value": None, "done": False, "message": f"not called: {tool} took too long", **same}
    return None


def failed(error: BaseException, prefix: str = "") -> Outcome:
    """An error as an outcome: its type and text, and the line of user code; the whole traceback goes to the log."""
    with contextlib.suppress(BaseException):  # its own methods, or a closed stderr, may raise
        traceback.print_exception(error)
    try:
        text = str(error)[:2000]
    except BaseException:  # noqa: BLE001
        text = "(its text cannot be had)"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    name = type(error).__name__
    return {"kind": "raised", "message": f"{prefix}{name}: {text}" if text else f"{prefix}{name}", "where": where}


def seed_all(seed: int) -> None:
    """random, and numpy and torch where they are loaded."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed % 2**63)
