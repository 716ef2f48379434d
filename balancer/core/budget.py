"""How many retries all requests together may make. Pure.

A worker that fails makes every request on it a second one. Without a bound the retries of many are what
keeps a room down that could recover (RELIABILITY D5). The shape is Finagle's and linkerd's: every request
brings a share of a retry, that is lost if nobody needs it soon, and there is a little for quiet times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SLICES = 10
"""What requests have brought is kept in so many equal parts of its time, and lost part by part."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    share: float = 0.2
    """Retries that each request brings."""
    per_second: float = 10.0
    """Retries beside these, however few requests there are."""
    ttl_seconds: float = 10.0
    """For so long both can be saved up: a machine that dies takes many requests with it at once."""


@dataclass(slots=True)
class _Slice:
    number: int
    tokens: float


@dataclass(slots=True)
class RetryBudget:
    """Of any T seconds it holds that the retries taken are at most `share` times the requests that arrived in
    them and in the `ttl_seconds` before, plus `per_second` times (T + `ttl_seconds`). Over a whole run it
    holds that no request pays for more than `share` retries. Constant time and memory.
    """

    policy: BudgetPolicy = field(default_factory=BudgetPolicy)
    _slices: deque[_Slice] = field(default_factory=deque)
    """What requests have brought and nobody has used, the oldest first; none is empty."""
    _reserve: float | None = None
    """None: full, since nothing was taken yet."""
    _filled_at: float = 0.0

    def arrived(self, now: float) -> None:
        """A request, in its first attempt; `now` in seconds, never less than before."""
        self._lose(now)
        number = self._number(now)
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number, 0.0))
        self._slices[-1].tokens += self.policy.share

    def take(self, now: float) -> bool:
        """One retry; False: none is left."""
        self._lose(now)
        reserve = self._refilled(now)
        if reserve + sum(one.tokens for one in self._slices) < 1.0 - _ROUNDING:
            return False
        missing = 1.0
        while self._slices and missing > 0.0:
            oldest = self._slices[0]
            used = min(oldest.tokens, missing)
            oldest.tokens -= used
            missing -= used
            if oldest.tokens <= _ROUNDING:
                self._slices.popleft()
        self._reserve, self._filled_at = max(reserve - missing, 0.0), now
        return True

    def _refilled(self, now: float) -> float:
        most = self.policy.per_second * self.policy.ttl_seconds
        if self._reserve is None:
            return most
        return min(self._reserve + self.policy.per_second * (now - self._filled_at), most)

    def _lose(self, now: float) -> None:
        """What has been there for too long."""
        oldest = self._number(now) - SLICES
        while self._slices and self._slices[0].number <= oldest:
            self._slices.popleft()

    def _number(self, now: float) -> int:
        return int(now * SLICES // self.policy.ttl_seconds)
