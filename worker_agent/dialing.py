"""Opens connections to balancers that cannot open any to us, and serves what is asked on them.

At each balancer a few connections wait; when the first byte of a request comes on one it is the server's, as
an accepted one would be, and another is opened in its place. Who is at the other end shows by the handshake
alone: nothing secret is said before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast
from urllib.parse import quote, urlsplit

from worker_agent import wire
from worker_agent.carrying import carried, keep_open
from worker_agent.joining import refusal

_LOG = logging.getLogger(__name__)
_CONNECT_SECONDS = 10.0
_HEAD_BYTES = 8192
_FIRST_REST_SECONDS = 0.5
_LONGEST_REST_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class DialPolicy:
    spare: int = wire.SPARE_TUNNELS
    """Connections that wait at each balancer."""
    most: int = 32
    """The same while requests come faster than connections are opened: one more for each that is used while
    less than half of the spare ones wait."""
    idle_seconds: float = 360.0
    """For so long one may wait. A balancer gives it up before that (after five minutes): it alone can know
    that no request is on its way."""


class Adopting(Protocol):
    """As much of the agent's server as is needed here."""

    async def adopt(self, sock: socket.socket) -> None: ...


class CannotDial(Exception):
    """No connection came about; the sentence says why, for people."""


def rest_seconds(failures: int, chance: float) -> float:
    """How long until the next try after so many failures in a row; `chance`: from 0 to 1. Pure."""
    longest = min(_LONGEST_REST_SECONDS, _FIRST_REST_SECONDS * 2 ** min(failures - 1, 10))
    return float(longest * (0.5 + 0.5 * chance))


async def dial_all(
    balancers: Sequence[str],
    agent_id: str,
    tag: Callable[[], str],
    server: Adopting,
    policy: DialPolicy | None = None,
) -> None:
    """Keeps connections open at each of these URLs until cancelled; says so in the log when that begins to
    work or to fail. `tag`: `handshake.cluster_tag` of the key that we hold now; empty: none yet."""
    policy = policy or DialPolicy()
    async with asyncio.TaskGroup() as tasks:
        for url in balancers:
            lines = _Lines(url, agent_id, tag, server, policy, tasks)
            for _ in range(policy.spare):
                lines.another()


class _Lines:
    """The connections to one balancer."""

    def __init__(
        self,
        url: str,
        agent_id: str,
        tag: Callable[[], str],
        server: Adopting,
        policy: DialPolicy,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._url = url
        self._agent_id = agent_id
        self._tag = tag
        self._server = server
        self._policy = policy
        self._tasks = tasks
        self._keeping = 0
        self._waiting = 0
        self._said: str | None = None
        """What the log said last: a trouble, or that there is none."""
        self._works = asyncio.Event()

    def another(self) -> None:
        """One more connection that waits."""
        self._keeping += 1
        self._tasks.create_task(self._keep_one(), name=f"dial {self._url}")

    async def _keep_one(self) -> None:
        """Again and again one that waits, until there are more of them than need be."""
        failures = 0
        try:
            while True:
                try:
                    sock = await dialled(self._url, self._agent_id, self._tag())
                except CannotDial as trouble:
                    failures += 1
                    self._say(str(trouble))
                    await self._rest(failures)
                    continue
                self._say("")
                opened = asyncio.get_running_loop().time()
                was_used = await self._serve(sock)
                waited = asyncio.get_running_loop().time() - opened
                failures = 0 if was_used or waited > _LONGEST_REST_SECONDS else failures + 1
                if failures:  # a balancer that hangs up at once is not asked at once again
                    await asyncio.sleep(rest_seconds(failures, random.random()))
                if self._waiting >= self._policy.spare:
                    return
                if was_used and self._waiting < self._policy.spare // 2 and self._keeping < self._policy.most:
                    self.another()
        finally:
            self._keeping -= 1

    async def _serve(self, sock: socket.socket) -> bool:
        """Whether the connection was used before it ended."""
        self._waiting += 1
        try:
            async with asyncio.timeout(self._policy.idle_seconds):
                used = await _speaks(sock)
        except TimeoutError:
            used = False
        except BaseException:
            sock.close()
            raise
        finally:
            self._waiting -= 1
        if not used:
            sock.close()
            return False
        try:
            await self._server.adopt(sock)
        except OSError as error:  # it ended meanwhile, or may not be served
            _LOG.debug("a connection from %s was not served: %s", self._url, error)
            sock.close()
        return True

    async def _rest(self, failures: int) -> None:
        """Until the next try, or until another connection came about."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rest_seconds(failures, random.random())):
                await self._works.wait()

    def _say(self, trouble: str) -> None:
        if trouble == self._said:
            return
        (self._works.clear if trouble else self._works.set)()
        if trouble:
            _LOG.warning("cannot open a tunnel to %s: %s; trying on", self._url, trouble)
        else:
            _LOG.info("tunnels to %s are open", self._url)
        self._said = trouble


# One connection ...


class _Way(NamedTuple):
    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _way(url: str) -> _Way:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return _Way(parts.hostname or "", parts.port or (443 if tls else 80), tls)


async def dialled(url: str, agent_id: str, tag: str) -> socket.socket:
    """A connection on which the balancer at this URL is to speak first. Raises `CannotDial`."""
    way = _way(url)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            sock = await (_within_tls if way.tls else _plain)(way, _request(way, agent_id, tag))
    except TimeoutError:
        raise CannotDial(f"no answer within {_CONNECT_SECONDS:.0f} s") from None
    except ssl.SSLError as error:
        raise CannotDial(f"no TLS ({error.reason or 'unknown'}): is it http:// there?") from None
    except UnicodeError:  # from looking up what cannot be a host's name
        raise CannotDial("this is not a URL; one looks like http://192.168.1.10:4000") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CannotDial(reason.lower() or type(error).__name__) from None
    keep_open(sock)
    return sock


def _request(way: _Way, agent_id: str, tag: str) -> bytes:
    lines = [
        f"GET {wire.TUNNEL_PATH} HTTP/1.1",
        f"Host: {way.authority}",
        "Connection: Upgrade",
        f"Upgrade: {wire.TUNNEL_PROTOCOL}",
        f"{wire.AGENT_HEADER}: {quote(agent_id, safe='')}",
        *([f"{wire.TAG_HEADER}: {tag}"] if tag else []),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


async def _plain(way: _Way, request: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    sock = await _connected(way)
    try:
        await loop.sock_sendall(sock, request)
        head = b""
        # To the end of the head and not a byte further: what follows is TLS, and not for us.
        while not head.endswith(b"\r\n\r\n"):
            await _readable(sock)
            seen = sock.recv(_HEAD_BYTES, socket.MSG_PEEK)
            end = (head + seen).find(b"\r\n\r\n")
            taken = sock.recv(len(seen) if end < 0 else end + 4 - len(head))
            head += taken
            if not taken or len(head) > _HEAD_BYTES:
                raise CannotDial("it hangs up: is this a balancer's address?")
        if not _is_switching(head):
            raise CannotDial(_why(head + await _rest(sock)))
    except BaseException:
        sock.close()
        raise
    return sock


async def _connected(way: _Way) -> socket.socket:
    """Raises `OSError`."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(way.host, way.port, type=socket.SOCK_STREAM)
    failed: OSError = OSError("its name leads nowhere")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed


async def _rest(sock: socket.socket) -> bytes:
    """Of an answer that says no, as far as it is here."""
    await _readable(sock)
    return sock.recv(_HEAD_BYTES)


async def _readable(sock: socket.socket) -> None:
    """Returns once there is something to read, or the end."""
    loop = asyncio.get_running_loop()
    seen = loop.create_future()

    def look() -> None:
        if not seen.done():
            seen.set_result(None)

    loop.add_reader(sock, look)
    try:
        await seen
    finally:
        loop.remove_reader(sock)


async def _speaks(sock: socket.socket) -> bool:
    """Whether something came before the end; it is left to be read."""
    await _readable(sock)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


class _Head(asyncio.Protocol):
    """Reads the head of an answer on a connection that then goes on with something else."""

    def __init__(self) -> None:
        self.data = b""
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.whole.done() and (b"\r\n\r\n" in self.data or len(self.data) > _HEAD_BYTES):
            self._transport.pause_reading()
            self.whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.whole.done():
            self.whole.set_result(None)


async def _within_tls(way: _Way, request: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(_Head, way.host, way.port, ssl=_unverified())
    try:
        transport.write(request)
        await protocol.whole
        head, end, more = protocol.data.partition(b"\r\n\r\n")
        if not end:
            raise CannotDial("it hangs up: is this a balancer's address?")
        if not _is_switching(head + end):
            raise CannotDial(_why(protocol.data))
        return await carried(transport, more)
    except BaseException:
        transport.abort()
        raise


def _unverified() -> ssl.SSLContext:
    """Nothing secret is said within it: the tunnel has TLS of its own, to a certificate that is known."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _is_switching(head: bytes) -> bool:
    lines = head.decode("latin-1").lower().split("\r\n")
    return lines[0].split(" ")[:2] == ["http/1.1", "101"] and f"upgrade: {wire.TUNNEL_PROTOCOL}" in lines


def _why(answer: bytes) -> str:
    """Of an answer that is another one. Pure."""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.decode("latin-1").split("\r\n")[0].split(" ")
    status = words[1] if len(words) > 1 and words[0].startswith("HTTP/") and words[1].isdecimal() else ""
    if not status:
        return "what answers there is no balancer"
    hint = " (is this a balancer's address, and is it up to date?)" if status in ("404", "405") else ""
    said = refusal(body)
    return f"it answered with status {status[:3]}{hint}" + (f": {said}" if said else "")
