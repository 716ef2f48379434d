"""Looks after the engine while it serves: is it stuck, for whom does it work, can it go on with answers.

Performs what `liveness`, `orphans` and `continuation` decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson

from worker_agent import continuation
from worker_agent.changes import Changes
from worker_agent.engines.spec import EngineSpec
from worker_agent.events import EventGate, EventTooLong
from worker_agent.exchange import Exchange, Fault
from worker_agent.liveness import Liveness, LivenessPolicy
from worker_agent.orphans import OrphanPolicy, Orphans
from worker_agent.plans import Plan
from worker_agent.supervised import Serving

_LOG = logging.getLogger(__name__)
_CHAT_PATH = "/v1/chat/completions"
_GONE_SECONDS = 1.5  # its guard waits for a second for what the engine has left behind
_LOOK_SECONDS = 2.0  # for the page that tells how busy it is
_PAGE_BYTES = 1024 * 1024
_TAKEN_SECONDS = 0.25  # by then an engine has read a request, and counts it


class Backend(Protocol):
    """The engine's supervision, as seen from here."""

    @property
    def plan(self) -> Plan: ...
    @property
    def serving(self) -> Serving | None: ...
    def heard(self, serving: Serving) -> None: ...
    def doubt(self, serving: Serving) -> None: ...
    def stuck(self, serving: Serving, reason: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPolicy:
    """How often is looked, in seconds, and when enough is enough."""

    tick_seconds: float = 0.5
    liveness: LivenessPolicy = field(default_factory=LivenessPolicy)
    orphans: OrphanPolicy = field(default_factory=OrphanPolicy)
    probe_seconds: float = 120.0
    """For finding out whether it continues."""
    probe_pause_seconds: float = 2.0
    """Before another try, where users needed the slot."""
    probe_tries: int = 3
    """Where it did not answer at all."""


class EngineWatch:
    """One for all starts of an engine; what it has learned is forgotten with each."""

    def __init__(self, engine: Backend, changes: Changes, policy: WatchPolicy) -> None:
        self._engine = engine
        self._changes = changes
        self._policy = policy
        self._open: set[Exchange] = set()
        self._at_work: dict[Exchange, float] = {}  # of those, on whom the engine works, and since when
        self._serving: Serving | None = None
        self._liveness = Liveness(policy.liveness, 0.0)
        self._orphans = Orphans(policy.orphans)
        self._orphaned = asyncio.Event()
        self._continues = False
        self._probe: asyncio.Timeout | None = None
        self._notice()

    @property
    def open(self) -> int:
        """Requests held open towards the engine now."""
        return len(self._open)

    @property
    def taken(self) -> int:
        """Slots that are taken: by those, and by what the engine still does for clients that have left."""
        self._notice()
        return len(self._at_work) + self._orphans.count

    @property
    def continues(self) -> bool:
        """The engine has shown that it goes on with an answer that was begun elsewhere."""
        self._notice()
        return self._continues

    @contextlib.contextmanager
    def attending(self, exchange: Exchange, prompt_bytes: int) -> Iterator[None]:
        """The exchange is under way while the block lasts."""
        self._notice()
        now = _now()
        self._open.add(exchange)
        self._at_work[exchange] = now
        if self._is_current(exchange):
            self._liveness.began(id(exchange), prompt_bytes, now)
        if self.taken + 1 > self._engine.plan.slots:
            self._give_up_probe()  # users first
        self._changes.announce()
        try:
            yield
        finally:
            self._open.remove(exchange)
            if exchange.abandoned and self._is_current(exchange):
                self._leave_one()
            self.done(exchange)
            self._changes.announce()

    def stop_all(self, fault: Fault) -> None:
        """Ends every exchange, and tells the other sides why."""
        for exchange in tuple(self._open):
            exchange.stop(fault)

    def cut_all(self) -> None:
        """Ends every connection that has an exchange."""
        for exchange in tuple(self._open):
            exchange.cut()

    # What exchanges tell ...

    def heard(self, exchange: Exchange, *, piece: bool) -> None:
        """Something came for it."""
        self._engine.heard(exchange.serving)
        if self._is_current(exchange):
            self._liveness.heard(id(exchange), _now(), piece=piece)

    def held(self, exchange: Exchange) -> None:
        """Its client does not read."""
        if self._is_current(exchange):
            self._liveness.held(id(exchange))

    def resumed(self, exchange: Exchange) -> None:
        """Its client reads again."""
        if self._is_current(exchange):
            self._liveness.resumed(id(exchange), _now())

    def done(self, exchange: Exchange) -> None:
        """The engine has no more to do for it, or was left with it."""
        if self._at_work.pop(exchange, None) is None:
            return
        if self._is_current(exchange):
            self._liveness.ended(id(exchange))
        self._changes.announce()

    def unreached(self, exchange: Exchange, *, refused: bool) -> None:
        """It found no connection. Beside other requests a full queue says nothing: they tell if it lives."""
        if refused or len(self._at_work) == 1:
            self._engine.doubt(exchange.serving)

    async def is_gone(self, serving: Serving) -> bool:
        """Whether the engine's process has ended, which is known a moment after its connections have."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_SECONDS):
                while True:
                    change = self._changes.next
                    if self._engine.serving is not serving:
                        return True
                    await change.wait()
        return False

    # ... and what is made of it.

    async def look_after(self, session: aiohttp.ClientSession) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            tasks.create_task(self._count_orphans(session))
            tasks.create_task(self._learn_to_continue(session))

    def _notice(self) -> None:
        """Another start of the engine, or none: what was learned of the last one is void."""
        serving = self._engine.serving
        if serving is self._serving:
            return
        self._serving = serving
        self._liveness = Liveness(self._policy.liveness, _now() if serving is not None else 0.0)
        self._orphans = Orphans(self._policy.orphans)
        self._continues = False
        self._give_up_probe()

    def _give_up_probe(self) -> None:
        """Once: a scope that has expired takes no other time."""
        if self._probe is not None and not self._probe.expired():
            self._probe.reschedule(_now())
        self._probe = None

    def _is_current(self, exchange: Exchange) -> bool:
        return exchange.serving is self._serving

    def _leave_one(self) -> None:
        if self._engine.plan.spec.busy_path is not None:
            self._orphans.left()
            self._orphaned.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._policy.tick_seconds)
            self._notice()
            if self._serving is None:
                continue
            now, slots = _now(), self._engine.plan.slots
            silence = self._liveness.tick(now, self._policy.tick_seconds)
            overdue = self._orphans.tick(slots, len(self._at_work), now)
            if silence is not None:
                self._restart(f"stuck: nothing came for {silence:.0f} s")
            elif overdue is not None:
                worked = f"{self._orphans.count} of {slots} slots worked {overdue:.0f} s"
                self._restart(f"stuck: {worked} for clients that had left")

    def _restart(self, reason: str) -> None:
        assert self._serving is not None
        _LOG.warning("engine %s is %s", self._engine.plan.spec.name, reason)
        fault = Fault("engine_wedged", f"the engine is {reason}; it is being restarted")
        for exchange in tuple(self._open):
            if self._is_current(exchange):
                exchange.stop(fault)
        self._engine.stuck(self._serving, reason)
        self._notice()

    async def _count_orphans(self, session: aiohttp.ClientSession) -> None:
        spec = self._engine.plan.spec
        while True:
            await self._orphaned.wait()
            self._orphaned.clear()
            for pause in _repeating_the_last(spec.busy_pauses_seconds):
                await asyncio.sleep(pause)
                self._notice()
                if not self._orphans.count or self._serving is None:
                    break
                await self._look(session, spec, self._serving)

    async def _look(self, session: aiohttp.ClientSession, spec: EngineSpec, serving: Serving) -> None:
        """Asks how busy the engine is. What cannot be read frees nobody: it may just be busy."""
        began, before = _now(), self._orphans.count
        held = [exchange for exchange, since in self._at_work.items() if began - since >= _TAKEN_SECONDS]
        try:
            page = await _page(session, serving, spec.busy_path or "")
        except (aiohttp.ClientError, TimeoutError):
            return
        self._notice()
        if serving is not self._serving:
            return
        busy = spec.read_busy(page)
        if busy is None:
            self._orphans.forget()
        else:
            served = sum(exchange in self._at_work for exchange in held) + (self._probe is not None)
            self._orphans.seen(busy, served)
        if self._orphans.count != before:
            self._changes.announce()

    # Going on where others broke off

    async def _learn_to_continue(self, session: aiohttp.ClientSession) -> None:
        """Asks each start of the engine once, when a slot is to spare."""
        done: Serving | None = None
        spec = self._engine.plan.spec
        if spec.continue_chat is None:
            return
        while True:
            change = self._changes.next
            self._notice()
            if self._serving is None or self._serving is done:
                await change.wait()
                continue
            done = self._serving
            await self._find_out(session, spec, done)

    async def _find_out(self, session: aiohttp.ClientSession, spec: EngineSpec, serving: Serving) -> None:
        failures = 0
        while serving is self._engine.serving and failures < self._policy.probe_tries:
            if self._is_crowded():
                await asyncio.sleep(self._policy.probe_pause_seconds)
                continue
            deadline = _now() + self._policy.probe_seconds
            try:
                found = await self._ask(session, spec, serving, deadline)
            except (aiohttp.ClientError, TimeoutError, EventTooLong) as error:
                failures += not isinstance(error, TimeoutError) or _now() >= deadline
                await asyncio.sleep(self._policy.probe_pause_seconds)
                continue
            self._notice()
            if serving is self._serving:
                _LOG.info(
                    "engine %s %s", spec.name, "continues answers" if found else "does not continue answers"
                )
                self._continues = found
                self._changes.announce()
            return

    async def _ask(
        self, session: aiohttp.ClientSession, spec: EngineSpec, serving: Serving, deadline: float
    ) -> bool:
        """Raises `TimeoutError` also where a user needs the slot."""
        try:
            async with asyncio.timeout_at(deadline) as self._probe:
                return await _goes_on(session, spec, serving)
        finally:
            self._probe = None

    def _is_crowded(self) -> bool:
        """Whether no slot is to spare; one that is alone is, while nobody asks."""
        taken = self.taken
        return taken > 0 and taken + 1 >= self._engine.plan.slots


async def _goes_on(session: aiohttp.ClientSession, spec: EngineSpec, serving: Serving) -> bool:
    """Whether it goes on with a text begun elsewhere. Raises `aiohttp.ClientError`, `EventTooLong`."""
    assert spec.continue_chat is not None
    for question in continuation.QUESTIONS:
        body = continuation.question_body(serving.model, question)
        halves = continuation.cut(await _pieces(session, serving, body))
        if halves is None:
            continue
        given, rest = halves
        asked_on = spec.continue_chat(continuation.begun_body(body, given))
        if continuation.is_clean(rest, "".join(await _pieces(session, serving, asked_on))):
            return True
    return False


async def _pieces(session: aiohttp.ClientSession, serving: Serving, body: dict[str, Any]) -> list[str]:
    """The words of a streamed chat answer, piece by piece; none where the engine refuses."""
    gate, pieces = EventGate(), []
    async with session.post(
        serving.address.url + _CHAT_PATH,
        data=orjson.dumps(body),
        headers={**serving.address.headers, "Content-Type": "application/json"},
        allow_redirects=False,
    ) as answer:
        if answer.status != 200:
            return []
        async for chunk in answer.content.iter_any():
            for line in gate.feed(chunk).splitlines():
                if line.startswith(b"data: {"):
                    pieces.append(continuation.text_of(_json(line[6:])))
            if gate.over or len(pieces) > 4 * continuation.TOKENS:
                break
    return pieces


async def _page(session: aiohttp.ClientSession, serving: Serving, path: str) -> str:
    async with session.get(
        serving.address.url + path,
        headers=serving.address.headers,
        timeout=aiohttp.ClientTimeout(total=_LOOK_SECONDS),
        allow_redirects=False,
    ) as answer:
        if answer.status != 200:
            return ""
        body = bytearray()
        async for chunk in answer.content.iter_any():
            body += chunk
            if len(body) > _PAGE_BYTES:
                return ""
        return body.decode(errors="replace")


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _repeating_the_last(pauses: tuple[float, ...]) -> Iterator[float]:
    yield from pauses
    while True:
        yield pauses[-1]


def _now() -> float:
    return asyncio.get_running_loop().time()
