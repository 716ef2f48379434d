"""What follows a failed attempt: again elsewhere after a pause, or the end. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from balancer.core.model import Verdict, WorkerId


class Cause(Enum):
    """How an attempt failed. What each says about the worker, and whether another may try, are in CAUSES.

    Whether a part of the answer had reached the client is another matter (`continuation`).
    """

    UNREACHABLE = "unreachable"
    """No connection came about: nothing was sent."""
    BROKE = "broke"
    """The connection ended, or what came was no complete answer."""
    CRASHED = "crashed"
    """The engine died while it worked on the request: possibly of the request."""
    ERRED = "erred"
    """The worker says that it failed: a 5xx, or an error in place of an answer."""
    BUSY = "busy"
    """The worker has no room or is loading: 429 or 503."""
    LOADING = "loading"
    """The worker has to load the model first, for longer than the request could wait; it has begun."""
    SILENT = "silent"
    """No byte for longer than the read timeout."""
    LOST = "lost"
    """Its machine fell silent while it worked."""
    CANNOT_CONTINUE = "cannot_continue"
    """It was to go on with an answer that another worker began, and was found not to be able to."""
    OVERDUE = "overdue"
    """The time that a request may take as a whole is over."""
    LEFT = "client_left"
    """The client went away while the worker was at it."""
    OUTRUN = "outrun"
    """Another attempt at the same request had the answer first; nobody failed."""
    REJECTED = "rejected"
    """The worker read the request and says that the request is wrong."""


@dataclass(frozen=True, slots=True)
class Consequence:
    verdict: Verdict
    again: bool


CAUSES: dict[Cause, Consequence] = {
    Cause.UNREACHABLE: Consequence(Verdict.BAD, again=True),
    Cause.BROKE: Consequence(Verdict.BAD, again=True),
    Cause.CRASHED: Consequence(Verdict.BAD, again=True),
    Cause.ERRED: Consequence(Verdict.BAD, again=True),
    Cause.BUSY: Consequence(Verdict.UNKNOWN, again=True),
    Cause.LOADING: Consequence(Verdict.UNKNOWN, again=True),
    Cause.SILENT: Consequence(Verdict.BAD, again=True),
    Cause.LOST: Consequence(Verdict.BAD, again=True),
    Cause.CANNOT_CONTINUE: Consequence(Verdict.UNKNOWN, again=True),
    Cause.OVERDUE: Consequence(Verdict.UNKNOWN, again=False),
    Cause.LEFT: Consequence(Verdict.UNKNOWN, again=False),
    Cause.OUTRUN: Consequence(Verdict.UNKNOWN, again=False),
    Cause.REJECTED: Consequence(Verdict.UNKNOWN, again=False),
}

NO_FAILURES = frozenset({Cause.BUSY, Cause.LOADING})
MAX_BUSY = 20
"""Tries that may end with a worker saying that it has no room, or not the model yet. They cost nobody
anything and are no failures; in line the request would have waited as long."""

MAX_LOADING = 5
"""Of these, tries that may end with a worker saying that it loads the model first. It is asked again only
where its reports say otherwise."""

SAME_PLACE_TOKENS = 8
"""How far apart two tries at one request may have got for it to be the same place."""

MAX_CRASHES = 2
"""Engines that one request may be the last of: a prompt that kills them must not go through the room, one
after the other (RELIABILITY S3)."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    max_retries: int = 3
    base_seconds: float = 0.5
    longest_seconds: float = 8.0


@dataclass(frozen=True, slots=True)
class Tried:
    """One failed attempt."""

    worker_id: WorkerId
    cause: Cause
    tokens: int = 0
    """Of the answer, that had come from this worker."""
    continues: bool = False
    """It was to go on with what others had begun."""
    told: bool = False
    """Its agent said what happened; else it is concluded from a connection."""


@dataclass(frozen=True, slots=True)
class Again:
    delay: float
    avoid: frozenset[WorkerId]
    """Who loads the model is not among them: when it will have it is known."""
    failed_here: bool = False
    """Each of them failed at it, and none was only busy."""


def is_poison(tried: Sequence[Tried]) -> bool:
    """As many engines have died over this request as may. Where no agent tells what happened, and the engines
    ended at different places of a long answer, they were rather stopped or restarted: a prompt that kills
    does it while it is read, or where it did before."""
    crashed = [attempt for attempt in tried if attempt.cause is Cause.CRASHED]
    if len(crashed) < MAX_CRASHES:
        return False
    *before, last = crashed
    if last.told or not last.tokens:
        return True
    return not last.continues and any(abs(one.tokens - last.tokens) <= SAME_PLACE_TOKENS for one in before)


def after(policy: RetryPolicy, tried: Sequence[Tried], chance: float) -> Again | None:
    """What to do after these attempts, the last of which has just failed; None: give up.

    The first retry goes elsewhere at once: a person waits, and how many may do so is bounded by the budget
    (`budget`). The pause before retry i (from 1) is drawn from 0 to base * 2**(i - 1) seconds: full jitter,
    so that the clients of a worker that died do not come back as one (AWS Builders' Library, "Timeouts,
    retries and backoff with jitter"). `chance` is uniform in [0, 1).
    """
    if not CAUSES[tried[-1].cause].again or is_poison(tried) or not policy.max_retries:
        return None
    if sum(attempt.cause is Cause.LOADING for attempt in tried) > MAX_LOADING:
        return None
    busy = sum(attempt.cause in NO_FAILURES for attempt in tried)
    if len(tried) - busy > policy.max_retries or busy > MAX_BUSY:
        return None
    longest = min(policy.base_seconds * 2.0 ** (len(tried) - 2), policy.longest_seconds)
    return Again(
        chance * longest if len(tried) > 1 else 0.0,
        frozenset(attempt.worker_id for attempt in tried if attempt.cause is not Cause.LOADING),
        failed_here=all(CAUSES[attempt.cause].verdict is Verdict.BAD for attempt in tried),
    )
