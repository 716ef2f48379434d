"""Workers whose models can be managed, as small as they can be: an agent that answers only to balancers that
it has met, as a real one does, and an Ollama with its API for models. Both on real ports, in the test's loop.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from tests.fakes.agent_gate import KEY, PATHS, AgentGate
from worker_agent import certificate, wire
from worker_agent.handshake import PLAIN
from worker_agent.wire import (
    Download,
    DownloadState,
    EngineState,
    ModelOrder,
    ModelState,
    Report,
    ServedModel,
)

__all__ = ["KEY", "ManagedAgent", "ManagedOllama"]


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": code, "type": "x"}}, status=status)


@dataclass
class ManagedAgent:
    """An agent that reports its models and takes orders from who holds its cluster key."""

    id: str
    key: str | None = KEY
    models: dict[str, ServedModel] = field(default_factory=dict)
    downloads: dict[str, Download] = field(default_factory=dict)
    memory_total_bytes: int | None = 16 * 2**30
    memory_held_bytes: int | None = 0
    orders: list[tuple[str, ModelOrder]] = field(default_factory=list)
    """What was done: only orders within a session."""
    refuses: tuple[int, str] | None = None
    """Status and sentence for every order."""
    silent: asyncio.Event | None = None
    """Orders are not answered before it is set."""
    held: int = 0
    """Orders that came while it was silent."""
    is_old: bool = False
    """It knows nothing of meeting anybody."""
    certificate: Path | None = None
    """Where it keeps the one that it serves with; None: it speaks no TLS, and can be listed but not join."""
    port: int = 0
    gate: AgentGate = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._kept = None if self.certificate is None else certificate.kept(self.certificate)
        self.gate = AgentGate(self.id, self.key, PLAIN if self._kept is None else self._kept.fingerprint)

    @property
    def proofs_refused(self) -> int:
        return self.gate.refused

    @property
    def row(self) -> dict[str, Any]:
        """Its entry in the JSON file."""
        where = {"host": "127.0.0.1", "port": self.port, "tls": self._kept is not None}
        return {"id": self.id, "type": "agent", **where}

    def has(self, name: str, state: ModelState, **more: Any) -> None:
        self.models[name] = ServedModel(name=name, state=state, **more)
        self._tell()

    def fetches(self, repo: str, state: DownloadState, **more: Any) -> None:
        self.downloads[repo] = Download(repo=repo, name=repo.rpartition("/")[2], state=state, **more)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()

    def _report(self) -> Report:
        return Report(
            id=self.id,
            state=EngineState.READY,
            engine="fake",
            slots=4,
            models=tuple(self.models.values()),
            downloads=tuple(self.downloads.values()),
            memory_total_bytes=self.memory_total_bytes,
            memory_held_bytes=self.memory_held_bytes,
        )

    async def _reports(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            self._changed.clear()
            await response.write(self._report().to_line())
            try:
                async with asyncio.timeout(0.5):
                    await self._changed.wait()
            except TimeoutError:
                continue

    @web.middleware
    async def _gated(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.gate.key = self.key
        if request.path in PATHS:
            if self.is_old:
                raise web.HTTPNotFound
            status, body = self.gate.answer(request.path, await request.read())
            return web.Response(status=status, body=body, content_type="application/json")
        if not self.gate.has_met(request.headers.get(wire.SESSION_HEADER)):
            status, body = self.gate.unknown()
            return web.Response(status=status, body=body, content_type="application/json")
        return await handler(request)

    async def _order(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.silent is not None:
            self.held += 1
            await self.silent.wait()
        if self.refuses is not None:
            return _error(self.refuses[0], "refused", self.refuses[1])
        action, order = request.match_info["action"], wire.parse_order(body)
        self.orders.append((action, order))
        if action == "load":
            self.has(order.name, ModelState.LOADING, progress=0.25, eta_seconds=6.0)
        elif action == "unload":
            self.has(order.name, ModelState.UNLOADED)
        elif action == "delete":
            del self.models[order.name]
            self._tell()
        elif action == "download":
            self.fetches(order.repo or order.name, DownloadState.DOWNLOADING, done_bytes=1, total_bytes=4)
        return web.json_response({}, status=202 if action in ("load", "download") else 200)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ManagedAgent]:
        app = web.Application(middlewares=[self._gated])
        app.router.add_get(wire.REPORT_PATH, self._reports)
        for path in PATHS:
            app.router.add_post(path, self._order)  # answered at the gate
        app.router.add_post(wire.MODELS_PATH + "/{action}", self._order)
        context = None if self._kept is None else self._kept.server_context()
        async with _served(app, context) as self.port:
            yield self


@dataclass
class ManagedOllama:
    """An Ollama: what it has, what is in memory, and what it was asked to do with them."""

    models: dict[str, bool] = field(default_factory=dict)
    """By name, whether it is in memory."""
    embeds: set[str] = field(default_factory=set)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    loads_slowly: asyncio.Event | None = None
    pulls_until: asyncio.Event | None = None
    """A pull has come half way until it is set."""
    broken_pulls: int = 0
    """Pulls that were ended by whoever had asked for them."""
    port: int = 0

    @property
    def row(self) -> dict[str, Any]:
        return {"id": "ollama", "host": "127.0.0.1", "port": self.port, "type": "ollama"}

    async def _tags(self, _request: web.Request) -> web.Response:
        rows = [
            {"name": name, "size": 10, "details": {"family": "bert" if name in self.embeds else "llama"}}
            for name in self.models
        ]
        return web.json_response({"models": rows})

    async def _ps(self, _request: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": name} for name, here in self.models.items() if here]})

    async def _load(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked.append((request.path, asked))
        if asked["model"] not in self.models:
            return web.json_response({"error": f"model '{asked['model']}' not found"}, status=404)
        assert "prompt" not in asked
        if self.loads_slowly is not None:
            await self.loads_slowly.wait()
        self.models[asked["model"]] = asked["keep_alive"] != 0
        return web.json_response({"done": True})

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append((request.path, asked))
        response = web.StreamResponse()
        await response.prepare(request)

        async def say(**line: object) -> None:
            await response.write(orjson.dumps(line) + b"\n")

        await say(status="pulling manifest")
        if asked["model"] == "nothing":
            await say(error="pull model manifest: file does not exist")
            return response
        await say(status="pulling aaa", digest="sha256:aaa", total=100, completed=50)
        if self.pulls_until is not None:
            try:
                await self.pulls_until.wait()
            except asyncio.CancelledError:
                self.broken_pulls += 1
                raise
        await say(status="pulling aaa", digest="sha256:aaa", total=100, completed=100)
        await say(status="verifying sha256 digest")
        await say(status="success")
        self.models[asked["model"]] = False
        return response

    async def _delete(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked.append((request.path, asked))
        del self.models[asked["model"]]
        return web.Response()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ManagedOllama]:
        app = web.Application()
        app.router.add_get("/api/tags", self._tags)
        app.router.add_get("/api/ps", self._ps)
        app.router.add_post("/api/generate", self._load)
        app.router.add_post("/api/embed", self._load)
        app.router.add_post("/api/pull", self._pull)
        app.router.add_delete("/api/delete", self._delete)
        async with _served(app) as self.port:
            yield self


@asynccontextmanager
async def _served(app: web.Application, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
