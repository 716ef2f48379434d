"""Awaiting a slot on a worker and giving it back: the dispatcher's commands, performed.

Whoever leaves `acquire`, by return, error or cancellation, waiting or holding, gives back on one path. What
the dispatcher wants to know of a worker for itself is asked here too, in tasks that end with the block.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count
from types import TracebackType
from typing import Protocol, Self

from balancer.core.dispatcher import Dispatcher, Snapshot
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Began,
    Choice,
    Command,
    Ended,
    Event,
    Gone,
    Grant,
    Loading,
    Lost,
    Measures,
    ModelName,
    Probe,
    Refuse,
    Standing,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""How late a refusal after too long a wait, or the end of a breaker's rest, may be noticed."""

STOOD_STILL_SECONDS = 1.0
"""A tick that is so late shows an event loop that stood still."""


class Refused(Exception):
    """The dispatcher turned an ask away."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__(refuse.refusal.value)
        self.refuse = refuse


class Stop(Enum):
    """Why an attempt is ended from outside."""

    LOST = "lost"
    """Nothing is heard of its worker."""
    SILENT = "silent"
    """Its worker is there, but says nothing more of this answer."""
    OUTRUN = "outrun"
    """Another attempt at the same ask has answered."""


class Abandoned(Exception):
    """An attempt was ended from outside; `reason` is for people."""

    def __init__(self, stop: Stop, reason: str) -> None:
        super().__init__(reason)
        self.stop = stop
        self.reason = reason


class Answer(Protocol):
    """What grows while a lease is held."""

    @property
    def tokens(self) -> int:
        """That have come until now."""
        ...

    @property
    def held(self) -> bool:
        """It does not grow since its reader is slow."""
        ...


@dataclass(slots=True, eq=False)
class Lease:
    """A slot on a worker, held until it is given back."""

    grant: Grant
    _tell: Callable[[Event], None]
    _give_back: Callable[[Lease], None]
    answer: Answer | None = None
    """Watched, once it is set: the dispatcher is told how it grows."""
    on_copy: Callable[[Lease], None] | None = None
    """Who takes a second slot for the same ask, and gives it back; None: there is no use for one."""
    on_begun: Callable[[Lease], None] | None = None
    """Who is told when the answer begins."""
    stopped: Stop | None = None
    _reason: str = ""
    _block: _Held | None = None
    _settled: Ended | None = None
    _told: int = 0

    @property
    def worker(self) -> Worker:
        return self.grant.worker

    @property
    def choice(self) -> Choice:
        return self.grant.choice

    def begin(self) -> bool:
        """The first token has come. False: it comes too late, another attempt has answered."""
        if self.stopped is not None:
            return False
        self._tell(Began(self.grant.ticket))
        if self.on_begun is not None:
            self.on_begun(self)
        return True

    def settle(
        self,
        verdict: Verdict,
        measures: Measures,
        *,
        unreachable: bool = False,
        hold_seconds: float | None = None,
        silent: bool = False,
        loading: Loading | None = None,
    ) -> None:
        """Say how the attempt went. Left unsaid (the client left, say), nothing is learned of the worker."""
        self._settled = Ended(
            self.grant.ticket, verdict, measures, unreachable, hold_seconds, silent, loading
        )

    def give_back(self) -> None:
        """The slot is free for others. Happens once, however often it is called."""
        self._give_back(self)

    def stop(self, stop: Stop, reason: str = "") -> None:
        """Ends the block of `held`, now or as soon as it begins. The first reason counts."""
        if self.stopped is None:
            self.stopped, self._reason = stop, reason
            if self._block is not None:
                self._block.end()

    def held(self) -> _Held:
        """For an `async with`. Raises `Abandoned`, out of the block too, when the attempt is ended from
        outside."""
        return _Held(self)

    def grown(self) -> int | None:
        """Tokens that have come; None: no more than when this was last asked."""
        tokens = self.answer.tokens if self.answer is not None else 0
        if tokens <= self._told:
            return None
        self._told = tokens
        return tokens

    def ended(self) -> Ended:
        return self._settled or Ended(
            self.grant.ticket,
            Verdict.BAD if self.stopped in (Stop.LOST, Stop.SILENT) else Verdict.UNKNOWN,
        )


class _Held:
    """The block of an attempt, which can be ended from outside. Works as `asyncio.timeout` does, without a
    timer."""

    __slots__ = ("_cancelling", "_ended", "_lease", "_task")

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ended = False

    async def __aenter__(self) -> None:
        lease = self._lease
        if lease.stopped is not None:
            raise Abandoned(lease.stopped, lease._reason)
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        lease._block = self

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease = self._lease
        lease._block = None
        if not self._ended or lease.stopped is None:
            return
        # Somebody else may have cancelled the task as well: that goes before.
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise Abandoned(lease.stopped, lease._reason) from None


class _Acquired:
    """A place in line, then a slot: what `Leases.acquire` gives."""

    __slots__ = ("_ask", "_entered", "_leases", "_ticket")

    def __init__(self, leases: Leases, ask: Ask, entered: Callable[[Ticket], None]) -> None:
        self._leases = leases
        self._ask = ask
        self._entered = entered
        self._ticket = Ticket(next(leases._tickets))

    async def __aenter__(self) -> Lease:
        self._entered(self._ticket)
        return await self._leases._enter(self._ticket, self._ask)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases._leave(self._ticket)


class Leases:
    """Use it as an asynchronous context manager: leaving the block ends the probes that are under way."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        clock: Callable[[], float],
        probe: Callable[[Probe], Awaitable[Ended]],
    ) -> None:
        """`clock`: the loop's own, monotonic, in seconds. `probe`: performs one, and says how it went."""
        self._dispatcher = dispatcher
        self._clock = clock
        self._probe = probe
        self._tickets = count(1)
        self._waiting: dict[Ticket, asyncio.Future[Lease | Refuse]] = {}
        self._held: dict[Ticket, Lease] = {}
        self._probes: dict[Ticket, asyncio.Future[Ended]] = {}
        self._closing = False
        self._ticked = clock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)

    def tell(self, event: Event) -> None:
        """Something happened in the room; whatever follows is done before this returns."""
        events = deque([event])
        while events:
            event = events.popleft()
            for command in self._dispatcher.handle(event, self._clock()):
                events.extend(self._perform(command, event))

    def _perform(self, command: Command, because_of: Event) -> list[Event]:
        """Gives what is to be told at once."""
        match command:
            case Grant(copy_of=None):
                self._hand_over(command)
            case Grant():
                return self._hand_over_copy(command)
            case Refuse(ticket=ticket):
                self._answer(ticket, command)
            case Abandon(ticket, reason):
                if (probe := self._probes.get(ticket)) is not None:
                    probe.cancel()
                elif (lease := self._held.get(ticket)) is not None:
                    # Else the dispatcher itself has found that nothing comes.
                    told = isinstance(because_of, Lost | Gone)
                    lease.stop(Stop.LOST if told else Stop.SILENT, reason)
            case Probe() if not self._closing:
                self._start(command)
        return []

    # Slots for those who wait

    def _hand_over(self, grant: Grant) -> None:
        if grant.ticket in self._waiting:  # else its waiter is leaving, and says so with `Ended`
            self._answer(grant.ticket, self._lease(grant))

    def _answer(self, ticket: Ticket, answer: Lease | Refuse) -> None:
        future = self._waiting.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def _lease(self, grant: Grant) -> Lease:
        lease = self._held[grant.ticket] = Lease(grant, self.tell, self._end_lease)
        return lease

    def _hand_over_copy(self, grant: Grant) -> list[Event]:
        original = self._held.get(grant.copy_of) if grant.copy_of is not None else None
        if original is None or original.on_copy is None:
            return [Ended(grant.ticket)]
        original.on_copy(self._lease(grant))
        return []

    def acquire(self, ask: Ask, entered: Callable[[Ticket], None] = lambda _: None) -> _Acquired:
        """For an `async with`: a slot on a worker, as soon as one that fits has room; given back with the
        block at the latest. `entered` is told the ticket by which `standing` says how long that may take.

        Entering it raises `Refused`.
        """
        return _Acquired(self, ask, entered)

    async def _enter(self, ticket: Ticket, ask: Ask) -> Lease:
        answered: asyncio.Future[Lease | Refuse] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answered
        try:
            self.tell(Arrived(ticket, ask))
            answer = await answered
            if isinstance(answer, Refuse):
                raise Refused(answer)
        except BaseException:
            self._leave(ticket)
            raise
        return answer

    def _leave(self, ticket: Ticket) -> None:
        if self._waiting.pop(ticket, None) is not None:
            self.tell(Ended(ticket))
        elif (lease := self._held.get(ticket)) is not None:
            self._end_lease(lease)

    def _end_lease(self, lease: Lease) -> None:
        if self._held.pop(lease.grant.ticket, None) is not None:
            self.tell(lease.ended())

    # Probes

    def _start(self, probe: Probe) -> None:
        task = asyncio.ensure_future(self._probe(probe))
        self._probes[probe.ticket] = task
        # Not in the task itself: one that is cancelled before it begins runs no line.
        task.add_done_callback(partial(self._probed, probe))

    def _probed(self, probe: Probe, task: asyncio.Future[Ended]) -> None:
        del self._probes[probe.ticket]
        if task.cancelled():
            # What was to be measured may be left; what should show that a worker is well has not.
            self.tell(
                Ended(probe.ticket, Verdict.UNKNOWN if probe.measures or self._closing else Verdict.BAD)
            )
        elif (defect := task.exception()) is not None:
            log.error("a defect of the balancer, in probing %s", probe.worker.id, exc_info=defect)
            self.tell(Ended(probe.ticket, Verdict.BAD))  # lest it is probed again at once, and so for ever
        else:
            self.tell(task.result())

    # The room

    def tick(self) -> None:
        """Time has passed; call it every TICK_SECONDS."""
        before, self._ticked = self._ticked, self._clock()
        if self._ticked - before > STOOD_STILL_SECONDS:
            return  # what came meanwhile is yet to be read: nobody was silent but we
        grown = ((ticket, lease.grown()) for ticket, lease in self._held.items())
        held = frozenset(
            ticket for ticket, lease in self._held.items() if lease.answer is not None and lease.answer.held
        )
        self.tell(Tick({ticket: tokens for ticket, tokens in grown if tokens is not None}, held))

    def standing(self, ticket: Ticket) -> Standing | None:
        """How it stands with an ask that waits; None: it does not wait (any more)."""
        return self._dispatcher.standing(ticket, self._clock())

    def loading(self, ticket: Ticket) -> Loading | None:
        """How far the model is loaded that the holder of this slot waits for; None: it is loaded."""
        return self._dispatcher.loading(ticket, self._clock())

    def is_at_work(self, worker_id: WorkerId) -> bool:
        """Tokens come from this worker: the best proof that it lives."""
        return self._dispatcher.is_at_work(worker_id, self._clock())

    def serves(self, model: ModelName) -> bool:
        """Whether some worker of the room has this model."""
        return self._dispatcher.serves(model)

    def snapshot(self) -> Snapshot:
        return self._dispatcher.snapshot(self._clock())
