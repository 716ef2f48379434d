"""Dialling out: the balancer's own server, real sockets, an agent's dialling, and an echo in its place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
import uvloop
from agent.scenes import until
from aiohttp import web

from balancer.core.errors import Conflict, RequestError
from balancer.dialects.openai import error_body
from balancer.hot_path import HttpServer, ServerPolicy
from balancer.inference import Admitted, Client, Head
from balancer.origins import OriginPolicy, Origins
from balancer.tunnels import TooManyTunnels, TunnelPolicy, Tunnels
from worker_agent import wire
from worker_agent.dialing import CannotDial, DialPolicy, dial_all, dialled, rest_seconds
from worker_agent.readiness import free_port

AGENT = "büro studio/1"


class Echo:
    """In the place of the agent's server: what comes on an adopted connection goes back."""

    def __init__(self) -> None:
        self.adopted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def adopt(self, sock: socket.socket) -> None:
        self.adopted += 1
        task = asyncio.ensure_future(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class NoAnswers:
    """In the place of inference, which nobody asks for here."""

    draining = False

    def admit(self, head: Head) -> Admitted:
        raise AssertionError

    async def answer(self, admitted: Admitted, body: bytes, client: Client) -> None:
        raise AssertionError

    def note(self, head: Head, refusal: RequestError) -> None:
        raise AssertionError


@dataclass
class Place:
    """A balancer's server with tunnels, and an agent that dials."""

    tunnels: Tunnels
    server: HttpServer
    url: str
    echo: Echo
    told: list[tuple[str, str]]
    refuses: list[str]
    now: list[float] = field(default_factory=lambda: [0.0])


@contextlib.asynccontextmanager
async def place(
    *, context: ssl.SSLContext | None = None, port: int = 0, policy: TunnelPolicy | None = None
) -> AsyncIterator[Place]:
    loop = asyncio.get_running_loop()
    told: list[tuple[str, str]] = []
    refuses: list[str] = []
    now = [0.0]

    def arrived(agent_id: str, tag: str) -> None:
        told.append((agent_id, tag))
        if refuses:
            raise Conflict(refuses[0])

    tunnels = Tunnels(arrived=arrived, clock=lambda: loop.time() + now[0], policy=policy)
    app = web.Application()
    app.add_routes([tunnels.route()])
    app.middlewares.append(errors)
    async with HttpServer(NoAnswers(), app, Origins(OriginPolicy()), ServerPolicy()) as server:
        listener = await loop.create_server(server._protocol, "127.0.0.1", port, ssl=context)
        bound = listener.sockets[0].getsockname()[1]
        echo = Echo()
        url = f"{'http' if context is None else 'https'}://127.0.0.1:{bound}"
        try:
            yield Place(tunnels, server, url, echo, told, refuses, now)
        finally:
            listener.close()
            tunnels.aclose()
            await echo.end()


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """As the balancer's own gives them their form."""
    try:
        return cast(web.StreamResponse, await handler(request))
    except RequestError as error:
        return web.Response(status=error.status, body=error_body(error))


@contextlib.asynccontextmanager
async def dialling(there: Place, tag: str = "", policy: DialPolicy | None = None) -> AsyncIterator[None]:
    task = asyncio.ensure_future(dial_all([there.url], AGENT, lambda: tag, there.echo, policy))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@dataclass
class Talk:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def echoed(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await self.reader.readexactly(len(data))


async def talk(tunnels: Tunnels) -> Talk:
    return Talk(*await asyncio.open_connection(sock=await tunnels.take(AGENT)))


Scene = Callable[[Path], Coroutine[Any, Any, None]]


def outer_tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("over_tls", [False, True])
def test_both_ways_carry_every_byte_and_the_agent_keeps_some_connections_waiting(
    loop_factory, over_tls, tmp_path
):
    async def scene() -> None:
        async with (
            place(context=outer_tls(tmp_path) if over_tls else None) as there,
            dialling(there, "ab" * 8),
        ):
            await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)
            assert there.told[0] == (AGENT, "ab" * 8)
            await until(lambda: there.server.connections.count == 0 or over_tls)
            talks = [await talk(there.tunnels) for _ in range(3)]
            size = 3 << 20
            for each in talks:
                large = bytes(range(256)) * (size // 256)
                sending = asyncio.ensure_future(each.echoed(large))
                assert await sending == large
                each.writer.close()
            await until(lambda: there.tunnels.waiting >= wire.SPARE_TUNNELS)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_tunnel_is_no_clients_connection_any_more_and_its_end_is_seen_on_both_sides(
    over_tls, tmp_path
):
    async with place(context=outer_tls(tmp_path) if over_tls else None) as there:
        sock = await dialled(there.url, AGENT, "")
        await until(lambda: there.tunnels.waiting == 1)
        await until(lambda: there.server.connections.count == 0)
        sock.close()
        await until(lambda: there.tunnels.waiting == 0)
        sock = await dialled(there.url, AGENT, "")
        await until(lambda: there.tunnels.waiting == 1)
        there.tunnels.aclose()
        await until(lambda: at_end(sock))
        sock.close()


def at_end(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


async def test_fifty_at_once_each_get_a_connection():
    async with place() as there, dialling(there):
        await until(lambda: there.tunnels.waiting)
        talks = await asyncio.gather(*(spoken(there.tunnels) for _ in range(50)))
        assert there.echo.adopted >= 50
        for each in talks:
            each.writer.close()


async def spoken(tunnels: Tunnels) -> Talk:
    each = await talk(tunnels)
    assert await each.echoed(b"hello") == b"hello"
    return each


async def test_nobody_waits_for_an_agent_that_never_dialled_or_is_gone():
    async with place() as there:
        with pytest.raises(ConnectionRefusedError):
            await there.tunnels.take(AGENT)
        async with dialling(there):
            await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)
            held = [await there.tunnels.take(AGENT) for _ in range(wire.SPARE_TUNNELS)]
            asking = asyncio.ensure_future(there.tunnels.take(AGENT))  # none speaks: no other is opened
            await asyncio.sleep(0)
            assert not asking.done()
            held[0].send(b"hello")
            (await asking).close()
        await until(lambda: there.tunnels.waiting == 0)
        with pytest.raises(ConnectionRefusedError):
            await there.tunnels.take(AGENT)
        for sock in held:
            sock.close()


async def test_a_balancer_that_is_started_again_is_dialled_again_and_the_log_says_each_change_once(
    caplog, monkeypatch
):
    monkeypatch.setattr("worker_agent.dialing.rest_seconds", lambda _failures, _chance: 0.02)
    caplog.set_level(logging.INFO, logger="worker_agent.dialing")
    port = free_port()
    echo = Echo()
    task = asyncio.ensure_future(dial_all([f"http://127.0.0.1:{port}"], AGENT, lambda: "", echo))
    await until(lambda: caplog.records)
    for _ in range(2):
        async with place(port=port) as there:
            await until(lambda there=there: there.tunnels.waiting == wire.SPARE_TUNNELS)
        await until(lambda: caplog.records[-1].levelno == logging.WARNING)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    said = [record.getMessage().split(":")[0].split(" ")[0] for record in caplog.records]
    assert said == ["cannot", "tunnels", "cannot", "tunnels", "cannot"]


async def test_connections_that_waited_for_long_are_opened_anew_and_those_who_are_there_are_told_of_again():
    async with place() as there, dialling(there):
        await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)
        there.now[0] = 20.0
        before = len(there.told)
        there.tunnels.tick()
        assert len(there.told) == before + 1
        there.now[0] = 400.0
        there.tunnels.tick()
        assert there.tunnels.waiting == 0
        await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)


async def test_an_agent_that_is_not_wanted_is_told_why_and_keeps_nothing_open(caplog, monkeypatch):
    monkeypatch.setattr("worker_agent.dialing.rest_seconds", lambda _failures, _chance: 0.02)
    async with place() as there:
        there.refuses.append("It was removed from this room by hand.")
        async with dialling(there):
            await until(lambda: "removed from this room by hand" in caplog.text)
            assert there.tunnels.waiting == 0
            there.refuses.clear()
            await until(lambda: there.tunnels.waiting == wire.SPARE_TUNNELS)
            there.refuses.append("It was removed again.")
            there.now[0] = 20.0
            there.tunnels.tick()
            assert there.tunnels.waiting == 0


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ((), "Upgrade"),
        (("Upgrade: llm-tunnel",), "Upgrade"),
        (("Connection: Upgrade", "Upgrade: websocket"), "Upgrade"),
        (("Connection: Upgrade", "Upgrade: llm-tunnel"), "X-Cluster-Agent"),
        (("Connection: Upgrade", "Upgrade: llm-tunnel", "X-Cluster-Agent: a%0Ab"), "X-Cluster-Agent"),
        (("Connection: Upgrade", "Upgrade: llm-tunnel", "X-Cluster-Agent: " + "a" * 129), "X-Cluster-Agent"),
        (
            ("Connection: Upgrade", "Upgrade: llm-tunnel", "X-Cluster-Agent: a", "Content-Length: 2"),
            "no body",
        ),
    ],
)
async def test_what_is_no_request_for_a_tunnel_is_refused_with_a_sentence(lines, sentence):
    async with place() as there:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(there.url.rpartition(":")[2]))
        head = [f"GET {wire.TUNNEL_PATH} HTTP/1.1", "Host: localhost", *lines, "", ""]
        writer.write("\r\n".join(head).encode() + (b"{}" if "Content-Length: 2" in lines else b""))
        answer = await reader.readuntil(b"}")
        assert b"400 " in answer.split(b"\r\n")[0]
        assert sentence.encode() in answer
        assert not there.told
        writer.close()


async def test_a_page_of_another_site_cannot_open_one():
    async with place() as there:
        with pytest.raises(CannotDial, match="status 403"):
            await dialled_with(there.url, "Origin: https://evil.example")
        with pytest.raises(CannotDial, match="status 421"):
            await dialled_with(there.url, "Host: evil.example")
        assert there.tunnels.waiting == 0


async def dialled_with(url: str, line: str) -> None:
    """As an agent dials, with a line more, or another one of that name."""
    import worker_agent.dialing as dialing

    made = dialing._request

    def other(way: Any, agent_id: str, tag: str) -> bytes:
        lines = made(way, agent_id, tag).decode().split("\r\n")
        name = line.partition(":")[0]
        return "\r\n".join([*(one for one in lines[:-2] if not one.startswith(name)), line, "", ""]).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialing, "_request", other)
        (await dialing.dialled(url, AGENT, "")).close()


def ends(tunnels: Tunnels, agent_id: str, address: str) -> tuple[socket.socket, socket.socket]:
    """A connection that was given, and the agent's end of it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    tunnels.admit(agent_id, "", address)
    tunnels.give(agent_id, near, address)
    return near, far


async def test_who_claims_an_id_that_is_anothers_gets_no_more_than_every_second_turn():
    tunnels = Tunnels(arrived=lambda *_: None, clock=lambda: 0.0)
    made = [ends(tunnels, "a", "10.0.0.1") for _ in range(3)]
    made += [ends(tunnels, "a", "10.0.0.66") for _ in range(100)]
    assert tunnels.waiting == TunnelPolicy().max_per_agent
    taken = [await tunnels.take("a") for _ in range(6)]
    honest = [near for near, _ in made[:3]]
    assert {0, 1, 2} == {honest.index(sock) for sock in taken if sock in honest}
    tunnels.aclose()
    for sock in (*taken, *(end for pair in made for end in pair)):
        sock.close()


async def test_one_address_with_connections_of_many_names_keeps_nobody_elses_out():
    tunnels = Tunnels(arrived=lambda *_: None, clock=lambda: 0.0)
    honest = ends(tunnels, "honest", "10.0.0.1")
    made = [ends(tunnels, f"a{number % 8}", "10.0.0.66") for number in range(600)]
    another = ends(tunnels, "another", "10.0.0.2")
    assert tunnels.waiting == TunnelPolicy().max_waiting
    assert await tunnels.take("honest") is honest[0]
    assert await tunnels.take("another") is another[0]
    tunnels.aclose()
    for pair in (honest, another, *made):
        for end in pair:
            end.close()


async def test_who_comes_and_goes_under_many_names_leaves_nothing_behind():
    tunnels = Tunnels(arrived=lambda *_: None, clock=lambda: 0.0)
    for number in range(TunnelPolicy().max_agents):
        _, far = ends(tunnels, f"a{number}", "10.0.0.66")
        far.close()
        await until(lambda: tunnels.waiting == 0)
        tunnels.tick()
    near, far = ends(tunnels, "honest", "10.0.0.1")
    assert await tunnels.take("honest") is near
    near.close()
    far.close()


async def test_who_claims_an_id_and_is_refused_takes_nothing_from_whose_it_is():
    """By the tag of another cluster, say."""

    def arrived(_agent_id: str, tag: str) -> None:
        if tag:
            raise Conflict("This agent holds the key of another cluster.")

    tunnels = Tunnels(arrived=arrived, clock=lambda: 0.0)
    near, far = ends(tunnels, "a", "10.0.0.1")
    asked = asyncio.ensure_future(tunnels.take("b"))
    with pytest.raises(ConnectionRefusedError):
        await asked
    for _ in range(3):
        with pytest.raises(Conflict):
            tunnels.admit("a", "feedfeedfeedfeed", "10.0.0.66")
        with pytest.raises(Conflict):
            tunnels.admit("b", "feedfeedfeedfeed", "10.0.0.66")
    assert list(tunnels._agents) == ["a"]
    assert await tunnels.take("a") is near
    near.close()
    far.close()


async def test_there_are_only_so_many_agents_and_connections():
    policy = TunnelPolicy(max_agents=3, max_agents_per_address=2, max_waiting=6)
    tunnels = Tunnels(arrived=lambda *_: None, clock=lambda: 0.0, policy=policy)
    made = [ends(tunnels, name, "10.0.0.1") for name in "ab"]
    with pytest.raises(TooManyTunnels):
        tunnels.admit("c", "", "10.0.0.1")
    made.append(ends(tunnels, "c", "10.0.0.2"))
    with pytest.raises(TooManyTunnels):
        tunnels.admit("d", "", "10.0.0.3")
    made += [ends(tunnels, "a", "10.0.0.1") for _ in range(5)]
    assert tunnels.waiting == policy.max_waiting
    tunnels.aclose()
    assert tunnels.waiting == 0
    for pair in made:
        for end in pair:
            end.close()


async def test_an_agent_that_speaks_first_is_hung_up_on():
    tunnels = Tunnels(arrived=lambda *_: None, clock=lambda: 0.0)
    _, far = ends(tunnels, "a", "10.0.0.1")
    far.send(b"hello")
    await until(lambda: tunnels.waiting == 0)
    far.close()


def test_tries_are_spread_and_never_further_apart_than_eight_seconds():
    assert [rest_seconds(failures, 1.0) for failures in (1, 2, 3, 4, 5, 6, 400)] == [0.5, 1, 2, 4, 8, 8, 8]
    assert rest_seconds(400, 0.0) == 4


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "hangs up"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "no balancer"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "is this a balancer's address"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "status 101"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000 + b"\r\n", "hangs up"),
    ],
)
async def test_whatever_answers_there_the_agent_says_what_it_was(answer, sentence):
    async def anything(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            with contextlib.suppress(OSError):
                await writer.drain()

    server = await asyncio.start_server(anything, "127.0.0.1", 0)
    async with server:
        with pytest.raises(CannotDial, match=sentence):
            await dialled(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", AGENT, "")


async def test_what_the_balancer_says_right_after_its_answer_is_left_for_the_server():
    async def balancer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: llm-tunnel\r\n\r\n\x16\x03\x01hello")
            await reader.read()

    server = await asyncio.start_server(balancer, "127.0.0.1", 0)
    async with server:
        sock = await dialled(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", AGENT, "")
        assert sock.recv(100) == b"\x16\x03\x01hello"
        sock.close()
