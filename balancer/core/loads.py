"""Models that a worker has not loaded: what loading takes, and when they will be there. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

LEAST_SECONDS, LONGEST_SECONDS = 0.5, 3600.0
"""Bounds of a measured load time: shorter ones are rather an engine that had the model all the time."""
LEAST_LEFT = 0.1
LEARNING_STEP = 0.5
MOVED_SHARE, MOVED_SECONDS = 0.1, 0.5
"""A new word on the end of a load counts when it differs by more than this share of what is left, and by more
than so many seconds: reports come twenty times a second while one is under way, and what rests on it is not
to be computed anew for each."""
REFUSED_SECONDS = 60.0
"""For so long at the most a worker's refusal counts, if it says nothing of the model itself."""
GUESSED_SECONDS = 5.0
"""What is left of a load of which nothing at all is known."""


@dataclass(slots=True)
class Load:
    """One model that is not loaded on one worker."""

    seconds: float
    """What loading takes, from when it is asked for; what has to make room for it included."""
    ready_at: float | None = None
    """When it will answer; None: nobody has asked for it yet."""
    progress: float | None = None
    """The share that is done, as the worker tells it."""
    refused_until: float = -inf
    """Until then it counts as being loaded, although the worker's reports may not say so yet: it has said so
    to somebody who could not wait."""

    @property
    def begun(self) -> bool:
        return self.ready_at is not None

    def wait(self, now: float) -> float:
        """Seconds until it answers what is sent now; of a load that is late, as long again as it is late."""
        if self.ready_at is None:
            return self.seconds
        return max(abs(self.ready_at - now), LEAST_LEFT)

    def expect(self, ready_at: float, now: float) -> bool:
        """A new word on when it will be there. False: it makes no difference."""
        if self.ready_at is not None:
            difference = abs(ready_at - self.ready_at)
            if difference <= max(MOVED_SECONDS, MOVED_SHARE * max(ready_at - now, 0.0)):
                return False
        self.ready_at = ready_at
        return True

    def refused(self, seconds: float | None, now: float) -> None:
        """The worker loads it, and has turned somebody away who could not wait for so long."""
        left = seconds if seconds is not None else (self.wait(now) or GUESSED_SECONDS)
        self.ready_at = now + max(left, LEAST_LEFT)
        self.refused_until = now + min(max(left, 1.0), REFUSED_SECONDS)


def learned(known: float | None, measured: float) -> float:
    """A load time after one more was measured."""
    measured = min(max(measured, LEAST_SECONDS), LONGEST_SECONDS)
    return measured if known is None else known + LEARNING_STEP * (measured - known)
