"""Tells the local network by mDNS where this balancer is: agents of its cluster join by themselves."""

from __future__ import annotations

from collections.abc import Callable

from balancer.addresses import is_loopback
from worker_agent import wire
from worker_agent.advertise import Presence, advertise


async def announce(host: str, port: int, announced: Callable[[], wire.Announced]) -> None:
    """Advertises until cancelled, and follows what is to be said and this machine's addresses. A balancer on
    loopback alone is announced to nobody.

    `host`: the address that it is bound to. `announced`: its id, the tag of the cluster's key as it is now,
    and of a balancer that clients speak to over TLS the fingerprint of its certificate.
    """
    if is_loopback(host):
        return
    await advertise(
        lambda: Presence(wire.BALANCER_SERVICE_TYPE, announced(), host, port),
        "agents will not find this balancer by themselves; start each with what `balancer cluster invite`"
        " shows",
    )
