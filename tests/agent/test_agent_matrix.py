"""Who may ask an agent what: every route and every method, as everybody who might try.

The routes are those of the running application, so a new one is in here by itself: it answers to nobody who
has not met the agent, unless it is one of the few that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from agent.meeting import KEY, gate_with, met
from worker_agent import handshake, wire
from worker_agent.changes import Changes
from worker_agent.gateway import Gateway, GatewayPolicy, Models
from worker_agent.hosts import Hosts
from worker_agent.orders import Orders
from worker_agent.server import ServerPolicy, listening
from worker_agent.sources import Sources
from worker_agent.wire import EngineState, ModelList, ModelOrder, Report

NO_HTTP = "BREW"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", NO_HTTP)
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
NOWHERE = ("/", "/nothing", "/v1/models", "/metrics", "/agent/v1/nothing", "/admin/workers")
OPEN = {("POST", wire.HELLO_PATH), ("POST", wire.PROVE_PATH), ("GET", "/health"), ("HEAD", "/health")}
"""What is answered to who has not met the agent; a further one is added here, with care."""

WAIT_SECONDS = 30.0
AT_ONCE = 16


@dataclass
class Machine:
    """What is behind the gate: nobody's engine, whose every use is counted."""

    used: Counter[str] = field(default_factory=Counter)

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    @property
    def running(self) -> int:
        return 0

    def knows(self, name: str) -> bool:
        self.used["asked"] += 1
        return False

    async def _ordered(self, order: ModelOrder) -> None:
        self.used["ordered"] += 1

    load = unload = delete = download = cancel = _ordered

    def listed(self) -> ModelList:
        self.used["listed"] += 1
        return ModelList()


class Nobody(Sources):
    """Every address is a stranger's."""

    def admit(self, address: str) -> bool:
        return False


@dataclass(frozen=True)
class Who:
    name: str
    headers: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    kind: str = "application/json"
    query: str = ""


def everybody(session: str) -> tuple[list[Who], list[Who], list[Who]]:
    """Those who are let in, those who are not known, and those whom no session makes welcome."""
    known = {wire.SESSION_HEADER: session}
    return (
        [Who("a balancer", known), Who("a balancer, as plain text", known, kind="text/plain")],
        [
            Who("nobody"),
            Who("a wrong session", {wire.SESSION_HEADER: "0" * 64}),
            Who("an empty session", {wire.SESSION_HEADER: ""}),
            Who("the beginning of a session", {wire.SESSION_HEADER: session[:-1]}),
            Who("the key for a session", {wire.SESSION_HEADER: KEY}),
            Who("the tag for a session", {wire.SESSION_HEADER: handshake.cluster_tag(KEY)}),
            Who("the key as a bearer", {"Authorization": f"Bearer {KEY}", "X-Admin-Key": KEY}),
            Who("a session as a bearer", {"Authorization": f"Bearer {session}"}),
            Who("a session as a cookie", {"Cookie": f"{wire.SESSION_HEADER}={session}"}),
            Who("a session in the path", query=f"?{wire.SESSION_HEADER}={session}"),
        ],
        [
            Who("a session, by another host's name", known, host="evil.test"),
            Who("a session, from a page", {**known, "Origin": "https://evil.test"}),
            Who("a session, from this machine's page", {**known, "Origin": "http://127.0.0.1"}),
            Who("a session, from a page without an origin", {**known, "Origin": "null"}),
            Who("a session, across sites", {**known, "Sec-Fetch-Site": "cross-site"}),
            Who("a session, from the address bar", {**known, "Sec-Fetch-Site": "none"}),
        ],
    )


async def ask(port: int, method: str, path: str, who: Who) -> tuple[int, bytes]:
    """Status, and the body as far as it came with the head."""
    body = json.dumps({"model": "m", "name": "m", "stream": True}) if method in WITH_BODY else ""
    head = [f"{method} {path}{who.query} HTTP/1.1", f"Host: {who.host}", "Connection: close"]
    head += [f"{name}: {value}" for name, value in who.headers.items()]
    if body:
        head += [f"Content-Type: {who.kind}", f"Content-Length: {len(body)}"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join([*head, "", body]).encode())
        async with asyncio.timeout(WAIT_SECONDS):
            said = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (line for line in said.split(b"\r\n") if line.lower().startswith(b"content-l")), b""
            )
            size = 0 if method == "HEAD" else int(length.partition(b":")[2] or 0)
            return int(said.split(b" ")[1]), await reader.readexactly(size)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def application_of(machine: Machine, policy: GatewayPolicy) -> web.Application:
    gate = gate_with(KEY)

    def report() -> Report:
        return Report(id="a", state=EngineState.READY, engine="fake", slots=1)

    orders = Orders(cast(Any, machine)).routes()
    return Gateway(cast(Models, machine), report, Changes(), gate, policy, orders).application()


def is_right(method: str, path: str, who: Who, status: int, exists: bool, kinds: tuple[Any, ...]) -> bool:
    let_in, unknown, unwelcome = kinds
    if method == NO_HTTP:
        return status == 400
    if who in unwelcome:
        return status == 403
    if (method, path) in OPEN:
        return status in ({200} if path == "/health" else {400, 415})
    if who in unknown:
        return status == 401
    assert who in let_in
    if not exists:
        return status in (404, 405)
    if who.kind == "text/plain" and path in wire.INFERENCE_PATHS:
        return status == 415
    return status in {200, 202, 400, 404}


async def test_an_agent_answers_to_who_has_met_it_and_to_nobody_else() -> None:
    machine = Machine()
    app = application_of(machine, GatewayPolicy(hosts=Hosts(())))
    found = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }
    assert found >= OPEN
    async with listening(app, "127.0.0.1", 0, ServerPolicy()) as server, aiohttp.ClientSession() as client:
        session = (await met(client, f"http://127.0.0.1:{server.port}")).session
        kinds = everybody(session)
        paths = sorted({path for _, path in found} | set(NOWHERE))
        wrong, count, going = [], Counter[str](), asyncio.Semaphore(AT_ONCE)

        async def one(path: str, method: str, who: Who) -> None:
            async with going:
                status, body = await ask(server.port, method, path, who)
            count[who.name] += 1
            told = f"{method} {path} as {who.name}: {status} {body[:100]!r}"
            if not is_right(method, path, who, status, (method, path) in found, kinds):
                wrong.append(told)
            if status == 401 and method != "HEAD" and b"session_unknown" not in body:
                wrong.append(f"{told} does not say that it is the session")
            if path == "/health" and status == 200 and who in kinds[1] and b"engine" in body:
                wrong.append(f"{told} tells a stranger of the machine")

        async def strangers(*among: list[Who]) -> None:
            async with asyncio.TaskGroup() as group:
                for path, method, who in itertools.product(paths, METHODS, [*itertools.chain(*among)]):
                    group.create_task(one(path, method, who))

        await strangers(*kinds[1:])
        assert not wrong, "\n".join(wrong[:40])
        assert not machine.used, "somebody who was not let in has reached what is behind the gate"
        # The key may be changed by who is let in, which ends every other session: so that one comes last.
        taking = [path for path in paths if path == wire.KEY_PATH]
        paths = [path for path in paths if path != wire.KEY_PATH]
        await strangers(kinds[0])
        paths = taking
        await strangers(kinds[0])
        assert not wrong, "\n".join(wrong[:40])
        assert machine.used.keys() == {"asked", "ordered", "listed"}
        print(
            f"\n{count.total()} cells: {len(found)} routes, {len(METHODS)} methods, {len(count)} identities"
        )


@pytest.mark.parametrize("with_session", [True, False], ids=["a balancer", "a stranger"])
async def test_from_an_address_that_is_not_served_nothing_is_answered(with_session: bool) -> None:
    machine = Machine()
    app = application_of(machine, GatewayPolicy(sources=Nobody()))
    found = {route.resource.canonical for route in app.router.routes() if route.resource is not None}
    who = Who("anybody", {wire.SESSION_HEADER: "0" * 64} if with_session else {})
    async with listening(app, "127.0.0.1", 0, ServerPolicy()) as server:
        for path, method in itertools.product(sorted(found | set(NOWHERE)), METHODS):
            status, _ = await ask(server.port, method, path, who)
            assert status == (400 if method == NO_HTTP else 403), (method, path)
    assert not machine.used
