"""Who belongs to the room: listed in the config, joined by address, or found by mDNS.

`Roster` merges the three sources into one set of workers and sees to it that each is watched. It is told
the time and does no I/O. `Browser` listens for mDNS and passes on what agents announce. Both that and a join
are hints: they bring candidates, of whom nobody is told before they were met (`cluster`), and the report
stream alone decides who is alive.
"""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from balancer.core.model import Event, Gone, Lost, Reported, Seen, Worker, WorkerId
from balancer.upstream import TUNNEL_SCHEME, tunnel_url
from worker_agent import wire
from worker_agent.reachability import (
    MAX_ADDRESSES,
    Interface,
    by_reachability,
    own_interfaces,
    parsed_address,
)
from worker_agent.wire import Announced

log = logging.getLogger(__name__)

MAX_GUESTS = 256  # workers that the config does not list
MAX_BANNED = 256  # workers that somebody has removed
MAX_REFUSALS_TOLD = 64  # a warning each, in all; anybody may announce anything
FORGET_AFTER_SECONDS = 600.0
EVICT_AFTER_SECONDS = 30.0
"""When the room is full, a guest that has never reported for so long makes way for another."""
TRY_NEXT_AFTER_SECONDS = 4.0
"""A lost worker's next address is tried, or the one that mDNS announces for an agent that had joined; a try
on a silent address takes `wire.LOST_AFTER_SECONDS`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A worker of the config, and what to send along with every request to it."""

    worker: Worker
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class NotAdmitted(Exception):
    """A join is refused; the sentence says why and what to do, fit for the answer to the agent."""


class TooManyBanned(Exception):
    """As many workers are kept out as can be; a sentence for people."""


class Watching(Protocol):
    """The part of `watch.Watches` that the roster needs."""

    def follow(self, worker: Worker, headers: Mapping[str, str] = ..., *, is_guest: bool = ...) -> None: ...
    def wake(self, worker_id: WorkerId) -> None: ...
    def forget(self, worker_id: WorkerId) -> None: ...


class _Source(enum.IntEnum):
    """How a worker came to be known; a higher one overrides a lower one."""

    FOUND = 1
    JOINED = 2
    STATIC = 3


_SOURCE_WORDS = {_Source.FOUND: "mdns", _Source.JOINED: "join", _Source.STATIC: "config"}


@dataclass(slots=True)
class _Member:
    worker: Worker
    headers: Mapping[str, str]
    source: _Source
    lost_since: float | None
    """None: it was heard of last. A new member counts as lost until then."""
    tried_at: float
    """When its present address was taken, if nothing was heard from there since."""
    urls: tuple[str, ...]
    """Where it may be reached, best first; the worker has one of them."""
    proven: bool = False
    """It has reported at least once."""
    told: Worker | None = None
    """As the rest of the program knows it; None: it does not, for it was not met yet."""


class Roster:
    """The members of the room. All its methods return at once; call them from the event loop only.

    `tell` receives `Seen` and `Gone`: of a guest, who joined or was found, only once it was `met`. Give
    `notice` every event of the watches, and call `tick` about once a second. `tags` gives those of our
    cluster: who announces another one belongs to somebody else.
    """

    def __init__(
        self,
        *,
        tell: Callable[[Event], None],
        watches: Watching,
        clock: Callable[[], float],
        tags: Callable[[], frozenset[str]] = frozenset,
        interfaces: Callable[[], Sequence[Interface]] | None = None,
    ) -> None:
        self._tell = tell
        self._watches = watches
        self._clock = clock
        self._tags = tags
        self._interfaces = interfaces or own_interfaces
        self._members: dict[WorkerId, _Member] = {}
        self._listed: dict[WorkerId, Entry] = {}
        """What the config has, removed by hand or not."""
        self._banned: set[WorkerId] = set()
        self._refusals_told: set[tuple[str, frozenset[str]]] = set()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The room as it is now."""
        return tuple(member.told for member in self._members.values() if member.told is not None)

    @property
    def sources(self) -> Mapping[WorkerId, str]:
        """How each came to be known: `config`, `join` or `mdns`."""
        return {
            worker_id: _SOURCE_WORDS[member.source]
            for worker_id, member in self._members.items()
            if member.told is not None
        }

    @property
    def banned(self) -> tuple[WorkerId, ...]:
        """Those that were removed and stay out, sorted."""
        return tuple(sorted(self._banned))

    # Three ways in ...

    def static(self, entries: Iterable[Entry], *, pardons: bool = True) -> None:
        """Replaces what the config lists; workers that are listed as before are left in peace. `pardons`:
        what it lists is let in, even if it was removed before."""
        self._listed = {entry.worker.id: entry for entry in entries}
        if pardons:
            self._banned -= self._listed.keys()
        self._insist_on_listed()

    def _insist_on_listed(self) -> None:
        """Whoever the config lists is in the room, as it is listed, unless it was removed by hand."""
        listed = {
            worker_id: entry for worker_id, entry in self._listed.items() if worker_id not in self._banned
        }
        # Who comes before who goes: a room that is empty for a moment turns away those who wait.
        for worker_id, entry in listed.items():
            known = self._members.get(worker_id)
            if known is not None and known.worker == entry.worker and known.headers == entry.headers:
                known.source, known.urls = _Source.STATIC, (entry.worker.url,)
            else:
                self._put(entry.worker, entry.headers, _Source.STATIC, (entry.worker.url,))
        places = {_place(entry.worker.url) for entry in listed.values()}
        for worker_id, member in list(self._members.items()):
            if worker_id in listed:
                continue
            if member.source is _Source.STATIC or _place(member.worker.url) in places:
                self._remove(
                    worker_id,
                    "it is no longer listed" if member.source is _Source.STATIC else "the config has it",
                )

    def joined(self, join: wire.Join, address: str) -> None:
        """An agent asked from `address` to be watched.

        Raises `NotAdmitted` when another agent of that id is alive elsewhere, or the room is full.
        """
        url = _url(address, join.port)
        if url is None:
            raise NotAdmitted(f"{address[:64]!r} is not an address that a worker can have")
        self._welcome(WorkerId(join.id), (url,), _Source.JOINED)

    def dialled(self, agent_id: str) -> None:
        """An agent has opened connections to us, and waits on them.

        Raises `NotAdmitted` when the room is full, or it was removed from it.
        """
        url = tunnel_url(agent_id)
        known = self._members.get(WorkerId(agent_id))
        if known is not None and known.lost_since is None:
            known.urls = _joined((*known.urls, url))  # a second way, should the first one end
        else:
            self._welcome(WorkerId(agent_id), (url,), _Source.JOINED)
            self._watches.wake(WorkerId(agent_id))

    def found(self, announced: Announced, addresses: Sequence[str], port: int) -> None:
        """mDNS announced an agent; ignored when it is known better already, or belongs to another cluster.

        One that cannot be let in is warned of once: nobody answers an announcement, so the log is where to
        learn of two agents with one id.
        """
        agent_id = announced.id
        if not 1 <= port <= 65535:
            return
        if announced.tag and announced.tag not in self._tags():
            log.debug("agent %s belongs to another cluster", agent_id)
            return
        usable = by_reachability(addresses, self._interfaces())
        urls = tuple(url for address in usable[:MAX_ADDRESSES] if (url := _url(address, port)) is not None)
        if not urls:
            log.info("agent %s announces no address that can be reached from here", agent_id)
            return
        try:
            self._welcome(WorkerId(agent_id), urls, _Source.FOUND)
        except NotAdmitted as refused:
            refusal = agent_id, frozenset(urls)
            if refusal not in self._refusals_told and len(self._refusals_told) < MAX_REFUSALS_TOLD:
                self._refusals_told.add(refusal)
                log.warning("agent %s, announced at %s, stays out: %s", agent_id, urls[0], refused)

    # ... and one way out

    def remove(self, worker_id: WorkerId) -> bool:
        """Takes a worker out of the room and keeps it out, however it announces itself: until `admit`, and
        one that the config lists until `static`. What runs on it may finish. False: there is none of that id.

        Raises `TooManyBanned`.
        """
        if worker_id not in self._members:
            return False
        if len(self._banned) >= MAX_BANNED:
            raise TooManyBanned(f"{MAX_BANNED} workers were removed already, and are kept out")
        self._banned.add(worker_id)
        self._remove(worker_id, "it was removed by hand")
        return True

    def admit(self, worker_id: WorkerId) -> bool:
        """Takes a removal back: what the config lists is in the room again at once, an agent when it next
        announces itself. False: it was not removed."""
        if worker_id not in self._banned:
            return False
        self._banned.discard(worker_id)
        if worker_id in self._listed:
            self._insist_on_listed()
        return True

    # What becomes of them ...

    def notice(self, event: Event) -> None:
        """Takes note of who was heard of; gives back nothing, and cares for `Reported` and `Lost` only."""
        match event:
            case Reported(worker_id):
                if (member := self._members.get(worker_id)) is not None:
                    member.lost_since = None
                    member.proven = True
                    member.tried_at = -math.inf  # with success
            case Lost(worker_id):
                member = self._members.get(worker_id)
                if member is not None and member.lost_since is None:
                    member.lost_since = self._clock()

    def met(self, worker: Worker) -> None:
        """There is a session with this agent, where it is now."""
        member = self._members.get(worker.id)
        if member is None or member.source is _Source.STATIC:
            return
        if member.worker.url != worker.url:
            if member.lost_since is None:
                return
            member.urls = _joined((worker.url, *member.urls))
            self._move(member, worker.url)
        if member.told != member.worker:
            member.told = member.worker
            self._tell(Seen(member.worker))
        self._leave_place_to(member)

    def _leave_place_to(self, member: _Member) -> None:
        """Of whoever was there before and is lost."""
        place = _place(member.worker.url)
        for worker_id, other in list(self._members.items()):
            if other is member or other.source is _Source.STATIC or other.lost_since is None:
                continue
            if _place(other.worker.url) != place:
                continue
            elsewhere = tuple(url for url in other.urls if url not in member.urls)
            if not elsewhere:
                self._remove(worker_id, f'"{member.worker.id}" is there now')
            else:
                other.urls = elsewhere

    def tick(self) -> None:
        """Tries the next address of lost agents that have several, and forgets guests lost for long."""
        now = self._clock()
        for worker_id, member in list(self._members.items()):
            if member.lost_since is None or member.source is _Source.STATIC:
                continue
            if now - member.lost_since >= FORGET_AFTER_SECONDS:
                self._remove(worker_id, f"lost for {FORGET_AFTER_SECONDS / 60:g} minutes")
            elif (
                any(url != member.worker.url for url in member.urls)
                and now - max(member.tried_at, member.lost_since) >= TRY_NEXT_AFTER_SECONDS
            ):
                self._try_next(member)

    def _try_next(self, member: _Member) -> None:
        urls, here = member.urls, member.worker.url
        self._move(member, urls[(urls.index(here) + 1) % len(urls)] if here in urls else urls[0])

    def _move(self, member: _Member, url: str) -> None:
        """It is looked for there from now on; who asks it is told of that when it was met there."""
        log.debug("agent %s is tried at %s", member.worker.id, url)
        member.worker = Worker(id=member.worker.id, type="agent", url=url)
        member.tried_at = self._clock()
        self._watches.follow(member.worker, member.headers, is_guest=True)

    def _welcome(self, worker_id: WorkerId, urls: tuple[str, ...], source: _Source) -> None:
        """An agent says that it is there, at one of these. Raises `NotAdmitted`."""
        if worker_id in self._banned:
            raise NotAdmitted(
                f'"{worker_id}" was removed from this room by hand; to let it in again: '
                f"POST /admin/workers/{worker_id}/admit, or restart the balancer"
            )
        known = self._members.get(worker_id)
        if known is not None and known.source > source and not self._is_given_up(known):
            return
        if known is not None and known.worker.url in urls:
            # Nothing new: an agent keeps its connection, whatever else was announced for it.
            known.source, known.urls = source, urls
            return
        if known is not None and known.lost_since is None:
            if known.worker.url.startswith(TUNNEL_SCHEME):
                known.urls = _joined((*known.urls, *urls))  # for when nobody dials any more
                return
            if not set(urls).isdisjoint(known.urls):
                return  # heard by another of its network cards
            # Whoever is alive under an id keeps it: an announcement is no proof of being the same agent.
            raise NotAdmitted(
                f'an agent called "{worker_id}" is alive at {known.worker.url}: give this one another id'
                " with --id"
            )
        places = set(map(_place, urls))
        rivals = [m for m in self._members.values() if _place(m.worker.url) in places and m is not known]
        if any(rival.source is _Source.STATIC for rival in rivals):
            return  # the same server, under the name that the config gives it
        alive = {m.worker.url: m for m in rivals if m.lost_since is None and m.source >= source}
        # Addresses of inner bridges are the same on many machines: one that is taken need not mean all.
        free = tuple(url for url in urls if url not in alive)
        if not free:
            first = alive[urls[0]].worker
            raise NotAdmitted(f'the agent "{first.id}" is alive at {first.url}: another cannot be there')
        for rival in rivals:
            # Who was met keeps its place until somebody else is met there: an announcement ends nothing.
            if rival.worker.url == free[0] and rival.told is None:
                self._remove(rival.worker.id, f'"{worker_id}" is there now')
        if known is None:
            self._make_way()
        elif known.source >= source and self._clock() - known.tried_at < TRY_NEXT_AFTER_SECONDS:
            # Whoever announces it anew each moment would have no address tried to its end.
            known.source, known.urls = source, _joined((*free, *known.urls))
            return
        self._put(Worker(id=worker_id, type="agent", url=free[0]), {}, source, free)

    def _is_given_up(self, member: _Member) -> bool:
        """Nobody is heard where it is, and there was time to be: an announcement may know better."""
        if member.source is _Source.STATIC or member.lost_since is None:
            return False
        return self._clock() - max(member.tried_at, member.lost_since) >= TRY_NEXT_AFTER_SECONDS

    def _make_way(self) -> None:
        guests = [member for member in self._members.values() if member.source is not _Source.STATIC]
        if len(guests) < MAX_GUESTS:
            return
        longest = min(
            (guest for guest in guests if guest.lost_since is not None and not guest.proven),
            key=lambda guest: guest.lost_since or 0.0,
            default=None,
        )
        if longest is None or self._clock() - (longest.lost_since or 0.0) < EVICT_AFTER_SECONDS:
            raise NotAdmitted(f"the room is full: {MAX_GUESTS} workers are known beside those in the config")
        self._remove(longest.worker.id, "it has never reported, and the room is full")

    def _put(
        self, worker: Worker, headers: Mapping[str, str], source: _Source, urls: tuple[str, ...]
    ) -> None:
        now = self._clock()
        known = self._members.get(worker.id)
        if known is None or known.source is not source:
            level = logging.INFO if source is _Source.STATIC else logging.DEBUG
            log.log(level, "worker %s is known by %s, at %s", worker.id, _SOURCE_WORDS[source], worker.url)
        # A guest that moves stays lost since when it was: only a report ends that.
        lost_since = now if known is None or known.lost_since is None else known.lost_since
        proven = known is not None and known.proven
        told = None if known is None else known.told
        is_guest = source is not _Source.STATIC
        member = _Member(worker, headers, source, lost_since, now, urls, proven, told)
        self._members[worker.id] = member
        if not is_guest:
            member.told = worker
            self._tell(Seen(worker))
        self._watches.follow(worker, headers, is_guest=is_guest)

    def _remove(self, worker_id: WorkerId, reason: str) -> None:
        member = self._members.pop(worker_id)
        self._watches.forget(worker_id)
        if member.told is not None:
            log.info("worker %s does not belong to the room any more: %s", worker_id, reason)
            self._tell(Gone(worker_id))


def _place(url: str) -> str:
    """Host and port: whoever is there is one, with TLS or without."""
    return url.partition("://")[2].partition("/")[0]


def _joined(urls: Iterable[str]) -> tuple[str, ...]:
    """The first of them, each once."""
    return tuple(dict.fromkeys(urls))[:MAX_ADDRESSES]


def _url(address: str, port: int) -> str | None:
    match parsed_address(address):
        case None:
            return None
        case ipaddress.IPv6Address() as found:
            return f"https://[{found}]:{port}"
        case found:
            return f"https://{found}:{port}"


# mDNS ...

MAX_NAMES = 512  # service names remembered; twice the room, so that strangers leave space for it
RESOLVERS = 8  # names looked up at once; an unanswered one takes RESOLVE_SECONDS
RESOLVE_SECONDS = 3.0
REFRESH_SECONDS = 60.0
"""All announced names are looked at again: mDNS tells of a change once, and that may have been missed."""

OPEN_ROADS: Final = (
    "agents are not found by themselves; start each with `worker-agent join` and what `balancer cluster "
    'invite` shows, or list it under "workers" in the JSON file'
)


class Browser:
    """Listens for the announcements of agents, and gives each to `found(announced, addresses, port)`.

    Nothing follows from a goodbye: an agent that still reports is in the room, one that does not is lost.
    """

    def __init__(
        self,
        *,
        found: Callable[[Announced, Sequence[str], int], None],
        interfaces: InterfaceChoice | list[str] = InterfaceChoice.All,
        refresh_seconds: float = REFRESH_SECONDS,
    ) -> None:
        self._found = found
        self._interfaces = interfaces
        self._refresh_seconds = refresh_seconds
        self._names: set[str] = set()
        self._due: asyncio.Queue[str] = asyncio.Queue(MAX_NAMES)
        self._waiting: set[str] = set()
        self._misfits: set[str] = set()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> bool:
        """False when this machine cannot listen; that is logged with what to do instead, and not fatal."""
        try:
            self._zeroconf = self._opened()
            await self._zeroconf.zeroconf.async_wait_for_start()
        except (OSError, ZeroconfError, RuntimeError, TimeoutError) as error:
            # RuntimeError is what zeroconf raises where no interface is up.
            # As text: an exception kept in a log record would keep the half-opened sockets too.
            log.warning("cannot listen for mDNS (%s): %s", str(error), OPEN_ROADS)
            await self.aclose()
            return False
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, wire.SERVICE_TYPE, handlers=[self._changed]
        )
        # Kept, and awaited by aclose.
        self._task = asyncio.create_task(self._run(self._zeroconf.zeroconf), name="mDNS")  # noqa: TID251
        return True

    async def aclose(self) -> None:
        """Stops listening; safe to call twice, or when start has failed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._browser is not None:
            await self._browser.async_cancel()
            self._browser = None
        if self._zeroconf is not None:
            await self._zeroconf.async_close()
            self._zeroconf = None

    def _opened(self) -> AsyncZeroconf:
        try:
            return AsyncZeroconf(interfaces=self._interfaces, ip_version=IPVersion.All)
        except OSError:  # a machine without IPv6
            return AsyncZeroconf(interfaces=self._interfaces, ip_version=IPVersion.V4Only)

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._names.discard(name)
        elif name in self._names or len(self._names) < MAX_NAMES:
            self._names.add(name)
            self._want(name)

    def _want(self, name: str) -> None:
        if name not in self._waiting and not self._due.full():
            self._waiting.add(name)
            self._due.put_nowait(name)

    async def _run(self, zeroconf: Zeroconf) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(RESOLVERS):
                tasks.create_task(self._resolve_due(zeroconf))
            while True:
                await asyncio.sleep(self._refresh_seconds)
                for name in self._names:
                    self._want(name)

    async def _resolve_due(self, zeroconf: Zeroconf) -> None:
        while True:
            name = await self._due.get()
            self._waiting.discard(name)
            try:
                await self._resolve(zeroconf, name)
            except wire.WireError as error:
                if self._is_new_misfit(name):
                    log.warning("the mDNS announcement %r is ignored: %s", name[:128], error)
            except ZeroconfError:  # whose words quote the name
                if self._is_new_misfit(name):
                    log.warning("the mDNS announcement %r is ignored: no service is called so", name[:128])
            except Exception:
                # Hostile packets must not end the search; zeroconf does not say what it may raise.
                if self._is_new_misfit(name):
                    log.exception("the mDNS announcement %r could not be read", name[:128])

    def _is_new_misfit(self, name: str) -> bool:
        """Each is told of once, and no more of them than could be of use."""
        if name in self._misfits or len(self._misfits) >= MAX_NAMES:
            return False
        self._misfits.add(name)
        return True

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        """Raises `wire.WireError` for an announcement that is not ours."""
        info = AsyncServiceInfo(wire.SERVICE_TYPE, name)
        complete = await info.async_request(zeroconf, RESOLVE_SECONDS * 1000)
        if complete and name in self._names and info.port is not None:
            self._found(wire.parse_txt(info.properties), info.parsed_scoped_addresses(), info.port)
