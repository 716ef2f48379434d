"""The bounded waiting line: who waits, in which order, until when. Pure.

Asks with equal needs can be served by the same workers, so only the first of each such group has to be
looked at when room appears: a thousand waiting papers cost one look.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile

from balancer.core.model import Ask, Needs, Ticket


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    max_waiting: int = 1000
    """Beyond it an ask is refused at once: a longer line only adds waiting, never work done."""


@dataclass(slots=True)
class WaitingLine:
    policy: AdmissionPolicy
    _groups: dict[Needs, OrderedDict[Ticket, Ask]] = field(default_factory=dict)
    _asks: dict[Ticket, Ask] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._asks)

    @property
    def is_full(self) -> bool:
        return len(self._asks) >= self.policy.max_waiting

    def join(self, ticket: Ticket, ask: Ask) -> None:
        """Stand in line by first arrival: a retry goes before those that came after it."""
        self._asks[ticket] = ask
        group = self._groups.setdefault(ask.needs, OrderedDict())
        later = list(takewhile(lambda waiting: waiting[1].arrived > ask.arrived, reversed(group.items())))
        group[ticket] = ask
        for other, _ in reversed(later):
            group.move_to_end(other)

    def leave(self, ticket: Ticket) -> Ask | None:
        """The ask of that ticket, out of the line; None if it was not in it."""
        ask = self._asks.pop(ticket, None)
        if ask is not None:
            group = self._groups[ask.needs]
            del group[ticket]
            if not group:
                del self._groups[ask.needs]
        return ask

    def heads(self) -> list[tuple[Ticket, Ask]]:
        """The first of each group, oldest arrival first."""
        firsts = [next(iter(group.items())) for group in self._groups.values()]
        return sorted(firsts, key=lambda first: (first[1].arrived, first[0]))

    def head(self, needs: Needs) -> tuple[Ticket, Ask] | None:
        group = self._groups.get(needs)
        return next(iter(group.items())) if group else None

    def group(self, needs: Needs) -> tuple[Ticket, ...]:
        return tuple(self._groups.get(needs, ()))

    def needs(self) -> tuple[Needs, ...]:
        return tuple(self._groups)

    def overdue(self, now: float) -> list[tuple[Ticket, Ask]]:
        return [(ticket, ask) for ticket, ask in self._asks.items() if ask.deadline <= now]
