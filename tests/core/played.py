"""A room in which time passes by itself: workers that answer and fail as a scene says, clients that come at
their times, retries as the shell makes them, a tick each quarter of a second."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count

from balancer.core.breaker import Phase
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Began,
    Condition,
    Ended,
    Grant,
    Lost,
    Measures,
    Needs,
    Probe,
    Refuse,
    Ticket,
    Verdict,
    WorkerId,
)
from balancer.core.retry import CAUSES, Cause, RetryPolicy, Tried, after
from tests.core.rooms import CHAT, LONG, M, Room

TICK_SECONDS = 0.25
PROBE_SECONDS = 0.2
GOOD = None
"""The cause of an attempt that did not fail."""

How = tuple[float, Cause | None]
"""Seconds until an attempt ends, and why it failed."""
Behaviour = Callable[[float, random.Random], How]
"""How an attempt goes that begins at that second."""


class Played:
    def __init__(self, policy: str = "expected_latency", seed: int = 1, **more) -> None:
        self.room = Room(policy, seed, **more)
        self.chance = random.Random(seed)
        self.behaviours: dict[str, Behaviour] = {}
        self.attempts: dict[str, list[float]] = defaultdict(list)
        """When requests were sent there, by worker; probes apart."""
        self.trips: dict[str, list[float]] = defaultdict(list)
        """When its breaker was found to have tripped."""
        self.most_at_once: dict[str, int] = defaultdict(int)
        self.answered = self.failed = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._tickets = count(1)
        self._requests: dict[Ticket, tuple[float, list[Tried]]] = {}
        self._running: dict[Ticket, str] = {}
        self._phases: dict[str, Phase] = {}
        self._at(0.0, self._tick)

    @property
    def now(self) -> float:
        return self.room.now

    def add(self, name: str, condition: Condition, behaviour: Behaviour) -> None:
        self.behaviours[name] = behaviour
        self.room.add(name, condition)
        self._phases[name] = Phase.CLOSED

    def clients(self, times: Iterable[float]) -> None:
        for when in times:
            self._at(when, lambda when=when: self._join(when, []))

    def lost(self, name: str, when: float) -> None:
        """Its agent falls silent: what runs on it is lost."""
        self._at(when, lambda: self._tell(Lost(WorkerId(name), "no report", abandon=True)))

    def back(self, name: str, when: float, condition: Condition) -> None:
        self._at(when, lambda: self._perform(self.room.report(name, condition)))

    def until(self, seconds: float) -> None:
        while self._queue[0][0] <= seconds:
            self.room.now, _, act = heappop(self._queue)
            act()
        self.room.now = seconds

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heappush(self._queue, (when, next(self._order), act))

    def _tick(self) -> None:
        self._perform(self.room.tick())
        self._at(self.now + TICK_SECONDS, self._tick)

    def _tell(self, event) -> None:
        self._perform(self.room.tell(event))

    def _perform(self, commands) -> None:
        for name, before in self._phases.items():
            phase = self._phases[name] = self.room.view(name).breaker
            if phase is Phase.OPEN and before is not Phase.OPEN:
                self.trips[name].append(self.now)
        for command in commands:
            match command:
                case Grant(ticket, worker):
                    self.attempts[worker.id].append(self.now)
                    self._run(ticket, worker.id, *self.behaviours[worker.id](self.now, self.chance))
                    on_it = sum(name == worker.id for name in self._running.values())
                    self.most_at_once[worker.id] = max(self.most_at_once[worker.id], on_it)
                    assert on_it <= self.room.view(worker.id).slots
                case Probe(ticket, worker):
                    seconds, cause = self.behaviours[worker.id](self.now, self.chance)
                    self._run(ticket, worker.id, min(seconds, PROBE_SECONDS), cause)
                case Abandon(ticket):
                    self._ends(ticket, 0.0, Cause.LOST)
                case Refuse(ticket=ticket):
                    del self._requests[ticket]
                    self.failed += 1

    def _run(self, ticket: Ticket, name: str, seconds: float, cause: Cause | None) -> None:
        self._running[ticket] = name
        if cause is GOOD:
            self._at(self.now + seconds / 2, lambda: self._begins(ticket))
        self._at(self.now + seconds, lambda: self._ends(ticket, seconds, cause))

    def _begins(self, ticket: Ticket) -> None:
        if ticket in self._running:
            self._tell(Began(ticket))

    def _ends(self, ticket: Ticket, seconds: float, cause: Cause | None) -> None:
        name = self._running.pop(ticket, None)
        if name is None:
            return  # it was abandoned before
        verdict = Verdict.GOOD if cause is GOOD else CAUSES[cause].verdict
        self._tell(
            Ended(
                ticket,
                verdict,
                Measures(seconds=seconds),
                unreachable=cause is Cause.UNREACHABLE,
                silent=cause is Cause.SILENT,
            )
        )
        if ticket not in self._requests:
            return  # a probe
        since, tried = self._requests.pop(ticket)
        if cause is GOOD:
            self.answered += 1
            return
        tried.append(Tried(WorkerId(name), cause))
        again = after(RetryPolicy(), tried, self.chance.random())
        if again is None:
            self.failed += 1
        else:
            self._at(self.now + again.delay, lambda: self._join(since, tried, again.avoid))

    def _join(self, since: float, tried: list[Tried], avoid: frozenset[WorkerId] = frozenset()) -> None:
        ticket = Ticket(next(self._tickets))
        self._requests[ticket] = since, tried
        needs = Needs(model=M, endpoint=CHAT, avoid=avoid)
        self._tell(Arrived(ticket, Ask(needs=needs, arrived=since, deadline=LONG, admitted=bool(tried))))


def answers_in(seconds: float) -> Behaviour:
    return lambda now, chance: (seconds, GOOD)
