"""Hostile bytes at the agent's own port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from agent.scenes import until
from worker_agent.server import ServerPolicy, listening

CANARY = b"zanzibarine"


async def hello(_request: web.Request) -> web.Response:
    return web.Response(text="hello")


@contextlib.asynccontextmanager
async def serving(policy: ServerPolicy | None = None) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/", hello)
    async with listening(app, "127.0.0.1", 0, policy or ServerPolicy()) as port:
        yield port


async def answer_to(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "data",
    [
        CANARY + b"\r\n\r\n",
        b"\x16\x03\x01" + CANARY * 20 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + CANARY,
        GET + b"X: " + CANARY + b"\0\r\n\r\n",
        GET + b"X: " + CANARY * 1000 + b"\r\n\r\n",
        GET + b"X: y\r\n" * 200 + b"Y: " + CANARY + b"\r\n\r\n",
        b"GET /" + CANARY * 1000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n" + CANARY,
        GET + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" + CANARY,
        GET + b"Content-Length: +3\r\n\r\n" + CANARY,
    ],
    ids=["words", "TLS", "HTTP/2", "NUL", "long header", "many headers", "long line", "two", "both", "sign"],
)
async def test_what_is_no_request_is_neither_quoted_nor_logged(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as port:
        answer = await answer_to(port, data)
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert CANARY not in answer
    assert CANARY.decode() not in caplog.text
    assert "Traceback" not in caplog.text


async def test_one_address_has_so_many_connections_and_gets_a_new_one_when_one_ends() -> None:
    async with serving(ServerPolicy(connections_per_address=3)) as port:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.callback(writer.close)
                writer.write(GET)
            assert await answer_to(port, GET + b"Connection: close\r\n\r\n") == b""
        answers: list[bytes] = []

        async def ask() -> None:
            while not answers:
                if answer := await answer_to(port, GET + b"Connection: close\r\n\r\n"):
                    answers.append(answer)

        await asyncio.wait_for(ask(), 10)
        assert answers[0].startswith(b"HTTP/1.1 200")


async def test_all_addresses_together_have_so_many_connections() -> None:
    async with serving(ServerPolicy(connections=2)) as port:
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(2)]
        assert await answer_to(port, GET + b"\r\n") == b""
        for writer in writers:
            writer.close()


def test_a_balancer_may_fill_every_slot_of_a_large_engine() -> None:
    policy = ServerPolicy.for_slots(1024)
    assert (policy.connections, policy.connections_per_address) == (3072, 2048)
    assert ServerPolicy.for_slots(4) == ServerPolicy()


async def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async with serving(ServerPolicy(keep_alive_seconds=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        await until(reader.at_eof, seconds=10)
        writer.close()
