"""The one place where routing state changes: events in, commands out. Pure.

`handle` is called synchronously, so in production the event loop is the lock; the property tests and the
simulator are its other callers. What it promises, after every event: nobody waits beside a worker that
could take them, no worker holds more than its slots (a limit that shrank apart, until it has drained),
and every ticket that arrived is granted or refused once, and ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol

from balancer.core.admission import AdmissionPolicy, WaitingLine
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.fleet import Fleet, Member
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Choice,
    Command,
    Ended,
    Event,
    Gone,
    Grant,
    Lost,
    ModelName,
    ModelOffer,
    Refusal,
    Refuse,
    Reported,
    Seen,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import PlacementPolicy, pick, rate
from balancer.core.scorers import Standing

LEAST_RETRY_AFTER, LONGEST_RETRY_AFTER = 1.0, 60.0
GUESSED_SECONDS = 5.0
"""How long an answer is taken to last while none has been measured."""


class Chance(Protocol):
    """A seeded source of chance, such as `random.Random`."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    placement: PlacementPolicy = field(default_factory=PlacementPolicy)
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    settle_seconds: float = 5.0
    """So long after the start a model that nobody serves yet is waited for: the room is assembling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as dashboards and commands show it."""

    worker: Worker
    state: str
    """`ready`, what the worker says of itself (`loading`, `failed` ...), `unknown` or `lost`."""
    detail: str
    breaker: Phase
    running: int
    slots: int
    models: tuple[ModelName, ...]
    success_rate: float
    average_seconds: float | None
    engine: str
    hardware: str
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    workers: tuple[WorkerView, ...]
    waiting: int
    running: int
    models: Mapping[ModelName, tuple[ModelOffer, ...]]


class Dispatcher:
    def __init__(self, policy: DispatchPolicy, chance: Chance, *, started: float) -> None:
        self._policy = policy
        self._chance = chance
        self._settled_at = started + policy.settle_seconds
        self._fleet = Fleet(policy.breaker)
        self._line = WaitingLine(policy.admission)
        self._leases: dict[Ticket, Member] = {}

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event, to be performed in order. `now`: seconds, never less than before."""
        match event:
            case Arrived(ticket, ask):
                return self._arrived(ticket, ask, now)
            case Ended():
                self._ended(event, now)
                return self._place_waiting(now)
            case Seen(worker):
                self._fleet.seen(worker)
                return self._place_waiting(now)
            case Gone(worker_id):
                self._fleet.gone(worker_id)
                return self._refuse_hopeless(now) + self._place_waiting(now)
            case Reported(worker_id, condition):
                self._fleet.reported(worker_id, condition, now)
                return self._refuse_hopeless(now) + self._place_waiting(now)
            case Lost(worker_id, reason, abandon):
                member = self._fleet.lost(worker_id, reason)
                # A worker that is lost may have been the avoided one's only rival: look again.
                placed = self._refuse_hopeless(now) + self._place_waiting(now)
                if member is None or not abandon:
                    return placed
                return [Abandon(ticket, reason) for ticket in sorted(member.running)] + placed
            case Tick():
                return self._refuse_overdue(now) + self._refuse_hopeless(now) + self._place_waiting(now)

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            workers=tuple(_view(member, now) for member in self._fleet),
            waiting=len(self._line),
            running=len(self._leases),
            models=self._fleet.models(),
        )

    def serves(self, model: ModelName) -> bool:
        """Whether some worker of the room has this model, able or not to be asked now."""
        return self._fleet.knows(model)

    # Tickets

    def _arrived(self, ticket: Ticket, ask: Ask, now: float) -> list[Command]:
        refusal = self._hopeless(ask, now)
        if refusal is not None:
            return [self._refuse(ticket, ask, refusal, now)]
        if self._line.head(ask.needs) is None and (grant := self._grant(ticket, ask, now)):
            return [grant]
        if self._line.is_full and not ask.admitted:
            return [self._refuse(ticket, ask, Refusal.QUEUE_FULL, now)]
        self._line.join(ticket, ask)
        return []

    def _ended(self, event: Ended, now: float) -> None:
        if self._line.leave(event.ticket) is not None:
            return
        member = self._leases.pop(event.ticket, None)
        if member is None:
            return
        self._fleet.gave_back(member, event.ticket)
        member.breaker = member.breaker.settled(event.ticket, event.verdict, now)
        if event.hold_seconds is not None:
            member.held_until = max(member.held_until, now + event.hold_seconds)
        if event.unreachable and member.condition is not None and member.lost is None:
            member.lost = "could not be connected to"
        if event.verdict is not Verdict.UNKNOWN:
            seconds = event.measures.seconds if event.measures else 0.0
            member.window.add(now, good=event.verdict is Verdict.GOOD, seconds=seconds)

    # Placing

    def _place_waiting(self, now: float) -> list[Command]:
        """Grants in the order of arrival, as far as there is room for each."""
        commands: list[Command] = []
        heads = [(ask.arrived, ticket, ask) for ticket, ask in self._line.heads()]
        while heads:
            _, ticket, ask = heappop(heads)
            grant = self._grant(ticket, ask, now)
            if grant is None:
                continue  # and so for all who need the same
            self._line.leave(ticket)
            commands.append(grant)
            if (head := self._line.head(ask.needs)) is not None:
                heappush(heads, (head[1].arrived, *head))
        return commands

    def _grant(self, ticket: Ticket, ask: Ask, now: float) -> Grant | None:
        eligible = self._fleet.eligible(ask.needs, now)
        if not eligible.members:
            return None
        candidates = rate(_standings(eligible.members, now), self._policy.placement)
        picked = pick(candidates, self._chance.random())
        member = next(member for member in eligible.members if member.worker.id == picked.worker_id)
        member.running.add(ticket)
        member.breaker = member.breaker.sent(ticket, now)
        self._leases[ticket] = member
        choice = Choice(worker_id=picked.worker_id, candidates=candidates, excluded=eligible.excluded)
        return Grant(ticket, member.worker, choice)

    # Refusing

    def _hopeless(self, ask: Ask, now: float) -> Refusal | None:
        """Nobody in the room serves it, and nobody is still expected to tell that they do."""
        if self._fleet.serves(ask.needs):
            return None
        if now < self._settled_at or not self._fleet.all_heard:
            return None
        if not len(self._fleet):
            return Refusal.ROOM_EMPTY
        if self._fleet.knows(ask.needs.model):
            return Refusal.ENDPOINT_NOT_SERVED
        return Refusal.MODEL_AWAY if self._fleet.reticent else Refusal.MODEL_NOT_FOUND

    def _refuse_hopeless(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for needs in self._line.needs():
            if self._fleet.serves(needs):
                continue
            for ticket in self._line.group(needs):
                head = self._line.head(needs)
                if head is None or (refusal := self._hopeless(head[1], now)) is None:
                    break
                commands.append(self._refuse(ticket, head[1], refusal, now))
                self._line.leave(ticket)
        return commands

    def _refuse_overdue(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for ticket, ask in self._line.overdue(now):
            commands.append(self._refuse(ticket, ask, Refusal.WAITED_TOO_LONG, now))
            self._line.leave(ticket)
        return commands

    def _refuse(self, ticket: Ticket, ask: Ask, refusal: Refusal, now: float) -> Refuse:
        return Refuse(
            ticket=ticket,
            refusal=refusal,
            models=tuple(self._fleet.models()),
            retry_after=self._retry_after(now),
            detail=self._fleet.condition_of(ask.needs, now)
            or "; ".join(f"{member.worker.id}: {member.unfit(now)}" for member in self._fleet.reticent),
        )

    def _retry_after(self, now: float) -> float:
        """When the present line will have been worked off, at the room's measured pace."""
        ready = [member for member in self._fleet if member.unfit(now) is None]
        slots = sum(member.slots for member in ready)
        averages = [seconds for member in ready if (seconds := member.window.average_seconds) is not None]
        seconds = sum(averages) / len(averages) if averages else GUESSED_SECONDS
        rounds = (len(self._line) + 1) / slots if slots else 1.0
        return min(max(rounds * seconds, LEAST_RETRY_AFTER), LONGEST_RETRY_AFTER)


def _standings(members: tuple[Member, ...], now: float) -> dict[WorkerId, Standing]:
    for member in members:
        member.window.fade(now)
    averages = [seconds for member in members if (seconds := member.window.average_seconds) is not None]
    best = min(averages, default=None)
    return {
        member.worker.id: Standing(
            running=len(member.running),
            slots=member.slots,
            success_rate=member.window.success_rate,
            average_seconds=member.window.average_seconds,
            best_average_seconds=best,
        )
        for member in members
    }


def _view(member: Member, now: float) -> WorkerView:
    member.window.fade(now)
    condition = member.condition
    if member.lost is not None:
        state, detail = "lost", member.lost
    elif condition is None:
        state, detail = "unknown", "not heard of yet"
    else:
        state, detail = condition.state, condition.detail
    return WorkerView(
        worker=member.worker,
        state=state,
        detail=detail,
        breaker=member.breaker.phase,
        running=len(member.running),
        slots=member.slots,
        models=tuple(offer.name for offer in member.offers),
        success_rate=member.window.success_rate,
        average_seconds=member.window.average_seconds,
        engine=condition.engine if condition else "",
        hardware=condition.hardware if condition else "",
        advice=condition.advice if condition else (),
    )
