"""The page's files, as any client sees them."""

from __future__ import annotations

import gzip
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Served, puppet

httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
__all__ = ["puppet"]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "rorqual" / "serve" / "page"


def get(server: Served, path: str, **headers: str) -> Any:
    return httpx.get(server.url + path, headers={"accept-encoding": "identity", **headers})


def test_every_file_is_there_with_its_type(puppet: Start) -> None:
    server = puppet("x", keys=("secret",))  # the page itself needs none
    index = get(server, "/")
    assert index.status_code == 200 and index.headers["content-type"] == "text/html; charset=utf-8"
    assert index.headers["cache-control"] == "no-cache"
    named = re.findall(r'(?:href|src)="(page/[^"]+)"', index.text)
    assert len(named) >= 5 and "DIGEST" not in index.text
    base = named[0].split("/")[1]
    types = {
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".woff2": "font/woff2",
        ".svg": "image/svg+xml",
        ".LICENSE": "text/plain; charset=utf-8",
    }
    files = [path for path in PAGE.rglob("*") if path.suffix in types]
    assert len(files) > 40
    client = httpx.Client(headers={"accept-encoding": "identity"})
    for path in files:
        answer = client.get(f"{server.url}/page/{base}/{path.relative_to(PAGE).as_posix()}")
        assert answer.status_code == 200 and answer.content == path.read_bytes(), path
        assert answer.headers["content-type"] == types[path.suffix]
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    for name in named:
        assert get(server, "/" + name).status_code == 200, name


def test_conditions_and_encodings_of_a_request(puppet: Start) -> None:
    server = puppet("x")
    assert get(server, "/", **{"if-none-match": "*"}).status_code == 304
    for accepted, packed in (
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, br", False),
        ("*, gzip;q=0", False),
        ("identity", False),
        ("gzipped", False),
    ):
        headers = get(server, "/", **{"accept-encoding": accepted}).headers
        assert ("content-encoding" in headers) == packed, accepted


def test_the_headers_that_guard_it(puppet: Start) -> None:
    server = puppet("x")
    for path in ("/", "/page/x/app.js", "/page/x/vendor/katex.min.css"):
        headers = get(server, path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'" and "unsafe" not in str(policy)
        assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "dompurify"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_what_is_known_is_not_sent_again(puppet: Start) -> None:
    server = puppet("x")
    for path in ("/", "/page/x/app.js"):
        first = get(server, path)
        assert first.headers["cache-control"] == "no-cache"  # "x" is another version
        again = get(server, path, **{"if-none-match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert get(server, path, **{"if-none-match": '"other"'}).status_code == 200
        packed = httpx.get(server.url + path, headers={"accept-encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip" and packed.content == first.content
        assert packed.headers["etag"] != first.headers["etag"] and packed.headers["vary"] == "accept-encoding"
        assert int(packed.headers["content-length"]) == len(gzip.compress(first.content, 6, mtime=0))
        head = httpx.head(server.url + path, headers={"accept-encoding": "identity"})
        assert (
            head.status_code == 200
            and not head.content
            and int(head.headers["content-length"]) == len(first.content)
        )


ELSEWHERE = [
    "/page", "/page/", "/page/x", "/page/x/", "/page/x/nothing.js", "/page/x/index.html", "/page/x/vendor", "/page/x/vendor/",
    "/page/x/../pages.py", "/page/x/%2e%2e/pages.py", "/page/x/..%2fpages.py", "/page/x/..%5cpages.py", "/page/../app.py",
    "/page/x//etc/passwd", "/page/x/%2fetc/passwd", "/page/x/vendor/../../pages.py", "/page/x/app.js%00", "/page/x/APP.JS",
    "/page/x/vendor/README.md", "/page/x/__pycache__", "/page/x/" + "a/" * 2000, "/page/x/%ff%fe", "//", "/index.html",
]  # fmt: skip


def test_nothing_else_is_there(puppet: Start) -> None:
    """Paths as they are written on the wire: no client tidies them first."""
    server = puppet("x")
    for path in ELSEWHERE:
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: line.recv(65536), b""))
        assert answer.split(b" ", 2)[1] in (b"404", b"307"), path
        assert b"import" not in answer and b"root:" not in answer, path


def test_a_server_may_be_without_it(puppet: Start) -> None:
    server = puppet("x", page=False)
    assert get(server, "/").status_code == 404 and get(server, "/page/x/app.js").status_code == 404
    assert get(server, "/v1/models").status_code == 200


def test_nothing_is_left_out_of_a_package() -> None:
    """The wheel holds what git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git here")
    told = subprocess.run(
        ["git", "check-ignore", "--no-index", *map(str, PAGE.rglob("*"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.stdout == ""


def test_modules_stay_small_and_others_files_have_licences() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in PAGE.glob("*.js")}
    assert max(sizes.values()) < 400 and sum(sizes.values()) < 2500, sizes
    vendor = PAGE / "vendor"
    table = (vendor / "README.md").read_text()
    for path in vendor.iterdir():
        if path.suffix in (".js", ".css"):
            assert f"`{path.name}`" in table
    assert {path.name.split(".")[0] for path in vendor.glob("*.LICENSE")} == {
        "marked",
        "dompurify",
        "highlight",
        "katex",
    }
