"""The network doctor on hosts of a room: each scene breaks one thing, and the doctor names it.

Balancer and agent are the real ones, each on a host of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.namespaces import Host, NoNamespaces, network
from tests.e2e.processes import WAIT_SECONDS, Command, command

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.real_engine,
    # By a signal: the default way ends the process at once, and would leave the namespaces behind.
    pytest.mark.timeout(110, method="signal"),
]

KEY, OTHER_KEY = "cluster-key-for-the-scenes-0000001", "cluster-key-for-the-scenes-0000002"
PORT = 4000
Finding = dict[str, str]


@dataclass
class Told:
    status: int
    findings: list[Finding]

    def about(self, area: str) -> list[Finding]:
        return [one for one in self.findings if one["area"] == area]

    @property
    def faults(self) -> list[Finding]:
        return [one for one in self.findings if one["level"] == "fault"]


@dataclass
class Room:
    """A balancer's host and an agent's."""

    hub: Host
    desk: Host
    folder: Path

    def keyless_agent(self, *words: str) -> AbstractAsyncContextManager[Command]:
        return self.agent(*words, key="")

    def balancer(self, key: str = KEY) -> AbstractAsyncContextManager[Command]:
        return self._command(
            self.hub, "balancer", "serve", "--mdns", "--data-dir", str(self.folder / "data"), key=key
        )

    def agent(self, *words: str, key: str = KEY) -> AbstractAsyncContextManager[Command]:
        options = ("--threads", "1", "--context-tokens", "1024", "--slots", "2")
        return self._command(self.desk, "worker_agent", *words, *options, key=key)

    async def ask_balancers_doctor(self, *words: str, key: str = KEY) -> Told:
        data = ("--data-dir", str(self.folder / "data"))
        return await self._told(self.hub, "balancer", "doctor", "--json", *data, *words, key=key)

    async def ask_agents_doctor(self, *words: str, key: str = KEY) -> Told:
        return await self._told(self.desk, "worker_agent", "doctor", "--network", "--json", *words, key=key)

    async def _told(self, host: Host, *words: str, key: str) -> Told:
        async with self._command(host, *words, key=key, output="doctor.txt") as doctor:
            status = await doctor.ended()
            text = doctor.text()
        assert text.startswith("{"), text
        told = json.loads(text)
        assert told["ok"] == (status == 0), text
        return Told(status, told["findings"])

    def _command(
        self, host: Host, module: str, *words: str, key: str, output: str = ""
    ) -> AbstractAsyncContextManager[Command]:
        home = self.folder / module
        home.mkdir(exist_ok=True)
        return command(
            *(module, *words),
            output=self.folder / (output or f"{module}.txt"),
            home=home,
            within=host.within,
            BALANCER_CLUSTER_KEY=key,
            WORKER_AGENT_CLUSTER_KEY=key,
        )


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    try:
        with network(2) as (hub, desk):
            yield Room(hub, desk, tmp_path)
    except NoNamespaces as why:
        pytest.skip(str(why))


@asynccontextmanager
async def listening(room: Room) -> AsyncIterator[Command]:
    """The balancer, once it listens."""
    async with room.balancer() as balancer:
        await balancer.until_it_says("listening on")
        yield balancer


async def told_once(ask, holds, within: float = WAIT_SECONDS) -> Told:
    """What the doctor says as soon as this holds of it: what it looks at takes a moment to become so."""
    told = await ask()
    try:
        async with asyncio.timeout(within):
            while not holds(told):
                told = await ask()
    except TimeoutError:
        raise TimeoutError(f"the doctor says {told}") from None
    return told


async def test_where_all_is_well_both_doctors_say_so(room: Room):
    async with listening(room), room.agent("run") as agent:
        await agent.until_it_says("listening on")
        balancers = await told_once(room.ask_balancers_doctor, lambda told: told.status == 0)
        (worker,) = [one for one in balancers.findings if one["area"].startswith("worker ")]
        assert "has the cluster's key" in worker["sentence"]
        agents = await told_once(room.ask_agents_doctor, lambda told: told.status == 0)
        (balancer,) = [one for one in agents.findings if one["area"].startswith("balancer ")]
        assert "lists this machine's agent" in balancer["sentence"]
        assert all(one["level"] == "ok" for one in agents.about("multicast"))


async def test_multicast_that_does_not_pass_is_named_with_the_command_that_joins(room: Room):
    for host in (room.hub, room.desk):
        host.cut_off_multicast()
    url = f"http://{room.hub.address}:{PORT}"
    async with listening(room), room.agent("run") as agent:
        await agent.until_it_says("listening on")
        agents = await room.ask_agents_doctor("--balancer", url)
        assert agents.status == 1
        (multicast,) = agents.about("multicast")
        assert multicast["level"] == "fault"
        assert "multicast does not pass" in multicast["sentence"]
        assert f"`worker-agent join {url}`" in multicast["fix"]
        balancers = await room.ask_balancers_doctor("--worker", f"https://{room.desk.address}:4100")
        (multicast,) = balancers.about("multicast")
        assert "multicast does not pass" in multicast["sentence"]
        assert f"`worker-agent join {url}`" in multicast["fix"]


async def test_a_balancer_that_is_stopped_is_told_from_a_network_that_is_broken(room: Room):
    url = f"http://{room.hub.address}:{PORT}"
    told = await room.ask_agents_doctor("--balancer", url)
    (fault,) = told.faults
    assert "the machine answers, but nothing listens" in fault["sentence"]
    assert "`balancer up`" in fault["fix"]
    own = (await room.ask_balancers_doctor()).about("port")
    assert [one["level"] for one in own] == ["fault"]


async def test_a_machine_that_does_not_answer_is_told_from_one_that_refuses(room: Room):
    async with listening(room):
        room.desk.lose_the_way_to(room.hub)
        told = await room.ask_agents_doctor("--balancer", f"http://{room.hub.address}:{PORT}")
        named = told.about(f"balancer http://{room.hub.address}:{PORT}")
        assert [one["level"] for one in named] == ["fault"]
        assert "does not answer (timeout)" in named[0]["sentence"]


async def test_an_agent_that_holds_another_key_is_named(room: Room):
    async with listening(room), room.agent("run", key=OTHER_KEY) as agent:
        await agent.until_it_says("listening on")
        worker = ("--worker", f"https://{room.desk.address}:4100")
        balancers = await room.ask_balancers_doctor(*worker)
        assert balancers.status == 1
        assert any("holds another cluster key" in one["sentence"] for one in balancers.faults)
        agents = await told_once(
            lambda: room.ask_agents_doctor(key=OTHER_KEY), lambda told: bool(told.about("cluster"))
        )
        assert "belongs to another cluster" in agents.about("cluster")[0]["sentence"]
        assert agents.status == 1


async def test_agents_that_came_by_address_and_are_not_let_in_are_told_of(room: Room):
    url = f"http://{room.hub.address}:{PORT}"
    async with listening(room):
        async with room.keyless_agent("join", url, "--no-mdns", "--id", "waiting"):
            told = await told_once(room.ask_balancers_doctor, lambda told: bool(told.about("worker waiting")))
            (waiting,) = told.about("worker waiting")
            assert waiting["level"] == "warning"
            assert "it waits for approval" in waiting["sentence"]
            assert "`balancer workers approve waiting CODE`" in waiting["fix"]
            assert not told.about("worker"), "one is known"
        async with room.agent("join", url, "--no-mdns", "--id", "stranger", key=OTHER_KEY):
            told = await told_once(
                room.ask_balancers_doctor, lambda told: bool(told.about("worker stranger"))
            )
            (stranger,) = told.about("worker stranger")
            assert "it is not let in: it holds another cluster key" in stranger["sentence"]
        bare = await room.ask_balancers_doctor("--worker", room.desk.address)
        (asked,) = bare.about(f"worker https://{room.desk.address}:4100")
        assert "nothing listens" in asked["sentence"]


async def test_a_machine_that_is_heard_and_does_not_answer_has_a_firewall(room: Room):
    async with listening(room):
        # What the hub sends to the desk alone is lost, as if it had never let the question in.
        room.hub.lose_the_way_to(room.desk)
        told = await told_once(
            room.ask_agents_doctor,
            lambda told: any("it is heard by mDNS" in one["sentence"] for one in told.faults),
        )
        assert any("open the port on that machine" in one["fix"] for one in told.faults)
