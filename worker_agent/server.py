"""The agent's HTTP server: aiohttp's, over TLS, with what it leaves open closed.

Bytes that are no TLS end their connection. Bytes that are no HTTP are answered with a fixed sentence and
logged by nobody: aiohttp would quote them in both places, and they may be a prompt. Connections are counted,
in all and by address, before anything is read of them. One that was opened from here is served like others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import cast

from aiohttp import web

from worker_agent.exchange import Refused

_LOG = logging.getLogger(__name__)
_BACKLOG = 128
_REST_SECONDS = 0.5  # where the system has no room for one more connection
_GOODBYE_SECONDS = 1.0  # TLS ends with a word of each side; who does not say his is not waited for
_UNSENT_BYTES = 64 * 1024  # of a connection whose other side does not read; TLS would hold half a megabyte
_LINE_BYTES = 8190
_HEADERS = 128
_CONNECTIONS = 1000
_CONNECTIONS_PER_ADDRESS = 200


class CannotListen(Exception):
    """The port is taken, or the address is none of this machine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPolicy:
    """Bounds of what connects."""

    connections: int = _CONNECTIONS
    connections_per_address: int = _CONNECTIONS_PER_ADDRESS
    keep_alive_seconds: float = 75.0
    """Longer than the balancer keeps an idle connection, so that it is never the one to be surprised. A head
    must have arrived by then, too."""
    handshake_seconds: float = 10.0
    """Of TLS."""
    linger_seconds: float = 1.0
    """A refused body is read on for so long, so that its sender reads the refusal."""

    @classmethod
    def for_slots(cls, slots: int) -> ServerPolicy:
        """One balancer may fill all slots, each over a connection of its own, and idle ones are kept."""
        return cls(
            connections=max(_CONNECTIONS, 3 * slots),
            connections_per_address=max(_CONNECTIONS_PER_ADDRESS, 2 * slots),
        )


class _Connections:
    """Those that are open now."""

    def __init__(self, policy: ServerPolicy) -> None:
        self._policy = policy
        self._by_address: Counter[str] = Counter()

    def open(self, address: str) -> bool:
        """One more; False, and not counted, where there are enough."""
        enough = self._by_address[address] >= self._policy.connections_per_address
        if enough or self._by_address.total() >= self._policy.connections:
            return False
        self._by_address[address] += 1
        return True

    def close(self, address: str) -> None:
        """One less."""
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]  # the table holds no more addresses than there are connections


class _Connection(web.RequestHandler):
    """One connection."""

    __slots__ = ("_over", "dialled")

    def __init__(
        self, server: web.Server, policy: ServerPolicy, over: Callable[[], None], *, dialled: bool
    ) -> None:
        """`over` is called at its end."""
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # None: no log
            auto_decompress=False,
            keepalive_timeout=policy.keep_alive_seconds,
            lingering_time=policy.linger_seconds,
            max_line_size=_LINE_BYTES,
            max_field_size=_LINE_BYTES,
            max_headers=_HEADERS,
        )
        self._over = over
        self.dialled = dialled

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's, of TLS, is one in all but name.
        cast(asyncio.WriteTransport, transport).set_write_buffer_limits(high=_UNSENT_BYTES)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._over()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status == 500:  # a fault of ours, which is told with its traceback
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        response = Refused(status, "bad_request", "this is no request that is understood here").response()
        response.force_close()
        return response


def is_dialled(request: web.Request) -> bool:
    """Whether the request came on a connection that was opened from here (`Listening.adopt`)."""
    return isinstance(request.protocol, _Connection) and request.protocol.dialled


class Listening:
    """A server that answers now."""

    def __init__(self, server: web.Server, policy: ServerPolicy, tls: ssl.SSLContext | None) -> None:
        self._server = server
        self._policy = policy
        self._tls = tls
        self._connections = _Connections(policy)
        self._tasks: set[asyncio.Future[None]] = set()
        self.port = 0
        """The one that was bound."""

    async def adopt(self, sock: socket.socket) -> None:
        """Serves on this connected socket, on which the other side has begun to speak, as on one that was
        accepted: it is counted like those, and closed where there are enough. Returns at once; the socket is
        ours from now on."""
        self._keep(self._serve(sock, dialled=True))

    async def open(self, host: str, port: int) -> None:
        """Raises `OSError` where it cannot be bound."""
        for listener in await _bound(host, port):
            self.port = self.port or int(listener.getsockname()[1])
            self._keep(self._accept(listener))

    async def close(self) -> None:
        """No connection is accepted any more, and TLS is not waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        told = False
        with listener:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except ConnectionError:  # it was gone before it was looked at
                    continue
                except OSError as error:
                    if not told:
                        _LOG.warning("cannot accept connections: %s; trying on", error.strerror or error)
                    told = True
                    await asyncio.sleep(_REST_SECONDS)
                    continue
                told = False
                self._keep(self._serve(sock, dialled=False))

    async def _serve(self, sock: socket.socket, *, dialled: bool) -> None:
        address = _peer(sock)
        if not self._connections.open(address):
            sock.close()
            return
        over = asyncio.Event()
        try:
            if await self._is_made(sock, over, dialled=dialled):
                await over.wait()
        finally:
            self._connections.close(address)

    async def _is_made(self, sock: socket.socket, over: asyncio.Event, *, dialled: bool) -> bool:
        """Whether it is a connection of ours; one that spoke no TLS is closed, and that is told nobody: the
        network is full of those who knock."""

        def connection() -> _Connection:
            return _Connection(self._server, self._policy, over.set, dialled=dialled)

        loop = asyncio.get_running_loop()
        try:
            sock.setblocking(False)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                await loop.connect_accepted_socket(connection, sock)
                return True
            await loop.connect_accepted_socket(
                connection,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=self._policy.handshake_seconds,
                ssl_shutdown_timeout=_GOODBYE_SECONDS,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is one; what it says may quote what was sent
            _LOG.debug("a connection came to nothing: %s", type(error).__name__)
            sock.close()
            return False
        return True


def _peer(sock: socket.socket) -> str:
    try:
        peer = sock.getpeername()
    except OSError:
        peer = ""
    return str(peer[0]) if peer and not isinstance(peer, str) else ""  # a pair of sockets has no addresses


async def _bound(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of that name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind(address)
            sock.listen(_BACKLOG)
    except OSError:
        for sock in bound:
            sock.close()
        raise
    return bound


@contextlib.asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, policy: ServerPolicy, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Listening]:
    """The application answers while the block lasts. `tls`: None for plain HTTP. Raises `CannotListen`."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # without it, a client that leaves before the first byte is never noticed
        shutdown_timeout=1.0,  # by then the gateway has been drained and closed
    )
    await runner.setup()
    try:
        assert runner.server is not None
        server = Listening(runner.server, policy, tls)
        try:
            await server.open(host, port)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CannotListen(
                f"cannot listen on {host} port {port}: {reason}; give another --port"
            ) from None
        try:
            yield server
        finally:
            await server.close()
    finally:
        await runner.cleanup()
