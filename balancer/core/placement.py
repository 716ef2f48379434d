"""Filter, score, pick: which worker gets an ask, and why. Pure; chance is an argument.

The filters live in `fleet` (they say who may); this module says who should, and ends it with a weighted
random pick. Random, since a room full of clients that all choose the best worker at the same moment makes
it the worst; weighted, so that the best is still chosen most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from balancer.core.model import Candidate, WorkerId
from balancer.core.scorers import SCORERS, Standing


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """A name from POLICIES, and the weight of each scorer in it."""

    name: str = "weighted_random"
    weights: Mapping[str, float] = field(default_factory=lambda: dict(POLICIES["weighted_random"]))


POLICIES: Mapping[str, Mapping[str, float]] = {
    "weighted_random": {"availability": 0.4, "success_rate": 0.4, "response_time": 0.2},
}
"""The policies by name, each with its default weights."""


def rate(standings: Mapping[WorkerId, Standing], policy: PlacementPolicy) -> tuple[Candidate, ...]:
    """Every candidate with its scores and its weight: the weighted sum of the scores."""
    return tuple(
        Candidate(worker_id=worker_id, scores=scores, weight=_weighted_sum(scores, policy.weights))
        for worker_id, standing in standings.items()
        for scores in [{name: SCORERS[name](standing) for name in policy.weights}]
    )


def pick(candidates: Sequence[Candidate], chance: float) -> Candidate:
    """One of the candidates, each as likely as its share of all weights; `chance` is uniform in [0, 1).

    All weights zero (every scorer's weight was set to 0, say): each is equally likely.
    """
    bounds = list(accumulate(candidate.weight for candidate in candidates))
    if bounds[-1] <= 0:
        return candidates[min(int(chance * len(candidates)), len(candidates) - 1)]
    aim = chance * bounds[-1]
    for candidate, bound in zip(candidates, bounds, strict=True):
        if aim < bound:
            return candidate
    return candidates[-1]  # rounding: chance just below 1


def _weighted_sum(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weights[name] * score for name, score in scores.items())
