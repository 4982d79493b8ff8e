"""The page at `/`: files of the package, and nothing else.

Every file is read once and found by its name in a table, so no path that a client sends ever reaches the file system.
`index.html` names the other files under `page/DIGEST/`, where DIGEST stands for the contents of all of them: they can
be kept for ever, and a new version has new addresses. All addresses are relative, so that the server may stand behind
a proxy under any path.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

ROOT = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".LICENSE": "text/plain; charset=utf-8",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Where the browser knows trusted types, only what DOMPurify passed can become HTML at all.
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class File:
    """A file's bytes and its media type."""

    raw: bytes
    type: str

    @cached_property
    def packed(self) -> bytes | None:
        """The bytes as gzip; None where that gains nothing."""
        return None if self.type == TYPES[".woff2"] else gzip.compress(self.raw, 6, mtime=0)

    @cached_property
    def tag(self) -> str:
        """The ETag, without its quotes."""
        return hashlib.sha256(self.raw).hexdigest()[:20]


@cache
def files() -> tuple[str, dict[str, File]]:
    """The digest of all files, and the files by their names below `page/`; "" is index.html with the digest in it."""
    paths = sorted(path for path in ROOT.rglob("*") if path.suffix in TYPES and path.is_file())
    found = {path.relative_to(ROOT).as_posix(): File(path.read_bytes(), TYPES[path.suffix]) for path in paths}
    whole = hashlib.sha256("".join(f"{name} {file.tag}\n" for name, file in found.items()).encode())
    digest = whole.hexdigest()[:12]
    index = found.pop("index.html")
    found[""] = File(index.raw.replace(b"page/DIGEST/", f"page/{digest}/".encode()), index.type)
    return digest, found


def _takes_gzip(accepted: str) -> bool:
    """Whether a client takes gzip: named, or by *, with a weight above 0."""
    weights: dict[str, bool] = {}
    for part in accepted.lower().split(","):
        name, *options = (word.strip() for word in part.split(";"))
        weights[name] = not any(option.replace(" ", "").strip("0.") == "q=" for option in options)
    return weights.get("gzip", weights.get("*", False))


async def page(request: Request, digest: str = "", name: str = "") -> Response:
    """A file. Under the digest of this version it may be kept for ever; anything else is asked for again."""
    current, found = files()
    file = found.get(name)
    if file is None or (digest and not name):
        raise HTTPException(404)
    kept = "public, max-age=31536000, immutable" if digest == current else "no-cache"
    packed = file.packed if _takes_gzip(request.headers.get("accept-encoding", "")) else None
    tag = f'"{file.tag}{"" if packed is None else "-gzip"}"'
    headers = HEADERS | {"etag": tag, "cache-control": kept}
    held = request.headers.get("if-none-match", "")
    if tag in held or held.strip() == "*":
        return Response(None, 304, headers)
    if packed is not None:
        headers["content-encoding"] = "gzip"
    return Response(file.raw if packed is None else packed, 200, headers, file.type)


def router() -> APIRouter:
    """The page's routes. They need no key: there is nothing in them but the page, which asks for one."""
    routes = APIRouter(include_in_schema=False)
    for path in ("/", "/page/{digest}/{name:path}"):
        routes.add_api_route(path, page, methods=["GET", "HEAD"])
    return routes
