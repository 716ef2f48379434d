"""mDNS, with real multicast on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from agent.scenes import until
from worker_agent import wire
from worker_agent.advertise import Presence, addresses_of, advertise, service_info

FOUND = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.168.1.7", "fd00::7", "fe80::1%eth0"],
    "wlan0": ["10.0.0.7"],
    "odd": ["not an address"],
}


def test_all_addresses_are_told_but_loopback_and_link_local_ipv6() -> None:
    assert addresses_of("::", FOUND) == ("10.0.0.7", "192.168.1.7", "fd00::7")


def test_an_agent_on_ipv4_only_does_not_tell_of_ipv6() -> None:
    assert addresses_of("0.0.0.0", FOUND) == ("10.0.0.7", "192.168.1.7")


def test_an_agent_on_one_address_tells_of_that_one() -> None:
    assert addresses_of("127.0.0.1", FOUND) == ("127.0.0.1",)
    assert addresses_of("some-name", FOUND) == ()


def test_the_record_holds_the_id_and_a_label_that_dns_can_carry() -> None:
    info = service_info(Presence("büro.mac " + "x" * 90, "0.0.0.0", 4100), ["10.0.0.7"])
    label = info.name.removesuffix("." + wire.SERVICE_TYPE)
    assert len(label.encode()) <= 63
    assert "." not in label
    assert wire.parse_txt(info.properties) == "büro.mac " + "x" * 90


class Browser:
    """Which agents can be seen on loopback now."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, int | None]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self.seen.pop(name, None)
        else:
            task = asyncio.ensure_future(self._ask(zeroconf, service_type, name))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        info = AsyncServiceInfo(service_type, name)
        if await info.async_request(zeroconf, 3000):
            self.seen[name] = (wire.parse_txt(info.properties), info.port)


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
    browser = Browser()
    watching = AsyncServiceBrowser(zeroconf.zeroconf, wire.SERVICE_TYPE, handlers=[browser.changed])
    try:
        yield browser
    finally:
        await watching.async_cancel()
        await zeroconf.async_close()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_an_agent_is_seen_while_it_advertises_and_gone_at_once_when_it_stops() -> None:
    async with browsing() as browser:
        task = asyncio.ensure_future(advertise(Presence("studio-1a2b", "127.0.0.1", 4123)))
        await until(lambda: ("studio-1a2b", 4123) in browser.seen.values())
        await _end(task)
        await until(lambda: ("studio-1a2b", 4123) not in browser.seen.values(), seconds=5)


async def test_a_second_agent_of_the_same_name_is_seen_beside_the_first() -> None:
    async with browsing() as browser:
        tasks = [
            asyncio.ensure_future(advertise(Presence("twin", "127.0.0.1", port))) for port in (4201, 4202)
        ]
        await until(lambda: {("twin", 4201), ("twin", 4202)} <= {*browser.seen.values()})
        for task in tasks:
            await _end(task)


@pytest.mark.parametrize(
    "error",
    [OSError(19, "No such device"), RuntimeError("No interfaces to listen on")],  # both seen from zeroconf
)
async def test_without_multicast_the_log_says_once_what_to_do(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_multicast(**_: object) -> None:
        raise error

    monkeypatch.setattr("worker_agent.advertise.AsyncZeroconf", no_multicast)
    monkeypatch.setattr("worker_agent.advertise._LOOK_AGAIN_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        task = asyncio.ensure_future(advertise(Presence("alone", "127.0.0.1", 4100)))
        await until(lambda: caplog.records)
        assert not task.done()
        await _end(task)
    assert len(caplog.records) == 1
    assert "worker-agent join http://BALANCER:PORT" in caplog.text
