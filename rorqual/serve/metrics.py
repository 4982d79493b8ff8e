"""Figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from rorqual.serve.parts import Usage
    from rorqual.serve.service import Service

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """Counters of one server. What the engine knows itself is read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def made(kind: Any, name: str, told: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return kind(f"rorqual_{name}", told, labels, registry=self.registry, **options)

        self.requests = made(Counter, "requests", "Requests by route and status", ("route", "status"))
        self.tokens = made(
            Counter, "tokens", "Tokens by kind: prompt, cached, completion, reasoning", ("kind",)
        )
        self.cancelled = made(Counter, "cancelled", "Requests whose client went away")
        self.problems = made(Counter, "format_problems", "Answers that broke the model's output format")
        self.queued = made(
            Histogram, "queue_seconds", "Time until the engine begins with an answer", buckets=_WAITS
        )
        self.first = made(Histogram, "first_token_seconds", "Time to the first token", buckets=_WAITS)
        self.between = made(
            Histogram, "token_seconds", "Mean time between tokens of an answer", buckets=_TOKENS
        )
        self.whole = made(Histogram, "request_seconds", "Time of whole requests", buckets=_WAITS)
        team = getattr(service.engine, "team", None)
        scheduler, pages = getattr(service.engine, "scheduler", None), getattr(service.engine, "pages", None)
        gauges = {"active": ("Answers taken and not finished", lambda: service.active)}
        if team is not None:  # this rank's scheduler knows its own row alone
            gauges["running"] = "Answers that the engine works on", lambda: service.active - team.waiting
            gauges["waiting"] = "Answers that wait for the engine", lambda: team.waiting
        elif scheduler is not None:
            gauges["running"] = "Answers that the engine works on", lambda: len(scheduler.running)
            gauges["waiting"] = "Answers that wait for the engine", lambda: scheduler.waiting
        if pages is not None:
            gauges["pages"] = "Pages of the cache", lambda: pages.total
            gauges["pages_free"] = "Pages that no answer holds", lambda: pages.available
        for name, (told, read) in gauges.items():
            made(Gauge, name, told).set_function(read)

    def answered(self, usage: Usage, problem: bool) -> None:
        """One answer is over."""
        for kind in ("cached", "completion", "reasoning"):
            self.tokens.labels(kind).inc(getattr(usage, kind))
        self.tokens.labels("prompt").inc(usage.prompt)
        self.problems.inc(problem)

    def page(self) -> bytes:
        """The figures as Prometheus reads them."""
        return bytes(generate_latest(self.registry))
