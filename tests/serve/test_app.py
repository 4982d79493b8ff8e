"""The server around its routes: keys, limits, bad bodies, clients that go away, shutting down, figures."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rorqual.engine import SamplingError, TeamError
from rorqual.serve import Settings, keys_of, read_keys
from tests.serve.conftest import Served, until
from tests.serve.puppet import Puppet

httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
ASK = {"messages": [{"role": "user", "content": "secret words"}]}
LONG = "x</think>" + "word " * 3000


def post(server: Served, body: Any = ASK, path: str = "/v1/chat/completions", **options: Any) -> Any:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return httpx.post(server.url + path, content=body, timeout=20, **options)


def test_keys(puppet: Start, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    assert read_keys(file) == ("first", "second")
    server = puppet("x</think>y", keys=read_keys(file))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic first"},
        {"authorization": "first"},
    ):
        answer = post(server, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 401
        assert httpx.get(server.url + "/metrics", headers=headers).status_code == 401
    for headers in (
        {"authorization": "Bearer first"},
        {"authorization": "bearer second"},
        {"x-api-key": "second"},
    ):
        assert post(server, headers=headers).status_code == 200
    assert httpx.get(server.url + "/health").status_code == 200
    with pytest.raises(ValueError, match="no key"):
        file.write_text("# none\n")
        read_keys(file)


BAD = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b"\xff\xfe", 400, "invalid_json", None),
    (b'{"messages": "\xff"}', 400, "invalid_json", None),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json", None),
    (b"[" * 100_000, 400, "invalid_json", None),
    (b"[]", 422, "invalid_type", None),
    (b"null", 422, "invalid_type", None),
    ({}, 422, "invalid_type", "messages"),
    ({"messages": "x"}, 422, "invalid_type", "messages"),
    ({"messages": []}, 400, "invalid_messages", "messages"),
    ({"messages": [1]}, 400, "invalid_messages", "messages"),
    ({"messages": [{"role": "king", "content": ""}]}, 400, "invalid_messages", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_messages", "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_messages", "messages.0.role"),
    (ASK | {"model": "gpt-9"}, 404, "model_not_found", "model"),
    (ASK | {"model": 3}, 422, "invalid_type", "model"),
    (ASK | {"temperature": "hot"}, 422, "invalid_type", "temperature"),
    (ASK | {"temperature": 2.5}, 400, "invalid_value", "temperature"),
    (ASK | {"top_p": -0.1}, 400, "invalid_value", "top_p"),
    (ASK | {"min_p": 3}, 400, "invalid_value", "min_p"),
    (ASK | {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (ASK | {"max_tokens": 1.5}, 422, "invalid_type", "max_tokens"),
    (ASK | {"seed": -1}, 400, "invalid_value", "seed"),
    (ASK | {"n": 0}, 400, "invalid_value", "n"),
    (ASK | {"n": 1000}, 400, "invalid_value", "n"),
    (ASK | {"stop": [""]}, 400, "invalid_value", "stop"),
    (ASK | {"stop": ["a"] * 17}, 400, "invalid_value", "stop"),
    (ASK | {"stop": 5}, 422, "invalid_type", "stop"),
    (ASK | {"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
    (ASK | {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    (ASK | {"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    (ASK | {"logit_bias": {"99999999": 1}}, 400, "invalid_value", "logit_bias"),
    (ASK | {"stream_options": {"include_usage": "yes"}}, 422, "invalid_type", "stream_options.include_usage"),
    (ASK | {"thinking": {"type": "maybe"}}, 400, "invalid_value", "thinking.type"),
    (ASK | {"reasoning_effort": "huge"}, 400, "invalid_value", "reasoning_effort"),
    (ASK | {"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format.type"),
    (ASK | {"response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format.json_schema.schema"),
    (ASK | {"response_format": {"type": "regex", "regex": "("}}, 400, "invalid_grammar", "response_format"),
    (ASK | {"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    (ASK | {"tools": [{"type": "function"}]}, 400, "invalid_tool", "tools.0.function"),
    (ASK | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "invalid_tool", "tools.0.function.name"),
    (ASK | {"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, 400, "invalid_tool",
     "tools.0.function.parameters"),
    (ASK | {"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {
        "type": "object", "properties": {"b": {"type": "string"}}}}}]}, 400, "invalid_tool",
     "tools.0.function.parameters.required"),
    (ASK | {"max_completion_tokens": 0}, 400, "invalid_value", "max_completion_tokens"),
    (ASK | {"response_format": {"type": "choice", "choice": {"a": 1}}}, 400, "invalid_grammar", "response_format"),
    (ASK | {"response_format": {"type": "choice", "choice": 5}}, 400, "invalid_grammar", "response_format"),
]  # fmt: skip


def test_bad_bodies_are_refused_and_the_field_is_named(puppet: Start) -> None:
    server = puppet("x</think>y")
    for stream in (False, True):
        for body, status, code, param in BAD:
            body = body | {"stream": stream} if isinstance(body, dict) else body
            answer = post(server, body)
            error = answer.json()["error"]
            found = (answer.status_code, error["code"], error["param"])
            assert found == (status, code, param), (body if len(str(body)) < 500 else "…", error)
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert not server.engine.seen and server.service.active == 0
    assert post(server).status_code == 200


def test_the_field_at_fault_has_its_api_s_name(puppet: Start) -> None:
    server = puppet("x</think>y")
    user = [{"role": "user", "content": "u"}]
    odd = {
        "type": "object",
        "properties": {"a": {"type": "zzz"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": odd}}]
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "yyy"}}}
    asks: list[tuple[str, dict[str, Any], str, str]] = [
        ("/v1/chat/completions", ASK | {"tools": tools}, "tools", "zzz"),
        (
            "/v1/chat/completions",
            ASK | {"tools": tools, "response_format": {"type": "json_object"}},
            "tools",
            "zzz",
        ),
        ("/v1/chat/completions", ASK | {"tools": tools, "response_format": schema}, "response_format", "yyy"),
        ("/v1/chat/completions", ASK | {"max_tokens": 0}, "max_tokens", "max_tokens must be"),
        ("/v1/completions", {"prompt": "x", "response_format": schema}, "response_format", "yyy"),
        (
            "/v1/responses",
            {"input": "x", "max_output_tokens": 0},
            "max_output_tokens",
            "max_output_tokens must be",
        ),
        (
            "/v1/responses",
            {"input": "x", "reasoning": {"effort": "zzz"}},
            "reasoning.effort",
            "reasoning.effort 'zzz'",
        ),
        (
            "/v1/responses",
            {"input": "x", "tools": [{"type": "function", "name": "a b"}]},
            "tools.0.name",
            "must match",
        ),
        ("/v1/responses", {"input": [{"type": "reasoning", "content": 5}]}, "input.0.content", "list"),
        ("/v1/responses", {"input": [{"type": "reasoning", "summary": True}]}, "input.0.summary", "list"),
        ("/v1/responses", {"input": [{"type": "reasoning", "summary": [5]}]}, "input.0.summary.0", "string"),
    ]
    for path, body, param, words in asks:
        answer = post(server, body, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], (
            body,
            error,
        )
    for more, words in (
        ({"output_config": {"effort": "zzz"}}, "output_config.effort 'zzz' is unknown"),
        ({"system": [{"type": "text", "text": 5}]}, "system.0.text: text must be a string"),
        ({"tools": [{"name": "f", "strict": True, "input_schema": odd}]}, "tools: "),
        (
            {"output_config": {"format": {"type": "xml"}}},
            "output_config.format.type: output_config.format has",
        ),
    ):
        answer = post(
            server, {"model": "claude-x", "max_tokens": 5, "messages": user} | more, "/anthropic/v1/messages"
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(words), answer.text


def test_unknown_fields(puppet: Start) -> None:
    for strict, status in ((False, 200), (True, 400)):
        server = puppet("x</think>y", strict=strict)
        for body in (ASK | {"wisdom": 3}, {"messages": [ASK["messages"][0] | {"mood": "good"}]}):
            answer = post(server, body)
            assert answer.status_code == status
            if strict:
                assert answer.json()["error"]["param"] in ("wisdom", "messages.0.mood")


def test_large_bodies(puppet: Start) -> None:
    server = puppet("x</think>y", max_body=100_000)
    big = json.dumps({"messages": [{"role": "user", "content": "a" * 200_000}]}).encode()
    assert post(server, big).status_code == 413
    pieces = (big[at : at + 1000] for at in range(0, len(big), 1000))  # without a length
    assert (
        httpx.post(server.url + "/v1/messages", content=pieces).json()["error"]["type"] == "request_too_large"
    )
    long = {"messages": [{"role": "user", "content": "a" * 50_000}]}
    answer = post(server, long)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_no_such_route(puppet: Start) -> None:
    server = puppet("x")
    assert httpx.get(server.url + "/v2").json()["error"]["code"] == "no_such_route"
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    assert httpx.get(server.url + "/anthropic/v2").json()["type"] == "error"
    assert httpx.get(server.url + "/v1/chat/completions").headers["allow"] == "POST"
    assert post(server, path="/v1/chat/completions/").status_code == 404  # led nowhere else
    assert httpx.get(server.url + "/openapi.json").status_code == 404
    told = httpx.get(server.url + "/metrics").text
    assert 'rorqual_requests_total{route="none",status="404"} 4.0' in told
    assert 'rorqual_requests_total{route="/v1/chat/completions",status="405"} 2.0' in told


def test_bodies_that_are_too_many_at_once(puppet: Start) -> None:
    server = puppet("x</think>y", max_body=1000, max_bodies=2)
    room = server.app.state.doors.room
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900\r\n\r\n"
    places = [socket.create_connection(server.listener.getsockname()) for _ in range(2)]
    for place in places:
        place.sendall(head + b" " * 890)
    until(lambda: room.taken == 1780)
    big = json.dumps(ASK | {"user": "a" * 400}).encode()
    answer = post(server, big)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
    assert answer.headers["retry-after"] == "1"
    assert post(server).status_code == 200  # a small one finds room
    for place in places:
        place.close()
    until(lambda: room.taken == 0)
    assert post(server, big).status_code == 200
    assert post(server, b" " * 2000).status_code == 413 and room.taken == 0


def test_too_many_are_turned_away(puppet: Start) -> None:
    server = puppet("x</think>y", max_queue=3)
    server.engine.gate.clear()
    threads = [threading.Thread(target=post, args=(server, ASK | {"n": n})) for n in (2, 1)]
    for thread in threads:
        thread.start()
    until(lambda: server.service.active == 3)
    answer = post(server)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert httpx.get(server.url + "/ready").status_code == 503
    server.engine.gate.set()
    for thread in threads:
        thread.join()
    until(lambda: server.service.active == 0)
    assert post(server).status_code == 200 and httpx.get(server.url + "/ready").status_code == 200
    assert post(server, ASK | {"n": 4}).status_code == 400
    server.engine.most = 0  # the engine itself has no room
    assert post(server).status_code == 429 and post(server, ASK | {"stream": True}).status_code == 429


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_cancelled(puppet: Start, stream: bool) -> None:
    server = puppet(LONG)
    body = json.dumps(ASK | {"stream": stream, "n": 2}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        wire.sendall(head.encode() + body)
        until(lambda: len(server.engine.live) == 2)
        if stream:
            assert wire.recv(100)
    until(lambda: server.engine.cancelled == 2)
    until(lambda: server.service.active == 0)
    assert not server.engine.live and not server.service.driver._live
    assert post(server, ASK | {"max_tokens": 2}).status_code == 200


def test_a_request_half_sent_leaves_nothing_behind(puppet: Start) -> None:
    server = puppet("x</think>y")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        time.sleep(0.05)
    assert post(server).status_code == 200 and server.service.active == 0


def test_something_is_sent_while_an_answer_is_waited_for(puppet: Start) -> None:
    server = puppet("x</think>y", keep_alive=0.05)
    for path, body, ping in (
        ("/v1/chat/completions", ASK | {"stream": True}, b": keep-alive\n\n"),
        ("/v1/messages", ASK | {"model": "rorqual", "max_tokens": 9, "stream": True}, b"event: ping\n"),
        ("/v1/chat/completions", ASK, b"\n"),
    ):
        server.engine.gate.clear()
        with httpx.stream("POST", server.url + path, json=body, timeout=20) as answer:
            pieces = answer.iter_raw()
            assert next(pieces).startswith(ping)
            server.engine.gate.set()
            rest = b"".join(pieces)
    assert json.loads(rest)["choices"][0]["message"]["content"] == "y"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(SamplingError("NaN logits"), 500), (RuntimeError("a kernel failed"), 500)]
)
def test_a_failing_step_fails_its_requests_and_no_more(
    puppet: Start, stream: bool, error: Exception, status: int
) -> None:
    server = puppet("x</think>y")
    server.engine.fail = error
    answer = post(server, ASK | {"stream": stream})
    assert answer.status_code == status and "kernel" not in answer.text
    assert post(server).status_code == 200 and server.service.active == 0


def test_a_failure_in_the_middle_of_a_stream_is_an_event(puppet: Start) -> None:
    server = puppet(LONG)
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=ASK | {"stream": True}) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
        server.engine.fail = RuntimeError("a kernel failed")
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"


def test_an_engine_that_is_lost(puppet: Start) -> None:
    server = puppet(LONG)
    server.engine.fail = TeamError("rank 3 failed")
    assert post(server).status_code == 503
    until(lambda: httpx.get(server.url + "/health").status_code == 503)
    assert post(server).status_code == 503


def test_timeouts(puppet: Start) -> None:
    server = puppet("x</think>y", first_timeout=0.1)
    server.engine.gate.clear()
    assert post(server).status_code == 504
    server.engine.gate.set()
    until(lambda: not server.engine.live)
    server = puppet(LONG, timeout=2)
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=ASK | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert answer.status_code == 200 and next(lines).startswith("data:")
        server.engine.gate.clear()
        assert any('"code":"timeout"' in line for line in lines)
    server.engine.gate.set()
    until(lambda: not server.engine.live)
    assert post(puppet("x</think>y")).status_code == 200


def test_draining_finishes_what_runs(puppet: Start) -> None:
    server = puppet("x</think>" + "y" * 50)
    server.engine.gate.clear()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(post(server)))
    thread.start()
    until(lambda: bool(server.engine.live))
    server.service.draining = True
    turned = post(server)
    assert turned.status_code == 503 and "retry-after" in turned.headers
    assert post(server, ASK | {"model": "rorqual", "max_tokens": 5}, "/v1/messages").status_code == 529
    assert httpx.get(server.url + "/ready").json() == {"status": "draining"}
    server.engine.gate.set()
    thread.join()
    assert found[0].json()["choices"][0]["message"]["content"] == "y" * 50


def test_models_and_names(puppet: Start) -> None:
    server = puppet("x</think>y", name="deepseek-tiny", aliases=("deepseek-chat",))
    assert [model.id for model in server.openai().models.list()] == ["deepseek-tiny", "deepseek-chat"]
    assert server.openai().models.retrieve("deepseek-chat").object == "model"
    assert httpx.get(server.url + "/v1/models/other").status_code == 404
    assert post(server, ASK | {"model": "deepseek-chat"}).json()["model"] == "deepseek-tiny"


def test_figures_and_logs_without_words(puppet: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = puppet("x</think>hidden answer", keys=("k3y",))
    key = {"authorization": "Bearer k3y"}
    with caplog.at_level(logging.INFO, "rorqual.serve"):
        used = post(server, headers=key).json()["usage"]
        post(server, b"{", headers=key)
        until(lambda: len(caplog.records) >= 2)
    text = httpx.get(server.url + "/metrics", headers=key).text
    assert f'rorqual_tokens_total{{kind="completion"}} {float(used["completion_tokens"])}' in text
    assert f'rorqual_tokens_total{{kind="prompt"}} {float(used["prompt_tokens"])}' in text
    assert 'rorqual_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert "rorqual_first_token_seconds_count 1.0" in text and "rorqual_active 0.0" in text
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert lines[0]["status"] == 200 and lines[0]["completion"] == used["completion_tokens"]
    for secret in ("secret words", "hidden answer", "k3y"):
        assert secret not in caplog.text


def test_browsers_only_where_asked(puppet: Start) -> None:
    origin = {"origin": "http://page.example"}
    assert "access-control-allow-origin" not in post(puppet("x</think>y"), headers=origin).headers
    allowed = post(puppet("x</think>y", cors=("http://page.example",)), headers=origin).headers
    assert allowed["access-control-allow-origin"] == "http://page.example"


def test_settings_are_checked() -> None:
    for wrong in ({"keys": ("",)}, {"keys": ("a b",)}, {"max_body": 0}, {"keep_alive": 0}):
        with pytest.raises(ValueError):
            Settings(**wrong)
    assert "k3y" not in repr(Settings(keys=("k3y",)))
    assert keys_of(None) == () and keys_of(" one, two,") == ("one", "two")
    for empty in ("", ",", " , "):
        with pytest.raises(ValueError, match="holds no key"):
            keys_of(empty)


def test_the_driver_outlives_its_loops() -> None:
    """A loop that is gone while an answer is under way: the answer is cancelled."""
    from rorqual.engine.prompts import answers_of
    from rorqual.serve.driver import Driver, Ticket
    from tests.serve.puppet import PuppetModel

    engine = Puppet("word " * 3000)
    driver = Driver(engine, torch.device("cpu"))
    driver.start()

    async def leave() -> None:
        (answer,) = answers_of(PuppetModel(), [[1, 2]], None)  # type: ignore[arg-type]
        driver.submit(Ticket(answer, lambda news: None))
        while not engine.live:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    until(lambda: engine.cancelled == 1)
    driver.stop()
