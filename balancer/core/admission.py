"""The bounded waiting line of the interactive class: who waits, whose turn it is, until when. Pure.

Asks with equal needs can be served by the same workers. Among them each client gets its fair share of the
tokens served (`fairness.Turns`), and its own asks are served in the order of their arrival. Among clients
that are equal in this the first comes first; but under overload that would make everybody wait, and nobody's
answer be in time: so when the line has stood for long, the client that came last comes first (adaptive LIFO:
Maurer, "Fail at Scale", ACM Queue 13(8), 2015).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import takewhile

from balancer.core.fairness import Turns
from balancer.core.model import Ask, Needs, Ticket


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    max_waiting: int = 1000
    """Of class interactive. Beyond it an ask is refused at once: a longer line only adds waiting."""
    overload_seconds: float = 5.0
    """When somebody has waited for so long, and so would who comes now, of equal clients the last comes
    first."""
    max_waiting_batch: int = 10_000
    """Of class batch: all that a client wants done over night may wait here, which lets it be put in a good
    order."""


@dataclass(slots=True)
class _Group:
    """Those who need the same, by client."""

    by_client: dict[str, OrderedDict[Ticket, Ask]] = field(default_factory=dict)


@dataclass(slots=True)
class WaitingLine:
    max_waiting: int
    turns: Turns = field(default_factory=Turns)
    _groups: dict[Needs, _Group] = field(default_factory=dict)
    _asks: dict[Ticket, Ask] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._asks)

    @property
    def is_full(self) -> bool:
        return len(self._asks) >= self.max_waiting

    def join(self, ticket: Ticket, ask: Ask) -> None:
        """Stand in line by first arrival: a retry goes before those of its client that came after it."""
        self._asks[ticket] = ask
        self.turns.joined(ask.client)
        group = self._groups.setdefault(ask.needs, _Group())
        own = group.by_client.setdefault(ask.client, OrderedDict())
        later = list(takewhile(lambda waiting: waiting[1].arrived > ask.arrived, reversed(own.items())))
        own[ticket] = ask
        for other, _ in reversed(later):
            own.move_to_end(other)

    def leave(self, ticket: Ticket) -> Ask | None:
        """The ask of that ticket, out of the line; None if it was not in it."""
        ask = self._asks.pop(ticket, None)
        if ask is not None:
            self.turns.left(ask.client)
            group = self._groups[ask.needs]
            own = group.by_client[ask.client]
            del own[ticket]
            if not own:
                del group.by_client[ask.client]
                if not group.by_client:
                    del self._groups[ask.needs]
        return ask

    def needs(self) -> list[Needs]:
        """What is waited for; first what somebody waits for longest."""
        return sorted(self._groups, key=lambda needs: min(ask.arrived for _, ask in self._firsts(needs)))

    def waited(self, needs: Needs, now: float) -> float:
        """Seconds for which the first of those who need this has waited."""
        if needs not in self._groups:
            return 0.0
        return now - min(ask.arrived for _, ask in self._firsts(needs))

    def in_turn(
        self, needs: Needs, cost: Callable[[Ask], float], *, last_first: bool = False
    ) -> Iterator[tuple[Ticket, Ask]]:
        """Who needs this, whose turn it is first, as if each were served its `cost` in tokens before the
        next is looked at. The line must not change meanwhile."""
        group = self._groups.get(needs)
        if group is None:
            return

        def rank(ask: Ask) -> float:
            if not last_first:
                return ask.arrived
            return float("-inf") if ask.admitted else -ask.arrived  # a retry has waited its time

        heap = []
        for number, (client, own) in enumerate(group.by_client.items()):
            waiting = iter(own.items())
            ticket, ask = next(waiting)
            heap.append((self.turns.counter(client), rank(ask), number, ticket, ask, waiting))
        heapify(heap)
        while heap:
            counter, _, number, ticket, ask, waiting = heap[0]
            yield ticket, ask
            following = next(waiting, None)
            if following is None:
                heappop(heap)
            else:
                entry = (counter + cost(ask), rank(following[1]), number, *following, waiting)
                heapreplace(heap, entry)

    def has(self, needs: Needs) -> bool:
        return needs in self._groups

    def count(self, needs: Needs) -> int:
        """How many wait for this."""
        group = self._groups.get(needs)
        return sum(map(len, group.by_client.values())) if group else 0

    def group(self, needs: Needs) -> list[Ticket]:
        """All that wait for this."""
        group = self._groups.get(needs)
        return [ticket for own in group.by_client.values() for ticket in own] if group else []

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._asks

    def asks(self) -> Iterator[tuple[Ticket, Ask]]:
        """All that wait, in no order that means anything."""
        return iter(self._asks.items())

    def ask_of(self, ticket: Ticket) -> Ask:
        return self._asks[ticket]

    def overdue(self, now: float) -> list[Ticket]:
        return [ticket for ticket, ask in self._asks.items() if ask.deadline <= now]

    def _firsts(self, needs: Needs) -> Iterator[tuple[Ticket, Ask]]:
        return (next(iter(own.items())) for own in self._groups[needs].by_client.values())
