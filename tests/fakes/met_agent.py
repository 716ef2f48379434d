"""An agent as a balancer meets it: the real gate, a real certificate, TLS on a real port, and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from worker_agent import certificate, cluster_key, wire
from worker_agent.exchange import Refused
from worker_agent.gate import Gate
from worker_agent.handshake import PLAIN

KEY = "the-cluster-key-of-these-tests"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class MetAgent:
    """Everything that it is asked is in `asked`, whoever asked."""

    id: str
    folder: Path
    key: str | None = KEY
    tls: bool = True
    port: int = 0
    asked: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    """What it has shown, the newest last."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._certificate = certificate.kept(self.folder / "certificate.pem")
        if self.key is not None:
            cluster_key.kept(self.folder / cluster_key.FILE, self.key)
        self.start_again()

    def start_again(self) -> None:
        """It has forgotten whom it had met."""
        held = cluster_key.found(self.folder, None)
        fingerprint = self._certificate.fingerprint if self.tls else PLAIN
        self.gate = Gate(self.id, held, fingerprint, show=self._shows)

    def _shows(self, text: str) -> None:
        self.codes.append(text.rpartition(" ")[2])
        self.changed.set()

    @property
    def fingerprint(self) -> str:
        return self._certificate.fingerprint

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def held_key(self) -> str | None:
        return cluster_key.found(self.folder, None).value

    async def code(self) -> str:
        """The one that it shows now."""
        while not self.codes:
            self.changed.clear()
            await self.changed.wait()
        return self.codes[-1]

    @web.middleware
    async def _gated(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.asked.append(request.path)
        self.changed.set()
        try:
            if (request.method, request.path) not in Gate.OPEN:
                self.gate.insist(request)
            return await handler(request)
        except Refused as refused:
            error = {"message": str(refused), "code": refused.code}
            return web.json_response({"error": error}, status=refused.status)

    async def _at_the_gate(self, request: web.Request) -> web.StreamResponse:
        (handler,) = (
            route.handler for route in self.gate.routes() if route.path == request.path
        )  # of the gate as it is now
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _reports(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        report = wire.Report(id=self.id, state=wire.EngineState.READY, engine="fake", slots=1)
        while True:
            await response.write(report.to_line())
            await asyncio.sleep(0.05)

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[MetAgent]:
        app = web.Application(middlewares=[self._gated])
        for path in (wire.HELLO_PATH, wire.PROVE_PATH, wire.KEY_PATH):
            app.router.add_post(path, self._at_the_gate)
        app.router.add_get(wire.REPORT_PATH, self._reports)
        app.router.add_post("/echo", self._echo)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        context = self._certificate.server_context() if self.tls else None
        showing = asyncio.ensure_future(self.gate.show_codes())
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context).start()
            self.port = int(runner.addresses[0][1])
            yield self
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            await runner.cleanup()
