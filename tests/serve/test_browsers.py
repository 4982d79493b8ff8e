"""What browsers may send to a server without keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Served
from tests.serve.test_app import ASK

httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
JSON = "application/json"
EVIL = "https://evil.example"


def send(server: Served, path: str = "/v1/chat/completions", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(server.url + path, content=json.dumps(ASK).encode(), headers=named, timeout=20)


def test_pages_of_others_and_names_of_others(puppet: Start) -> None:
    server = puppet("x</think>y", cors=("https://friend.example",), hosts=("Chat.example",))
    here = server.url.removeprefix("http://")
    port = here.split(":")[1]
    for headers, status in (
        ({}, 200),
        ({"content_type": "application/x-www-form-urlencoded"}, 200),  # what curl -d sends
        ({"origin": server.url, "content_type": JSON}, 200),
        ({"origin": server.url, "content_type": JSON + "; charset=utf-8"}, 200),
        ({"origin": server.url, "content_type": "text/plain"}, 415),
        ({"origin": "https://friend.example", "content_type": JSON}, 200),
        ({"origin": EVIL, "content_type": JSON}, 403),
        ({"origin": "null", "content_type": "text/plain"}, 403),
        ({"origin": "http://127.0.0.1:1", "content_type": JSON}, 403),
        ({"origin": "http://[", "content_type": JSON}, 403),
        ({"origin": "http://evil.example", "host": "evil.example", "content_type": JSON}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "["}, 403),
        ({"host": f"localhost:{port}"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "chat.example"}, 200),
        ({"origin": "https://chat.example", "host": "chat.example", "content_type": JSON}, 200),
        (
            {"origin": "https://chat.example", "content_type": JSON},
            200,
        ),  # a proxy that calls it by its address
    ):
        assert send(server, **headers).status_code == status, headers
    assert send(server, origin=EVIL).json()["error"]["code"] == "foreign_origin"
    assert send(server, "/v1/messages", origin=EVIL).json()["error"]["type"] == "permission_error"
    for path, status in (("/", 403), ("/metrics", 403), ("/nowhere", 403), ("/health", 200), ("/ready", 200)):
        assert httpx.get(server.url + path, headers={"host": "evil.example"}).status_code == status
    assert httpx.get(server.url + "/").status_code == 200
    assert 'route="none",status="403"' in httpx.get(server.url + "/metrics").text


def test_keys_do_without_it(puppet: Start) -> None:
    server = puppet("x</think>y", keys=("k",))
    answer = send(server, host="any.example", origin=EVIL, authorization="Bearer k")
    assert answer.status_code == 200
