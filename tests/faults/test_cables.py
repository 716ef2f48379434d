"""Cables that are pulled, for both directions or for one (RELIABILITY 7, W10, W11, W14).

Four hosts in network namespaces: a balancer, two workers that play agents, a client. What is cut off is not
told so: no FIN, no RST, and what was written waits in the kernel.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.namespaces import Host, NoNamespaces, network
from tests.e2e.processes import SHARED_KEY, WAIT_SECONDS, Command, command
from tests.faults.asking import CHAT, Address, Came, ask, question, until

pytestmark = [
    pytest.mark.namespaces,
    # By a signal: the default way ends the process at once, and would leave the namespaces behind.
    pytest.mark.timeout(110, method="signal"),
]

ROOT = Path(__file__).parents[2]
PORT = 4000
TOKENS = 80
STREAMS = 6


@dataclass
class Wired:
    """The balancer of the first host, the workers of the next two, and a client on the last."""

    balancer: Host
    workers: tuple[Host, Host]
    process: Command
    http: aiohttp.ClientSession

    @property
    def address(self) -> Address:
        return Address(f"http://{self.balancer.address}:{PORT}", self.http)

    async def states(self) -> dict[str, str]:
        async with self.http.get(f"{self.address.url}/health") as response:
            return {worker["id"]: worker["state"] for worker in (await response.json())["workers"]}

    async def until(self, holds: Callable[[dict[str, str]], bool], what: str) -> None:
        states: dict[str, str] = {}
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    try:
                        if holds(states := await self.states()):
                            return
                    except aiohttp.ClientConnectionError:
                        assert self.process.process.returncode is None, self.process.text()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(
                f"not within {WAIT_SECONDS:g} s: {what}; {states}\n{self.process.text()}"
            ) from None

    async def begun(self) -> tuple[list[Came], list[asyncio.Task[Came]]]:
        """Streams that have begun on both workers."""
        coming = [Came(question(), CHAT) for _ in range(STREAMS)]
        asked = [asyncio.ensure_future(ask(self.address, into=came)) for came in coming]
        await until(
            lambda: all(came.begun.is_set() or task.done() for came, task in zip(coming, asked, strict=True)),
            "all have begun",
        )
        assert not [task.result() for task in asked if task.done()], self.process.text()
        assert {came.headers["X-Balancer-Worker"] for came in coming} == {"one", "two"}
        return coming, asked


@pytest.fixture
def hosts() -> Iterator[tuple[Host, ...]]:
    try:
        with network(4) as made:
            yield made
    except NoNamespaces as why:
        pytest.skip(str(why))


@pytest.fixture
async def wired(hosts: tuple[Host, ...], tmp_path: Path) -> AsyncIterator[Wired]:
    balancer, one, two, client = hosts
    connector = aiohttp.TCPConnector(socket_factory=lambda _: client.open_socket(socket.SOCK_STREAM))
    config = tmp_path / "balancer.json"
    rows: list[dict[str, Any]] = [
        {"id": name, "host": host.address, "port": PORT, "type": "agent", "tls": False}
        for name, host in (("one", one), ("two", two))
    ]
    config.write_text(json.dumps({"workers": rows, "mdns": False, "data_dir": str(tmp_path / "data")}))
    async with AsyncExitStack() as stack:
        for row, host in zip(rows, (one, two), strict=True):
            words = ("--host", "0.0.0.0", "--port", str(PORT), "--agent-id", row["id"], "--slots", "20")
            pace = ("--tokens", str(TOKENS), "--token-seconds", "0.05")
            await stack.enter_async_context(
                command(
                    "tests.fakes.engine",
                    *words,
                    *pace,
                    output=tmp_path / f"{row['id']}.txt",
                    home=tmp_path,
                    within=host.within,
                    PYTHONPATH=str(ROOT),
                )
            )
        process = await stack.enter_async_context(
            command(
                *("balancer", "serve", "--config", str(config)),
                output=tmp_path / "balancer.txt",
                home=tmp_path,
                within=balancer.within,
                **SHARED_KEY,
            )
        )
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        room = Wired(balancer, (one, two), process, http)
        await room.until(lambda states: list(states.values()) == ["ready"] * 2, "both are ready")
        yield room


async def test_a_cable_that_is_pulled_costs_nobody_an_answer(wired: Wired):
    """W10: cut both ways, with streams on the worker. It is given up by its silence, its streams go on
    elsewhere, and plugged in again it is used again."""
    coming, asked = await wired.begun()
    wired.workers[0].pull_the_cable()
    await wired.until(lambda states: states["one"] == "lost", "it is given up")
    for came in await asyncio.gather(*asked):
        came.insist_on_success(TOKENS)
    assert sum(came.comments == ["continued"] for came in coming) >= 1
    wired.workers[0].plug_it_in_again()
    await wired.until(lambda states: states["one"] == "ready", "it is back")
    (await ask(wired.address)).insist_on_success(TOKENS)


@pytest.mark.parametrize("direction", ["to the balancer", "from the balancer"])
async def test_a_way_that_is_lost_in_one_direction_costs_nobody_an_answer(wired: Wired, direction: str):
    """W11: what the worker sends is lost, or what it is sent (and with it every acknowledgement)."""
    coming, asked = await wired.begun()
    worker = wired.workers[0]
    sender, receiver = (
        (worker, wired.balancer) if direction == "to the balancer" else (wired.balancer, worker)
    )
    sender.lose_the_way_to(receiver)
    await wired.until(lambda states: states["one"] == "lost", "it is given up")
    for came in await asyncio.gather(*asked):
        came.insist_on_success(TOKENS)
    assert {came.comments.count("continued") for came in coming} <= {0, 1}
    sender.find_the_way_to(receiver)
    await wired.until(lambda states: states["one"] == "ready", "it is back")
    (await ask(wired.address)).insist_on_success(TOKENS)


async def test_a_cut_of_three_seconds_moves_a_stream_once_at_most(wired: Wired):
    """W14: and nobody is lost for longer than that, nor refused."""
    coming, asked = await wired.begun()
    wired.workers[0].pull_the_cable()
    await asyncio.sleep(3)  # the fault itself, not a wait for anything
    wired.workers[0].plug_it_in_again()
    for came in await asyncio.gather(*asked):
        came.insist_on_success(TOKENS)
    assert {came.comments.count("continued") for came in coming} <= {0, 1}
    await wired.until(lambda states: list(states.values()) == ["ready"] * 2, "both are ready")
