"""How much of itself this machine gives at present: less on battery, when it is hot, when memory is short.

The person whose machine it is comes first. A share lowers the slots that are told to balancers, so that what
is asked goes elsewhere; what runs goes on. It never becomes nothing, as a model may be on this machine only:
the least is one request at a time. `Judge` decides, and is pure; `Pressure` looks again and again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from worker_agent.sensors import Readings, Sensors

_LEAST = 1e-6
"""Below what one of 4096 slots is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PressurePolicy:
    """When to give less, and how much less. Of two numbers, the second is where it ends: between them, what
    was stays, so that a value that plays around one of them changes nothing."""

    battery_share: float = 0.5
    """On battery."""
    battery_low_percent: tuple[float, float] = (20.0, 25.0)
    """Below, on battery: one request at a time, and nothing keeps the machine awake."""
    hot_share: float = 0.5
    degrees_left: tuple[float, float] = (0.0, 5.0)
    throttled_share: tuple[float, float] = (0.2, 0.02)
    speed_percent: tuple[float, float] = (80.0, 95.0)
    thermal_level: tuple[int, int] = (2, 0)
    """Heavy. A Mac that works hard is moderately warm all day."""
    memory_share: float = 0.5
    stalled_percent: tuple[float, float] = (10.0, 2.0)
    stalled_badly_percent: tuple[float, float] = (40.0, 10.0)
    """Beyond: one request at a time."""
    available_share: tuple[float, float] = (0.03, 0.05)
    """Of the memory. Models may take nine tenths of what is free, which leaves this much on most machines."""
    calm_seconds: float = 30.0
    """A reason is dropped once it has not been seen for so long."""
    look_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Share:
    """What this machine gives of itself."""

    factor: float = 1.0
    """Of its slots; above 0."""
    reasons: tuple[str, ...] = ()
    """For people; empty: nothing is held back."""
    saving: bool = False
    """The battery is nearly empty: let the machine sleep even while requests run."""

    def slots(self, of: int) -> int:
        """How many of so many slots may be used: at least one."""
        return max(1, min(of, math.floor(of * self.factor)))

    @property
    def detail(self) -> str:
        """`on battery (43 %): half of its slots`; empty where nothing is held back."""
        if not self.reasons:
            return ""
        return f"{' and '.join(self.reasons)}: {_how_much(self.factor)}"


def _battery_words(readings: Readings) -> str:
    if not readings.on_battery:
        return "on battery until a moment ago"
    percent = readings.battery_percent
    return "on battery" if percent is None else f"on battery ({percent:.0f} %)"


def _how_much(factor: float) -> str:
    if factor <= _LEAST:
        return "one request at a time"
    return "half of its slots" if factor == 0.5 else f"{factor:.0%} of its slots".replace("%", " %")


class Judge:
    """Turns readings into a share. Pure: `now` is the caller's clock."""

    def __init__(self, policy: PressurePolicy) -> None:
        self._policy = policy
        self._seen: dict[str, float] = {}  # each reason that holds, and when it was seen last

    def judge(self, readings: Readings, now: float) -> Share:
        """What to give from now on."""
        policy = self._policy
        on_battery = readings.on_battery
        percent = readings.battery_percent if on_battery else None
        battery = self._holds("battery", on_battery, on_battery, now)
        low = self._below("battery low", percent, policy.battery_low_percent, now)
        hot = any(
            [
                self._below("degrees", readings.degrees_left, policy.degrees_left, now),
                self._above("throttled", readings.throttled_share, policy.throttled_share, now),
                self._below("speed", readings.speed_percent, policy.speed_percent, now),
                self._above("level", readings.thermal_level, policy.thermal_level, now),
            ]
        )
        level = readings.memory_level
        short = any(
            [
                self._above("stalled", readings.stalled_percent, policy.stalled_percent, now),
                self._below("available", readings.available_share, policy.available_share, now),
                self._above("memory level", level, (2, 1), now),
            ]
        )
        very_short = any(
            [
                self._above("stalled badly", readings.stalled_percent, policy.stalled_badly_percent, now),
                self._above("memory critical", level, (4, 2), now),
            ]
        )
        found: list[tuple[str, float]] = []
        if battery or low:
            found.append((_battery_words(readings), _LEAST if low else policy.battery_share))
        if hot:
            found.append(("hot", policy.hot_share))
        if short or very_short:
            found.append(("short of memory", _LEAST if very_short else policy.memory_share))
        return Share(
            factor=min((factor for _, factor in found), default=1.0),
            reasons=tuple(reason for reason, _ in found),
            saving=low and on_battery,
        )

    def _above(self, name: str, value: float | None, limits: tuple[float, float], now: float) -> bool:
        begin, end = limits
        return self._holds(name, value is not None and value >= begin, value is not None and value > end, now)

    def _below(self, name: str, value: float | None, limits: tuple[float, float], now: float) -> bool:
        begin, end = limits
        return self._holds(name, value is not None and value < begin, value is not None and value < end, now)

    def _holds(self, name: str, begins: bool, lasts: bool, now: float) -> bool:
        """Whether a reason holds: since it began, until it has not lasted for the calm time."""
        if begins or (lasts and name in self._seen):
            self._seen[name] = now
        elif name in self._seen and now - self._seen[name] >= self._policy.calm_seconds:
            del self._seen[name]
        return name in self._seen


class _Reader(Protocol):
    def read(self) -> Readings:
        """Blocks; does not raise."""
        ...


@dataclass
class Pressure:
    """The share of this machine, kept up to date by `run`. Without that all of it."""

    policy: PressurePolicy = field(default_factory=PressurePolicy)
    sensors: _Reader = field(default_factory=Sensors)
    now: Share = field(default=Share(), init=False)

    @property
    def share(self) -> float:
        """The factor of the present share: above 0, at most 1."""
        return self.now.factor

    @property
    def detail(self) -> str:
        """One sentence for the report; empty where nothing is held back."""
        return self.now.detail

    async def run(self, on_change: Callable[[], None]) -> None:
        """Looks for ever, and calls `on_change` after each change of what `share` or `detail` say."""
        judge, loop = Judge(self.policy), asyncio.get_running_loop()
        while True:
            readings = await asyncio.to_thread(self.sensors.read)
            before, self.now = self.now, judge.judge(readings, loop.time())
            if self.now != before:
                on_change()
            await asyncio.sleep(self.policy.look_seconds)
