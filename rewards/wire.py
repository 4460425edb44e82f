"""Messages between a pool and its plugin processes: an 8-byte length, then JSON. Nothing on the wire can run code.

Rows may hold what Parquet can hold; bytes, dates, decimals and numpy values are tagged or turned into plain ones.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import decimal
import json
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Sample

HEADER = struct.Struct("!Q")
MAX_ANSWER = 1 << 28
"""Bytes of an answer: what claims to be longer is none."""


class ProtocolError(Exception):
    """What came from a plugin's process is no message of ours: plugins share it with us, and may write to any file."""


def _plain(value: Any) -> tuple[str, Any] | None:
    """(name, text) of what json cannot write and we read again; None where it is not such a value."""
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes", base64.b64encode(value).decode()
    # by kind and not by the type's own name: pandas' Timestamp is a datetime
    for kind in (datetime.datetime, datetime.date, datetime.time):
        if isinstance(value, kind):
            return kind.__name__, value.isoformat()
    if isinstance(value, datetime.timedelta):
        return "timedelta", [value.days, value.seconds, value.microseconds]
    if isinstance(value, decimal.Decimal):
        return "decimal", str(value)
    return None


def _built_in(value: Any) -> Any:
    """What json can write in place of a value; TypeError names the type."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be sent to a reward plugin's process")


_READERS: dict[str, Any] = {
    "bytes": base64.b64decode,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "decimal": decimal.Decimal,
}


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame: its length, and ASCII JSON, so that lone surrogates in a completion survive.

    Values that JSON does not have are objects of one key, which stands before the JSON: one that no object of the
    message has itself. TypeError, ValueError or RecursionError where the message cannot be written.
    """
    tag = "__wire__"
    while True:
        text, used = _written(message, tag)
        if text.count(f'"{tag}":') == used:
            break
        tag = f"_{tag}"
    body = (f"{tag}\n{text}" if used else text).encode("ascii")
    return HEADER.pack(len(body)) + body


def _written(message: Mapping[str, Any], tag: str) -> tuple[str, int]:
    """The message as JSON, and how many objects with the tag were put into it."""
    used = 0

    def default(value: Any) -> Any:
        nonlocal used
        plain = _plain(value)
        if plain is None:
            return _built_in(value)
        used += 1
        return {tag: plain}

    return json.dumps(message, default=default, separators=(",", ":")), used


def decode(body: bytes) -> dict[str, Any]:
    """A frame's message. ProtocolError where it is none."""
    try:
        tag, _, text = ("", "", body.decode("ascii")) if body[:1] == b"{" else body.decode("ascii").partition("\n")

        def restore(item: dict[str, Any]) -> Any:
            if tag not in item:
                return item
            name, value = item[tag]
            return _READERS[name](value)

        message = json.loads(text, object_hook=restore if tag else None)
    except (ValueError, KeyError, TypeError, RecursionError, ArithmeticError) as error:
        raise ProtocolError(f"{len(body)} bytes that are no message ({type(error).__name__}: {error})") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a {type(message).__name__} that is no message")
    return message


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message of a plugin's process, None at the stream's end. ProtocolError where what comes is none."""
    try:
        [size] = HEADER.unpack(await reader.readexactly(HEADER.size))
        if size > MAX_ANSWER:
            raise ProtocolError(f"a message of {size:,} bytes; {MAX_ANSWER:,} are the most")
        return decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message of a blocking socket, None at its end."""
    header = _exactly(sock, HEADER.size)
    if header is None:
        return None
    body = _exactly(sock, HEADER.unpack(header)[0])
    return None if body is None else decode(body)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count > 0:
        part = sock.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------------- samples


def pack_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as JSON; what the completions of a prompt share (messages, row, media) is sent once."""
    shared: list[list[Any]] = []
    places: dict[tuple[int, int, int], int] = {}
    items: list[list[Any]] = []
    for s in samples:
        key = (id(s.messages), id(s.row), id(s.media))  # all alive while `samples` is
        place = places.get(key)
        if place is None:
            place = places[key] = len(shared)
            shared.append([s.messages, s.row, s.media])
        item = [place, s.completion, s.token_ids, s.truncated, s.group_id, s.sample_id, s.policy_version, s.raw]
        items.append([*item, s.turns, s.state] if s.turns or s.state is not None else item)
    return {"shared": shared, "items": items}


def unpack_samples(packed: Mapping[str, Any]) -> list[Sample]:
    shared = packed["shared"]
    return [
        Sample(
            completion=completion,
            messages=shared[place][0],
            row=shared[place][1],
            token_ids=token_ids,
            truncated=truncated,
            group_id=group_id,
            sample_id=sample_id,
            media=shared[place][2],
            policy_version=version,
            raw=raw,
            turns=episode[0] if episode else (),
            state=episode[1] if episode else None,
        )
        for place, completion, token_ids, truncated, group_id, sample_id, version, raw, *episode in packed["items"]
    ]
