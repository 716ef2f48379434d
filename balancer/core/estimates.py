"""What is learned of a worker from the attempts that end on it: a rolling window. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_SECONDS = 300.0
WINDOW_LENGTH = 100
"""The window holds what is younger than the first and no more than the second: old news fades on a quiet
worker, and a busy one costs no more memory than this."""


@dataclass(slots=True)
class Window:
    """The last attempts on one worker. Sums are kept, so that a read costs no walk."""

    _outcomes: deque[tuple[float, bool, float]] = field(default_factory=deque)
    _good: int = 0
    _good_seconds: float = 0.0

    def add(self, now: float, *, good: bool, seconds: float) -> None:
        self._outcomes.append((now, good, seconds))
        if good:
            self._good += 1
            self._good_seconds += seconds
        if len(self._outcomes) > WINDOW_LENGTH:
            self._forget_oldest()
        self.fade(now)

    def fade(self, now: float) -> None:
        """Forget what is older than the window; call it before reading."""
        while self._outcomes and now - self._outcomes[0][0] > WINDOW_SECONDS:
            self._forget_oldest()

    @property
    def success_rate(self) -> float:
        """0 to 1; 1 where nothing is known, so that a new worker gets its chance."""
        return self._good / len(self._outcomes) if self._outcomes else 1.0

    @property
    def average_seconds(self) -> float | None:
        """Mean time of the good answers; None where there are none."""
        return max(self._good_seconds, 0.0) / self._good if self._good else None

    def _forget_oldest(self) -> None:
        _, good, seconds = self._outcomes.popleft()
        if good:
            self._good -= 1
            # The running sum gathers rounding errors; it starts afresh whenever it can.
            self._good_seconds = self._good_seconds - seconds if self._good else 0.0
