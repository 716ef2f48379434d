"""What this machine has: processor, memory, accelerators. Thin calls below, their parsing apart and pure."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from worker_agent.memory import DeviceNow, MemoryNow, Pool

_GIB = 2**30
_ASK_LIMIT_SECONDS = 20.0  # nvidia-smi takes seconds where the driver has to wake up first
_CGROUP_NO_LIMIT = 2**60
"""Version 1 of memory cgroups has a number near 2**63 where there is no limit."""


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


# Pure: what the system's tools and files say -> values.


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


def parse_gpu_memory(output: str) -> tuple[DeviceNow, ...]:
    """Each GPU's memory in `nvidia-smi --query-gpu=index,memory.total,memory.free` (csv,noheader,nounits)."""
    return tuple(
        DeviceNow(index=index, total_bytes=total * 2**20, available_bytes=free * 2**20)
        for index, total, free in _rows_of_numbers(output, columns=3)
    )


def parse_compute_apps(output: str) -> dict[int, int]:
    """Bytes per process id in `nvidia-smi --query-compute-apps=pid,used_memory` (csv,noheader,nounits), over
    all GPUs."""
    held: dict[int, int] = {}
    for pid, mebibytes in _rows_of_numbers(output, columns=2):
        held[pid] = held.get(pid, 0) + mebibytes * 2**20
    return held


def _rows_of_numbers(output: str, *, columns: int) -> Iterable[list[int]]:
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == columns and all(cell.isascii() and cell.isdigit() for cell in cells):
            yield [int(cell) for cell in cells]


def visible(gpus: Sequence[DeviceNow], variable: str | None) -> tuple[DeviceNow, ...]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves us; all where it is not set, or names them in another way than
    by number."""
    if variable is None:
        return tuple(gpus)
    wanted = [word.strip() for word in variable.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() for word in wanted):
        return () if wanted == ["-1"] else tuple(gpus)
    by_index = {gpu.index: gpu for gpu in gpus}
    return tuple(by_index[int(word)] for word in wanted if int(word) in by_index)


def by_number(variable: str, indices: Mapping[str, int]) -> str:
    """`CUDA_VISIBLE_DEVICES` with each `GPU-...`, which may be the beginning of one's UUID, as its number."""
    words = [word.strip() for word in variable.split(",")]
    return ",".join(
        next((str(index) for uuid, index in indices.items() if word and uuid.startswith(word)), word)
        for word in words
    )


def parse_uuids(output: str) -> dict[str, int]:
    """Index by UUID in `nvidia-smi --query-gpu=uuid,index --format=csv,noheader`."""
    rows = (line.rpartition(",") for line in output.splitlines())
    return {
        uuid.strip(): int(index)
        for uuid, _, index in rows
        if uuid.startswith("GPU-") and index.strip().isascii() and index.strip().isdigit()
    }


def parse_cpu_max(text: str) -> float | None:
    """Processors allowed by cgroup v2's `cpu.max`: `200000 100000` -> 2.0; None: no limit that we read."""
    quota, _, period = text.strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        return int(quota) / int(period)
    return None


def parse_memory_max(text: str) -> int | None:
    """Bytes in a cgroup's `memory.max` or `memory.limit_in_bytes`; None: no limit, or not understood."""
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < _CGROUP_NO_LIMIT else None


def parse_meminfo(text: str) -> tuple[int, int] | None:
    """Total and available bytes in `/proc/meminfo`; None: not understood."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d{1,15}) kB$", text, re.MULTILINE))
    if len(found) < 2:
        return None
    return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024


def parse_reclaimable(stat: str) -> int:
    """Bytes of files in a cgroup's `memory.stat` that the kernel gives away before it lets anybody starve."""
    rows: list[tuple[str, str]] = re.findall(r"^(\w{1,64}) (\d{1,20})$", stat, re.MULTILINE)
    found = dict(rows)
    # Version 1 counts its children only in the totals.
    kinds = ("inactive_file", "active_file")
    return sum(int(found.get(f"total_{kind}") or found.get(kind) or 0) for kind in kinds)


def parse_anonymous(status: str) -> int:
    """Bytes in `/proc/PID/status` that no file could give back: its own and shared ones, not mapped files."""
    found = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d{1,15}) kB$", status, re.MULTILINE)
    return sum(map(int, found)) * 1024


def parse_top(output: str) -> dict[int, int]:
    """Bytes per process id in macOS' `top -l 1 -stats pid,mem`: what Activity Monitor calls memory, a GPU's
    buffers included."""
    units = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    rows = re.findall(r"^\s*(\d{1,10})\*?\s+(\d{1,12})([BKMGT])[+-]?\s*$", output, re.MULTILINE)
    return {int(pid): int(size) * units[unit] for pid, size, unit in rows}


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """Where one hierarchy is mounted, and which of its groups is seen there as its root."""

    folder: str
    root: str


def parse_cgroup_mounts(mountinfo: str, kind: str, controller: str = "") -> tuple[CgroupMount, ...]:
    """Of `/proc/self/mountinfo`: `cgroup2`, or `cgroup` with a controller."""
    mounts = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(tail) < 3 or tail[0] != kind:
            continue
        if not controller or controller in tail[2].split(","):
            mounts.append(CgroupMount(folder=fields[4], root=fields[3]))
    return tuple(mounts)


def parse_own_cgroup(text: str, controller: str = "") -> str | None:
    """Our group's path in `/proc/self/cgroup`: in version 2, or in version 1's hierarchy of a controller."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and (controller in controllers.split(",") if controller else not controllers):
            return path
    return None


def cgroup_folders(mount: CgroupMount, own: str) -> tuple[str, ...]:
    """Our group's folder and its ancestors' up to the mount: a limit of each of them holds for us.

    In a container whose mount begins at its own group the path is told as the host sees it.
    """
    root = mount.root.rstrip("/")
    if root and (own == root or own.startswith(root + "/")):
        own = own[len(root) :] or "/"
    parts = [part for part in PurePosixPath(own).parts if part not in ("/", "..", ".")]
    chain = [mount.folder]
    for part in parts:
        chain.append(f"{chain[-1]}/{part}")
    return tuple(reversed(chain))


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """One group's memory, in bytes."""

    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int

    @property
    def available_bytes(self) -> int:
        """What its processes could still have."""
        return max(0, self.limit_bytes - max(0, self.used_bytes - self.reclaimable_bytes))


def memory_under(total: int, available: int, groups: Iterable[CgroupMemory]) -> MemoryNow:
    """The machine's memory, as far as the groups that we are in leave it to us."""
    for group in groups:
        total, available = min(total, group.limit_bytes), min(available, group.available_bytes)
    return MemoryNow(total_bytes=total, available_bytes=available)


def metal_limit(memory_bytes: int, wired_limit_mb: str) -> int:
    """Bytes of unified memory that a Mac lets its GPU use: `sysctl iogpu.wired_limit_mb`, where 0 stands for
    the system's own choice, about two thirds of a small memory and three quarters of a large one."""
    told = wired_limit_mb.strip()
    if told.isdigit() and int(told) > 0:
        return min(int(told) * 2**20, memory_bytes)
    return memory_bytes * 2 // 3 if memory_bytes <= 36 * _GIB else memory_bytes * 3 // 4


def usable_cores(affinity: int, quota: float | None) -> int:
    """At least one; a quota of 1.5 processors counts as one, since engine threads spin."""
    return max(1, min(affinity, math.floor(quota) if quota is not None else affinity))


# Thin: ask the system. Nothing here raises; what cannot be found out is left out.


def detect() -> Hardware:
    """What this machine has. Blocks for up to some seconds: call it in a thread."""
    system, architecture = platform.system(), platform.machine()
    apple = system == "Darwin" and architecture == "arm64"
    memory = psutil.virtual_memory().total
    return Hardware(
        system=system,
        architecture=architecture,
        cores=usable_cores(_affinity(), _cpu_quota()),
        memory_bytes=memory_under(memory, memory, _memory_groups()).total_bytes,
        apple_chip=(printed_by(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or None)
        if apple
        else None,
        gpus=_gpus(),
    )


def measure_memory() -> Mapping[Pool, MemoryNow]:
    """Each pool as it is now: RAM always, VRAM where there is an NVIDIA GPU of its own memory.

    Linux: what the kernel calls available, and what every memory cgroup above us leaves. Files that are only
    mapped or cached count as available, so that `resident_bytes` leaves them out. A Mac: no more than its GPU
    may use. Blocks for up to some seconds: call it in a thread.
    """
    pools = {Pool.RAM: _ram()}
    if devices := _devices():
        pools[Pool.VRAM] = MemoryNow(
            total_bytes=sum(device.total_bytes for device in devices),
            available_bytes=sum(device.available_bytes for device in devices),
            devices=devices,
        )
    return pools


def resident_bytes(pids: Collection[int]) -> Mapping[Pool, int]:
    """What these processes and their descendants hold of each pool and would give back by ending.

    Linux: their anonymous and shared memory; weights that are mapped from a file are counted as available
    already. macOS: what Activity Monitor shows. Of VRAM what the driver tells of their ids, which in some
    containers is nothing: then it is too little, never too much. Blocks: call it in a thread.
    """
    family = _family(pids)
    if not family:
        return {Pool.RAM: 0, Pool.VRAM: 0}
    if platform.system() == "Darwin":
        table = parse_top(printed_by(["top", "-l", "1", "-stats", "pid,mem"]))
        ram = sum(table[pid] if pid in table else _rss(pid) for pid in family)
    elif Path("/proc/self/status").exists():
        ram = sum(parse_anonymous(_read(Path(f"/proc/{pid}/status"))) for pid in family)
    else:
        ram = sum(map(_rss, family))
    apps = parse_compute_apps(
        printed_by(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"])
    )
    return {Pool.RAM: ram, Pool.VRAM: sum(held for pid, held in apps.items() if pid in family)}


def _ram() -> MemoryNow:
    found = parse_meminfo(_read(Path("/proc/meminfo")))
    memory = psutil.virtual_memory()
    total, available = found or (memory.total, memory.available)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        limit = metal_limit(total, printed_by(["sysctl", "-n", "iogpu.wired_limit_mb"]))
        return MemoryNow(total_bytes=limit, available_bytes=min(available, limit))
    return memory_under(total, available, _memory_groups())


def _gpus() -> tuple[Gpu, ...]:
    found = parse_nvidia_smi(
        printed_by(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    )
    numbered = [
        DeviceNow(index=index, total_bytes=gpu.memory_bytes, available_bytes=0)
        for index, gpu in enumerate(found)
    ]
    return tuple(found[device.index] for device in visible(numbered, _visible_devices()))


def _devices() -> tuple[DeviceNow, ...]:
    found = parse_gpu_memory(
        printed_by(
            ["nvidia-smi", "--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits"]
        )
    )
    return visible(found, _visible_devices())


def _visible_devices() -> str | None:
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None or "GPU-" not in variable:
        return variable
    uuids = printed_by(["nvidia-smi", "--query-gpu=uuid,index", "--format=csv,noheader,nounits"])
    return by_number(variable, parse_uuids(uuids))


def _memory_groups() -> list[CgroupMemory]:
    groups = []
    for folder in _own_folders("cgroup2"):
        limits = [parse_memory_max(_read(folder / name)) for name in ("memory.max", "memory.high")]
        groups.append((folder, limits, "memory.current"))
    for folder in _own_folders("cgroup", "memory"):
        groups.append(
            (folder, [parse_memory_max(_read(folder / "memory.limit_in_bytes"))], "memory.usage_in_bytes")
        )
    return [
        CgroupMemory(
            limit_bytes=min(limit for limit in limits if limit is not None),
            used_bytes=parse_memory_max(_read(folder / used)) or 0,
            reclaimable_bytes=parse_reclaimable(_read(folder / "memory.stat")),
        )
        for folder, limits, used in groups
        if any(limit is not None for limit in limits)
    ]


def _cpu_quota() -> float | None:
    """The tightest of every group that we are in."""
    quotas = [parse_cpu_max(_read(folder / "cpu.max")) for folder in _own_folders("cgroup2")]
    for folder in _own_folders("cgroup", "cpu"):
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        quotas.append(parse_cpu_max(f"{quota} {period}"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _own_folders(kind: str, controller: str = "") -> list[Path]:
    own = parse_own_cgroup(_read(Path("/proc/self/cgroup")), controller)
    mounts = parse_cgroup_mounts(_read(Path("/proc/self/mountinfo")), kind, controller)
    if own is None or not mounts:
        return []
    return [Path(folder) for folder in cgroup_folders(mounts[0], own)]


def _family(pids: Collection[int]) -> set[int]:
    family: set[int] = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            family |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return family


def _rss(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def printed_by(
    command: Sequence[str], limit_seconds: float = _ASK_LIMIT_SECONDS, *, also_errors: bool = False
) -> str:
    """What a program prints; empty where there is none, it fails, or takes longer. Blocking.

    `also_errors`: in whichever stream.
    """
    if shutil.which(command[0]) is None:
        return ""
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if also_errors else subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=limit_seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
