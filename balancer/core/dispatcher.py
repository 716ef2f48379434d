"""The one place where routing state changes: events in, commands out. Pure.

`handle` is called synchronously, so in production the event loop is the lock; the property tests and the
simulator are its other callers. What it promises, after every event: nobody waits beside a worker that
should take them, no worker holds more than its slots (a limit that shrank apart, until it has drained),
and every ticket that arrived is granted or refused once, and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count, islice
from math import ceil, inf, log

from balancer.core import learning
from balancer.core.admission import AdmissionPolicy, WaitingLine
from balancer.core.batches import Assignment, BatchLine, BatchPolicy, Group, Planner, Service
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.choosing import SHORTLIST, Chance, Chooser, Chosen
from balancer.core.fleet import DRAINING, GUESSED_SECONDS, STUCK, UNHEARD, Fleet, Flight, Member, Reach
from balancer.core.forecast import Forecast
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Began,
    Candidate,
    Choice,
    Command,
    Condition,
    Draining,
    Ended,
    Endpoint,
    Event,
    Gone,
    Grant,
    Loading,
    Lost,
    ModelName,
    ModelOffer,
    Needs,
    Probe,
    Refusal,
    Refuse,
    Reported,
    Seen,
    ServiceClass,
    Standing,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import PlacementPolicy, expected_seconds

LEAST_RETRY_AFTER, LONGEST_RETRY_AFTER = 1.0, 60.0
LOOKS = 16
"""So many of a line are looked at when a worker has room that the first of them prefer to wait past."""
WAIT_SECONDS = 0.25
"""For so long the pace of the line is taken to stay."""
CALIBRATION_SECONDS = 1.0
CALIBRATION_PROMPT_TOKENS = (64, 512)
CALIBRATION_OUTPUT_TOKENS = 12
"""A prompt that takes about a second, as far as the prior is right, within these bounds (ROUTING 2, "Prior");
the first user may have to wait for it."""
FLOOR_AFTER_SECONDS = 10.0
"""Batch that has not waited for so long is not starved yet."""
FLOOR_HALF_LIFE_SECONDS = 60.0
"""How fast it is forgotten which class was given how much."""
AT_WORK_SECONDS = 5.0
"""A token that came no longer ago than this shows a worker that is busy, not dead."""
SILENT_SECONDS, SILENT_UNBEGUN_SECONDS = 5.0, 8.0
"""Beyond three times what was expected: an engine that says nothing for so long is stuck. The second: before
the first token of any of its answers."""
COPY_BELOW = 0.5
"""What waits for its model to be loaded is copied where it begins within this share of that time."""
FAILED_RETRY_SECONDS = 30.0
LONGEST_LOAD_RETRY_AFTER = 600.0
"""After a model that cannot be loaded, and at the longest after one that is being loaded: a load takes as
long as it takes, and who comes earlier is turned away again."""
SILENT_TOKENS = 5.0
"""Beyond that, so many times what a token is expected to take: a slow machine pauses for longer."""
BESIDE_A_LOAD = 4.0
"""So many times as long while the machine is loading another model, which takes its disk and processors."""
HEDGES_SAVED = 10
"""So many may be made at once, after a time without any."""
_WRITES = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """When a chat whose first token is late gets a second worker, and how seldom."""

    share: float = 0.05
    """At most so many copies for each chat that was given a worker."""
    factor: float = 2.0
    least_seconds: float = 1.0
    """Late: so many times the seconds that were expected, and no fewer than these."""


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    placement: PlacementPolicy = field(default_factory=PlacementPolicy)
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    batch: BatchPolicy = field(default_factory=BatchPolicy)
    hedge: HedgePolicy | None = None
    """None: a late first token is waited for."""
    settle_seconds: float = 5.0
    """So long after the start a model that nobody serves yet is waited for: the room is assembling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as dashboards and commands show it."""

    worker: Worker
    state: str
    """`ready`, what the worker says of itself (`loading`, `failed` ...), `draining`, `unknown` or `lost`."""
    detail: str
    breaker: Phase
    stuck: bool
    """It was found to say nothing, and gets nothing but probes until it has answered one."""
    running: int
    slots: int
    models: tuple[ModelName, ...]
    offers: tuple[ModelOffer, ...]
    """The same with all that is known of them, automatic names and aliases included."""
    success_rate: float
    average_seconds: float | None
    prefill_tokens_per_second: float | None
    """Learned, of its first model; None: nothing was measured yet, as below."""
    tokens_per_second: float | None
    """Of one answer that is written alone."""
    engine: str
    hardware: str
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    workers: tuple[WorkerView, ...]
    waiting: int
    waiting_batch: int
    """Of those who wait, the ones of class batch. (An answer that is to go on elsewhere waits among the
    interactive ones, whatever its class.)"""
    running: int
    models: Mapping[ModelName, tuple[ModelOffer, ...]]


def _asks_per_hedge(hedge: HedgePolicy | None) -> int:
    return ceil(1 / hedge.share) if hedge is not None and hedge.share > 0 else 0


class Dispatcher:
    def __init__(self, policy: DispatchPolicy, chance: Chance, *, started: float) -> None:
        self._policy = policy
        self._placing = policy.placement
        self._estimates = policy.placement.policy.estimates
        self._chance = chance
        self._settled_at = started + policy.settle_seconds
        self._fleet = Fleet(policy.breaker)
        self._forecast = Forecast()
        self._line = WaitingLine(policy.admission.max_waiting)
        self._plain_batch = WaitingLine(policy.admission.max_waiting_batch)
        """Class batch under a policy that does not estimate: papers mean nothing to it."""
        self._batch = BatchLine()
        self._planner = Planner(self._batch, self._fleet, self._forecast, policy.batch)
        self._chooser = Chooser(self._fleet, self._forecast, self._planner, policy.placement, chance)
        self._flights: dict[Ticket, Flight] = {}
        self._copies: dict[Ticket, Ticket] = {}
        """Of an ask that runs twice: by the first attempt's ticket the second's."""
        self._hedge = policy.hedge
        self._asks_per_hedge = _asks_per_hedge(policy.hedge)
        self._unhedged = 0
        """Chats that were given a worker and have not paid for a copy."""
        self._papers: dict[Ticket, Group] = {}
        """The group of each prompt of a batch that runs."""
        self._own_tickets = count(-1, -1)
        self._given = {ServiceClass.INTERACTIVE: 0.0, ServiceClass.BATCH: 0.0}
        """Tokens, decayed since `_given_at`."""
        self._given_at = started
        self._batch_waits_since: float | None = None
        self._next_place = -inf
        """When there will be a place in line for the next one that is turned away."""
        self._were_held: Set[Ticket] = frozenset()
        """Tickets whose answers did not grow, at the last tick, since their readers are slow."""
        self._in_the_way: list[Ticket] = []
        """Measurements that somebody's request would have to wait for."""
        self._waits: dict[tuple[Service, str | None, Reach], tuple[float, float]] = {}
        """When it was measured, and what `_seconds_each` was."""

    def adopt(self, policy: DispatchPolicy) -> None:
        """Decide by another policy from the next event on. Who waits or runs goes on doing so, and nothing
        that was learned is forgotten; breakers and the time to settle stay as they were made.

        Raises `ValueError` for a placement that estimates where the present one does not, or the other way
        round: what waits in one's line means nothing to the other."""
        if policy.placement.policy.estimates != self._estimates:
            raise ValueError("a policy that estimates and one that does not cannot take over from each other")
        self._policy = policy
        self._placing = policy.placement
        self._line.max_waiting = policy.admission.max_waiting
        self._plain_batch.max_waiting = policy.admission.max_waiting_batch
        self._planner.adopt(policy.batch)
        self._chooser.adopt(policy.placement)
        self._hedge = policy.hedge
        self._asks_per_hedge = _asks_per_hedge(policy.hedge)

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event, to be performed in order. `now`: seconds, never less than before."""
        commands = self._handle(event, now)
        if self._in_the_way:
            commands += [Abandon(ticket, "somebody waits") for ticket in self._in_the_way]
            self._in_the_way.clear()
        return commands

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case Began(ticket):
                return self._began(ticket, now)
            case Ended():
                version = self._fleet.version
                member = self._ended(event, now)
                if version != self._fleet.version:  # who is no longer well leaves those who wait to others
                    return self._place(None, now)
                return self._place([member] if member else [], now)
            case Arrived(ticket, ask):
                return self._arrived(ticket, ask, now)
            case Reported(worker_id, condition):
                return self._reported(worker_id, condition, now)
            case Tick(received, held):
                return self._tick(received, held, now)
            case Seen(worker):
                self._fleet.seen(worker)
                return self._refuse_hopeless(now) + self._place(None, now)
            case Draining(worker_id, on):
                if not self._fleet.drained(worker_id, on):
                    return []
                return self._place(None, now)
            case Gone(worker_id):
                self._fleet.gone(worker_id)
                self._batch.evict(worker_id)
                return self._refuse_hopeless(now) + self._place(None, now)
            case Lost(worker_id, reason, abandon):
                member = self._fleet.lost(worker_id, reason)
                self._batch.evict(worker_id)
                # A worker that is lost may have been the avoided one's only rival: look again.
                placed = self._refuse_hopeless(now) + self._place(None, now)
                if member is None or not abandon:
                    return placed
                return [Abandon(ticket, reason) for ticket in sorted(member.running)] + placed

    def snapshot(self, now: float) -> Snapshot:
        batch = self._waiting_batch
        return Snapshot(
            workers=tuple(_view(member, now) for member in self._fleet),
            waiting=len(self._line) + batch,
            waiting_batch=batch,
            running=sum(flight.kind != "probe" for flight in self._flights.values()),
            models=self._fleet.models(),
        )

    def is_at_work(self, worker_id: WorkerId, now: float) -> bool:
        """Tokens come from this worker: the best proof that it lives."""
        member = self._fleet.get(worker_id)
        return member is not None and bool(member.running) and now - member.last_byte < AT_WORK_SECONDS

    def serves(self, model: ModelName) -> bool:
        """Whether some worker of the room has this model, able or not to be asked now."""
        return self._fleet.knows(model)

    def has_worker(self, worker_id: WorkerId) -> bool:
        return self._fleet.get(worker_id) is not None

    def standing(self, ticket: Ticket, now: float) -> Standing | None:
        """How it stands with an ask, by the order of arrival in its class; None: it does not wait. Looks at
        the whole line: not for every token."""
        line = next((one for one in (self._line, self._batch, self._plain_batch) if ticket in one), None)
        if line is None:
            return None
        own = line.ask_of(ticket)
        service = own.needs.model, own.needs.endpoint
        before = sum(
            (ask.arrived, other) < (own.arrived, ticket)
            for other, ask in line.asks()
            if (ask.needs.model, ask.needs.endpoint) == service
        )
        seconds = self._seconds_each(own.needs, now) * (before + 1)
        return Standing(before + 1, seconds or None, self._fleet.loading(own.needs, now))

    def loading(self, ticket: Ticket, now: float) -> Loading | None:
        """How far the model is loaded that the holder of this ticket waits for; None: it is loaded."""
        flight = self._flights.get(ticket)
        if flight is None or ticket not in flight.member.awaiting:
            return None
        load = flight.member.loads[flight.offer.own_name]
        return Loading(flight.member.worker.id, load.progress, load.wait(now))

    # What happens

    def _arrived(self, ticket: Ticket, ask: Ask, now: float) -> list[Command]:
        refusal = self._hopeless(ask, now)
        if refusal is not None:
            return [self._refuse(ticket, ask, refusal, now)]
        if ask.service_class is ServiceClass.BATCH and ask.needs.kin is None:
            return self._arrived_batch(ticket, ask, now)
        # Those who wait were looked at when there last was news: they prefer to wait, or may not go there.
        if self._estimates or not self._line.has(ask.needs):
            grant = self._grant(ticket, ask, now, before=self._line.count(ask.needs))
            if grant is not None:
                return [grant]
        refusal = self._turned_away(ask, now)
        if refusal is not None:
            return [self._refuse_in_the_room(ticket, ask, refusal, now)]
        self._line.join(ticket, ask)
        return []

    def _turned_away(self, ask: Ask, now: float) -> Refusal | None:
        """Why it need not stand in line."""
        if self._fleet.comes_too_late(ask, now) is not None:
            return Refusal.MODEL_LOADING
        if ask.admitted:
            return None
        if self._line.is_full:
            return Refusal.QUEUE_FULL
        if now + self._expected_wait(ask, now) > ask.deadline:
            return Refusal.WOULD_WAIT_TOO_LONG
        return None

    def _arrived_batch(self, ticket: Ticket, ask: Ask, now: float) -> list[Command]:
        if self._waiting_batch >= self._policy.admission.max_waiting_batch and not ask.admitted:
            return [self._refuse(ticket, ask, Refusal.QUEUE_FULL, now)]
        if not self._estimates:
            self._plain_batch.join(ticket, ask)
            return self._place_line(self._plain_batch, now, only=ask.needs)
        group = self._batch.join(ticket, ask)
        members = [member for member in map(self._fleet.get, group.homes) if member is not None]
        if not members:
            able = self._planner.able(group.service, now).members
            members = list(able)
            if len(able) > SHORTLIST:  # some of many; the next tick looks at all of them
                first = int(self._chance.random() * len(able))
                members = [able[(first + step) % len(able)] for step in range(16)]
        return self._place_batch(members, now)

    def _began(self, ticket: Ticket, now: float) -> list[Command]:
        flight = self._flights.get(ticket)
        if flight is None or flight.first is not None:
            return []
        learning.begun(flight, self._forecast, now)
        return self._place([flight.member], now)

    def _ended(self, event: Ended, now: float) -> Member | None:
        """Whose room has changed; None: the ticket was in a line."""
        if self._leave(event.ticket) is not None:
            return None
        flight = self._flights.pop(event.ticket, None)
        if flight is None:
            return None
        if flight.of is not None:
            self._copies.pop(flight.of, None)
        member = flight.member
        was_closed, was_stuck = member.breaker.phase is Phase.CLOSED, member.breaker.stuck
        member.breaker = member.breaker.settled(event.ticket, event.verdict, now, silent=event.silent)
        if member.worker.fallback and not was_closed:
            self._fleet.forget_able()
        if event.verdict is Verdict.GOOD:
            learning.answered(flight, event.measures, self._forecast, now)
            member.answered()
        elif event.verdict is Verdict.BAD:
            member.failed(flight.ask)
        if event.verdict is not Verdict.GOOD:
            done = (flight.uncached if flight.first is not None else 0.0) + flight.tokens
            self._note_given(flight.ask, min(done - flight.given, 0.0), now)
        self._take_off(flight, now)
        if event.loading is not None:
            self._evict_unloaded(member, {flight.offer.own_name})
            member.cannot_wait(flight.offer.own_name, event.loading, now)
        if event.hold_seconds is not None:
            member.held_until = max(member.held_until, now + event.hold_seconds)
            self._fleet.forget_able()
        if event.unreachable and member.condition is not None and member.lost is None:
            member.lost = "could not be connected to"
            self._fleet.forget_able()
        is_closed = member.breaker.phase is Phase.CLOSED
        if was_closed != is_closed or was_stuck != member.breaker.stuck:
            self._fleet.forget_able()
        if was_closed and not is_closed:
            member.starts_slowly()
            self._batch.evict(member.worker.id)
        if event.verdict is not Verdict.UNKNOWN:
            seconds = max(event.measures.seconds - flight.load_seconds, 0.0) if event.measures else 0.0
            member.window.add(now, good=event.verdict is Verdict.GOOD, seconds=seconds)
        return member

    def _take_off(self, flight: Flight, now: float) -> None:
        """Its slot is free again."""
        self._fleet.gave_back(flight, now)
        group = self._papers.pop(flight.ticket, None)
        if group is not None:
            self._batch.ended(group, now)

    def _reported(self, worker_id: WorkerId, condition: Condition, now: float) -> list[Command]:
        member = self._fleet.get(worker_id)
        if member is None:
            return []
        room, unloaded = member.room, set(member.loads)
        has_turned = self._fleet.reported(worker_id, condition, now)
        self._evict_unloaded(member, member.loads.keys() - unloaded)
        if condition.ready:
            commands = self._calibrations(member, now)
        else:
            commands = []
            self._batch.evict(worker_id)
        if has_turned:
            return commands + self._refuse_hopeless(now) + self._place(None, now)
        return commands + (self._place([member], now) if member.room > room else [])

    def _evict_unloaded(self, member: Member, names: Set[ModelName]) -> None:
        """What it remembered with these models is gone."""
        if names:
            public = {offer.name for offer in member.offers if offer.own_name in names}
            self._batch.evict(member.worker.id, public)

    def _tick(self, received: Mapping[Ticket, int], held: Set[Ticket], now: float) -> list[Command]:
        for ticket, tokens in received.items():
            if (flight := self._flights.get(ticket)) is not None:
                learning.grown(flight, tokens, now)
        self._note_held(held, now)
        self._batch.tidy(now)
        self._forget_stale(now)
        commands: list[Command] = []
        for member in list(self._fleet):
            commands += self._silent(member, now)
            commands += self._recovery(member, now)
        commands += self._refuse_overdue(now) + self._refuse_hopeless(now) + self._place(None, now)
        commands += self._refuse_loading(now)
        if self._estimates:
            commands += self._copy_stragglers(now)
        if self._hedge is not None:
            commands += self._hedge_late(self._hedge, now)
        return commands

    def _note_held(self, held: Set[Ticket], now: float) -> None:
        """Of a flight that is held nothing is expected; from its end on its worker's silence counts anew."""
        for ticket in self._were_held - held:
            if (flight := self._flights.get(ticket)) is not None:
                flight.held = False
                flight.member.last_byte = now
        for ticket in held:
            if (flight := self._flights.get(ticket)) is not None:
                flight.held = flight.was_held = True
        self._were_held = held

    def _silent(self, member: Member, now: float) -> list[Command]:
        """Whether an engine is stuck: it has requests, and for much too long has said nothing on any."""
        if not member.running or member.lost is not None:
            return []
        awaiting = member.awaiting
        running = [one for one in member.running.values() if not one.held and one.ticket not in awaiting]
        if not running:
            return []
        first = running[0]
        begun = any(one.first is not None for one in running)
        speeds = member.speeds_of(first.offer)
        longest = max((one.uncached for one in running if one.first is None), default=0.0)
        chunk = min(longest, learning.PREFILL_CHUNK_TOKENS) / speeds.prefill_tokens_per_second
        quiet = now - max(member.last_byte, first.reading_from)
        patience = BESIDE_A_LOAD if member.is_loading else 1.0
        if begun:
            token = speeds.answering.at(member.load)
            stuck = quiet > patience * (SILENT_SECONDS + 3 * chunk + SILENT_TOKENS * token)
        else:
            known = speeds.answers > 0  # of its speed nothing is known before: only the whole time limits it
            expected = first.expected + (speeds.overhead_seconds or 0.0)
            late = now - first.reading_from > patience * (SILENT_UNBEGUN_SECONDS + 3 * expected)
            stuck = known and late and quiet > patience * (SILENT_UNBEGUN_SECONDS + 3 * chunk)
        if not stuck:
            return []
        if member.breaker.phase is not Phase.OPEN or not member.breaker.stuck:
            member.breaker = member.breaker.tripped(now)
        member.starts_slowly()
        self._fleet.forget_able()
        self._batch.evict(member.worker.id)
        # Whoever waits there for a model to be loaded waits for the machine, not for this engine.
        tickets = sorted(member.running.keys() - awaiting)
        return [Abandon(ticket, f"nothing came for {quiet:.0f} s") for ticket in tickets]

    def _forget_stale(self, now: float) -> None:
        """Of models that nobody asks for any more."""
        for service in [one for one, (at, _) in self._waits.items() if now - at > WAIT_SECONDS]:
            del self._waits[service]

    # Requests of our own

    def _recovery(self, member: Member, now: float) -> list[Command]:
        """A worker whose breaker has rested is tried with something that nobody waits for. A fallback is
        not: that would cost money, so that it is tried with what somebody wants of it."""
        if member.worker.fallback or member.breaker.phase is Phase.CLOSED or not member.breaker.admits(now):
            return []
        if member.unfit(now) is not None or member.room <= 0:
            return []
        tried_with = self._tried_with(member)
        if tried_with is None:
            return []
        load = member.loads.get(tried_with[0].own_name)
        if load is not None and load.begun:
            return []  # it would say no more than that it is loading
        probe = self._probe(member, *tried_with, now, 1, 1)
        member.breaker = member.breaker.sent(probe.ticket, now)
        return [probe]

    def _calibrations(self, member: Member, now: float) -> list[Command]:
        """A new machine is measured before anybody waits for it."""
        if (
            not member.calibrates
            or member.worker.fallback
            or member.unfit(now) is not None
            or member.room <= 0
        ):
            return []
        for offer in member.offers:
            name = offer.own_name
            if member.is_unloaded(offer) or any(
                one.offer.own_name == name for one in member.running.values()
            ):
                continue  # nobody asks for it, or somebody does, and shows how fast it is
            if name not in member.calibrated and _WRITES & offer.endpoints:
                member.calibrated.add(name)
                endpoint = next(one for one in Endpoint if one in _WRITES & offer.endpoints)
                least, most = CALIBRATION_PROMPT_TOKENS
                tokens = CALIBRATION_SECONDS * member.speeds_of(offer).prefill_tokens_per_second
                if offer.context_tokens is not None:
                    most = min(most, offer.context_tokens // 4)
                prompt = int(min(max(tokens, least), most))
                return [self._probe(member, offer, endpoint, now, prompt, CALIBRATION_OUTPUT_TOKENS)]
        return []

    def _tried_with(self, member: Member) -> tuple[ModelOffer, Endpoint] | None:
        """What a worker is to be tried with: what failed, else something else that it need not load first."""
        offers = sorted((offer for offer in member.offers if offer.failed is None), key=member.is_unloaded)
        for offer in offers:
            if member.failed_at is None or member.failed_at[0] != offer.name:
                continue
            if member.failed_at[1] in offer.endpoints and not member.is_unloaded(offer):
                return offer, member.failed_at[1]
        for offer in offers:
            for endpoint in Endpoint:
                if endpoint in offer.endpoints:
                    return offer, endpoint
        return None

    def _probe(
        self, member: Member, offer: ModelOffer, endpoint: Endpoint, now: float, prompt: int, output: int
    ) -> Probe:
        ticket = Ticket(next(self._own_tickets))
        ask = Ask(needs=Needs(model=offer.name, endpoint=endpoint), arrived=now, deadline=inf)
        line = member.line(offer, self._placing.social, self._placing.kappa)
        flight = Flight(
            ticket=ticket,
            ask=ask,
            member=member,
            offer=offer,
            sent=now,
            prompt=prompt,
            uncached=prompt,
            expected=expected_seconds(line, prompt, 0, now, full=False),
            output=output,
            kind="probe",
        )
        self._flights[ticket] = flight
        member.sent(flight)
        return Probe(
            ticket,
            member.worker,
            endpoint,
            offer.own_name,
            prompt_tokens=prompt,
            output_tokens=output,
            measures=prompt > 1,
        )

    # Placing

    def _place(self, members: Sequence[Member] | None, now: float) -> list[Command]:
        """Everything that can be given now; first what people wait for. `members`: where something may have
        changed; None: anywhere."""
        commands: list[Command] = []
        if members is None:
            self._chooser.forget_shortlists()
        changed = list(self._fleet) if members is None else members
        if self._batch_is_starved(now):
            commands += self._place_batch(changed, now, at_least_one=True)
        if len(self._line):
            commands += self._place_line(self._line, now, changed=members)
        if len(self._plain_batch):
            commands += self._place_line(self._plain_batch, now)
        if len(self._batch):
            commands += self._place_batch(changed, now)
        if commands and members is not None and len(self._line) and self._fleet.roomy:
            # Who would rather have waited for what was given away just now may take another one.
            commands += self._place_line(self._line, now)
        return commands

    def _place_line(
        self,
        line: WaitingLine,
        now: float,
        *,
        only: Needs | None = None,
        changed: Sequence[Member] | None = None,
    ) -> list[Command]:
        """Grants in turn, as far as there is room for each. Some may prefer to wait: a few behind them are
        looked at too."""
        commands: list[Command] = []
        declined: set[Ticket] = set()
        hopeless: set[Needs] = set()
        placed = True
        while placed and self._fleet.roomy:
            if changed is not None and not any(one.worker.id in self._fleet.roomy for one in changed):
                break
            placed = False
            for needs in line.needs() if only is None else [only]:
                if needs in hopeless:
                    continue
                grant = self._next_in(line, needs, now, declined, changed)
                if grant is None:
                    hopeless.add(needs)
                    continue
                commands.append(grant)
                placed = True
                break
        return commands

    def _next_in(
        self,
        line: WaitingLine,
        needs: Needs,
        now: float,
        declined: set[Ticket],
        changed: Sequence[Member] | None,
    ) -> Grant | None:
        last_first = line is self._line and self._is_overloaded(needs, now)
        in_turn = islice(line.in_turn(needs, self._tokens, last_first=last_first), LOOKS)
        for before, (ticket, ask) in enumerate(in_turn):
            if ticket in declined:
                continue
            if changed and self._estimates and self._chooser.prefers_waiting(ask, changed, now):
                declined.add(ticket)
                continue
            grant = self._grant(ticket, ask, now, also=changed, before=before)
            if grant is not None:
                line.turns.served(ask.client, self._tokens(ask))
                line.leave(ticket)
                return grant
            if not self._estimates:
                return None  # nobody has room: so it is for all who need the same
            declined.add(ticket)
        return None

    def _grant(
        self,
        ticket: Ticket,
        ask: Ask,
        now: float,
        also: Sequence[Member] | None = None,
        *,
        before: int = 0,
    ) -> Grant | None:
        """`before`: how many of those who need the same have their turn first."""

        def queued() -> float:
            return self._seconds_each(ask.needs, now) * (before + 1)

        chosen = self._chooser.choose(ask, now, also or (), queued)
        if chosen is None:
            return None
        if chosen.member.worker.fallback:
            chosen = _because(chosen, "no worker of the room is well")
        return self._launch(ticket, ask, chosen, now)

    def _fall_back(self, ticket: Ticket, ask: Ask, refusal: Refusal, now: float) -> Grant | None:
        """A fallback for who would be refused."""
        if ask.service_class is ServiceClass.BATCH:
            return None
        chosen = self._chooser.choose(ask, now, (), lambda: 0.0, outside=True)
        if chosen is None:
            return None
        return self._launch(ticket, ask, _because(chosen, _INSTEAD_OF[refusal]), now)

    def _launch(
        self,
        ticket: Ticket,
        ask: Ask,
        chosen: Chosen,
        now: float,
        *,
        group: Group | None = None,
        warm_tokens: float | None = None,
        of: Ticket | None = None,
    ) -> Grant:
        member = chosen.member
        offer = self._fleet.offers_of(ask.needs.model)[member.worker.id]
        kind = "warm" if warm_tokens is not None else "ask" if of is None else "copy"
        prompt = self._forecast.prompt_tokens(ask) if warm_tokens is None else warm_tokens
        sizes = self._forecast.sizes(ask.needs.model)
        flight = Flight(
            ticket=ticket,
            ask=ask,
            member=member,
            offer=offer,
            sent=now,
            prompt=prompt,
            uncached=max(chosen.uncached, 1.0),
            expected=_seconds_to_first(member, offer, chosen.uncached, now),
            output=1.0 if kind == "warm" else self._forecast.answer_tokens(ask),
            kind=kind,
            of=of,
            paper=group.number if group else None,
            prefix=len(group.blocks) * sizes.block_tokens() if group else 0.0,
        )
        self._flights[ticket] = flight
        if kind == "ask" and flight.is_interactive:
            self._unhedged = min(self._unhedged + 1, HEDGES_SAVED * self._asks_per_hedge)
        if group is not None:
            self._papers[ticket] = group
            self._batch.sent(group, member.worker.id)
        if of is not None:
            self._copies[of] = ticket
        breaker = member.breaker
        member.breaker = breaker.sent(ticket, now)
        if member.worker.fallback and member.breaker is not breaker:
            self._fleet.forget_able()
        self._in_the_way += [
            one.ticket for one in member.running.values() if one.kind == "probe" and one.prompt > 1
        ]
        member.sent(flight)
        if flight.cold:
            self._waits.clear()  # with one more that loads the model the line is shorter
        if kind != "warm" and not member.worker.fallback:
            self._forecast.settle(ask, member.worker.id, prompt)
        flight.given = flight.uncached + flight.output
        self._note_given(ask, flight.given, now)
        return Grant(
            ticket,
            member.worker,
            chosen.choice,
            model=offer.known_as,
            warm_chars=None if warm_tokens is None else int(warm_tokens / sizes.tokens_per_char),
            kin=offer.kin,
            copy_of=of,
        )

    # The batch class

    def _place_batch(
        self, members: Iterable[Member], now: float, *, at_least_one: bool = False
    ) -> list[Command]:
        """`at_least_one`: batch has had less than its share, and gets one slot although people chat."""
        commands: list[Command] = []
        for service in self._batch.services():
            able = self._planner.able(service, now).ids
            # Weighted random without replacement: the smallest of such keys is as likely as its weight's
            # share (Efraimidis and Spirakis, 2006).
            turns = [
                (self._batch_key(member, service), member.worker.id, member)
                for member in members
                if member.worker.id in able and self._planner.is_open(member, now, anyway=at_least_one)
            ]
            heapify(turns)
            while turns and self._batch.waits_for(service):
                _, _, member = heappop(turns)
                assignment = self._planner.work_for(member, service, now, anyway=at_least_one)
                if assignment is None:
                    continue
                commands.append(self._assign(assignment, member, [one for _, _, one in turns], now))
                if at_least_one:
                    return commands
                if self._planner.is_open(member, now):
                    heappush(turns, (self._batch_key(member, service), member.worker.id, member))
        return commands

    def _batch_key(self, member: Member, service: Service) -> float:
        return -log(1.0 - self._chance.random()) / self._batch_weight(member, service)

    def _batch_weight(self, member: Member, service: Service) -> float:
        """Fast workers are asked first what they could take, and among those the ones that have little."""
        speeds = member.speeds_of(self._fleet.offers_of(service[0])[member.worker.id])
        return member.reliability**2 * speeds.prefill_tokens_per_second / (1 + member.load)

    def _assign(
        self,
        assignment: Assignment,
        member: Member,
        others: Sequence[Member],
        now: float,
    ) -> Grant:
        """`others`: whose turn would have been later."""
        ask, ticket, warm = assignment.ask, assignment.ticket, assignment.warm_tokens
        offer = self._fleet.offers_of(ask.needs.model)[member.worker.id]
        cached = self._forecast.cached(ask, member, offer, None)
        tokens = self._forecast.prompt_tokens(ask) if warm is None else warm
        uncached = max(tokens - cached, 1.0)
        service = ask.needs.model, ask.needs.endpoint
        excluded = self._planner.able(service, now).excluded
        choice = Choice(
            worker_id=member.worker.id,
            candidates=tuple(
                Candidate(
                    worker_id=one.worker.id,
                    scores={},
                    weight=self._batch_weight(one, service),
                    cached_tokens=int(cached) if one is member else 0,
                )
                for one in (member, *others[: LOOKS - 1])
            ),
            excluded=excluded,
            because=assignment.because,
        )
        self._batch.turns.served(ask.client, uncached + (0.0 if warm else self._forecast.answer_tokens(ask)))
        self._batch.leave(ticket)
        chosen = Chosen(member, choice, uncached)
        return self._launch(ticket, ask, chosen, now, group=assignment.group, warm_tokens=warm)

    def _copy_stragglers(self, now: float) -> list[Command]:
        """What runs alone at the end of a batch, once more on workers that have nothing to do."""
        commands: list[Command] = []
        for service in sorted(self._batch.services_under_way()):
            stragglers = self._planner.stragglers(service, now)
            if not stragglers:
                continue
            offers = self._fleet.offers_of(service[0])
            for member in self._planner.able(service, now).members:
                while self._planner.is_open(member, now):
                    found = next(
                        (
                            flight
                            for left, flight in stragglers
                            if flight.ticket not in self._copies
                            and self._planner.worth_copying(
                                flight, left, member, offers[member.worker.id], now
                            )
                        ),
                        None,
                    )
                    if found is None:
                        break
                    because = f"a copy of what {found.member.worker.id} has"
                    commands.append(self._copy(found, member, now, because))
        return commands

    def _copy(self, flight: Flight, member: Member, now: float, because: str) -> Grant:
        ask = flight.ask
        offer = self._fleet.offers_of(ask.needs.model)[member.worker.id]
        uncached = self._forecast.prompt_tokens(ask) - self._forecast.cached(ask, member, offer, None)
        choice = Choice(worker_id=member.worker.id, candidates=(), because=because)
        chosen = Chosen(member, choice, uncached)
        ticket = Ticket(next(self._own_tickets))
        return self._launch(ticket, ask, chosen, now, group=self._papers.get(flight.ticket), of=flight.ticket)

    # Hedging

    def _hedge_late(self, policy: HedgePolicy, now: float) -> list[Command]:
        """A second worker for chats whose first token is late, as long as there are few of them."""
        commands: list[Command] = []
        for flight in [one for one in self._flights.values() if one.first is None]:
            if not self._asks_per_hedge or self._unhedged < self._asks_per_hedge:
                break
            if flight.kind != "ask" or not flight.is_interactive or flight.hedged:
                continue
            name = flight.member.worker.id
            if flight.ticket in flight.member.awaiting:
                left = flight.member.load_wait(flight.offer, now) + flight.expected
                if left <= policy.least_seconds:
                    continue
                within, because = COPY_BELOW * left, f"{name} has yet to load the model"
            else:
                within, because = now - flight.reading_from, f"{name} is late with its first token"
                if within <= max(policy.factor * flight.expected, policy.least_seconds):
                    continue
            member = self._idle_for(flight, within, now)
            if member is not None:
                self._unhedged -= self._asks_per_hedge
                flight.hedged = True
                commands.append(self._copy(flight, member, now, because))
        return commands

    def _idle_for(self, flight: Flight, within: float, now: float) -> Member | None:
        """Who has nothing to do and would be the first to begin this answer, if in so many seconds: what is
        late is taken to be as late again."""
        ask = flight.ask
        offers, forecast = self._fleet.offers_of(ask.needs.model), self._forecast
        tokens = forecast.prompt_tokens(ask)
        best, soonest = None, within
        for member in self._fleet.allowed(ask.needs, now)[0]:
            if member.load or member is flight.member or member.worker.id in ask.needs.avoid:
                continue
            offer = offers[member.worker.id]
            if member.worker.fallback or member.breaker.phase is not Phase.CLOSED:
                continue
            if member.is_unloaded(offer):
                continue
            if self._fleet.is_too_long(tokens, offer, ask.needs, now):
                continue
            uncached = max(tokens - forecast.cached(ask, member, offer, None), 1.0)
            seconds = _seconds_to_first(member, offer, uncached, now)
            if seconds <= soonest:
                best, soonest = member, seconds
        return best

    # Fairness to batch

    def _note_given(self, ask: Ask, tokens: float, now: float) -> None:
        faded = 0.5 ** ((now - self._given_at) / FLOOR_HALF_LIFE_SECONDS)
        for each in self._given:
            self._given[each] *= faded
        self._given_at = now
        self._given[ask.service_class] = max(self._given[ask.service_class] + tokens, 0.0)

    def _batch_is_starved(self, now: float) -> bool:
        if not len(self._batch):
            self._batch_waits_since = None
            return False
        if self._batch_waits_since is None:
            self._batch_waits_since = now
        if now - self._batch_waits_since < FLOOR_AFTER_SECONDS:
            return False
        total = sum(self._given.values())
        return self._given[ServiceClass.BATCH] < self._policy.batch.floor * total

    # Waiting and refusing

    def _is_overloaded(self, needs: Needs, now: float) -> bool:
        """Somebody has waited for long, and at the room's pace so would who comes now."""
        longest = self._policy.admission.overload_seconds
        if self._line.waited(needs, now) <= longest:
            return False
        return self._seconds_each(needs, now) * self._line.count(needs) > longest

    @property
    def _waiting_batch(self) -> int:
        return len(self._batch) + len(self._plain_batch)

    def _leave(self, ticket: Ticket) -> Ask | None:
        return self._line.leave(ticket) or self._batch.leave(ticket) or self._plain_batch.leave(ticket)

    def _tokens(self, ask: Ask) -> float:
        return self._forecast.prompt_tokens(ask) + self._forecast.answer_tokens(ask)

    def _hopeless(self, ask: Ask, now: float) -> Refusal | None:
        """Nobody in the room serves it, and nobody is still expected to tell that they do; or all that do
        say that they cannot."""
        if self._fleet.serves(ask.needs):
            return Refusal.MODEL_FAILED if self._fleet.failures(ask.needs) is not None else None
        if ask.needs.kin is not None:
            return Refusal.MODEL_AWAY  # its client reads already: nobody is waited for who may never come
        if now < self._settled_at or not self._fleet.all_heard:
            return None
        if not len(self._fleet):
            return Refusal.ROOM_EMPTY
        if self._fleet.has_fallback(ask.needs):
            return Refusal.LOCAL_ONLY
        if self._fleet.knows(ask.needs.model):
            return Refusal.ENDPOINT_NOT_SERVED
        return Refusal.MODEL_AWAY if self._fleet.reticent else Refusal.MODEL_NOT_FOUND

    def _refuse_hopeless(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for line in (self._line, self._plain_batch):
            for needs in line.needs():
                if not self._fleet.can_serve(needs):
                    commands += self._refuse_all(line.group(needs), line.ask_of, now)
        for service in self._batch.services():
            for local_only in (False, True):
                needs = Needs(model=service[0], endpoint=service[1], local_only=local_only)
                if self._fleet.can_serve(needs):
                    continue
                tickets = [
                    ticket
                    for ticket in self._batch.tickets(service)
                    if self._batch.ask_of(ticket).needs.local_only == local_only
                ]
                commands += self._refuse_all(tickets, self._batch.ask_of, now)
        return commands

    def _refuse_all(
        self, tickets: Iterable[Ticket], ask_of: Callable[[Ticket], Ask], now: float
    ) -> list[Command]:
        commands: list[Command] = []
        for ticket in tickets:
            ask = ask_of(ticket)
            refusal = self._hopeless(ask, now)
            if refusal is None:
                break
            commands.append(self._refuse(ticket, ask, refusal, now))
            self._leave(ticket)
        return commands

    def _refuse_overdue(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for line in (self._line, self._batch, self._plain_batch):
            for ticket in line.overdue(now):
                ask = line.ask_of(ticket)
                is_late = self._fleet.comes_too_late(ask, now) is not None
                refusal = Refusal.MODEL_LOADING if is_late else Refusal.WAITED_TOO_LONG
                self._leave(ticket)
                commands.append(self._refuse_in_the_room(ticket, ask, refusal, now))
        return commands

    def _refuse_loading(self, now: float) -> list[Command]:
        """Those who wait and for whom nobody will have the model in time, as is seen by now."""
        commands: list[Command] = []
        for needs in self._line.needs():
            if self._fleet.loading(needs, now) is None:
                continue
            for ticket in self._line.group(needs):
                ask = self._line.ask_of(ticket)
                if self._fleet.comes_too_late(ask, now) is not None:
                    self._leave(ticket)
                    commands.append(self._refuse_in_the_room(ticket, ask, Refusal.MODEL_LOADING, now))
        return commands

    def _refuse_in_the_room(self, ticket: Ticket, ask: Ask, refusal: Refusal, now: float) -> Command:
        """The room cannot serve it; a fallback may."""
        return self._fall_back(ticket, ask, refusal, now) or self._refuse(ticket, ask, refusal, now)

    def _refuse(self, ticket: Ticket, ask: Ask, refusal: Refusal, now: float) -> Refuse:
        return Refuse(
            ticket=ticket,
            refusal=refusal,
            models=tuple(self._fleet.models()),
            retry_after=self._retry_after(ask, refusal, now),
            loading=self._fleet.loading(ask.needs, now) if refusal is Refusal.MODEL_LOADING else None,
            detail=self._fleet.failures(ask.needs)
            or self._fleet.condition_of(ask.needs, now)
            or "; ".join(f"{member.worker.id}: {member.unfit(now)}" for member in self._fleet.reticent),
        )

    def _retry_after(self, ask: Ask, refusal: Refusal, now: float) -> float:
        """When the present line will have been worked off, at the room's measured pace; of who would have
        waited too long, when the line will be short enough. Those who are turned away one after the other
        are told to come one after the other."""
        if refusal is Refusal.MODEL_FAILED:
            return FAILED_RETRY_SECONDS
        if refusal is Refusal.MODEL_LOADING:
            loading = self._fleet.loading(ask.needs, now)
            left = GUESSED_SECONDS if loading is None else loading.eta_seconds or GUESSED_SECONDS
            return min(max(left, LEAST_RETRY_AFTER), LONGEST_LOAD_RETRY_AFTER)
        is_batch = ask.service_class is ServiceClass.BATCH
        waiting = self._waiting_batch if is_batch else len(self._line)
        each = self._pace([member for member in self._fleet if not member.worker.fallback], now)
        if each is None:
            return min(max(GUESSED_SECONDS, LEAST_RETRY_AFTER), LONGEST_RETRY_AFTER)
        wait = each * (waiting + 1)
        if refusal is Refusal.WOULD_WAIT_TOO_LONG:
            wait = self._expected_wait(ask, now) - (ask.deadline - now)
        if refusal in (Refusal.WOULD_WAIT_TOO_LONG, Refusal.QUEUE_FULL):
            self._next_place = max(self._next_place + each, now + wait)
            wait = self._next_place - now
        return min(max(wait, LEAST_RETRY_AFTER), LONGEST_RETRY_AFTER)

    def _expected_wait(self, ask: Ask, now: float) -> float:
        """Seconds until it would be this ask's turn; 0 while too little is known to say."""
        return self._seconds_each(ask.needs, now) * (self._line.count(ask.needs) + 1)

    def _seconds_each(self, needs: Needs, now: float) -> float:
        """By which each one in line makes those behind wait longer; 0 while too little is known to say."""
        if not self._fleet.knows(needs.model):
            return 0.0
        service = (needs.model, needs.endpoint), needs.kin, self._fleet.reach(needs)
        at, each = self._waits.get(service, (-inf, 0.0))
        if now - at > WAIT_SECONDS:
            each = self._pace(self._with_model(needs, now), now) or 0.0
            self._waits[service] = now, each
        return each

    def _with_model(self, needs: Needs, now: float) -> Sequence[Member]:
        """Those that are well and have the model or load it; all, where nobody does."""
        members = self._fleet.able_for(needs, now).members
        if not any(member.loads for member in members):
            return members
        offers = self._fleet.offers_of(needs.model)
        have = []
        for member in members:
            load = member.loads.get(offers[member.worker.id].own_name)
            if load is None or load.begun:
                have.append(member)
        return have or members

    def _pace(self, members: Sequence[Member], now: float) -> float | None:
        """Seconds in which these workers together take in one request; None: nothing was measured yet."""
        ready = [member for member in members if member.unfit(now) is None]
        for member in ready:
            member.window.fade(now)
        slots = sum(member.slots for member in ready)
        averages = [seconds for member in ready if (seconds := member.window.average_seconds) is not None]
        if not averages or not slots:
            return None
        return 1 / slots * sum(averages) / len(averages)


_INSTEAD_OF = {
    Refusal.QUEUE_FULL: "the waiting line is full",
    Refusal.WOULD_WAIT_TOO_LONG: "its turn in the room would come too late",
    Refusal.WAITED_TOO_LONG: "it has waited too long",
    Refusal.MODEL_LOADING: "the room will not have loaded the model in time",
}
"""What else would have been the answer to who is given a fallback."""


def _because(chosen: Chosen, because: str) -> Chosen:
    return replace(chosen, choice=replace(chosen.choice, because=because))


def _seconds_to_first(member: Member, offer: ModelOffer, uncached: float, now: float) -> float:
    """Until the first token of an answer that is asked for now."""
    speeds = member.speeds_of(offer)
    reading = member.backlog(now) + uncached / speeds.prefill_tokens_per_second
    return reading + speeds.answering.at(member.load + 1)


def _view(member: Member, now: float) -> WorkerView:
    member.window.fade(now)
    condition = member.condition
    if member.lost is not None:
        state, detail = "lost", member.lost
    elif condition is None:
        state, detail = "unknown", UNHEARD
    else:
        state, detail = condition.state, condition.detail
        if member.draining:
            state, detail = DRAINING, f"gets nothing new; {len(member.running)} of its requests still run"
        elif member.breaker.stuck:
            detail = f"{STUCK}: gets nothing until it has answered a probe"
    speeds = next((one for one in member.speeds.values() if one.answers), None)
    offers = member.offers
    return WorkerView(
        worker=member.worker,
        state=state,
        detail=detail,
        breaker=member.breaker.phase,
        stuck=member.breaker.stuck,
        running=len(member.running),
        slots=member.slots,
        models=tuple(offer.name for offer in offers if not offer.automatic),
        offers=offers,
        success_rate=member.window.success_rate,
        average_seconds=member.window.average_seconds,
        prefill_tokens_per_second=speeds.prefill_tokens_per_second if speeds else None,
        tokens_per_second=1 / speeds.writing.at(1) if speeds else None,
        engine=condition.engine if condition else "",
        hardware=condition.hardware if condition else "",
        advice=condition.advice if condition else (),
    )
