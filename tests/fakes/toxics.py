"""A network that misbehaves exactly as it is told: a TCP proxy between two parties, with Toxiproxy's toxics.

    async with ToxicProxy("127.0.0.1", engine.port) as proxy:
        latency = proxy.add(Latency(seconds=0.2, jitter=0.1))
        ...
        proxy.remove(latency)

Each toxic acts on one direction, downstream (from the server, as a rule what is wanted) unless said, on the
connections that exist as well as on those to come, and may be added and removed while bytes are under way.
Of each kind the first one of a direction counts. It works on any machine and needs no rights, unlike the
kernel's own ways (`tests.e2e.namespaces`).
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

_T = TypeVar("_T")

READ_BYTES = 64 * 1024
HELD_BYTES = 1024 * 1024
"""So much of a direction may be under way (delayed, say) before its sender is no longer read."""


class Direction(Enum):
    UPSTREAM = "upstream"
    """From the client to the server."""
    DOWNSTREAM = "downstream"
    """From the server to the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Everything comes so much later; nothing is slower for it."""

    seconds: float
    jitter: float = 0.0
    """So much more or less, drawn anew for each piece; the order stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowClose:
    """The end of the connection comes so much later."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Nothing gets through, what comes is lost; after so long the connection is closed (None: it is not)."""

    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPeer:
    """The connection is reset (RST) so long after it was made or the toxic was added, whichever is later."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicer:
    """What comes in one piece comes in many."""

    average_bytes: int
    variation: int = 0
    seconds: float = 0.0
    """Between two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitData:
    """After so many bytes of this direction the connection is closed, or reset: torn at a byte."""

    bytes: int
    reset: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A cable that is out: nothing gets through, nothing is lost or closed, and once the toxic is removed all
    of it comes, as TCP would send it again."""


Toxic = Latency | Bandwidth | SlowClose | Timeout | ResetPeer | Slicer | LimitData | Cut


class ToxicProxy:
    """Listens on a port of its own, and passes each connection on to the server."""

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        """Where the server is. `seed`: of jitter and slices."""
        self._server_at = (host, port)
        self._dice = random.Random(seed)
        self._toxics: dict[Direction, list[Toxic]] = {direction: [] for direction in Direction}
        self._changed = asyncio.Event()
        self._links: set[_Link] = set()
        self._listening: asyncio.Server | None = None
        self.host = "127.0.0.1"
        self.port = 0
        self.connections = 0
        """How many were ever made to it."""
        self.passed = dict.fromkeys(Direction, 0)
        """Bytes that were handed on, over all connections."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> ToxicProxy:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        links = list(self._links)
        self.down()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    def add(self, toxic: Toxic, direction: Direction = Direction.DOWNSTREAM) -> Toxic:
        """From now on; gives the toxic back, for `remove`."""
        self._toxics[direction].append(toxic)
        self._tell()
        return toxic

    def remove(self, *toxics: Toxic) -> None:
        """These, in whichever direction; none given: all of them."""
        for direction, there in self._toxics.items():
            self._toxics[direction] = [toxic for toxic in there if toxics and toxic not in toxics]
        self._tell()

    def toxics(self, direction: Direction) -> tuple[Toxic, ...]:
        return tuple(self._toxics[direction])

    def down(self) -> None:
        """Refuses new connections and closes those there are (Toxiproxy's `down`)."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for link in list(self._links):
            link.end()

    def cut_now(self) -> None:
        """Every connection there is ends with a reset, as when a process is killed; new ones are accepted."""
        for link in list(self._links):
            link.end(reset=True)

    async def up(self) -> None:
        """Listens (again), on the port that it always had."""
        if self._listening is None:
            bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
            self.port = int(bound.getsockname()[1])
            self._listening = await asyncio.start_server(self._connected, sock=bound, limit=READ_BYTES)

    # ... for its links

    async def changed(self) -> None:
        """Waits until toxics were added or removed."""
        await self._changed.wait()

    def draw(self, low: float, high: float) -> float:
        return self._dice.uniform(low, high)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        link = _Link(self, task, reader, writer)
        self._links.add(link)
        try:
            await link.carry(*self._server_at)
        except asyncio.CancelledError:
            pass  # only ever by `_Link.end`
        finally:
            self._links.discard(link)


class _Link:
    """One client's connection, and ours to the server for it."""

    def __init__(
        self,
        proxy: ToxicProxy,
        task: asyncio.Task[None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.task = task
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]

    async def carry(self, host: str, port: int) -> None:
        """Until both directions have ended, or one of them by an error or a toxic."""
        client = self._writers[0]
        try:
            reader, server = await asyncio.open_connection(host, port, limit=READ_BYTES)
        except OSError:
            _abort(client, reset=True)
            return
        self._writers.append(server)
        ways = (
            _Way(self, self._proxy, Direction.UPSTREAM, self._reader, server),
            _Way(self, self._proxy, Direction.DOWNSTREAM, reader, client),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                for way in ways:
                    tasks.create_task(way.read())
                    tasks.create_task(way.write())
                    tasks.create_task(way.count_down())
        except* (OSError, EOFError):
            pass  # one side is gone: so is the other
        finally:
            for writer in self._writers:
                writer.close()

    def end(self, reset: bool = False) -> None:
        for writer in self._writers:
            _abort(writer, reset)
        self.task.cancel()


class _Way:
    """One direction of one connection."""

    def __init__(
        self,
        link: _Link,
        proxy: ToxicProxy,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._link = link
        self._proxy = proxy
        self._direction = direction
        self._reader = reader
        self._writer = writer
        self._held: deque[tuple[float, bytes]] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._made = asyncio.get_running_loop().time()
        self._sent = 0
        self._due = 0.0
        self._done = asyncio.Event()

    async def read(self) -> None:
        """Takes what comes, with the time at which it came; an empty piece is the end."""
        loop = asyncio.get_running_loop()
        while True:
            data = await self._reader.read(READ_BYTES)
            self._held.append((loop.time(), data))
            self._news.set()
            if not data:
                return
            while sum(len(piece) for _, piece in self._held) > HELD_BYTES:
                self._room.clear()
                await self._room.wait()

    async def write(self) -> None:
        while True:
            while not self._held:
                self._news.clear()
                await self._news.wait()
            came, data = self._held[0]
            if not data:
                await self._close()
                return
            async for piece in self._slices(data):
                await self._pass_on(came, piece)
            self._held.popleft()
            self._room.set()

    async def count_down(self) -> None:
        """Does what toxics do by themselves, without a byte: a reset, a closing timeout."""
        loop = asyncio.get_running_loop()
        seen: dict[Toxic, float] = {}
        while not self._done.is_set():
            now = loop.time()
            waits = []
            for toxic in self._proxy.toxics(self._direction):
                if isinstance(toxic, ResetPeer | Timeout) and toxic.seconds is not None:
                    left = seen.setdefault(toxic, now) + toxic.seconds - now
                    if left <= 0:
                        self._break(reset=isinstance(toxic, ResetPeer))
                    waits.append(left)
            seen = {toxic: at for toxic, at in seen.items() if toxic in self._proxy.toxics(self._direction)}
            events = [asyncio.ensure_future(self._proxy.changed()), asyncio.ensure_future(self._done.wait())]
            try:
                await asyncio.wait(
                    events, timeout=min(waits, default=None), return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                for event in events:
                    event.cancel()

    async def _slices(self, data: bytes) -> AsyncIterator[bytes]:
        slicer = self._first(Slicer)
        if slicer is None:
            yield data
            return
        start = 0
        while start < len(data):
            size = slicer.average_bytes + round(self._proxy.draw(-slicer.variation, slicer.variation))
            yield data[start : start + max(1, size)]
            start += max(1, size)
            await asyncio.sleep(slicer.seconds)

    async def _pass_on(self, came: float, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        if latency := self._first(Latency):
            jitter = self._proxy.draw(-latency.jitter, latency.jitter)
            self._due = max(self._due, came + max(0.0, latency.seconds + jitter))  # the order stays
            await asyncio.sleep(self._due - loop.time())
        if bandwidth := self._first(Bandwidth):
            await asyncio.sleep(len(data) / bandwidth.bytes_per_second)
        while self._first(Cut):
            await self._proxy.changed()
        if self._first(Timeout):
            return
        if limit := self._first(LimitData):
            data = data[: max(0, limit.bytes - self._sent)]
        if data:
            self._sent += len(data)
            self._proxy.passed[self._direction] += len(data)
            self._writer.write(data)
            await self._writer.drain()
        if limit and self._sent >= limit.bytes:
            self._break(reset=limit.reset)

    async def _close(self) -> None:
        """This direction is over; the other one may go on (TCP's half-close)."""
        if latency := self._first(Latency):
            await asyncio.sleep(latency.seconds)
        if slow := self._first(SlowClose):
            await asyncio.sleep(slow.seconds)
        while self._first(Cut) or self._first(Timeout):
            await self._proxy.changed()
        self._done.set()
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def _break(self, reset: bool) -> None:
        self._link.end(reset)
        raise EOFError

    def _first(self, kind: type[_T]) -> _T | None:
        return next((toxic for toxic in self._proxy.toxics(self._direction) if isinstance(toxic, kind)), None)


def _abort(writer: asyncio.StreamWriter, reset: bool) -> None:
    """Close at once. What was written and not yet sent is sent, unless it is a reset."""
    if reset:
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)  # on, for 0 s: close() sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        writer.close()
