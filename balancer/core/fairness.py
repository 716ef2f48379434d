"""Whose turn it is among the clients of a class. Pure.

Each client's counter grows by the tokens that were served to it; the lowest is next. A client that comes
back after a pause starts level with the lowest of those who wait, so that nobody saves up turns. This is
the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024); between
two clients who both wait all the time, what they were served differs by no more than one request's tokens
each. (Deficit round robin gives the same bound in rounds; counters also give an order, which a line needs
whose first may prefer to wait.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Turns:
    """Counters of the clients that have something waiting; others are forgotten."""

    _served: dict[str, float] = field(default_factory=dict)
    _waiting: dict[str, int] = field(default_factory=dict)
    _level: float = 0.0
    """The highest counter that a client had when it was served last: where newcomers start at the least,
    when nobody else waits."""

    def joined(self, client: str) -> None:
        """One more request of this client waits."""
        if client not in self._waiting:
            self._served[client] = min((self._served[one] for one in self._waiting), default=self._level)
        self._waiting[client] = self._waiting.get(client, 0) + 1

    def left(self, client: str) -> None:
        """One less waits: it was served, or gave up."""
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client]
            del self._served[client]

    def served(self, client: str, tokens: float) -> None:
        """Call it before `left`."""
        if client in self._served:
            self._level = max(self._level, self._served[client])
            self._served[client] += tokens

    def counter(self, client: str) -> float:
        return self._served.get(client, self._level)

    def order(self, clients: Iterable[str]) -> list[str]:
        """Whose turn it is first."""
        return sorted(clients, key=lambda client: (self.counter(client), client))
