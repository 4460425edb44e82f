"""Messages between a pool and its plugin processes: an 8-byte length, then JSON. Nothing on the wire can run code.

Rows may hold what Parquet can hold; bytes, dates, decimals and numpy values are tagged or turned into plain ones.
"""

from __future__ import annotations

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
_TAG = "__wire__"


def _plain(value: Any) -> Any:
    """What json cannot write itself; TypeError names the type."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return {_TAG: type(value).__name__, "value": value.isoformat()}
    if isinstance(value, decimal.Decimal):
        return {_TAG: "decimal", "value": str(value)}
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
    "decimal": decimal.Decimal,
}


def _restore(item: dict[str, Any]) -> Any:
    return _READERS[item[_TAG]](item["value"]) if _TAG in item else item


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame. ASCII JSON, so that lone surrogates in a completion survive."""
    body = json.dumps(message, default=_plain, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    hook = _restore if _TAG.encode() in body else None
    message: dict[str, Any] = json.loads(body, object_hook=hook)
    return message


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
        items.append([place, s.completion, s.token_ids, s.truncated, s.group_id, s.sample_id, s.policy_version, s.raw])
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
        )
        for place, completion, token_ids, truncated, group_id, sample_id, version, raw in packed["items"]
    ]
