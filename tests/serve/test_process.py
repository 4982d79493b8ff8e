"""A server as a process: how it ends, and what it writes down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import until
from tests.serve.processes import CONTEXT, Process, server

httpx = pytest.importorskip("httpx2")
ASK = {"messages": [{"role": "user", "content": "secret words"}]}


def up(made: Process) -> None:
    def answers() -> bool:
        assert made.process.is_alive(), made.log
        try:
            return bool(httpx.get(made.url + "/ready").status_code == 200)
        except httpx.HTTPError:
            return False

    until(answers, 60)


def streamed(made: Process) -> Any:
    return httpx.stream("POST", made.url + "/v1/chat/completions", json=ASK | {"stream": True}, timeout=60)


def status(made: Process, path: str, **options: Any) -> Any:
    return httpx.request("POST" if options else "GET", made.url + path, timeout=20, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_turns_others_away(tmp_path: Path, number: int) -> None:
    with server(tmp_path, "x</think>" + "word " * 50, keep_alive=0.05) as made:
        up(made)
        made.gate.clear()
        with streamed(made) as answer:
            pieces = answer.iter_lines()
            assert next(pieces) == ": keep-alive"
            made.signal(number)
            until(lambda: status(made, "/ready").json() == {"status": "draining"})
            turned = status(made, "/v1/chat/completions", json=ASK)
            assert turned.status_code == 503 and turned.headers["retry-after"] == "1"
            assert turned.json()["error"]["code"] == "draining"
            assert (
                status(made, "/v1/messages", json={**ASK, "model": "rorqual", "max_tokens": 3}).status_code
                == 529
            )
            assert status(made, "/health").status_code == 200  # it is to be left alone until it has ended
            made.gate.set()
            lines = [line for line in pieces if line.startswith("data")]
        assert lines[-1] == "data: [DONE]"
        told = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            for line in lines[:-1]
            if "choices" in line
        )
        assert told.count("word") == 50
        assert made.code() == 0
        with pytest.raises(httpx.HTTPError):
            status(made, "/ready")
        assert "Traceback" not in made.log and "shutting down: 1 answers" in made.log


def test_nothing_under_way_ends_at_once(tmp_path: Path) -> None:
    with server(tmp_path, "x", drain=600.0) as made:
        up(made)
        made.signal(signal.SIGTERM)
        assert made.code() == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with server(tmp_path, "x</think>" + "word " * 50, drain=600.0, keep_alive=0.05) as made:
        up(made)
        made.gate.clear()
        with pytest.raises(httpx.HTTPError), streamed(made) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            made.signal(signal.SIGTERM)
            until(lambda: status(made, "/ready").status_code == 503)
            assert made.process.is_alive()
            made.signal(signal.SIGINT)
            assert made.code() == 128 + signal.SIGINT
            for _ in pieces:
                pass


def test_a_drain_has_an_end_even_if_the_engine_hangs(tmp_path: Path) -> None:
    with server(tmp_path, "x</think>" + "word " * 50, drain=0.2, grace=0.5, keep_alive=0.05) as made:
        up(made)
        made.gate.clear()
        with pytest.raises(httpx.HTTPError), streamed(made) as answer:
            made.signal(signal.SIGTERM)
            for _ in answer.iter_raw():
                pass
        assert made.code() == 1 and "not finished in time" in made.log


def test_keys_and_prompts_are_in_no_log_at_any_level(tmp_path: Path) -> None:
    with server(tmp_path, "x</think>hidden answer", debug=True, keys=("k3y-one", "k3y-two")) as made:
        up(made)
        for headers, code in (
            ({"authorization": "Bearer k3y-one"}, 200),
            ({"x-api-key": "k3y-two"}, 200),
            ({"authorization": "Bearer wr0ng"}, 401),
        ):
            for path in ("/v1/chat/completions", "/tokenize"):
                body = json.dumps(ASK).encode()
                answer = httpx.post(made.url + path, content=body, headers=headers)
                assert answer.status_code in (code, 422 if code == 200 else code)
        made.signal(signal.SIGTERM)
        assert made.code() == 0
    assert "ASGI" in made.log, "the level is not what the test is about"
    assert '"status": 200' in made.log and '"status": 401' in made.log
    for secret in ("k3y", "wr0ng", "secret words", "hidden"):
        assert secret not in made.log, made.log


def test_connections_that_say_nothing_are_closed(tmp_path: Path) -> None:
    with server(tmp_path, "x</think>" + "word " * 50, head_timeout=0.3, keep_alive=0.05) as made:
        up(made)
        made.gate.clear()
        with streamed(made) as answer:
            for sent in (
                b"",
                b"GET /ready HTTP/1.1\r\nhost: lo",
                b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n",
                b"GET /",
                b"\r\n",
            ):
                with socket.create_connection(("127.0.0.1", made.port), timeout=20) as place:
                    if sent == b"GET /":  # a second request, after a whole one
                        place.sendall(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
                        assert place.recv(4096)
                    place.sendall(sent)
                    while place.recv(4096):
                        pass
            assert status(made, "/ready").status_code == 200
            made.gate.set()
            assert "data: [DONE]" in answer.iter_lines()  # it has outlived that time


def _send_until_answered(place: socket.socket, text: bytes) -> bytes:
    got = b""
    for patience in (1, 20):
        place.sendall(text)
        place.settimeout(patience)
        with contextlib.suppress(TimeoutError):
            while piece := place.recv(4096):
                got += piece
            break
    return got


def test_heads_and_trailers_without_end_are_refused(tmp_path: Path) -> None:
    from rorqual.serve.connection import HEAD

    head = b"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    with server(tmp_path, "x", keep_alive=0.05) as made:
        up(made)
        for begin, more in (
            (b"GET /", b"a" * 1000),
            (b"GET /", b"?a=" + b"b" * 40_000),  # all at once
            (head, b"a: " + b"b" * 1000 + b"\r\n"),
            (head + b"a:", b"b" * 1000),
            (b"", b"\r\n" * 500),
            (head + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 1000),
            (head + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: " + b"b" * 1000 + b"\r\n"),
            (head + b"transfer-encoding: chunked\r\n\r\n0\r\na:", b"b" * 1000),
        ):
            with socket.create_connection(("127.0.0.1", made.port), timeout=20) as place:
                place.sendall(begin)
                # No byte more than is needed: one that comes later would cost the answer. Twice, because what comes
                # together with the end of a head is not counted.
                got = _send_until_answered(place, more * (HEAD // len(more) + 1))
                assert got.startswith(b"HTTP/1.1 400"), (begin, got)
        text = json.dumps({"prompt": "a " * 50_000}).encode()
        pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
        assert httpx.post(made.url + "/tokenize", content=iter(pieces)).status_code == 200
        up(made)


# ------------------------------------------------------------------------------------------ many ranks


def test_only_ranks_of_ours_are_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    from rorqual.serve.ranks import _send

    sent: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: (sent.append(pid), kill(pid, number)))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        _send(os.getpid(), signal.SIGKILL)  # as if another process had been given a rank's number
        _send(child.pid, signal.SIGKILL)
        _send(child.pid, signal.SIGKILL)  # dead, but nobody else can have its number yet
        assert child.wait(20) == -signal.SIGKILL
        _send(child.pid, signal.SIGKILL)
    assert sent == [child.pid, child.pid]


def _parent(place: str) -> None:
    """Starts a rank and waits, as the launcher does."""
    os.environ |= {"RORQUAL_RANKS_DIR": place, "RORQUAL_RANKS_WATCHER": str(os.getpid()), "RANK": "0"}
    pid = os.fork()
    if pid == 0:
        _rank()
    os.waitpid(pid, 0)


def _rank() -> None:
    from rorqual.serve import ranks

    ranks.begin()
    time.sleep(60)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    parent = CONTEXT.Process(target=_parent, args=(str(tmp_path),))
    parent.start()
    note = tmp_path / "0.pid"
    until(note.exists)
    rank = int(note.read_text())
    assert alive(rank)
    parent.kill()
    parent.join()
    until(lambda: not alive(rank))
