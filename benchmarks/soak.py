"""A server's patience on a CPU: a thousand streams that wait, and minutes of full load; its memory and time watched.

The server runs in a process of its own, a tiny V3 of random weights. `IDLE` and `MINUTES` in the environment set how
many streams and how long.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.record import console, where
from benchmarks.serving import talkative, words_of
from benchmarks.streams import Connection
from benchmarks.tiny import tiny

PAGE = resource.getpagesize()
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """What the system knows of a process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def megabytes(self) -> float:
        """Memory it holds."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE / 1e6

    @property
    def seconds(self) -> float:
        """CPU time it has taken."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def chat(words: int, answer: int) -> bytes:
    """A request's body."""
    message = {"role": "user", "content": words_of(words)}
    options = {"stream": True, "stream_options": {"include_usage": True}, "thinking": {"type": "disabled"}}
    return json.dumps({"messages": [message], "max_tokens": answer, **options}).encode()


async def wait_idle(url: str, server: Process, count: int) -> str:
    """`count` streams that are open and get nothing but what keeps them alive, behind eight long answers."""
    before = server.megabytes
    writers = []
    for number in range(count + 8):
        _, writer = await asyncio.open_connection(*_address(url))
        body = chat(16, 3000 if number < 8 else 16)
        writer.write(_head("POST", "/v1/chat/completions", len(body)) + body)
        writers.append(writer)
    await asyncio.sleep(5)
    held, begun, used = server.megabytes, time.perf_counter(), server.seconds
    await asyncio.sleep(30)
    share = (server.seconds - used) / (time.perf_counter() - begun)
    answered = []
    for _ in range(20):
        asked = time.perf_counter()
        reader, writer = await asyncio.open_connection(*_address(url))
        writer.write(_head("GET", "/health", 0))
        await reader.read(100)
        answered.append(time.perf_counter() - asked)
        writer.close()
    open_ = await _metric(url, "rorqual_active")
    for writer in writers:
        writer.close()
    begun = time.perf_counter()
    while await _metric(url, "rorqual_active") > 0:
        await asyncio.sleep(0.1)
    gone = time.perf_counter() - begun
    health = sorted(answered)[10] * 1e3
    return (
        f"{open_:.0f} streams open, {count} waiting: {(held - before) / count * 1e3:.0f} KB each; {share:.0%} of a "
        f"core in all, with the engine's work; /health in {health:.1f} ms; all gone {gone:.1f} s after they hung up, "
        f"{server.megabytes - before:+.0f} MB then"
    )


async def full(url: str, server: Process, minutes: float, streams: int) -> str:
    """So many clients, each asking again as soon as it is answered: memory by the minute."""
    end = time.perf_counter() + 60 * minutes
    tokens, answers, samples = 0, 0, []

    async def client() -> None:
        nonlocal tokens, answers
        connection = Connection(url)
        while time.perf_counter() < end:
            _, _, got = await connection.ask(chat(random.randint(8, 200), random.randint(16, 200)))
            tokens += got
            answers += 1

    async def watch() -> None:
        while time.perf_counter() < end:
            samples.append(server.megabytes)
            await asyncio.sleep(min(5.0, 60 * minutes / 20))

    await asyncio.gather(watch(), *(client() for _ in range(streams)))
    tenth = max(1, len(samples) // 10)
    steps = " ".join(f"{m:.0f}" for m in samples[::tenth])
    growth = sum(samples[-tenth:]) / tenth - sum(samples[tenth : 2 * tenth]) / tenth
    return (
        f"{minutes:g} minutes, {streams} clients: {answers:,} answers, {tokens / 60 / minutes:,.0f} tok/s; memory, MB: "
        f"{steps}; last tenth over second tenth {growth:+.1f} MB"
    )


def _address(url: str) -> tuple[str, int]:
    host, port = re.match(r"http://([^:]+):(\d+)", url).groups()  # type: ignore[union-attr]
    return host, int(port)


def _head(method: str, path: str, length: int) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


async def _metric(url: str, name: str) -> float:
    reader, writer = await asyncio.open_connection(*_address(url))
    writer.write(_head("GET", "/metrics", 0).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    page = (await reader.read(-1)).decode()
    writer.close()
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no {name} among the metrics: {page[:500]}")
    return float(found.group(1))


async def watch(url: str, pid: int) -> None:
    """Both."""
    server = Process(pid)
    await full(url, server, 0.2, 8)
    print(await wait_idle(url, server, int(os.environ.get("IDLE", "1000"))), flush=True)
    print(await full(url, server, float(os.environ.get("MINUTES", "10")), 8), flush=True)


def serve() -> None:
    """The server's process: prints its address."""
    import socket

    from rorqual.engine import Engine
    from rorqual.serve import Settings, create_app
    from rorqual.serve.run import run

    model = talkative(tiny(), "cpu")
    # Memory of caches counts once it is written to: little enough that all of it is, early.
    engine = Engine(model, max_requests=8, memory=128 * 2**20)
    app = create_app(model, Settings(max_queue=5000, drain=1.0), engine=engine)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    run(app, port=port)


def main() -> None:
    """Start a server, and watch it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    command: list[Any] = [sys.executable, "-c", "from benchmarks.soak import serve; serve()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            asyncio.run(_ready(url))
            asyncio.run(watch(url, child.pid))
        finally:
            child.terminate()
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")


async def _ready(url: str) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection(*_address(url))
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise RuntimeError("the server did not start")
