"""mDNS for real, on the loopback interface; each test advertises with zeroconf itself."""

from __future__ import annotations

import asyncio
import gc
import socket
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Sequence

import aiohttp
import pytest
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from balancer.cluster import Cluster
from balancer.core.model import Event, Reported, Seen
from balancer.discovery import Browser, Roster
from balancer.keys import ClusterKeys
from balancer.pins import Memory, Pins
from balancer.upstream import TimeoutPolicy, Upstream
from balancer.watch import Watches, WatchPolicy
from tests.fakes.met_agent import KEY, MetAgent
from worker_agent import wire

PATIENCE = 20.0
LOOPBACK = ["127.0.0.1"]


class Findings:
    """What a browser found, to wait on."""

    def __init__(self) -> None:
        self.all: list[tuple[wire.Announced, Sequence[str], int]] = []
        self.changed = asyncio.Event()

    def __call__(self, announced: wire.Announced, addresses: Sequence[str], port: int) -> None:
        self.all.append((announced, addresses, port))
        self.changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    def of(self, agent_id: str) -> list[tuple[wire.Announced, Sequence[str], int]]:
        return [finding for finding in self.all if finding[0].id == agent_id]


@pytest.fixture
def findings() -> Findings:
    return Findings()


@pytest.fixture
async def air() -> AsyncIterator[AsyncZeroconf]:
    zeroconf = AsyncZeroconf(interfaces=LOOPBACK, ip_version=IPVersion.V4Only)
    yield zeroconf
    await zeroconf.async_close()


@pytest.fixture
async def browser(findings) -> AsyncIterator[Browser]:
    browser = Browser(found=findings, interfaces=LOOPBACK, refresh_seconds=0.2)
    assert await browser.start()
    yield browser
    await browser.aclose()


async def advertise(air: AsyncZeroconf, record: dict[str, str], port: int = 4100) -> AsyncServiceInfo:
    unique = uuid.uuid4().hex[:12]  # other tests, and other people, may use the same loopback
    info = AsyncServiceInfo(
        wire.SERVICE_TYPE,
        f"{unique}.{wire.SERVICE_TYPE}",
        addresses=[socket.inet_aton("127.0.0.1")],
        port=port,
        properties=record,
        server=f"{unique}.local.",
    )
    await (await air.async_register_service(info))
    return info


def new_id() -> str:
    return f"agent-{uuid.uuid4().hex[:8]}"


async def test_an_agent_that_announces_itself_is_found(air, browser, findings):
    agent = new_id()
    announced = wire.Announced(agent, "0123456789abcdef", "f" * 64)
    await advertise(air, wire.txt_record(announced), port=4321)
    await findings.until(lambda: bool(findings.of(agent)))
    assert findings.of(agent)[0] == (announced, ["127.0.0.1"], 4321)


async def test_an_agent_is_told_again_and_again_while_it_is_announced(air, browser, findings):
    agent = new_id()
    await advertise(air, wire.txt_record(wire.Announced(agent)))
    await findings.until(lambda: len(findings.of(agent)) >= 3)


async def test_announcements_of_other_versions_are_ignored_with_one_line(air, browser, findings, caplog):
    info = await advertise(air, {"v": "99", "id": "future"})
    agent = new_id()
    await advertise(air, wire.txt_record(wire.Announced(agent)))
    await findings.until(
        lambda: len(findings.of(agent)) >= 3
    )  # by now the other was looked at thrice as well
    assert not findings.of("future")
    lines = [record for record in caplog.records if info.name in record.getMessage()]
    assert len(lines) == 1
    assert "wire version 99" in lines[0].getMessage()


@pytest.mark.parametrize("nobodys", ["203.0.113.77", "2001:db8::77"])  # an OSError, a RuntimeError
async def test_a_machine_that_cannot_listen_says_what_to_do_instead(findings, caplog, nobodys):
    browser = Browser(found=findings, interfaces=[nobodys])
    with warnings.catch_warnings():
        # zeroconf leaves the sockets that it had opened before the failure to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        assert not await browser.start()
        gc.collect()
    assert "worker-agent join" in caplog.text
    await browser.aclose()


async def test_a_browser_closes_twice_without_harm(findings):
    browser = Browser(found=findings, interfaces=LOOPBACK)
    assert await browser.start()
    await browser.aclose()
    await browser.aclose()


async def test_an_agent_that_is_found_and_joins_is_one_worker_that_outlives_its_announcement(air, tmp_path):
    events: list[Event] = []
    changed = asyncio.Event()

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                changed.clear()
                await changed.wait()

    def tell(event: Event) -> None:
        events.append(event)
        roster.notice(event)
        changed.set()

    def reports() -> int:
        return sum(isinstance(event, Reported) and event.worker_id == agent.id for event in events)

    clock = asyncio.get_running_loop().time
    async with (
        MetAgent(new_id(), tmp_path / "agent").running() as agent,
        aiohttp.ClientSession() as session,
        Upstream(TimeoutPolicy()) as upstream,
    ):
        cluster = Cluster(
            *(upstream, Memory(tmp_path), ClusterKeys(KEY)),
            balancer_id="b",
            pins=Pins(),
            clock=clock,
            on_met=lambda worker: roster.met(worker),
        )
        watches = Watches(tell=tell, session=session, agents=cluster, policy=WatchPolicy())
        roster = Roster(tell=tell, watches=watches, clock=clock, tags=lambda: cluster.tags)
        browser = Browser(found=roster.found, interfaces=LOOPBACK, refresh_seconds=0.2)
        try:
            assert await browser.start()
            record = wire.txt_record(wire.Announced(agent.id, cluster.tag, agent.fingerprint))
            info = await advertise(air, record, agent.port)
            await until(lambda: reports() >= 1)
            roster.joined(wire.Join(id=agent.id, port=agent.port), "127.0.0.1")
            await (await air.async_unregister_service(info))
            goodbye = reports()
            await until(lambda: reports() >= goodbye + 3)
        finally:
            await browser.aclose()
            await watches.aclose()
    seen = [event.worker.url for event in events if isinstance(event, Seen) and event.worker.id == agent.id]
    assert seen == [agent.url]
    assert all(isinstance(event, Seen | Reported) for event in events)
