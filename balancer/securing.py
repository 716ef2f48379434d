"""Connections of clients whose TLS is yet to be agreed on.

A loop tells a server of a connection with TLS only once that is done. Until then each holds an open file and
some 300 KiB, so it has to count as the others do: else one address could have any number of them.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol, cast

from balancer.connections import Connections
from balancer.core.errors import RequestError


class Speaker(Protocol):
    """Who speaks over a connection, once it is secured. It gives back the place among the connections, if it
    was begun at all."""

    @property
    def is_begun(self) -> bool: ...


class Securing:
    """Agrees on TLS with who connects."""

    def __init__(
        self,
        context: ssl.SSLContext,
        seconds: float,
        connections: Connections,
        *,
        make: Callable[[], Speaker],
        refused: Callable[[str, RequestError], None],
        lost: Callable[[str], None],
    ) -> None:
        """`seconds`: for TLS to be agreed on, and to be ended. `refused` is told of an address that has too
        many connections, `lost` of each that has come to nothing."""
        self._context = context
        self._seconds = seconds
        self._connections = connections
        self._make = make
        self._refused = refused
        self._lost = lost
        self._tasks: set[asyncio.Task[None]] = set()

    def protocol(self) -> asyncio.Protocol:
        """For one connection that was accepted."""
        return _Accepted(self.begin)

    def begin(self, plain: asyncio.Transport) -> None:
        """Goes on with a connection on which nothing was read yet."""
        address = remote_of(plain)
        try:
            self._connections.open(address)
        except RequestError as error:
            plain.abort()  # nothing can be said that the client would understand
            self._refused(address, error)
            return
        try:
            # A transport of its own has to be there from the first byte on; this one closes its own number.
            accepted = plain.get_extra_info("socket").dup()
        except OSError:
            plain.abort()
            self._lost(address)
            return
        plain.abort()
        task = asyncio.get_running_loop().create_task(self._agree(accepted, address), name="TLS")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self) -> list[asyncio.Task[None]]:
        """Gives up what is not agreed on; gives what has to be awaited."""
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    async def _agree(self, accepted: socket.socket, address: str) -> None:
        accepted.setblocking(False)
        speaker = self._make()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: cast(asyncio.Protocol, speaker),
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._seconds,
                ssl_shutdown_timeout=self._seconds,
            )
        except OSError:
            pass  # it is nobody's; what is worth telling the context has told
        finally:
            if not speaker.is_begun:
                self._lost(address)


class _Accepted(asyncio.Protocol):
    def __init__(self, begin: Callable[[asyncio.Transport], None]) -> None:
        self._begin = begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(cast(asyncio.Transport, transport))


def remote_of(transport: asyncio.BaseTransport) -> str:
    """The address at the other end; empty for a Unix socket."""
    name = transport.get_extra_info("peername")
    return name[0] if isinstance(name, tuple) else ""
