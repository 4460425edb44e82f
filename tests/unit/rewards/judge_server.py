"""A chat endpoint on this machine that answers, fails and dawdles as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str, dict[str, str]]


def says(text: str) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), {}


@dataclass
class Endpoint:
    """url: what `base_url` takes. requests: (path, headers, body) of each that came."""

    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


@contextlib.contextmanager
def endpoint(answer: Callable[[int, dict[str, Any]], Answer]) -> Iterator[Endpoint]:
    """answer: (number of the request, its body) -> status, body, headers. It may take its time."""
    seen = Endpoint()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status, text, headers = answer(number, body)
            sent = text.encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked may have given up
                self.send_response(status)
                for name, value in {"content-length": str(len(sent)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 512
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
