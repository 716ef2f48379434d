"""Busy, or stuck? Told by whether anything comes of the requests that an engine works on. Pure.

How an engine answers on its health path says little: a busy one was seen to let that wait for ten seconds
(RELIABILITY, Ray's case), a stuck one may answer it at once. So: it is stuck when requests wait for it and
nothing has come for any of them, for much longer than the pauses between pieces are otherwise. Before a first
piece it may be reading a prompt, which takes minutes on a slow processor; then the prompts' length counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessPolicy:
    """How long silence is borne, in seconds."""

    gaps: float = 50.0
    """So many usual pauses between two pieces of an answer ..."""
    gap_floor_seconds: float = 10.0
    gap_ceiling_seconds: float = 120.0
    """... within these bounds; the upper one also where no pause is known yet."""
    readings: float = 5.0
    """So many times as long as the prompts would take at the slowest pace that was seen ..."""
    reading_floor_seconds: float = 60.0
    reading_ceiling_seconds: float = 1800.0
    unknown_seconds_per_byte: float = 0.05
    """... or at this pace where none was seen: 5 tokens a second."""
    telling_prompt_bytes: int = 2000
    """Shorter prompts say little about the pace: they take what an engine takes to begin at all."""


_GAP_WEIGHT = 0.1  # of the newest pause in the average


@dataclass(slots=True)
class _Request:
    began: float
    prompt_bytes: int
    together_bytes: int
    """Of all prompts that were to be read when it came, its own included: they share the engine."""
    last: float | None = None
    """When its last piece came."""
    held: bool = False
    """Its client does not read: what the engine would send is not seen."""


class Liveness:
    """One engine, from one start to its end. The caller's clock; the keys are the caller's, too."""

    def __init__(self, policy: LivenessPolicy, now: float) -> None:
        self._policy = policy
        self._requests: dict[int, _Request] = {}
        self._quiet_since = now
        self._ticked = now
        self._gap: float | None = None
        self._slowest: float | None = None

    def began(self, key: int, prompt_bytes: int, now: float) -> None:
        """A request was sent to the engine. Its arrival is no sign of life."""
        if not self._waiting():
            self._quiet_since = now
        self._requests[key] = _Request(now, prompt_bytes, self._unread_bytes() + prompt_bytes)

    def heard(self, key: int, now: float, *, piece: bool) -> None:
        """Something came for it: a piece of the answer, or a mere sign of life."""
        self._quiet_since = now
        request = self._requests.get(key)
        if request is None or not piece:
            return
        if request.last is None:
            self._learn_pace(request, now)
        else:
            gap = now - request.last
            self._gap = gap if self._gap is None else self._gap + _GAP_WEIGHT * (gap - self._gap)
        request.last = now

    def held(self, key: int) -> None:
        """Its client has stopped reading."""
        if request := self._requests.get(key):
            request.held = True

    def resumed(self, key: int, now: float) -> None:
        """Its client reads again; how long it did not says nothing about the engine."""
        if request := self._requests.get(key):
            request.held = False
            request.last = None if request.last is None else now
            self._quiet_since = now

    def ended(self, key: int) -> None:
        """It is over, however."""
        self._requests.pop(key, None)

    def tick(self, now: float, interval: float) -> float | None:
        """To be called each `interval` seconds. The seconds of silence, if the engine is stuck; else None."""
        late = now - self._ticked - 2 * interval
        if (
            late > 0
        ):  # we were not there ourselves (a stopped process, a machine asleep): nobody could be heard
            self._quiet_since = min(now, self._quiet_since + late)
        self._ticked = now
        silence = now - self._quiet_since
        return silence if self._waiting() and silence > self.limit_seconds else None

    @property
    def limit_seconds(self) -> float:
        """How long silence is borne now."""
        policy = self._policy
        limit = policy.gap_ceiling_seconds
        if self._gap is not None:
            limit = min(limit, max(policy.gap_floor_seconds, policy.gaps * self._gap))
        if any(request.last is None for request in self._requests.values()):
            limit = max(limit if self._gap is not None else 0.0, self._reading_limit())
        return limit

    def _reading_limit(self) -> float:
        policy = self._policy
        if self._slowest is None:
            seconds = policy.unknown_seconds_per_byte * self._unread_bytes()
        else:
            seconds = policy.readings * self._slowest * self._unread_bytes()
        return min(policy.reading_ceiling_seconds, max(policy.reading_floor_seconds, seconds))

    def _learn_pace(self, request: _Request, now: float) -> None:
        """The slowest ever counts: what an engine remembers of earlier prompts is read in no time, and the
        first long prompt since its start was remembered by nobody."""
        if request.prompt_bytes >= self._policy.telling_prompt_bytes:
            pace = (now - request.began) / request.together_bytes
            self._slowest = pace if self._slowest is None else max(self._slowest, pace)

    def _unread_bytes(self) -> int:
        return sum(request.prompt_bytes for request in self._requests.values() if request.last is None)

    def _waiting(self) -> bool:
        return any(not request.held for request in self._requests.values())
