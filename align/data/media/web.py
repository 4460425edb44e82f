"""Media at http(s) addresses: for hosts that the recipe allows, and never at an address inside the network.

A row that names a host makes this machine ask it, so (server-side request forgery) the name must be allowed, every
address that it resolves to must be public, and the connection is made to the address that was checked, not resolved a
second time. A redirect is a new address that goes through the same checks. What was fetched is kept by address: a run
that is resumed sees what it saw before.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from align.data.records import RowError

MAX_REDIRECTS = 5
_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)

Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """Every address of a host name. Raises OSError where there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class Web:
    """Fetches what may be fetched into a folder.

    hosts: allowed names, exactly as written (`*.example.org` allows the names below it). resolver: name and port to
    addresses. is_public: whether an address may be asked.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        timeout_s: float,
        resolver: Resolve = resolve,
        is_public: Callable[[str], bool] | None = None,
    ):
        self.folder, self.hosts = folder, tuple(host.lower().rstrip(".") for host in hosts)
        self.max_bytes, self.timeout_s = max_bytes, timeout_s
        self.resolver, self.is_public = resolver, is_public or is_public_address

    def fetch(self, url: str) -> Path:
        """The file with what lies at `url`. Raises RowError with the reason."""
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()}.download"
        if path.is_file():
            os.utime(path)
            return path
        deadline = time.monotonic() + self.timeout_s
        data, at = None, url
        for _ in range(MAX_REDIRECTS + 1):
            data, at = self._get(at, deadline)
            if data is not None:
                break
        if data is None:
            raise RowError(f"{_shown(url)}: more than {MAX_REDIRECTS} redirects")
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(data)
        aside.replace(path)
        return path

    def _get(self, url: str, deadline: float) -> tuple[bytes | None, str]:
        """(bytes, url), or (None, where it redirects to)."""
        parts, host, port = self._allowed(url)
        address = self._public_address(url, host, port)
        connection = _connection(parts.scheme, host, port, address, max(0.1, deadline - time.monotonic()))
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "align", "Accept": "*/*"})
            answer = connection.getresponse()
            if answer.status in _REDIRECTS:
                location = answer.headers.get("Location")
                if not location:
                    raise RowError(f"{_shown(url)}: a redirect (status {answer.status}) to nowhere")
                return None, urljoin(url, location)
            if answer.status != 200:
                raise RowError(f"{_shown(url)}: the server answers {answer.status} {answer.reason}")
            return self._read(answer, url, deadline), url
        except (OSError, http.client.HTTPException) as e:
            raise RowError(f"{_shown(url)}: {type(e).__name__}: {e}") from e
        finally:
            connection.close()

    def _read(self, answer: http.client.HTTPResponse, url: str, deadline: float) -> bytes:
        data = bytearray()
        while chunk := answer.read1(_CHUNK):
            data += chunk
            if len(data) > self.max_bytes:
                raise RowError(f"{_shown(url)} is larger than `media.max_bytes` ({self.max_bytes:,}) allows")
            if time.monotonic() > deadline:
                raise RowError(f"{_shown(url)} did not arrive within `media.timeout_s` ({self.timeout_s:g} s)")
        if answer.length:
            raise RowError(f"{_shown(url)}: the server closed {answer.length} bytes before the end")
        return bytes(data)

    def _allowed(self, url: str) -> tuple[SplitResult, str, int]:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as e:
            raise RowError(f"{_shown(url)} is no valid address: {e}") from e
        if parts.scheme not in ("http", "https") or not host:
            raise RowError(f"{_shown(url)}: only http and https addresses with a host are fetched")
        if parts.username is not None or parts.password is not None:
            raise RowError(f"{_shown(url)}: an address with a user name is not fetched")
        if any(ord(c) <= 32 or ord(c) > 126 for c in url):
            raise RowError(f"{_shown(url)}: write spaces and letters beyond ASCII percent-encoded")
        allowed = any(host == name or (name[:2] == "*." and host.endswith(name[1:])) for name in self.hosts)
        if not allowed:
            listed = ", ".join(self.hosts) or "none"
            raise RowError(
                f"the host {host} is not allowed (`media.hosts`: {listed}); add it there, or download the files and "
                "give paths"
            )
        return parts, host, port or (443 if parts.scheme == "https" else 80)

    def _public_address(self, url: str, host: str, port: int) -> str:
        """The address to connect to, where all that the name resolves to are public."""
        try:
            addresses = self.resolver(host, port)
        except OSError as e:
            raise RowError(f"{_shown(url)}: the host {host} cannot be resolved: {e}") from e
        for address in addresses:
            if not self.is_public(address):
                raise RowError(
                    f"the host {host} has the address {address}, which is private, link-local or reserved: "
                    "data must not make this machine ask its own network; download the files and give paths"
                )
        if not addresses:
            raise RowError(f"{_shown(url)}: the host {host} has no address")
        return addresses[0]


def is_public_address(address: str) -> bool:
    """Whether an address is reachable by anybody: not private, loopback, link-local (cloud metadata), multicast or
    reserved, also when it is written as an IPv6 address that stands for an IPv4 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


def _connection(scheme: str, host: str, port: int, address: str, timeout: float) -> http.client.HTTPConnection:
    """A connection to the address that was checked, under the host's name (Host header, certificate)."""
    if scheme == "https":
        secure = http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        secure._create_connection = _to(address)  # type: ignore[attr-defined]
        return secure
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection._create_connection = _to(address)  # type: ignore[attr-defined]
    return connection


def _to(address: str) -> Callable[..., socket.socket]:
    def connect(
        target: tuple[str, int], timeout: float | None = None, source: tuple[str, int] | None = None
    ) -> socket.socket:
        return socket.create_connection((address, target[1]), timeout, source)

    return connect


def _shown(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:80]}...{url[-15:]}"
