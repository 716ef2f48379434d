"""Hostile bytes at the agent's own port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from agent.meeting import unverified
from agent.scenes import until
from worker_agent.certificate import Certificate, fingerprint_of, kept
from worker_agent.server import Listening, ServerPolicy, is_dialled, listening

CANARY = b"zanzibarine"


async def hello(request: web.Request) -> web.Response:
    return web.Response(text="hello, guest" if is_dialled(request) else "hello")


@contextlib.asynccontextmanager
async def server_of(
    policy: ServerPolicy | None = None, certificate: Certificate | None = None
) -> AsyncIterator[Listening]:
    app = web.Application()
    app.router.add_get("/", hello)
    tls = None if certificate is None else certificate.server_context()
    async with listening(app, "127.0.0.1", 0, policy or ServerPolicy(), tls) as server:
        yield server


@contextlib.asynccontextmanager
async def serving(
    policy: ServerPolicy | None = None, certificate: Certificate | None = None
) -> AsyncIterator[int]:
    async with server_of(policy, certificate) as server:
        yield server.port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return kept(tmp_path_factory.mktemp("own") / "agent-1.pem")


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


# Over TLS ...


async def test_it_serves_over_tls_and_shows_its_certificate(certificate: Certificate) -> None:
    async with serving(certificate=certificate) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unverified())
        shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
        assert fingerprint_of(shown.getpeercert(binary_form=True) or b"") == certificate.fingerprint
        writer.write(GET + b"Connection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"hello")
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        GET + b"\r\n" + CANARY,
        CANARY * 1000,
        b"\x16\x03\x01" + CANARY * 20,
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x80\x2e\x01\x03\x01" + CANARY * 4,
    ],
    ids=["plain HTTP", "words", "a torn hello", "a short hello", "an old hello"],
)
async def test_bytes_that_are_no_tls_end_quietly(
    certificate: Certificate, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(ServerPolicy(handshake_seconds=0.5), certificate) as port:
        answer = await answer_to(port, data)
        async with contextlib.AsyncExitStack() as stack:  # and it serves on
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unverified())
            stack.callback(writer.close)
            writer.write(GET + b"Connection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"hello")
    assert b"HTTP" not in answer
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert CANARY.decode() not in caplog.text
    assert "Traceback" not in caplog.text


async def test_those_that_never_begin_to_speak_tls_count_and_are_not_waited_for(
    certificate: Certificate,
) -> None:
    policy = ServerPolicy(connections_per_address=3, handshake_seconds=1.0)
    async with serving(policy, certificate) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=unverified())
        for reader, _ in silent:
            await until(reader.at_eof, seconds=10)
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unverified())
        for each in (writer, *(writer for _, writer in silent)):
            each.close()


# ... and on connections that were opened from here.


@pytest.mark.parametrize("kind", ["pair", "TCP"])
async def test_a_socket_that_was_opened_from_here_is_served_as_an_accepted_one(
    certificate: Certificate, kind: str
) -> None:
    async with server_of(certificate=certificate) as server:
        ours, theirs = socket.socketpair() if kind == "pair" else connected()
        theirs.setblocking(False)
        opening = asyncio.ensure_future(
            asyncio.open_connection(sock=theirs, ssl=unverified(), server_hostname="")
        )
        await server.adopt(ours)
        reader, writer = await opening
        for _ in range(2):
            writer.write(GET + b"\r\n")
            assert (await reader.readuntil(b"hello, guest")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_adopted_sockets_are_counted_and_end_with_the_server(certificate: Certificate) -> None:
    policy = ServerPolicy(connections_per_address=1)
    async with server_of(policy) as server:
        first, theirs = connected()
        await server.adopt(first)
        second, others = connected()
        await server.adopt(second)
        reader, writer = await asyncio.open_connection(sock=others)
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_connection(sock=theirs)
        writer.write(GET + b"\r\n")
        await reader.readuntil(b"hello, guest")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    theirs.setblocking(False)
    return ours, theirs
