"""The parent's end of a connection to an episode: frames of `rewards.wire` on a socket, never more than a bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from rewards import wire


class Channel:
    """A stream of frames. Plain sockets and no transports: `close` needs no event loop, and leaves nothing."""

    def __init__(self, sock: socket.socket, most: int):
        sock.setblocking(False)
        self._sock = sock
        self._most = most

    async def send(self, frame: bytes) -> None:
        """OSError where nobody reads any more."""
        await asyncio.get_running_loop().sock_sendall(self._sock, frame)

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end. wire.ProtocolError where what comes is none, or longer than it may be."""
        try:
            header = await self._exactly(wire.HEADER.size)
            if header is None:
                return None
            [size] = wire.HEADER.unpack(header)
            if size > self._most:
                raise wire.ProtocolError(f"a message of {size:,} bytes; {self._most:,} are the most")
            body = await self._exactly(size)
        except OSError:
            return None
        return None if body is None else wire.decode(body)

    async def _exactly(self, count: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < count:
            part = await loop.sock_recv(self._sock, min(count - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)

    def hang_up(self) -> None:
        """The other side sees the end at once; a `receive` that waits here gets it too."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
