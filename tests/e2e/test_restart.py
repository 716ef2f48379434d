"""Renewing a balancer under load, with real processes: nobody is refused, and no stream is cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from balancer.inherited import NotASocket, listening_sockets, notify
from balancer.keeping import CannotStart, Keeper, KeepPolicy, listen
from tests.e2e.conftest import free_port, listed
from tests.e2e.processes import Command, command
from tests.fakes.engine import FakeEngine

BODY = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}


async def until(holds: Callable[[], bool | Awaitable[bool]], within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while True:
            held = holds()
            if held is True or (not isinstance(held, bool) and await held):
                return
            await asyncio.sleep(0.02)


def balancers(keeper: Command) -> set[int]:
    """The processes that serve."""
    return {
        process.pid
        for process in keeper.look()
        if "serve" in process.cmdline() and process.ppid() == keeper.process.pid
    }


@asynccontextmanager
async def kept(tmp_path: Path, engine: FakeEngine, **settings: object) -> AsyncIterator[tuple[Command, str]]:
    port = free_port()
    config = tmp_path / "balancer.json"
    rows = [listed(engine, "a", max_concurrent_requests=64)]
    config.write_text(json.dumps({"workers": rows, "health_check_interval": 0.2} | settings))
    words = ("balancer", "keep", "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    async with command(
        *words, "--no-mdns", "--data-dir", str(tmp_path / "data"), output=tmp_path / "log", home=tmp_path
    ) as keeper:
        url = f"http://127.0.0.1:{port}"
        await keeper.until_it_says("listening on")
        async with aiohttp.ClientSession() as session:
            await until(lambda: _ready(session, url))
        yield keeper, url


async def _ready(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(f"{url}/readyz") as response:
        return response.status == 200


@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
async def test_o9_renewed_under_load_it_refuses_nobody_and_cuts_no_stream(tmp_path: Path, hot_path: bool):
    async with FakeEngine(token_seconds=0.02, slots=64) as engine:
        async with kept(tmp_path, engine, hot_path=hot_path) as (keeper, url):
            done = asyncio.Event()
            outcomes: list[str] = []

            async def ask_again_and_again(session: aiohttp.ClientSession, stream: bool) -> None:
                while not done.is_set():
                    try:
                        body = BODY | {"stream": stream}
                        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                            data = await response.read()
                            whole = data.endswith(b"data: [DONE]\n\n") if stream else b'"stop"' in data
                            outcomes.append("whole" if response.status == 200 and whole else f"{data!r}")
                    except (aiohttp.ClientError, OSError) as error:
                        outcomes.append(repr(error))

            keeping_connections = aiohttp.ClientSession()
            fresh_connections = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
            async with keeping_connections, fresh_connections, asyncio.TaskGroup() as group:
                for session in (keeping_connections, fresh_connections):
                    for number in range(8):
                        group.create_task(ask_again_and_again(session, stream=number % 2 == 0))
                for _ in range(3):
                    (before,) = balancers(keeper)
                    asked = len(outcomes)
                    keeper.send(signal.SIGHUP)
                    await until(lambda before=before: bool(balancers(keeper) - {before}))
                    await until(lambda before=before: before not in balancers(keeper))
                    await until(lambda asked=asked: len(outcomes) > asked + 20)
                done.set()
            assert set(outcomes) == {"whole"}
            assert len(outcomes) > 60
            keeper.send(signal.SIGTERM)
            assert await keeper.ended() == 0
            await keeper.until_nothing_is_left()


async def test_a_balancer_that_dies_is_replaced(tmp_path: Path):
    async with FakeEngine() as engine, kept(tmp_path, engine) as (keeper, url):
        for _ in range(2):
            (before,) = balancers(keeper)
            os.kill(before, signal.SIGKILL)
            # The port is still there: who comes now waits, and is served by the next one.
            async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
                assert response.status == 200
            assert before not in balancers(keeper)


async def test_it_ends_with_its_keeper_however_that_goes(tmp_path: Path):
    async with FakeEngine() as engine, kept(tmp_path, engine) as (keeper, _):
        (own,) = balancers(keeper)
        keeper.send(signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(own) or psutil.Process(own).status() == "zombie")


async def test_a_first_balancer_that_cannot_start_ends_the_command_with_its_own_words(tmp_path: Path):
    words = ("balancer", "keep", "--host", "127.0.0.1", "--port", str(free_port()), "--scorer", "x")
    async with command(*words, output=tmp_path / "log", home=tmp_path) as keeper:
        assert await keeper.ended() == 2
        assert "--scorer" in keeper.text()


async def test_a_port_that_is_taken_is_said_plainly(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ("balancer", "keep", "--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
        async with command(*words, output=tmp_path / "log", home=tmp_path) as keeper:
            assert await keeper.ended() == 1
            assert "Choose another port" in keeper.text()


# The keeper alone, over commands that are not balancers

TELLING = """
import os, signal, socket, sys, time
line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
open(os.environ["STARTS"], "a").write("x")
{first}
line.connect(os.environ["NOTIFY_SOCKET"])
line.sendall(b"READY=1")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
{then}
"""


@asynccontextmanager
async def keeping(
    tmp_path: Path, then: str, first: str = "", policy: KeepPolicy | None = None
) -> AsyncIterator[tuple[Keeper, asyncio.Task[int], Path]]:
    starts = tmp_path / "starts"
    starts.touch()
    environment = {"PATH": os.environ["PATH"], "STARTS": str(starts)}
    program = [sys.executable, "-c", TELLING.format(first=first, then=then)]
    with listen("127.0.0.1", 0) as listening:
        keeper = Keeper(program, listening, environment, policy)
        running = asyncio.ensure_future(keeper.run())
        try:
            yield keeper, running, starts
        finally:
            keeper.stop()
            await asyncio.wait((running,))


def count(starts: Path) -> int:
    return len(starts.read_text())


async def test_one_that_dies_at_once_again_and_again_is_given_ever_longer_rests(tmp_path: Path):
    policy = KeepPolicy(first_rest_seconds=0.2, longest_rest_seconds=600)
    async with keeping(tmp_path, "sys.exit(3)", policy=policy) as (_, running, starts):
        await until(lambda: count(starts) >= 4)
        begun = count(starts)
        assert not running.done()
        # 0.2 s, then 0.4, 0.8, 1.6 ...: in as many seconds there can only be a few more.
        await asyncio.sleep(1.0)
        assert count(starts) <= begun + 2


async def test_a_new_one_that_does_not_get_ready_changes_nothing(tmp_path: Path):
    later = 'if len(open(os.environ["STARTS"]).read()) > 1: sys.exit(2)'
    async with keeping(tmp_path, "time.sleep(600)", first=later) as (keeper, running, starts):
        await until(lambda: count(starts) == 1 and keeper._current is not None)
        current = keeper._current
        assert current is not None
        keeper.restart()
        await until(lambda: count(starts) == 2)
        await until(lambda: len(keeper._children) == 1)
        assert keeper._current is current
        assert not running.done()
        assert not current.ended.done()


async def test_a_first_one_that_ends_before_it_is_ready_is_not_tried_again(tmp_path: Path):
    async with keeping(tmp_path, "", first="sys.exit(7)") as (_, running, starts):
        with pytest.raises(CannotStart) as caught:
            await running
        assert (caught.value.status, count(starts)) == (7, 1)


async def test_asked_to_stop_it_asks_once_and_the_second_time_again(tmp_path: Path):
    counting = """
asked = 0
def hear(*_):
    global asked
    asked += 1
    open(os.environ["STARTS"], "a").write("T")
    if asked == 2:
        sys.exit(5)
signal.signal(signal.SIGTERM, hear)
while True:
    time.sleep(600)
"""
    async with keeping(tmp_path, counting) as (keeper, running, starts):
        await until(lambda: keeper._current is not None)
        await until(lambda: count(starts) == 1)
        # It may not have its handler yet: what it was sent before would end it.
        await asyncio.sleep(0.2)
        keeper.stop()
        await until(lambda: starts.read_text() == "xT")
        assert not running.done()
        keeper.stop()
        assert await running == 5
        assert starts.read_text() == "xTT"


# What is inherited


def test_sockets_come_by_systemds_variables_if_they_are_for_us(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("balancer.inherited.FIRST_FD", os.dup(server.fileno()))
        ours = {"LISTEN_FDS": "1", "LISTEN_PID": "77", "LISTEN_FDNAMES": "http", "A": "b"}
        others = dict(ours)
        assert listening_sockets(others, 78, None) == []
        assert others == {"A": "b"}
        (found,) = listening_sockets(ours, 77, None)
        with found:
            assert found.getsockname() == server.getsockname()
            assert not os.get_inheritable(found.fileno())


def test_what_is_no_listening_socket_is_said_plainly(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(NotASocket, match="no socket"):
        listening_sockets({}, 1, file.fileno())
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(NotASocket, match="TCP"),
    ):
        listening_sockets({}, 1, os.dup(datagrams.fileno()))


def test_whoever_waits_is_told_and_nobody_else(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "line"))
        notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "line")})
        assert line.recv(100) == b"READY=1"
    for nobody in ("", "relative", str(tmp_path / "nothing")):
        notify("READY=1", {"NOTIFY_SOCKET": nobody})
