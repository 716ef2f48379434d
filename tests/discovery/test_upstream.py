"""The client towards workers: what becomes of its connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from balancer import upstream as client
from balancer.upstream import Address, TimeoutPolicy, Upstream

NAME = "worker.test"


@asynccontextmanager
async def answering(host: str, port: int) -> AsyncIterator[tuple[int, set[object]]]:
    """A server that says where it is, its port, and the connections that it was asked on."""
    connections: set[object] = set()

    async def here(request: web.Request) -> web.Response:
        connections.add(request.transport)
        return web.Response(text=host)

    app = web.Application()
    app.router.add_get("/", here)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield runner.addresses[0][1], connections
    finally:
        await runner.cleanup()


async def test_under_steady_traffic_a_name_that_leads_elsewhere_is_followed_when_connections_are_old(
    monkeypatch,
):
    leads_to = ["127.0.0.1"]

    async def found(_host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (leads_to[0], port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    async with (
        answering("127.0.0.1", 0) as (port, connections),
        answering("127.0.0.2", port) as (_, others),
        Upstream(TimeoutPolicy()) as upstream,
    ):

        async def asked() -> str:
            answer = await upstream.ask(
                *(Address(NAME, port, tls=False), "GET", "/", {}), limit_bytes=100, seconds=20
            )
            return answer.body.decode()

        assert [await asked() for _ in range(3)] == ["127.0.0.1"] * 3
        leads_to[0] = "127.0.0.2"
        assert await asked() == "127.0.0.1"
        assert (len(connections), len(others)) == (1, 0)
        monkeypatch.setattr(client, "MAX_AGE_SECONDS", 0.0)
        assert [await asked() for _ in range(3)] == ["127.0.0.1", "127.0.0.2", "127.0.0.2"]
        assert len(others) == 2


async def test_what_is_known_of_an_address_outlives_the_tidying_while_a_connection_is_opened(monkeypatch):
    """Else that connection would be kept for an address that nobody looks at any more."""
    reached, goes_on = asyncio.Event(), asyncio.Event()

    async def found(_host: str, port: int, **_: object) -> list[object]:
        reached.set()
        await goes_on.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    async with answering("127.0.0.1", 0) as (port, connections), Upstream(TimeoutPolicy()) as upstream:

        async def asked() -> None:
            await upstream.ask(*(Address(NAME, port, tls=False), "GET", "/", {}), limit_bytes=100, seconds=20)

        first = asyncio.ensure_future(asked())
        await reached.wait()
        assert upstream._tidying is not None
        upstream._tidying.cancel()
        upstream._tidy()
        goes_on.set()
        await first
        await asked()
        assert len(connections) == 1
