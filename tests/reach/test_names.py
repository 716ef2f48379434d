"""Workers behind DNS names, with a DNS server of the test's own on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from agent.scenes import until
from hypothesis import given
from hypothesis import strategies as st

from balancer.config_file import parse
from balancer.core.model import ModelName, Worker, WorkerId
from balancer.discovery import Entry
from balancer.names import (
    KEPT_SECONDS,
    LONGEST_SECONDS,
    MAX_PLACES,
    NOTHING,
    SHORTEST_SECONDS,
    Dns,
    Found,
    Known,
    Names,
    NoAnswer,
    NotThere,
    Place,
    Source,
    learned,
    merged,
    usable,
)
from worker_agent.forgiving_json import ConfigFaults


def a_worker(name: str, url: str, kind: str = "vllm", **more: Any) -> Worker:
    return Worker(id=WorkerId(name), type=kind, url=url, **more)


HERE = Place("10.0.0.1", 8000)
VLLM = Source(
    "vllm.svc",
    8000,
    Entry(
        a_worker("x", "http://vllm.svc:8000", cap=7, only=frozenset({ModelName("m")})),
        {"Authorization": "Bearer k"},
    ),
)
AGENTS = Source("agents.svc", 4100, Entry(a_worker("x", "https://agents.svc:4100", "agent")))
SERVICES = Source("_llm-worker._tcp.lab", None, VLLM.pattern)


# What is known ...


def test_a_name_is_looked_up_when_its_records_say_and_neither_all_the_time_nor_never_again():
    for ttl, seconds in ((0, SHORTEST_SECONDS), (30, 30), (86_400, LONGEST_SECONDS)):
        assert learned(Known(), Found(frozenset({HERE}), ttl), 100.0).due == 100.0 + seconds


def test_what_is_gone_is_gone_at_once_and_what_cannot_be_asked_holds_for_a_while():
    known = learned(Known(), Found(frozenset({HERE}), 5), 0.0)
    assert learned(known, NOTHING, 10.0).places == frozenset()
    failing = learned(known, NoAnswer("no DNS server has answered"), KEPT_SECONDS - 1)
    assert failing.places == {HERE}
    assert failing.trouble
    assert learned(failing, NoAnswer("no DNS server has answered"), KEPT_SECONDS).places == frozenset()
    assert not learned(failing, Found(frozenset({HERE}), 5), KEPT_SECONDS).trouble


@given(
    st.lists(
        st.one_of(
            st.just(NoAnswer("x")),
            st.builds(
                Found, st.frozensets(st.builds(Place, st.just("10.0.0.1"), st.integers(1, 9))), st.floats(0)
            ),
        )
    )
)
def test_whatever_dns_says_a_name_is_asked_for_again(answers):
    known, now = Known(), 0.0
    for answer in answers:
        known = learned(known, answer, now)
        assert now < known.due <= now + LONGEST_SECONDS
        now = known.due


def test_what_the_room_lists_itself_comes_before_what_a_name_stands_for():
    def entry(name: str, url: str) -> Entry:
        return Entry(a_worker(name, url))

    listed = [entry("a", "http://10.0.0.1:8000"), entry("vllm.svc/10.0.0.2", "http://other:1")]
    named = [
        entry("vllm.svc/10.0.0.1", "http://10.0.0.1:8000"),
        entry("vllm.svc/10.0.0.2", "http://10.0.0.2:8000"),
        entry("vllm.svc/10.0.0.3", "http://10.0.0.3:8000"),
        entry("also.svc/10.0.0.3", "http://10.0.0.3:8000"),
    ]
    assert [one.worker.id for one in merged(listed, named)] == ["a", "vllm.svc/10.0.0.2", "vllm.svc/10.0.0.3"]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "224.0.0.251", "ff02::fb", "fe80::1", "nonsense"])
def test_no_worker_is_at_an_address_that_is_none(address):
    assert not usable(address)


# DNS ...


@dataclass
class Zone(asyncio.DatagramProtocol):
    """A DNS server."""

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    ttl: int = 5
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR
    silent: bool = False
    asked: int = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.asked += 1
        if self.silent:
            return
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        answer.set_rcode(self.rcode)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        texts = self.records.get((str(name).rstrip("."), kind), [])
        if texts and self.rcode == dns.rcode.NOERROR:
            answer.answer.append(dns.rrset.from_text_list(name, self.ttl, "IN", kind, texts))
        if not any(known == str(name).rstrip(".") for known, _ in self.records) and not self.rcode:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(max_size=65535), address)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def served(zone: Zone) -> AsyncIterator[Dns]:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: zone, local_addr=("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    resolver.lifetime = 0.5
    resolver.use_edns(0, 0, 65535)
    try:
        yield Dns(resolver)
    finally:
        transport.close()


async def test_addresses_of_both_kinds_are_found_with_the_shorter_of_their_times():
    zone = Zone({("w.svc", "A"): ["10.0.0.1", "10.0.0.2", "0.0.0.0"], ("w.svc", "AAAA"): ["fd00::1"]}, ttl=33)
    async with served(zone) as look_up:
        found = await look_up("w.svc", 8000)
    assert found == Found(
        frozenset({Place("10.0.0.1", 8000), Place("10.0.0.2", 8000), Place("fd00::1", 8000)}), 33
    )


async def test_services_are_found_with_their_ports():
    zone = Zone(
        {
            ("_w._tcp.lab", "SRV"): ["0 0 4101 a.lab.", "9 0 4102 b.lab.", "0 0 4103 gone.lab.", "0 0 1 ."],
            ("a.lab", "A"): ["10.0.0.1"],
            ("b.lab", "AAAA"): ["fd00::2"],
        }
    )
    async with served(zone) as look_up:
        found = await look_up("_w._tcp.lab", None)
        assert await look_up("_x._tcp.lab", None) == NOTHING
    assert found.places == {Place("10.0.0.1", 4101), Place("fd00::2", 4102)}


@pytest.mark.parametrize("fault", ["servfail", "refused", "silent", "gone"])
async def test_a_server_that_fails_says_nothing_of_the_name(fault):
    zone = Zone({("w.svc", "A"): ["10.0.0.1"]})
    async with served(zone) as look_up:
        if fault == "silent":
            zone.silent = True
        elif fault == "gone":
            zone._transport.close()
            await asyncio.sleep(0)
        else:
            zone.rcode = dns.rcode.from_text(fault.upper())
        for port in (8000, None):
            with pytest.raises(NoAnswer):
                await look_up("w.svc", port)


async def test_a_machine_without_a_dns_server_says_so(monkeypatch):
    def none() -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr("dns.asyncresolver.Resolver", none)
    with pytest.raises(NoAnswer, match="names no DNS server"):
        await Dns()("w.svc", 8000)


# All together ...


class Room:
    """What `Names` tells, and a clock that stands still until told."""

    def __init__(self, look_up: Dns) -> None:
        self.now = 0.0
        self.listed: tuple[Entry, ...] = ()
        self.joined: list[tuple[str, str, int]] = []
        self.agents: dict[str, str] = {}
        self.names = Names(
            look_up=look_up,
            listed=self.put,
            hello=self.hello,
            joined=lambda *what: self.joined.append(what),
            clock=lambda: asyncio.get_running_loop().time() + self.now,
        )

    def put(self, entries: tuple[Entry, ...]) -> None:
        self.listed = entries

    async def hello(self, url: str) -> str:
        if url not in self.agents:
            raise NotThere("nobody answers")
        return self.agents[url]

    @property
    def ids(self) -> list[str]:
        return [entry.worker.id for entry in self.listed]

    async def later(self, seconds: float) -> None:
        self.now += seconds
        self.names._changed.set()
        self.names._agents_changed.set()


@contextlib.asynccontextmanager
async def room(zone: Zone) -> AsyncIterator[Room]:
    async with served(zone) as look_up:
        made = Room(look_up)
        task = asyncio.ensure_future(made.names.run())
        try:
            yield made
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_servers_appear_change_and_vanish_with_their_name_and_outlive_its_server(caplog):
    zone = Zone()
    async with room(zone) as there:
        there.names.put([VLLM, SERVICES])
        await until(lambda: zone.asked >= 2)
        assert there.ids == []
        zone.records = {
            ("vllm.svc", "A"): ["10.0.0.1"],
            ("_llm-worker._tcp.lab", "SRV"): ["0 0 9000 b.lab."],
            ("b.lab", "AAAA"): ["fd00::2"],
        }
        await there.later(60)
        await until(lambda: there.ids == ["vllm.svc/10.0.0.1", "_llm-worker._tcp.lab/[fd00::2]:9000"])
        one, two = there.listed
        assert (one.worker.url, one.worker.cap, one.worker.only) == ("http://10.0.0.1:8000", 7, {"m"})
        assert one.headers == {"Authorization": "Bearer k"}
        assert two.worker.url == "http://[fd00::2]:9000"
        zone.records["vllm.svc", "A"] = ["10.0.0.2", "10.0.0.3"]
        await there.later(60)
        await until(lambda: there.ids[:2] == ["vllm.svc/10.0.0.2", "vllm.svc/10.0.0.3"])
        zone.silent = True
        await there.later(60)
        await until(lambda: "cannot be looked up" in caplog.text)
        assert len(there.ids) == 3
        assert "cannot be looked up" in caplog.text
        zone.silent = False
        del zone.records["vllm.svc", "A"]
        await there.later(60)
        await until(lambda: there.ids == ["_llm-worker._tcp.lab/[fd00::2]:9000"])
        there.names.put([])
        assert there.ids == []


async def test_agents_are_asked_who_they_are_and_are_told_of_while_their_name_has_them():
    zone = Zone({("agents.svc", "A"): ["10.0.0.1", "10.0.0.2"]})
    async with room(zone) as there:
        there.agents["https://10.0.0.1:4100"] = "a"
        there.names.put([AGENTS])
        await until(lambda: there.joined)
        there.agents["https://10.0.0.2:4100"] = "b"
        await there.later(60)
        await until(lambda: {("a", "10.0.0.1", 4100), ("b", "10.0.0.2", 4100)} <= {*there.joined})
        there.agents["https://10.0.0.1:4100"] = "a2"  # its address was given to another
        await there.later(120)
        await until(lambda: ("a2", "10.0.0.1", 4100) in there.joined)
        assert there.ids == []
        zone.records = {("agents.svc", "A"): ["10.0.0.2"]}
        await there.later(60)
        await until(lambda: len(there.names._introduced) == 1)
        there.joined.clear()
        await there.later(60)
        await until(lambda: there.joined)
        assert {agent for agent, _, _ in there.joined} == {"b"}


async def test_a_name_with_very_many_addresses_fills_no_more_than_its_share():
    many = [f"10.{a}.{b}.1" for a in range(2) for b in range(200)]
    zone = Zone({("vllm.svc", "A"): many})
    async with room(zone) as there:
        there.names.put([VLLM])
        await until(lambda: there.listed)
        assert len(there.listed) == MAX_PLACES


# In the JSON file ...


def test_names_stand_in_the_json_file_with_what_is_behind_them():
    text = """{"discover": [
        {"dns": "llm-agents.default.svc.cluster.local"},
        {"dns": "vllm.svc", "type": "vllm", "model": "m", "max_concurrent_requests": 9},
        {"srv": "_ollama._tcp.lab.example", "type": "ollama", "aliases": {"qwen": "qwen2.5:7b"}}
    ]}"""
    agents, vllm, ollama = parse(text, "f.json").discover
    assert (agents.name, agents.effective_port, agents.type) == (
        "llm-agents.default.svc.cluster.local",
        4100,
        "agent",
    )
    assert (vllm.effective_port, vllm.pattern().worker().cap) == (8000, 9)
    assert ollama.effective_port is None
    assert ollama.pattern().worker().aliases == (("qwen", "qwen2.5:7b"),)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{}", 'exactly one of "dns"'),
        ('{"dns": "a.b", "srv": "_a._tcp.b"}', 'exactly one of "dns"'),
        ('{"srv": "_a._tcp.b", "port": 80}', "SRV records tell of the port"),
        ('{"dns": "http://a.b"}', "an address with a scheme"),
        ('{"dns": "a.b", "type": "azure"}', "expected one of"),
        ('{"dns": "a.b", "model": "m"}', "an agent says this itself"),
        ('{"dns": "a.b", "api_key": {"env": "K"}}', "nothing of type agent takes a key"),
        ('{"dns": "a.b", "prot": 80}', 'did you mean "port"'),
    ],
)
def test_a_fault_of_a_name_says_where_what_and_what_instead(row, sentence):
    with pytest.raises(ConfigFaults, match=r"f\.json:1:") as caught:
        parse(f'{{"discover": [{row}]}}', "f.json")
    assert sentence in str(caught.value)
