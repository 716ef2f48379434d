"""What both ends of a tunnel do with its connection: keep it open while nothing is said, and give it as a
plain socket where it is inside of TLS.

A tunnel has TLS of its own, from the balancer to the agent. Where clients are served over TLS too, an agent
that dials goes through that as well; then this process takes the outer TLS off, and hands on a socket of its
own loopback that carries what is within.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from worker_agent.keep_alive import keep_alive

KEEP_ALIVE_SECONDS = 20, 5, 3
"""TCP's: silence before the first question, between two, and how many. Below what routers remember an idle
connection for (30 s and more); who has vanished is found after 35 s."""
_LOOPBACK_SECONDS = 1.0


def keep_open(sock: socket.socket) -> None:
    """Small packets go out while nothing is said: routers on the way do not forget the connection, and both
    ends find out when it is cut."""
    keep_alive(sock, *KEEP_ALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def carried(transport: asyncio.Transport, already: bytes = b"") -> socket.socket:
    """A socket whose bytes go over this connection, until either of the two is closed.

    `already`: what has come on it and belongs to the socket's reader. Raises `OSError` where this process may
    open no more files; the connection is closed then.
    """
    loop = asyncio.get_running_loop()
    outer = _End()
    transport.pause_reading()  # what comes before both ends are there would be nobody's
    try:
        near, far = _pair()
        try:
            inner_transport, inner = await loop.create_connection(_End, sock=near)
        except BaseException:
            near.close()
            far.close()
            raise
    except BaseException:
        transport.abort()
        raise
    inner.other, outer.other = transport, inner_transport
    outer.connection_made(transport)
    transport.set_protocol(outer)
    if already:
        outer.data_received(already)
    if transport.is_closing():
        inner_transport.close()
    else:
        transport.resume_reading()
    return far


class _End(asyncio.Protocol):
    """One of two connections: what comes here goes out there, as fast as that is read."""

    def __init__(self) -> None:
        self.other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and not self.other.is_closing():
            self.other.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.is_closing():
            self.other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        other, self.other = self.other, None
        if other is not None:
            other.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection within this machine. TCP, since those who get one end set its options.

    Raises `OSError`.
    """
    with socket.socket() as listener:
        listener.settimeout(_LOOPBACK_SECONDS)
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        near = socket.socket()
        try:
            near.settimeout(_LOOPBACK_SECONDS)
            near.connect(listener.getsockname())
            while True:
                far, address = listener.accept()
                if address == near.getsockname():
                    break
                far.close()  # another program of this machine was there first
        except BaseException:
            near.close()
            raise
    near.setblocking(False)
    far.setblocking(False)
    return near, far
