"""The audit log: one line for each change that was asked for under `/admin`, in `audit.jsonl` in the data
folder. It is only ever appended to, by a thread of its own: a full disk is told of and holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
MAX_LISTED = 1000
_TAIL_BYTES = 4 * 1024 * 1024
"""Of each file that are looked through for the last records."""


@dataclass(frozen=True, slots=True)
class AuditPolicy:
    max_bytes: int = 16 * 1024 * 1024
    """Of a file, before the next one is begun."""
    max_files: int = 5
    """Beside the one that is written: audit.jsonl.1 is the newest of them."""
    max_waiting: int = 1024
    """Records that are not written yet; of more, only the count is told."""
    refused_seconds: float = 1.0
    """Between two records of requests without the right key."""
    warn_seconds: float = 60.0


class Audit:
    """Takes records; `running` writes them."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float],
        wall: Callable[[], datetime],
        policy: AuditPolicy | None = None,
    ) -> None:
        self._path = folder / FILE
        self._clock = clock
        self._wall = wall
        self._policy = policy or AuditPolicy()
        self._waiting: list[bytes] = []
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._refusals = 0
        self._refused_until = self._warned_until = 0.0
        self._lost = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is recorded is written inside the block, the last of it on leaving."""
        # Kept here, awaited on leaving. A task group would wrap what is raised in the block.
        writing = asyncio.create_task(self._write(), name="audit")  # noqa: TID251
        try:
            yield
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            await self._flush()

    def record(self, **fields: object) -> None:
        """One line, with the time before it. Never holds anybody up, never raises. No secrets."""
        if len(self._waiting) >= self._policy.max_waiting:
            self._lost += 1
            self._warn("the audit log cannot be written as fast as it grows")
            return
        at = self._wall().isoformat(timespec="milliseconds")
        told = {name: value for name, value in fields.items() if value is not None}
        self._waiting.append(orjson.dumps({"at": at, **told}) + b"\n")
        self._news.set()

    def refused(self, **fields: object) -> None:
        """The same for what was not let in: whoever guesses keys cannot fill the disk."""
        self._refusals += 1
        now = self._clock()
        if now >= self._refused_until:
            self.record(**fields, times=self._refusals if self._refusals > 1 else None)
            self._refusals, self._refused_until = 0, now + self._policy.refused_seconds

    async def last(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """The newest records, newest first. Raises `OSError`."""
        await self._flush()
        return await asyncio.to_thread(_last, self._path, min(limit, MAX_LISTED), self._policy.max_files)

    async def _write(self) -> None:
        while True:
            await self._news.wait()
            await self._flush()

    async def _flush(self) -> None:
        async with self._writing:
            self._news.clear()
            lines, self._waiting = self._waiting, []
            if not lines:
                return
            try:
                await asyncio.to_thread(_append, self._path, b"".join(lines), self._policy)
            except OSError as error:
                self._lost += len(lines)
                self._warn(f"the audit log {self._path} cannot be written: {error.strerror or error}")

    def _warn(self, what: str) -> None:
        now = self._clock()
        if now >= self._warned_until:
            log.warning("%s; %d records are lost so far", what, self._lost)
            self._warned_until = now + self._policy.warn_seconds


# The files; all of this blocks ...


def _append(path: Path, data: bytes, policy: AuditPolicy) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        number = _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            if not _is_still(number, path):
                continue  # another process has begun the next file meanwhile
            size = os.fstat(number).st_size
            if size and size + len(data) > policy.max_bytes:
                _rotate(path, policy.max_files)
                continue
            if size and os.pread(number, 1, size - 1) != b"\n":
                data = b"\n" + data  # the disk was full in the middle of a line
            written = os.write(number, data)
            if written < len(data):
                raise OSError(None, "only a part of it fits on the disk")
            return
        finally:
            os.close(number)


def _opened(path: Path, flags: int) -> int:
    """Never through a link, and never to wait for who reads or writes a pipe. Raises `OSError`."""
    number = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no plain file")
    return number


def _is_still(number: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(number), path.lstat())
    return False


def _rotate(path: Path, max_files: int) -> None:
    for count in range(max_files - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            _numbered(path, count).replace(_numbered(path, count + 1))
    path.replace(_numbered(path, 1))


def _numbered(path: Path, count: int) -> Path:
    return path.with_name(f"{path.name}.{count}")


def _last(path: Path, limit: int, max_files: int) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for file in (path, *(_numbered(path, count) for count in range(1, max_files + 1))):
        if len(found) >= limit:
            break
        try:
            with os.fdopen(_opened(file, os.O_RDONLY), "rb") as opened:
                opened.seek(max(0, opened.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = opened.read().splitlines()
        except FileNotFoundError:
            break
        for line in reversed(lines):
            with suppress(orjson.JSONDecodeError):  # a torn one, or the first of the part that was read
                record = orjson.loads(line)
                if isinstance(record, dict):
                    found.append(record)
            if len(found) >= limit:
                break
    return found
