"""A room that is full and is kept full, on virtual time: the dispatcher is told what production tells it,
and what it commands is done. Its calls are timed on the real clock; that apart, all of it is determined by
the seed.

Engines are simple ones: a worker reads one prompt after the other at its pace, and writes each answer at
another. What they remember of earlier prompts is what their cache has room for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from time import perf_counter, perf_counter_ns
from typing import assert_never

from balancer.core.admission import AdmissionPolicy
from balancer.core.dispatcher import Dispatcher, DispatchPolicy
from balancer.core.model import (
    Abandon,
    Arrived,
    Began,
    Condition,
    Ended,
    Event,
    Grant,
    Measures,
    ModelOffer,
    Probe,
    Refuse,
    Reported,
    Seen,
    ServiceClass,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import PlacementPolicy
from balancer.leases import TICK_SECONDS
from benchmarks.rooms.asks import (
    CHARS_PER_TOKEN,
    MODEL,
    PROMPTS_PER_PAPER,
    Chats,
    Kind,
    Papers,
    Request,
    Source,
)
from benchmarks.sim.virtual_time import Timer, VirtualTime
from worker_agent.wire import REPORT_INTERVAL_SECONDS

LONG_LINE = 1_000_000
"""Bounds of the line that never turn anybody away."""

CHAT_SHARE_OF_SLOTS, CHAT_SHARE_OF_LINE = 0.3, 0.1
"""Of a mixed room."""

BREAK_SHARE, LEAVE_SHARE = 1 / 500, 1 / 500
"""Of the attempts that break while the prompt is read, and of the clients that leave after LEAVE_SECONDS."""
LEAVE_SECONDS, RETRY_SECONDS = 2.0, 0.1
ACQUAINTED_SECONDS = 5.0
"""Virtual: workers are new to the dispatcher for so long, which may try them before anybody asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A kind of worker; rates of an 8B-class model at 4 bit (see `benchmarks.sim.fleets`)."""

    engine: str
    slots: int
    prompt_tokens_per_second: float
    answer_tokens_per_second: float
    """Of one stream among as many as there are slots."""
    cache_tokens: int
    shares_prefixes: bool = False


MACHINES = (
    Machine(
        engine="vllm",
        slots=16,
        prompt_tokens_per_second=8000,
        answer_tokens_per_second=60,
        cache_tokens=180_000,
        shares_prefixes=True,
    ),
    Machine(
        engine="mlx",
        slots=8,
        prompt_tokens_per_second=2000,
        answer_tokens_per_second=40,
        cache_tokens=200_000,
    ),
    Machine(
        engine="llama.cpp",
        slots=6,
        prompt_tokens_per_second=950,
        answer_tokens_per_second=20,
        cache_tokens=64_000,
    ),
    Machine(
        engine="llama.cpp",
        slots=4,
        prompt_tokens_per_second=430,
        answer_tokens_per_second=12,
        cache_tokens=48_000,
    ),
)
"""A room has as many of each, as far as its number of workers goes."""


@dataclass(slots=True, eq=False)
class Engine:
    """One worker's engine: when it is through with which prompt, and what it remembers."""

    machine: Machine
    running: int = 0
    reads_until: float = 0.0
    _remembered: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def cached(self, request: Request) -> int:
        """Tokens of its prompt that need not be read."""
        return min(self._remembered.get(request.prefix, 0), request.shared_tokens)

    def read(self, tokens: int, now: float) -> float:
        """When so many tokens will have been read, after those of others."""
        self.reads_until = max(self.reads_until, now) + tokens / self.machine.prompt_tokens_per_second
        return self.reads_until

    def remember(self, prefix: int, tokens: int) -> None:
        self._remembered[prefix] = tokens
        self._remembered.move_to_end(prefix)
        while len(self._remembered) > 1 and sum(self._remembered.values()) > self.machine.cache_tokens:
            self._remembered.popitem(last=False)


@dataclass(slots=True, eq=False, kw_only=True)
class Attempt:
    """A request on a worker, or a warm-up for it."""

    ticket: Ticket
    request: Request
    worker_id: WorkerId
    since: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    warms_up: bool
    began: float | None = None
    told_tokens: int = 0
    timer: Timer | None = None

    def measures(self, now: float) -> Measures:
        begun = self.began is not None
        return Measures(
            seconds=now - self.since,
            first_byte=None if self.began is None else self.began - self.since,
            prompt_tokens=self.prompt_tokens if begun else None,
            cached_tokens=self.cached_tokens if begun else None,
            output_tokens=self.output_tokens if begun else None,
        )


@dataclass(slots=True)
class Watch:
    """What was seen while it was measured."""

    spent_ns: dict[type, list[int]] = field(default_factory=dict)
    """Of each call of `handle`, by the type of its event."""
    busy_shares: list[float] = field(default_factory=list)
    """Of the slots, at each tick."""
    waiting: list[int] = field(default_factory=list)
    """At each tick."""
    grants: int = 0
    refusals: int = 0

    @property
    def events(self) -> int:
        return sum(map(len, self.spent_ns.values()))


class Crowd:
    """So many workers and so many requests: as soon as one is answered, another one arrives."""

    def __init__(self, placement: PlacementPolicy, kind: Kind, workers: int, waiting: int, seed: int) -> None:
        """All workers have reported and all requests have arrived."""
        self.time = VirtualTime()
        self.watch = Watch()
        self._dice = Random(f"crowd {seed}")
        admission = AdmissionPolicy(max_waiting=LONG_LINE, max_waiting_batch=LONG_LINE)
        policy = DispatchPolicy(placement=placement, admission=admission)
        self._dispatcher = Dispatcher(policy, Random(seed), started=0.0)
        self._tickets = count(1)
        self._engines = {
            WorkerId(f"worker{number}"): Engine(MACHINES[number % len(MACHINES)]) for number in range(workers)
        }
        self._slots = sum(engine.machine.slots for engine in self._engines.values())
        self._waiting: dict[Ticket, Request] = {}
        self._attempts: dict[Ticket, Attempt] = {}
        self._held: dict[Request, set[Attempt]] = {}
        """All attempts of a request: more than one where a copy of it runs."""
        self._missing_batch = 0
        self._sources: Mapping[ServiceClass, Source] = {
            ServiceClass.INTERACTIVE: Chats(self._dice),
            ServiceClass.BATCH: Papers(self._dice),
        }
        for worker_id in self._engines:
            self._tell(Seen(Worker(id=worker_id, type="agent", url=f"http://{worker_id}")))
            self._tell(self._report(worker_id))
        for number, worker_id in enumerate(self._engines):
            self._reports(worker_id, after=(number + 1) / workers * REPORT_INTERVAL_SECONDS)
        self.time.after(TICK_SECONDS, self._tick)
        self.time.run(ACQUAINTED_SECONDS)
        self._fill(kind, waiting)

    def run(self, *, events: int, virtual_seconds: float, real_seconds: float) -> Watch:
        """Lets time pass until as many events were seen, or one of the times is over; what was seen.

        Raises `RuntimeError` where dispatcher and scene disagree on who waits and who runs.
        """
        self.watch = watch = Watch()
        until = perf_counter() + real_seconds
        self.time.run(
            self.time.now + virtual_seconds,
            lambda: watch.events >= events or perf_counter() >= until,
        )
        self._compare()
        return watch

    def _compare(self) -> None:
        room = self._dispatcher.snapshot(self.time.now)
        known, held = (room.waiting, room.running), (len(self._waiting), len(self._attempts))
        if known != held:
            raise RuntimeError(f"the dispatcher counts {known} waiting and running tickets, the scene {held}")

    # Who arrives

    def _fill(self, kind: Kind, waiting: int) -> None:
        asked = self._slots + waiting
        match kind:
            case "interactive":
                chats = asked
            case "batch":
                chats = 0
            case "mixed":
                chats = round(CHAT_SHARE_OF_SLOTS * self._slots + CHAT_SHARE_OF_LINE * waiting)
        papers, rest = divmod(asked - chats, PROMPTS_PER_PAPER)
        # Whole papers among the chats, in any order: a paper's prompts are sent back to back.
        arrivals = [(ServiceClass.INTERACTIVE, 1)] * chats
        arrivals += [(ServiceClass.BATCH, PROMPTS_PER_PAPER)] * papers + [(ServiceClass.BATCH, rest)]
        self._dice.shuffle(arrivals)
        for service_class, together in arrivals:
            for _ in range(together):
                self._arrive(service_class)

    def _arrive(self, service_class: ServiceClass) -> None:
        request = self._sources[service_class].next(self.time.now)
        request.arrived = self.time.now
        if self._dice.random() < LEAVE_SHARE:
            self.time.after(LEAVE_SECONDS, lambda: self._leave(request))
        self._join(request)

    def _join(self, request: Request) -> None:
        ticket = Ticket(next(self._tickets))
        self._waiting[ticket] = request
        self._tell(Arrived(ticket, request.ask()))

    def _over(self, request: Request) -> None:
        """Another one takes its place; of papers, whole ones."""
        if request.service_class is ServiceClass.INTERACTIVE:
            self._arrive(ServiceClass.INTERACTIVE)
            return
        self._missing_batch += 1
        if self._missing_batch == PROMPTS_PER_PAPER:
            self._missing_batch = 0
            for _ in range(PROMPTS_PER_PAPER):
                self._arrive(ServiceClass.BATCH)

    def _leave(self, request: Request) -> None:
        """The client goes, if it still waits for anything."""
        waiting = [ticket for ticket, other in self._waiting.items() if other is request]
        if not waiting and not self._held.get(request):
            return
        for ticket in waiting:
            del self._waiting[ticket]
            self._tell(Ended(ticket))
        self._drop(request)
        self._over(request)

    def _drop(self, request: Request) -> None:
        """Whatever still runs for it ends, and nothing is learned of that."""
        for attempt in self._held.pop(request, ()):
            self._end(attempt, Verdict.UNKNOWN)

    # What the dispatcher is told, and what it commands

    def _tell(self, event: Event) -> None:
        begun = perf_counter_ns()
        commands = self._dispatcher.handle(event, self.time.now)
        self.watch.spent_ns.setdefault(type(event), []).append(perf_counter_ns() - begun)
        for command in commands:
            match command:
                case Grant():
                    self.watch.grants += 1
                    self._granted(command)
                case Refuse(ticket=ticket, retry_after=seconds):
                    self.watch.refusals += 1
                    self._come_back(self._waiting.pop(ticket), seconds)
                case Abandon(ticket):
                    self.time.after(0.0, partial(self._broke, ticket))
                case Probe():
                    self._probe(command)
                case _:
                    assert_never(command)

    def _granted(self, grant: Grant) -> None:
        if grant.copy_of is None:
            self._send(grant, self._waiting.pop(grant.ticket))
        elif (original := self._attempts.get(grant.copy_of)) is not None:
            self._send(grant, original.request)
        else:
            self.time.after(0.0, lambda: self._tell(Ended(grant.ticket)))

    def _send(self, grant: Grant, request: Request) -> None:
        engine, warm_chars = self._engines[grant.worker.id], grant.warm_chars
        tokens = request.prompt_tokens if warm_chars is None else warm_chars // CHARS_PER_TOKEN
        cached = min(engine.cached(request), tokens)
        attempt = Attempt(
            ticket=grant.ticket,
            request=request,
            worker_id=grant.worker.id,
            since=self.time.now,
            prompt_tokens=tokens,
            cached_tokens=cached,
            output_tokens=request.output_tokens if warm_chars is None else 1,
            warms_up=warm_chars is not None,
        )
        self._attempts[grant.ticket] = attempt
        self._held.setdefault(request, set()).add(attempt)
        engine.running += 1
        read = engine.read(max(tokens - cached, 1), self.time.now)
        if self._dice.random() < BREAK_SHARE:
            attempt.timer = self.time.at(read, lambda: self._broke(grant.ticket))
        else:
            attempt.timer = self.time.at(read, lambda: self._began(attempt))

    # How attempts go

    def _began(self, attempt: Attempt) -> None:
        attempt.began = self.time.now
        engine = self._engines[attempt.worker_id]
        engine.remember(attempt.request.prefix, attempt.prompt_tokens)
        seconds = attempt.output_tokens / engine.machine.answer_tokens_per_second
        attempt.timer = self.time.after(seconds, lambda: self._finished(attempt))
        self._tell(Began(attempt.ticket))

    def _finished(self, attempt: Attempt) -> None:
        self._end(attempt, Verdict.GOOD)
        request = attempt.request
        if attempt.warms_up:
            request.admitted = True
            self._come_back(request, 0.0)
            return
        self._drop(request)
        self._sources[request.service_class].answered(request, self.time.now)
        self._over(request)

    def _broke(self, ticket: Ticket) -> None:
        """Does nothing for an attempt that is over."""
        attempt = self._attempts.get(ticket)
        if attempt is None:
            return
        self._end(attempt, Verdict.BAD)
        request = attempt.request
        request.avoid |= {attempt.worker_id}
        if not self._held[request]:
            request.admitted = True
            self._come_back(request, RETRY_SECONDS)

    def _end(self, attempt: Attempt, verdict: Verdict) -> None:
        del self._attempts[attempt.ticket]
        self._held.get(attempt.request, set()).discard(attempt)
        self._engines[attempt.worker_id].running -= 1
        if attempt.timer is not None:
            attempt.timer.cancel()
        self._tell(Ended(attempt.ticket, verdict, attempt.measures(self.time.now)))

    def _come_back(self, request: Request, seconds: float) -> None:
        self.time.after(seconds, lambda: self._join(request))

    def _probe(self, probe: Probe) -> None:
        """Nobody waits for its answer; the engine reads and writes it as any other."""
        engine, sent = self._engines[probe.worker.id], self.time.now
        seconds = probe.output_tokens / engine.machine.answer_tokens_per_second

        def began() -> None:
            self._tell(Began(probe.ticket))
            self.time.after(seconds, partial(ended, self.time.now))

        def ended(began_at: float) -> None:
            engine.running -= 1
            measures = Measures(
                seconds=self.time.now - sent,
                first_byte=began_at - sent,
                prompt_tokens=probe.prompt_tokens,
                cached_tokens=0,
                output_tokens=probe.output_tokens,
            )
            self._tell(Ended(probe.ticket, Verdict.GOOD, measures))

        engine.running += 1
        self.time.at(engine.read(probe.prompt_tokens, sent), began)

    # What comes by itself

    def _report(self, worker_id: WorkerId) -> Reported:
        engine = self._engines[worker_id]
        machine = engine.machine
        offer = ModelOffer(
            name=MODEL,
            context_tokens=32_768,
            identity="qwen2.5-7b-instruct q4_k_m",
            memory_tokens=machine.slots * 32_768,
            cache_tokens=machine.cache_tokens,
        )
        condition = Condition(
            models=(offer,),
            slots=machine.slots,
            running=engine.running,
            calibrates=True,
            shares_prefixes=machine.shares_prefixes,
            engine=machine.engine,
        )
        return Reported(worker_id, condition)

    def _reports(self, worker_id: WorkerId, after: float) -> None:
        def report() -> None:
            self._tell(self._report(worker_id))
            self._reports(worker_id, REPORT_INTERVAL_SECONDS)

        self.time.after(after, report)

    def _tick(self) -> None:
        self.watch.busy_shares.append(len(self._attempts) / self._slots)
        self.watch.waiting.append(len(self._waiting))
        self._tell(Tick(self._received()))
        self.time.after(TICK_SECONDS, self._tick)

    def _received(self) -> dict[Ticket, int]:
        """Tokens of the answers that have grown."""
        grown = {}
        for ticket, attempt in self._attempts.items():
            if attempt.began is None:
                continue
            pace = self._engines[attempt.worker_id].machine.answer_tokens_per_second
            tokens = 1 + int((self.time.now - attempt.began) * pace)
            if tokens > attempt.told_tokens:
                attempt.told_tokens = tokens
                grown[ticket] = tokens
        return grown
