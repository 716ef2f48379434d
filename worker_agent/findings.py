"""What a network doctor has measured, and what it says about it: plain values, for agent and balancer.

`diagnosis` makes findings of the facts; `surroundings` measures them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

MDNS_PORT = 5353


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Good to know; nothing needs to be done."""
    WARNING = "warning"
    """It may be the cause, or will be one."""
    FAULT = "fault"
    """Machines cannot see or use each other while it is so."""


@dataclass(frozen=True, slots=True)
class Finding:
    area: str
    """What it is about, in a word or two."""
    level: Level
    sentence: str
    fix: str = ""
    """What to do, with the command where there is one; empty: nothing."""


def has_fault(findings: Iterable[Finding]) -> bool:
    """Whether the command ends with status 1."""
    return any(finding.level is Level.FAULT for finding in findings)


def as_json(findings: Iterable[Finding]) -> dict[str, object]:
    """For `--json`: `{"ok": bool, "findings": [{"area", "level", "sentence", "fix"}]}`."""
    told = list(findings)
    return {
        "ok": not has_fault(told),
        "findings": [
            {"area": one.area, "level": one.level.value, "sentence": one.sentence, "fix": one.fix}
            for one in told
        ],
    }


def summary(findings: Iterable[Finding]) -> str:
    """The last line, for people."""
    levels = [finding.level for finding in findings]
    parts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for level, word in ((Level.FAULT, "fault"), (Level.WARNING, "warning"))
        if (count := levels.count(level))
    ]
    return " and ".join(parts) or "nothing is wrong"


# Interfaces ...


class Kind(StrEnum):
    LOOPBACK = "loopback"
    CABLE = "cable"
    """Whatever is none of the others."""
    WIFI = "Wi-Fi"
    TUNNEL = "VPN"
    BRIDGE = "bridge"
    """Of containers and virtual machines on this machine: nobody else is there."""


_TUNNELS = re.compile(r"(tun|tap|utun|wg|tailscale|ppp|ipsec|gpd|zt|nordlynx|proton|cscotun|CloudflareWARP)")
_BRIDGES = re.compile(
    r"(docker|br-|veth|virbr|vnet|vmnet|bridge\d|lxc|lxd|cni|flannel|cali|podman|vboxnet|vEthernet"
    r"|awdl|llw|anpi|ap\d)"
)
"""The last four are Apple's own, for AirDrop and its like."""


def kind_of(name: str, *, wireless: bool = False) -> Kind:
    """By the interface's name, and by what the system says of it."""
    if re.fullmatch(r"lo\d*", name):
        return Kind.LOOPBACK
    if _TUNNELS.match(name):
        return Kind.TUNNEL
    if _BRIDGES.match(name):
        return Kind.BRIDGE
    return Kind.WIFI if wireless or name.startswith("wl") else Kind.CABLE


def wifi_ports(hardware_ports: str) -> frozenset[str]:
    """The interfaces that are Wi-Fi, from what macOS's `networksetup -listallhardwareports` prints."""
    found = re.findall(r"^Hardware Port: (?:Wi-Fi|AirPort)\s*\nDevice: (\S+)", hardware_ports, re.MULTILINE)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    kind: Kind
    is_up: bool
    addresses: tuple[str, ...] = ()
    """With their prefix: `192.168.1.10/24`, `fe80::1/64`."""
    mtu: int = 1500

    @property
    def is_lan(self) -> bool:
        """Up, and towards other machines."""
        return self.is_up and self.kind in (Kind.CABLE, Kind.WIFI)

    @property
    def ipv4(self) -> tuple[str, ...]:
        """Without prefix."""
        return tuple(bare(one) for one in self.addresses if ":" not in one)

    @property
    def global_ipv6(self) -> tuple[str, ...]:
        return tuple(
            bare(one) for one in self.addresses if ":" in one and not ip_address(bare(one)).is_link_local
        )

    def holds(self, address: str) -> bool:
        """Whether the address is in one of its own networks; False for what is no address."""
        found = parsed(address)
        return found is not None and any(found in ip_interface(one).network for one in self.addresses)


def bare(address: str) -> str:
    return address.partition("/")[0]


def parsed(text: str) -> IPv4Address | IPv6Address | None:
    """An address as a socket writes it, without its scope; None for what is none."""
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


_OVERLAY = ip_network("100.64.0.0/10")


def is_overlay(address: str) -> bool:
    """Of those that Tailscale and its like give out (RFC 6598): meant to go through a tunnel."""
    found = parsed(address)
    return found is not None and found.version == 4 and found in _OVERLAY


def own_lan_address(interfaces: Sequence[Interface]) -> str:
    """The one to be told to others; empty where there is none."""
    addresses = [one for interface in interfaces if interface.is_lan for one in interface.ipv4]
    routed = [one for one in addresses if not ip_address(one).is_link_local]
    others = [one for interface in interfaces if interface.is_lan for one in interface.global_ipv6]
    return next(iter([*routed, *addresses, *others]), "")


def as_host(address: str) -> str:
    """As in a URL."""
    return f"[{address}]" if ":" in address else address


# Multicast ...


@dataclass(frozen=True, slots=True)
class Sent:
    """An mDNS question that went out on an interface, or did not."""

    interface: str
    error: str = ""
    """The system's name of it, `EPERM`; empty: it went out."""


class Who(StrEnum):
    WORKER = "worker"
    BALANCER = "balancer"


@dataclass(frozen=True, slots=True)
class Announced:
    """What a machine says of itself by mDNS. A hint: anybody may say anything."""

    who: Who
    id: str
    source: str
    """The address from which it came."""
    port: int
    tag: str = ""
    fault: str = ""
    """Why it is of no use: another version of the protocol."""
    fingerprint: str = ""
    """Of the certificate that it tells of; empty: of none."""


@dataclass(frozen=True, slots=True)
class Multicast:
    sent: tuple[Sent, ...] = ()
    heard: tuple[tuple[str, str], ...] = ()
    """Interface and address of each other machine of which any mDNS was heard."""
    announced: tuple[Announced, ...] = ()
    """Those of ours, this machine's own among them."""
    seconds: float = 0.0
    """For how long was listened."""
    deaf: str = ""
    """Why nothing could be listened to."""


# This machine ...


@dataclass(frozen=True, slots=True)
class PortRange:
    first: int
    last: int
    protocol: str
    """`tcp`, `udp`, or empty: both."""


@dataclass(frozen=True, slots=True)
class Firewall:
    """One that is switched on."""

    name: str
    open: tuple[PortRange, ...] | None = None
    """What it lets in; None: that is not to be seen."""
    blocks_all: bool = False
    certain: bool = True
    """Its rules were read as it means them; False: guessed from a longer list."""
    chain: str = ""
    """Of nftables: where its rules for what comes in are."""

    def lets_in(self, port: int, protocol: str) -> bool | None:
        """None: that is not to be seen."""
        if self.blocks_all:
            return False
        if self.open is None:
            return None
        return any(one.first <= port <= one.last and one.protocol in ("", protocol) for one in self.open)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where we run."""

    system: str = "Linux"
    """As `platform.system()` says it: `Linux`, `Darwin`."""
    program: str = "python"
    """The one that firewalls ask about."""
    is_wsl: bool = False
    is_container: bool = False
    proxies: tuple[str, ...] = ()
    """Variables that name one."""
    host_name: str = ""
    host_addresses: tuple[str, ...] = ()
    """What its own name is resolved to here."""


@dataclass(frozen=True, slots=True)
class Here:
    """All that concerns this machine alone."""

    machine: Machine = field(default_factory=Machine)
    interfaces: tuple[Interface, ...] = ()
    firewalls: tuple[Firewall, ...] = ()
    multicast: Multicast = field(default_factory=Multicast)

    @property
    def lan(self) -> tuple[Interface, ...]:
        return tuple(one for one in self.interfaces if one.is_lan)

    def interface_of(self, address: str) -> Interface | None:
        """Which of ours has this address."""
        wanted = parsed(address)
        for interface in self.interfaces:
            if any(parsed(bare(one)) == wanted for one in interface.addresses):
                return interface
        return None

    def is_own(self, address: str) -> bool:
        found = parsed(address)
        return found is not None and (found.is_loopback or self.interface_of(address) is not None)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The cluster key as it lies on this machine, without the key."""

    path: str
    tag: str = ""
    """`handshake.cluster_tag` of it; empty: there is none."""
    fault: str = ""
    """Why it cannot be used, and what to do."""


class PortState(StrEnum):
    OURS = "ours"
    STRANGER = "stranger"
    """Something listens that does not answer as ours would."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class OwnPort:
    """What answers at our own port."""

    number: int
    states: Mapping[str, PortState]
    """By address of this machine, loopback among them."""
    program: str = ""
    """Who listens there, where the system tells."""


# Other machines ...


class Known(StrEnum):
    """How we know of a machine."""

    GIVEN = "given"
    """On the command line of the doctor."""
    LISTED = "listed"
    """In the settings, or in a running balancer's list."""
    HEARD = "heard"
    """By mDNS, now."""


class Proof(StrEnum):
    NOT_TRIED = "not tried"
    RIGHT = "right"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Contact:
    """How it went to reach another machine, as far as it went."""

    who: Who
    name: str
    """Its id where that is known, else its address."""
    host: str
    port: int
    known: Known
    announces: bool = True
    """It should be heard by mDNS: no server without an agent is."""
    tls: bool = False
    """It was spoken to by TLS."""
    addresses: tuple[str, ...] = ()
    """What the host is resolved to; none: it is not."""
    error: str = ""
    """Why there is no connection: the system's name of it, or `timeout`; empty: there is one."""
    connect_seconds: tuple[float, ...] = ()
    source: str = ""
    """Our own address towards it."""
    peer: str = ""
    """Which of its addresses answered, or was tried last."""
    speaks: bool = False
    """It answered as such a one does."""
    said: str = ""
    """Its own sentence, or what was wrong with its answer."""
    proof: Proof = Proof.NOT_TRIED
    """Whether it took our cluster key, and showed that it holds it."""
    is_other_certificate: bool = False
    """It has not the certificate by which this balancer knows it."""
    by_code: bool = False
    """It has no key, and waits for somebody to type its code."""
    refused: bool = False
    """It does not serve our address."""
    state: str = ""
    """Of a worker, as a running balancer sees it."""
    detail: str = ""
    listed: bool | None = None
    """Of a balancer: whether it lists our agent; None: it does not say, or there is no agent to list."""
    clock_ahead_seconds: float | None = None
    """Its clock, compared with ours."""

    @property
    def is_reached(self) -> bool:
        return bool(self.addresses) and not self.error

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{as_host(self.host)}:{self.port}"
