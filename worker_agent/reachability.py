"""Which of a machine's addresses work from here. Pure but for `own_interfaces`."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import TypeAlias

import psutil

MAX_ADDRESSES = 8
"""Of one announcement."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def by_reachability(addresses: Sequence[str], own: Sequence[Interface]) -> tuple[str, ...]:
    """The announced addresses that may work from here, the likeliest first.

    IPv4 of a network that this machine is in comes first, then IPv6 of such a network, then whatever needs a
    router. Link-local IPv6 works with its scope only, and comes last; without one it is left out. Loopback
    counts, and is best, when the announcement comes from this very machine: all of its addresses are ours.
    """
    parsed = [
        address for text in addresses[: 4 * MAX_ADDRESSES] if (address := parsed_address(text)) is not None
    ]
    ours = {interface.ip for interface in own}
    from_here = all(address.is_loopback or address in ours for address in parsed)

    def rank(address: Address) -> int:
        if address.is_loopback:
            return 0
        if address in ours and not from_here:
            return 5  # it leads back to us: a bridge that has the same address on many machines
        if address.is_link_local and address.version == 6:
            return 4
        near = any(address in interface.network for interface in own)
        return (1 if near else 3) if address.version == 4 else (2 if near else 3)

    usable = [
        address
        for address in dict.fromkeys(parsed)
        if not (address.is_unspecified or address.is_multicast)
        and (from_here or not address.is_loopback)
        and not (
            isinstance(address, ipaddress.IPv6Address) and address.is_link_local and not address.scope_id
        )
    ]
    return tuple(str(address) for address in sorted(usable, key=rank))


def own_interfaces() -> tuple[Interface, ...]:
    """The addresses of this machine with their networks, read from the system now."""
    found: list[Interface] = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                host = address.address.partition("%")[0]
                # ipaddress has no constructor from an IPv6 netmask in colon form: count its bits.
                bits = int(ipaddress.ip_address(address.netmask)).bit_count() if address.netmask else None
                found.append(ipaddress.ip_interface(host if bits is None else f"{host}/{bits}"))
    return tuple(found)


def parsed_address(text: str) -> Address | None:
    """None for what is no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:  # how a dual-stack socket tells of an IPv4 peer
            return address.ipv4_mapped
        if address.scope_id is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", address.scope_id):
            return None
    return address
