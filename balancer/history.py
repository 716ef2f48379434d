"""The last finished requests, with the reasons of each decision: what `balancer why` answers from.

An observer like the others: it sees `Served`, which holds no text of prompt or answer. Bounded in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from balancer.core.model import Attempt, Choice, Served

KEPT = 1000
"""About 1 KiB each in a room of a few workers; a larger room's reasons are longer."""


class History:
    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._served: OrderedDict[str, Served] = OrderedDict()

    def observe(self, served: Served) -> None:
        """Keep it, and forget the oldest. An id that a client used twice means the later request."""
        self._served.pop(served.request_id, None)
        self._served[served.request_id] = served
        while len(self._served) > self._kept:
            self._served.popitem(last=False)

    def find(self, request_id: str) -> Served | None:
        return self._served.get(request_id)


def why(served: Served) -> dict[str, Any]:
    """A finished request as JSON: every attempt with its candidates, their scores, and who was out."""
    return {
        "request_id": served.request_id,
        "model": served.model,
        "endpoint": served.endpoint.value,
        "stream": served.stream,
        "client": served.client,
        "status": served.status,
        "error": served.error or None,
        "queue_seconds": round(served.queue_seconds, 6),
        "seconds": round(served.seconds, 6),
        "service_class": served.service_class.value,
        "warm_ups": served.warm_ups,
        "fallback": served.fallback,
        "attempts": [_attempt(attempt) for attempt in served.attempts],
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    measures = attempt.measures
    return {
        "worker": attempt.worker_id,
        "fallback": attempt.fallback,
        "because": attempt.choice.because or None,
        "ended": attempt.cause or "answered",
        "detail": attempt.detail,
        "waited_seconds": round(attempt.waited, 6),
        "seconds": round(measures.seconds, 6),
        "first_byte_seconds": measures.first_byte,
        "prompt_tokens": measures.prompt_tokens,
        "cached_tokens": measures.cached_tokens,
        "output_tokens": measures.output_tokens,
        "candidates": [
            {
                "worker": candidate.worker_id,
                "scores": {name: round(score, 4) for name, score in candidate.scores.items()},
                "weight": round(candidate.weight, 4),
                "share": round(share_of(attempt.choice, candidate.worker_id), 4),
                "expected_seconds": candidate.expected_seconds,
                "expected_cached_tokens": candidate.cached_tokens,
            }
            for candidate in attempt.choice.candidates
        ],
        "excluded": dict(attempt.choice.excluded),
    }


def share_of(choice: Choice, worker_id: str) -> float:
    """How likely this candidate was to be picked, 0 to 1."""
    if not choice.candidates:  # it was settled before any were looked at
        return float(worker_id == choice.worker_id)
    total = mine = 0.0
    for candidate in choice.candidates:
        total += candidate.weight
        if candidate.worker_id == worker_id:
            mine = candidate.weight
    return mine / total if total > 0 else 1 / len(choice.candidates)
