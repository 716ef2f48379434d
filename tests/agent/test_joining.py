from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from agent.scenes import until
from worker_agent import certificate, wire
from worker_agent.joining import MOST_FOUND, Joining, refusal, rest_seconds
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
        task = asyncio.ensure_future(Joining(JOIN).run([f"http://127.0.0.1:{port}/"]))
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
    assert said[1] == f"asked http://127.0.0.1:{port} to come and meet this machine"
    assert said[2].startswith("cannot join")


@contextlib.asynccontextmanager
async def joining(url: str) -> AsyncIterator[None]:
    task = asyncio.ensure_future(Joining(JOIN).run([url]))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def balancer(answer: web.Response | None = None) -> AsyncIterator[str]:
    """One that gives this answer to the first join; None: it is no balancer at all."""

    async def joined(_request: web.Request) -> web.Response:
        assert answer is not None
        return answer

    app = web.Application()
    if answer is not None:
        app.router.add_post(wire.JOIN_PATH, joined)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site.port}"
    finally:
        await runner.cleanup()


async def test_an_address_that_is_no_balancers_is_said_to_be_that(caplog: pytest.LogCaptureFixture) -> None:
    async with balancer() as url, joining(url):
        await until(lambda: "is this a balancer's address?" in caplog.text)


async def test_what_a_balancer_says_when_it_refuses_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    says = 'an agent called "studio" is alive at http://10.0.0.7:4100: give this one another id with --id.'
    refused = web.json_response({"error": {"message": says, "type": "conflict"}}, status=409)
    async with balancer(refused) as url, joining(url):
        await until(lambda: caplog.records)
    assert (
        caplog.records[0].getMessage() == f"cannot join {url}: it answered with status 409: {says}; trying on"
    )


async def test_a_refusal_without_end_is_not_read_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    refused = web.json_response({"error": {"message": "x" * 1_000_000}}, status=409)
    async with balancer(refused) as url, joining(url):
        await until(lambda: caplog.records)
    assert caplog.records[0].getMessage() == f"cannot join {url}: it answered with status 409; trying on"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"error": {"message": "a\\u0007\\nb"}}', "a  b"),
        (b'{"error": {"message": "' + b"x" * 1000 + b'"}}', "x" * 300),
        (b'{"error": {"message": ["x"]}}', ""),
        (b'{"error": "x"}', ""),
        (b"[]", ""),
        (b"<html>", ""),
        (b"", ""),
    ],
)
def test_of_a_refusal_only_its_sentence_is_taken_and_that_short_and_printable(body: bytes, says: str) -> None:
    assert refusal(body) == says


@pytest.mark.parametrize("host", ["a..b", ".local", "x" * 64])
async def test_a_name_that_no_host_can_have_does_not_end_the_agent(
    caplog: pytest.LogCaptureFixture, host: str
) -> None:
    async with joining(f"http://{host}:4000"):
        await until(lambda: "this is not a URL" in caplog.text)


async def test_balancers_that_are_found_are_joined_and_those_that_fail_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined: list[str] = []

    async def join(_session: object, url: str, _join: wire.Join) -> str:
        joined.append(url)
        return "no" if "failing" in url else ""

    monkeypatch.setattr("worker_agent.joining._join", join)
    joining = Joining(JOIN)
    task = asyncio.ensure_future(joining.run(["http://named:4000"]))
    await until(lambda: joined)
    joining.found("http://named:4000/")
    joining.found("http://failing:4000")
    await until(lambda: "http://failing:4000" in joined)
    for number in range(MOST_FOUND + 5):
        joining.found(f"http://found-{number}:4000/")
        joining.found(f"http://found-{number}:4000")
        await asyncio.sleep(0)
    await until(lambda: len(set(joined)) == 2 + MOST_FOUND)
    assert f"http://found-{MOST_FOUND - 1}:4000" in joined
    assert f"http://found-{MOST_FOUND}:4000" not in joined
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_balancer_with_a_certificate_of_its_own_making_is_joined(tmp_path: Path) -> None:
    heard: list[wire.Join] = []

    async def joined(request: web.Request) -> web.Response:
        heard.append(wire.parse_join(await request.read()))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post(wire.JOIN_PATH, joined)
    runner = web.AppRunner(app)
    await runner.setup()
    context = certificate.kept(tmp_path / "own.pem").server_context()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    async with joining(f"https://127.0.0.1:{site.port}"):
        await until(lambda: heard)
    await runner.cleanup()
