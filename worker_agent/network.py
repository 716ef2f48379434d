"""`worker-agent doctor --network`: why a balancer and this machine do not see each other, and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from worker_agent import cluster_key, multicast, surroundings
from worker_agent.contacts import (
    Calling,
    Meeting,
    Target,
    asked_target,
    heard_targets,
    own_port,
    reach_all,
    target_of,
)
from worker_agent.diagnosis import Stand, diagnose
from worker_agent.findings import Finding, Here, KeyFile, Known, Multicast, Who
from worker_agent.handshake import cluster_tag
from worker_agent.private_files import FileFault


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """What the agent's settings say of the network."""

    host: str
    port: int
    tls: bool
    mdns: bool
    balancers: tuple[str, ...]
    """URLs that the settings name."""
    data_dir: Path
    cluster_key: str | None = field(repr=False)
    """As the settings give it; None: it is in the data folder, or nowhere."""


async def examine(policy: NetworkPolicy, asked: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All that is found, within some ten seconds. `asked`: addresses of balancers to look for besides,
    each a URL or without its scheme. Raises `contacts.NoAddress`."""
    given = [asked_target(address, Who.BALANCER) for address in asked]
    key = await asyncio.to_thread(_key, policy)
    seen, heard = await _look_around()
    here = replace(seen, multicast=heard)
    own, agent_id = await own_port(
        policy.host, policy.port, here.interfaces, Meeting(None), who=Who.WORKER, tls=policy.tls
    )
    listed = (target_of(url, Who.BALANCER, Known.LISTED) for url in policy.balancers)
    named = [*(one for one in listed if one is not None), *given]
    targets: list[Target] = [*named, *heard_targets(heard.announced, Who.BALANCER, named)]
    contacts = await reach_all(targets, Calling(agent_id))
    stand = Stand(Who.WORKER, policy.port, policy.mdns, bool(policy.balancers), key)
    return diagnose(stand, here, own, contacts)


async def _look_around() -> tuple[Here, Multicast]:
    interfaces = await asyncio.to_thread(surroundings.interfaces)
    return await asyncio.gather(
        asyncio.to_thread(surroundings.here), asyncio.to_thread(multicast.listen, interfaces)
    )


def _key(policy: NetworkPolicy) -> KeyFile:
    path = str(policy.data_dir / cluster_key.FILE)
    try:
        found = cluster_key.found(policy.data_dir, policy.cluster_key)
    except FileFault as fault:
        return KeyFile(path, fault=str(fault))
    return KeyFile(path, tag="" if found.value is None else cluster_tag(found.value))
