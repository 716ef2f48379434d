"""What a service manager, or `balancer keep`, hands to this process: sockets that listen already, and where
to say that it is ready. By systemd's conventions, so that both work in the same way.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

FIRST_FD = 3
"""Of those that systemd passes."""


class NotASocket(Exception):
    """What was to be inherited cannot be listened on; a sentence for the terminal."""


def listening_sockets(
    environment: MutableMapping[str, str], own_pid: int, listen_fd: int | None
) -> list[socket.socket]:
    """The sockets to listen on; none: this process opens its own.

    `listen_fd`: of one that was named by a flag; else `LISTEN_FDS` says how many there are, if `LISTEN_PID`
    says that they are for us. Takes both out of the environment: they are not for our children. Raises
    `NotASocket`.
    """
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if listen_fd is not None:
        return [_listening(listen_fd)]
    if pid != str(own_pid) or not count.isdecimal():
        return []
    return [_listening(fd) for fd in range(FIRST_FD, FIRST_FD + min(int(count), 64))]


def _listening(fd: int) -> socket.socket:
    try:
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise NotASocket(f"file descriptor {fd} is no socket: {error.strerror or error}") from error
    is_stream = found.type == socket.SOCK_STREAM
    if not is_stream or found.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        found.close()
        raise NotASocket(f"file descriptor {fd} is no socket for TCP")
    os.set_inheritable(fd, False)
    return found


def notify(state: str, environment: MutableMapping[str, str]) -> None:
    """Tells whoever started us, where it wants to know: `READY=1`, `STOPPING=1`. Never fails: a service runs
    on when nobody listens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.connect(name)
            line.sendall(state.encode("ascii"))
    except OSError:
        return
