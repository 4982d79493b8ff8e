"""A client that reads many streams of completions at once: `python -m benchmarks.streams URL < requests.json`.

The requests are a list of bodies, of chats where they hold messages; they are sent at once, one a connection, or one
after the other with `--in-turn`.
Prints a list of [seconds to the first token, seconds to the end, tokens], one a request. It looks at as little of what
comes as it can, and runs in a process of its own: the server's time is what is to be measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit


class Connection:
    """One connection, kept alive."""

    def __init__(self, url: str) -> None:
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        """Connect."""
        self.streams = await asyncio.open_connection(self.host, self.port)

    async def ask(self, body: bytes) -> tuple[float, float, int]:
        """One streamed answer: seconds to its first token and its end, and its tokens."""
        if self.streams is None:
            await self.open()
        assert self.streams is not None
        reader, writer = self.streams
        begun, first, tail, head = time.perf_counter(), 0.0, b"", b""
        route = b"chat/completions" if b'"messages"' in body else b"completions"
        writer.write(
            b"POST /v1/" + route + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        while b"\r\n0\r\n\r\n" not in tail:
            data = await reader.read(1 << 18)
            if not data:
                raise RuntimeError(f"the server hung up: {tail[-300:]!r}")
            if not first:
                head += data
                if not head.startswith(b"HTTP/1.1 200"[: len(head)]):
                    raise RuntimeError(head[:500])
                first = time.perf_counter() - begun if b"data: " in head else 0.0
            tail = (tail + data)[-2000:]
        took = time.perf_counter() - begun
        usage = [
            line
            for line in tail.split(b"data: ")
            if b'"usage":{' in line.replace(b'"usage": {', b'"usage":{')
        ]
        if not usage:
            raise RuntimeError(f"no usage came: {tail!r}")
        return first, took, int(json.loads(usage[-1].split(b"\n")[0])["usage"]["completion_tokens"])


async def run(url: str, bodies: list[bytes], in_turn: bool) -> list[tuple[float, float, int]]:
    """All requests."""
    if in_turn:
        one = Connection(url)
        return [await one.ask(body) for body in bodies]
    connections = [Connection(url) for _ in bodies]
    await asyncio.gather(*(c.open() for c in connections))
    return await asyncio.gather(*(c.ask(body) for c, body in zip(connections, bodies, strict=True)))


def main() -> None:
    """Read requests, send them, print figures."""
    bodies = [json.dumps(request).encode() for request in json.load(sys.stdin)]
    print(json.dumps(asyncio.run(run(sys.argv[1], bodies, "--in-turn" in sys.argv))))


if __name__ == "__main__":
    main()
