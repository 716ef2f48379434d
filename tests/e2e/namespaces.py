"""Hosts on one bridge, each a network namespace: a room's network without the room.

The bridge lies in a namespace of its own, so nothing of this machine's network is touched, and any number
of rooms may use the same addresses at once. Linux, root and `ip` (iproute2) are needed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

_T = TypeVar("_T")

_NAMES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns came with Python 3.12
_PORT = "eth0"
_ALL = 3  # linux/if_ether.h: ETH_P_ALL


class NoNamespaces(Exception):
    """This machine, or this user, cannot make hosts; the sentence says why."""


@dataclass(frozen=True)
class Overheard:
    """Frames of one cable."""

    frames: list[bytes] = field(default_factory=list)

    def holds(self, text: bytes) -> bool:
        """Whether it stood in what passed. One that was cut by the end of a frame counts, too."""
        return text in b"".join(self.frames) or text in b"".join(map(_tcp_payload, self.frames))


def _tcp_payload(frame: bytes) -> bytes:
    """Of a frame of Ethernet, IPv4 and TCP; empty: it is another one."""
    if frame[12:14] != b"\x08\x00" or frame[23:24] != b"\x06":
        return b""
    tcp = 14 + (frame[14] & 15) * 4
    return frame[tcp + (frame[tcp + 12] >> 4) * 4 :]


@dataclass(frozen=True)
class Host:
    """A machine of the room: its own interfaces, its own ports, one cable to the bridge."""

    namespace: str
    address: str
    bridge: str
    """The namespace that the bridge is in."""
    cable: str
    """The bridge's end of the cable."""

    @property
    def within(self) -> tuple[str, ...]:
        """Before a command, runs it on this host, as the same process."""
        return ("ip", "netns", "exec", self.namespace)

    def open_socket(self, kind: socket.SocketKind) -> socket.socket:
        """A socket of this host, for a client in our own process; it does not block."""
        made = self._here(lambda: socket.socket(socket.AF_INET, kind))
        made.setblocking(False)
        return made

    def member_of(self, group: str, port: int) -> socket.socket:
        """A socket that hears what is sent to `port`, to the host's address and to the group's."""
        made = self.open_socket(socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("", port))
        membership = struct.pack("4s4s", socket.inet_aton(group), socket.inet_aton(self.address))
        made.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        return made

    def processes(self) -> list[psutil.Process]:
        """Whatever runs on this host, whoever started it."""
        found = []
        for word in _ip("netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(word)))
        return found

    def gain_address(self, address: str) -> None:
        """Beside those that it has, in the same network."""
        _ip("-n", self.namespace, "address", "add", f"{address}/24", "dev", _PORT)

    def lose_address(self, address: str) -> None:
        """Nothing more comes from it or reaches it. (Linux takes the later ones of a network along with the
        first, unless told to keep them.)"""
        self._here(lambda: Path(f"/proc/sys/net/ipv4/conf/{_PORT}/promote_secondaries").write_text("1"))
        _ip("-n", self.namespace, "address", "del", f"{address}/24", "dev", _PORT)

    @contextmanager
    def overheard(self) -> Iterator[Overheard]:
        """What passes through this host's cable, both ways, from now on."""
        ear = _in(self.bridge, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)))
        with ear:
            ear.bind((self.cable, 0))
            ear.settimeout(0.1)
            heard = Overheard()
            stop = threading.Event()

            def listen() -> None:
                while not stop.is_set():
                    with suppress(TimeoutError):
                        heard.frames.append(ear.recv(1 << 17))

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield heard
            finally:
                stop.set()
                thread.join()

    def listener(self, port: int) -> socket.socket:
        """A socket that accepts connections at this port of the host, for a server in our own process."""
        made = self.open_socket(socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address, port))
        made.listen()
        return made

    def cut_off_multicast(self) -> None:
        """From now on the bridge hands this host no multicast; all else still passes."""
        _ip("-n", self.bridge, "link", "set", self.cable, "type", "bridge_slave", "mcast_flood", "off")

    def pull_the_cable(self) -> None:
        """Nothing reaches this host or leaves it, and nobody is told."""
        _ip("-n", self.bridge, "link", "set", self.cable, "down")

    def plug_it_in_again(self) -> None:
        _ip("-n", self.bridge, "link", "set", self.cable, "up")

    def lose_the_way_to(self, other: Host) -> None:
        """What this host sends to the other is lost on the way, without a word; what comes from it arrives.

        Its frames go to a hardware address that nobody has: that needs no packet filter."""
        _ip("-n", self.namespace, "neighbour", "replace", *_nobody(other), "nud", "permanent")

    def find_the_way_to(self, other: Host) -> None:
        """It is looked up anew."""
        _ip("-n", self.namespace, "neighbour", "delete", *_nobody(other))

    def _here(self, make: Callable[[], _T]) -> _T:
        return _in(self.namespace, make)


def _in(name: str, make: Callable[[], _T]) -> _T:
    """What `make` gives in a thread that has moved to this namespace; what it opened stays there."""
    made: list[_T] = []
    faults: list[OSError] = []

    def move() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with (_NAMES / name).open("rb") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot move to {name}")
            made.append(make())
        except OSError as error:
            faults.append(error)

    # A thread of its own, which ends: one of a pool would take others' sockets to this namespace.
    thread = threading.Thread(target=move)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return made[0]


@contextmanager
def network(hosts: int) -> Iterator[tuple[Host, ...]]:
    """So many hosts, 10.77.0.1 the first of them, which all reach each other.

    On leaving, however that comes about, all that runs on them is killed and nothing of them stays. There is
    nothing in here that a cancellation could interrupt. Raises `NoNamespaces`.
    """
    if not sys.platform.startswith("linux"):
        raise NoNamespaces(f"network namespaces are Linux's, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise NoNamespaces("making network namespaces needs root")
    if shutil.which("ip") is None:
        raise NoNamespaces("there is no `ip` here (package iproute2)")
    room = f"room-{os.getpid()}-{secrets.token_hex(2)}"
    with ExitStack() as stack:
        try:
            bridge = stack.enter_context(_namespace(f"{room}-bridge"))
            # Without snooping, what a port may be sent is decided by its own flag alone.
            _ip("-n", bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            _ip("-n", bridge, "link", "set", "br0", "up")
            made = tuple(
                _host(stack.enter_context(_namespace(f"{room}-{number}")), bridge, number)
                for number in range(1, hosts + 1)
            )
        except subprocess.CalledProcessError as error:
            raise NoNamespaces(f"`{' '.join(error.cmd)}` failed here: {error.stderr.strip()}") from error
        except OSError as error:
            raise NoNamespaces(f"a namespace cannot be used here: {error}") from error
        yield made


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    try:
        _ip("netns", "add", name)
        yield name
    finally:
        if (_NAMES / name).exists():
            for left in _ip("netns", "pids", name).split():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(left)).kill()
            _ip("netns", "delete", name)


def _nobody(host: Host) -> tuple[str, ...]:
    return (host.address, "lladdr", "02:00:00:00:00:00", "dev", _PORT)


def _host(namespace: str, bridge: str, number: int) -> Host:
    host = Host(namespace, f"10.77.0.{number}", bridge, f"port{number}")
    # An IPv6 address is used at once, as on a machine that has been up for a while: hosts that come up in
    # the same second as our commands would test the wait for duplicates, which is the kernel's.
    with suppress(FileNotFoundError):  # a kernel without IPv6
        host._here(lambda: Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0"))
    _ip("-n", namespace, "link", "add", _PORT, "type", "veth", "peer", "name", host.cable, "netns", bridge)
    _ip("-n", bridge, "link", "set", host.cable, "master", "br0", "up")
    _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", _PORT)
    for interface in ("lo", _PORT):
        _ip("-n", namespace, "link", "set", interface, "up")
    return host


def _ip(*words: str) -> str:
    return subprocess.run(
        ("ip", *words), check=True, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
    ).stdout
