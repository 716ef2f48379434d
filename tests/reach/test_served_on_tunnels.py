"""The agent's own server and the balancer's own client, with nothing but dialled connections between them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from agent.scenes import until
from aiohttp import web

from balancer.upstream import Address, OtherCertificate, TimeoutPolicy, Unreachable, Upstream
from tests.reach.test_tunnels import AGENT, Place, outer_tls, place
from worker_agent import wire
from worker_agent.certificate import kept
from worker_agent.dialing import dial_all
from worker_agent.server import ServerPolicy, is_dialled, listening

LIMIT = 1 << 20


@dataclass
class Streams:
    """What the agent's server is asked for."""

    begun: int = 0
    cancelled: int = 0
    dialled: list[bool] = field(default_factory=list)

    async def words(self, request: web.Request) -> web.StreamResponse:
        """Lines, a hundred or without an end."""
        self.begun += 1
        self.dialled.append(is_dialled(request))
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            count = int(request.query["count"])
            number = 0
            while number != count:
                number += 1
                await response.write(f"line {number} of {request.query['of']}\n".encode())
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return response


@dataclass
class Pair:
    place: Place
    streams: Streams
    upstream: Upstream
    address: Address
    dialling: asyncio.Future[None]


@contextlib.asynccontextmanager
async def pair(folder: Path, *, over_tls: bool = False) -> AsyncIterator[Pair]:
    streams = Streams()
    app = web.Application()
    app.router.add_get("/words", streams.words)
    certificate = kept(folder / "agent.pem")
    policy = ServerPolicy.for_slots(64)
    async with (
        place(context=outer_tls(folder) if over_tls else None) as there,
        listening(app, "127.0.0.1", 0, policy, certificate.server_context()) as server,
        Upstream(TimeoutPolicy(), there.tunnels) as upstream,
    ):
        address = Address(AGENT, 0, tls=True, pin=certificate.fingerprint, tunnel=True)
        dialling = asyncio.ensure_future(dial_all([there.url], AGENT, lambda: "", server))
        await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)
        try:
            yield Pair(there, streams, upstream, address, dialling)
        finally:
            dialling.cancel()
            await asyncio.gather(dialling, return_exceptions=True)


@pytest.mark.parametrize("over_tls", [False, True])
async def test_fifty_streams_at_once_are_whole_and_end_to_end_within_tls(tmp_path, over_tls):
    async with pair(tmp_path, over_tls=over_tls) as both:

        async def stream(number: int) -> None:
            path = f"/words?count=100&of={number}"
            async with both.upstream.reading(both.address, path, {}, limit_bytes=LIMIT) as lines:
                for line in range(1, 101):
                    assert await lines.line() == f"line {line} of {number}\n".encode()
                assert await lines.line() == b""

        await asyncio.gather(*(stream(number) for number in range(50)))
        assert both.streams.dialled == [True] * 50


@pytest.mark.parametrize("over_tls", [False, True])
async def test_who_stops_reading_ends_the_work_at_the_other_end(tmp_path, over_tls):
    async with pair(tmp_path, over_tls=over_tls) as both:
        path = "/words?count=-1&of=0"
        async with both.upstream.reading(both.address, path, {}, limit_bytes=LIMIT) as lines:
            assert await lines.line() == b"line 1 of 0\n"
            assert both.streams.cancelled == 0
        await until(lambda: both.streams.cancelled == 1)


async def test_a_connection_is_used_for_one_request_after_the_other(tmp_path):
    async with pair(tmp_path) as both:
        for number in range(3):
            answer = await both.upstream.ask(
                *(both.address, "GET", f"/words?count=1&of={number}", {}), limit_bytes=LIMIT, seconds=20
            )
            assert answer.body == f"line 1 of {number}\n".encode()
            assert answer.fingerprint == both.address.pin
        await until(lambda: both.place.tunnels.waiting == wire.SPARE_TUNNELS)
        admitted = len(both.place.told)
        assert admitted == wire.SPARE_TUNNELS + 1


async def test_nothing_is_asked_of_whoever_only_claims_the_agents_id(tmp_path):
    async with pair(tmp_path) as both:
        another = both.address._replace(pin="0" * 64)
        with pytest.raises(OtherCertificate):
            await both.upstream.ask(another, "GET", "/words", {}, limit_bytes=LIMIT, seconds=20)
        assert both.streams.begun == 0


async def test_an_agent_that_is_gone_is_refused_at_once(tmp_path):
    async with pair(tmp_path) as both:
        both.dialling.cancel()
        await until(lambda: both.place.tunnels.waiting == 0)
        with pytest.raises(Unreachable):
            await both.upstream.ask(both.address, "GET", "/words", {}, limit_bytes=LIMIT, seconds=20)


async def test_a_stranger_that_opens_a_tunnel_and_says_nothing_costs_a_part_of_the_time_to_connect(tmp_path):
    near, far = socket.socketpair()
    near.setblocking(False)
    async with pair(tmp_path) as both:
        both.place.tunnels.admit(AGENT, "", "10.0.0.66")
        both.place.tunnels.give(AGENT, near, "10.0.0.66")
        both.upstream.policy = TimeoutPolicy(connect_seconds=4.0)
        answer = await both.upstream.ask(
            *(both.address, "GET", "/words?count=1&of=0", {}), limit_bytes=LIMIT, seconds=20
        )
        assert answer.body == b"line 1 of 0\n"
        assert far.recv(1)  # it was asked first
    near.close()
    far.close()
