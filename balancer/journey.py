"""One request's life: admit, place, relay, retry, account. Read this first.

    ask -> a place in line -> a slot on a worker -> one attempt -> answered
             ^                                          |
             +---- after a pause, elsewhere ------------+---- or an error in the client's words

Nothing here knows HTTP frameworks or sockets: a front gives it a checked request and, for a client that
streams, a `Delivery`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from balancer.core.dispatcher import Chance
from balancer.core.errors import (
    BadRequest,
    ModelNotFound,
    NoRoom,
    QueueFull,
    RequestError,
    TimedOut,
    WorkerFailed,
)
from balancer.core.model import (
    Ask,
    Attempt,
    Choice,
    Needs,
    Refusal,
    Refuse,
    Served,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.retry import CAUSES, Cause, RetryPolicy, Tried, after
from balancer.dialects.openai import Request
from balancer.leases import Abandoned, Lease, Leases, Refused
from balancer.relay import Delivery, Outcome, Progress, Relay

log = logging.getLogger(__name__)

Observer = Callable[[Served], None]


class ClientLeft(Exception):
    """The client's connection is gone; nobody is there to be told."""


@dataclass(frozen=True, slots=True)
class JourneyPolicy:
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    total_seconds: float = 300.0
    """From the first slot to the end of the answer, retries included. Waiting in line has its own bound."""
    max_wait_seconds: float = 120.0
    """In line, per attempt."""


@dataclass(slots=True)
class Story:
    """What has happened to a request so far; fronts read it for their response headers."""

    request_id: str
    client: str
    passed_on: Mapping[str, str]
    began: float
    attempts: list[Attempt] = field(default_factory=list)
    """Those that have ended."""
    worker: Worker | None = None
    """Who has it now, or had it last."""
    choice: Choice | None = None
    """And why."""
    queue_seconds: float = 0.0


class Journey:
    def __init__(
        self,
        leases: Leases,
        relay: Relay,
        policy: JourneyPolicy,
        *,
        clock: Callable[[], float],
        chance: Chance,
        observers: Sequence[Observer] = (),
    ) -> None:
        """`clock`: the loop's own, in seconds. `observers` are given each finished request, exactly once."""
        self._leases = leases
        self._relay = relay
        self._policy = policy
        self._clock = clock
        self._chance = chance
        self._observers = observers
        self._under_way = 0
        self.idle = asyncio.Event()
        """Set while nothing is under way."""
        self.idle.set()

    @property
    def under_way(self) -> int:
        """Requests that have not ended, wherever they stand."""
        return self._under_way

    def begin(self, request_id: str, client: str, passed_on: Mapping[str, str]) -> Story:
        """`client`: its address. `passed_on`: headers for whichever worker gets the request."""
        return Story(request_id, client, passed_on, self._clock())

    async def serve(self, request: Request, story: Story, delivery: Delivery | None) -> bytes | None:
        """The answer in one piece; None when it went to the delivery.

        Raises a `RequestError`, in the case of a delivery also after it has begun: what was sent then is
        not the whole answer, and the client has to be told in its stream. Cancelled when the client left.
        """
        status, error = 500, "internal_error"
        self._under_way += 1
        self.idle.clear()
        try:
            answer = await self._answer(request, story, delivery)
            status, error = 200, ""
            return answer
        except RequestError as failure:
            status, error = failure.status, failure.code or failure.type
            raise
        except (asyncio.CancelledError, ClientLeft):
            status, error = 499, "client_left"
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.idle.set()
            self._account(request, story, status, error)

    async def _answer(self, request: Request, story: Story, delivery: Delivery | None) -> bytes | None:
        needs = Needs(model=request.model, endpoint=request.endpoint)
        tried: list[Tried] = []
        try:
            async with asyncio.timeout(None) as limit:
                while True:
                    outcome = await self._attempt(request, needs, story, delivery, limit)
                    if outcome.cause is None:
                        return outcome.answer
                    worker_id = story.attempts[-1].worker_id
                    tried.append(Tried(worker_id, outcome.cause))
                    again = after(self._policy.retry, tried, self._chance.random())
                    if again is None:
                        raise _failure(outcome, worker_id, len(tried))
                    await asyncio.sleep(again.delay)
                    needs = replace(needs, avoid=again.avoid)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimedOut(
                f"No whole answer within {self._policy.total_seconds:g} s. "
                "Ask for fewer tokens, or raise REQUEST_TIMEOUT."
            ) from None

    async def _attempt(
        self,
        request: Request,
        needs: Needs,
        story: Story,
        delivery: Delivery | None,
        limit: asyncio.Timeout,
    ) -> Outcome:
        waiting_since = self._clock()
        ask = Ask(
            needs=needs,
            arrived=story.began,
            deadline=waiting_since + self._policy.max_wait_seconds,
            admitted=bool(story.attempts),
        )
        outcome = Outcome(cause=Cause.LEFT)
        try:
            async with self._leases.acquire(ask) as lease:
                granted = self._clock()
                progress = Progress(granted)
                story.worker, story.choice = lease.worker, lease.choice
                story.queue_seconds += granted - waiting_since
                if limit.when() is None:
                    limit.reschedule(granted + self._policy.total_seconds)
                try:
                    outcome = await self._relay.attempt(
                        lease.worker, request, story.passed_on, delivery, progress
                    )
                except (asyncio.CancelledError, ClientLeft):
                    outcome = _interrupted(lease, delivery, overdue=limit.expired())
                    raise
                finally:
                    self._note(story, lease, outcome, progress, granted - waiting_since)
        except Refused as refused:
            raise _refused(refused.refuse, request) from None
        except Abandoned:
            pass  # the worker was lost under the attempt: what follows is decided as after any failure
        return outcome

    def _note(self, story: Story, lease: Lease, outcome: Outcome, progress: Progress, waited: float) -> None:
        """An attempt has ended, one way or another: tell its lease, and write it down."""
        measures = progress.measures(self._clock())
        lease.settle(
            _verdict(outcome.cause, progress),
            measures,
            unreachable=outcome.cause is Cause.UNREACHABLE,
            hold_seconds=outcome.hold_seconds,
        )
        attempt = Attempt(
            worker_id=lease.worker.id,
            choice=lease.choice,
            waited=waited,
            cause=outcome.cause.value if outcome.cause else None,
            detail=outcome.detail,
            measures=measures,
        )
        story.attempts.append(attempt)
        if outcome.cause is not None:
            log.info(
                "request %s: attempt %d on %s ended, %s%s",
                *(story.request_id, len(story.attempts), attempt.worker_id, attempt.cause),
                f": {outcome.detail}" if outcome.detail else "",
            )

    def _account(self, request: Request, story: Story, status: int, error: str) -> None:
        served = Served(
            request_id=story.request_id,
            model=request.model,
            endpoint=request.endpoint,
            stream=request.stream,
            client=story.client,
            attempts=tuple(story.attempts),
            queue_seconds=story.queue_seconds,
            seconds=self._clock() - story.began,
            status=status,
            error=error,
        )
        for observe in self._observers:
            observe(served)


def _refused(refuse: Refuse, request: Request) -> RequestError:
    wait = refuse.retry_after
    match refuse.refusal:
        case Refusal.MODEL_NOT_FOUND:
            return ModelNotFound(request.model, refuse.models)
        case Refusal.ENDPOINT_NOT_SERVED:
            return BadRequest(
                f"No worker serves {request.endpoint.value} for the model {request.model!r}.",
                param="model",
                code="endpoint_not_served",
            )
        case Refusal.MODEL_AWAY:
            there = ", ".join(refuse.models) or "none"
            return NoRoom(
                f"No worker that answers serves the model {request.model!r}. Served are: {there}. "
                f"Not answering are workers that may have it ({refuse.detail}). Try again in {wait:.0f} s.",
                wait,
            )
        case Refusal.ROOM_EMPTY:
            return NoRoom(
                "No worker has joined this balancer yet. Run `worker-agent run` on a machine of this "
                "network, or name workers in the configuration file.",
                wait,
            )
        case Refusal.QUEUE_FULL:
            return QueueFull(f"The waiting line is full. Try again in {wait:.0f} s.", wait)
        case Refusal.WAITED_TOO_LONG:
            return NoRoom(
                f"No worker had room for the model {request.model!r} in time"
                + (f" ({refuse.detail})" if refuse.detail else "")
                + f". Try again in {wait:.0f} s.",
                wait,
            )


def _failure(outcome: Outcome, worker_id: WorkerId, attempts: int) -> RequestError:
    """What the client is told after the last attempt that was allowed."""
    if outcome.rejected is not None:
        return outcome.rejected
    times = "once" if attempts == 1 else f"{attempts} times"
    last = f"{worker_id}: {outcome.detail}"
    if outcome.words:
        last += f", {outcome.words!r}"
    match outcome.cause:
        case Cause.BUSY:
            wait = outcome.hold_seconds or 1.0
            return NoRoom(f"Tried {times}; each worker was busy, the last was {last}.", wait)
        case Cause.SILENT:
            return TimedOut(f"Tried {times}; workers fell silent, the last was {last}.")
        case Cause.CUT:
            return WorkerFailed(f"The worker failed in the middle of its answer ({last}). Ask again.")
        case _:
            return WorkerFailed(f"Tried {times}; no worker answered, the last was {last}.")


def _interrupted(lease: Lease, delivery: Delivery | None, *, overdue: bool) -> Outcome:
    """An attempt that was ended from outside: its worker was lost, its time was over, or its client left."""
    if lease.lost:
        cut = delivery is not None and delivery.begun
        return Outcome(cause=Cause.CUT if cut else Cause.LOST, detail=lease.lost)
    return Outcome(cause=Cause.OVERDUE if overdue else Cause.LEFT)


def _verdict(cause: Cause | None, progress: Progress) -> Verdict:
    if cause is None:
        return Verdict.GOOD
    if cause is Cause.OVERDUE and progress.first_byte is None:
        # All that time and not a word: whatever it is busy with, it is not answering.
        return Verdict.BAD
    return CAUSES[cause].verdict
