"""What Prometheus sees: one observer of finished requests, and the room as it is when it is scraped.

Labels are bounded: a model name counts only once some worker serves it, since clients can send any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from balancer.core.dispatcher import Snapshot
from balancer.core.model import Attempt, ModelName, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
"""From a cached first token to the longest answer; every second step is a factor of ten."""

MAX_LOOKED_UP = 4096
"""Counters that are held by their labels. They bound memory, not what is counted."""

_Metric = TypeVar("_Metric", Counter, Histogram)


class Metrics:
    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        serves: Callable[[ModelName], bool],
        *,
        config_ok: Callable[[], bool] = lambda: True,
    ) -> None:
        """`config_ok`: the configuration file, as it was last read, is what is in force."""
        self._serves = serves
        self._registry = CollectorRegistry()
        labels = ("model", "endpoint")
        self._requests = Counter(
            "balancer_requests", "Finished requests.", (*labels, "status", "error"), registry=self._registry
        )
        self._attempts = Counter(
            "balancer_attempts",
            "Relays to workers, by how they ended.",
            ("worker", "cause"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "balancer_request_seconds",
            "Time from a request's arrival to its end, waiting included.",
            labels,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_byte = Histogram(
            "balancer_time_to_first_token_seconds",
            "Time from sending a request to a worker to the first piece of its answer.",
            ("model", "worker"),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._queue = Histogram(
            "balancer_queue_seconds",
            "Time in the waiting line.",
            (*labels, "class"),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "balancer_tokens",
            "Tokens, as workers count them.",
            ("model", "worker", "direction"),
            registry=self._registry,
        )
        self._cached = Counter(
            "balancer_prompt_cached_tokens",
            "Of the prompts' tokens, those that workers remembered (where they tell).",
            ("model", "worker"),
            registry=self._registry,
        )
        self._warm_ups = Counter(
            "balancer_warm_ups",
            "Parts of prompts that were read ahead.",
            ("model",),
            registry=self._registry,
        )
        self._continued = Counter(
            "balancer_continued_streams",
            "Streamed answers that went on at another worker.",
            ("model",),
            registry=self._registry,
        )
        self._fallback = Counter(
            "balancer_fallback_requests",
            "Requests that were sent to a worker outside of the room.",
            ("model", "worker"),
            registry=self._registry,
        )
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._registry.register(_Room(snapshot))
        Gauge(
            "balancer_config_ok",
            "1 while the configuration file is what is in force, 0 while it is broken.",
            registry=self._registry,
        ).set_function(lambda: float(config_ok()))

    def observe(self, served: Served) -> None:
        """Count a finished request. Holds no text, key or address."""
        model = self._bounded(served.model)
        endpoint, status = served.endpoint.value, str(served.status)
        self._child(self._requests, model, endpoint, status, served.error).inc()
        self._child(self._seconds, model, endpoint).observe(served.seconds)
        self._child(self._queue, model, endpoint, served.service_class.value).observe(served.queue_seconds)
        if served.warm_ups:
            self._child(self._warm_ups, model).inc(served.warm_ups)
        if served.continued:
            self._child(self._continued, model).inc(served.continued)
        for attempt in served.attempts:
            self._observe_attempt(model, attempt)

    def _observe_attempt(self, model: str, attempt: Attempt) -> None:
        worker, measures = attempt.worker_id, attempt.measures
        self._child(self._attempts, worker, attempt.cause or "answered").inc()
        if attempt.fallback:
            self._child(self._fallback, model, worker).inc()
        if measures.first_byte is not None:
            self._child(self._first_byte, model, worker).observe(measures.first_byte)
        if measures.prompt_tokens is not None:
            self._child(self._tokens, model, worker, "prompt").inc(measures.prompt_tokens)
        if measures.cached_tokens is not None:
            self._child(self._cached, model, worker).inc(measures.cached_tokens)
        if measures.output_tokens is not None:
            self._child(self._tokens, model, worker, "output").inc(measures.output_tokens)

    def _child(self, metric: _Metric, *labels: str) -> _Metric:
        """To have a metric look one up by its labels costs ten times what counting does."""
        child: _Metric | None = self._children.get((metric, labels))
        if child is None:
            if len(self._children) >= MAX_LOOKED_UP:
                self._children.clear()
            child = self._children[metric, labels] = metric.labels(*labels)
        return child

    def render(self) -> bytes:
        """The page for a scrape, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _bounded(self, model: ModelName) -> str:
        return model if self._serves(model) else "unknown"


class _Room(Collector):
    """Gauges that are read off the room at each scrape, so that they cannot go stale."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        room = self._snapshot()
        ready = GaugeMetricFamily(
            "balancer_worker_ready", "1 while the worker can be used.", labels=["worker"]
        )
        running = GaugeMetricFamily("balancer_worker_running", "Requests on the worker.", labels=["worker"])
        slots = GaugeMetricFamily("balancer_worker_slots", "Requests it takes at once.", labels=["worker"])
        breaker = GaugeMetricFamily(
            "balancer_worker_breaker_open", "1 while its breaker lets no traffic pass.", labels=["worker"]
        )
        for view in room.workers:
            name = [view.worker.id]
            ready.add_metric(name, float(view.state == "ready"))
            running.add_metric(name, view.running)
            slots.add_metric(name, view.slots)
            breaker.add_metric(name, float(view.breaker == "open"))
        yield from (ready, running, slots, breaker)
        waiting = GaugeMetricFamily("balancer_waiting", "Requests in the waiting line.")
        waiting.add_metric([], room.waiting)
        yield waiting
