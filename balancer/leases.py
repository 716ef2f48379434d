"""Awaiting a slot on a worker and giving it back: the dispatcher's commands, performed.

Whoever leaves `acquire`, by return, error or cancellation, waiting or holding, gives back on one path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from balancer.core.dispatcher import Dispatcher, Snapshot
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Choice,
    Ended,
    Event,
    Grant,
    Measures,
    ModelName,
    Refuse,
    Tick,
    Ticket,
    Verdict,
    Worker,
)

TICK_SECONDS = 0.25
"""How late a refusal after too long a wait, or the end of a breaker's rest, may be noticed."""


class Refused(Exception):
    """The dispatcher turned an ask away."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__(refuse.refusal.value)
        self.refuse = refuse


class Abandoned(Exception):
    """The worker of a lease was lost while the lease was held; `Lease.lost` says why."""


@dataclass(slots=True)
class Lease:
    """A slot on a worker, held until its block ends."""

    worker: Worker
    choice: Choice
    lost: str = ""
    """Why the worker is lost, if it was while the lease was held."""
    _scope: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    _verdict: Verdict = Verdict.UNKNOWN
    _measures: Measures | None = None
    _unreachable: bool = False
    _hold_seconds: float | None = None

    def settle(
        self,
        verdict: Verdict,
        measures: Measures,
        *,
        unreachable: bool = False,
        hold_seconds: float | None = None,
    ) -> None:
        """Say how the attempt went. Left unsaid (the client left, say), nothing is learned of the worker."""
        self._verdict, self._measures = verdict, measures
        self._unreachable, self._hold_seconds = unreachable, hold_seconds

    def abandon(self, reason: str, now: float) -> None:
        """The worker is lost: ends the block of `held`. Once is enough."""
        if not self.lost:
            self.lost = reason
            self._scope.reschedule(now)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Raises `Abandoned` out of the block when the worker is lost meanwhile."""
        try:
            async with self._scope:
                yield
        except TimeoutError:
            if not self.lost:
                raise
            raise Abandoned(self.lost) from None

    def ended(self, ticket: Ticket) -> Ended:
        return Ended(
            ticket,
            Verdict.BAD if self.lost else self._verdict,
            self._measures,
            unreachable=self._unreachable,
            hold_seconds=self._hold_seconds,
        )


class Leases:
    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        """`clock`: the loop's own, monotonic, in seconds."""
        self._dispatcher = dispatcher
        self._clock = clock
        self._tickets = count(1)
        self._waiting: dict[Ticket, asyncio.Future[Grant | Refuse]] = {}
        self._held: dict[Ticket, Lease] = {}

    def tell(self, event: Event) -> None:
        """Something happened in the room; whatever follows is done before this returns."""
        for command in self._dispatcher.handle(event, self._clock()):
            match command:
                case Grant(ticket):
                    self._answer(ticket, command)
                case Refuse(ticket=ticket):
                    self._answer(ticket, command)
                case Abandon(ticket, reason):
                    if (lease := self._held.get(ticket)) is not None:
                        lease.abandon(reason, self._clock())

    def _answer(self, ticket: Ticket, answer: Grant | Refuse) -> None:
        future = self._waiting.get(ticket)
        if future is not None and not future.done():  # else its waiter is leaving, and says so with `Ended`
            future.set_result(answer)

    @asynccontextmanager
    async def acquire(self, ask: Ask) -> AsyncIterator[Lease]:
        """A slot on a worker, as soon as one that fits has room.

        Raises `Refused`; and out of the block, when the worker is lost meanwhile, `Abandoned`.
        """
        ticket = Ticket(next(self._tickets))
        answered: asyncio.Future[Grant | Refuse] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answered
        ended = Ended(ticket)
        try:
            self.tell(Arrived(ticket, ask))
            grant = await answered
            if isinstance(grant, Refuse):
                raise Refused(grant)
            lease = self._held[ticket] = Lease(grant.worker, grant.choice)
            try:
                async with lease.held():
                    yield lease
            finally:
                ended = lease.ended(ticket)
        finally:
            del self._waiting[ticket]
            self._held.pop(ticket, None)
            self.tell(ended)

    def tick(self) -> None:
        """Time has passed; call it every TICK_SECONDS."""
        self.tell(Tick())

    def serves(self, model: ModelName) -> bool:
        """Whether some worker of the room has this model."""
        return self._dispatcher.serves(model)

    def snapshot(self) -> Snapshot:
        return self._dispatcher.snapshot(self._clock())
