"""The agent's HTTP server: aiohttp's, with what it leaves open closed.

Bytes that are no HTTP are answered with a fixed sentence and logged by nobody: aiohttp would quote them in
both places, and they may be a prompt. Connections are counted, in all and by address.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from worker_agent.exchange import Refused

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

    __slots__ = ("_address", "_connections")

    def __init__(self, server: web.Server, connections: _Connections, policy: ServerPolicy) -> None:
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
        self._connections = connections
        self._address: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer: Any = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        if not self._connections.open(address):
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        self._address = address
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is not None:
            self._connections.close(self._address)
            self._address = None
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


@contextlib.asynccontextmanager
async def listening(app: web.Application, host: str, port: int, policy: ServerPolicy) -> AsyncIterator[int]:
    """The application answers while the block lasts, on the port that is yielded. Raises `CannotListen`."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # without it, a client that leaves before the first byte is never noticed
        shutdown_timeout=1.0,  # by then the gateway has been drained and closed
    )
    await runner.setup()
    try:
        server = runner.server
        assert server is not None
        connections = _Connections(policy)
        try:
            listener = await asyncio.get_running_loop().create_server(
                lambda: _Connection(server, connections, policy), host, port, backlog=128
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise CannotListen(
                f"cannot listen on {host} port {port}: {reason}; give another --port"
            ) from None
        try:
            yield int(listener.sockets[0].getsockname()[1])
        finally:
            listener.close()
    finally:
        await runner.cleanup()
