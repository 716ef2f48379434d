"""TCP's own questions on a connection on which nothing is said."""

from __future__ import annotations

import socket
import sys


def keep_alive(sock: socket.socket, first: int, between: int, times: int) -> None:
    """Asks the other end after `first` seconds of silence and every `between` seconds from then on; after
    `times` questions without an answer the connection counts as cut."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "darwin":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPALIVE, first)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, first)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, times)
