"""Which workers exist, how they are, what runs on them, and who may be given an ask. Pure.

The dispatcher owns one `Fleet` and is the only one to change it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
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
from balancer.core.loads import MOVED_SHARE, Load, learned
from balancer.core.model import (
    Ask,
    Condition,
    Endpoint,
    Loading,
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
UNHEARD = "not heard of yet"
NOT_NEEDED = "a fallback, and workers of the room are well"
ON_THEIR_WAY = frozenset({"starting", "loading"})
"""What a worker says of itself whose engine will serve shortly."""

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
    reading_from: float = field(init=False)
    """Since when its engine can have read its prompt: as soon as it was sent, or as the model was loaded."""
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
    cold: bool = False
    """Its model had to be loaded first: how long its first token took tells nothing of how fast it reads."""

    def __post_init__(self) -> None:
        self.reading_from = self.sent

    @property
    def load_seconds(self) -> float:
        """For which it waited until its model was loaded."""
        return self.reading_from - self.sent

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
    ready_at: float = -inf
    """While the model is being loaded: when it will be there. Else before all times."""
    cold: bool = False
    """The model is not loaded, and nobody loads it: that is in `fixed`."""


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
    """Those of them whose first token has not come, in the order in which they can be read."""
    awaiting: dict[Ticket, Flight] = field(default_factory=dict)
    """Those of them whose model is yet to be loaded. They are not among the pending ones: nothing is read."""
    loads: dict[ModelName, Load] = field(default_factory=dict)
    """What it serves and has not loaded, by what it calls the model."""
    load_seconds: dict[ModelName, float] = field(default_factory=dict)
    """What loading took, where it does not tell itself."""
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
        if self.worker.fallback:
            return tuple(public.values())
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

    def is_full(self, offer: ModelOffer) -> bool:
        """It takes nothing more for this model."""
        if self.room <= 0:
            return True
        if offer.slots is None or offer.slots >= self.slots:
            return False
        name = offer.own_name
        return sum(one.offer.own_name == name for one in self.running.values()) >= offer.slots

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
            return UNHEARD
        if not self.condition.ready:
            return self.condition.state
        if self.draining:
            return DRAINING
        if now < self.held_until:
            return ASKED_FOR_REST
        return None

    def is_coming(self, now: float) -> bool:
        """It can take nothing now and will before long: it starts, it asked for a moment's rest, or it is so
        new that nothing was heard of it."""
        if self.lost is not None or self.draining:
            return False
        if self.condition is None:
            return True
        if not self.condition.ready:
            return self.condition.state in ON_THEIR_WAY
        return now < self.held_until

    # What it has loaded

    def is_unloaded(self, offer: ModelOffer) -> bool:
        """The model is to be loaded before anything is read."""
        return offer.own_name in self.loads

    def load_wait(self, offer: ModelOffer, now: float) -> float:
        """Seconds until what is sent now can be read, as far as the model has to be loaded for it."""
        load = self.loads.get(offer.own_name) if self.loads else None
        return 0.0 if load is None else load.wait(now)

    @property
    def is_loading(self) -> bool:
        """Some model is being loaded there."""
        return any(load.begun for load in self.loads.values())

    def note_loads(self, now: float) -> bool:
        """What it has reported of its models being loaded. True: something new can be asked of it, or
        something not any more."""
        assert self.condition is not None
        models, tells = self.condition.models, self.condition.tells_loads
        if not self.loads and all(offer.loaded for offer in models):
            return False
        turned = moved = False
        told = {offer.own_name: offer for offer in models}
        for name, offer in told.items():
            load = self.loads.get(name)
            if offer.loaded or (not tells and self._answers_with(name)):
                if load is not None and (tells or now >= load.refused_until):
                    self.has_loaded(name, now)
                    turned = True
                continue
            if load is None:
                load = self.loads[name] = Load(offer.load_seconds)
                self._has_unloaded(name, now)
                turned = True
            was_begun = load.begun
            moved |= self._note_load(load, offer, now)
            turned |= was_begun != load.begun
        for name in self.loads.keys() - told.keys():
            if not self._waits_for(name):
                del self.loads[name]
        if turned or moved:
            self.changed()
        return turned

    def _note_load(self, load: Load, offer: ModelOffer, now: float) -> bool:
        """False: it changes nothing that was expected."""
        assert self.condition is not None
        tells, seconds = self.condition.tells_loads, offer.load_seconds
        if not tells:
            seconds = self.load_seconds.get(offer.own_name, seconds)
        changed = not offer.loading and abs(seconds - load.seconds) > MOVED_SHARE * load.seconds
        if changed:
            load.seconds = seconds
        load.progress = offer.progress
        if offer.loading or self._waits_for(offer.own_name):
            if tells or not load.begun:
                return load.expect(now + seconds, now) or changed
        elif load.begun and now >= load.refused_until:
            load.ready_at = None
            return True
        return changed

    def has_loaded(self, name: ModelName, now: float) -> None:
        """From now on it reads what it was sent for this model, and its silence counts anew."""
        if self.loads.pop(name, None) is None:
            return
        waited = [flight for flight in self.awaiting.values() if flight.offer.own_name == name]
        for flight in waited:
            del self.awaiting[flight.ticket]
            flight.reading_from = now
            self._is_to_be_read(flight, now)
        if waited:
            self.last_byte = max(self.last_byte, now)
        self.changed()

    def took_to_load(self, name: ModelName, seconds: float) -> None:
        """Somebody waited so long for this model."""
        self.load_seconds[name] = learned(self.load_seconds.get(name), seconds)

    def cannot_wait(self, name: ModelName, loading: Loading, now: float) -> None:
        """It loads this model, and has turned somebody away who could not wait so long."""
        load = self.loads.get(name)
        if load is None:
            load = self.loads[name] = Load(loading.eta_seconds or 0.0)
            self._has_unloaded(name, now)
        load.refused(loading.eta_seconds, now)
        load.progress = loading.progress
        self.changed()

    def _has_unloaded(self, name: ModelName, now: float) -> None:
        """What it remembered for this model is gone, and what it has not begun to answer waits."""
        self.remembers.pop(name, None)
        for flight in [one for one in self.pending.values() if one.offer.own_name == name]:
            self._is_read(flight, now)
            self._awaits(flight, now)

    def _answers_with(self, name: ModelName) -> bool:
        return any(one.first is not None and one.offer.own_name == name for one in self.running.values())

    def _waits_for(self, name: ModelName) -> bool:
        return any(one.offer.own_name == name for one in self.awaiting.values())

    def _awaits(self, flight: Flight, now: float) -> None:
        flight.cold = True
        self.awaiting[flight.ticket] = flight
        load = self.loads[flight.offer.own_name]
        if load.ready_at is None:
            load.ready_at = now + load.seconds

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
            (self._begins(one) + one.output * token for one in self.running.values()),
            default=None,
        )
        if free_at is None:  # full of what others sent, if at all
            free_at = self.last_change + (self.window.average_seconds or GUESSED_SECONDS)
        load = self.loads.get(offer.own_name)
        cold = load is not None and not load.begun
        return Line(
            fixed=token + (load.seconds if load and cold else 0.0) + (speeds.overhead_seconds or 0.0),
            per_uncached=per_token * (1 + disturbed),
            per_output=kappa * token + disturbed * slower,
            backlog_ends=backlog_ends,
            backlog_least=backlog_least,
            free_at=free_at,
            token_seconds=token,
            full=self.is_full(offer),
            # A model is not loaded to find out how fast it is.
            explored=load is not None or speeds.answers >= (1 if self.calibrates else NEW_AFTER_ANSWERS),
            ready_at=-inf if load is None or load.ready_at is None else load.ready_at,
            cold=cold,
        )

    def _begins(self, flight: Flight) -> float:
        """When its first token came, or is expected."""
        if flight.first is not None:
            return flight.first
        load = self.loads.get(flight.offer.own_name) if flight.ticket in self.awaiting else None
        start = flight.reading_from if load is None or load.ready_at is None else load.ready_at
        return start + flight.expected

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
        return max(flights[0].reading_from, self.last_first) + sum(seconds), 0.1 * seconds[-1]

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
        self.running[flight.ticket] = flight
        if flight.offer.own_name in self.loads:
            self._awaits(flight, flight.sent)
        else:
            self._is_to_be_read(flight, flight.sent)
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
            self.pause_until = now + READING_PAUSE * (now - max(flight.reading_from, self.last_first))
        flight.first = flight.grew = self.last_first = self.last_byte = now
        flight.read_before = self.read_for(now)
        self.changed()

    def read_for(self, now: float) -> float:
        """Seconds, in all, for which it has had prompts to read."""
        return self.read_seconds + (now - self.reading_since if self.pending else 0.0)

    def _is_to_be_read(self, flight: Flight, now: float) -> None:
        if not self.pending:
            self.reading_since = now
        self.pending[flight.ticket] = flight

    def _is_read(self, flight: Flight, now: float) -> None:
        if self.pending.pop(flight.ticket, None) is not None and not self.pending:
            self.read_seconds += now - self.reading_since

    def gave_back(self, flight: Flight, now: float) -> None:
        if self.running.pop(flight.ticket, None) is None:
            return
        self._is_read(flight, now)
        if self.awaiting.pop(flight.ticket, None) is not None:
            self._is_not_waited_for(flight.offer.own_name, now)
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

    def _is_not_waited_for(self, name: ModelName, now: float) -> None:
        """Where nobody else waits for it, it is not known whether the load goes on; who tells will."""
        load = self.loads.get(name)
        tells = self.condition is not None and self.condition.tells_loads
        if load is not None and not tells and now >= load.refused_until and not self._waits_for(name):
            load.ready_at = None

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


class Reach(Enum):
    """How far an ask may go."""

    ROOM = "room"
    """To workers of the room."""
    ROOM_FIRST = "room first"
    """To a fallback too, where no worker of the room is well."""
    OUTSIDE = "outside"
    """To fallbacks: the room has none for it."""


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
        self._able: dict[tuple[ModelName, Endpoint, str | None, Reach], Able] = {}
        self._fallbacks: set[WorkerId] = set()
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

    def reported(self, worker_id: WorkerId, condition: Condition, now: float) -> bool:
        """True: it may be asked for something else than before, or is to be looked at anew."""
        member = self._members.get(worker_id)
        if member is None:
            return False
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
        turned = member.note_loads(now)
        if before is None or not _lastingly_equal(before.models, condition.models):
            member.changed()
            self._index(worker_id)
            turned = True
        elif before.models != condition.models:
            self._note_offers(member)
        if before is None or was_lost or before.ready != condition.ready:
            self.forget_able()
            turned = True
        if before is not None and before.slots != condition.slots:
            member.changed()
        return turned

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
            and not member.worker.fallback
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
        """Somebody whom it may reach does what is needed, if not at this moment."""
        reach = self.reach(needs)
        return any(
            _does(offer, needs.endpoint, needs.kin) and _reaches(reach, worker_id in self._fallbacks)
            for worker_id, offer in self._by_model.get(needs.model, {}).items()
        )

    def failures(self, needs: Needs) -> str | None:
        """Where all that serve it say that they cannot: why, `studio: 9.3 GiB are needed, 6.0 are free`."""
        reach, told = self.reach(needs), []
        for worker_id, offer in self._by_model.get(needs.model, {}).items():
            if not _does(offer, needs.endpoint, needs.kin):
                continue
            if _reaches(reach, worker_id in self._fallbacks):
                if offer.failed is None:
                    return None
                told.append(f"{worker_id}: {offer.failed}")
        return "; ".join(told) or None

    def can_serve(self, needs: Needs) -> bool:
        """Somebody whom it may reach does what is needed, and has not said that they cannot at present."""
        return self.serves(needs) and self.failures(needs) is None

    def knows(self, model: ModelName) -> bool:
        return model in self._by_model

    def reach(self, needs: Needs, *, batch: bool = False) -> Reach:
        """How far it may go. A fallback costs money: what waits for whatever the room leaves goes there only
        where the room does not have the model at all. And what one began it does not go on with."""
        if not self._fallbacks or needs.local_only or needs.kin is not None:
            return Reach.ROOM
        if batch and self._is_in_the_room(needs.model, needs.endpoint):
            return Reach.ROOM
        return Reach.ROOM_FIRST

    def _is_in_the_room(self, model: ModelName, endpoint: Endpoint) -> bool:
        return any(
            endpoint in offer.endpoints and worker_id not in self._fallbacks
            for worker_id, offer in self._by_model.get(model, {}).items()
        )

    def able(
        self,
        model: ModelName,
        endpoint: Endpoint,
        now: float,
        kin: str | None = None,
        reach: Reach = Reach.ROOM,
    ) -> Able:
        """Who serves this and is well. Found once, and kept until something or the time changes it. `kin`:
        who can go on with an answer that a worker of that kin began."""
        if model not in self._by_model:
            return _NOBODY
        key = model, endpoint, kin, reach
        able = self._able.get(key)
        if able is None or now >= able.until:
            able = self._able[key] = self._find_able(model, endpoint, now, kin, reach)
        return able

    def able_for(self, needs: Needs, now: float, *, batch: bool = False) -> Able:
        """The same, as far as an ask may go."""
        return self.able(needs.model, needs.endpoint, now, needs.kin, self.reach(needs, batch=batch))

    def _find_able(
        self, model: ModelName, endpoint: Endpoint, now: float, kin: str | None, reach: Reach
    ) -> Able:
        excluded: dict[WorkerId, str] = {}
        until = inf
        well: list[Member] = []
        doubtful: list[Member] = []
        outside: list[Member] = []
        offers = self._by_model.get(model, {})
        is_coming = False
        for member in self._serving(model, endpoint, kin):
            is_fallback, breaker = member.worker.fallback, member.breaker
            if not _reaches(reach, is_fallback):
                continue
            reason = member.unfit(now) or offers[member.worker.id].failed
            if now < member.held_until:
                until = min(until, member.held_until)
            if is_fallback and reason is None and breaker.admits(now):
                outside.append(member)
            elif is_fallback:
                excluded[member.worker.id] = reason or f"breaker {breaker.phase}"
                until = min(until, breaker.retry_at) if breaker.phase is Phase.OPEN else until
            elif reason is None and breaker.phase is Phase.CLOSED:
                well.append(member)
            elif reason is None and not breaker.stuck:
                doubtful.append(member)
            else:
                excluded[member.worker.id] = reason or STUCK
                is_coming = is_coming or (not breaker.stuck and member.is_coming(now))
        if well or is_coming:
            excluded |= {member.worker.id: NOT_NEEDED for member in outside}
            outside = []
        # Where nobody else is left, those that fail are asked all the same: better a doubtful worker than
        # none (RELIABILITY D6, fail open). Who is stuck would only make people wait.
        for member in doubtful if well or outside else ():
            excluded[member.worker.id] = f"breaker {member.breaker.phase}"
        members = tuple(well or outside or doubtful)
        ids = frozenset(member.worker.id for member in members)
        return Able(members, ids, excluded, until)

    def allowed(
        self, needs: Needs, now: float, *, batch: bool = False
    ) -> tuple[Sequence[Member], Mapping[WorkerId, str]]:
        """Who may be given an ask now, room apart. Those who failed it before are asked again only where no
        other is well, were it only busy."""
        able = self.able_for(needs, now, batch=batch)
        if not needs.avoid:
            return able.members, able.excluded
        others = [member for member in able.members if member.worker.id not in needs.avoid]
        if not others and needs.failed_here and self.reach(needs, batch=batch) is Reach.ROOM_FIRST:
            others = self.outside(needs, now)
        if not others:
            return able.members, able.excluded
        failed = {
            member.worker.id: FAILED_BEFORE for member in able.members if member.worker.id in needs.avoid
        }
        return others, {**able.excluded, **failed}

    def outside(self, needs: Needs, now: float) -> list[Member]:
        """The fallbacks that may be given an ask for which the room has nobody."""
        if self.reach(needs) is Reach.ROOM:
            return []
        able = self.able(needs.model, needs.endpoint, now, needs.kin, Reach.OUTSIDE)
        return [member for member in able.members if member.worker.id not in needs.avoid]

    def has_fallback(self, needs: Needs) -> bool:
        """Somebody outside of the room serves it, whether it may go there or not."""
        offers = self._by_model.get(needs.model, {})
        return any(one in offers and needs.endpoint in offers[one].endpoints for one in self._fallbacks)

    def loading(self, needs: Needs, now: float, *, batch: bool = False) -> Loading | None:
        """Who of those that are well will have the model first; None: somebody has it, or nobody is well.
        Those that load it go before those that would have to be asked for it first."""
        offers = self.offers_of(needs.model)
        found: list[tuple[bool, float, Member, Load]] = []
        for member in self.able_for(needs, now, batch=batch).members:
            load = member.loads.get(offers[member.worker.id].own_name) if member.loads else None
            if load is None:
                return None
            found.append((not load.begun, load.wait(now), member, load))
        if not found:
            return None
        _, seconds, member, load = min(found, key=lambda one: one[:2])
        return Loading(member.worker.id, load.progress, seconds)

    def comes_too_late(self, ask: Ask, now: float) -> Loading | None:
        """Who will have the model first, where that is being loaded and nobody will have it in time."""
        loading = self.loading(ask.needs, now)
        if loading is None or now + (loading.eta_seconds or 0.0) <= ask.deadline:
            return None
        offers = self.offers_of(ask.needs.model)
        is_begun = False
        for member in self.able_for(ask.needs, now).members:
            load = member.loads[offers[member.worker.id].own_name]
            if now + load.wait(now) <= ask.deadline:
                return None
            is_begun = is_begun or load.begun
        return loading if is_begun else None

    def is_too_long(
        self, tokens: float, offer: ModelOffer, needs: Needs, now: float, *, batch: bool = False
    ) -> bool:
        """Such a prompt is longer than the context here, and another worker has a longer one."""
        own = offer.context_tokens
        if own is None or tokens <= CONTEXT_TOLERANCE * own:
            return False
        offers = self.offers_of(needs.model)
        return any(
            (other := offers[member.worker.id].context_tokens) is None or other > own
            for member in self.allowed(needs, now, batch=batch)[0]
        )

    def condition_of(self, needs: Needs, now: float) -> str:
        """For people: how the workers that serve this are, `studio: loading; mini: connection refused`."""
        offers, reach = self.offers_of(needs.model), self.reach(needs)
        told = []
        for member in self._serving(needs.model, needs.endpoint, needs.kin):
            if _reaches(reach, member.worker.fallback):
                reason = member.unfit(now) or offers[member.worker.id].failed or _hindrance(member)
                told.append(f"{member.worker.id}: {reason}")
        return "; ".join(told)

    def _serving(self, model: ModelName, endpoint: Endpoint, kin: str | None) -> list[Member]:
        return [
            self._members[worker_id]
            for worker_id, offer in self._by_model.get(model, {}).items()
            if _does(offer, endpoint, kin)
        ]

    def _index(self, worker_id: WorkerId) -> None:
        self.forget_able()
        self._fallbacks.discard(worker_id)
        for name in [name for name, offers in self._by_model.items() if worker_id in offers]:
            del self._by_model[name][worker_id]
            if not self._by_model[name]:
                del self._by_model[name]
        if member := self._members.get(worker_id):
            if member.worker.fallback:
                self._fallbacks.add(worker_id)
            for offer in member.offers:
                self._by_model.setdefault(offer.name, {})[worker_id] = offer

    def _note_offers(self, member: Member) -> None:
        """Its models are the same as before; how far they are loaded is not."""
        for offer in member.offers:
            self._by_model[offer.name][member.worker.id] = offer


def _lastingly_equal(before: Sequence[ModelOffer], after: Sequence[ModelOffer]) -> bool:
    """The same models, however far they are loaded."""
    if len(before) != len(after):
        return False
    return all(
        one == other or _lasting(one) == _lasting(other) for one, other in zip(before, after, strict=True)
    )


def _lasting(offer: ModelOffer) -> ModelOffer:
    return replace(offer, loaded=True, loading=False, load_seconds=0.0, progress=None)


def _reaches(reach: Reach, is_fallback: bool) -> bool:
    if is_fallback:
        return reach is not Reach.ROOM
    return reach is not Reach.OUTSIDE


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
    new.running, new.pending, new.awaiting = old.running, old.pending, old.awaiting
    new.loads = old.loads
    new.chats, new.memory_held, new.papers_in_use = old.chats, old.memory_held, old.papers_in_use
    new.read_seconds, new.reading_since = old.read_seconds, old.reading_since
    old.running, old.pending, old.awaiting, old.loads, old.roomy = {}, {}, {}, {}, set()
    for flight in new.running.values():
        flight.member = new
