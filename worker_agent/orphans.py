"""Work that goes on in an engine for clients that have left, counted until its slots are free. Pure.

A cancelled request is over for us at once, for an engine when it notices: llama.cpp reads a prompt to the
end of its batch, and beside other answers perhaps to the prompt's end. Until then its slot is taken, and
whoever was sent there would wait behind nobody.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanPolicy:
    """When an engine that works for nobody is started anew."""

    share: float = 0.5
    """Of its slots, at least so many ..."""
    seconds: float = 30.0
    """... for longer than this, where nobody is served ..."""
    seconds_beside_others: float = 300.0
    """... or this where somebody is, whose answer the restart would end."""


class Orphans:
    """Those of one engine, from one start to its end."""

    def __init__(self, policy: OrphanPolicy) -> None:
        self._policy = policy
        self._many_since: float | None = None
        self.count = 0

    def left(self) -> None:
        """A request was given up before the engine had ended its answer."""
        self.count += 1

    def seen(self, busy: int, served: int) -> None:
        """The engine says that it works on `busy` requests; we hold `served` of them open."""
        self.count = min(self.count, max(0, busy - served))

    def forget(self) -> None:
        """The engine cannot be asked."""
        self.count = 0

    def tick(self, slots: int, served: int, now: float) -> float | None:
        """For how many seconds too many slots have worked for nobody, if too long; else None."""
        if self.count == 0 or self.count < self._policy.share * slots:
            self._many_since = None
            return None
        if self._many_since is None:
            self._many_since = now
        seconds = now - self._many_since
        limit = self._policy.seconds_beside_others if served else self._policy.seconds
        return seconds if seconds > limit else None
