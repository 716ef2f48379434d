"""An agent that nobody can connect to, on a host of its own: it dials, and is a worker like any other."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.namespaces import Host, NoNamespaces, network
from tests.e2e.processes import SHARED_KEY, WAIT_SECONDS, Command, command

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.real_engine,
    # By a signal: the default way ends the process at once, and would leave the namespaces behind.
    pytest.mark.timeout(110, method="signal"),
]

PORT = 4000
Worker = dict[str, Any]
"""A worker as `/health` shows it."""


@dataclass
class Lan:
    balancer_host: Host
    agent_host: Host
    http: aiohttp.ClientSession
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.balancer_host.address}:{PORT}"

    def balancer(self, *words: str) -> AbstractAsyncContextManager[Command]:
        return command(
            *("balancer", "serve", "--data-dir", str(self.folder / "data"), *words),
            output=self.folder / "balancer.txt",
            home=self.folder,
            within=self.balancer_host.within,
            **SHARED_KEY,
        )

    def agent(self, scheme: str = "http") -> AbstractAsyncContextManager[Command]:
        """It listens on loopback alone: no connection to it can come from elsewhere."""
        return command(
            *("worker_agent", "run", "--host", "127.0.0.1", "--no-mdns", "--threads", "1"),
            *("--context-tokens", "1024", "--slots", "2", "--data-dir", str(self.folder / "agent")),
            output=self.folder / "agent.txt",
            home=self.folder,
            within=self.agent_host.within,
            WORKER_AGENT_DIAL_OUT="true",
            WORKER_AGENT_BALANCERS=self.url.replace("http", scheme),
            **SHARED_KEY,
        )

    async def until(
        self, state: str, agent: Command, balancer: Command, scheme: str = "http"
    ) -> dict[str, Any]:
        """The only worker of the room, once it is in this state."""
        workers: list[Worker] = []
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while [worker["state"] for worker in workers] != [state]:
                    await asyncio.sleep(0.1)
                    try:
                        url = self.url.replace("http", scheme)
                        async with self.http.get(f"{url}/health", ssl=False) as response:
                            workers = (await response.json())["workers"]
                    except aiohttp.ClientConnectionError:
                        assert balancer.process.returncode is None, balancer.text()
        except TimeoutError:
            raise TimeoutError(f"not {state}: {workers}\n{balancer.text()}\n{agent.text()}") from None
        agent.look()
        return workers[0]

    async def chat(self, worker: Worker, scheme: str = "http") -> None:
        body = {
            "model": worker["models"][0],
            "messages": [{"role": "user", "content": "Name three trees."}],
            "max_tokens": 8,
        }
        url = f"{self.url.replace('http', scheme)}/v1/chat/completions"
        async with self.http.post(url, json=body, ssl=False) as response:
            answer = await response.json()
            assert response.status == 200, answer
        assert answer["choices"][0]["message"]["content"].strip()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, ...]]:
    try:
        with network(3) as made:
            yield made
    except NoNamespaces as why:
        pytest.skip(str(why))


@pytest.fixture
async def lan(hosts: tuple[Host, ...], tmp_path: Path) -> AsyncIterator[Lan]:
    balancer_host, agent_host, client_host = hosts
    connector = aiohttp.TCPConnector(socket_factory=lambda _: client_host.open_socket(socket.SOCK_STREAM))
    timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield Lan(balancer_host, agent_host, http, tmp_path)


async def test_it_serves_is_lost_when_it_is_killed_and_comes_back_after_a_restart_of_either(lan: Lan):
    async with lan.balancer() as balancer:
        async with lan.agent() as agent:
            first = await lan.until("ready", agent, balancer)
            assert first["url"] == f"tunnel://{first['id']}"
            await lan.chat(first)
            agent.send(signal.SIGKILL)
            await agent.ended()
            await lan.until("lost", agent, balancer)
        async with lan.agent() as agent:
            again = await lan.until("ready", agent, balancer)
            assert again["id"] == first["id"]
            balancer.send(signal.SIGKILL)
            await balancer.ended()
            await agent.until_it_says("cannot open a tunnel")
            async with lan.balancer() as second:
                await lan.chat(await lan.until("ready", agent, second))


async def test_it_serves_through_the_tls_that_clients_are_served_with(lan: Lan):
    lan.folder.joinpath("balancer.json").write_text('{"tls": "self-signed"}')
    async with (
        lan.balancer("--config", str(lan.folder / "balancer.json")) as balancer,
        lan.agent("https") as agent,
    ):
        worker = await lan.until("ready", agent, balancer, "https")
        assert worker["url"].startswith("tunnel://")
        await lan.chat(worker, "https")
