"""curl against every route, and clients that read slowly, half or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Served, until

httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
ASK: dict[str, Any] = {"model": "rorqual", "messages": [{"role": "user", "content": "Hi"}]}
LONG = "x</think>" + "word " * 3000

ANSWERS = [
    ("/chat/completions", ASK, "choices.0.message.content"),
    ("/v1/chat/completions", ASK, "choices.0.message.content"),
    ("/beta/chat/completions", ASK, "choices.0.message.content"),
    ("/v1/completions", {"prompt": "Hi"}, "choices.0.text"),
    ("/completions", {"prompt": "Hi"}, "choices.0.text"),
    ("/beta/completions", {"prompt": "def f(", "suffix": ")"}, "choices.0.text"),
    ("/v1/responses", {"model": "rorqual", "input": "Hi"}, "output.-1.content.0.text"),
    ("/anthropic/v1/messages", ASK | {"max_tokens": 50}, "content.-1.text"),
    ("/v1/messages", ASK | {"max_tokens": 50}, "content.-1.text"),
]


@pytest.fixture(autouse=True)
def _curl() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")


def curl(url: str, *arguments: str, body: Any = None) -> tuple[int, str]:
    """Status and body, as a shell would have them."""
    data = [] if body is None else ["--json", json.dumps(body)]
    command = ["curl", "-sSN", "--max-time", "30", "-w", "\n%{http_code}", *data, *arguments, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    return int(status), text


def at(value: Any, path: str) -> Any:
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def test_every_route_whole_and_streamed(puppet: Start) -> None:
    server = puppet("hm</think>Hello world", encoding="v4")
    for path, body, place in ANSWERS:
        status, text = curl(server.url + path, body=body)
        assert status == 200, (path, text)
        assert at(json.loads(text), place).endswith("Hello world"), path
        status, text = curl(server.url + path, body=body | {"stream": True})
        assert status == 200, (path, text)
        events = [line for line in text.splitlines() if line.startswith("data: ")]
        told = [json.loads(line[6:]) for line in events if line != "data: [DONE]"]
        pieces = "".join(_piece(event) for event in told)
        assert pieces.endswith("Hello world"), (path, pieces)
        openai = path.endswith("completions")
        assert (events[-1] == "data: [DONE]") == openai, path


def _piece(event: dict[str, Any]) -> str:
    """The text that a streamed event brings, whatever the API."""
    if "choices" in event:
        choice = event["choices"][0] if event["choices"] else {}
        return choice.get("text") or choice.get("delta", {}).get("content") or ""
    if event["type"] == "response.output_text.delta":
        return str(event["delta"])
    delta = event.get("delta")
    return (
        str(delta.get("text", ""))
        if event["type"] == "content_block_delta" and isinstance(delta, dict)
        else ""
    )


def test_the_other_routes(puppet: Start) -> None:
    server = puppet("x", keys=("k3y",))
    key = ("-H", "Authorization: Bearer k3y")
    for path, body, found in (
        ("/v1/models", None, lambda told: told["data"][0]["id"] == "rorqual"),
        ("/v1/models/rorqual", None, lambda told: told["id"] == "rorqual"),
        ("/tokenize", {"prompt": "Hello world"}, lambda told: len(told["tokens"]) == 2),
        ("/detokenize", {"tokens": [1, 2]}, lambda told: bool(told["prompt"])),
        ("/v1/messages/count_tokens", ASK, lambda told: told["input_tokens"] > 2),
        ("/health", None, lambda told: told["status"] == "ok"),
        ("/ready", None, lambda told: told["status"] == "ready"),
    ):
        status, text = curl(server.url + path, *key, body=body)
        assert status == 200 and found(json.loads(text)), (path, text)
    assert "rorqual_requests_total" in curl(server.url + "/metrics", *key)[1]
    assert curl(server.url + "/v1/models")[0] == 401
    assert curl(server.url + "/v1/chat/completions", *key, "-d", "{")[0] == 400
    assert curl(server.url + "/nowhere")[0] == 404


# ------------------------------------------------------------------------------------- odd readers


def wire(server: Served, body: Any, *, small: bool = False) -> socket.socket:
    """A connection on which a streamed request was sent; `small`: with little room for what isn't read."""
    host, port = server.url.removeprefix("http://").split(":")
    found = socket.socket()
    if small:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found.connect((host, int(port)))
    found.settimeout(30)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    found.sendall(head.encode() + raw)
    return found


def narrow(server: Served) -> None:
    """Leave the kernel little room for what clients don't read; it is inherited by connections to come."""
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(puppet: Start) -> None:
    server = puppet(LONG)
    narrow(server)
    with wire(server, ASK | {"stream": True}, small=True) as slow:
        until(lambda: not server.engine.live and bool(server.engine.seen))  # made, and mostly unread
        assert server.service.active == 1
        server.engine.script.clear()
        server.engine.script.append("y</think>quick")
        for _ in range(5):
            status, text = curl(server.url + "/v1/chat/completions", body=ASK)
            assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == "quick"
        assert server.service.active == 1
        got = b"".join(iter(lambda: slow.recv(65536), b""))
    assert got.count(b'"content":"') and got.rstrip().endswith(b"0") and b"data: [DONE]" in got
    lines = [line for line in got.split(b"\n") if line.startswith(b"data: {")]
    told = [json.loads(line[6:])["choices"] for line in lines]
    words = "".join(choice["delta"].get("content") or "" for choices in told for choice in choices)
    assert words.count("word") == 3000
    until(lambda: server.service.active == 0)


@pytest.mark.parametrize("limit", [{"stall": 0.2}, {"timeout": 0.2}])
def test_who_does_not_read_at_all_is_given_up(
    puppet: Start, limit: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    server = puppet(LONG, **limit)
    narrow(server)
    with (
        caplog.at_level(logging.INFO, "rorqual.serve"),
        wire(server, ASK | {"stream": True}, small=True) as slow,
    ):
        until(lambda: server.service.active == 1)
        until(lambda: server.service.active == 0)
        until(lambda: '"status": 499' in caplog.text or '"status": 504' in caplog.text)
        until(lambda: not server.engine.live and not server.service.driver._live)
        assert curl(server.url + "/v1/chat/completions", body=ASK | {"max_tokens": 2})[0] == 200
        slow.close()


def test_a_client_that_stops_sending_is_a_client_that_leaves(puppet: Start) -> None:
    server = puppet(LONG)
    server.engine.gate.clear()
    with wire(server, ASK | {"stream": True}) as half:
        until(lambda: bool(server.engine.live))
        half.shutdown(socket.SHUT_WR)
        until(lambda: server.service.active == 0)
        server.engine.gate.set()
        until(lambda: server.engine.cancelled == 1)
        assert b"[DONE]" not in b"".join(iter(lambda: half.recv(65536), b""))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as half:  # and in the middle of its request
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        half.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: half.recv(65536), b""))
        assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    assert len(server.engine.seen) == 1 and server.service.active == 0


def test_a_body_that_never_comes(puppet: Start) -> None:
    server = puppet("x", body_timeout=0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as idle:
        idle.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        answer = b""
        while b"}}" not in answer:
            answer += idle.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0] and b'"type":"error"' in answer


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_cancelled_within_a_step(puppet: Start, stream: bool) -> None:
    server = puppet(LONG)
    with wire(server, ASK | {"stream": stream}):
        until(lambda: bool(server.engine.seen) and len(server.engine.seen[0].done.ids) > 5)
        server.engine.gate.clear()
        answer = server.engine.seen[0]
        threading.Event().wait(0.05)  # the step that was under way ends; the next one waits at the gate
        had = len(answer.done.ids)
    until(lambda: server.service.active == 0)
    server.engine.gate.set()
    until(lambda: server.engine.cancelled == 1)
    assert len(answer.done.ids) <= had + 1
