"""A reward that writes to the socket between its process and the pool: by sample, in the way that its completion names.
What is left to do after that it does as any other reward does."""

import asyncio
import json
import os
import stat
import struct
import time

from rewards import reward


def protocol_fd():
    """The socket that this process inherited."""
    for fd in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}") == INHERITED:
                return fd
        except OSError:
            continue
    raise RuntimeError("no socket")


def frame(body):
    return struct.pack("!Q", len(body)) + body


def answer(**changed):
    whole = {
        "id": NUMBER[0],
        "seconds": 0.1,
        "values": [[1.0]],
        "errors": [],
        "infos": [],
        "metrics": {},
        "columns": {},
    }
    return frame(json.dumps({**whole, **changed}).encode())


WRITTEN = {
    "garbage": lambda: b"Loading model: 100%|########| 12/12\n",
    "huge": lambda: struct.pack("!Q", 1 << 60) + b"{}",
    "begun": lambda: struct.pack("!Q", 200) + b'{"id": ',
    "no json": lambda: frame(b"{[}]"),
    "no object": lambda: frame(b"[1, 2]"),
    "no text": lambda: frame(b"\xff\xfe\x00{"),
    "deep": lambda: frame(b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "empty": lambda: frame(b""),
    "no id": lambda: frame(b'{"values": [[1.0]]}'),
    "another's id": lambda: answer(id=10**6),
    "an id of text": lambda: answer(id="0"),
    "unknown kind": lambda: frame(json.dumps({"id": NUMBER[0], "news": "all is well"}).encode()),
    "too few": lambda: answer(values=[]),
    "no numbers": lambda: answer(values=[["1.0"]]),
    "infinite": lambda: frame(b'{"id": %d, "seconds": 0.1, "values": [[Infinity]], "errors": [], "infos": [], '
                              b'"metrics": {}, "columns": {}}' % NUMBER[0]),
    "strange metrics": lambda: answer(metrics={"m": [1.0, 0]}),
    "strange errors": lambda: answer(errors=[[7, 0, "raised", "m"]]),
    "an error of numbers": lambda: answer(error=[1, 2]),
    "unknown tag": lambda: frame(b'tag\n{"id": {"tag": ["code", "os.system"]}}'),
}  # fmt: skip
TWICE = {"twice"}
CLOSED = {"closed", "half closed"}
NUMBER = [0]
INHERITED = next(
    os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64)
    if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
)  # fmt: skip


def act(samples):
    [sample] = samples
    how = sample.completion
    fd = protocol_fd()
    if how in WRITTEN:
        os.write(fd, WRITTEN[how]())
        time.sleep(0.1)  # its own answer comes after what it wrote was read
    elif how == "closed":
        os.close(fd)
        time.sleep(30)
    elif how == "half closed":
        import socket

        socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_WR)
        time.sleep(30)
    elif how == "twice":
        os.write(fd, answer())
        time.sleep(0.1)
    NUMBER[0] += 1
    return [1.0]


@reward(batch=1, retries=0, max_error_rate=1.0, timeout_s=5)
def garbles(samples):
    return act(samples)


@reward(batch=1, retries=0, max_error_rate=1.0, timeout_s=5, concurrency=1)
async def garbles_async(samples):
    found = act(samples)
    await asyncio.sleep(0)
    return found
