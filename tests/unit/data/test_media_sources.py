"""Where media may come from: folders, bytes, data URIs, and hosts that the recipe allows."""

from __future__ import annotations

import http.server
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.data.media.sources import Allowed, Finder
from align.data.media.web import Web, is_public_address
from align.data.records import MediaPart, RowError
from tests.unit.data.media_world import data_uri, picture, png


def no_web(url: str) -> Path:
    raise AssertionError(f"{url} was asked for")


def finder(*folders: Path, max_bytes: int = 1 << 20) -> Finder:
    return Finder(Allowed(folders, max_bytes, no_web))


def refusal(source: Any, folder: Path | None, *folders: Path, kind: Any = "image", max_bytes: int = 1 << 20) -> str:
    with pytest.raises(RowError) as error:
        finder(*folders, max_bytes=max_bytes).find(MediaPart(kind, source), folder)
    return str(error.value)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a picture, and one beside it that is nobody's business."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png(picture(seed=9)))
    return tmp_path / "data"


def test_equal_content_has_one_hash_wherever_it_lies(data: Path) -> None:
    (data / "copy.png").write_bytes(png())
    sources = ["images/a.png", "copy.png", str(data / "copy.png"), f"file://{data}/copy.png", png(), data_uri(png())]
    sources += [{"bytes": png(), "path": "never/read.png"}, {"bytes": None, "path": "copy.png"}, bytearray(png())]
    found = [finder().find(MediaPart("image", source), data) for source in sources]
    assert len({one.blobs[0].sha256 for one in found}) == 1
    assert [one.blobs[0].data is None for one in found[:4]] == [True] * 4


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("images/b.png", r"there is no file images/b.png \(looked in "),
        ("images", "images is a folder, not a file"),
        (
            "../secret.png",
            "lies outside the data file's folder; if that is meant, allow its folder with `media.folders: ",
        ),
        ("images/../../secret.png", "lies outside the data file's folder"),
        ("/etc/passwd", "/etc/passwd lies outside the data file's folder"),
        ("~root/x.png", "lies outside|is no path"),
        ("file:///etc/passwd", "/etc/passwd lies outside the data file's folder"),
        ("", "the path of an image is empty"),
        ("   ", "the path of an image is empty"),
        ("a\0b.png", "a path has a null character"),
        ("iVBORw0KGgo" * 600, "is no path: File name too long .base64 needs `data:image/png;base64,` before it"),
        ("ftp://example.org/a.png", "ftp addresses are not read; give a path, a data URI or http"),
        ("s3://bucket/a.png", "s3 addresses are not read"),
        ("data:image/png,abc", "a data URI without `;base64,`"),
        ("data:image/png;base64,@@@@", "a data URI is not valid base64"),
        ("data:image/png;base64,", "the image data URI is empty"),
        (data_uri(png(), "text/html"), "a data URI of type text/html where an image should be"),
        (
            data_uri(b"x" * 2_000_000),
            r"a data URI has 2,000,001 bytes, more than `media.max_bytes` \(1,048,576\) allows",
        ),
        (b"", "the image bytes are empty"),
        (b"x" * 2_000_000, "image bytes has 2,000,000 bytes"),
        (7, "an image is a int; give a path, a data URI, bytes or an address"),
        ({"height": 3}, r"a medium's struct has neither bytes nor path \(it has: height\)"),
        (["a.png"], "one image is a list of 1; only a video may be a list, of its frames"),
    ],
)
def test_sources_that_cannot_be_used_say_why(source: Any, reason: str, data: Path) -> None:
    assert re.search(reason, refusal(source, data)), refusal(source, data)


def test_a_link_out_of_the_data_folder_is_refused_and_a_folder_that_the_recipe_allows_is_not(data: Path) -> None:
    (data / "link.png").symlink_to(data.parent / "secret.png")
    (data / "circle.png").symlink_to(data / "circle.png")
    assert "link.png lies outside the data file's folder" in refusal("link.png", data)
    assert "circle.png" in refusal("circle.png", data)
    allowed = finder(data.parent)
    assert allowed.find(MediaPart("image", "link.png"), data).blobs[0].path == data.parent / "secret.png"
    assert allowed.find(MediaPart("image", "secret.png"), data).blobs[0].path == data.parent / "secret.png"
    assert "have no folder; name one with `media.folders`" in refusal("a.png", None)


def test_empty_and_too_large_files_are_refused_and_an_empty_list_of_frames(data: Path) -> None:
    (data / "empty.png").touch()
    assert refusal("empty.png", data) == "empty.png: the file is empty"
    assert "more than `media.max_bytes` (100) allows" in refusal("images/a.png", data, max_bytes=100)
    assert refusal([], data, kind="video") == "a video is an empty list of frames"


# ------------------------------------------------------------------------------------------------- the web


class Server:
    """A local server that plays every host: what is public is decided by the tests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.headers["Host"], self.path))
                status, headers, body = outer.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


ADDRESSES = {
    "img.example.org": ["127.0.0.1"],
    "other.example.org": ["127.0.0.1"],
    "inside.example.org": ["10.0.0.5"],
    "metadata.example.org": ["169.254.169.254"],
    "both.example.org": ["127.0.0.1", "192.168.1.7"],
}


@pytest.fixture
def web(tmp_path: Path, server: Server) -> Callable[..., Web]:
    """127.0.0.1 plays the one public address."""

    def resolver(host: str, port: int) -> list[str]:
        if host not in ADDRESSES:
            raise socket.gaierror("Name or service not known")
        return ADDRESSES[host]

    def make(*hosts: str, max_bytes: int = 10_000) -> Web:
        public = lambda address: address == "127.0.0.1" or is_public_address(address)  # noqa: E731
        names = hosts or ("*.example.org", "169.254.169.254", "localhost", "[::1]", "gone.org")
        return Web(tmp_path / "web", names, max_bytes=max_bytes, timeout_s=5, resolver=resolver, is_public=public)

    return make


def web_refusal(web: Web, url: str) -> str:
    with pytest.raises(RowError) as error:
        web.fetch(url)
    return str(error.value)


def test_an_allowed_host_is_asked_once_under_its_own_name(web: Callable[..., Web], server: Server) -> None:
    server.answers["/a.png?x=1"] = (200, {}, png())
    url = f"http://img.example.org:{server.port}/a.png?x=1"
    path = web("img.example.org").fetch(url)
    assert path.read_bytes() == png()
    assert web("img.example.org").fetch(url) == path
    assert server.asked == [(f"img.example.org:{server.port}", "/a.png?x=1")]


def test_no_host_is_asked_that_the_recipe_does_not_name(web: Callable[..., Web], server: Server) -> None:
    port = server.port
    closed = Web(Path("unused"), (), max_bytes=1, timeout_s=1)
    assert "the host img.example.org is not allowed (`media.hosts`: none)" in web_refusal(
        closed, "http://img.example.org/a"
    )
    only = web("img.example.org")
    assert "other.example.org is not allowed" in web_refusal(only, f"http://other.example.org:{port}/a")
    assert "with a user name is not fetched" in web_refusal(only, f"http://img.example.org@evil.org:{port}/a")
    assert "with a user name is not fetched" in web_refusal(only, f"http://me:pw@img.example.org:{port}/a")
    assert "example.org.evil.org is not allowed" in web_refusal(web(), f"http://example.org.evil.org:{port}/a")
    assert "percent-encoded" in web_refusal(only, "http://img.example.org/a b")
    assert "only http and https" in web_refusal(only, "http:///a.png")
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://inside.example.org/a.png", "has the address 10.0.0.5, which is private, link-local or reserved"),
        ("http://metadata.example.org/latest/meta-data", "has the address 169.254.169.254"),
        ("http://both.example.org/a.png", "has the address 192.168.1.7"),
        ("http://gone.org/a.png", "the host gone.org cannot be resolved"),
    ],
)
def test_addresses_inside_the_network_are_never_asked(
    url: str, reason: str, web: Callable[..., Web], server: Server
) -> None:
    assert reason in web_refusal(web(), url)
    assert not server.asked


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://evil.org/x", "the host evil.org is not allowed"),
        ("http://metadata.example.org/x", "has the address 169.254.169.254"),
        ("http://169.254.169.254/latest", "169.254.169.254 cannot be resolved|has the address"),
        ("file:///etc/passwd", "only http and https addresses"),
        ("/a.png", "more than 5 redirects"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(
    location: str, reason: str, web: Callable[..., Web], server: Server
) -> None:
    server.answers["/a.png"] = (302, {"Location": location}, b"")
    message = web_refusal(web(), f"http://img.example.org:{server.port}/a.png")
    assert re.search(reason, message), message


def test_a_redirect_to_an_allowed_host_is_followed(web: Callable[..., Web], server: Server) -> None:
    server.answers["/a.png"] = (301, {"Location": f"http://other.example.org:{server.port}/b.png"}, b"")
    server.answers["/b.png"] = (200, {}, b"picture")
    assert web().fetch(f"http://img.example.org:{server.port}/a.png").read_bytes() == b"picture"


def test_what_is_missing_too_large_or_cut_short_is_refused(web: Callable[..., Web], server: Server) -> None:
    base = f"http://img.example.org:{server.port}"
    server.answers["/large"] = (200, {}, b"x" * 20_000)
    server.answers["/short"] = (200, {"Content-Length": "50"}, b"x" * 20)
    server.answers["/nowhere"] = (302, {}, b"")
    assert "the server answers 404" in web_refusal(web(), f"{base}/none")
    assert "is larger than `media.max_bytes` (10,000) allows" in web_refusal(web(), f"{base}/large")
    assert "the server closed 30 bytes before the end" in web_refusal(web(), f"{base}/short")
    assert "a redirect (status 302) to nowhere" in web_refusal(web(), f"{base}/nowhere")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1"],
)  # fmt: skip
def test_private_link_local_and_reserved_addresses_are_not_public(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are(address: str) -> None:
    assert is_public_address(address)
