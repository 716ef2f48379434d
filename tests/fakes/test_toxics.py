"""The toxic proxy: each toxic does to real connections what its name says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.fakes.engine import FakeEngine, Fault, reference_text
from tests.fakes.toxics import (
    Bandwidth,
    Cut,
    Direction,
    Latency,
    LimitData,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    ToxicProxy,
)

WITHIN = 5.0
LETTERS = bytes(range(97, 123)) * 100


class Ends:
    """Both ends of one connection through a proxy."""

    def __init__(self, proxy: ToxicProxy) -> None:
        self.proxy = proxy
        self.reader, self.writer = asyncio.StreamReader(), None
        self.server_reader, self.server_writer = asyncio.StreamReader(), None


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda *both: accepted.put_nowait(both), "127.0.0.1", 0)
    async with server, ToxicProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        ends = Ends(proxy)
        ends.reader, ends.writer = await asyncio.open_connection(proxy.host, proxy.port)
        ends.server_reader, ends.server_writer = await accepted.get()
        async with asyncio.timeout(WITHIN):
            yield ends
        for writer in (ends.writer, ends.server_writer):
            writer.close()


async def all_of(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """What comes until the end, and whether that was a reset."""
    came = bytearray()
    try:
        while data := await reader.read(65536):
            came += data
        return bytes(came), False
    except ConnectionResetError:
        return bytes(came), True


def seconds_since(began: float) -> float:
    return asyncio.get_running_loop().time() - began


async def test_without_toxics_everything_passes_both_ways_and_one_way_may_end_first():
    async with connected() as ends:
        ends.writer.write(LETTERS)
        ends.writer.write_eof()
        assert await all_of(ends.server_reader) == (LETTERS, False)
        ends.server_writer.write(LETTERS[::-1])
        ends.server_writer.close()
        assert await all_of(ends.reader) == (LETTERS[::-1], False)
        assert ends.proxy.passed == {direction: len(LETTERS) for direction in Direction}


async def test_latency_delays_one_direction_only_and_keeps_the_order():
    async with connected() as ends:
        ends.proxy.add(Latency(seconds=0.1, jitter=0.05))
        began = asyncio.get_running_loop().time()
        ends.writer.write(b"up")
        assert await ends.server_reader.readexactly(2) == b"up"
        for letter in LETTERS[:26]:
            ends.server_writer.write(bytes((letter,)))
            await asyncio.sleep(0)
        assert await ends.reader.readexactly(26) == LETTERS[:26]
        assert seconds_since(began) >= 0.05


async def test_bandwidth_slows_what_is_much():
    async with connected() as ends:
        ends.proxy.add(Bandwidth(bytes_per_second=len(LETTERS) * 5))
        began = asyncio.get_running_loop().time()
        ends.server_writer.write(LETTERS)
        assert await ends.reader.readexactly(len(LETTERS)) == LETTERS
        assert seconds_since(began) >= 0.2


async def test_slow_close_holds_the_end_back():
    async with connected() as ends:
        ends.proxy.add(SlowClose(seconds=0.2))
        began = asyncio.get_running_loop().time()
        ends.server_writer.write(LETTERS)
        ends.server_writer.close()
        assert await ends.reader.readexactly(len(LETTERS)) == LETTERS
        assert await all_of(ends.reader) == (b"", False)
        assert seconds_since(began) >= 0.2


async def test_timeout_loses_what_comes_and_then_closes():
    async with connected() as ends:
        ends.proxy.add(Timeout(seconds=0.1))
        ends.server_writer.write(LETTERS)
        assert await all_of(ends.reader) == (b"", False)


async def test_a_timeout_without_seconds_closes_nothing():
    async with connected() as ends:
        endless = ends.proxy.add(Timeout())
        ends.server_writer.write(b"lost")
        ends.writer.write(b"up")
        assert await ends.server_reader.readexactly(2) == b"up"
        ends.proxy.remove(endless)
        ends.server_writer.write(b"down")
        assert (await ends.reader.readexactly(4)) in (b"down", b"lost")  # what still waited may come


async def test_a_peer_is_reset_without_a_byte_having_to_come():
    async with connected() as ends:
        ends.proxy.add(ResetPeer(seconds=0.05))
        assert await all_of(ends.reader) == (b"", True)
        assert await all_of(ends.server_reader) == (b"", True)


async def test_a_slicer_hands_on_in_pieces():
    async with connected() as ends:
        ends.proxy.add(Slicer(average_bytes=100, variation=50, seconds=0.001))
        pieces = []
        ends.server_writer.write(LETTERS)
        while sum(map(len, pieces)) < len(LETTERS):
            pieces.append(await ends.reader.read(65536))
        assert b"".join(pieces) == LETTERS
        assert len(pieces) > 1


@pytest.mark.parametrize("reset", [False, True])
async def test_a_limit_tears_the_connection_at_that_byte(reset: bool):
    async with connected() as ends:
        ends.proxy.add(LimitData(bytes=1000, reset=reset))
        for start in range(0, len(LETTERS), 300):
            ends.server_writer.write(LETTERS[start : start + 300])
        came, was_reset = await all_of(ends.reader)
        assert was_reset is reset
        assert LETTERS[:1000].startswith(came)  # a reset may overtake what is under way
        assert reset or len(came) == 1000
        assert ends.proxy.passed[Direction.DOWNSTREAM] == 1000


async def test_what_a_cut_cable_held_comes_when_it_is_mended():
    async with connected() as ends:
        cut = ends.proxy.add(Cut())
        ends.server_writer.write(LETTERS)
        ends.writer.write(b"up")
        assert await ends.server_reader.readexactly(2) == b"up"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ends.reader.read(1)
        ends.proxy.remove(cut)
        assert await ends.reader.readexactly(len(LETTERS)) == LETTERS


async def test_down_closes_and_refuses_until_it_is_up_again_on_the_same_port():
    async with FakeEngine(tokens=8) as engine, ToxicProxy(engine.host, engine.port) as proxy:
        url = proxy.url
        engine.script(Fault.stall(at_token=2))
        async with aiohttp.ClientSession(url) as http:
            stalled = asyncio.ensure_future(asked(http))
            await engine.stalled()
            proxy.down()
            with pytest.raises(aiohttp.ClientError):
                await stalled
            with pytest.raises(aiohttp.ClientConnectorError):
                await asked(http)
            await engine.idle()
            await proxy.up()
            assert proxy.url == url
            assert reference_text(MESSAGES, 8).split()[0] in await asked(http)


async def test_every_connection_can_be_reset_at_once():
    async with connected() as ends:
        ends.proxy.cut_now()
        assert await all_of(ends.reader) == (b"", True)


async def test_a_server_that_refuses_shows_as_a_reset():
    async with FakeEngine() as engine, ToxicProxy(engine.host, engine.port) as proxy:
        engine.refuse()
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        assert await all_of(reader) == (b"", True)
        writer.close()


async def test_a_side_that_does_not_read_holds_the_other_up():
    async with connected() as ends:
        ends.proxy.add(Cut())
        written = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                while True:
                    ends.server_writer.write(b"x" * 65536)
                    await ends.server_writer.drain()
                    written += 65536
        assert written < 64 * 1024 * 1024


MESSAGES = [{"role": "user", "content": "Name some trees."}]


async def asked(http: aiohttp.ClientSession) -> str:
    body = {"model": "fake", "messages": MESSAGES, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        return await response.text()
