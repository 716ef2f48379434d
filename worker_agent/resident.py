"""One model whose engine is there or on its way: where requests for it go, and who looks after them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp

from worker_agent.changes import Changes
from worker_agent.plans import Plan
from worker_agent.supervised import Serving
from worker_agent.watch import Backend, EngineWatch, WatchPolicy

_ENGINE_IDLE_SECONDS = 2.0  # vLLM closes an idle connection after 5: never meet one that it is closing
CONNECT_SECONDS = 5.0
"""To the engine; it is on loopback, but a full listen queue takes its time."""


class Resident:
    """An engine, its connections, and the watch over what it does."""

    def __init__(
        self,
        engine: Backend,
        changes: Changes,
        watch: WatchPolicy | None = None,
        connect_seconds: float = CONNECT_SECONDS,
    ) -> None:
        self.engine = engine
        self.watch = EngineWatch(engine, changes, watch or WatchPolicy())
        self.coming = 0
        """Requests for which a slot is kept, and which take it in a moment."""
        self._connect_seconds = connect_seconds
        self._session: aiohttp.ClientSession | None = None

    @property
    def plan(self) -> Plan:
        """What runs."""
        return self.engine.plan

    @property
    def serving(self) -> Serving | None:
        """Where requests go; None while it does not serve."""
        return self.engine.serving

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests to it. Only within `connected`."""
        assert self._session is not None
        return self._session

    @property
    def taken(self) -> int:
        """Slots that are taken, or are about to be."""
        return self.watch.taken + self.coming

    @property
    def is_full(self) -> bool:
        """No slot is free."""
        return self.taken >= self.plan.slots

    @contextlib.asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """It can be asked while the block lasts; an engine that is stuck is restarted, abandoned work
        counted."""
        async with self.connected(), asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self.watch.look_after(self.session))
            try:
                yield
            finally:
                looking.cancel()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """It can be asked while the block lasts."""
        async with self._new_session() as self._session:
            yield

    def _new_session(self) -> aiohttp.ClientSession:
        # No proxy from the environment (trust_env is off), no cookies; slots bound the connections already.
        keeps = self.plan.spec.keep_alive
        connector = aiohttp.TCPConnector(
            limit=0, force_close=not keeps, keepalive_timeout=_ENGINE_IDLE_SECONDS if keeps else None
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_seconds)
        return aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout, auto_decompress=False
        )
