"""Requests that engines died of, and for how long they are not tried again. Pure.

Known by their fingerprints alone: what was asked is nobody's business here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class QuarantinePolicy:
    seconds: float = 600.0
    most: int = 1024
    """Fingerprints; beyond it the oldest is let go."""


@dataclass(slots=True)
class Quarantine:
    policy: QuarantinePolicy = field(default_factory=QuarantinePolicy)
    _until: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """In the order in which they end."""

    def block(self, fingerprint: int, now: float) -> None:
        """As many engines died over it as may (`retry.MAX_CRASHES`). Its time begins anew if it was blocked.
        `now`: seconds, never less than before."""
        self._let_go(now)
        self._until[fingerprint] = now + self.policy.seconds
        self._until.move_to_end(fingerprint)
        while len(self._until) > self.policy.most:
            self._until.popitem(last=False)

    def seconds_left(self, fingerprint: int, now: float) -> float:
        """For which it is still blocked; 0.0: it is not."""
        return max(self._until.get(fingerprint, now) - now, 0.0)

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._until)

    def _let_go(self, now: float) -> None:
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
