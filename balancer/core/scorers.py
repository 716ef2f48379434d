"""How good a candidate is, one thought each, from 0 to 1. Pure.

To add one: a function here and a line in SCORERS; its weight is then a setting by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Standing:
    """What scorers may know of one candidate for one ask."""

    running: int
    slots: int
    success_rate: float
    average_seconds: float | None
    best_average_seconds: float | None
    """The least of all candidates' averages; None: nobody has one yet."""


Scorer = Callable[[Standing], float]


def availability(standing: Standing) -> float:
    """The share of the worker's slots that is free."""
    return max(standing.slots - standing.running, 0) / standing.slots


def success_rate(standing: Standing) -> float:
    """The share of its recent attempts that were answered well."""
    return standing.success_rate


def response_time(standing: Standing) -> float:
    """How its mean response time compares with the best candidate's; 1 while it has none to compare."""
    own, best = standing.average_seconds, standing.best_average_seconds
    if own is None or best is None or own <= best:
        return 1.0
    return best / own


SCORERS: Mapping[str, Scorer] = {
    "availability": availability,
    "success_rate": success_rate,
    "response_time": response_time,
}
