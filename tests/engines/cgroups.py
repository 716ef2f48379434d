"""A memory cgroup for a test: a limit that the kernel enforces, and what it says of it afterwards.

Version 2, as most machines have, and version 1, as some build machines do. Root is needed; nothing of the
groups that exist is changed.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class NoMemoryGroup(Exception):
    """This machine, or this user, cannot make one; the sentence says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """Its processes together get so much memory and no swap."""

    folder: Path

    @property
    def within(self) -> tuple[str, ...]:
        """Before a command, runs it in this group, as the same process."""
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")

    @property
    def used_bytes(self) -> int:
        """Files that the kernel keeps for it included."""
        return self._number("memory.current", "memory.usage_in_bytes")

    @property
    def most_bytes(self) -> int:
        """That it ever used."""
        return self._number("memory.peak", "memory.max_usage_in_bytes")

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    @property
    def out_of_memory(self) -> int:
        """How often there was none left, which is when the kernel kills."""
        events = self._table("memory.events", "memory.oom_control")
        return max(events.get("oom", 0), events.get("oom_kill", 0))

    def _number(self, name: str, old_name: str) -> int:
        return int(self._read(name, old_name))

    def _table(self, name: str, old_name: str) -> dict[str, int]:
        rows = (line.split() for line in self._read(name, old_name).splitlines())
        return {key: int(value) for key, value in rows}

    def _read(self, name: str, old_name: str) -> str:
        path = self.folder / name
        return (path if path.exists() else self.folder / old_name).read_text()


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Raises `NoMemoryGroup`. Its processes must have ended when the block does."""
    folder = _parent() / f"llm-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoMemoryGroup(f"no group can be made at {folder.parent}: {error.strerror}") from None
    try:
        _set_limit(folder, limit_bytes)
        yield MemoryGroup(folder)
    finally:
        _remove(folder)


def _parent() -> Path:
    """Where a group can be made that obeys a limit."""
    if os.geteuid() != 0:
        raise NoMemoryGroup("only root can make a memory cgroup")
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for place, kind in ((before.split()[4], after.split()) for before, after in mounts):
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            names = next((names for names in own if "memory" in names.split(",")), "")
            return Path(place + own.get(names, "/"))
    for place, kind in ((before.split()[4], after.split()) for before, after in mounts):
        if kind[0] == "cgroup2":
            return _delegating(Path(place), Path(place + own.get("", "/")))
    raise NoMemoryGroup("no memory cgroups are mounted")


def _delegating(root: Path, own: Path) -> Path:
    """The next group above us whose children obey limits of memory: ours holds processes, and under version 2
    such a group cannot."""
    for folder in (own, *own.parents):
        control = folder / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split():
            return folder
        if folder == root:
            break
    raise NoMemoryGroup("no group above this process lets its children have limits of memory")


def _set_limit(folder: Path, limit_bytes: int) -> None:
    if (folder / "memory.max").exists():
        if not (folder / "memory.peak").exists():
            raise NoMemoryGroup("a kernel before 5.19 does not tell what a group used at most")
        (folder / "memory.max").write_text(str(limit_bytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
    elif (folder / "memory.limit_in_bytes").exists():
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        if (folder / "memory.memsw.limit_in_bytes").exists():
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    else:
        raise NoMemoryGroup(f"{folder.parent} has no memory controller")


def _remove(folder: Path) -> None:
    """A moment after its last process the kernel may still hold it."""
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    folder.rmdir()
