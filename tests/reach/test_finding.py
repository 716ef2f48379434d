"""Agents and balancers that find each other by mDNS, with real multicast on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Sequence

import pytest
from agent.scenes import until
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from balancer import announce as announcing
from balancer.announce import announce
from worker_agent import finding, wire
from worker_agent.advertise import Presence, advertise
from worker_agent.finding import balancer_url, found_balancers, is_ours
from worker_agent.joining import Joining
from worker_agent.reachability import by_reachability

OURS, THEIRS = "0123456789abcdef", "fedcba9876543210"
LOOPBACK = ["127.0.0.1"]


@pytest.fixture(autouse=True)
def a_name_of_our_own(monkeypatch):
    monkeypatch.setattr(wire, "BALANCER_SERVICE_TYPE", "_llm-test-b._tcp.local.")


@contextlib.asynccontextmanager
async def beside(*work) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def balancer(name: str, port: int, tag: str, fingerprint: str = ""):
    shown = Presence(wire.BALANCER_SERVICE_TYPE, wire.Announced(name, tag, fingerprint), "127.0.0.1", port)
    return advertise(lambda: shown, "")


async def test_an_agent_finds_the_balancers_of_its_own_cluster_and_without_a_key_all(monkeypatch):
    monkeypatch.setattr(finding, "_LOOK_AGAIN_SECONDS", 0.1)
    tag, found = [OURS], set[str]()
    async with beside(
        balancer("ours", 4001, OURS),
        balancer("over-tls", 4002, OURS, "ab" * 32),
        balancer("theirs", 4003, THEIRS),
        found_balancers(lambda: tag[0], found.add, LOOPBACK),
    ):
        await until(lambda: {"http://127.0.0.1:4001", "https://127.0.0.1:4002"} <= found)
        assert "http://127.0.0.1:4003" not in found
        tag[0] = ""
        await until(lambda: "http://127.0.0.1:4003" in found)


async def test_an_agent_that_is_given_a_key_leaves_the_balancers_of_other_clusters_alone(monkeypatch):
    """It had found them when it had none, and any of them might have let it in."""
    monkeypatch.setattr(finding, "_LOOK_AGAIN_SECONDS", 0.1)
    tag = [""]
    joining = Joining(wire.Join(id="a", port=4100))
    urls = {"http://127.0.0.1:4001", "http://127.0.0.1:4003"}
    async with beside(
        balancer("ours", 4001, OURS),
        balancer("theirs", 4003, THEIRS),
        joining.run([]),
        found_balancers(lambda: tag[0], joining.found, LOOPBACK, joining.forget_found),
    ):
        await until(
            lambda: {task.get_name() for task in asyncio.all_tasks()} >= {f"join {url}" for url in urls}
        )
        tag[0] = OURS
        await until(lambda: joining._found.keys() == {"http://127.0.0.1:4001"})
        await until(
            lambda: "join http://127.0.0.1:4003" not in {task.get_name() for task in asyncio.all_tasks()}
        )


@contextlib.asynccontextmanager
async def announced(record: dict[str, str], port: int) -> AsyncIterator[None]:
    """By zeroconf itself, with a record of any kind."""
    air = AsyncZeroconf(interfaces=LOOPBACK, ip_version=IPVersion.V4Only)
    info = AsyncServiceInfo(
        wire.BALANCER_SERVICE_TYPE,
        f"other-{port}.{wire.BALANCER_SERVICE_TYPE}",
        addresses=[socket.inet_aton("127.0.0.1")],
        port=port,
        properties=record,
        server=f"other-{port}.local.",
    )
    try:
        await (await air.async_register_service(info))
        yield
    finally:
        await air.async_close()


async def test_announcements_that_are_no_balancers_of_this_version_are_passed_over(monkeypatch, caplog):
    monkeypatch.setattr(finding, "_LOOK_AGAIN_SECONDS", 0.1)
    caplog.set_level(logging.DEBUG, logger="worker_agent.finding")
    found = set[str]()
    async with (
        announced({"v": "99", "id": "future", "c": OURS}, 4004),
        announced({"v": str(wire.WIRE_VERSION), "c": OURS}, 4006),
        beside(balancer("ours", 4005, OURS), found_balancers(lambda: OURS, found.add, LOOPBACK)),
    ):
        await until(lambda: "wire version 99" in caplog.text and "no usable id" in caplog.text)
        await until(lambda: found)
    assert found == {"http://127.0.0.1:4005"}


async def test_a_machine_without_multicast_says_so_once_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(finding, "_LOOK_AGAIN_SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="worker_agent.finding")
    tries = 0

    def no_multicast(**_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(19, "No such device")

    monkeypatch.setattr(finding, "AsyncZeroconf", no_multicast)
    async with beside(found_balancers(lambda: OURS, lambda _: None)):
        await until(lambda: tries >= 6)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_a_balancer_for_this_machine_alone_is_announced_to_nobody(monkeypatch, host):
    async def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(announcing, "advertise", never)
    await announce(host, 4000, lambda: wire.Announced("b"))


async def test_a_balancer_says_who_it_is_and_of_which_cluster(monkeypatch):
    told: list[Presence] = []

    async def note(presence, instead: str) -> None:
        told.append(presence())
        assert "balancer cluster invite" in instead

    monkeypatch.setattr(announcing, "advertise", note)
    await announce("0.0.0.0", 4000, lambda: wire.Announced("b", OURS))
    assert told == [Presence(wire.BALANCER_SERVICE_TYPE, wire.Announced("b", OURS), "0.0.0.0", 4000)]


def test_the_address_of_a_balancer_says_how_it_is_spoken_to():
    assert balancer_url(wire.Announced("b"), "10.0.0.1", 4000) == "http://10.0.0.1:4000"
    assert balancer_url(wire.Announced("b", "", "ab" * 32), "fd00::1", 4000) == "https://[fd00::1]:4000"


@pytest.mark.parametrize(
    ("own", "theirs", "ours"), [("", OURS, True), (OURS, OURS, True), (OURS, THEIRS, False)]
)
def test_whose_balancers_are_joined(own, theirs, ours):
    assert is_ours(wire.Announced("b", theirs), own) is ours


def test_a_balancer_without_a_tag_is_not_ours_once_we_have_a_key():
    assert not is_ours(wire.Announced("b"), OURS)


# Which address is tried, on machines whose networks come and go (RELIABILITY M8d) ...


def machine(*interfaces: str):
    return tuple(ipaddress.ip_interface(one) for one in ("127.0.0.1/8", "::1/128", *interfaces))


@pytest.mark.parametrize(
    ("own", "announced", "tried"),
    [
        # only IPv6, on both sides or on one
        (("fd00::1/64", "fe80::1/64"), ("fd00::7",), ("fd00::7",)),
        (("fd00::1/64",), ("10.0.0.7", "fd00::7"), ("fd00::7", "10.0.0.7")),
        # link-local: with its scope, and after all others
        (("fe80::1/64",), ("fe80::7%eth0",), ("fe80::7%eth0",)),
        (("fe80::1/64",), ("fe80::7",), ()),
        (("fe80::1/64", "10.0.0.1/24"), ("fe80::7%eth0", "10.9.0.7"), ("10.9.0.7", "fe80::7%eth0")),
        # two machines and a cable
        (("169.254.3.1/16",), ("169.254.7.7",), ("169.254.7.7",)),
        # several networks: the one that both are in
        (("10.1.0.1/24", "10.2.0.1/24"), ("192.168.7.7", "10.2.0.7"), ("10.2.0.7", "192.168.7.7")),
        (("10.1.0.1/24", "fd00::1/64"), ("fd00::7", "10.1.0.7"), ("10.1.0.7", "fd00::7")),
        # a VPN on both sides that goes up and down
        (("10.1.0.1/24", "10.8.0.1/24"), ("10.9.0.7", "10.8.0.7"), ("10.8.0.7", "10.9.0.7")),
        (("10.1.0.1/24",), ("10.8.0.7", "10.1.0.7"), ("10.1.0.7", "10.8.0.7")),
        # a bridge with one address on many machines
        (("10.1.0.1/24", "172.17.0.1/16"), ("172.17.0.1", "10.1.0.7"), ("10.1.0.7", "172.17.0.1")),
        # this very machine
        (("10.1.0.1/24",), ("127.0.0.1", "10.1.0.1"), ("127.0.0.1", "10.1.0.1")),
    ],
)
def test_the_address_that_is_likeliest_to_work_is_tried_first(
    own: Sequence[str], announced: Sequence[str], tried: Sequence[str]
):
    assert by_reachability(announced, machine(*own)) == tuple(tried)
