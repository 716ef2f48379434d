"""May this worker be tried? A circuit breaker as a value: every step gives the next one. Pure.

Phases carry the field's words: `closed` (traffic passes), `open` (none does), `half_open` (one probe).
An attempt that began in an earlier phase says nothing about the present one, so in `half_open` only
the probe's own verdict counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from balancer.core.model import Ticket, Verdict


class Phase(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    trip_after: int = 3
    """Failures in a row. Meshes take 5 to 7 of hundreds; a room has two to ten workers (RELIABILITY 3)."""
    rest_seconds: float = 10.0
    """Doubled with each trip in short order, so that a flapping worker is held down ever longer."""
    longest_rest_seconds: float = 60.0
    """Also: closed for so long with good answers, a worker's earlier trips are forgotten."""


@dataclass(frozen=True, slots=True)
class Breaker:
    policy: BreakerPolicy = field(default_factory=BreakerPolicy)
    phase: Phase = Phase.CLOSED
    failures: int = 0
    """In a row, while closed."""
    trips: int = 0
    retry_at: float = 0.0
    """While open: when one probe may pass."""
    probe: Ticket | None = None
    closed_at: float = 0.0
    excused: bool = False
    """A rest was cut short since the worker had been away. Once in short order, lest one that comes and goes
    is never held down."""
    stuck: bool = False
    """Tripped for saying nothing, and not for errors: whoever is sent there waits in vain, so that it must
    show first, with a probe, that it answers at all."""

    def admits(self, now: float) -> bool:
        match self.phase:
            case Phase.CLOSED:
                return True
            case Phase.OPEN:
                return now >= self.retry_at
            case Phase.HALF_OPEN:
                return self.probe is None

    def sent(self, ticket: Ticket, now: float) -> Breaker:
        """An attempt begins. The first one that a rested breaker admits is its probe."""
        rested = self.phase is Phase.OPEN and now >= self.retry_at
        if rested or (self.phase is Phase.HALF_OPEN and self.probe is None):
            return replace(self, phase=Phase.HALF_OPEN, probe=ticket)
        return self

    def settled(self, ticket: Ticket, verdict: Verdict, now: float, *, silent: bool = False) -> Breaker:
        """An attempt ended; UNKNOWN teaches nothing, but an abandoned probe frees its place. `silent`: what
        was bad is that nothing came."""
        match self.phase, verdict:
            case Phase.HALF_OPEN, _ if ticket != self.probe:
                return self
            case Phase.HALF_OPEN, Verdict.GOOD:
                return replace(self, phase=Phase.CLOSED, failures=0, probe=None, closed_at=now, stuck=False)
            case Phase.HALF_OPEN, Verdict.BAD:
                return self._tripped(now, silent)
            case Phase.HALF_OPEN, Verdict.UNKNOWN:
                return replace(self, probe=None)
            case Phase.CLOSED, Verdict.GOOD:
                if not (self.failures or self.trips or self.excused):
                    return self
                stable = now - self.closed_at >= self.policy.longest_rest_seconds
                return (
                    replace(self, failures=0, trips=0, excused=False) if stable else replace(self, failures=0)
                )
            case Phase.CLOSED, Verdict.BAD if self.failures + 1 >= self.policy.trip_after:
                return self._tripped(now, silent)
            case Phase.CLOSED, Verdict.BAD:
                return replace(self, failures=self.failures + 1)
        return self

    def tripped(self, now: float) -> Breaker:
        """It was found to be stuck: no need to wait for further failures."""
        return self._tripped(now, silent=True)

    def returned(self, now: float) -> Breaker:
        """The worker was away and is back (restarted, most likely): its rest is over, a probe may pass."""
        if self.phase is Phase.OPEN and self.retry_at > now and not self.excused:
            return replace(self, retry_at=now, excused=True)
        return self

    def _tripped(self, now: float, silent: bool) -> Breaker:
        rest = min(self.policy.rest_seconds * 2.0 ** min(self.trips, 30), self.policy.longest_rest_seconds)
        return replace(
            self,
            phase=Phase.OPEN,
            failures=0,
            trips=self.trips + 1,
            retry_at=now + rest,
            probe=None,
            stuck=self.stuck or silent,
        )
