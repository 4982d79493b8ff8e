"""Bytes on a connection: what is answered, what is refused, and what closes it."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("httptools")
from tests.serve.processes import Process, server
from tests.serve.test_process import up

HOST = b"host: 127.0.0.1\r\n"
PROMPT = json.dumps({"prompt": "a b c"}).encode()
SIZED = b"content-length: %d\r\n\r\n" % len(PROMPT) + PROMPT
CHUNKED = b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(PROMPT) + PROMPT + b"\r\n0\r\n\r\n"
TOKENIZE, GET = b"POST /tokenize HTTP/1.1\r\n" + HOST, b"GET /ready HTTP/1.1\r\n" + HOST + b"\r\n"
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
STREAM = b"POST /v1/chat/completions HTTP/1.%d\r\n" + HOST + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    place: Path = tmp_path_factory.mktemp("server")
    with server(place, "x</think>" + "word " * 50, keep_alive=0.05, head_timeout=4.0) as process:
        up(process)
        yield process


def dial(made: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", made.port), timeout=20)


def answers(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", raw)]


def receive(line: socket.socket, count: int = 1) -> bytes:
    """So many answers whose lengths are known, whole, in however many parts they come; less if it is closed."""
    got, whole = b"", 0
    while whole < count:
        piece = line.recv(65536)
        if not piece:
            break
        got, whole, rest = got + piece, 0, got + piece
        while match := re.match(rb"HTTP/1\.1 .*?content-length: (\d+)\r\n.*?\r\n\r\n", rest, re.DOTALL):
            end = match.end() + int(match[1])
            whole, rest = whole + (len(rest) >= end), rest[end:]
    return got


def said(made: Process, *pieces: bytes, count: int = 1, end: bytes = b"") -> bytes:
    """All that comes back for these bytes, sent one after the other: so many answers and what follows them at once, to
    `end` if that is given."""
    got = b""
    with dial(made) as line:
        for number, piece in enumerate(pieces):
            line.sendall(piece)
            time.sleep(0.05 * (number + 1 < len(pieces)))
        while True:
            line.settimeout(0.1 if len(answers(got)) >= count and end in got else 20)
            try:
                piece = line.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return got
            if not piece:
                return got
            got += piece


@pytest.mark.parametrize(
    ("pieces", "statuses"),
    [
        ([TOKENIZE + SIZED], [200]),
        ([TOKENIZE + CHUNKED], [200]),
        ([TOKENIZE + SIZED + GET], [200, 200]),
        # Upgrades are not taken: the request is answered as it stands, and what follows it too.
        ([TOKENIZE + H2C + SIZED], [200]),
        ([TOKENIZE + H2C + CHUNKED], [200]),
        ([TOKENIZE + H2C + SIZED[:-5], SIZED[-5:]], [200]),
        ([TOKENIZE + H2C, SIZED], [200]),
        ([TOKENIZE + H2C.replace(b"h2c", b"websocket") + SIZED], [200]),
        ([GET[:-2] + H2C + b"\r\n" + GET], [200, 200]),
        ([GET[:-2] + H2C + b"\r\n" + TOKENIZE + H2C + SIZED + GET], [200, 200, 200]),
        ([GET[:-2] + b"connection: close, Upgrade\r\nupgrade: h2c\r\n\r\n"], [200]),
        # Versions and methods.
        ([b"GET /ready HTTP/1.0\r\n\r\n"], [200]),
        ([b"GET /ready HTTP/2.0\r\n" + HOST + b"\r\n"], [400]),
        ([b"GET /ready\r\n\r\n"], [400]),
        ([b"CONNECT /ready HTTP/1.1\r\n" + HOST + b"\r\n"], [400]),
        ([b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n" + GET], [400]),
        ([b"HEAD /ready HTTP/1.1\r\n" + HOST + b"\r\n" + GET], [405, 200]),
        # Hosts.
        ([b"GET /ready HTTP/1.1\r\n\r\n"], [400]),
        ([b"GET /ready HTTP/1.1\r\n" + HOST + b"host: evil.example\r\n\r\n"], [400]),
        ([b"GET /ready HTTP/1.0\r\n" + HOST + HOST + b"\r\n"], [400]),
        # Bodies whose end is doubtful.
        ([TOKENIZE + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"], [400]),
        ([TOKENIZE + b"transfer-encoding: gzip\r\n\r\n"], [400]),
        ([TOKENIZE.replace(b"1.1", b"1.0") + CHUNKED], [400]),
        ([TOKENIZE + b"content-length: 3\r\n" + CHUNKED], [400]),
        ([TOKENIZE + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"], [400]),
        ([TOKENIZE + b"content-length: -1\r\n\r\n"], [400]),
        ([TOKENIZE + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"], [400]),
        # A second request that can't be read, after a first that could.
        ([GET, b"\x01garbage\r\n\r\n"], [200, 400]),
        ([GET, b"GET /ready HTTP/1.1\r\n" + HOST + b"x: " + b"a" * 20_000], [200, 400]),
        ([GET, GET[:-2] + b"x: " + b"a" * 20_000 + b"\r\n\r\n"], [200, 400]),
    ],
)
def test_what_is_answered(made: Process, pieces: list[bytes], statuses: list[int]) -> None:
    got = said(made, *pieces, count=len(statuses))
    assert answers(got) == statuses, got


def test_trailers_are_no_headers(made: Process) -> None:
    got = said(made, TOKENIZE + CHUNKED[:-2] + b"host: evil.example\r\nx: y\r\n\r\n" + GET, count=2)
    assert answers(got) == [200, 200]


def test_a_client_of_version_1_0_gets_no_chunks(made: Process) -> None:
    head, _, body = said(made, STREAM % 0, end=b"[DONE]\n\n").partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    assert body.startswith((b"data: ", b": keep-alive")) and body.endswith(b"data: [DONE]\n\n")
    assert b"transfer-encoding: chunked" in said(made, STREAM % 1, end=b"[DONE]\n\n").lower()
    head, _, body = said(made, b"GET /ready HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head.lower() and json.loads(body) == {"status": "ready"}


@pytest.mark.parametrize("after", [b"\x01garbage\r\n\r\n", GET[:-2] + b"x: " + b"a" * 20_000 + b"\r\n\r\n"])
def test_no_answer_stands_inside_another(made: Process, after: bytes) -> None:
    made.gate.clear()
    try:
        with dial(made) as line:
            line.sendall(STREAM % 1)
            got = line.recv(65536)  # the first keep-alive: an answer is under way
            line.sendall(after)
            while piece := line.recv(65536):
                got += piece
    finally:
        made.gate.set()
    assert answers(got) == [200] and not got.endswith(b"0\r\n\r\n")


def test_what_follows_an_answer_under_way_does_not_cut_it_off(made: Process) -> None:
    made.gate.clear()
    with dial(made) as line:
        line.sendall(STREAM % 1 + GET[:20])  # and no more of that for longer than a head may take
        got = line.recv(65536)
        time.sleep(4.5)
        made.gate.set()
        while b"[DONE]" not in got:
            piece = line.recv(65536)
            assert piece, got
            got += piece
        line.sendall(GET[20:])
        while len(answers(got)) < 2 and (piece := line.recv(65536)):
            got += piece
    assert answers(got) == [200, 200]


def test_a_late_body_is_not_charged_to_the_next_request(made: Process) -> None:
    with dial(made) as line:
        line.sendall(b"POST /nope HTTP/1.1\r\n" + HOST + b"content-length: 10\r\n\r\n")
        got = receive(line)
        time.sleep(0.3)
        line.sendall(b"0123456789")
        time.sleep(2)  # the head that begins now has all of its four seconds
        line.sendall(GET[:20])
        time.sleep(2)
        line.sendall(GET[20:])
        got += receive(line)
    assert answers(got) == [404, 200]


def test_a_late_body_without_end_ends(made: Process) -> None:
    with dial(made) as line:
        line.sendall(b"POST /nope HTTP/1.1\r\n" + HOST + b"content-length: 1000000\r\n\r\n")
        assert answers(receive(line)) == [404]
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                line.sendall(b"a")
                time.sleep(0.1)
