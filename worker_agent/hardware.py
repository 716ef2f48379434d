"""What this machine has: processor, memory, accelerators. Thin calls below, their parsing apart and pure."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_GIB = 2**30
_ASK_LIMIT_SECONDS = 20.0  # nvidia-smi takes seconds where the driver has to wake up first
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What an engine can use here."""

    system: str
    """`Linux` or `Darwin`."""
    architecture: str
    """`x86_64`, `arm64` or `aarch64`."""
    cores: int
    """Processors that this process may use: affinity and container quota are respected."""
    memory_bytes: int
    """Installed, or what the container may use."""
    apple_chip: str | None = None
    """`Apple M2 Ultra`; None elsewhere."""
    gpus: tuple[Gpu, ...] = ()

    @property
    def is_apple_silicon(self) -> bool:
        """MLX runs here."""
        return self.system == "Darwin" and self.architecture == "arm64"

    def __str__(self) -> str:
        """One printable line for people: `NVIDIA GeForce RTX 4090 24 GiB, 16 x86_64 cores, 64 GiB`."""
        memory = gib(self.memory_bytes)
        if self.apple_chip:
            return f"{self.apple_chip}, {memory}"
        gpus = "".join(f"{gpu.name} {gib(gpu.memory_bytes)}, " for gpu in self.gpus)
        cores = "core" if self.cores == 1 else "cores"
        return f"{gpus}{self.cores} {self.architecture} {cores}, {memory}"


def gib(size_bytes: int) -> str:
    """`24 GiB`, rounded; one decimal below 8 GiB, where it matters."""
    size = size_bytes / _GIB
    return f"{size:.0f} GiB" if size >= 7.95 else f"{size:.1f} GiB"


# Pure: what the system's tools print -> values.


def parse_nvidia_smi(output: str) -> tuple[Gpu, ...]:
    """The GPUs in `nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits` (MiB).

    A line that is something else (an error, `[N/A]` on chips that share the system's memory) is left out.
    """
    gpus = []
    for line in output.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name.strip() and mebibytes.strip().isascii() and mebibytes.strip().isdigit():
            gpus.append(Gpu(name.strip(), int(mebibytes) * 2**20))
    return tuple(gpus)


def parse_cpu_max(text: str) -> float | None:
    """Processors allowed by cgroup v2's `cpu.max`: `200000 100000` -> 2.0; None: no limit that we read."""
    quota, _, period = text.strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        return int(quota) / int(period)
    return None


def parse_memory_max(text: str) -> int | None:
    """Bytes in cgroup v2's `memory.max`; None: `max`, or not understood."""
    return int(text) if text.strip().isdigit() else None


def usable_cores(affinity: int, quota: float | None) -> int:
    """At least one; a quota of 1.5 processors counts as one, since engine threads spin."""
    return max(1, min(affinity, math.floor(quota) if quota is not None else affinity))


# Thin: ask the system. Nothing here raises; what cannot be found out is left out.


def detect() -> Hardware:
    """What this machine has. Blocks for up to some seconds: call it in a thread."""
    system, architecture = platform.system(), platform.machine()
    limit = parse_memory_max(_read(_CGROUP / "memory.max"))
    memory = psutil.virtual_memory().total
    apple = system == "Darwin" and architecture == "arm64"
    return Hardware(
        system=system,
        architecture=architecture,
        cores=usable_cores(_affinity(), parse_cpu_max(_read(_CGROUP / "cpu.max"))),
        memory_bytes=min(memory, limit) if limit is not None else memory,
        apple_chip=(_ask(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or None) if apple else None,
        gpus=parse_nvidia_smi(
            _ask(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
        ),
    )


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ask(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ASK_LIMIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
