"""`balancer keep`: a small parent that owns the listening socket and keeps a balancer running on it.

The socket outlives every balancer, so that no client is ever refused: what comes while none accepts waits in
the kernel's queue.

- SIGHUP, or a call of `restart`: a new balancer is started; once it listens, the old one is asked to end, and
  finishes what it has begun. A new one that fails changes nothing.
- A balancer that dies is started again: at once, then after 1 s, twice as long each further time, up to 60 s,
  until one has run for a minute.
- SIGTERM and SIGINT are passed on, and the second too: then nothing is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    ready_seconds: float = 60.0
    """For a new balancer to listen."""
    first_rest_seconds: float = 1.0
    longest_rest_seconds: float = 60.0
    stable_seconds: float = 60.0
    """After which a death counts as the first again."""


class CannotStart(Exception):
    """The first balancer ended before it listened: its own words say why. `status`: the command's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the balancer ended with status {status} before it was ready")
        self.status = status


class _Child:
    """One balancer, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
        self.process = process
        self.ready = ready
        self.ended = asyncio.ensure_future(process.wait())
        self.asked_to_end = False

    def signal(self, number: int) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)

    def ask_to_end(self) -> None:
        """Once: asked a second time, it would wait for nothing."""
        if not self.asked_to_end:
            self.asked_to_end = True
            self.signal(signal.SIGTERM)


class Keeper:
    """Runs `command` again and again on one socket. The command is given `--listen-fd N` and
    `--until-stdin-ends`, so that it ends with its keeper, however that goes."""

    def __init__(
        self,
        command: Sequence[str],
        listening: socket.socket,
        environment: Mapping[str, str],
        policy: KeepPolicy | None = None,
    ) -> None:
        self._command = tuple(command)
        self._listening = listening
        self._environment = dict(environment)
        self._policy = policy or KeepPolicy()
        self._current: _Child | None = None
        self._children: set[_Child] = set()
        self._stopping = asyncio.Event()
        self._restart_wanted = asyncio.Event()
        self._folder = Path()
        self._started = 0

    def restart(self) -> None:
        self._restart_wanted.set()

    def stop(self) -> None:
        """Ends all; called again, at once."""
        hurried = self._stopping.is_set()
        self._stopping.set()
        for child in self._children:
            if hurried:
                child.signal(signal.SIGTERM)
            else:
                child.ask_to_end()

    async def run(self) -> int:
        """Until stopped; gives the status of the last balancer. Raises `CannotStart`."""
        with tempfile.TemporaryDirectory(prefix="balancer-") as folder:
            self._folder = Path(folder)
            try:
                first = await self._start()
                if first is None:
                    return 0
                if first.ended.done():
                    raise CannotStart(first.ended.result())
                self._current = first
                await self._keep()
                return await self._end()
            finally:
                for child in self._children:
                    child.signal(signal.SIGKILL)

    async def _keep(self) -> None:
        clock = asyncio.get_running_loop().time
        rest, since = 0.0, clock()
        while not self._stopping.is_set():
            assert self._current is not None
            await _any(self._current.ended, self._restart_wanted, self._stopping)
            if self._stopping.is_set():
                return
            if self._current.ended.done():
                if clock() - since >= self._policy.stable_seconds:
                    rest = 0.0
                log.error(
                    "the balancer ended with status %d; starting it again in %g s",
                    *(self._current.ended.result(), rest),
                )
                await _any(self._stopping, within=rest)
                rest = min(max(2 * rest, self._policy.first_rest_seconds), self._policy.longest_rest_seconds)
                since = clock()
            self._restart_wanted.clear()
            await self._replace()

    async def _replace(self) -> None:
        """A new balancer in the place of the current one, if it gets as far as to listen."""
        if self._stopping.is_set():
            return
        old = self._current
        new = await self._start()
        if new is None:
            return
        if old is not None and old.ended.done():
            self._current = new  # even if it ended too: then it is started again, later
        elif new.ended.done() or not new.ready.done():
            log.error("the new balancer does not get ready: the one that runs is kept")
            new.signal(signal.SIGKILL)
        else:
            self._current = new
            if old is not None:
                old.ask_to_end()
            log.info("a new balancer is ready; the old one finishes what it has begun")

    async def _start(self) -> _Child | None:
        """Waits until it listens, ends or takes too long; None: all is to be stopped."""
        self._started += 1
        address = self._folder / f"ready-{self._started}"
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.bind(str(address))
            line.setblocking(False)

            def heard() -> None:
                if b"READY=1" in line.recv(4096).split(b"\n") and not ready.done():
                    ready.set_result(None)

            loop.add_reader(line, heard)
            try:
                child = await self._spawn(address, ready)
                await _any(ready, child.ended, self._stopping, within=self._policy.ready_seconds)
            finally:
                loop.remove_reader(line)
                address.unlink()
        return None if self._stopping.is_set() else child

    async def _spawn(self, address: Path, ready: asyncio.Future[None]) -> _Child:
        fd = self._listening.fileno()
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *("--listen-fd", str(fd), "--until-stdin-ends"),
            stdin=asyncio.subprocess.PIPE,
            env=self._environment | {"NOTIFY_SOCKET": str(address)},
            pass_fds=(fd,),
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        child = _Child(process, ready)
        self._children.add(child)
        child.ended.add_done_callback(lambda _: self._children.discard(child))
        return child

    async def _end(self) -> int:
        self._listening.close()  # from here on clients are refused: nobody is to come any more
        status = 0
        for child in list(self._children):
            child.ask_to_end()
            status = await child.ended
        return max(status, 0)


async def _any(
    *what: asyncio.Future[None] | asyncio.Future[int] | asyncio.Event, within: float | None = None
) -> None:
    """Until the first of them is done or set, for so many seconds at most."""
    waits = [asyncio.ensure_future(one.wait()) if isinstance(one, asyncio.Event) else one for one in what]
    try:
        await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one, wait in zip(what, waits, strict=True):
            if isinstance(one, asyncio.Event):
                wait.cancel()


def listen(host: str, port: int) -> socket.socket:
    """The socket that all balancers in their turn accept from. Raises `OSError`."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening


async def keep(command: Sequence[str], listening: socket.socket) -> int:
    """Runs the keeper under this process's signals. Raises `CannotStart`."""
    keeper = Keeper(command, listening, os.environ)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, keeper.restart)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, keeper.stop)
    return await keeper.run()
