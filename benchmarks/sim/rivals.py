"""How others choose a worker, each as one small pure class, and the plain proxy around them.

The rules are those of the routing study (`policies.py`); it names the programs that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from balancer.core.choosing import Chance
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
from benchmarks.sim.prefixes import Work

OUT_AFTER_FAILURES = 5
OUT_SECONDS = 30.0
"""So many failures in a row, and a worker is left out for so long: what the study gave every rival."""


@dataclass(slots=True, eq=False)
class Backend:
    """A worker as such a proxy sees it."""

    worker: Worker
    running: set[Ticket] = field(default_factory=set)
    is_up: bool = False
    failures: int = 0
    out_until: float = 0.0

    @property
    def id(self) -> WorkerId:
        return self.worker.id

    @property
    def connections(self) -> int:
        return len(self.running)


class Rival(Protocol):
    """A rule. It is asked when a request is about to be sent, and what it picks is sent."""

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        """One of these, of which there is at least one; None: let it wait."""


class RoundRobin:
    def __init__(self, chance: Chance) -> None:
        self._turn = -1

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        self._turn += 1
        return backends[self._turn % len(backends)]


class LeastConnections:
    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        least = min(backend.connections for backend in backends)
        return _any([one for one in backends if one.connections == least], self._chance)


class PowerOfTwo:
    """The less busy of two that were drawn."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        first = _any(backends, self._chance)
        others = [one for one in backends if one is not first]
        return min(first, _any(others, self._chance), key=attrgetter("connections")) if others else first


class CacheAware:
    """SGLang's router: where the longest known prefix is, unless loads differ too much.

    Its defaults: `cache_threshold` 0.3, `balance_abs_threshold` 64, `balance_rel_threshold` 1.5. A request
    without a prefix that is known well enough goes where the least was sent so far.
    """

    def __init__(self, chance: Chance) -> None:
        self._chance = chance
        self._known: dict[WorkerId, dict[str, int]] = {}

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        loads = [backend.connections for backend in backends]
        if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
            picked = min(backends, key=attrgetter("connections"))
        else:
            best = max(backends, key=lambda one: self._match(one, work))
            if self._match(best, work) > 0.3:
                picked = best
            else:
                picked = min(backends, key=lambda one: sum(self._of(one).values()))
        self._of(picked)[work.key] = max(self._of(picked).get(work.key, 0), work.kept)
        return picked

    def _of(self, backend: Backend) -> dict[str, int]:
        return self._known.setdefault(backend.id, {})

    def _match(self, backend: Backend, work: Work) -> float:
        return min(self._of(backend).get(work.key, 0), work.prefix) / work.prompt


class CentralQueue:
    """HAProxy with `maxconn` on each server: one line; whose share of the limit is least, if it has room."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def pick(self, work: Work, backends: Sequence[Backend]) -> Backend | None:
        shares = [(one.connections / one.worker.cap, one) for one in backends if one.worker.cap]
        least = min((share for share, _ in shares), default=1.0)
        return _any([one for share, one in shares if share == least], self._chance) if least < 1 else None


def _any(backends: Sequence[Backend], chance: Chance) -> Backend:
    return backends[int(chance.random() * len(backends))]


class Proxy:
    """One line in front of all backends, a rule that picks, and the health rules that most proxies have.

    The surface is the dispatcher's, so the same driver performs its commands.
    """

    def __init__(self, rule: Rival, look: Callable[[Ticket], Work]) -> None:
        """`look`: what such a proxy would read from the body of that request."""
        self._rule = rule
        self._look = look
        self._backends: dict[WorkerId, Backend] = {}
        self._line: dict[Ticket, Ask] = {}
        self._leases: dict[Ticket, Backend] = {}

    def handle(self, event: Event, now: float) -> list[Command]:
        commands: list[Command] = []
        match event:
            case Arrived(ticket, ask):
                self._line[ticket] = ask
            case Ended():
                self._ended(event, now)
            case Seen(worker):
                self._backends.setdefault(worker.id, Backend(worker)).worker = worker
            case Gone(worker_id):
                self._backends.pop(worker_id, None)
            case Reported(worker_id, condition):
                self._backends[worker_id].is_up = condition.ready
            case Lost(worker_id, reason, abandon):
                backend = self._backends[worker_id]
                backend.is_up = False
                commands += [Abandon(ticket, reason) for ticket in sorted(backend.running) if abandon]
            case Tick():
                late = [ticket for ticket, ask in self._line.items() if ask.deadline <= now]
                for ticket in late:
                    del self._line[ticket]
                    commands.append(Refuse(ticket=ticket, refusal=Refusal.WAITED_TOO_LONG))
        return commands + self._placed(now)

    def _ended(self, event: Ended, now: float) -> None:
        self._line.pop(event.ticket, None)
        backend = self._leases.pop(event.ticket, None)
        if backend is None:
            return
        backend.running.discard(event.ticket)
        if event.unreachable:
            backend.is_up = False
        if event.verdict is Verdict.GOOD:
            backend.failures = 0
        elif event.verdict is Verdict.BAD:
            backend.failures += 1
            if backend.failures >= OUT_AFTER_FAILURES:
                backend.failures, backend.out_until = 0, now + OUT_SECONDS

    def _placed(self, now: float) -> list[Command]:
        grants: list[Command] = []
        for ticket, ask in list(self._line.items()):
            well = [one for one in self._backends.values() if one.is_up and now >= one.out_until]
            usable = [one for one in well if one.id not in ask.needs.avoid] or well
            picked = self._rule.pick(self._look(ticket), usable) if usable else None
            if picked is None:
                break  # first come, first served
            del self._line[ticket]
            picked.running.add(ticket)
            self._leases[ticket] = picked
            grants.append(Grant(ticket, picked.worker, Choice(worker_id=picked.id, candidates=())))
        return grants


RIVALS: Mapping[str, Callable[[Chance], Rival]] = {
    "round_robin": RoundRobin,
    "least_connections": LeastConnections,
    "power_of_two": PowerOfTwo,
    "cache_aware": CacheAware,
    "central_queue": CentralQueue,
}
