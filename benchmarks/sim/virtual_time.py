"""Time that passes only from one event to the next. Pure but for the acts that it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count


@dataclass(slots=True, eq=False)
class Timer:
    """One act to come. `cancel` is enough; the entry is dropped when its turn comes."""

    act: Callable[[], None] | None

    def cancel(self) -> None:
        self.act = None


class VirtualTime:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        """Seconds."""
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()  # what is due at the same moment happens in the order of asking

    def at(self, when: float, act: Callable[[], None]) -> Timer:
        """A moment that has passed counts as now."""
        timer = Timer(act)
        heappush(self._timers, (max(when, self.now), next(self._numbers), timer))
        return timer

    def after(self, seconds: float, act: Callable[[], None]) -> Timer:
        return self.at(self.now + seconds, act)

    def run(self, until: float, over: Callable[[], bool] = lambda: False) -> None:
        """Let it pass until that moment, or until `over` says so after an act."""
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heappop(self._timers)
            if timer.act is None:
                continue
            self.now = when
            timer.act()
            if over():
                return
        self.now = max(self.now, until)
