"""What Prometheus sees: one observer of finished requests, and the room as it is when it is scraped.

Labels are bounded: a model name counts only once some worker serves it, since clients can send any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from balancer.core.dispatcher import Snapshot
from balancer.core.model import ModelName, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
"""From a cached first token to the longest answer; every second step is a factor of ten."""


class Metrics:
    def __init__(self, snapshot: Callable[[], Snapshot], serves: Callable[[ModelName], bool]) -> None:
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
        self._registry.register(_Room(snapshot))

    def observe(self, served: Served) -> None:
        """Count a finished request. Holds no text, key or address."""
        model = self._bounded(served.model)
        endpoint = served.endpoint.value
        self._requests.labels(model, endpoint, str(served.status), served.error).inc()
        self._seconds.labels(model, endpoint).observe(served.seconds)
        self._queue.labels(model, endpoint, served.service_class.value).observe(served.queue_seconds)
        self._warm_ups.labels(model).inc(served.warm_ups)
        for attempt in served.attempts:
            self._attempts.labels(attempt.worker_id, attempt.cause or "answered").inc()
            measures = attempt.measures
            if measures.first_byte is not None:
                self._first_byte.labels(model, attempt.worker_id).observe(measures.first_byte)
            if measures.prompt_tokens is not None:
                self._tokens.labels(model, attempt.worker_id, "prompt").inc(measures.prompt_tokens)
            if measures.cached_tokens is not None:
                self._cached.labels(model, attempt.worker_id).inc(measures.cached_tokens)
            if measures.output_tokens is not None:
                self._tokens.labels(model, attempt.worker_id, "output").inc(measures.output_tokens)

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
