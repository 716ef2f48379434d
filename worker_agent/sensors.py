"""What tells that this machine is needed for something else: its battery, its heat, its memory.

Parsing is pure, and apart from the thin calls below. What cannot be found out is left out, never an error.
The figures of Macs follow what Apple and others wrote of them; they have not been seen on a Mac yet.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from worker_agent.hardware import printed_by

_ASK_LIMIT_SECONDS = 2.0
_HEATED = re.compile(r"cpu|soc|gpu|acpi|cluster|package|big|little", re.IGNORECASE)
"""Thermal zones of what computes. Batteries and Wi-Fi chips have zones too."""
_SET_BY_PROGRAMS = "x86_pkg_temp"
"""A zone whose trip points are alarms that any program sets, not where the processor slows down."""
_SLOWS_DOWN = ("passive", "hot", "critical")
_SANE_MILLIDEGREES = range(40_000, 150_000)
"""Trip points outside are placeholders: 0 and -274000 were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """This machine now; None: not known, or this machine has no such thing."""

    on_battery: bool = False
    battery_percent: float | None = None
    speed_percent: float | None = None
    """Of its full speed, to which heat has brought the processor (Macs with Intel processors)."""
    thermal_level: int | None = None
    """Apple silicon: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping."""
    degrees_left: float | None = None
    """Until the hottest part slows down or is shut off, in kelvin; negative: beyond (Linux)."""
    throttled_share: float | None = None
    """Of the time since the last reading, how long heat slowed the processor down (Linux on Intel)."""
    stalled_percent: float | None = None
    """Of the last 10 s, how long some process waited for memory (Linux)."""
    memory_level: int | None = None
    """A Mac's own judgement: 1 normal, 2 warning, 4 critical."""
    available_share: float | None = None
    """Of its memory, what a new process could have (Linux)."""


@dataclass(frozen=True, slots=True)
class Zone:
    """One thermal zone of Linux, in thousandths of a degree."""

    kind: str
    temperature: int
    trips: tuple[tuple[str, int], ...]
    """Kind and temperature of each trip point."""


# Pure: what the system says -> values.


def parse_speed_limit(output: str) -> float | None:
    """`CPU_Speed_Limit` of `pmset -g therm`; None where it says nothing of it (Apple silicon)."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d{1,3})\b", output)
    return float(found[1]) if found else None


def parse_thermal_level(output: str) -> int | None:
    """From `notifyutil -g com.apple.system.thermalpressurelevel`: the name, and a number behind it."""
    found = re.search(r"thermalpressurelevel\s+(\d)\s*$", output)
    return int(found[1]) if found else None


def parse_memory_level(output: str) -> int | None:
    """From `sysctl -n kern.memorystatus_vm_pressure_level`."""
    return int(output) if output.strip() in ("1", "2", "4") else None


def parse_stalled(text: str) -> float | None:
    """`some avg10` of a pressure file (PSI), in percent."""
    found = re.search(r"^some avg10=(\d{1,3}(?:\.\d+)?)\b", text, re.MULTILINE)
    return float(found[1]) if found else None


def own_group(text: str) -> str | None:
    """Our group's path below the mount of cgroup v2, from `/proc/self/cgroup`; None: version 1 only."""
    found = re.search(r"^0::(/.*)$", text, re.MULTILINE)
    return found[1] if found and ".." not in found[1].split("/") else None


def degrees_left(zones: Iterable[Zone]) -> float | None:
    """Between the hottest zone and its first trip point, in kelvin; None: no zone tells."""
    left = [
        (trip - zone.temperature) / 1000
        for zone in zones
        if _HEATED.search(zone.kind) and zone.kind != _SET_BY_PROGRAMS
        for kind, trip in zone.trips
        if kind in _SLOWS_DOWN and trip in _SANE_MILLIDEGREES
    ]
    return min(left, default=None)


def throttled_share(before_ms: int, now_ms: int, seconds: float) -> float | None:
    """Of the time between two looks at a counter of milliseconds; None where that makes no sense."""
    if seconds <= 0 or now_ms < before_ms:
        return None
    return min(1.0, (now_ms - before_ms) / 1000 / seconds)


# Thin: ask the system.


class Sensors:
    """Reads them. Keeps the last value of what the system only counts up."""

    def __init__(
        self,
        *,
        system: str | None = None,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._system = system or platform.system()
        self._root = root
        self._clock = clock
        self._counted: tuple[int, float] | None = None

    def read(self) -> Readings:
        """What is known now. Blocks for up to some seconds: call it in a thread. Does not raise."""
        on_battery, percent = _battery()
        readings = Readings(on_battery=on_battery, battery_percent=percent)
        if self._system == "Darwin":
            return replace(
                readings,
                speed_percent=parse_speed_limit(_printed_by(["pmset", "-g", "therm"])),
                thermal_level=parse_thermal_level(
                    _printed_by(["notifyutil", "-g", "com.apple.system.thermalpressurelevel"])
                ),
                memory_level=parse_memory_level(
                    _printed_by(["sysctl", "-n", "kern.memorystatus_vm_pressure_level"])
                ),
            )
        memory = psutil.virtual_memory()
        return replace(
            readings,
            degrees_left=degrees_left(self._zones()),
            throttled_share=self._throttled(),
            stalled_percent=self._stalled(),
            available_share=memory.available / memory.total,
        )

    def _zones(self) -> list[Zone]:
        zones = []
        for folder in sorted(self._root.glob("sys/class/thermal/thermal_zone*")):
            temperature = _number(folder / "temp")
            if temperature is None:
                continue
            trips = [
                (_text(folder / f"{path.name.removesuffix('_temp')}_type"), _number(path))
                for path in folder.glob("trip_point_*_temp")
            ]
            kinds = tuple((kind, trip) for kind, trip in trips if trip is not None)
            zones.append(Zone(_text(folder / "type"), temperature, kinds))
        return zones

    def _throttled(self) -> float | None:
        pattern = "sys/devices/system/cpu/cpu*/thermal_throttle/package_throttle_total_time_ms"
        counted = [number for path in self._root.glob(pattern) if (number := _number(path)) is not None]
        if not counted:
            return None
        now = (max(counted), self._clock())
        before, self._counted = self._counted, now
        return None if before is None else throttled_share(before[0], now[0], now[1] - before[1])

    def _stalled(self) -> float | None:
        """The machine's, or our own group's where that has a tighter limit."""
        files = [self._root / "proc/pressure/memory"]
        if group := own_group(_text(self._root / "proc/self/cgroup")):
            files.append(self._root / "sys/fs/cgroup" / group.lstrip("/") / "memory.pressure")
        found = [stalled for path in files if (stalled := parse_stalled(_text(path))) is not None]
        return max(found, default=None)


def _printed_by(command: Sequence[str]) -> str:
    return printed_by(command, _ASK_LIMIT_SECONDS)


def _battery() -> tuple[bool, float | None]:
    """Whether it is being emptied, and what is left in percent."""
    # psutil raises whatever a strange battery makes it stumble over; one without a reading is no battery.
    with contextlib.suppress(OSError, AttributeError, NotImplementedError, RuntimeError, ValueError):
        battery = psutil.sensors_battery()
        if battery is not None:
            return battery.power_plugged is False, float(battery.percent)
    return False, None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # a sensor that is switched off says so here
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None
