"""`balancer doctor`: why the machines of the room and this balancer do not see each other, and what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import orjson

from balancer import keys, pins
from balancer.core.model import Worker
from worker_agent import multicast, surroundings
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
from worker_agent.findings import (
    Contact,
    Finding,
    Here,
    KeyFile,
    Known,
    Level,
    OwnPort,
    PortState,
    Who,
    as_host,
)
from worker_agent.handshake import cluster_tag

ANSWER_SECONDS = 3.0
MAX_BODY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DoctorPolicy:
    """What the balancer's settings say of the network."""

    host: str
    port: int
    tls: bool
    """Whether clients are spoken to by TLS."""
    mdns: bool
    data_dir: Path
    workers: tuple[Worker, ...] = ()
    """Of the JSON file."""
    cluster_key: str | None = field(default=None, repr=False)
    """As the settings give it; None: it is in the data folder, or nowhere."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What a balancer knows by heart. Holds the key itself."""

    file: KeyFile
    key: str | None = field(repr=False)
    pins: Mapping[str, str]


Room = Callable[[str], Awaitable[Mapping[str, object]]]
"""What the balancer at this URL answers to GET /admin/cluster; nothing where it does not tell."""


async def examine(policy: DoctorPolicy, room: Room, asked: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All that is found, within some ten seconds. `asked`: addresses of agents to look for besides, each a
    URL or without its scheme. Raises `contacts.NoAddress`."""
    given = [asked_target(address, Who.WORKER) for address in asked]
    known = await asyncio.to_thread(_known, policy)
    here = await _look_around()
    own, _ = await own_port(
        policy.host, policy.port, here.interfaces, Calling(""), who=Who.BALANCER, tls=policy.tls
    )
    url = _own_url(policy, own)
    workers = () if url is None else await _running_workers(url)
    outside = {} if url is None else await room(url)
    named = [*_listed(workers), *_configured(policy.workers, workers), *given]
    targets = [*named, *heard_targets(here.multicast.announced, Who.WORKER, named)]
    contacts = await reach_all(targets, Meeting(known.key, known.pins))
    elsewhere = any(one.state == "ready" and not here.is_own(one.peer) for one in contacts)
    tunnels = tuple(_by_tunnel(workers))
    waiting = tuple(_not_in(outside, contacts))
    by_address = elsewhere or bool(tunnels or waiting)
    stand = Stand(Who.BALANCER, policy.port, policy.mdns, by_address, known.file)
    return (*diagnose(stand, here, own, contacts), *tunnels, *waiting)


async def _look_around() -> Here:
    interfaces = await asyncio.to_thread(surroundings.interfaces)
    here, heard = await asyncio.gather(
        asyncio.to_thread(surroundings.here), asyncio.to_thread(multicast.listen, interfaces)
    )
    return replace(here, multicast=heard)


def _known(policy: DoctorPolicy) -> _Known:
    path = policy.data_dir / keys.CLUSTER_KEY
    try:
        certificates = pins.Pins.from_json(
            keys.read_own(policy.data_dir / pins.PINS, pins.MAX_FILE_BYTES)
        ).all()
    except (OSError, ValueError, keys.KeyFault):
        certificates = {}  # the running balancer says so in its log
    try:
        key = policy.cluster_key or keys.read(path)
    except FileNotFoundError:
        return _Known(KeyFile(str(path)), None, certificates)
    except keys.KeyFault as fault:
        return _Known(KeyFile(str(path), fault=str(fault)), None, certificates)
    return _Known(KeyFile(str(path), tag=cluster_tag(key)), key, certificates)


# Who is known ...


def _own_url(policy: DoctorPolicy, own: OwnPort) -> str | None:
    """Where the balancer on this machine answers; None: it does not run."""
    address = next((one for one, state in own.states.items() if state is PortState.OURS), None)
    return (
        None if address is None else f"{'https' if policy.tls else 'http'}://{as_host(address)}:{policy.port}"
    )


async def _running_workers(url: str) -> Sequence[Mapping[str, object]]:
    """As the balancer at this URL lists them."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session,
            session.get(f"{url}/health", ssl=False, allow_redirects=False) as response,
        ):
            told = orjson.loads(await response.content.read(MAX_BODY_BYTES))
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
        return ()
    return _rows(told, "workers") if isinstance(told, dict) else ()


def _rows(told: Mapping[str, object], name: str) -> Sequence[Mapping[str, object]]:
    rows = told.get(name)
    return [one for one in rows if isinstance(one, dict)] if isinstance(rows, list) else ()


def _listed(workers: Sequence[Mapping[str, object]]) -> list[Target]:
    """Those of a running balancer that it connects to."""
    found = []
    for worker in workers:
        target = target_of(str(worker.get("url")), Who.WORKER, Known.LISTED, name=str(worker.get("id")))
        if target is not None:
            state, detail = str(worker.get("state", "")), str(worker.get("detail", ""))
            found.append(replace(target, is_agent=worker.get("type") == "agent", state=state, detail=detail))
    return found


def _configured(workers: Sequence[Worker], listed: Sequence[Mapping[str, object]]) -> list[Target]:
    """Those of the JSON file that a running balancer does not list, or all where there is none."""
    there = {worker.get("url") for worker in listed}
    found = []
    for worker in workers:
        if worker.url not in there and not worker.fallback:
            target = target_of(worker.url, Who.WORKER, Known.LISTED, name=worker.id)
            if target is not None:
                found.append(replace(target, is_agent=worker.type == "agent"))
    return found


def _not_in(told: Mapping[str, object], contacts: Sequence[Contact]) -> Iterator[Finding]:
    """Agents that came by themselves and are not let in, but for those that were reached: of these it is told
    already."""
    reached = {one.name for one in contacts if one.speaks}
    for name in ("pending", "mismatches", "turned_away"):
        for one in _rows(told, name):
            if one.get("id") in reached:
                continue
            area, place = f"worker {one.get('id')}", one.get("url")
            if name == "pending":
                fix = f"type the code that it shows: `{one.get('command')}`"
                yield Finding(area, Level.WARNING, f"at {place}: it waits for approval", fix)
            else:
                # The reason says what to do.
                yield Finding(area, Level.WARNING, f"at {place}: it is not let in: {one.get('reason')}")


def _by_tunnel(workers: Sequence[Mapping[str, object]]) -> Iterator[Finding]:
    """Workers that open the connections themselves: there is nothing to reach, only their state to tell."""
    for worker in workers:
        if str(worker.get("url")).startswith("tunnel:"):
            state, detail = worker.get("state"), worker.get("detail")
            is_well = state == "ready"
            yield Finding(
                f"worker {worker.get('id')}",
                Level.OK if is_well else Level.WARNING,
                f"it opens the connections to this balancer itself, and is {state}"
                + (f": {detail}" if detail else ""),
                "" if is_well else "run `worker-agent doctor --network` there",
            )
