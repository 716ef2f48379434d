"""Notices that a configuration file was saved, in whichever way an editor, a script or Kubernetes does that.

By looking several times a second, not by being told: file systems tell of changes in ways of their own, a
network file system not at all, and a watch on a file that is replaced by another of its name goes blind.
What is looked at is the content itself, found anew by its name each time, so that neither a link that was
turned nor a time stamp that did not move hides a change; the files are small.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger(__name__)

MAX_LOOKED_AT_BYTES = 4 * 1024 * 1024
"""Of one file; no file of ours may be as long."""

Look: TypeAlias = Mapping[Path, str]
"""What a look has found in each file: a digest, or why there is none. Equal: nothing has changed."""


@dataclass(frozen=True, slots=True)
class ConfigWatchPolicy:
    look_seconds: float = 0.25
    settle_seconds: float = 0.2
    """What was changed must then stay as it is for so long before it is read: a save takes a moment."""


class ConfigWatch:
    """Calls `changed` whenever a file has become another one, and has settled."""

    def __init__(
        self,
        files: Callable[[], Sequence[Path]],
        changed: Callable[[], Awaitable[None]],
        policy: ConfigWatchPolicy | None = None,
    ) -> None:
        """`files`: which ones, asked in a thread at each look. What `changed` raises is a defect."""
        self._files = files
        self._changed = changed
        self._policy = policy or ConfigWatchPolicy()

    async def run(self) -> None:
        """Until cancelled. The first look counts as a change: nobody knows what has happened since the files
        were read."""
        known: Look = {}
        while True:
            await asyncio.sleep(self._policy.look_seconds)
            try:
                now = await self._settled(known)
                if now is not None:
                    known = now
                    await self._changed()
                    # Another file may be named now; that it is new to us is no change of it.
                    known = {**await asyncio.to_thread(self.look), **now}
            except Exception:
                log.exception("a defect of the balancer, in looking at the configuration")

    def look(self) -> Look:
        """How the files are now. Blocking."""
        return {path: _content(path) for path in self._files()}

    async def _settled(self, known: Look) -> Look | None:
        """How they are, once they are no longer changing; None: as they were."""
        now = await asyncio.to_thread(self.look)
        while _differ(now, known):
            await asyncio.sleep(self._policy.settle_seconds)
            before, now = now, await asyncio.to_thread(self.look)
            if now == before:
                return now
        return None


def _differ(now: Look, known: Look) -> bool:
    """A file that is no longer named does not count."""
    return any(known.get(path) != content for path, content in now.items())


def _content(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    except OSError as error:
        return f"no file: {error.strerror}"
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "no plain file"
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return hashlib.sha256(file.read(MAX_LOOKED_AT_BYTES)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    finally:
        os.close(descriptor)
