"""The server towards clients: requests for answers read by a protocol of our own, everything else by aiohttp,
on one port.

Every connection begins here. While what comes is a clean request for an answer (`clean_head`), it is read,
judged and answered by `HotConnection`: some 10 us of work where aiohttp needs 50. Anything else, from the
first byte that does not fit, is handed to aiohttp with the connection, for good; nothing has happened until
then, so both give the same verdict. `hot_path: false` begins every connection in aiohttp.

A client that closes its half of the connection has left, as one that closes all of it: what it asked for is
cancelled at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Protocol, Self, cast

from aiohttp import web

from balancer.clean_head import INCOMPLETE, CleanHead, HeadPolicy, read_head
from balancer.connections import ConnectionPolicy, Connections
from balancer.core.errors import BodyTimeout, RequestError
from balancer.hardened import LAST, HardenedHandler, Noise, plain_answer, plain_requests
from balancer.inference import Admitted, Client, Head, refuse, request_id
from balancer.origins import Origins, is_for_answers
from balancer.securing import Securing, remote_of

log = logging.getLogger(__name__)

FOREVER = math.inf

RESERVED_FILES = 64
"""For logs, stores, the connections to agents, and the program itself."""


@dataclass(frozen=True, slots=True)
class ServerPolicy:
    hot_path: bool = True
    head: HeadPolicy = field(default_factory=HeadPolicy)
    connections: ConnectionPolicy = field(default_factory=ConnectionPolicy)
    head_seconds: float = 75.0
    """For a whole head to come, from the beginning of the connection or the end of the last answer."""
    body_seconds: float = 30.0
    """For the whole body to come, once the head has."""
    slow_reader_seconds: float = 60.0
    """That a client may leave more than `write_ahead_bytes` unread."""
    write_ahead_bytes: int = 64 * 1024
    read_ahead_bytes: int = 64 * 1024
    """Of requests that are sent before the one under way is answered; then reading pauses."""
    linger_seconds: float = 2.0
    """For a client that still sends a body that was refused to read why. What comes is thrown away."""
    max_lingering: int = 256
    """Connections that do so at once."""
    retiring_idle_seconds: float = 5.0
    """For the next request on a connection that idles when the server hands over to another; it gets its
    answer, and is told that the connection ends with it."""
    shutdown_seconds: float = 0.5
    """For requests that are cancelled when the server ends."""
    backlog: int = 1024
    tls_handshake_seconds: float = 10.0
    """For TLS to be agreed on, and to be ended."""


class Answering(Protocol):
    """As much of `inference.Inference` as a server needs."""

    draining: bool

    def admit(self, head: Head) -> Admitted: ...

    async def answer(self, admitted: Admitted, body: bytes, client: Client) -> None: ...

    def note(self, head: Head, refusal: RequestError) -> None: ...


class _State(Enum):
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    LINGER = auto()
    OVER = auto()
    """Closed, or in aiohttp's hands."""


_STATUS_LINES: Mapping[int, str] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}

_NOTHING: Mapping[str, str] = MappingProxyType({})

_UNPRINTABLE = {number: "?" for number in (*range(32), 127)}


class HotConnection(asyncio.Protocol):
    """One connection whose requests are for answers; the `Client` of the one that is being answered."""

    __slots__ = (
        "_admitted",
        "_behind",
        "_body",
        "_body_size",
        "_chunked",
        "_counted",
        "_deadline",
        "_head",
        "_keep",
        "_left",
        "_loop",
        "_pause",
        "_paused_reading",
        "_pending",
        "_pieces",
        "_read_at_last",
        "_remote",
        "_resume",
        "_server",
        "_shared",
        "_state",
        "_task",
        "_timer",
        "_transport",
        "_whole",
        "_written",
    )

    def __init__(self, server: HttpServer, *, is_counted: bool = False) -> None:
        """`is_counted`: it has its place among the connections already."""
        self._server = server
        self._loop = server.loop
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # until the first call
        self._state = _State.HEAD
        self._remote = ""
        self._counted = is_counted
        self._pending = b""
        """What has come and is not read yet, or is no whole head yet."""
        self._pieces = 0
        """In which the head that has begun has come."""
        self._paused_reading = False
        self._admitted: Admitted | None = None
        self._body = bytearray()
        self._body_size = 0
        self._task: asyncio.Task[None] | None = None
        self._keep = True
        self._whole = True
        """The answer is; also before there is one."""
        self._head = b""
        """Of the answer, until it goes out together with the first piece of the body."""
        self._shared: Mapping[str, str] = _NOTHING
        """Headers for the page that asks, if it may read the answer."""
        self._chunked = False
        self._left = 0
        """Bytes of a body of known length that are still to be written."""
        self._behind = False
        self._written = 0
        self._read_at_last = 0
        """Bytes that the client had taken when that was last looked at."""
        self._pause: Callable[[], None] | None = None
        self._resume: Callable[[], None] | None = None
        self._deadline = FOREVER
        self._timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        server = self._server
        self._remote = remote_of(transport)
        self._transport.set_write_buffer_limits(high=server.policy.write_ahead_bytes)
        server.ours.add(self)
        if not self._counted:
            try:
                server.connections.open(self._remote)
            except RequestError as error:
                server.refused(self._remote, error)
                self._transport.write(plain_answer(error))
                self._linger()
                return
            self._counted = True
        if server.policy.hot_path:
            self._due(server.idle_seconds)
        else:
            self._hand_over(b"")

    @property
    def is_begun(self) -> bool:
        """It was told of its connection."""
        return self._transport is not None

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is _State.HEAD:
            self._read(self._pending + data if self._pending else data)
        elif state is _State.BODY:
            self._read_body(data)
        elif state is _State.ANSWER:
            self._pending += data
            if len(self._pending) > self._server.policy.read_ahead_bytes and not self._paused_reading:
                self._paused_reading = True
                self._transport.pause_reading()

    def eof_received(self) -> None:
        self._client_left()  # and by what is returned, nothing, the transport is told to close

    def connection_lost(self, error: Exception | None) -> None:
        self._client_left()
        self._let_go()
        if self._counted:
            self._server.lost(self._remote)

    def _client_left(self) -> None:
        self._pause = self._resume = None
        self._pending = b""
        if self._task is not None:
            self._task.cancel()

    def _let_go(self) -> None:
        """This protocol has nothing more to do with the connection."""
        self._state = _State.OVER
        self._deadline = FOREVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._server.ours.discard(self)
        self._server.lingering.discard(self)

    def _hand_over(self, data: bytes) -> None:
        self._let_go()
        self._pending = b""
        if self._paused_reading:
            self._transport.resume_reading()
        protocol = self._server.aiohttp_protocol(self._remote)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if data:
            protocol.data_received(data)

    # A request

    def _read(self, data: bytes) -> None:
        server = self._server
        found = read_head(data, server.policy.head)
        if not isinstance(found, CleanHead):
            if found is INCOMPLETE and self._pieces < server.policy.head.max_pieces:
                self._pieces += 1
                self._pending = data
            else:
                self._hand_over(data)
            return
        head = Head(found.endpoint, found.headers, self._remote)
        self._shared = server.origins.shared(found.headers) if "origin" in found.headers else _NOTHING
        try:
            server.origins.check(found.headers, inference=True)
            admitted = server.inference.admit(head)
        except RequestError as error:
            server.inference.note(head, error)
            self._refuse(found, data, error)
            return
        end = found.size + found.length
        self._keep = found.keep_alive
        self._pending = b""
        self._pieces = 0
        if len(data) < end:
            self._state = _State.BODY
            self._admitted = admitted
            self._body = bytearray(data[found.size :])
            self._body_size = found.length
            self._due(server.policy.body_seconds)
        else:
            if len(data) > end:
                self._pending = data[end:]
            self._answer_with(admitted, data[found.size : end])
        if self._paused_reading:
            self._read_on()

    def _read_body(self, data: bytes) -> None:
        # It grows with what comes: an announced length alone takes no memory.
        body, size = self._body, self._body_size
        body += data
        if len(body) < size:
            return
        assert self._admitted is not None
        self._body = bytearray()
        if len(body) > size:
            self._pending = bytes(body[size:])
            del body[size:]
        self._answer_with(self._admitted, bytes(body))

    def _read_on(self) -> None:
        if self._paused_reading and len(self._pending) <= self._server.policy.read_ahead_bytes:
            self._paused_reading = False
            self._transport.resume_reading()

    def _refuse(self, head: CleanHead, data: bytes, error: RequestError) -> None:
        """A request that is wrong as far as its head goes. Its body is skipped if it is here already; else
        the connection ends: what was refused is not waited for."""
        end = head.size + head.length
        is_here = len(data) >= end
        self._pending = data[end:] if is_here else b""
        self._keep = head.keep_alive and is_here
        self._refuse_now(request_id(head.headers), error)
        if is_here:
            self._finished()
        else:
            self._linger()

    def _refuse_now(self, named: str, error: RequestError) -> None:
        self._state = _State.ANSWER
        self._whole = False
        self._deadline = FOREVER
        refuse(named, error, self)

    def _answer_with(self, admitted: Admitted, body: bytes) -> None:
        self._state = _State.ANSWER
        self._whole = False
        self._admitted = None
        self._deadline = FOREVER
        task = self._server.spawn(self._answer(admitted, body))
        self._task = None if task.done() else task  # begun eagerly, it may be through

    async def _answer(self, admitted: Admitted, body: bytes) -> None:
        try:
            await self._server.inference.answer(admitted, body, self)
        except Exception:
            log.exception("a defect of the balancer, in answering a request")
        finally:
            self._task = None
            self._pause = self._resume = None
            if self._state is _State.ANSWER:
                self._finished()

    def _finished(self) -> None:
        """The answer was written, or nothing more will be."""
        if self._whole and self._keep:  # as its head has promised, whatever happened since
            self._next()
        else:
            self._close()  # where the answer is not whole, this is how the client sees it

    def _next(self) -> None:
        """On to the next request, once the client has read enough of the answer."""
        if self._behind:
            return
        self._state = _State.HEAD
        self._due(self._server.idle_seconds)
        if self._pending:
            self._loop.call_soon(self._read_pending)  # others come in between, however many wait here
        elif self._paused_reading:
            self._read_on()

    def _read_pending(self) -> None:
        if self._state is _State.HEAD and self._pending:
            data, self._pending = self._pending, b""
            self._read(data)
            self._read_on()

    # The client of an answer

    def begin(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        if self._state is not _State.ANSWER:
            return
        if self._shared:
            headers = {**headers, **self._shared}
        lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n", self._server.date_line()]
        for name, value in headers.items():
            # A line break in a value would begin a header, or an answer, of somebody else's making.
            lines.append(f"{name}: {value if value.isprintable() else value.translate(_UNPRINTABLE)}\r\n")
        if length is None:
            lines.append("Transfer-Encoding: chunked\r\n")
        else:
            lines.append(f"Content-Length: {length}\r\n")
            self._left = length
        if self._server.is_closing_connections:
            self._keep = False
        lines.append("\r\n" if self._keep else "Connection: close\r\n\r\n")
        self._head = "".join(lines).encode("utf-8", "replace")
        self._chunked = length is None

    def write(self, data: bytes) -> None:
        if self._whole or not data or self._state is not _State.ANSWER:
            return
        if self._chunked:
            data = b"%b%x\r\n%b\r\n" % (self._head, len(data), data)
        else:
            self._left -= len(data)
            if self._head:
                data = self._head + data
        self._head = b""
        self._written += len(data)
        self._transport.write(data)

    def end(self) -> None:
        if self._whole or self._state is not _State.ANSWER:
            return
        last = self._head + b"0\r\n\r\n" if self._chunked else self._head
        self._head = b""
        if not self._chunked and self._left:
            self._keep = False  # not as long as was announced: nothing may follow it
        self._whole = True
        if last:
            self._transport.write(last)

    def on_room(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        if self._state is not _State.ANSWER:
            return
        self._pause, self._resume = pause, resume
        if self._behind:
            pause()

    def pause_writing(self) -> None:
        self._behind = True
        if self._state is _State.ANSWER:
            self._read_at_last = self._written - self._transport.get_write_buffer_size()
            self._due(self._server.policy.slow_reader_seconds)
            if self._pause is not None:
                self._pause()

    def resume_writing(self) -> None:
        self._behind = False
        if self._state is not _State.ANSWER:
            return
        self._deadline = FOREVER
        if self._resume is not None:
            self._resume()
        if self._task is None and self._whole:
            self._next()

    # Ends and times

    def _close(self) -> None:
        """As soon as what was written has been read."""
        self._state = _State.LINGER
        self._due(self._server.policy.slow_reader_seconds)
        self._shut()

    def _linger(self) -> None:
        """Close without the reset that would keep the client, still sending, from reading its answer."""
        self._state = _State.LINGER
        server = self._server
        if len(server.lingering) >= server.policy.max_lingering:
            self._shut()
            return
        server.lingering.add(self)
        self._due(server.policy.linger_seconds)
        if not self._transport.can_write_eof():  # TLS: closing says goodbye in its own way
            self._shut()
            return
        self._transport.write_eof()
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()

    def retire(self) -> None:
        """The next request is the last; one that does not come soon is not waited for."""
        if self._state is _State.HEAD:
            self._due(min(self._server.idle_seconds, self._deadline - self._loop.time()))

    def stop(self) -> asyncio.Task[None] | None:
        """Ends it whatever it does; gives what has to be awaited."""
        task = self._task
        if task is not None:
            task.cancel()
        self._shut()
        return task

    def abort(self) -> None:
        self._transport.abort()

    def _shut(self) -> None:
        # Once: the second time asyncio's TLS forgets whom to tell (CPython 3.11.2), and can abort no more.
        if not self._transport.is_closing():
            self._transport.close()

    def _due(self, seconds: float) -> None:
        """The one deadline of what it is doing now. The timer is moved only to come earlier."""
        self._deadline = when = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._ring)
        elif self._timer.when() > when:
            self._timer.cancel()
            self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._deadline == FOREVER:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        elif self._state is _State.HEAD:
            self._close()
        elif self._state is _State.BODY:
            self._body_is_late()
        elif self._state is _State.ANSWER and self._reads_on():
            self._due(self._server.policy.slow_reader_seconds)
        else:
            self._transport.abort()

    def _reads_on(self) -> bool:
        """The client is slow, and has read something since that was last looked at."""
        before = self._read_at_last
        self._read_at_last = self._written - self._transport.get_write_buffer_size()
        return self._read_at_last > before

    def _body_is_late(self) -> None:
        assert self._admitted is not None
        self._keep = False
        self._body = bytearray()
        limit = self._server.policy.body_seconds
        error = BodyTimeout(f"The request body did not arrive within {limit:g} s.")
        self._server.inference.note(self._admitted.head, error)
        self._refuse_now(self._admitted.request_id, error)
        self._linger()


class HttpServer:
    """Listens, and gives each connection a protocol. To be used as an async context."""

    def __init__(
        self,
        inference: Answering,
        application: web.Application,
        origins: Origins,
        policy: ServerPolicy | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`application`: serves what the hot path does not. It must not run yet: it is given a middleware
        with the checks, and the manners, that both servers have in common. `tls`: None where clients speak
        plain HTTP."""
        policy = policy or ServerPolicy()
        self.loop = asyncio.get_running_loop()
        self.inference = inference
        self.origins = origins
        self.policy = policy
        self.connections = Connections(affordable(policy.connections))
        self.noise = Noise(self.loop.time)
        self._securing = None if tls is None else self._secured_by(tls)
        self.ours: set[HotConnection] = set()
        self.lingering: set[HotConnection] = set()
        self.emptied = asyncio.Event()
        """Set when no connection is left of a server that retires."""
        self._retiring = False
        self._listening: list[asyncio.AbstractServer] = []
        self._date = ""
        self._date_until = 0.0
        application.middlewares.append(plain_requests(origins))  # innermost: others give errors their form
        application.on_response_prepare.append(self._prepare)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,  # a client that leaves ends its handler, and with it the work (D3)
            shutdown_timeout=policy.shutdown_seconds,
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends everything, what is under way too."""
        self._stop_listening()
        tasks = self._securing.end() if self._securing is not None else []
        tasks += [task for one in list(self.ours) if (task := one.stop()) is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.policy.shutdown_seconds)
        await self._runner.cleanup()
        for connection in list(self.ours):
            connection.abort()

    async def listen(self, host: str, port: int) -> int:
        """On an address; gives the port. Raises `OSError`."""
        server = await self.loop.create_server(self._protocol, host, port, backlog=self.policy.backlog)
        self._listening.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_on(self, sockets: Sequence[socket.socket]) -> int:
        """On sockets that listen already; gives the port of the first."""
        for one in sockets:
            one.setblocking(False)
            server = await self.loop.create_server(self._protocol, sock=one, backlog=self.policy.backlog)
            self._listening.append(server)
        name = sockets[0].getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0

    def retire(self) -> None:
        """Another process has the same socket: accept nothing more, answer what comes over the connections
        that there are, and end each with its next answer. `emptied` is set when none is left."""
        if self._retiring:
            return
        self._retiring = True
        self._stop_listening()
        for connection in list(self.ours):
            connection.retire()
        self.loop.call_later(self.policy.retiring_idle_seconds, self._end_idle)
        self._note_emptied()

    def _end_idle(self) -> None:
        if (server := self._runner.server) is not None:
            for connection in server.connections:
                if isinstance(connection, HardenedHandler):
                    connection.end_if_idle()

    def _stop_listening(self) -> None:
        for server in self._listening:
            server.close()
        self._listening.clear()

    # What its connections ask of it

    @property
    def is_closing_connections(self) -> bool:
        """Each with its next answer."""
        return self._retiring or self.inference.draining

    @property
    def idle_seconds(self) -> float:
        """For which a connection may wait for its next request."""
        return self.policy.retiring_idle_seconds if self._retiring else self.policy.head_seconds

    def refused(self, address: str, error: RequestError) -> None:
        self.noise.heard(address, f"more connections than there may be ({error.code})")

    def lost(self, address: str) -> None:
        self.connections.close(address)
        self._note_emptied()

    def _note_emptied(self) -> None:
        if self._retiring and not self.connections.count:
            self.emptied.set()

    def aiohttp_protocol(self, address: str) -> HardenedHandler:
        server = self._runner.server
        assert server is not None
        return HardenedHandler(
            server,
            self.loop,
            noise=self.noise,
            address=address,
            idle_seconds=self.policy.head_seconds,
            lost=partial(self.lost, address),
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that its connection keeps, cancels and is told the end of."""
        if sys.version_info >= (3, 12):
            return asyncio.Task(work, loop=self.loop, eager_start=True)
        return self.loop.create_task(work)

    def date_line(self) -> str:
        now = self.loop.time()
        if now >= self._date_until:
            self._date = f"Date: {formatdate(usegmt=True)}\r\n"
            self._date_until = now + 1.0
        return self._date

    def _protocol(self) -> asyncio.Protocol:
        return HotConnection(self) if self._securing is None else self._securing.protocol()

    def _secured_by(self, tls: ssl.SSLContext) -> Securing:
        return Securing(
            tls,
            self.policy.tls_handshake_seconds,
            self.connections,
            make=lambda: HotConnection(self, is_counted=True),
            refused=self.refused,
            lost=self.lost,
        )

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)  # nobody need know what this is made of
        if "Origin" in request.headers and is_for_answers(request.path):
            response.headers.update(self.origins.shared(request.headers))
        if self.is_closing_connections or LAST in request:
            response.force_close()
            response.headers["Connection"] = "close"


def affordable(policy: ConnectionPolicy) -> ConnectionPolicy:
    """No more connections than this process can have open files for: each request needs two, and the rest of
    the balancer some. Raises the process's own limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * policy.max_connections + RESERVED_FILES
    if soft < wanted and soft != hard:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):  # macOS has a further limit that it does not tell
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return policy
    most = max(8, (soft - RESERVED_FILES) // 2)
    log.log(
        logging.WARNING if most < policy.max_connections // 2 else logging.DEBUG,
        "this process may have %d files open: at most %d connections (wanted: %d; see ulimit -n)",
        *(soft, most, policy.max_connections),
    )
    return replace(policy, max_connections=most)
