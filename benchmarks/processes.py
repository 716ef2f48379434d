"""Processes that a benchmark starts: on a core of their own, ready before use, ended for certain."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_SECONDS = 5.0
POLL_SECONDS = 0.05
WORDS_SHOWN = 2000
MEBIBYTE = 2**20
PORTS = range(20_000, 30_000)
"""Below the range from which systems take ports by themselves."""


class NotReady(Exception):
    """It ended, or did not answer in time; its last words."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where; None: the system does not let one choose, or there is one core only."""

    subject: int | None
    others: int | None

    @classmethod
    def of_this_machine(cls) -> Cores:
        """The first two that we may use."""
        if sys.platform != "linux":
            return cls(None, None)
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1]) if len(allowed) > 1 else cls(None, None)


@dataclass(frozen=True, slots=True)
class Started:
    """A process of ours, and where its words go."""

    process: asyncio.subprocess.Process
    words: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """User and system time so far, of its children too."""
        return sum(times.user + times.system for times in (one.cpu_times() for one in self._family()))

    def rss_mib(self) -> float:
        """Of all its processes together."""
        return sum(one.memory_info().rss for one in self._family()) / MEBIBYTE

    def last_words(self) -> str:
        return self.words.read_text(errors="replace")[-WORDS_SHOWN:]

    async def ready(self, answers: Callable[[], Awaitable[bool]], seconds: float) -> None:
        """Waits until this is true. Raises `NotReady`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.process.returncode is None:
                    if await answers():
                        return
                    await asyncio.sleep(POLL_SECONDS)
        how = "is not ready" if self.process.returncode is None else f"ended with {self.process.returncode}"
        raise NotReady(f"it {how}: {self.last_words()}")

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        return []


@asynccontextmanager
async def started(
    arguments: Sequence[str],
    words: Path,
    *,
    core: int | None = None,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
) -> AsyncIterator[Started]:
    """A process on that core, ended when the block is left: politely, and after `STOP_SECONDS` for certain.

    What it says is appended to the file `words`, without its stdout where that is asked for. `environment`
    is added to ours.
    """
    with words.open("ab") as file, _on(core):
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file if stdout is None else stdout,
            stderr=file,
            env=os.environ | dict(environment or {}),
            start_new_session=True,  # Ctrl-C in the terminal is for us, who then end it in order
        )
    one = Started(process, words)
    try:
        yield one
    finally:
        await asyncio.shield(asyncio.ensure_future(_stop(one)))


async def _stop(one: Started) -> None:
    family = one._family()
    with suppress(ProcessLookupError):
        one.process.terminate()
    try:
        await asyncio.wait_for(one.process.wait(), STOP_SECONDS)
    except TimeoutError:
        one.process.kill()
        await one.process.wait()
    for (
        left
    ) in family:  # children of one that had to be killed; psutil tells a later process of that id apart
        with suppress(psutil.NoSuchProcess):
            left.kill()


@contextmanager
def _on(core: int | None) -> Iterator[None]:
    """What is started meanwhile has that core from its first thread on: threads cannot be moved later."""
    if core is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_ports(count: int) -> list[int]:
    """On loopback, and such that nobody else is given one of them a moment later."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise SystemExit(f"there are no {count} free ports from {PORTS.start} on")
