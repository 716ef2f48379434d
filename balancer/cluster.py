"""The balancer's side of the cluster plane: agents are met before anything else is said to them.

To meet one is the handshake of `worker_agent.handshake`, over TLS to the certificate that it had when it was
first met. What comes of it is a session, without which nobody reaches an agent: reports, requests and orders
all take their `Way` from here. Keys, codes, proofs and sessions are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from balancer import keys
from balancer.core.model import Worker, WorkerId
from balancer.keys import ClusterKeys, KeyFault
from balancer.meeting import (
    NO_TLS,
    AnotherCertificate,
    Greeting,
    IsPending,
    KeyRefused,
    NotMet,
    greeted,
    is_session_unknown,
    proof_of,
    session_of,
)
from balancer.pins import Memory, Pins
from balancer.upstream import (
    ANY_CERTIFICATE,
    Address,
    Answer,
    Lines,
    OtherCertificate,
    Upstream,
    UpstreamError,
    Way,
)
from balancer.worker_types import said_in
from worker_agent import wire
from worker_agent.handshake import Invitation, cluster_tag, key_bytes, key_of_code
from worker_agent.wire import ProvenBy

log = logging.getLogger(__name__)

MAX_PENDING = 64
MAX_STRANGERS = 64
FRESH_SECONDS = 90.0
"""Who waits to be let in, and who is not, is looked at again at least so often while it is there."""
MAX_ANSWER_BYTES = 64 * 1024
MEETING_SECONDS = 10.0
"""For each of the two halves; who awaits a meeting has limits of its own."""
KEY_SECONDS = 10.0
AT_ONCE = 16
"""Agents that are given a new key at the same time."""
WARNINGS_AT_ONCE, WINDOW_SECONDS = 20, 60.0
"""So many warnings in so long tell of those who are not let in; the page and /admin/cluster show the rest."""


class NotApproved(Exception):
    """An agent was not let in; a sentence for people, with what to do."""


class NoSuchPending(NotApproved):
    """No agent of that id waits."""


@dataclass(frozen=True, slots=True)
class Session:
    """An agent that was met."""

    worker_id: WorkerId
    url: str
    way: Way = field(repr=False)
    key: str = field(repr=False)
    """The cluster's, that the agent holds."""

    @property
    def fingerprint(self) -> str:
        """Of its certificate; empty without TLS."""
        return self.way.address.pin or ""


@dataclass(frozen=True, slots=True)
class Pending:
    """An agent without a key."""

    id: str
    url: str
    fingerprint: str
    since: float
    """On the loop's clock."""
    seen: float


@dataclass(frozen=True, slots=True)
class Stranger:
    """Somebody who was not let in."""

    id: str
    url: str
    reason: str
    is_other_certificate: bool
    since: float
    seen: float


@dataclass(slots=True)
class _Meeting:
    """One that is under way."""

    task: asyncio.Future[Way]
    awaited: int = 0
    """By so many; it ends with the last of them."""


class Cluster:
    """Who was met. Its methods are for the event loop."""

    def __init__(
        self,
        upstream: Upstream,
        memory: Memory,
        own_keys: ClusterKeys,
        *,
        balancer_id: str,
        pins: Pins,
        clock: Callable[[], float],
        on_met: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        """`on_met` is told of each agent when there is a session with it, and of the same one again."""
        self.id = balancer_id
        self._upstream = upstream
        self._memory = memory
        self._keys = own_keys
        self._pins = pins
        self._clock = clock
        self._on_met = on_met
        self._sessions: dict[WorkerId, Session] = {}
        self._pending: dict[tuple[str, str], Pending] = {}
        self._strangers: dict[tuple[str, str], Stranger] = {}
        self._meetings: dict[tuple[str, str], _Meeting] = {}
        self._window, self._warned = clock(), 0
        self._writing = asyncio.Lock()
        self._approving = asyncio.Lock()
        self._rotating = asyncio.Lock()

    # What there is

    @property
    def key(self) -> str:
        """The cluster's."""
        return self._keys.current

    @property
    def tag(self) -> str:
        return cluster_tag(self._keys.current)

    @property
    def tags(self) -> frozenset[str]:
        """By which agents of this cluster announce themselves: who was away may hold a former key."""
        return frozenset(map(cluster_tag, (self._keys.current, *self._keys.former)))

    @property
    def pending(self) -> tuple[Pending, ...]:
        """Who waits to be let in, the longest first."""
        return tuple(one for one in self._pending.values() if self._is_fresh(one.seen))

    @property
    def strangers(self) -> tuple[Stranger, ...]:
        """Who was not let in lately, and why."""
        return tuple(one for one in self._strangers.values() if self._is_fresh(one.seen))

    @property
    def remembered(self) -> dict[str, str]:
        """By the agents' ids the fingerprints of their certificates."""
        return self._pins.all()

    @property
    def sessions(self) -> tuple[Session, ...]:
        return tuple(self._sessions.values())

    def invitation(self, balancers: Sequence[str]) -> str:
        """What a machine needs to join; it holds the key. `balancers`: where this one is, `host:port`."""
        return str(Invitation(self._keys.current, tuple(balancers)))

    def way(self, worker: Worker) -> Way | None:
        """None: it was not met where it is now."""
        session = self._sessions.get(worker.id)
        return session.way if session is not None and session.url == worker.url else None

    def gone(self, worker_id: WorkerId) -> None:
        """It does not belong to the room any more."""
        self._sessions.pop(worker_id, None)

    async def aclose(self) -> None:
        """Ends the meetings that are under way."""
        tasks = [meeting.task for meeting in self._meetings.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Meeting ...

    async def hello(self, url: str) -> str:
        """Which agent says that it is there; nothing is proved by that. Raises `NotMet`."""
        greeting = await self._hello(Address.of(url), None)
        return greeting.transcript.agent

    async def met(self, worker: Worker, refused: Way | None = None) -> Way:
        """The session that there is with this agent, else a new one, for all who want it now the same.

        `refused`: the agent does not know this one any more. Raises as `meet`.
        """
        way = self.way(worker)
        if way is not None and way is not refused:
            self._on_met(worker)
            return way
        if way is not None:
            del self._sessions[worker.id]
        place = worker.id, worker.url
        meeting = self._meetings.get(place)
        if meeting is None:
            meeting = self._meetings[place] = _Meeting(asyncio.ensure_future(self.meet(worker)))
        meeting.awaited += 1
        try:
            return await asyncio.shield(meeting.task)
        finally:
            meeting.awaited -= 1
            if not meeting.awaited:
                del self._meetings[place]
                meeting.task.cancel()

    async def meet(self, worker: Worker) -> Way:
        """A session with this agent, a new one if there is one. Raises `NotMet` and `IsPending`."""
        try:
            session = await self._met(worker)
            if session.key != self._keys.current:  # it changed meanwhile
                session = await self._with_current_key(session)
            is_first = self._is_bound(worker, session)
        except IsPending:
            raise
        except OtherCertificate as error:  # another one than a moment ago
            raise NotMet(str(error)) from error
        except NotMet as error:
            if error.certain:
                self._turn_away(worker, error)
            raise
        # All of it in one step: whoever awaits this may be gone at the next one.
        self._sessions[worker.id] = session
        self._pending.pop((worker.id, worker.url), None)
        self._strangers.pop((worker.id, worker.url), None)
        self._on_met(worker)
        if is_first:
            log.info("agent %s at %s was met for the first time", worker.id, worker.url)
            await self._keep_pins()
        return session.way

    async def _met(self, worker: Worker) -> Session:
        address = Address.of(worker.url)
        pin = self._pins.of(worker.id) if address.tls else None
        try:
            greeting = await self._hello(address, pin)
        except OtherCertificate:
            raise AnotherCertificate(worker.id) from None
        if greeting.transcript.agent != worker.id:
            raise NotMet(
                f'the agent there calls itself "{greeting.transcript.agent}", not "{worker.id}"; '
                "where it is listed in the config, give it that id",
                certain=True,
            )
        if greeting.by is ProvenBy.CODE:
            self._waits(worker, greeting.transcript.fingerprint)
            raise IsPending(worker.id)
        current = self._keys.current
        try:
            return await self._proved(worker, address, greeting, current)
        except KeyRefused as refused:
            if pin is None:  # a former key may be known to those who were put out by the new one
                raise
            return await self._by_former_key(worker, address, pin, refused)

    async def _by_former_key(
        self, worker: Worker, address: Address, pin: str, refused: KeyRefused
    ) -> Session:
        """Of an agent that was away when the key changed: it is given the current one."""
        for former in self._keys.former:
            greeting = await self._hello(address, pin)
            try:
                session = await self._proved(worker, address, greeting, former)
            except KeyRefused:
                continue
            return await self._with_current_key(session)
        raise refused

    async def _with_current_key(self, session: Session) -> Session:
        current = self._keys.current
        await self._give_key(session.way, current)
        log.info("agent %s was given the cluster key that holds now", session.worker_id)
        return Session(session.worker_id, session.url, session.way, current)

    async def _hello(self, address: Address, pin: str | None) -> Greeting:
        hello = wire.Hello(balancer=self.id, nonce=secrets.token_urlsafe(24))
        if address.tls:
            address = address._replace(pin=pin or ANY_CERTIFICATE)
        answer = await self._post(address, wire.HELLO_PATH, hello.model_dump_json().encode())
        return greeted(hello, answer)

    async def _proved(self, worker: Worker, address: Address, greeting: Greeting, key: str) -> Session:
        way = await self._prove(address, greeting, key_bytes(key))
        return Session(worker.id, worker.url, way, key)

    async def _prove(self, address: Address, greeting: Greeting, key: bytes) -> Way:
        """The second half, to the very certificate that the first half was said to."""
        transcript = greeting.transcript
        if address.tls:
            address = address._replace(pin=transcript.fingerprint)
        body = proof_of(transcript, key).model_dump_json().encode()
        answer = await self._post(address, wire.PROVE_PATH, body)
        secret = session_of(transcript, key, answer)
        return Way(address, {wire.SESSION_HEADER: secret})

    async def _post(self, address: Address, path: str, body: bytes) -> Answer:
        try:
            return await self._upstream.ask(
                *(address, "POST", path, {}, body), limit_bytes=MAX_ANSWER_BYTES, seconds=MEETING_SECONDS
            )
        except TimeoutError:
            raise NotMet(f"no answer to {path} within {MEETING_SECONDS:g} s") from None
        except OtherCertificate:
            raise
        except UpstreamError as error:
            if isinstance(error.__cause__, ssl.SSLError):
                raise NotMet(NO_TLS) from error
            raise NotMet(str(error)) from error

    # Who waits, and who is turned away

    def _waits(self, worker: Worker, fingerprint: str) -> None:
        now, place = self._clock(), (worker.id, worker.url)
        known = self._pending.get(place)
        if known is None:
            if len(self._pending) >= MAX_PENDING:
                self._pending = {one: of for one, of in self._pending.items() if self._is_fresh(of.seen)}
            if len(self._pending) >= MAX_PENDING:
                return
            self._warn(
                "agent %s at %s waits to be let in: balancer workers approve %s CODE, with the code that it "
                "shows",
                *(worker.id, worker.url, worker.id),
            )
        since = now if known is None else known.since
        self._pending[place] = Pending(worker.id, worker.url, fingerprint, since, now)

    def _turn_away(self, worker: Worker, error: NotMet) -> None:
        now, place, reason = self._clock(), (worker.id, worker.url), str(error)
        known = self._strangers.pop(place, None)
        if known is None or known.reason != reason:
            self._warn("agent %s at %s is not let in: %s", worker.id, worker.url, reason)
        since = now if known is None else known.since
        is_other = isinstance(error, AnotherCertificate)
        self._strangers[place] = Stranger(worker.id, worker.url, reason, is_other, since, now)
        while len(self._strangers) > MAX_STRANGERS:
            del self._strangers[next(iter(self._strangers))]

    def _warn(self, message: str, *about: object) -> None:
        """Anybody may come, as often as they like: there is an end to what is logged of it."""
        now = self._clock()
        if now - self._window >= WINDOW_SECONDS:
            self._window, self._warned = now, 0
        self._warned += 1
        log.log(logging.WARNING if self._warned <= WARNINGS_AT_ONCE else logging.DEBUG, message, *about)

    def _is_fresh(self, seen: float) -> bool:
        return self._clock() - seen < FRESH_SECONDS

    def _is_bound(self, worker: Worker, session: Session) -> bool:
        """The agent is known by its certificate; True: from now on. Raises `AnotherCertificate` where
        somebody else of that id was met meanwhile."""
        try:
            return bool(session.fingerprint) and self._pins.bind(worker.id, session.fingerprint)
        except ValueError:
            raise AnotherCertificate(worker.id) from None

    async def _keep_pins(self) -> None:
        """To its end, whoever awaits it."""
        await asyncio.shield(self._written())

    async def _written(self) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(self._memory.keep, self._pins.to_json())
            except KeyFault as fault:
                log.error("what is known of the agents is lost at the next start: %s", fault)

    async def forget(self, agent_id: str) -> bool:
        """Whatever certificate it has when it is next met is its own. False: it was never met."""
        self._sessions.pop(WorkerId(agent_id), None)
        for place in [place for place in self._strangers if place[0] == agent_id]:
            del self._strangers[place]
        if not self._pins.forget(agent_id):
            return False
        await self._keep_pins()
        return True

    # Letting in ...

    async def approve(self, agent_id: str, code: str) -> None:
        """Gives the cluster key to the agent of that id that shows this code. Raises `NotApproved`."""
        async with self._approving:  # each try costs memory and time
            waiting = [one for one in self.pending if one.id == agent_id]
            if not waiting:
                raise NoSuchPending(f"no agent {agent_id!r} waits to be let in: {self._who_waits()}")
            for number, one in enumerate(waiting, 1):
                try:
                    await self._approved(one, code)
                    return
                except (NotMet, OtherCertificate) as error:
                    if number == len(waiting):
                        raise NotApproved(_of_code(agent_id, error)) from error

    def _who_waits(self) -> str:
        names = sorted({one.id for one in self.pending})
        return f"these do: {', '.join(names)}" if names else "nobody does"

    async def _approved(self, pending: Pending, code: str) -> None:
        worker = Worker(id=WorkerId(pending.id), type="agent", url=pending.url)
        address = Address.of(worker.url)
        if not address.tls:
            raise NotMet(
                "it speaks no TLS, and others could read the key: give it the key by its setting "
                "cluster_key_file"
            )
        greeting = await self._hello(address, self._pins.of(worker.id))
        transcript = greeting.transcript
        if transcript.agent == worker.id and greeting.by is ProvenBy.CODE:
            key = await asyncio.to_thread(key_of_code, code, worker.id, transcript.fingerprint)
            await self._give_key(await self._prove(address, greeting, key), self._keys.current)
        await self.meet(worker)
        log.info("agent %s at %s was let in", worker.id, worker.url)

    # ... and a new key for all

    async def rotate(self) -> dict[WorkerId, str]:
        """A new cluster key, for every agent that is met, and what became of each; who is away gets it when
        it is next met. Once begun it comes to its end, whoever awaits it. Raises `CannotRotate`."""
        return await asyncio.shield(self._rotated())

    async def _rotated(self) -> dict[WorkerId, str]:
        async with self._rotating:
            self._keys = await asyncio.to_thread(keys.rotated, self._keys)
            log.warning("the cluster has a new key")
            room = asyncio.Semaphore(AT_ONCE)
            sessions = list(self._sessions.values())
            told = await asyncio.gather(*(self._renewed(session, room) for session in sessions))
            outcomes = {session.worker_id: said for session, said in zip(sessions, told, strict=True)}
            for agent_id in self._pins.all():
                outcomes.setdefault(WorkerId(agent_id), "is away: it gets the new key when it is next met")
            return outcomes

    async def _renewed(self, session: Session, room: asyncio.Semaphore) -> str:
        try:
            async with room:
                fresh = await self._with_current_key(session)
        except NotMet as error:
            if self._sessions.get(session.worker_id) is session:
                del self._sessions[session.worker_id]
            return f"gets the new key when it is next met; now: {error}"
        if self._sessions.get(session.worker_id) is session:
            self._sessions[session.worker_id] = fresh
        return "has the new key"

    async def _give_key(self, way: Way, key: str) -> None:
        """Raises `NotMet`."""
        if not way.address.tls:
            raise NotMet("it speaks no TLS, and others could read the key: change the key in its settings")
        body = wire.NewKey(key=key).model_dump_json().encode()
        try:
            answer = await self._upstream.ask(
                *(way.address, "POST", wire.KEY_PATH, way.headers, body),
                limit_bytes=MAX_ANSWER_BYTES,
                seconds=KEY_SECONDS,
            )
        except (UpstreamError, TimeoutError) as error:
            raise NotMet(str(error) or f"no answer within {KEY_SECONDS:g} s") from error
        if answer.status != 204:
            said = said_in(answer.body)
            raise NotMet(f"it does not take the key (status {answer.status}){f': {said}' if said else ''}")

    # Within a session

    async def ask(
        self, worker: Worker, method: str, path: str, body: bytes = b"", *, limit_bytes: int, seconds: float
    ) -> Answer:
        """One exchange with an agent, which is met first where it was not, and once more where it has
        forgotten. Raises `NotMet`, `UpstreamError` and `TimeoutError`."""
        async with asyncio.timeout(seconds):
            way = await self.met(worker)
            answer = await self._asked(way, method, path, body, limit_bytes, seconds)
            if is_session_unknown(answer.status, answer.body):
                way = await self.met(worker, way)
                answer = await self._asked(way, method, path, body, limit_bytes, seconds)
            return answer

    async def _asked(
        self, way: Way, method: str, path: str, body: bytes, limit_bytes: int, seconds: float
    ) -> Answer:
        return await self._upstream.ask(
            *(way.address, method, path, way.headers, body), limit_bytes=limit_bytes, seconds=seconds
        )

    @asynccontextmanager
    async def reports(self, way: Way) -> AsyncIterator[Lines]:
        """Raises `UpstreamError` here and while it is read."""
        async with self._upstream.reading(
            way.address, wire.REPORT_PATH, way.headers, limit_bytes=wire.MAX_REPORT_BYTES
        ) as lines:
            yield lines


def _of_code(agent_id: str, error: Exception) -> str:
    if isinstance(error, KeyRefused):
        return (
            f"agent {agent_id!r} does not show this code now. It shows another one after a few wrong "
            "ones, or ten minutes: look again"
        )
    return f"agent {agent_id!r} was not let in: {error}"
