"""A room of real hosts on one network: they find each other, lose each other, and find each other again.

Each scene has a balancer on one host, an agent with the real engine on another, and a client on a third.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from zeroconf import DNSIncoming, DNSPointer

from tests.e2e.namespaces import Host, NoNamespaces, network
from tests.e2e.processes import SHARED_KEY, WAIT_SECONDS, Command, command
from worker_agent import wire

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.real_engine,
    # By a signal: the default way ends the process at once, and would leave the namespaces behind.
    pytest.mark.timeout(110, method="signal"),
]

MDNS = ("224.0.0.251", 5353)  # RFC 6762, 3
BALANCER_PORT = 4000
Worker = dict[str, Any]
"""A worker as `/health` shows it."""


@dataclass
class Lan:
    """Three hosts, the balancer that runs on the first, and a client on the third."""

    balancer_host: Host
    agent_host: Host
    client_host: Host
    balancer: Command
    http: aiohttp.ClientSession
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.balancer_host.address}:{BALANCER_PORT}"

    def agent(self, *words: str) -> AbstractAsyncContextManager[Command]:
        """`worker-agent WORDS ...` on its host, which keeps its id from one start to the next."""
        return command(
            *("worker_agent", *words, "--host", "0.0.0.0", "--threads", "1"),
            *("--context-tokens", "1024", "--slots", "2"),
            output=self.folder / "agent.txt",
            home=self.folder / "agent",
            within=self.agent_host.within,
            **SHARED_KEY,
        )

    async def workers(self) -> list[Worker]:
        async with self.http.get(f"{self.url}/health") as response:
            workers: list[Worker] = (await response.json())["workers"]
            return workers

    async def until(self, agent: Command, holds: Callable[[Worker], bool], what: str) -> Worker:
        """The only worker of the room, once this holds of it; TimeoutError tells the whole story."""
        seen: list[Worker] = []
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not (len(seen := await self.workers()) == 1 and holds(seen[0])):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            story = f"{self.balancer.text()}\n{agent.text()}"
            raise TimeoutError(f"not within {WAIT_SECONDS:g} s: {what}; {seen}\n{story}") from None
        agent.look()
        return seen[0]

    async def until_ready(self, agent: Command, port: int = wire.DEFAULT_AGENT_PORT) -> Worker:
        """The agent, as soon as the balancer would send it a request at this port of its host."""
        url = f"https://{self.agent_host.address}:{port}"
        return await self.until(
            agent, lambda worker: (worker["state"], worker["url"]) == ("ready", url), f"ready at {url}"
        )

    async def chat(self, worker: Worker) -> None:
        """The client asks, and the engine of this worker answers with some words of its own."""
        body = {
            "model": worker["models"][0],
            "messages": [{"role": "user", "content": "Name three trees."}],
            "max_tokens": 8,
        }
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert response.headers["X-Balancer-Worker"] == worker["id"]
        assert answer["choices"][0]["message"]["content"].strip()
        assert 1 <= answer["usage"]["completion_tokens"] <= 8

    async def until_nothing_runs_on(self, host: Host) -> None:
        try:
            async with asyncio.timeout(15):
                while host.processes():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"still running: {[p.cmdline() for p in host.processes()]}") from None


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
    for folder in ("balancer", "agent"):
        (tmp_path / folder).mkdir()
    connector = aiohttp.TCPConnector(socket_factory=lambda _: client_host.open_socket(socket.SOCK_STREAM))
    timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS)
    async with (
        command(
            *("balancer", "serve", "--mdns", "--data-dir", str(tmp_path / "balancer" / "data")),
            output=tmp_path / "balancer.txt",
            home=tmp_path / "balancer",
            within=balancer_host.within,
            **SHARED_KEY,
        ) as balancer,
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
    ):
        room = Lan(balancer_host, agent_host, client_host, balancer, http, tmp_path)
        await until_it_answers(room)
        yield room


async def until_it_answers(lan: Lan) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                assert await lan.workers() == []
                return
            except aiohttp.ClientConnectionError:
                assert lan.balancer.process.returncode is None, lan.balancer.text()
                await asyncio.sleep(0.1)


async def test_a_balancer_and_an_agent_find_each_other_and_a_third_host_is_answered(lan: Lan):
    async with lan.agent("run") as agent:
        worker = await lan.until_ready(agent)
        await agent.until_it_says(worker["id"])
        await lan.balancer.until_it_says(f"{worker['id']} at {worker['url']} was met for the first time")
        await lan.chat(worker)


async def test_an_agent_that_is_killed_is_lost_and_is_the_same_worker_when_it_is_back(lan: Lan):
    async with listening_for_goodbyes(lan.client_host) as goodbyes:
        async with lan.agent("run") as agent:
            first = await lan.until_ready(agent)
            agent.send(signal.SIGKILL)
            await agent.ended()
            await lan.until(agent, lambda worker: worker["state"] == "lost", "lost")
            await lan.until_nothing_runs_on(lan.agent_host)
        async with lan.agent("run", "--port", "4200") as agent:
            again = await lan.until_ready(agent, port=4200)
            assert again["id"] == first["id"]
            assert again["url"] != first["url"]
            await lan.chat(again)
        assert goodbyes == []


async def test_an_agent_that_multicast_does_not_reach_joins_by_address(lan: Lan):
    assert await what_passes(lan.agent_host, lan.balancer_host) == ["multicast", "unicast"]
    for host in (lan.agent_host, lan.balancer_host):
        host.cut_off_multicast()
    assert await what_passes(lan.agent_host, lan.balancer_host) == ["unicast"]
    assert await what_passes(lan.balancer_host, lan.agent_host) == ["unicast"]
    async with lan.agent("join", lan.url) as agent:
        worker = await lan.until_ready(agent)
        await agent.until_it_says(f"asked {lan.url} to come")
        await agent.until_it_says("advertised by mDNS")  # it tries that too, and does not mind
        await lan.chat(worker)


async def test_an_agent_that_is_told_to_stop_says_goodbye_and_leaves_nothing(lan: Lan):
    async with listening_for_goodbyes(lan.client_host) as goodbyes, lan.agent("run") as agent:
        worker = await lan.until_ready(agent)
        await agent.until_it_says("advertised by mDNS")  # it may have found the balancer before that
        assert len(lan.agent_host.processes()) >= 3  # the agent, the guard, the engine
        assert goodbyes == []
        agent.send(signal.SIGTERM)
        assert await agent.ended() == 0, agent.text()
        await lan.until_nothing_runs_on(lan.agent_host)
        await agent.until_nothing_is_left()
        await lan.until(agent, lambda seen: seen["state"] == "lost", "out of use")
        async with asyncio.timeout(5):
            while not goodbyes:
                await asyncio.sleep(0.05)
        assert goodbyes[0] == f"{worker['id']}.{wire.SERVICE_TYPE}"
        lan.balancer.send(signal.SIGTERM)
        assert await lan.balancer.ended() == 0, lan.balancer.text()
        await lan.until_nothing_runs_on(lan.balancer_host)


@asynccontextmanager
async def listening_for_goodbyes(host: Host) -> AsyncIterator[list[str]]:
    """The agents that have withdrawn their announcement (RFC 6762, 10.1), as this host hears it."""
    goodbyes: list[str] = []

    async def listen() -> None:
        while True:
            packet = DNSIncoming(await asyncio.get_running_loop().sock_recv(ear, 9000))
            goodbyes.extend(
                record.alias
                for record in packet.answers()
                if isinstance(record, DNSPointer) and record.name == wire.SERVICE_TYPE and record.ttl == 0
            )

    with host.member_of(*MDNS) as ear:
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(listen())
            yield goodbyes
            listening.cancel()


async def what_passes(sender: Host, receiver: Host) -> list[str]:
    """Which of two datagrams arrive, the first to mDNS's group and the second to the receiver's address.

    The cable keeps their order: once the second is there, the first has arrived or never will.
    """
    loop, port = asyncio.get_running_loop(), 5454  # not mDNS's own, where the hosts have others to hear
    arrived: list[str] = []
    with receiver.member_of(MDNS[0], port) as ear, sender.open_socket(socket.SOCK_DGRAM) as mouth:
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sender.address))
        await loop.sock_sendto(mouth, b"multicast", (MDNS[0], port))
        await loop.sock_sendto(mouth, b"unicast", (receiver.address, port))
        async with asyncio.timeout(10):
            while "unicast" not in arrived:
                arrived.append((await loop.sock_recv(ear, 100)).decode())
    return arrived
