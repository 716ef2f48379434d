"""Which source addresses are served: those of a room, not of the internet. Pure.

Balancer and agent answer without a key on their inference routes, as a LAN expects. 175,108 open Ollama
hosts show what that means on a public address, so anything from outside is refused before it is read.
A port-forward that rewrites the source, or a container's proxy, hides the real one: this cannot see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network

_PRIVATE: tuple[Network, ...] = tuple(
    ip_network(network)
    for network in (
        "127.0.0.0/8",
        "::1/128",
        "10.0.0.0/8",  # RFC 1918, here and the next two
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",  # link-local: two machines on one cable
        "fe80::/10",
        "fc00::/7",  # unique local (RFC 4193)
        "100.64.0.0/10",  # RFC 6598: what Tailscale and similar overlays give out
    )
)
# Not `ip_address(...).is_private`: it counts documentation, benchmark and reserved networks as private too.


@dataclass(frozen=True, slots=True)
class Sources:
    """Who is served: private networks, and those that were named besides."""

    allowed: tuple[Network, ...] = ()
    """A lab with public addresses on its desks names its own network here."""

    def admit(self, address: str) -> bool:
        """Whether a peer with this address belongs to the room.

        Takes what a socket says: IPv4, IPv6, IPv4-mapped IPv6, a scope after `%`. False for anything else.
        """
        ip = _ip(address)
        return ip is not None and any(ip in network for network in (*_PRIVATE, *self.allowed))


def is_loopback(address: str) -> bool:
    """Whether a peer with this address is on this machine. False for what is no address."""
    ip = _ip(address)
    return ip is not None and ip.is_loopback


def _ip(address: str) -> IPv4Address | IPv6Address | None:
    """What a socket says of its peer, IPv4-mapped IPv6 as IPv4; None for what is no address."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return ip.ipv4_mapped or ip if ip.version == 6 else ip


def parse_networks(value: object) -> tuple[Network, ...]:
    """Networks from what a person writes: `"131.1.0.0/16, 2001:db8::/32"`, or a list of such.

    A bare address is a network of one. Raises `ValueError` that names the one that is none.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("expected networks such as 131.1.0.0/16")
    networks = []
    for part in parts:
        try:
            networks.append(ip_network(part.strip() if isinstance(part, str) else part, strict=False))
        except ValueError:
            raise ValueError(f"{str(part)[:60]!r} is not a network such as 131.1.0.0/16") from None
    return tuple(networks)
