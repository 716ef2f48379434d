"""A room under load: what `leases` and `journey` do in production, done on virtual time.

A router (the real dispatcher, or a rival) is told what happens; its commands are performed on simulated
engines. What follows a failed attempt is decided by the real `retry.after`, with production's policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import assert_never

from balancer.core.model import (
    BLOCK_CHARS,
    Abandon,
    Arrived,
    Ask,
    Began,
    Condition,
    Ended,
    Endpoint,
    Event,
    Grant,
    Lost,
    Measures,
    ModelName,
    ModelOffer,
    Needs,
    Probe,
    Prompt,
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
from balancer.core.retry import CAUSES, Cause, RetryPolicy, Tried, after
from balancer.leases import TICK_SECONDS
from balancer.upstream import TimeoutPolicy
from benchmarks.sim.engine import Engine, EngineDown, Generation
from benchmarks.sim.fleets import Machine
from benchmarks.sim.policies import Policy
from benchmarks.sim.prefixes import Work
from benchmarks.sim.virtual_time import Timer, VirtualTime
from benchmarks.sim.workloads import Fault, Request
from worker_agent.wire import LOST_AFTER_SECONDS, REPORT_INTERVAL_SECONDS

MODEL = ModelName("model")
CHARS_PER_TOKEN = 4
SLOTS_REMEMBER_TOKENS = 20_000
"""What the slots of a llama.cpp hold of earlier prompts beside its cache in RAM, roughly (as the study)."""
REFUSED_CONNECTION_SECONDS = 0.001
"""Until a connection to a machine without a listener fails; a LAN's round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How long the shell waits for what; production's defaults."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    silent_seconds: float = TimeoutPolicy().read_seconds
    """Without a byte, once an answer has begun."""


@dataclass(slots=True, eq=False, kw_only=True)
class Call:
    """One request of a client, from its arrival to its end."""

    request: Request
    arrived: float
    patience_seconds: float | None
    """After it, the client leaves; None: it waits as long as it takes."""
    limit_seconds: float | None
    """From the first slot to the end of the answer (the shell's REQUEST_TIMEOUT)."""
    over: Callable[[Call], None]
    """Is told once, when the call has ended."""
    first: float | None = None
    """When the first token reached the client, or would have."""
    ended: float | None = None
    answered: bool = False
    tried: list[Tried] = field(default_factory=list)
    warmed: bool = False
    """A part of its prompt was read ahead: it has been in line before."""
    tickets: set[Ticket] = field(default_factory=set)
    """Of its present place in line, or on a worker; on two while it has a copy."""
    _timers: list[Timer] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        """Chats do; a batch takes its answers in one piece, so that another worker can start one over."""
        return self.request.kind == "chat"

    def keep(self, timer: Timer) -> None:
        self._timers.append(timer)

    def end(self, now: float, *, answered: bool) -> None:
        if self.ended is not None:
            raise RuntimeError(f"{self.request.name} ended twice")
        self.ended, self.answered = now, answered
        for timer in self._timers:
            timer.cancel()
        self.over(self)


@dataclass(slots=True, eq=False)
class Attempt:
    """Some work on a worker; its engine tells it how it goes."""

    room: Room
    call: Call | None
    """None: a probe."""
    ticket: Ticket
    machine: int
    since: float
    work: Work
    is_warm_up: bool = False
    first: float | None = None
    generation: Generation | None = None

    def began(self) -> None:
        self.first = self.room.time.now
        if self.call is not None and not self.is_warm_up and self.call.first is None:
            self.call.first = self.first
        self.room.began(self)

    def finished(self) -> None:
        self.room.answered(self)

    def broke(self) -> None:
        self.room.failed(self, Cause.BROKE)


class Room:
    def __init__(
        self,
        time: VirtualTime,
        machines: Sequence[Machine],
        policy: Policy,
        chance: Random,
        habits: Habits | None = None,
    ) -> None:
        """The machines are there and have reported."""
        self.time = time
        self.engines = [Engine(time, machine.engine) for machine in machines]
        self._machines = machines
        self._index = {WorkerId(machine.name): index for index, machine in enumerate(machines)}
        self._chance = chance
        self._habits = habits or Habits()
        self._slots_told = policy.slots_told
        self._tickets = count(1)
        self._calls: dict[Ticket, Call] = {}
        self._attempts: dict[Ticket, Attempt] = {}
        self._router = policy.build(chance, self._look)
        for machine in machines:
            worker_id = WorkerId(machine.name)
            self._tell(Seen(Worker(id=worker_id, type="agent", url="", cap=policy.cap(machine))))
            self._tell(self._report(worker_id))
        self._reports()
        self._ticks()

    # Clients

    def ask(self, call: Call) -> None:
        """A client sends a request; it will end once."""
        if call.patience_seconds is not None:
            call.keep(self.time.after(call.patience_seconds, lambda: self._left(call)))
        self._join(call, avoid=frozenset())

    def _join(self, call: Call, avoid: frozenset[WorkerId]) -> None:
        ticket = Ticket(next(self._tickets))
        call.tickets.add(ticket)
        self._calls[ticket] = call
        self._tell(Arrived(ticket, self._described(call, avoid)))

    def _described(self, call: Call, avoid: frozenset[WorkerId]) -> Ask:
        """What the shell would tell the dispatcher of this request."""
        patience = float("inf") if call.patience_seconds is None else call.patience_seconds
        is_chat = call.request.kind == "chat"
        return Ask(
            needs=Needs(model=MODEL, endpoint=Endpoint.CHAT, avoid=avoid),
            arrived=call.arrived,
            deadline=call.arrived + patience,
            admitted=bool(call.tried) or call.warmed,
            service_class=ServiceClass.INTERACTIVE if is_chat else ServiceClass.BATCH,
            client=call.request.work.key if is_chat else "batch",
            prompt=_prompt(call.request),
            replayable=not call.streams,
        )

    def _look(self, ticket: Ticket) -> Work:
        return self._calls[ticket].request.work

    def _left(self, call: Call) -> None:
        """The client goes, wherever its call stands."""
        for ticket in sorted(call.tickets):
            self._give_back(ticket, Ended(ticket))
        call.end(self.time.now, answered=False)

    # The router's commands

    def _tell(self, event: Event) -> None:
        for command in self._router.handle(event, self.time.now):
            match command:
                case Grant(ticket, worker):
                    self._granted(command, self._index[worker.id])
                case Refuse(ticket=ticket, retry_after=seconds):
                    self._refused(ticket, seconds)
                case Abandon(ticket):
                    if (attempt := self._attempts.get(ticket)) is None:
                        continue
                    if attempt.call is None and attempt.work.prompt > 1:
                        self._give_back(ticket, Ended(ticket))  # a measurement that was in the way
                    else:
                        self.failed(attempt, Cause.LOST)
                case Probe(ticket, worker):
                    # A text of its own, so that nothing of it is cached.
                    work = Work(
                        key=f"probe{ticket}",
                        prefix=0,
                        prompt=command.prompt_tokens,
                        output=command.output_tokens,
                        kept=0,
                    )
                    attempt = Attempt(self, None, ticket, self._index[worker.id], self.time.now, work)
                    self._send(attempt)
                case _:
                    assert_never(command)

    def _granted(self, grant: Grant, machine: int) -> None:
        of = grant.ticket if grant.copy_of is None else grant.copy_of
        call = self._calls.get(of)
        if call is None:
            self._tell(Ended(grant.ticket))  # it was answered a moment ago
            return
        if grant.copy_of is not None:
            call.tickets.add(grant.ticket)
            self._calls[grant.ticket] = call
        work = call.request.work
        if grant.warm_chars is not None:
            tokens = min(grant.warm_chars // CHARS_PER_TOKEN, work.prompt)
            work = Work(key=work.key, prefix=min(tokens, work.prefix), prompt=tokens, output=1, kept=tokens)
        attempt = Attempt(
            self, call, grant.ticket, machine, self.time.now, work, is_warm_up=grant.warm_chars is not None
        )
        if call.limit_seconds is not None and not call.tried and not call.warmed and grant.copy_of is None:
            call.keep(self.time.after(call.limit_seconds, lambda: self._overdue(call)))
        self._send(attempt)

    def _send(self, attempt: Attempt) -> None:
        self._attempts[attempt.ticket] = attempt
        try:
            attempt.generation = self.engines[attempt.machine].submit(attempt.work, attempt)
        except EngineDown:
            self.time.after(REFUSED_CONNECTION_SECONDS, lambda: self.failed(attempt, Cause.UNREACHABLE))

    def _refused(self, ticket: Ticket, seconds: float) -> None:
        """Clients come back when they are told to, as SDKs do."""
        call = self._calls.pop(ticket)
        call.tickets.discard(ticket)
        call.keep(self.time.after(seconds, lambda: self._join(call, frozenset())))

    # How attempts end

    def began(self, attempt: Attempt) -> None:
        self._tell(Began(attempt.ticket))

    def answered(self, attempt: Attempt) -> None:
        call = attempt.call
        self._give_back(attempt.ticket, self._ended(attempt, Verdict.GOOD))
        if call is None:
            return
        if attempt.is_warm_up:
            call.warmed = True
            self._join(call, _avoided(call))
            return
        for ticket in sorted(call.tickets):
            self._give_back(ticket, Ended(ticket))  # the copy, or what it is a copy of
        call.end(self.time.now, answered=True)

    def failed(self, attempt: Attempt, cause: Cause) -> None:
        """Does nothing for an attempt that is over."""
        if attempt.ticket not in self._attempts:
            return
        call = attempt.call
        verdict = CAUSES[cause].verdict
        if cause is Cause.OVERDUE and attempt.first is None:
            verdict = Verdict.BAD  # all that time and not a word (see `Journey._interrupted`)
        ended = self._ended(attempt, verdict, unreachable=cause is Cause.UNREACHABLE)
        self._give_back(attempt.ticket, ended)
        if call is None or call.ended is not None:
            return
        call.tried.append(Tried(WorkerId(self._machines[attempt.machine].name), cause))
        if call.tickets:
            return  # another attempt at it goes on
        is_cut = call.streams and attempt.first is not None  # no answer goes on elsewhere here
        again = None if is_cut else after(self._habits.retry, call.tried, self._chance.random())
        if again is None:
            call.end(self.time.now, answered=False)
        else:
            call.keep(self.time.after(again.delay, lambda: self._join(call, again.avoid)))

    def _overdue(self, call: Call) -> None:
        for ticket in sorted(call.tickets):
            if (attempt := self._attempts.get(ticket)) is not None:
                self.failed(attempt, Cause.OVERDUE)
        if call.ended is None:
            self._left(call)  # between two attempts; to the client it is the same

    def _ended(self, attempt: Attempt, verdict: Verdict, *, unreachable: bool = False) -> Ended:
        generation = attempt.generation
        measures = Measures(
            seconds=self.time.now - attempt.since,
            first_byte=None if attempt.first is None else attempt.first - attempt.since,
            prompt_tokens=attempt.work.prompt,
            cached_tokens=generation.cached if generation else None,
            output_tokens=attempt.work.output,
        )
        return Ended(attempt.ticket, verdict, measures, unreachable=unreachable)

    def _give_back(self, ticket: Ticket, ended: Ended) -> None:
        """The one way out of the line and off a worker."""
        call = self._calls.pop(ticket, None)
        if call is not None:
            call.tickets.discard(ticket)
        attempt = self._attempts.pop(ticket, None)
        if attempt is not None and attempt.generation is not None:
            self.engines[attempt.machine].cancel(attempt.generation)
        self._tell(ended)

    # Machines

    def _report(self, worker_id: WorkerId) -> Reported:
        spec = self.engines[self._index[worker_id]].spec
        if not self._slots_told:
            return Reported(worker_id, Condition(models=(ModelOffer(name=MODEL),)))
        shares = spec.kind == "vllm"
        # llama.cpp remembers what is in its slots besides.
        beside = SLOTS_REMEMBER_TOKENS if spec.kind == "llama.cpp" else 0
        offer = ModelOffer(
            name=MODEL,
            memory_tokens=spec.cache_tokens if shares else None,
            cache_tokens=None if shares else spec.cache_tokens + beside,
        )
        return Reported(
            worker_id,
            Condition(
                models=(offer,),
                slots=spec.slots,
                shares_prefixes=shares,
                engine=spec.kind,
                calibrates=True,
            ),
        )

    def _reports(self) -> None:
        """A hung engine's agent still reports: it is alive, and does not know."""
        for worker_id, index in self._index.items():
            if self.engines[index].is_up:
                self._tell(self._report(worker_id))
        self.time.after(REPORT_INTERVAL_SECONDS, self._reports)

    def _ticks(self) -> None:
        received = {
            ticket: self.engines[attempt.machine].generated(attempt.generation)
            for ticket, attempt in self._attempts.items()
            if attempt.first is not None and attempt.generation is not None
        }
        self._tell(Tick(received))
        self.time.after(TICK_SECONDS, self._ticks)

    def suffer(self, fault: Fault) -> None:
        """It happens now."""
        engine = self.engines[fault.machine]
        match fault.what:
            case "hang":
                engine.hang()
                self.time.after(self._habits.silent_seconds, lambda: self._silent(fault.machine))
            case "crash":
                engine.crash()
                self.time.after(LOST_AFTER_SECONDS, lambda: self._unheard(fault.machine))
            case "slow":
                engine.slow(fault.factor)
            case "return":
                engine.returns()

    def _silent(self, machine: int) -> None:
        """Answers that had begun have stood still for too long. Before its first word nobody is hurried."""
        if self.engines[machine].is_hung:
            for attempt in list(self._attempts.values()):
                if attempt.machine == machine and attempt.first is not None:
                    self.failed(attempt, Cause.SILENT)

    def _unheard(self, machine: int) -> None:
        if not self.engines[machine].is_up:
            reason = f"no report for {LOST_AFTER_SECONDS:g} s"
            self._tell(Lost(WorkerId(self._machines[machine].name), reason, abandon=True))


def _avoided(call: Call) -> frozenset[WorkerId]:
    return frozenset(one.worker_id for one in call.tried)


def _prompt(request: Request) -> Prompt:
    """Prompts of one key have the blocks of what they have in common."""
    work = request.work
    name, _, number = request.name.rpartition(".")
    shared = work.prefix if request.kind == "batch" else work.prompt
    common = shared * CHARS_PER_TOKEN // BLOCK_CHARS
    blocks = work.prompt * CHARS_PER_TOKEN // BLOCK_CHARS
    is_chat = request.kind == "chat"
    return Prompt(
        chars=work.prompt * CHARS_PER_TOKEN,
        blocks=tuple(hash((work.key if index < common else request.name, index)) for index in range(blocks)),
        conversation=hash((name, int(number))) if is_chat else None,
        continues=hash((name, int(number) - 1)) if is_chat and int(number) else None,
    )
