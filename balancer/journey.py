"""One request's life: admit, place, relay, retry or continue, account. Read this first.

    ask -> a place in line -> a slot on a worker -> one attempt -> answered
             ^                                          |
             +---- elsewhere, from the beginning -------+
             +---- elsewhere, from where it broke ------+---- or an error in the client's words

A slot may be for less than an attempt: a part of the prompt is read ahead, and the ask goes back into its
place in line. Or there may be a second one for the same ask, on another worker: the first answer counts.

Nothing here knows HTTP frameworks or sockets: a front gives it a checked request and, for a client that
streams, a `Delivery`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf

from balancer import continuation
from balancer.continuation import Kept, Seam
from balancer.core.budget import RetryBudget
from balancer.core.choosing import Chance
from balancer.core.errors import (
    BadRequest,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    NoRoom,
    OnlyOutside,
    Quarantined,
    QueueFull,
    RequestError,
    StreamBroken,
    TimedOut,
    WorkerFailed,
)
from balancer.core.model import (
    Ask,
    Attempt,
    Choice,
    Endpoint,
    Loading,
    ModelName,
    Needs,
    Refusal,
    Refuse,
    Served,
    ServiceClass,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.quarantine import Quarantine
from balancer.core.retry import CAUSES, MAX_CRASHES, Cause, RetryPolicy, Tried, after, is_poison
from balancer.dialects.framing import event
from balancer.dialects.openai import DONE, Request
from balancer.leases import Abandoned, Lease, Leases, Refused, Stop
from balancer.relay import Delivery, Outcome, Progress, Relay, Stream

log = logging.getLogger(__name__)

Observer = Callable[[Served], None]

LARGE_BODY_BYTES = 1024 * 1024
"""To shorten so long a request takes about 10 ms."""


@dataclass(frozen=True, slots=True)
class JourneyPolicy:
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    total_seconds: float = 300.0
    """From the first slot to the end of the answer, retries included. Waiting in line has its own bound."""
    total_batch_seconds: float = 3600.0
    """The same for class batch: a slow machine may take long over a long paper."""
    max_wait_seconds: float = 120.0
    """In line, per attempt."""
    max_wait_batch_seconds: float = 86_400.0
    """The same for asks of class batch, which wait for what others leave."""
    continues: bool = True
    """A streamed answer whose worker fails goes on at another one, where that can be done."""


@dataclass(slots=True)
class Story:
    """What has happened to a request so far; fronts read it for their response headers."""

    request_id: str
    client: str
    passed_on: Mapping[str, str]
    began: float
    service_class: ServiceClass
    asker: str
    """Who shares what the room has with others: a digest of the API key, else the address."""
    attempts: list[Attempt] = field(default_factory=list)
    """Those that have ended."""
    worker: Worker | None = None
    """Who has it now, or had it last."""
    choice: Choice | None = None
    """And why."""
    model: ModelName | None = None
    """As this worker calls it."""
    queue_seconds: float = 0.0
    warm_ups: int = 0
    stream: Stream | None = None
    """Of an answer that is streamed."""
    waits: Ticket | None = None
    """Its number in line, while it stands there."""
    holds: Ticket | None = None
    """The number under which a worker has it, or had it last."""
    name: ModelName | None = None
    """By which its client asks for the model."""

    @property
    def fallback(self) -> bool:
        """A worker outside of the room has it."""
        return self.worker is not None and self.worker.fallback

    def with_worker(self, worker: Worker, choice: Choice, model: ModelName) -> None:
        self.worker, self.choice, self.model = worker, choice, model


@dataclass(slots=True, eq=False)
class _Call:
    """What all attempts at a request have in common."""

    request: Request
    story: Story
    stream: Stream | None
    limit: asyncio.Timeout
    sends: Request
    """What a worker is sent: the request, or what asks for the rest of the answer."""
    kin: str | None = None
    """Of the model that has begun the answer."""
    failed: list[Tried] = field(default_factory=list)
    deadline: float = 0.0
    """Until when it waits for a slot, and for its model to be loaded there."""
    keeps_deadline: bool = False
    """It was only told that its model is being loaded: its wait is the same one."""
    ended: RequestError | None = None
    """Why it was ended before its time."""

    @property
    def begun(self) -> bool:
        """A part of the answer has reached the client."""
        return self.stream is not None and self.stream.begun

    def note_ticket(self, ticket: Ticket) -> None:
        self.story.waits = ticket


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
        self._budget = RetryBudget()
        self._quarantine = Quarantine()
        self._calls: set[_Call] = set()
        self._under_way = 0
        self.idle = asyncio.Event()
        """Set while nothing is under way."""
        self.idle.set()

    @property
    def under_way(self) -> int:
        """Requests that have not ended, wherever they stand."""
        return self._under_way

    def adopt(self, policy: JourneyPolicy) -> None:
        """Of requests that are under way, what runs or waits keeps its time; a further attempt has the new
        one."""
        self._policy = policy

    def begin(
        self,
        request_id: str,
        client: str,
        passed_on: Mapping[str, str],
        service_class: ServiceClass = ServiceClass.INTERACTIVE,
        asker: str = "",
    ) -> Story:
        """`client`: its address. `passed_on`: headers for whichever worker gets the request. `asker`: who is
        treated as one by fairness; the address, if empty."""
        return Story(request_id, client, passed_on, self._clock(), service_class, asker or client)

    async def serve(self, request: Request, story: Story, delivery: Delivery | None) -> bytes | None:
        """The answer in one piece; None when it went to the delivery.

        Raises a `RequestError`, in the case of a delivery also after it has begun: what was sent then is
        not the whole answer, and the client has to be told in its stream. Cancelled when the client left.
        """
        status, error = 500, "internal_error"
        self._under_way += 1
        self.idle.clear()
        try:
            self._insist_on_no_poison(request)
            self._budget.arrived(story.began)
            answer = await self._answer(request, story, delivery)
            status, error = 200, ""
            return answer
        except RequestError as failure:
            status, error = failure.status, failure.code or failure.type
            raise
        except asyncio.CancelledError:
            status, error = 499, "client_left"
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.idle.set()
            self._account(request, story, status, error)

    def end_all(self, error: RequestError) -> None:
        """Whatever is under way ends now, and its client is told so."""
        self._end(self._calls, error)

    def turn_away(self, asker: str, error: RequestError) -> None:
        """What waits for this asker, with nothing of an answer yet, ends now, and its client is told so. What
        a worker has goes on."""
        waits = [call for call in self._calls if call.story.waits is not None and not call.begun]
        self._end((call for call in waits if call.story.asker == asker), error)

    def _end(self, calls: Iterable[_Call], error: RequestError) -> None:
        now = self._clock()
        for call in calls:
            call.ended = call.ended or error
            if not call.limit.expired():
                call.limit.reschedule(now)

    def whereabouts(self, story: Story) -> str:
        """What a client that waits for the first word may be told, in a line."""
        standing = self._leases.standing(story.waits) if story.waits is not None else None
        if standing is not None:
            eta = "" if standing.eta_seconds is None else f" eta={standing.eta_seconds:.0f}s"
            queued = f"queued position={standing.position}{eta}"
            return queued if standing.loading is None else f"{queued} {_told(story, standing.loading)}"
        loading = self._leases.loading(story.holds) if story.holds is not None else None
        if loading is not None:
            return _told(story, loading)
        return f"prefilling worker={story.worker.id}" if story.worker is not None else "waiting"

    async def _answer(self, request: Request, story: Story, delivery: Delivery | None) -> bytes | None:
        story.name = request.model
        stream = story.stream = None if delivery is None else Stream(delivery, self._to_keep(request))
        call: _Call | None = None
        try:
            async with asyncio.timeout(None) as limit:
                call = _Call(request, story, stream, limit, sends=request)
                self._calls.add(call)
                return await self._attempts(call)
        except TimeoutError:
            if call is None or not limit.expired():
                raise
            if call.ended is not None:
                raise call.ended from None
            is_batch = story.service_class is ServiceClass.BATCH
            setting = "request_timeout_batch" if is_batch else "REQUEST_TIMEOUT"
            raise TimedOut(
                f"No whole answer within {self._longest_answer(story):g} s. "
                f"Ask for fewer tokens, or raise {setting}."
            ) from None
        finally:
            if call is not None:
                self._calls.discard(call)

    async def _attempts(self, call: _Call) -> bytes | None:
        """One attempt after the other, until the answer is whole or nothing more may be tried."""
        request = call.request
        needs = Needs(model=request.model, endpoint=request.endpoint, local_only=request.local_only)
        while True:
            outcome = await self._attempt(call, needs)
            call.keeps_deadline = outcome is not None and outcome.cause is Cause.LOADING
            if outcome is None:
                continue
            if outcome.cause is None:
                return outcome.answer
            if call.begun and not self._goes_on(call, outcome):
                return None
            again = after(self._policy.retry, call.failed, self._chance.random())
            if again is None or not self._budget.take(self._clock()):
                raise self._given_up(call, outcome)
            if again.delay:
                await asyncio.sleep(again.delay)
            prefilled = call.stream is not None and call.stream.prefilled
            needs = needs._replace(
                avoid=again.avoid, kin=call.kin if prefilled else None, failed_here=again.failed_here
            )

    # An answer that broke off

    def _to_keep(self, request: Request) -> Kept | None:
        """Where to keep what comes of a streamed answer; None: it could not go on elsewhere anyway."""
        if not self._policy.continues or request.choices != 1 or request.endpoint is Endpoint.EMBEDDINGS:
            return None
        return Kept(request.endpoint)

    def _goes_on(self, call: _Call, outcome: Outcome) -> bool:
        """Gets everything ready for going on where the answer broke off. False: it was whole but for its
        end, which the client now has. Raises `StreamBroken`."""
        stream = call.stream
        assert stream is not None
        kept = stream.kept
        if kept is None:
            why = "" if self._policy.continues else "continue_streams is off"
            raise _broken(outcome, why or continuation.obstacle(call.request))
        if kept.finish_reason is None:
            obstacle = continuation.obstacle(call.request) or kept.obstacle
            if obstacle is not None:
                raise _broken(outcome, obstacle)
        if kept.finish_reason is not None or continuation.tokens_left(call.request, kept) == 0:
            for data in continuation.ending(kept, "length", call.request.usage_wanted):
                stream.delivery.send(event(data))
            stream.delivery.send(event(DONE))
            return False
        if stream.continued >= continuation.MAX_CONTINUATIONS:
            raise _broken(outcome, f"it was continued {stream.continued} times already")
        stream.seam = Seam(call.request, kept)
        stream.prefilled = kept.worth
        call.sends = continuation.continuation(call.request, kept)
        return True

    # What must not be tried again

    def _insist_on_no_poison(self, request: Request) -> None:
        if self._quarantine:
            seconds = self._quarantine.seconds_left(_fingerprint(request), self._clock())
            if seconds:
                raise Quarantined(MAX_CRASHES, seconds)

    def _given_up(self, call: _Call, outcome: Outcome) -> RequestError:
        """What the client is told after the last attempt that was allowed."""
        if is_poison(call.failed):
            now, fingerprint = self._clock(), _fingerprint(call.request)
            self._quarantine.block(fingerprint, now)
            return Quarantined(MAX_CRASHES, self._quarantine.seconds_left(fingerprint, now))
        if call.begun:
            return _broken(outcome, f"{len(call.failed)} attempts failed")
        if outcome.loading is not None:
            return _loading(call.request, outcome.loading, outcome.loading.eta_seconds or 1.0)
        return _failure(outcome, call.failed[-1].worker_id, len(call.failed))

    # One slot ...

    async def _attempt(self, call: _Call, needs: Needs) -> Outcome | None:
        """None: a part of the prompt was read ahead, and the request has yet to be answered."""
        waiting_since = self._clock()
        if not call.keeps_deadline:
            call.deadline = waiting_since + self._longest_wait(call.story)
        try:
            async with self._leases.acquire(self._ask(call, needs), call.note_ticket) as lease:
                call.story.waits = None
                granted = self._clock()
                waited = granted - waiting_since
                call.story.queue_seconds += waited
                if call.limit.when() is None:
                    call.limit.reschedule(granted + self._longest_answer(call.story))
                warmed = await self._warm_up(call, lease, waited)
                if warmed is None:
                    return await self._answered_first(call, lease, waited)
                if warmed.cause is not None:
                    return warmed
                if not call.failed and call.ended is None:
                    call.limit.reschedule(None)  # the answer has not been begun
                return None
        except Refused as refused:
            if call.begun:
                raise StreamBroken("no other worker of the same model and quantisation had room") from None
            raise _refused(refused.refuse, call.request, self._longest_wait(call.story)) from None

    def _ask(self, call: _Call, needs: Needs) -> Ask:
        story = call.story
        return Ask(
            needs=needs,
            arrived=story.began,
            deadline=call.deadline,
            admitted=bool(story.attempts or story.warm_ups),
            service_class=story.service_class,
            client=story.asker,
            prompt=call.request.prompt,
            max_output=call.sends.max_output,
            replayable=call.stream is None,
        )

    def _longest_answer(self, story: Story) -> float:
        if story.service_class is ServiceClass.BATCH:
            return self._policy.total_batch_seconds
        return self._policy.total_seconds

    def _longest_wait(self, story: Story) -> float:
        if story.service_class is ServiceClass.BATCH:
            return self._policy.max_wait_batch_seconds
        return self._policy.max_wait_seconds

    # ... and what is done with it

    async def _warm_up(self, call: _Call, lease: Lease, waited: float) -> Outcome | None:
        """How reading ahead went, if the slot is for that. None: the slot is there for the whole request."""
        if lease.grant.warm_chars is None:
            return None
        part = await _beginning(call.request, lease.grant.warm_chars)
        if part is None:
            return None
        outcome = await self._relayed(call, lease, waited, part)
        # What an engine does not take in parts (its template wants a question, say), it may take as a whole.
        return None if outcome.cause is Cause.REJECTED else outcome

    async def _answered_first(self, call: _Call, lease: Lease, waited: float) -> Outcome:
        """The request on the worker of this lease, and on further ones that may be given to it meanwhile."""
        if call.begun:
            return await self._relayed(call, lease, waited)
        return await _Race(
            lease, lambda copy: self._relayed(call, copy, 0.0), streams=call.stream is not None
        ).first()

    async def _relayed(
        self, call: _Call, lease: Lease, waited: float, part: Request | None = None
    ) -> Outcome:
        """One attempt at the request, or at the part of it that is to be read ahead; gives the slot back."""
        request, stream = (call.sends, call.stream) if part is None else (part, None)
        progress = Progress(self._clock(), lease.begin)
        lease.answer = progress
        model = lease.grant.model or request.model
        call.story.with_worker(lease.worker, lease.choice, model)
        call.story.holds = lease.grant.ticket
        outcome = Outcome(cause=Cause.LEFT)
        try:
            async with lease.held():
                outcome = await self._relay.attempt(
                    *(lease.worker, model, request, call.story.passed_on, stream, progress),
                    wait_seconds=min(call.deadline, call.limit.when() or inf) - progress.began,
                )
                if outcome.cause is Cause.REJECTED and call.sends is not call.request:
                    # The client's own request was right: it is only the rest that this worker does not take.
                    outcome = replace(outcome, cause=Cause.CANNOT_CONTINUE)
        except Abandoned as abandoned:
            outcome = _stopped(abandoned)
        except asyncio.CancelledError:
            outcome = Outcome(cause=Cause.OVERDUE if call.limit.expired() else Cause.LEFT)
            raise
        finally:
            self._note(call, lease, outcome, progress, waited, is_part=part is not None)
        if call.kin is None and call.begun and outcome.cause is not Cause.OUTRUN:
            call.kin = lease.grant.kin
        if outcome.cause is None:  # a copy may have begun since
            call.story.with_worker(lease.worker, lease.choice, model)
        return outcome

    def _note(
        self,
        call: _Call,
        lease: Lease,
        outcome: Outcome,
        progress: Progress,
        waited: float,
        *,
        is_part: bool,
    ) -> None:
        """An attempt has ended, one way or another: tell its lease, and write it down."""
        measures = progress.measures(self._clock())
        if is_part and outcome.cause is Cause.REJECTED:
            return  # the whole follows in the same slot
        lease.settle(
            _verdict(outcome.cause, progress),
            measures,
            unreachable=outcome.cause is Cause.UNREACHABLE or outcome.gone,
            hold_seconds=outcome.hold_seconds,
            silent=outcome.cause is Cause.SILENT,
            loading=outcome.loading,
        )
        lease.give_back()
        if is_part and outcome.cause is None:
            call.story.warm_ups += 1
            return
        attempt = Attempt(
            worker_id=lease.worker.id,
            choice=lease.choice,
            waited=waited,
            cause=outcome.cause.value if outcome.cause else None,
            detail=outcome.detail,
            measures=measures,
            fallback=lease.worker.fallback,
        )
        call.story.attempts.append(attempt)
        if outcome.cause is not None:
            if outcome.cause is not Cause.OUTRUN:
                continues = call.stream is not None and call.stream.seam is not None
                call.failed.append(
                    Tried(lease.worker.id, outcome.cause, progress.tokens, continues, outcome.told)
                )
            log.info(
                "request %s: attempt %d on %s ended, %s%s",
                *(call.story.request_id, len(call.story.attempts), attempt.worker_id, attempt.cause),
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
            service_class=story.service_class,
            warm_ups=story.warm_ups,
            continued=story.stream.continued if story.stream is not None else 0,
        )
        for observe in self._observers:
            observe(served)


class _Race:
    """An attempt, and copies of it that may come while it runs. A streamed answer is of who begins first,
    any other of who is through first."""

    def __init__(
        self, lease: Lease, attempt: Callable[[Lease], Awaitable[Outcome]], *, streams: bool
    ) -> None:
        self._lease = lease
        self._attempt = attempt
        self._streams = streams
        self._copies: dict[asyncio.Future[Outcome], Lease] = {}

    async def first(self) -> Outcome:
        """The first whole answer, else the last failure. No attempt outlives this."""
        self._lease.on_copy = self._start
        if self._streams:
            self._lease.on_begun = self._leads
        running: set[asyncio.Future[Outcome]] = set()
        try:
            outcome = await self._attempt(self._lease)
            running = set(self._copies)
            while outcome.cause is not None and running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for copy in done:
                    other = copy.result()
                    if outcome.cause is not None and other.cause is not Cause.OUTRUN:
                        outcome = other
        except BaseException:
            for copy in self._copies:
                copy.cancel()
            raise
        else:
            for lease in self._copies.values():
                lease.stop(Stop.OUTRUN)
            return outcome
        finally:
            self._lease.on_copy = self._lease.on_begun = None
            if self._copies:
                await asyncio.wait(self._copies)

    def _leads(self, winner: Lease) -> None:
        self._lease.on_copy = None
        for lease in (self._lease, *self._copies.values()):
            if lease is not winner:
                lease.stop(Stop.OUTRUN)

    def _start(self, lease: Lease) -> None:
        if self._streams:
            lease.on_begun = self._leads
        copy = asyncio.ensure_future(self._attempt(lease))
        self._copies[copy] = lease
        copy.add_done_callback(self._ended)

    def _ended(self, copy: asyncio.Future[Outcome]) -> None:
        self._copies[copy].give_back()  # a task that is cancelled before it begins runs no line
        if not copy.cancelled() and copy.exception() is None and copy.result().cause is None:
            self._lease.stop(Stop.OUTRUN)


async def _beginning(request: Request, chars: int) -> Request | None:
    """Off the loop where it takes long enough to be felt by others."""
    if len(request.body) <= LARGE_BODY_BYTES:
        return request.beginning(chars)
    return await asyncio.to_thread(request.beginning, chars)


def _refused(refuse: Refuse, request: Request, longest_wait: float) -> RequestError:
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
        case Refusal.WOULD_WAIT_TOO_LONG:
            return QueueFull(
                f"There is so much work ahead of this request that its turn would not come within "
                f"{longest_wait:.0f} s. Try again in {wait:.0f} s.",
                wait,
            )
        case Refusal.WAITED_TOO_LONG:
            return NoRoom(
                f"No worker had room for the model {request.model!r} in time"
                + (f" ({refuse.detail})" if refuse.detail else "")
                + f". Try again in {wait:.0f} s.",
                wait,
            )
        case Refusal.MODEL_LOADING:
            loading = refuse.loading or Loading(WorkerId("a worker"), None, None)
            return _loading(request, loading, wait)
        case Refusal.MODEL_FAILED:
            return ModelFailed(
                f"No worker can load the model {request.model!r} at present ({refuse.detail}). "
                f"Try again in {wait:.0f} s, or ask for another one.",
                wait,
            )
        case Refusal.LOCAL_ONLY:
            return OnlyOutside(request.model)


def _loading(request: Request, loading: Loading, wait: float) -> ModelLoading:
    return ModelLoading(request.model, loading.worker_id, loading.progress, loading.eta_seconds, wait)


def _told(story: Story, loading: Loading) -> str:
    """How far a model is loaded, in words that programs can read too."""
    words = f"loading model={story.name} worker={loading.worker_id}"
    if loading.progress is not None:
        words += f" progress={loading.progress:.0%}"
    return words if loading.eta_seconds is None else f"{words} eta={loading.eta_seconds:.0f}s"


def _fingerprint(request: Request) -> int:
    """Of what a worker is sent."""
    digest = blake2b(request.model.encode() + b"\0" + request.body, digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _broken(outcome: Outcome, why: str | None) -> StreamBroken:
    """`why` the answer could not go on elsewhere."""
    return StreamBroken(f"{why or 'nobody could'} ({outcome.detail})")


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
        case _:
            return WorkerFailed(f"Tried {times}; no worker answered, the last was {last}.")


def _stopped(abandoned: Abandoned) -> Outcome:
    """An attempt that was ended from outside: its worker was given up, or somebody else was faster."""
    if abandoned.stop is Stop.OUTRUN:
        return Outcome(cause=Cause.OUTRUN, detail="another worker answered first")
    silent = abandoned.stop is Stop.SILENT
    return Outcome(cause=Cause.SILENT if silent else Cause.LOST, detail=abandoned.reason)


def _verdict(cause: Cause | None, progress: Progress) -> Verdict:
    if cause is None:
        return Verdict.GOOD
    if cause is Cause.OVERDUE and progress.first_byte is None:
        # All that time and not a word: whatever it is busy with, it is not answering.
        return Verdict.BAD
    return CAUSES[cause].verdict
