"""mDNS, with real multicast on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial

import pytest
from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from agent.scenes import until
from worker_agent import wire
from worker_agent.advertise import Presence, addresses_of, advertise, service_info

INSTEAD = "it will not be found; say where it is by `worker-agent join`"

FOUND = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.168.1.7", "fd00::7", "fe80::1%eth0"],
    "wlan0": ["10.0.0.7"],
    "odd": ["not an address"],
}


def agent(agent_id: str, host: str, port: int, tag: str = "") -> Presence:
    return Presence(wire.SERVICE_TYPE, wire.Announced(agent_id, tag), host, port)


def test_all_addresses_are_told_but_loopback_and_link_local_ipv6() -> None:
    assert addresses_of("::", FOUND) == ("10.0.0.7", "192.168.1.7", "fd00::7")


def test_an_agent_on_ipv4_only_does_not_tell_of_ipv6() -> None:
    assert addresses_of("0.0.0.0", FOUND) == ("10.0.0.7", "192.168.1.7")


def test_an_agent_on_one_address_tells_of_that_one() -> None:
    assert addresses_of("127.0.0.1", FOUND) == ("127.0.0.1",)
    assert addresses_of("some-name", FOUND) == ()


def test_the_record_holds_the_id_and_a_label_that_dns_can_carry() -> None:
    info = service_info(agent("büro.mac " + "x" * 90, "0.0.0.0", 4100), ["10.0.0.7"])
    label = info.name.removesuffix("." + wire.SERVICE_TYPE)
    assert len(label.encode()) <= 63
    assert "." not in label
    assert wire.parse_txt(info.properties).id == "büro.mac " + "x" * 90


LOOPBACK = {"lo": ["127.0.0.1", "::1"]}


@pytest.mark.parametrize(
    ("host", "found", "told"),
    [
        ("::", LOOPBACK, ()),  # no network at all: there is nobody to tell
        ("0.0.0.0", {**LOOPBACK, "eth0": ["fd00::7"]}, ()),  # only IPv6, and bound to IPv4
        ("::", {**LOOPBACK, "eth0": ["fd00::7", "fe80::7%eth0"]}, ("fd00::7",)),
        ("::", {**LOOPBACK, "eth0": ["fe80::7%eth0"]}, ()),  # link-local alone: the record has no scope
        ("0.0.0.0", {**LOOPBACK, "eth0": ["169.254.7.7"]}, ("169.254.7.7",)),  # two machines and a cable
        ("0.0.0.0", {**LOOPBACK, "a": ["10.1.0.7"], "b": ["10.2.0.7"]}, ("10.1.0.7", "10.2.0.7")),
        ("10.2.0.7", {**LOOPBACK, "a": ["10.1.0.7"], "b": ["10.2.0.7"]}, ("10.2.0.7",)),  # bound to one
        ("0.0.0.0", {**LOOPBACK, "a": ["10.1.0.7"], "tun0": ["10.8.0.2"]}, ("10.1.0.7", "10.8.0.2")),
        ("fd00::7", LOOPBACK, ("fd00::7",)),
        ("::1", LOOPBACK, ("::1",)),
    ],
)
def test_what_a_machine_tells_of_its_addresses(
    host: str, found: Mapping[str, Sequence[str]], told: tuple[str, ...]
) -> None:
    assert addresses_of(host, found) == told


class Browser:
    """Which agents can be seen on loopback now."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, int | None]] = {}
        self.tags: set[str] = set()
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
            announced = wire.parse_txt(info.properties)
            self.seen[name] = announced.id, info.port
            self.tags.add(announced.tag)


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
        task = asyncio.ensure_future(advertise(lambda: agent("studio-1a2b", "127.0.0.1", 4123), INSTEAD))
        await until(lambda: ("studio-1a2b", 4123) in browser.seen.values())
        await _end(task)
        await until(lambda: ("studio-1a2b", 4123) not in browser.seen.values(), seconds=5)


async def test_a_second_agent_of_the_same_name_is_seen_beside_the_first() -> None:
    async with browsing() as browser:
        tasks = [
            asyncio.ensure_future(advertise(partial(agent, "twin", "127.0.0.1", port), INSTEAD))
            for port in (4201, 4202)
        ]
        await until(lambda: {("twin", 4201), ("twin", 4202)} <= {*browser.seen.values()})
        for task in tasks:
            await _end(task)


async def test_an_agent_that_got_a_key_is_announced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_agent.advertise._LOOK_AGAIN_SECONDS", 0.05)
    shown = [agent("mover", "127.0.0.1", 4301)]
    async with browsing() as browser:
        task = asyncio.ensure_future(advertise(lambda: shown[0], INSTEAD))
        await until(lambda: ("mover", 4301) in browser.seen.values())
        shown[0] = agent("mover", "127.0.0.1", 4301, tag="0123456789abcdef")
        await until(lambda: "0123456789abcdef" in browser.tags)
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
        task = asyncio.ensure_future(advertise(lambda: agent("alone", "127.0.0.1", 4100), INSTEAD))
        await until(lambda: caplog.records)
        assert not task.done()
        await _end(task)
    assert len(caplog.records) == 1
    assert INSTEAD in caplog.text
