"""Spans of requests: what they say, whose children they are, what they never say, and that they cost nothing unasked."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rorqual.serve.tracing import Tracing, configured
from tests.serve.conftest import Served, until

httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
ASK = {"messages": [{"role": "user", "content": "secret words"}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(puppet: Start) -> tuple[Served, Callable[[int], list[Any]]]:
    """A server with two keys, and its spans once there are so many."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = puppet("hidden</think>answer", name="tiny", keys=("k3y",), max_queue=4)
    server.app.state.doors.tracing = Tracing(provider, "tiny")

    def found(count: int) -> list[Any]:
        until(lambda: len(exporter.get_finished_spans()) >= count)
        return list(exporter.get_finished_spans())

    return server, found


def post(server: Served, path: str, body: Any, **headers: str) -> Any:
    return httpx.post(
        server.url + path, json=body, headers={"authorization": "Bearer k3y", **headers}, timeout=20
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span(spans: Any, stream: bool) -> None:
    server, found = spans
    body = ASK | {
        "model": "tiny",
        "stream": stream,
        "max_tokens": 50,
        "temperature": 0.5,
        "stop": ["never said"],
    }
    usage = post(server, "/v1/chat/completions", body, traceparent=PARENT)
    assert usage.status_code == 200
    (span,) = found(1)
    assert span.name == "chat tiny" and span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" == PARENT[3:52]
    told = dict(span.attributes)
    first, queued = (told.pop(f"gen_ai.latency.{name}") for name in ("time_to_first_token", "time_in_queue"))
    assert 0 < queued <= first <= (span.end_time - span.start_time) / 1e9 + 1e-3
    tokens = told.pop("gen_ai.usage.output_tokens"), told.pop("gen_ai.usage.reasoning.output_tokens")
    assert tokens[0] > tokens[1] > 0
    prompt, cached = told.pop("gen_ai.usage.input_tokens"), told.pop("gen_ai.usage.cache_read.input_tokens")
    assert prompt // 2 == cached > 0
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "rorqual",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    for secret in ("secret", "hidden", "answer", "never said", "k3y"):
        assert secret not in span.to_json()


def test_other_routes_and_refusals(spans: Any) -> None:
    server, found = spans
    post(server, "/v1/completions", {"prompt": "x", "n": 2})
    post(server, "/v1/messages", ASK | {"model": "tiny", "max_tokens": 9}, traceparent="nonsense")
    post(server, "/v1/chat/completions", ASK | {"temperature": 9})
    post(server, "/v1/chat/completions", ASK, authorization="Bearer no")
    server.service.driver.engine.fail = RuntimeError("a kernel failed")
    post(server, "/v1/responses", {"model": "tiny", "input": "secret"})
    names = [
        (
            s.name,
            s.attributes["http.route"],
            s.attributes["http.response.status_code"],
            s.attributes.get("error.type"),
            s.status.status_code.name,
        )
        for s in found(5)
    ]
    assert names == [
        ("text_completion tiny", "/v1/completions", 200, None, "UNSET"),
        ("chat tiny", "/v1/messages", 200, None, "UNSET"),
        ("chat tiny", "/v1/chat/completions", 400, "invalid_value", "UNSET"),
        ("chat tiny", "/v1/chat/completions", 401, "invalid_api_key", "UNSET"),
        ("chat tiny", "/v1/responses", 500, "internal_error", "ERROR"),
    ]
    assert found(5)[0].attributes["gen_ai.request.choice.count"] == 2
    assert all(span.parent is None for span in found(5))
    assert "secret" not in "".join(span.to_json() for span in found(5))


def test_a_client_that_leaves(spans: Any) -> None:
    server, found = spans
    server.engine.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/chat/completions", json=ASK, headers={"x-api-key": "k3y"}, timeout=1)
    (span,) = found(1)
    told = span.attributes
    assert told["http.response.status_code"] == 499 and told["error.type"] == "cancelled"
    assert "gen_ai.latency.time_to_first_token" not in told


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    place = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert configured("m", {}) is None and configured("m", place | {"OTEL_SDK_DISABLED": "true"}) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING, "rorqual.serve"):
        assert configured("m", place) is None
    assert "rorqual[otel]" in caplog.text


def test_the_exporter_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    place = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    made = configured("m", place)
    assert made is not None and made.provider.resource.attributes["service.name"] == "rorqual"
    made.close()


def test_nothing_is_imported_unasked() -> None:
    """In a process of its own. FastAPI looks for OpenTelemetry's API by itself; SDK and exporter are ours to import."""
    told = (
        "import sys, rorqual.serve.app, rorqual.serve.tracing as t; assert t.configured('m', {}) is None;"
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", told]).returncode == 0
