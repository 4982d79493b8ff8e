"""`rorqual serve` as a process: it starts, answers, and ends when it is told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rorqual
from rorqual.cli import app
from tests.serve.conftest import until
from tests.serve.test_real import speaking

httpx = pytest.importorskip("httpx2")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--port", "99999"], "65535"),
        (["--timeout", "-5"], "timeout is -5"),
        (["--first-timeout", "0"], "first_timeout is 0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--drain", "-1"], "drain is -1"),
        (["--drain", "nan"], "drain is nan"),
        (["--drain", "inf"], "drain is inf"),
        (["--timeout", "inf"], "timeout is inf"),
    ],
)
def test_numbers_that_cannot_be(given: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        app(["serve", "no-model", *given], exit_on_error=False)


def test_the_command(tmp_path: Path) -> None:
    model = speaking("gqa", "chatml")
    rorqual.save(model, tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "keys").write_text("k1\n")
    command = [
        sys.executable,
        "-m",
        "rorqual",
        "serve",
        str(tmp_path / "tiny"),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    more = ["--api-key-file", str(tmp_path / "keys"), "--alias", "other", "--max-tokens", "5"]
    root = str(Path(rorqual.__file__).parents[1])
    environment = {**os.environ, "RORQUAL_API_KEYS": "k2", "PYTHONPATH": root}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*command, *more], env=environment, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return bool(httpx.get(url + "/ready").status_code == 200)
        except httpx.HTTPError:
            return False

    try:
        until(up, 60)
        for key, status in (("k1", 200), ("k2", 200), ("k3", 401)):
            headers = {"authorization": f"Bearer {key}"}
            body = {"model": "other", "prompt": "Hello", "temperature": 0, "max_tokens": 5}
            assert httpx.post(url + "/v1/completions", json=body, headers=headers).status_code == status
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        log.close()
    told = (tmp_path / "log").read_text()
    assert re.search(r'"status": 200, .*"completion": [1-5]', told)
    assert "k1" not in told and "Hello" not in told and "Traceback" not in told, told
