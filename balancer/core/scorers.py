"""How good a candidate is, one thought each, from 0 to 1. Pure.

To add one: a function here and a line in SCORERS; a policy gives it a weight by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Standing(NamedTuple):
    """What scorers may know of one candidate for one ask."""

    running: int
    slots: int
    success_rate: float
    average_seconds: float | None
    best_average_seconds: float | None
    """The least of all candidates' averages; None: nobody has one yet."""
    reliability: float = 1.0
    expected_seconds: float = 1.0
    """What the ask is expected to cost here (`placement.expected_seconds`)."""
    least_expected_seconds: float = 1.0
    """The least of all workers', also of those without room."""
    least_load: float = 0.0
    """The least share of slots in use, of all candidates."""
    rested_seconds: float = 0.0
    """Since it was picked last."""
    longest_rest_seconds: float = 0.0


Scorer = Callable[[Standing], float]


def availability(standing: Standing) -> float:
    """The share of the worker's slots that is free."""
    return max(standing.slots - standing.running, 0) / standing.slots


def success_rate(standing: Standing) -> float:
    """The share of its recent attempts that were answered well, in a rolling window."""
    return standing.success_rate


def response_time(standing: Standing) -> float:
    """How its mean response time compares with the best candidate's; 1 while it has none to compare."""
    own, best = standing.average_seconds, standing.best_average_seconds
    if own is None or best is None or own <= best:
        return 1.0
    return best / own


def reliability(standing: Standing) -> float:
    """The share of its attempts that were answered well, the last ones counting most."""
    return standing.reliability


def expected_latency(standing: Standing) -> float:
    """How what the ask will cost here compares with the best of all workers."""
    if standing.expected_seconds <= standing.least_expected_seconds:
        return 1.0
    return standing.least_expected_seconds / standing.expected_seconds


def idleness(standing: Standing) -> float:
    """1 for those with the least share of their slots in use, 0 for others."""
    return float(standing.running / standing.slots <= standing.least_load)


def rest(standing: Standing) -> float:
    """1 for the one that was picked longest ago, 0 for others."""
    return float(standing.rested_seconds >= standing.longest_rest_seconds)


SCORERS: Mapping[str, Scorer] = {
    "availability": availability,
    "success_rate": success_rate,
    "response_time": response_time,
    "reliability": reliability,
    "expected_latency": expected_latency,
    "idleness": idleness,
    "rest": rest,
}
