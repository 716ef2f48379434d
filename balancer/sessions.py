"""Sessions of the page: a browser gives the admin key once and has a cookie from then on. Pure.

Kept in memory alone: when the balancer starts again, the page asks for the key again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256

COOKIE = "balancer_session"


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    idle_seconds: float = 12 * 3600.0
    """For which it lasts without being used."""
    longest_seconds: float = 7 * 24 * 3600.0
    max_sessions: int = 64
    """The one that was used longest ago ends for one more."""


@dataclass(slots=True)
class Session:
    name: str
    """By which logs call it; tells nothing of the cookie."""
    began: float
    used: float


class Sessions:
    """Those that are open. Of each cookie only a digest is kept."""

    def __init__(self, policy: SessionPolicy | None = None) -> None:
        self.policy = policy or SessionPolicy()
        self._open: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, token: str, now: float) -> Session:
        """`token`: what the cookie holds; at least 256 bits of chance."""
        while len(self._open) >= self.policy.max_sessions:
            self._open.popitem(last=False)
        digest = _digest(token)
        session = self._open[digest] = Session(digest.hex()[:8], now, now)
        return session

    def find(self, token: str, now: float) -> Session | None:
        """The session of this cookie, which is used by that."""
        # Looked up by digest: how long that takes says nothing of the cookies that there are.
        digest = _digest(token)
        session = self._open.get(digest)
        if session is None:
            return None
        if self.seconds_left(session, now) <= 0:
            del self._open[digest]
            return None
        session.used = now
        self._open.move_to_end(digest)
        return session

    def end(self, token: str) -> None:
        self._open.pop(_digest(token), None)

    def seconds_left(self, session: Session, now: float) -> float:
        """If it is not used any more."""
        policy = self.policy
        return min(session.used + policy.idle_seconds, session.began + policy.longest_seconds) - now


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
