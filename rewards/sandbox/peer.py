"""Calls between the process that runs tests and the process that runs a candidate, over one stream.

Only plain data crosses, as JSON: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, and
some of the standard library's types by value. An instance of a subclass crosses as the plain value that it extends.
Anything else stays where it is and crosses as a number, a `Remote` on the other side. Nothing that arrives can run
code, and nothing that arrives has a method of the sender's: two values are compared by the receiver's own types. A
`Remote` equals nothing but itself.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

HEADER = struct.Struct("!I")
MOST_BYTES = 4 * 2**20  # of one message; JSON of this size is at most some 300 MiB of Python objects


class PeerLost(BaseException):
    """The other side ended, fell silent, or said what makes no sense. No `except Exception` of a test catches it."""

    def __init__(self, cause: str, what: str):
        super().__init__(what)
        self.cause = cause


class RemoteError(Exception):
    """An exception of the other side that is no built-in `Exception`."""


class Remote:
    """An object of the other side. Calls, attributes, items and iteration happen there."""

    def __init__(self, peer: Peer, number: int, kind: str):
        self.__dict__.update(_peer=peer, _number=number, _kind=kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.call(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("attribute", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("item", self._number, self._peer.encode(key))

    def __len__(self) -> int:
        return _typed(self._peer.ask("length", self._number), int)

    def __bool__(self) -> bool:
        return _typed(self._peer.ask("truth", self._number), bool)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._peer.ask("iterate", self._number)
        while True:
            item = self._peer.ask("next", _typed(iterator, Remote)._number)
            if not isinstance(item, tuple) or len(item) != 1:
                return
            yield item[0]

    def __next__(self) -> Any:
        item = self._peer.ask("next", self._number)
        if not isinstance(item, tuple) or len(item) != 1:
            raise StopIteration
        return item[0]

    def __repr__(self) -> str:
        return f"<{self._kind} of the solution>"


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise RemoteError(f"a {kind.__name__} was expected, not {value!r:.200}")
    return value


# ------------------------------------------------------------------------------------------------ plain values

_BY_TEXT: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "int": (int, hex, lambda t: int(t, 16)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "complex": (complex, str, complex),
    "datetime": (datetime.datetime, str, datetime.datetime.fromisoformat),
    "date": (datetime.date, str, datetime.date.fromisoformat),
    "time": (datetime.time, str, datetime.time.fromisoformat),
}
_BY_ITEMS: dict[str, type] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
}  # fmt: skip
_BY_PAIRS: dict[str, Callable[[Any], Any]] = {
    "dict": dict, "counter": lambda pairs: collections.Counter(dict(pairs)), "ordered": collections.OrderedDict,
}  # fmt: skip
_EXACT = {kind: tag for tag, (kind, _, _) in _BY_TEXT.items()} | {kind: tag for tag, kind in _BY_ITEMS.items()}
_EXACT |= {dict: "dict", collections.Counter: "counter", collections.OrderedDict: "ordered"}
_SUBCLASSES: tuple[Any, ...] = (int, float, str, bytes, bytearray, complex, list, tuple, dict, set, frozenset)
_CALLABLE_BUILTINS = {f: name for name, f in vars(builtins).items() if callable(f)}


class Peer:
    """One end of the stream.

    open: the other side may look into what we export; without it, it may only call what it was given.
    deadline: `time.monotonic()` after which waiting for the other side is given up.
    """

    def __init__(self, descriptor: int, *, open: bool, deadline: float | None = None):
        self._fd = descriptor
        self._open = open
        self._deadline = deadline
        self._exports: list[Any] = []
        self._numbers: dict[int, int] = {}

    # -------------------------------------------------------------------------------- values

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and -(2**63) < value < 2**63):
            return value
        if kind is list:
            return [self.encode(v) for v in value]
        tag = _EXACT.get(kind)
        if tag in _BY_TEXT:
            return {"t": tag, "v": _BY_TEXT[tag][1](value)}
        if tag in _BY_ITEMS:
            return {"t": tag, "v": [self.encode(v) for v in value]}
        if tag is not None:
            return {"t": tag, "v": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if kind is Remote and value._peer is self:
            return {"t": "yours", "v": value._number}
        for base in _SUBCLASSES:
            if isinstance(value, base):
                return self.encode(base(value))
        if isinstance(value, collections.abc.Hashable) and value in _CALLABLE_BUILTINS:
            return {"t": "builtin", "v": _CALLABLE_BUILTINS[value]}
        return {"t": "mine", "v": self.export(value), "kind": kind.__name__}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        tag, inner = value["t"], value["v"]
        if tag in _BY_TEXT:
            return _BY_TEXT[tag][2](inner)
        if tag in _BY_ITEMS:
            return _BY_ITEMS[tag](self.decode(v) for v in inner)
        if tag in _BY_PAIRS:
            return _BY_PAIRS[tag]((self.decode(k), self.decode(v)) for k, v in inner)
        if tag == "builtin" and self._open:
            return getattr(builtins, inner)
        if tag == "yours":
            return self._exports[inner]
        if tag == "mine":
            return Remote(self, int(inner), str(value.get("kind"))[:80])
        raise ValueError(f"a value of kind {tag!r}")

    def export(self, value: Any) -> int:
        """The number under which the other side knows `value`, which is kept."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._exports)
            self._exports.append(value)
        return self._numbers[id(value)]

    # -------------------------------------------------------------------------------- asking

    def ask(self, what: str, *parts: Any) -> Any:
        """The other side's answer; the exception that it raised, as a built-in one of that name or a RemoteError."""
        self.send(["ask", what, *parts])
        while True:
            message = self.receive()
            if message[0] == "ask":
                self.send(self._answer(message))
                continue
            try:
                return self._result(message)
            except (ValueError, TypeError, KeyError, IndexError, RecursionError, MemoryError, ArithmeticError) as error:
                if message[0] == "raised":
                    raise
                raise RemoteError(f"what the solution returned cannot be read: {error}") from None

    def _result(self, message: list[Any]) -> Any:
        if message[0] == "got":
            return self.decode(message[1])
        raise _exception(message[1], str(message[2]))

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lists, dicts and sets among the arguments change as the callee changed its copies of them."""
        result = self.ask("call", number, [self.encode(a) for a in args], self.encode(kwargs))
        if not isinstance(result, tuple) or len(result) != 2:
            raise RemoteError("the answer to a call makes no sense")
        value, changed = result
        for mine, theirs in zip(args, changed or (), strict=False):
            _overwrite(mine, theirs)
        return value

    # -------------------------------------------------------------------------------- answering

    def serve(self) -> None:
        """Answer until the other side closes."""
        while True:
            try:
                message = self.receive()
            except PeerLost:
                return
            self.send(self._answer(message))

    def _answer(self, message: list[Any]) -> list[Any]:
        try:
            return ["got", self.encode(self._do(*message[1:]))]
        except PeerLost:
            raise
        except BaseException as error:  # noqa: BLE001  whatever the called code raises is its answer
            names = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
            return ["raised", names, _describe(error)]

    def _do(self, what: str, number: int, *parts: Any) -> Any:
        target = self._exports[number]
        if what == "call":
            sent, named = parts
            args, kwargs = self.decode(sent), self.decode(named)
            value = target(*args, **kwargs)
            mutable = any(isinstance(a, list | dict | set | bytearray) for a in args)
            after = args if mutable and [self.encode(a) for a in args] != sent else None
            return (value, after)
        if not self._open:
            raise TypeError(f"{what} is not allowed here")
        if what == "attribute":
            return getattr(target, parts[0])
        if what == "item":
            return target[self.decode(parts[0])]
        if what == "iterate":
            return _Iterator(iter(target))
        if what == "next":
            try:
                return (next(target),)
            except StopIteration:
                return ()
        return {"length": len, "truth": bool}[what](target)

    # -------------------------------------------------------------------------------- messages

    def send(self, message: Any) -> None:
        body = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(body) > MOST_BYTES:
            body = json.dumps(["raised", ["ValueError"], f"a value of {len(body)} bytes is too large"]).encode()
        try:
            write_all(self._fd, HEADER.pack(len(body)) + body)
        except OSError as error:
            raise PeerLost("crashed", "the solution's process ended") from error

    def receive(self) -> Any:
        """PeerLost at the stream's end, at the deadline, and where the bytes are no message."""
        (size,) = HEADER.unpack(self._read(HEADER.size))
        if size > MOST_BYTES:
            raise PeerLost("output", f"an answer of {size} bytes; at most {MOST_BYTES} are read")
        try:
            message = json.loads(self._read(size))
            if message[0] in ("got", "raised", "ask") and len(message) > 1:
                return message
        except (ValueError, KeyError, IndexError, TypeError, RecursionError, MemoryError):
            pass
        raise PeerLost("crashed", "the solution's process answered with what is no answer")

    def _read(self, count: int) -> bytes:
        try:
            return read_exactly(self._fd, count, self._deadline)
        except TimeoutError:
            raise PeerLost("timeout", "no answer in time") from None
        except OSError:
            raise PeerLost("crashed", "the solution's process ended") from None


class _Iterator:
    """Keeps an iterator from crossing as a list: it may be endless."""

    def __init__(self, inner: Iterator[Any]):
        self._inner = inner

    def __next__(self) -> Any:
        return next(self._inner)


def read_exactly(descriptor: int, count: int, deadline: float | None = None) -> bytes:
    """`count` bytes; TimeoutError past the deadline of `time.monotonic()`, ConnectionResetError at the end."""
    parts: list[bytes] = []
    while count:
        if deadline is not None:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], wait)[0]:
                raise TimeoutError
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise ConnectionResetError("the stream ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _describe(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:  # noqa: BLE001  a solution's own exception may refuse
        return type(error).__name__


def _exception(names: Any, text: str) -> Exception:
    """The nearest built-in of the names; the other side cannot end our process with one of these."""
    for name in names if isinstance(names, list) else ():
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text)
            except TypeError:  # wants more than a text
                continue
    first = names[0] if isinstance(names, list) and names else "error"
    return RemoteError(f"{first}: {text}")


def _overwrite(mine: Any, theirs: Any) -> None:
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)
