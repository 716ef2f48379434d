"""Which workers exist, how they are, what runs on them, and who may be given an ask. Pure.

The dispatcher owns one `Fleet` and is the only one to change it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple

from balancer.core.breaker import Breaker, BreakerPolicy, Phase
from balancer.core.estimates import (
    NEW_AFTER_ANSWERS,
    LearnedLimit,
    Remembered,
    Speeds,
    Window,
    prior,
)
from balancer.core.model import (
    Ask,
    Condition,
    Endpoint,
    ModelName,
    ModelOffer,
    Needs,
    ServiceClass,
    Ticket,
    Worker,
    WorkerId,
)

FAILED_BEFORE = "failed this request before"
ASKED_FOR_REST = "asked to be left alone for a while"
DRAINING = "draining"
STUCK = "says nothing"

GUESSED_SECONDS = 5.0
"""How long an answer is taken to last while none has been measured."""
REMEMBERED_TOKENS = 64_000
"""How much of earlier prompts a worker is taken to remember while it does not say."""
READING_PAUSE = 0.2
"""While an engine reads a prompt its answers hardly grow: where people wait for some, batch prompts follow
each other with a pause of this share of the time that they take."""
CACHE_SAMPLE_TOKENS = 1024
CACHE_FORGETS, CACHE_HOLDS, LEAST_CACHE_SHARE = 0.95, 1.05, 0.05
"""An engine that has forgotten what it was taken to hold is trusted with a little less, and with each prompt
that it still held with a little more again."""
ANSWER_ROOM_TOKENS = 300
"""Memory for an answer, when it is checked whether a request fits beside the others."""
MEMORY_SHARE = 0.95
"""Of a worker's memory; the rest is for answers that grow longer than that."""
RELIABILITY_STEP = 0.2
LEAST_RELIABILITY = 0.01
"""So that a weight is never zero."""
REPORTS_COMPARED = 3
CONTEXT_TOLERANCE = 1.1
"""How wrong the estimate of a prompt's tokens may be before it counts as too long for a context."""
SLOW_START_SHARE = 1 / 8
SLOW_START_GROWTH = 1.5
"""After a failure a worker gets an eighth of its slots, half as many more with each answer (ROUTING 2)."""


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """One ask on one worker."""

    ticket: Ticket
    ask: Ask
    member: Member
    offer: ModelOffer
    sent: float
    prompt: float
    """Tokens of what was sent."""
    uncached: float
    """Of these, how many the engine is expected to have to compute."""
    expected: float
    """Seconds until the first token."""
    output: float
    """Tokens of the answer, as expected."""
    kind: str = "ask"
    """`ask`, `copy` (a second attempt at one that runs elsewhere), `warm` (a part of the prompt, for the
    engine to remember) or `probe`."""
    of: Ticket | None = None
    """Of a copy: the first attempt."""
    paper: int | None = None
    """The number of its group, for a prompt of a batch."""
    prefix: float = 0.0
    """Tokens that it has in common with its group."""
    streams: int = 1
    """On the worker at its start, itself included."""
    first: float | None = None
    read_before: float = 0.0
    """`Member.read_for` at that moment."""
    taught: float | None = None
    """By which factor its first token has changed what is known of the reading speed."""
    given: float = 0.0
    """Tokens of work that its class was charged for it."""
    tokens: int = 0
    """That have come until `grew`."""
    grew: float = 0.0
    held: bool = False
    """It does not grow since its reader is slow."""
    was_held: bool = False
    """It was, at some time: its pace tells nothing of its worker."""
    hedged: bool = False
    """It was late with its first token, and was given a second worker."""

    @property
    def is_interactive(self) -> bool:
        return self.ask.service_class is ServiceClass.INTERACTIVE

    @property
    def is_chat(self) -> bool:
        """Somebody waits for what it writes."""
        return self.is_interactive and self.kind in ("ask", "copy")


class Line(NamedTuple):
    """What an ask is expected to cost on one worker with one model, as a function of its tokens and the time:

    fixed + per_uncached * u + per_output * o + what is left of the backlog, and of the wait for room.
    """

    fixed: float
    per_uncached: float
    per_output: float
    backlog_ends: float
    backlog_least: float
    free_at: float
    """When the first of those that run is expected to end."""
    token_seconds: float
    full: bool
    explored: bool
    """Enough is known of it to believe this."""


@dataclass(slots=True, eq=False)
class Member:
    """One worker of the room and all that is known of it."""

    worker: Worker
    breaker: Breaker
    condition: Condition | None = None
    """As last reported; kept while the worker is lost, so that its models stay known."""
    lost: str | None = None
    """Why it does not answer; None: it does, or has not been heard of yet."""
    heard: bool = False
    """It has reported, or was found not to answer: from then on its silence about a model counts."""
    draining: bool = False
    """Somebody wants it to get nothing new."""
    held_until: float = -inf
    """It asked not to be asked before then (Retry-After)."""
    window: Window = field(default_factory=Window)
    running: dict[Ticket, Flight] = field(default_factory=dict)
    pending: dict[Ticket, Flight] = field(default_factory=dict)
    """Those of them whose first token has not come, in the order in which they were sent."""
    chats: int = 0
    """Those of them of class interactive."""
    external: int = 0
    """Requests that it holds and that did not come from here."""
    seen_beside: deque[int] = field(default_factory=lambda: deque(maxlen=REPORTS_COMPARED))
    """How many requests more its last reports told than run from here."""
    reliability: float = 1.0
    """Of late, 0 to 1: exponentially decayed share of good attempts."""
    caution: float = 1.0
    """The share of its slots that it may get; less than 1 after a failure."""
    learned_limit: LearnedLimit | None = None
    speeds: dict[ModelName, Speeds] = field(default_factory=dict)
    """By what the worker calls the model."""
    remembers: dict[ModelName, Remembered] = field(default_factory=dict)
    cache_share: dict[ModelName, float] = field(default_factory=dict)
    """Of what it is taken to remember, what proved true; 1 where nothing spoke against it."""
    memory_held: float = 0.0
    """Tokens that its requests hold in its memory, a prefix that several share counted once."""
    papers_in_use: dict[int, int] = field(default_factory=dict)
    """How many of its requests hold the prefix of which group."""
    last_byte: float = -inf
    last_first: float = -inf
    pause_until: float = -inf
    """Until then it reads nothing for class batch, so that the chats on it get on."""
    read_seconds: float = 0.0
    """In all, for which it has had prompts to read; until `reading_since`, while it has."""
    reading_since: float = 0.0
    last_picked: float = -inf
    last_chat: float = -inf
    """When it was given a request of class interactive."""
    last_change: float = -inf
    """Of what runs on it."""
    failed_at: tuple[ModelName, Endpoint] | None = None
    """What was asked of it when it failed last."""
    calibrated: set[ModelName] = field(default_factory=set)
    changes: int = 0
    """How often something has changed on it."""
    roomy: set[WorkerId] = field(default_factory=set)
    """The fleet's workers that have room, kept by each of them."""
    _lines: dict[ModelName, Line] = field(default_factory=dict)

    # What it offers

    @property
    def offers(self) -> tuple[ModelOffer, ...]:
        """What it serves: the models it is configured for, else all that it reports, each under its own
        name and under its aliases."""
        reported = self.condition.models if self.condition else ()
        if self.worker.only:
            known = {offer.name: offer for offer in reported}
            derived = [one for one in reported if one.known_as in self.worker.only]
            own = [known.get(name, ModelOffer(name=name)) for name in sorted(self.worker.only)]
            reported = (*own, *(one for one in derived if one.name not in self.worker.only))
        if not self.worker.aliases:
            return reported
        by_name = {offer.name: offer for offer in reported}
        public = {
            alias: replace(by_name[own], name=alias, known_as=by_name[own].own_name)
            for alias, own in self.worker.aliases
            if own in by_name
        }
        return (*(offer for offer in reported if offer.name not in public), *public.values())

    def speeds_of(self, offer: ModelOffer) -> Speeds:
        name = offer.own_name
        speeds = self.speeds.get(name)
        if speeds is None:
            condition = self.condition
            speeds = prior(condition.engine, condition.hardware) if condition else prior("", "")
            self.speeds[name] = speeds
        return speeds

    def remembered(self, offer: ModelOffer) -> Remembered:
        return self.remembers.setdefault(offer.own_name, Remembered())

    @property
    def shares_prefixes(self) -> bool:
        return self.condition is not None and self.condition.shares_prefixes

    def cache_tokens(self, offer: ModelOffer) -> float:
        """Of earlier prompts, what it can remember beside what runs."""
        share = self.cache_share.get(offer.own_name, 1.0)
        if offer.memory_tokens is not None:
            return share * max(offer.memory_tokens - ANSWER_ROOM_TOKENS * len(self.running), 0)
        return share * (REMEMBERED_TOKENS if offer.cache_tokens is None else offer.cache_tokens)

    def remembered_so_much(self, offer: ModelOffer, expected: float, found: float) -> None:
        """Of a prompt its engine had so many tokens in its cache, where so many were expected."""
        if expected < CACHE_SAMPLE_TOKENS:
            return
        name = offer.own_name
        step = CACHE_FORGETS if found < 0.25 * expected else CACHE_HOLDS
        self.cache_share[name] = min(max(self.cache_share.get(name, 1.0) * step, LEAST_CACHE_SHARE), 1.0)

    @property
    def calibrates(self) -> bool:
        return self.condition is not None and self.condition.calibrates

    # How much it takes

    @property
    def slots(self) -> int:
        own = self.condition.slots if self.condition else None
        base = int(self.limit.value) if own is None else own
        if self.worker.cap is not None:
            base = min(base, self.worker.cap)
        return max(int(base * self.caution), 1)

    @property
    def limit(self) -> LearnedLimit:
        """Learned, where the worker does not say; its cap is where it starts."""
        if self.learned_limit is None:
            cap = self.worker.cap
            self.learned_limit = LearnedLimit() if cap is None else LearnedLimit(float(cap))
        return self.learned_limit

    @property
    def load(self) -> int:
        return len(self.running) + self.external

    @property
    def room(self) -> int:
        return self.slots - self.load

    def fits(
        self, offer: ModelOffer, prompt: float, shared: float = 0.0, share: float = MEMORY_SHARE
    ) -> bool:
        """There is memory for such a prompt, `shared` tokens of which are held already by what runs."""
        if offer.memory_tokens is None or not self.running:
            return True
        return self.memory_held + prompt + ANSWER_ROOM_TOKENS - shared <= share * offer.memory_tokens

    def unfit(self, now: float) -> str | None:
        """Why it can take nothing now, its breaker and its room apart; None: it can."""
        if self.lost is not None:
            return self.lost
        if self.condition is None:
            return "not heard of yet"
        if not self.condition.ready:
            return self.condition.state
        if self.draining:
            return DRAINING
        if now < self.held_until:
            return ASKED_FOR_REST
        return None

    # What it costs

    def line(self, offer: ModelOffer, social: float, kappa: float) -> Line:
        """ROUTING 2, "Estimate", with what does not depend on the ask put together. Kept until something
        changes on the worker."""
        line = self._lines.get(offer.name)
        if line is None:
            line = self._lines[offer.name] = self._make_line(offer, social, kappa)
        return line

    def _make_line(self, offer: ModelOffer, social: float, kappa: float) -> Line:
        speeds = self.speeds_of(offer)
        streams = self.load
        token = speeds.answering.at(streams + 1)
        slower = max(token - speeds.answering.at(streams), 0.0)
        disturbed = social * kappa * self.chats
        per_token = 1 / speeds.prefill_tokens_per_second
        backlog_ends, backlog_least = self._reading()
        free_at = min(
            (
                (one.sent + one.expected if one.first is None else one.first) + one.output * token
                for one in self.running.values()
            ),
            default=None,
        )
        if free_at is None:  # full of what others sent, if at all
            free_at = self.last_change + (self.window.average_seconds or GUESSED_SECONDS)
        loading = 0.0 if offer.loaded else offer.load_seconds
        return Line(
            fixed=token + loading + (speeds.overhead_seconds or 0.0),
            per_uncached=per_token * (1 + disturbed),
            per_output=kappa * token + disturbed * slower,
            backlog_ends=backlog_ends,
            backlog_least=backlog_least,
            free_at=free_at,
            token_seconds=token,
            full=self.room <= 0,
            explored=speeds.answers >= (1 if self.calibrates else NEW_AFTER_ANSWERS),
        )

    def backlog(self, now: float) -> float:
        """Seconds until it has read all the prompts that it was sent; if it is late, as long again."""
        if not self.pending:
            return 0.0
        ends, least = self._reading()
        return max(abs(ends - now), least)

    def _reading(self) -> tuple[float, float]:
        """When it will have read all the prompts that it was sent, and the least that is taken to be left."""
        if not self.pending:
            return -inf, 0.0
        flights = list(self.pending.values())
        seconds = [one.uncached / self.speeds_of(one.offer).prefill_tokens_per_second for one in flights]
        return max(flights[0].sent, self.last_first) + sum(seconds), 0.1 * seconds[-1]

    def changed(self) -> None:
        """What was computed from its state is to be computed anew."""
        self._lines.clear()
        self.changes += 1
        if self.room > 0:
            self.roomy.add(self.worker.id)
        else:
            self.roomy.discard(self.worker.id)

    # What happens on it

    def sent(self, flight: Flight) -> None:
        self.memory_held += flight.prompt + ANSWER_ROOM_TOKENS - self._held_by_others(flight)
        if not self.pending:
            self.reading_since = flight.sent
        self.running[flight.ticket] = flight
        self.pending[flight.ticket] = flight
        if flight.is_chat:
            self.chats += 1
            self.last_chat = flight.sent
        flight.streams = self.load
        if flight.paper is not None:
            self.papers_in_use[flight.paper] = self.papers_in_use.get(flight.paper, 0) + 1
        if len(self.running) == 1:
            self.last_byte = flight.sent
        self.last_picked = self.last_change = flight.sent
        self.changed()

    def began(self, flight: Flight, now: float) -> None:
        """Its first token has come."""
        self._is_read(flight, now)
        if self.chats and not flight.is_interactive:
            self.pause_until = now + READING_PAUSE * (now - max(flight.sent, self.last_first))
        flight.first = flight.grew = self.last_first = self.last_byte = now
        flight.read_before = self.read_for(now)
        self.changed()

    def read_for(self, now: float) -> float:
        """Seconds, in all, for which it has had prompts to read."""
        return self.read_seconds + (now - self.reading_since if self.pending else 0.0)

    def _is_read(self, flight: Flight, now: float) -> None:
        if self.pending.pop(flight.ticket, None) is not None and not self.pending:
            self.read_seconds += now - self.reading_since

    def gave_back(self, flight: Flight, now: float) -> None:
        if self.running.pop(flight.ticket, None) is None:
            return
        self._is_read(flight, now)
        self.last_change = now
        self.chats -= flight.is_chat
        if flight.paper is not None:
            self.papers_in_use[flight.paper] -= 1
            if not self.papers_in_use[flight.paper]:
                del self.papers_in_use[flight.paper]
        self.memory_held -= flight.prompt + ANSWER_ROOM_TOKENS - self._held_by_others(flight)
        if not self.running:
            self.memory_held = 0.0  # what a group has in common may have become less meanwhile
        self.changed()

    def _held_by_others(self, flight: Flight) -> float:
        """Tokens of its prefix that do not count for it."""
        return flight.prefix if self.shares_prefixes and flight.paper in self.papers_in_use else 0.0

    def failed(self, ask: Ask) -> None:
        """An attempt at that said that something is wrong with it."""
        self.failed_at = ask.needs.model, ask.needs.endpoint
        self.reliability = max(self.reliability * (1 - RELIABILITY_STEP), LEAST_RELIABILITY)

    def answered(self) -> None:
        self.reliability += RELIABILITY_STEP * (1 - self.reliability)
        if self.caution < 1.0:
            self.caution = min(1.0, self.caution * SLOW_START_GROWTH)
            self.changed()

    def starts_slowly(self) -> None:
        """It was away: what it remembered is gone, and it shows first that it is well."""
        self.caution = SLOW_START_SHARE
        self.remembers.clear()
        self.changed()


@dataclass(frozen=True, slots=True)
class Able:
    """Who serves something and is well, room apart; and why each other one that serves it may not."""

    members: tuple[Member, ...]
    ids: frozenset[WorkerId]
    """Theirs."""
    excluded: Mapping[WorkerId, str]
    until: float
    """When time alone may change this."""


_NOBODY = Able((), frozenset(), {}, inf)


class Fleet:
    def __init__(self, breaker: BreakerPolicy) -> None:
        self._breaker = breaker
        self._members: dict[WorkerId, Member] = {}
        self._by_model: dict[ModelName, dict[WorkerId, ModelOffer]] = {}
        self._departed: dict[WorkerId, Member] = {}
        """Workers that left while something ran on them: should one come back, that counts."""
        self._able: dict[tuple[ModelName, Endpoint, str | None], Able] = {}
        self.roomy: set[WorkerId] = set()
        """Those with room, well or not."""
        self.version = 0
        """Grows whenever somebody's health or offer has changed."""

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, worker_id: WorkerId) -> Member | None:
        return self._members.get(worker_id)

    def seen(self, worker: Worker) -> None:
        """A new worker, or a new description of one: what was learned of it stays unless it moved."""
        member = self._members.get(worker.id)
        if member is None:
            departed = self._departed.pop(worker.id, None)
            member = Member(worker, Breaker(self._breaker), roomy=self.roomy)
            if departed is not None:
                _move_flights(departed, member)
            self._members[worker.id] = member
            member.changed()
        elif member.worker.url != worker.url or member.worker.type != worker.type:
            # Another address is another process, and possibly another machine: what was measured is void.
            # What it serves stays known until it is heard of again, lest those who wait for it be turned
            # away; what runs stays counted, since it is given back by worker id.
            moved = Member(
                worker,
                Breaker(self._breaker),
                condition=member.condition,
                lost="not heard of yet at its new address",
                heard=member.heard,
                draining=member.draining,
                roomy=self.roomy,
            )
            _move_flights(member, moved)
            self._members[worker.id] = moved
            moved.changed()
        else:
            if member.worker.cap != worker.cap:
                member.learned_limit = None
            member.worker = worker
            member.changed()
        self._index(worker.id)

    def gone(self, worker_id: WorkerId) -> None:
        member = self._members.pop(worker_id, None)
        if member is not None:
            member.roomy = set()
            self.roomy.discard(worker_id)
            self._index(worker_id)
            if member.running:
                self._departed[worker_id] = member

    def gave_back(self, flight: Flight, now: float) -> None:
        member = flight.member
        member.gave_back(flight, now)
        if not member.running and self._departed.get(member.worker.id) is member:
            del self._departed[member.worker.id]

    def reported(self, worker_id: WorkerId, condition: Condition, now: float) -> None:
        member = self._members.get(worker_id)
        if member is None:
            return
        before = member.condition
        if condition.ready and before is not None and not before.ready:
            member.breaker = member.breaker.returned(now)
        if member.lost is not None:
            member.breaker = member.breaker.returned(now)
            if before is not None and before.ready:
                member.starts_slowly()
        if not condition.ready and not condition.models and before is not None:
            # It loads, and says no more: what it served it will most likely serve again.
            condition = replace(condition, models=before.models)
        if before is not None and before.ready and not condition.ready:
            member.starts_slowly()  # its engine starts anew
        was_lost = member.lost is not None
        member.condition, member.lost, member.heard = condition, None, True
        external = 0
        if condition.running is not None:
            # Reports lag, so that what has just ended here still counts there: the least of a few is true.
            member.seen_beside.append(max(0, condition.running - len(member.running)))
            external = min(member.seen_beside) if len(member.seen_beside) == REPORTS_COMPARED else 0
        if external != member.external:
            member.external = external
            member.changed()
        if before is None or before.models != condition.models:
            member.changed()
            self._index(worker_id)
        elif was_lost or before.ready != condition.ready:
            self.forget_able()
        if before is not None and before.slots != condition.slots:
            member.changed()

    def lost(self, worker_id: WorkerId, reason: str) -> Member | None:
        member = self._members.get(worker_id)
        if member is not None:
            member.lost, member.heard = reason, True
            self.forget_able()
        return member

    def drained(self, worker_id: WorkerId, on: bool) -> bool:
        """It gets nothing new, or does again. False: nothing has changed, or there is no such worker."""
        member = self._members.get(worker_id)
        if member is None or member.draining == on:
            return False
        member.draining = on
        self.forget_able()
        return True

    def forget_able(self) -> None:
        """Somebody's health has changed."""
        self._able.clear()
        self.version += 1

    @property
    def all_heard(self) -> bool:
        """Each has reported, or was found not to answer: nobody's first word is still to be waited for."""
        return all(member.heard for member in self._members.values())

    @property
    def reticent(self) -> tuple[Member, ...]:
        """Those that do not answer, or load, and never said what they serve: it may be anything."""
        return tuple(
            member
            for member in self._members.values()
            if not member.offers
            and (member.lost is not None or member.condition is None or not member.condition.ready)
        )

    def models(self) -> dict[ModelName, tuple[ModelOffer, ...]]:
        """Each model that is served, by name, with one offer per worker that serves it. Automatic names are
        left out where they would only say another name again."""
        return {
            name: tuple(offers.values())
            for name, offers in sorted(self._by_model.items())
            if len({offer.known_as for offer in offers.values()}) > 1
            or not all(offer.automatic for offer in offers.values())
        }

    def offers_of(self, model: ModelName) -> Mapping[WorkerId, ModelOffer]:
        return self._by_model.get(model, {})

    def serves(self, needs: Needs) -> bool:
        """Somebody in the room does what is needed, if not at this moment."""
        offers = self._by_model.get(needs.model, {}).values()
        return any(_does(offer, needs.endpoint, needs.kin) for offer in offers)

    def knows(self, model: ModelName) -> bool:
        return model in self._by_model

    def able(self, model: ModelName, endpoint: Endpoint, now: float, kin: str | None = None) -> Able:
        """Who serves this and is well. Found once, and kept until something or the time changes it. `kin`:
        who can go on with an answer that a worker of that kin began."""
        if model not in self._by_model:
            return _NOBODY
        able = self._able.get((model, endpoint, kin))
        if able is None or now >= able.until:
            able = self._able[model, endpoint, kin] = self._find_able(model, endpoint, now, kin)
        return able

    def _find_able(self, model: ModelName, endpoint: Endpoint, now: float, kin: str | None) -> Able:
        excluded: dict[WorkerId, str] = {}
        until = inf
        well: list[Member] = []
        doubtful: list[Member] = []
        for member in self._serving(model, endpoint, kin):
            reason = member.unfit(now)
            if now < member.held_until:
                until = min(until, member.held_until)
            if reason is None and member.breaker.phase is Phase.CLOSED:
                well.append(member)
            elif reason is None and not member.breaker.stuck:
                doubtful.append(member)
            else:
                excluded[member.worker.id] = reason or STUCK
        # Where nobody else is left, those that fail are asked all the same: better a doubtful worker than
        # none (RELIABILITY D6, fail open). Who is stuck would only make people wait.
        for member in doubtful if well else ():
            excluded[member.worker.id] = f"breaker {member.breaker.phase}"
        members = tuple(well or doubtful)
        ids = frozenset(member.worker.id for member in members)
        return Able(members, ids, excluded, until)

    def allowed(self, needs: Needs, now: float) -> tuple[Sequence[Member], Mapping[WorkerId, str]]:
        """Who may be given an ask now, room apart. Those who failed it before are asked again only where no
        other is well, were it only busy."""
        able = self.able(needs.model, needs.endpoint, now, needs.kin)
        if not needs.avoid:
            return able.members, able.excluded
        others = [member for member in able.members if member.worker.id not in needs.avoid]
        if not others:
            return able.members, able.excluded
        failed = {
            member.worker.id: FAILED_BEFORE for member in able.members if member.worker.id in needs.avoid
        }
        return others, {**able.excluded, **failed}

    def is_too_long(self, tokens: float, offer: ModelOffer, needs: Needs, now: float) -> bool:
        """Such a prompt is longer than the context here, and another worker has a longer one."""
        own = offer.context_tokens
        if own is None or tokens <= CONTEXT_TOLERANCE * own:
            return False
        offers = self.offers_of(needs.model)
        return any(
            (other := offers[member.worker.id].context_tokens) is None or other > own
            for member in self.allowed(needs, now)[0]
        )

    def condition_of(self, needs: Needs, now: float) -> str:
        """For people: how the workers that serve this are, `studio: loading; mini: connection refused`."""
        told = []
        for member in self._serving(needs.model, needs.endpoint, needs.kin):
            told.append(f"{member.worker.id}: {member.unfit(now) or _hindrance(member)}")
        return "; ".join(told)

    def _serving(self, model: ModelName, endpoint: Endpoint, kin: str | None) -> list[Member]:
        return [
            self._members[worker_id]
            for worker_id, offer in self._by_model.get(model, {}).items()
            if _does(offer, endpoint, kin)
        ]

    def _index(self, worker_id: WorkerId) -> None:
        self.forget_able()
        for name in [name for name, offers in self._by_model.items() if worker_id in offers]:
            del self._by_model[name][worker_id]
            if not self._by_model[name]:
                del self._by_model[name]
        if member := self._members.get(worker_id):
            for offer in member.offers:
                self._by_model.setdefault(offer.name, {})[worker_id] = offer


def _does(offer: ModelOffer, endpoint: Endpoint, kin: str | None) -> bool:
    if endpoint not in offer.endpoints:
        return False
    if kin is None:
        return True
    return offer.kin == kin and (offer.continues is not False or endpoint is not Endpoint.CHAT)


def _hindrance(member: Member) -> str:
    """Why one that is fit takes nothing now."""
    if member.breaker.stuck:
        return STUCK
    return "busy" if member.room <= 0 else f"breaker {member.breaker.phase}"


def _move_flights(old: Member, new: Member) -> None:
    new.running, new.pending = old.running, old.pending
    new.chats, new.memory_held, new.papers_in_use = old.chats, old.memory_held, old.papers_in_use
    new.read_seconds, new.reading_since = old.read_seconds, old.reading_since
    old.running, old.pending, old.roomy = {}, {}, set()
    for flight in new.running.values():
        flight.member = new
