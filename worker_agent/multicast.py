"""Whether mDNS leaves this machine and comes in: asks its groups on each interface, and listens. Blocking."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from time import monotonic

from zeroconf import (  # type: ignore[attr-defined]  # public by its documentation, not marked so
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSRecord,
    DNSService,
    DNSText,
)
from zeroconf import Error as ZeroconfError
from zeroconf.const import _CLASS_IN, _FLAGS_QR_QUERY, _TYPE_PTR

from worker_agent import wire
from worker_agent.findings import MDNS_PORT, Announced, Interface, Multicast, Sent, Who, parsed

LISTEN_SECONDS = 3.5
"""A responder that has answered lately waits up to a second before it answers again (RFC 6762, 6)."""
_ASK_AGAIN_SECONDS = 1.2
_GROUP, _GROUP_6 = "224.0.0.251", "ff02::fb"
_PACKET_BYTES = 9000
_MOST_PACKETS = 4096
_MOST_RECORDS = 512
_OURS = {wire.SERVICE_TYPE: Who.WORKER, wire.BALANCER_SERVICE_TYPE: Who.BALANCER}
_ANY_SERVICE = "_services._dns-sd._udp.local."
"""Asked for as well: printers and other machines answer it, and show that multicast comes in."""


def listen(interfaces: Sequence[Interface], seconds: float = LISTEN_SECONDS) -> Multicast:
    """What happened within `seconds`; it takes that long wherever anything can be listened to."""
    lan = [one for one in interfaces if one.is_lan and one.addresses]
    heard = _Heard(interfaces)
    with ExitStack() as stack:
        try:
            ears = [stack.enter_context(one) for one in _ears(lan)]
        except OSError as error:
            return Multicast(deaf=f"{_name(error)}; another program may keep it for itself")
        sent = _ask(ears, lan)
        began = monotonic()
        asked_again = False
        packets = 0
        while (left := began + seconds - monotonic()) > 0 and packets < _MOST_PACKETS:
            for ear in select.select(ears, [], [], min(left, 0.2))[0]:
                packets += 1
                with suppress(OSError):
                    data, address = ear.recvfrom(_PACKET_BYTES)
                    heard.take(data, address)
            if not asked_again and monotonic() - began > _ASK_AGAIN_SECONDS:
                asked_again = True
                _ask(ears, lan)
    return Multicast(
        sent=tuple(sent),
        heard=tuple(dict.fromkeys(heard.machines)),
        announced=tuple(heard.announced()),
        seconds=seconds,
    )


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


# Sockets ...


def _ears(lan: Sequence[Interface]) -> list[socket.socket]:
    """One for IPv4, and one for IPv6 where that is to be had. Raises `OSError`."""
    ears = [_ear(socket.AF_INET)]
    for interface in lan:
        for address in interface.ipv4:
            membership = struct.pack("4s4s", socket.inet_aton(_GROUP), socket.inet_aton(address))
            with suppress(OSError):  # on macOS, without the grant; what follows from it is told by `_ask`
                ears[0].setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    with suppress(OSError):
        ears.append(_ear(socket.AF_INET6))
        for interface in lan:
            group = socket.inet_pton(socket.AF_INET6, _GROUP_6)
            with suppress(OSError):
                ears[1].setsockopt(
                    socket.IPPROTO_IPV6,
                    socket.IPV6_JOIN_GROUP,
                    group + struct.pack("@I", socket.if_nametoindex(interface.name)),
                )
    return ears


def _ear(family: socket.AddressFamily) -> socket.socket:
    ear = socket.socket(family, socket.SOCK_DGRAM)
    try:
        ear.setblocking(False)
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        else:
            ear.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        ear.bind(("", MDNS_PORT))
    except OSError:
        ear.close()
        raise
    return ear


def _ask(ears: Sequence[socket.socket], lan: Sequence[Interface]) -> list[Sent]:
    """From mDNS's own port, so that the answers come by multicast and not to us alone."""
    question = DNSOutgoing(_FLAGS_QR_QUERY)
    for name in (*_OURS, _ANY_SERVICE):
        question.add_question(DNSQuestion(name, _TYPE_PTR, _CLASS_IN))
    packet = question.packets()[0]
    sent = []
    for interface in lan:
        errors = [_send(ears, packet, interface, address) for address in interface.ipv4[:1]]
        # IPv6 alone may be switched off: it counts where there is nothing else.
        over_ipv6 = _send(ears, packet, interface, None) if len(ears) > 1 else "EAFNOSUPPORT"
        sent.append(Sent(interface.name, errors[0] if errors else over_ipv6))
    return sent


def _send(ears: Sequence[socket.socket], packet: bytes, interface: Interface, address: str | None) -> str:
    """By IPv4 from this address, by IPv6 for None. The system's name of what went wrong; empty: nothing."""
    try:
        if address is None:
            index = socket.if_nametoindex(interface.name)
            ears[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            ears[1].sendto(packet, (_GROUP_6, MDNS_PORT, 0, index))
        else:
            ears[0].setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
            ears[0].sendto(packet, (_GROUP, MDNS_PORT))
    except OSError as error:
        return _name(error)
    return ""


# What is heard ...


@dataclass(slots=True)
class _Service:
    who: Who
    source: str
    port: int | None = None
    text: bytes | None = None


@dataclass(slots=True)
class _Heard:
    """Gathers packets. Whatever they hold is another machine's claim."""

    interfaces: Sequence[Interface]
    machines: list[tuple[str, str]] = field(default_factory=list)
    _services: dict[str, _Service] = field(default_factory=dict)

    def take(self, data: bytes, address: tuple[str, ...] | tuple[str, int, int, int]) -> None:
        source = str(address[0]).partition("%")[0]
        if not self._is_own(source):
            scope = address[3] if len(address) == 4 else 0
            name = self._interface_of(source, int(scope))
            if name is not None and len(self.machines) < _MOST_PACKETS:
                self.machines.append((name, source))
        for record in _records(data):
            self._note(record, source)

    def _is_own(self, source: str) -> bool:
        found = parsed(source)
        return any(
            parsed(one.partition("/")[0]) == found
            for interface in self.interfaces
            for one in interface.addresses
        )

    def _interface_of(self, source: str, scope: int) -> str | None:
        """The one whose network it is in: mDNS does not leave its link."""
        lan = [one for one in self.interfaces if one.is_lan]
        if scope:
            with suppress(OSError):
                name = socket.if_indextoname(scope)
                return name if any(one.name == name for one in lan) else None
        return next((one.name for one in lan if one.holds(source)), None)

    def _note(self, record: DNSRecord, source: str) -> None:
        name = record.alias if isinstance(record, DNSPointer) else record.name
        who = next((who for kind, who in _OURS.items() if name.endswith("." + kind)), None)
        if who is None or record.ttl == 0 or len(self._services) >= _MOST_RECORDS:
            return
        service = self._services.setdefault(name, _Service(who, source))
        if isinstance(record, DNSService):
            service.port, service.source = record.port, source
        elif isinstance(record, DNSText):
            service.text = record.text

    def announced(self) -> Iterator[Announced]:
        """Services of which address and port are known."""
        for name, service in self._services.items():
            if service.port is None or service.text is None:
                continue
            try:
                told = wire.parse_txt(properties(service.text))
            except wire.WireError as error:
                label = "".join(c for c in name.partition(".")[0][:63] if c.isprintable())
                yield Announced(service.who, label, service.source, service.port, fault=str(error))
            else:
                yield Announced(
                    *(service.who, told.id, service.source, service.port, told.tag),
                    fingerprint=told.fingerprint,
                )


def _records(data: bytes) -> Sequence[DNSRecord]:
    try:
        packet = DNSIncoming(data)
        return packet.answers() if packet.valid and not packet.is_query() else ()
    except (ZeroconfError, ValueError, IndexError, struct.error):
        return ()


def properties(text: bytes) -> Mapping[bytes, bytes | None]:
    """Of a TXT record (RFC 6763, 6): each string has its length before it. Pure."""
    found: dict[bytes, bytes | None] = {}
    at = 0
    while at < len(text):
        string = text[at + 1 : at + 1 + text[at]]
        at += 1 + text[at]
        name, equals, value = string.partition(b"=")
        if name:
            found.setdefault(name, value if equals else None)
    return found
