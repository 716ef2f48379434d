"""Filter, estimate, score, pick: which worker gets an ask, and why. Pure; chance is an argument.

The filters live in `fleet` (they say who may); this module says who should, and ends it with a weighted
random pick. Random, since a room full of clients that all choose the best worker at the same moment makes
it the worst; weighted, so that the best is still chosen most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from math import inf

from balancer.core.fleet import Line
from balancer.core.loads import LEAST_LEFT
from balancer.core.model import Candidate, WorkerId
from balancer.core.scorers import SCORERS, Standing


class Combine(Enum):
    """How the scores of a candidate become its weight."""

    SUM = "sum"
    """Each score times its weight, added up."""
    PRODUCT = "product"
    """Each score to the power of its weight, multiplied: a bad score can't be made good by others."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to choose."""

    weights: Mapping[str, float]
    """By scorer name."""
    combine: Combine = Combine.SUM
    estimates: bool = False
    """It knows what an ask will cost on each worker: it may let one wait for a better worker than those
    that have room, and plans batches as papers."""


POLICIES: Mapping[str, Policy] = {
    "expected_latency": Policy(
        {"reliability": 2.0, "expected_latency": 8.0}, combine=Combine.PRODUCT, estimates=True
    ),
    "weighted_random": Policy({"availability": 0.4, "success_rate": 0.4, "response_time": 0.2}),
    "least_loaded": Policy({"idleness": 1.0}),
    "round_robin": Policy({"rest": 1.0}),
}
"""The policies by name, each with its default weights. In `expected_latency` the weight of the scorer of
that name is the sharpness of ROUTING 2: 0 picks evenly, a large one always the best."""

DEFAULT_POLICY = "expected_latency"


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """A name from POLICIES, the weight of each scorer in it, and the constants of the estimates."""

    name: str = DEFAULT_POLICY
    weights: Mapping[str, float] = field(default_factory=dict)
    """By scorer name; those left out are the policy's own."""
    kappa: float = 0.3
    """One second of an answer's writing counts as so many of waiting for it."""
    social: float = 0.5
    """The delay caused to a chat that runs there counts as so much of one's own."""
    stick: float = 5.0
    """Another worker must be so many times better than the home of a conversation."""
    cut: float = 1.5
    cut_seconds: float = 0.1
    """Who would take longer than `cut` times the best, and so many seconds, is waited past ..."""
    patience: float = 1.0
    """... for so long, as a share of the seconds by which it is worse."""
    load_factor: float = 1.5
    """A worker that would have to load the model first is asked only where what it takes, so many times, is
    less than the wait at those that have the model or load it: a load takes a machine from everybody else."""

    @property
    def policy(self) -> Policy:
        return POLICIES[self.name]

    def effective_weights(self) -> Mapping[str, float]:
        return {**self.policy.weights, **self.weights}


def expected_seconds(line: Line, uncached: float, output: float, now: float, *, full: bool) -> float:
    """What an ask costs on a worker: the wait for room or for the model, the prompts before it, its own, its
    answer as far as it counts, and the delay that it causes there (ROUTING 2, "Estimate")."""
    seconds = line.fixed + line.per_uncached * uncached + line.per_output * output
    if line.backlog_ends > now:
        seconds += max(line.backlog_ends - now, line.backlog_least)
    else:
        seconds += line.backlog_least
    # What should have ended and has not is expected to take as long again as it is late. A model is loaded
    # while one waits for room.
    if full:
        wait = max(abs(line.free_at - now), line.token_seconds)
        seconds += max(wait, line.ready_at - now)
    elif line.ready_at > -inf:
        seconds += max(abs(line.ready_at - now), LEAST_LEFT)
    return seconds


def rate(
    standings: Mapping[WorkerId, Standing], weights: Mapping[str, float], combine: Combine = Combine.SUM
) -> tuple[Candidate, ...]:
    """Every candidate with its scores and its weight."""
    return tuple(
        candidate(worker_id, standing, weights, combine) for worker_id, standing in standings.items()
    )


def candidate(
    worker_id: WorkerId,
    standing: Standing,
    weights: Mapping[str, float],
    combine: Combine,
    expected_seconds: float | None = None,
    cached_tokens: int = 0,
) -> Candidate:
    scores = _scores(standing, weights)
    return Candidate(worker_id, scores, _weight(scores, weights, combine), expected_seconds, cached_tokens)


def _scores(standing: Standing, weights: Mapping[str, float]) -> dict[str, float]:
    return {name: SCORERS[name](standing) for name in weights}


def _weight(scores: Mapping[str, float], weights: Mapping[str, float], combine: Combine) -> float:
    if combine is Combine.SUM:
        return sum(weights[name] * score for name, score in scores.items())
    weight = 1.0
    for name, score in scores.items():
        weight *= score ** weights[name]
    return weight


def pick(candidates: Sequence[Candidate], chance: float) -> Candidate:
    """One of the candidates, each as likely as its share of all weights; `chance` is uniform in [0, 1).

    All weights zero (every scorer's weight was set to 0, say): each is equally likely.
    """
    return candidates[draw([candidate.weight for candidate in candidates], chance)]


def draw(weights: Sequence[float], chance: float) -> int:
    """An index, each as likely as its share of all weights; all alike where they are all zero."""
    bounds = list(accumulate(weights))
    if not 0 < bounds[-1] < inf:
        return min(int(chance * len(bounds)), len(bounds) - 1)
    aim = chance * bounds[-1]
    for index, bound in enumerate(bounds):
        if aim < bound:
            return index
    return len(bounds) - 1  # rounding: chance just below 1
