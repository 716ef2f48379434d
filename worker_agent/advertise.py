"""Tells the network by mDNS that an agent or a balancer is here, and withdraws that when it leaves.

A hint and no more: whoever hears it comes to ask. Where multicast does not pass (guest Wi-Fi, some VPNs),
nothing here is fatal: the log says once what to do instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

from worker_agent import wire

_LOG = logging.getLogger(__name__)
_LOOK_AGAIN_SECONDS = 5.0  # Wi-Fi changes, a cable is plugged in, a laptop wakes up elsewhere
_VERSIONS = {4: IPVersion.V4Only, 6: IPVersion.V6Only}
_WILDCARDS = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Presence:
    """What somebody says of itself on the link."""

    service_type: str
    """`wire.SERVICE_TYPE` of an agent, `wire.BALANCER_SERVICE_TYPE` of a balancer."""
    announced: wire.Announced
    host: str
    """The address that it is bound to; a wildcard stands for all of the machine's."""
    port: int


def addresses_of(host: str, found: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The addresses to advertise for what we are bound to, sorted. Pure.

    `found`: per network interface, its addresses. Loopback is told to nobody unless it is all that we are
    bound to; link-local IPv6 is left out, since the record cannot say on which interface it holds.
    """
    if host not in _WILDCARDS:
        return (host,) if _parsed(host) is not None else ()
    every = {address.partition("%")[0] for addresses in found.values() for address in addresses}
    told = []
    for address in every:
        ip = _parsed(address)
        if ip is None or ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local):
            continue
        if ip.version == 6 and host == "0.0.0.0":
            continue
        told.append(address)
    return tuple(sorted(told))


def service_info(presence: Presence, addresses: Sequence[str]) -> ServiceInfo:
    """The mDNS record. Pure."""
    label = "".join(c if c.isalnum() or c in "-_ " else "-" for c in presence.announced.id)
    label = label.encode()[:63].decode(errors="ignore")  # one DNS label
    return ServiceInfo(
        presence.service_type,
        f"{label}.{presence.service_type}",
        port=presence.port,
        properties=wire.txt_record(presence.announced),
        server=f"{label.replace(' ', '-')}.local.",
        parsed_addresses=list(addresses),
    )


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


async def advertise(presence: Callable[[], Presence], instead: str) -> None:
    """Advertises until cancelled, and follows the machine's addresses and what `presence` gives; then says
    goodbye. `instead`: what to do where that does not work, for the log: a sentence without its full stop."""
    told_of_failure = False
    while True:
        shown = presence()
        addresses = await _addresses(shown)
        try:
            if addresses:
                async with _registered(shown, addresses):
                    told_of_failure = False
                    while presence() == shown and await _addresses(shown) == addresses:  # noqa: ASYNC110
                        await asyncio.sleep(_LOOK_AGAIN_SECONDS)  # nobody tells us
                _LOG.info("what is advertised by mDNS has changed; advertising anew")
                continue
        except (OSError, ZeroconfError, RuntimeError, TimeoutError) as error:
            # RuntimeError is what zeroconf raises where no interface is up.
            if not told_of_failure:
                told_of_failure = True
                _LOG.warning("cannot advertise by mDNS (%s): %s", error or type(error).__name__, instead)
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)


@contextlib.asynccontextmanager
async def _registered(presence: Presence, addresses: Sequence[str]) -> AsyncIterator[None]:
    """The record is out while the block lasts. Leaving says goodbye: nobody has to wait for its TTL."""
    loopback = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    interfaces = list(addresses) if loopback else InterfaceChoice.All
    versions = {ipaddress.ip_address(address).version for address in addresses}
    ip_version = IPVersion.All if len(versions) == 2 else _VERSIONS[versions.pop()]
    # Its sockets are opened by its constructor; that takes milliseconds and no network.
    zeroconf = AsyncZeroconf(interfaces=interfaces, ip_version=ip_version)
    try:
        # Another machine may have our name: then ours gets a number. Who we are is in the record anyway.
        info = service_info(presence, addresses)
        await (await zeroconf.async_register_service(info, allow_name_change=True))
        _LOG.info(
            "advertised by mDNS as %s on %s",
            info.name.removesuffix("." + presence.service_type),
            ", ".join(addresses),
        )
        try:
            yield
        finally:
            await (await zeroconf.async_unregister_service(info))
    finally:
        await zeroconf.async_close()


async def _addresses(presence: Presence) -> tuple[str, ...]:
    found = await asyncio.to_thread(psutil.net_if_addrs)
    wanted = (socket.AF_INET, socket.AF_INET6)
    return addresses_of(
        presence.host,
        {
            name: [entry.address for entry in entries if entry.family in wanted]
            for name, entries in found.items()
        },
    )
