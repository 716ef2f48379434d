"""What must hold after any run, whatever went wrong in it: the invariants, and their checker. Pure.

Whoever runs a scene notes what happened as records, in the order in which it happened, and asks `violations`
at the end. Nothing is said here of how it came about: a scripted fault test, the soak and a replay of either
are checked by the same rules. A rule about which the log holds nothing says nothing.

The numbers are those of the design: I1 one outcome, I2 the right text, I3 nothing after the end, I4 nothing
left behind, I5 no more work than slots, I6 attempts, I7 retries in total, I8 batch items, I9 secrets, I10
resources.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

# What happened .......................................................................................


class Outcome(Enum):
    """How a request ended for its client."""

    SUCCESS = "success"
    """The client was told that this is all: `[DONE]`, or a whole answer with status 200."""
    ERROR = "error"
    """The client was told that it failed: an error status, or an error event in the stream."""
    BROKEN = "broken"
    """The connection ended without either: the client knows that it failed, but not why."""
    LEFT = "left"
    """The client went away itself."""


class Ending(Enum):
    """How a worker's work on a request ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CRASHED = "crashed"
    """The worker's process went with it."""
    LEFT = "left"
    """It was told to stop: the connection was closed by whoever asked it."""


class Kind(Enum):
    """Why a worker was asked."""

    FIRST = "first"
    RETRY = "retry"
    """After a failure: from the beginning, or to go on with what has reached the client."""
    COPY = "copy"
    """Beside one that is still at it, or before anybody asked; it costs no retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A client sent a request."""

    at: float
    """Seconds, like every `at`, on one clock for the whole log."""
    request: str
    reference: str | None = None
    """The whole of the one right answer; None: not known, its text is not checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A part of the answer reached the client."""

    at: float
    request: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The client's request came to an end."""

    at: float
    request: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """A worker began to work on something: an attempt at a request."""

    at: float
    worker: str
    call: str
    """Of this attempt alone."""
    request: str = ""
    """Empty: nobody's (a probe)."""
    kind: Kind = Kind.FIRST


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The worker's work on that attempt is over and its slot is free."""

    at: float
    call: str
    ending: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """An item of a batch was handed in."""

    at: float
    batch: str
    item: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resulted:
    """A batch gave a result for an item."""

    at: float
    batch: str
    item: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AtRest:
    """Counters that are 0 when nothing is under way, read when nothing should be."""

    at: float
    counters: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Words that left by another way than the answer: a log, metrics, a page."""

    at: float
    where: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the process under test held; first before the load, last after it."""

    at: float
    rss_mib: float | None = None
    files: int | None = None
    """Open file descriptors."""
    tasks: int | None = None


Record = Asked | Delivered | Finished | Began | Ended | Submitted | Resulted | AtRest | Said | Resources

# What must hold .....................................................................................


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the rules allow; the defaults are the balancer's own defaults and the design's targets."""

    slots: Mapping[str, int] | None = None
    """Of each worker; None: I5 is not checked."""
    attempts: int = 4
    """At one request, copies not counted: the first and `RetryPolicy.max_retries`."""
    crashes: int = 2
    """Workers that may die of one request."""
    retry_share: float = 0.2
    """Of the requests..."""
    retries_per_second: float = 10.0
    """...and so many each second, over any time..."""
    retry_seconds: float = 10.0
    """...with so long a memory: the burst that it allows."""
    secrets: Sequence[str] = ()
    """Words of prompts, keys and answers that may be in the answers only."""
    rss_growth_mib: float | None = None
    """None: not checked, like the next two."""
    files_growth: int | None = None
    tasks_growth: int | None = None


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    """`I1` to `I10`."""
    subject: str
    """The request, worker, batch or place that it is about."""
    what: str

    def __str__(self) -> str:
        return f"{self.rule} {self.subject}: {self.what}"


def violations(records: Iterable[Record], bounds: Bounds | None = None) -> list[Violation]:
    """What did not hold, in the order of the rules; empty: all did. The records stand in order of time."""
    log, bounds = list(records), bounds or Bounds()
    return [
        *_one_outcome(log),
        *_right_text(log),
        *_nothing_after_the_end(log),
        *_nothing_left_behind(log),
        *_no_more_than_slots(log, bounds),
        *_attempts(log, bounds),
        *_retries_in_total(log, bounds),
        *_batch_items(log),
        *_secrets(log, bounds),
        *_resources(log, bounds),
    ]


def _one_outcome(log: Sequence[Record]) -> Iterable[Violation]:
    ends = Counter(record.request for record in log if isinstance(record, Finished))
    for record in log:
        if isinstance(record, Asked) and ends[record.request] != 1:
            yield Violation("I1", record.request, f"{ends[record.request]} outcomes, there must be one")


def _right_text(log: Sequence[Record]) -> Iterable[Violation]:
    came: defaultdict[str, list[str]] = defaultdict(list)
    outcomes: dict[str, Outcome] = {}
    for record in log:
        if isinstance(record, Delivered):
            came[record.request].append(record.text)
        elif isinstance(record, Finished):
            outcomes.setdefault(record.request, record.outcome)
    for record in log:
        if not isinstance(record, Asked) or record.reference is None:
            continue
        text = "".join(came[record.request])
        if not record.reference.startswith(text):
            yield Violation("I2", record.request, _first_difference(text, record.reference))
        elif outcomes.get(record.request) is Outcome.SUCCESS and text != record.reference:
            lost = len(record.reference) - len(text)
            yield Violation("I2", record.request, f"it ended as a success, {lost} characters short")


def _first_difference(text: str, reference: str) -> str:
    same = next(
        (place for place, (ours, theirs) in enumerate(zip(text, reference, strict=False)) if ours != theirs),
        min(len(text), len(reference)),
    )
    return f"wrong from character {same} of {len(reference)} on: {text[same : same + 20]!r}"


def _nothing_after_the_end(log: Sequence[Record]) -> Iterable[Violation]:
    ended: set[str] = set()
    for record in log:
        if isinstance(record, Finished):
            ended.add(record.request)
        elif isinstance(record, Delivered) and record.request in ended:
            yield Violation("I3", record.request, "something came after the end")


def _nothing_left_behind(log: Sequence[Record]) -> Iterable[Violation]:
    last = next((record for record in reversed(log) if isinstance(record, AtRest)), None)
    for name, value in last.counters.items() if last else ():
        if value:
            yield Violation("I4", name, f"is {value:g} with nothing under way")


def _no_more_than_slots(log: Sequence[Record], bounds: Bounds) -> Iterable[Violation]:
    if bounds.slots is None:
        return
    at_work: dict[str, str] = {}
    told: set[str] = set()
    for record in log:
        if isinstance(record, Began):
            at_work[record.call] = record.worker
            running = sum(worker == record.worker for worker in at_work.values())
            slots = bounds.slots.get(record.worker)
            if slots is not None and running > slots and record.worker not in told:
                told.add(record.worker)
                yield Violation("I5", record.worker, f"{running} at once on {slots} slots")
        elif isinstance(record, Ended):
            at_work.pop(record.call, None)


def _attempts(log: Sequence[Record], bounds: Bounds) -> Iterable[Violation]:
    request_of: dict[str, str] = {}
    attempts: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    for record in log:
        if isinstance(record, Began) and record.request:
            request_of[record.call] = record.request
            attempts[record.request] += record.kind is not Kind.COPY
        elif isinstance(record, Ended) and record.ending is Ending.CRASHED:
            crashes[request_of.get(record.call, "")] += 1
    for request, number in attempts.items():
        if number > bounds.attempts:
            yield Violation("I6", request, f"{number} attempts, {bounds.attempts} are allowed")
        if crashes[request] > bounds.crashes:
            yield Violation("I6", request, f"{crashes[request]} workers died of it, {bounds.crashes} may")


def _retries_in_total(log: Sequence[Record], bounds: Bounds) -> Iterable[Violation]:
    """Over no stretch of time were there more retries than its requests and its seconds allow.

    `debt` is how far the worst stretch that ends here is above its allowance (Lindley's recursion); a budget
    with a memory of some seconds may be that much in debt as it can have saved in them.
    """
    debt, before = 0.0, None
    recent: deque[float] = deque()
    for record in log:
        if not (isinstance(record, Asked) or (isinstance(record, Began) and record.kind is Kind.RETRY)):
            continue
        debt = max(
            0.0, debt - bounds.retries_per_second * (record.at - (record.at if before is None else before))
        )
        before = record.at
        while recent and recent[0] < record.at - bounds.retry_seconds:
            recent.popleft()
        if isinstance(record, Asked):
            recent.append(record.at)
            debt = max(0.0, debt - bounds.retry_share)
            continue
        debt += 1
        saved = bounds.retries_per_second * bounds.retry_seconds + bounds.retry_share * len(recent)
        if debt > saved + 1:
            yield Violation(
                "I7", record.request, f"{debt:.0f} retries above what the budget adds, at {record.at:.1f} s"
            )
            return


def _batch_items(log: Sequence[Record]) -> Iterable[Violation]:
    results = Counter((record.batch, record.item) for record in log if isinstance(record, Resulted))
    submitted = [(record.batch, record.item) for record in log if isinstance(record, Submitted)]
    for batch, item in submitted:
        if results[batch, item] != 1:
            yield Violation("I8", batch, f"item {item} has {results[batch, item]} results")
    for batch, item in results.keys() - set(submitted):
        yield Violation("I8", batch, f"a result for {item}, which nobody submitted")


def _secrets(log: Sequence[Record], bounds: Bounds) -> Iterable[Violation]:
    for record in log:
        if isinstance(record, Said):
            for number, secret in enumerate(bounds.secrets):
                if secret in record.text:  # the secret itself is not repeated here
                    yield Violation("I9", record.where, f"has secret {number}")


def _resources(log: Sequence[Record], bounds: Bounds) -> Iterable[Violation]:
    samples = [record for record in log if isinstance(record, Resources)]
    if len(samples) < 2:
        return
    first, last = samples[0], samples[-1]
    for name, before, after, allowed in (
        ("RSS, MiB", first.rss_mib, last.rss_mib, bounds.rss_growth_mib),
        ("open files", first.files, last.files, bounds.files_growth),
        ("tasks", first.tasks, last.tasks, bounds.tasks_growth),
    ):
        if before is not None and after is not None and allowed is not None and after - before > allowed:
            yield Violation("I10", name, f"from {before:g} to {after:g}, {allowed:g} more are allowed")
