from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from aiohttp import web

from agent.scenes import until
from worker_agent import wire
from worker_agent.joining import join_all, rest_seconds
from worker_agent.readiness import free_port

JOIN = wire.Join(id="studio-1a2b", port=4100)


def test_a_join_is_repeated_and_failures_are_retried_sooner_but_not_at_once() -> None:
    assert [rest_seconds(failures) for failures in (0, 1, 2, 3, 4, 5, 400)] == [10, 1, 2, 4, 8, 10, 10]


async def test_a_balancer_that_comes_up_later_is_joined_and_the_log_says_each_change_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.joining.rest_seconds", lambda _failures: 0.02)
    heard: list[wire.Join] = []

    async def joined(request: web.Request) -> web.Response:
        heard.append(wire.parse_join(await request.read()))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post(wire.JOIN_PATH, joined)
    port = free_port()
    with caplog.at_level(logging.INFO, logger="worker_agent.joining"):
        task = asyncio.ensure_future(join_all([f"http://127.0.0.1:{port}/"], JOIN))
        await until(lambda: caplog.records)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await until(lambda: len(heard) >= 3)
        await runner.cleanup()
        await until(lambda: len(caplog.records) >= 3)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert heard[0] == JOIN
    said = [record.getMessage() for record in caplog.records[:3]]
    assert said[0].startswith(f"cannot join http://127.0.0.1:{port}: ")
    assert said[1] == f"joined http://127.0.0.1:{port}"
    assert said[2].startswith("cannot join")


async def test_an_address_that_is_no_balancers_is_said_to_be_that(caplog: pytest.LogCaptureFixture) -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    task = asyncio.ensure_future(join_all([f"http://127.0.0.1:{site.port}"], JOIN))
    await until(lambda: "is this a balancer's address?" in caplog.text)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await runner.cleanup()
