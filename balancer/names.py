"""Workers that a DNS name stands for: looked up again and again, each address a worker of its own.

For clusters where machines come and go under one name (a headless service of Kubernetes, SRV records of a
lab). Agents are asked for their ids and then belong to the room as those that join; of other servers the
room's list has an entry for each address. A name that is gone empties its part of the room; a DNS server that
fails changes nothing for a while.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from balancer.core.model import WorkerId
from balancer.discovery import Entry

log = logging.getLogger(__name__)

MAX_PLACES = 256
"""Addresses, of all names together."""
MAX_TARGETS = 64
"""Of one SRV name."""
SHORTEST_SECONDS, LONGEST_SECONDS = 5.0, 300.0
"""Between two look-ups of a name, whatever its records say."""
EMPTY_SECONDS = 10.0
"""The same while there is nothing under the name."""
FAILED_SECONDS = 5.0
KEPT_SECONDS = 300.0
"""For so long the last good answer holds when DNS fails."""
LOOK_UP_SECONDS = 5.0
INTRODUCE_SECONDS = 10.0
"""Between two looks at who is at the addresses of agents."""
HELLO_AGAIN_SECONDS = 60.0
"""An address may be another agent's by then."""
MAX_HELLOS = 16
"""At once."""


@dataclass(frozen=True, slots=True)
class Source:
    """A name of the configuration, and what is behind it."""

    name: str
    port: int | None
    """None: it is a name of SRV records, which tell of ports."""
    pattern: Entry
    """Of each worker; its id and address are those of the name."""

    @property
    def is_of_agents(self) -> bool:
        return self.pattern.worker.type == "agent"


class Place(NamedTuple):
    """Where something of a name is."""

    address: str
    port: int

    @property
    def authority(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Found(NamedTuple):
    """What a name stands for now."""

    places: frozenset[Place]
    ttl_seconds: float


NOTHING = Found(frozenset(), EMPTY_SECONDS)
"""There is no such name, or nothing under it."""


class NoAnswer(Exception):
    """DNS failed: nothing is known of the name. The sentence says how."""


class NotThere(Exception):
    """No agent that could belong to the room is at an address; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a name. Its past is in `kept_until` alone."""

    places: frozenset[Place] = frozenset()
    due: float = -math.inf
    """When it is to be looked up next."""
    kept_until: float = -math.inf
    """Until when these places hold although DNS fails."""
    trouble: str = ""


def learned(known: Known, answer: Found | NoAnswer, now: float) -> Known:
    """What is known after a look-up. Pure."""
    if isinstance(answer, NoAnswer):
        places = known.places if now < known.kept_until else frozenset()
        return Known(places, now + FAILED_SECONDS, known.kept_until, str(answer))
    ttl = min(max(answer.ttl_seconds, SHORTEST_SECONDS), LONGEST_SECONDS)
    return Known(answer.places, now + ttl, now + KEPT_SECONDS)


def entries_of(source: Source, places: Iterable[Place]) -> tuple[Entry, ...]:
    """The workers at these places, for a source that is not of agents. Pure."""
    entries = []
    for place in sorted(places):
        shown = place.address if source.port is not None else place.authority
        worker = dataclasses.replace(
            source.pattern.worker,
            id=WorkerId(f"{source.name}/{shown}"),
            url=f"http://{place.authority}",
        )
        entries.append(Entry(worker, source.pattern.headers))
    return tuple(entries)


def merged(listed: Sequence[Entry], named: Sequence[Entry]) -> tuple[Entry, ...]:
    """The room's list: what it says itself, and of what names stand for all that it does not say. Pure."""
    ids = {entry.worker.id for entry in listed}
    urls = {entry.worker.url for entry in listed}
    more: dict[WorkerId, Entry] = {}
    for entry in named:
        if entry.worker.id not in ids and entry.worker.url not in urls:
            more.setdefault(entry.worker.id, entry)
            urls.add(entry.worker.url)
    return (*listed, *more.values())


def usable(address: str) -> bool:
    """Whether a worker can be there. Pure."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (ip.is_unspecified or ip.is_multicast or (ip.version == 6 and ip.is_link_local))


# Asking ...


class Lookup(Protocol):
    """Asks DNS what a name stands for."""

    async def __call__(self, name: str, port: int | None) -> Found:
        """`port`: None for a name of SRV records. Raises `NoAnswer`."""
        ...


class Dns:
    """By the servers of this machine's own configuration, which is read anew where that fails."""

    def __init__(self, resolver: dns.asyncresolver.Resolver | None = None) -> None:
        self._given = resolver
        self._resolver = resolver

    async def __call__(self, name: str, port: int | None) -> Found:
        try:
            if self._resolver is None:
                self._resolver = await asyncio.to_thread(dns.asyncresolver.Resolver)
            async with asyncio.timeout(LOOK_UP_SECONDS):
                if port is not None:
                    return await self._addresses(self._resolver, name, port, search=True)
                return await self._services(self._resolver, name)
        except (dns.exception.DNSException, OSError) as error:  # a TimeoutError too
            self._resolver = self._given
            raise NoAnswer(_why(error)) from None

    async def _addresses(
        self, resolver: dns.asyncresolver.Resolver, name: str, port: int, *, search: bool
    ) -> Found:
        places: set[Place] = set()
        ttl = math.inf
        for kind in ("A", "AAAA"):
            try:
                answer = await resolver.resolve(name, kind, raise_on_no_answer=False, search=search)
            except dns.resolver.NXDOMAIN:
                return NOTHING
            if answer.rrset is not None:
                ttl = min(ttl, answer.rrset.ttl)
                places |= {Place(one.address, port) for one in answer.rrset if usable(one.address)}
        return Found(frozenset(places), ttl) if places else NOTHING

    async def _services(self, resolver: dns.asyncresolver.Resolver, name: str) -> Found:
        try:
            answer = await resolver.resolve(name, "SRV", raise_on_no_answer=False, search=True)
        except dns.resolver.NXDOMAIN:
            return NOTHING
        if answer.rrset is None:
            return NOTHING
        # A target of "." says that the service is not offered here (RFC 2782).
        targets = [one for one in answer.rrset if len(one.target) > 1][:MAX_TARGETS]
        found = await asyncio.gather(
            *(
                self._addresses(resolver, str(one.target), one.port, search=False)
                for one in targets
                if one.port
            )
        )
        places = frozenset().union(*(one.places for one in found))
        ttls = [float(answer.rrset.ttl), *(one.ttl_seconds for one in found)]
        return Found(places, min(ttls)) if places else NOTHING


def _why(error: Exception) -> str:
    match error:
        case TimeoutError() | dns.exception.Timeout():
            return "no DNS server has answered"
        case dns.resolver.NoNameservers():
            return "the DNS servers say that they failed"
        case dns.resolver.NoResolverConfiguration():
            return "this machine names no DNS server"
    return type(error).__name__


# Performing ...


@dataclass(slots=True)
class _Name:
    source: Source
    known: Known = field(default_factory=Known)


@dataclass(slots=True)
class _Introduced:
    agent_id: str
    again: float


class Names:
    """Keeps what the names of the configuration stand for.

    `listed` is given the workers of names that are not of agents, whenever they change. `hello(url)` asks an
    agent for its id; `joined(id, address, port)` is told of each agent about every ten seconds. Both may
    raise `NotThere`.
    """

    def __init__(
        self,
        *,
        look_up: Lookup,
        listed: Callable[[Sequence[Entry]], None],
        hello: Callable[[str], Awaitable[str]],
        joined: Callable[[str, str, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._look_up = look_up
        self._listed = listed
        self._hello = hello
        self._joined = joined
        self._clock = clock
        self._names: dict[tuple[str, int | None, str], _Name] = {}
        self._introduced: dict[Place, _Introduced] = {}
        self._entries: tuple[Entry, ...] = ()
        self._changed = asyncio.Event()
        self._agents_changed = asyncio.Event()

    def put(self, sources: Sequence[Source]) -> None:
        """Replaces the names; of those that stay, what is known is kept."""
        before, self._names = self._names, {}
        for source in sources:
            key = source.name, source.port, source.pattern.worker.type
            known = before[key].known if key in before else Known()
            self._names[key] = _Name(source, known)
        self._tell()
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_looking(), name="DNS")
            tasks.create_task(self._keep_introducing(), name="DNS: agents")

    async def _keep_looking(self) -> None:
        while True:
            self._changed.clear()
            now = self._clock()
            due = [name for name in self._names.values() if name.known.due <= now]
            await asyncio.gather(*(self._look(name) for name in due))
            if due:
                self._tell()
            next_due = min((name.known.due for name in self._names.values()), default=math.inf)
            await _happens(self._changed, next_due - self._clock())

    async def _look(self, name: _Name) -> None:
        source = name.source
        try:
            answer: Found | NoAnswer = await self._look_up(source.name, source.port)
        except NoAnswer as error:
            answer = error
        before, name.known = name.known, learned(name.known, answer, self._clock())
        if name.known.trouble and not before.trouble:
            log.warning(
                "the name %s cannot be looked up: %s; what it stood for holds for %d minutes",
                *(source.name, name.known.trouble, KEPT_SECONDS / 60),
            )
        elif name.known.places != before.places:
            log.info("the name %s stands for %d addresses", source.name, len(name.known.places))

    def _tell(self) -> None:
        room = MAX_PLACES
        entries: list[Entry] = []
        for name in self._names.values():
            places = sorted(name.known.places)[:room]
            room -= len(places)
            if not name.source.is_of_agents:
                entries += entries_of(name.source, places)
        self._agents_changed.set()
        if (told := tuple(entries)) != self._entries:
            self._entries = told
            self._listed(told)

    # Agents ...

    async def _keep_introducing(self) -> None:
        few = asyncio.Semaphore(MAX_HELLOS)
        while True:
            self._agents_changed.clear()
            places = self._places_of_agents()
            for gone in self._introduced.keys() - places:
                del self._introduced[gone]
            await asyncio.gather(*(self._introduce(place, few) for place in places))
            await _happens(self._agents_changed, INTRODUCE_SECONDS if places else math.inf)

    def _places_of_agents(self) -> set[Place]:
        agents = (name.known.places for name in self._names.values() if name.source.is_of_agents)
        return set(sorted(frozenset().union(*agents))[:MAX_PLACES])

    async def _introduce(self, place: Place, few: asyncio.Semaphore) -> None:
        known = self._introduced.get(place)
        try:
            if known is None or known.again <= self._clock():
                async with few:
                    agent_id = await self._hello(f"https://{place.authority}")
                known = self._introduced[place] = _Introduced(agent_id, self._clock() + HELLO_AGAIN_SECONDS)
            self._joined(known.agent_id, *place)
        except NotThere as error:
            log.debug("no agent is known at %s: %s", place.authority, error)


async def _happens(event: asyncio.Event, seconds: float) -> None:
    """Returns when it does, or after so long."""
    try:
        async with asyncio.timeout(None if math.isinf(seconds) else max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
