"""OpenTelemetry: one span a request, under the conventions for generative AI. Never what was said in it.

Traces are made where OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) says where they go and the
extra `rorqual[otel]` is installed. Otherwise nothing is imported, and a request pays for one comparison with None. The
SDK's other variables (sampling, headers, the service's name, batches) count as they do everywhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Sampling
from rorqual.serve.parts import Usage

log = logging.getLogger("rorqual.serve")


@dataclass
class Told:
    """What a span says of a request. Times are of `time.monotonic()`; `queued` and `first` are when the engine began
    with it and when its first token came, None if that never was."""

    route: str
    method: str
    headers: Mapping[str, str]
    status: int
    begun: float
    code: str | None = None
    usage: Usage | None = None
    finishes: list[str] = field(default_factory=list)
    sampling: Sampling | None = None
    answers: int = 1
    queued: float | None = None
    first: float | None = None


class Tracing:
    """Makes spans with a provider of the SDK's. `model`: the name served."""

    def __init__(self, provider: Any, model: str) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self.provider, self.model = provider, model
        self._tracer = provider.get_tracer("rorqual.serve")
        self._extract, self._kind = extract, SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def record(self, told: Told) -> None:
        """The span of a request that is over; its parent is the one that the client named by `traceparent`."""
        now, wall = time.monotonic(), time.time_ns()
        operation = "text_completion" if told.route.endswith("/completions") else "chat"
        operation = "chat" if told.route.endswith("/chat/completions") else operation
        span = self._tracer.start_span(
            f"{operation} {self.model}",
            context=self._extract(told.headers),
            kind=self._kind,
            start_time=wall - int((now - told.begun) * 1e9),
            attributes=_attributes(told, operation, self.model),
        )
        if told.status >= 500:
            span.set_status(self._failed)
        span.end(wall)

    def close(self) -> None:
        """Send what has not been sent yet."""
        self.provider.shutdown()


def _attributes(told: Told, operation: str, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "rorqual",
        "gen_ai.request.model": model,
        "http.request.method": told.method,
        "http.route": told.route,
        "http.response.status_code": told.status,
        "error.type": (told.code or str(told.status)) if told.status >= 400 else None,
        # The names that vLLM's traces have for these; the conventions have none for spans.
        "gen_ai.latency.time_in_queue": None if told.queued is None else told.queued - told.begun,
        "gen_ai.latency.time_to_first_token": None if told.first is None else told.first - told.begun,
    }
    if told.usage is not None:
        found |= {
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": told.finishes or None,
            "gen_ai.usage.input_tokens": told.usage.prompt,
            "gen_ai.usage.output_tokens": told.usage.completion,
            "gen_ai.usage.cache_read.input_tokens": told.usage.cached,
            "gen_ai.usage.reasoning.output_tokens": told.usage.reasoning,
        }
    if told.sampling is not None:
        found |= {
            "gen_ai.request.choice.count": told.answers,
            "gen_ai.request.max_tokens": told.sampling.max_new_tokens,
            "gen_ai.request.temperature": told.sampling.temperature,
            "gen_ai.request.top_p": told.sampling.top_p,
        }
    return {name: value for name, value in found.items() if value is not None}


def configured(model: str, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing as the environment says; None without an endpoint, and (with a warning) without the SDK."""
    places = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not any(environment.get(place) for place in places):
        return None
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as problem:
        log.warning("no traces: %s is missing (pip install 'rorqual[otel]')", problem.name)
        return None
    named = "OTEL_SERVICE_NAME" in environment or "service.name" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "rorqual"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, model)
