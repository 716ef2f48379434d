"""Reaching machines as the network doctor does: real connections on loopback, to a real agent's gate."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from worker_agent import certificate, handshake
from worker_agent.cluster_key import ClusterKey
from worker_agent.contacts import (
    Calling,
    Meeting,
    NoAddress,
    Target,
    asked_target,
    heard_targets,
    is_listed,
    own_addresses,
    own_port,
    reach,
    target_of,
)
from worker_agent.exchange import Refused
from worker_agent.findings import Announced, Contact, Interface, Kind, Known, PortState, Proof, Who
from worker_agent.gate import Gate
from worker_agent.multicast import properties

KEY, OTHER_KEY = "a key of thirty-two characters 00", "a key of thirty-two characters 11"


@asynccontextmanager
async def serving(app: web.Application, tls: certificate.Certificate | None = None) -> AsyncIterator[int]:
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=None if tls is None else tls.server_context())
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@web.middleware
async def refusing(request, handler):
    try:
        return await handler(request)
    except Refused as refused:
        return refused.response()


@pytest.fixture
def own(tmp_path: Path) -> certificate.Certificate:
    return certificate.kept(tmp_path / "certificate.pem")


@asynccontextmanager
async def agent(own: certificate.Certificate, key: str | None = KEY) -> AsyncIterator[tuple[int, Gate]]:
    gate = Gate("studio", ClusterKey(key, None), own.fingerprint)
    app = web.Application(middlewares=[refusing])
    app.add_routes(gate.routes())
    async with serving(app, own) as port:
        yield port, gate


def at(port: int, who: Who = Who.WORKER) -> Target:
    return Target(who, "there", "127.0.0.1", port, Known.GIVEN, tls=who is Who.WORKER)


async def test_an_agent_that_holds_the_key_shows_it(own):
    async with agent(own) as (port, gate):
        contact = await reach(at(port), Meeting(KEY))
        assert (contact.name, contact.speaks, contact.proof) == ("studio", True, Proof.RIGHT)
        assert len(contact.connect_seconds) == 5
        assert contact.source == "127.0.0.1"
        assert contact.clock_ahead_seconds is not None
        assert abs(contact.clock_ahead_seconds) < 60
        assert gate.wrong_proofs == 0


async def test_an_agent_with_another_key_is_told_of(own):
    async with agent(own, OTHER_KEY) as (port, _):
        contact = await reach(at(port), Meeting(KEY))
        assert (contact.speaks, contact.proof) == (True, Proof.WRONG)
        assert "another cluster key" in contact.said


async def test_no_proof_is_spent_on_an_agent_that_shows_a_code(own):
    async with agent(own, None) as (port, gate):
        contact = await reach(at(port), Meeting(KEY))
        assert (contact.by_code, contact.proof) == (True, Proof.NOT_TRIED)
        assert gate.wrong_proofs == 0


async def test_no_proof_is_given_to_another_certificate_than_the_known_one(own):
    async with agent(own) as (port, _):
        known = Meeting(KEY, {"studio": own.fingerprint})
        assert (await reach(at(port), known)).proof is Proof.RIGHT
        contact = await reach(at(port), Meeting(KEY, {"studio": "0" * 64}))
        assert (contact.is_other_certificate, contact.proof) == (True, Proof.NOT_TRIED)


async def test_an_agent_without_tls_is_met_without(tmp_path):
    gate = Gate("studio", ClusterKey(KEY, None), handshake.PLAIN)
    app = web.Application(middlewares=[refusing])
    app.add_routes(gate.routes())
    async with serving(app) as port:
        plain = await reach(replace(at(port), tls=False), Meeting(KEY))
        assert plain.proof is Proof.RIGHT
        wrongly = await reach(at(port), Meeting(KEY))
        assert (wrongly.speaks, wrongly.said) == (False, "it does not speak TLS there")


async def test_another_program_is_not_taken_for_an_agent():
    async with serving(web.Application()) as port:
        contact = await reach(replace(at(port), tls=False), Meeting(KEY))
        assert contact.is_reached
        assert not contact.speaks
        contact = await reach(at(port, Who.BALANCER), Calling(""))
        assert not contact.speaks
        server = await reach(replace(at(port), tls=False, is_agent=False), Meeting(KEY))
        assert (server.speaks, server.announces) == (True, False)


async def test_nobody_is_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        contact = await reach(at(unused.getsockname()[1]), Meeting(None))
    assert (contact.is_reached, contact.error, contact.peer) == (False, "ECONNREFUSED", "127.0.0.1")
    unnamed = await reach(replace(at(1), host="a..b"), Meeting(None))
    assert unnamed.addresses == ()


def balancer(status: int = 200, *agents: str) -> web.Application:
    async def ready(_request):
        return web.json_response({"ready": status == 200}, status=status)

    async def room(_request):
        return web.json_response({"workers": [{"id": one} for one in agents]})

    async def join(_request):
        return web.json_response(
            {"error": {"message": "This is not a join: id: Field required."}}, status=400
        )

    app = web.Application()
    app.add_routes([web.get("/readyz", ready), web.get("/health", room), web.post("/cluster/v1/join", join)])
    return app


async def test_a_balancer_says_whether_it_lists_this_machines_agent():
    async def called(app: web.Application, agent_id: str) -> Contact:
        async with serving(app) as port:
            return await reach(at(port, Who.BALANCER), Calling(agent_id))

    assert (await called(balancer(200, "studio"), "studio")).listed is True
    without = await called(balancer(503, "other"), "studio")
    assert (without.speaks, without.listed) == (True, False)
    assert (await called(balancer(), "")).listed is None
    assert is_listed(b'{"error": {}}', "studio") is None
    assert is_listed(b"<html>", "studio") is None


async def test_a_balancer_of_another_version_or_that_refuses_us():
    async def elsewhere(_request):
        return web.json_response({"error": {"message": "not from here"}}, status=403)

    async def older(_request):
        return web.json_response({"error": {"message": "it speaks wire version 2, this side 1"}}, status=400)

    async def ready(_request):
        return web.json_response({"ready": True})

    app = web.Application()
    app.add_routes([web.get("/readyz", elsewhere)])
    async with serving(app) as port:
        contact = await reach(at(port, Who.BALANCER), Calling(""))
        assert (contact.refused, contact.said) == (True, "not from here")
    app = web.Application()
    app.add_routes([web.get("/readyz", ready), web.post("/cluster/v1/join", older)])
    async with serving(app) as port:
        contact = await reach(at(port, Who.BALANCER), Calling(""))
        assert (contact.speaks, contact.said) == (False, "it speaks wire version 2, this side 1")


async def test_what_answers_without_an_end_is_left_in_time(monkeypatch):
    monkeypatch.setattr("worker_agent.contacts.CONTACT_SECONDS", 0.2)
    never = asyncio.Event()

    async def hang(_request):
        await never.wait()

    app = web.Application()
    app.add_routes([web.get("/readyz", hang)])
    async with serving(app) as port:
        contact = await reach(at(port, Who.BALANCER), Calling(""))
        never.set()
    assert (contact.is_reached, contact.speaks) == (True, False)
    assert "no answer within" in contact.said


async def test_our_own_port_is_told_from_anothers(own):
    loopback = (Interface("lo", Kind.LOOPBACK, True, ("127.0.0.1/8",)),)
    async with agent(own) as (port, _):
        found, agent_id = await own_port("127.0.0.1", port, loopback, Meeting(None), who=Who.WORKER, tls=True)
        assert agent_id == "studio"
        assert found.states["127.0.0.1"] is PortState.OURS
    async with serving(web.Application()) as port:
        found, _ = await own_port("127.0.0.1", port, loopback, Calling(""), who=Who.BALANCER, tls=False)
        assert found.states["127.0.0.1"] is PortState.STRANGER


def test_where_something_should_listen():
    lan = (Interface("eth0", Kind.CABLE, True, ("10.0.0.5/24",)), Interface("docker0", Kind.BRIDGE, True))
    assert own_addresses("0.0.0.0", lan) == ("127.0.0.1", "10.0.0.5")
    assert own_addresses("127.0.0.1", lan) == ("127.0.0.1", "10.0.0.5"), "loopback alone is of no use"
    assert own_addresses("10.0.0.5", lan) == ("10.0.0.5",)
    only_ipv6 = (Interface("eth0", Kind.CABLE, True, ("2001:db8::5/64", "fe80::5/64")),)
    assert own_addresses("::", only_ipv6) == ("::1", "2001:db8::5")


def test_urls_and_announcements_become_targets():
    target = target_of("https://10.0.0.9:4100", Who.WORKER, Known.LISTED, name="studio")
    assert target == Target(Who.WORKER, "studio", "10.0.0.9", 4100, Known.LISTED)
    assert target_of("tunnel://studio", Who.WORKER, Known.LISTED) is None
    assert target_of("http://host:99999", Who.WORKER, Known.LISTED) is None
    heard = (
        Announced(Who.WORKER, "studio", "10.0.0.9", 4100),
        Announced(Who.WORKER, "mini", "10.0.0.7", 4100),
        Announced(Who.WORKER, "old", "10.0.0.8", 4100, fault="wire version 1"),
        Announced(Who.BALANCER, "hub", "10.0.0.1", 4000),
    )
    assert [one.name for one in heard_targets(heard, Who.WORKER, [target])] == ["mini"]


async def test_a_balancer_that_is_heard_to_speak_tls_is_asked_by_it(own):
    async with serving(balancer(200, "studio"), own) as port:
        heard = (Announced(Who.BALANCER, "hub", "127.0.0.1", port, fingerprint=own.fingerprint),)
        (target,) = heard_targets(heard, Who.BALANCER, [])
        contact = await reach(target, Calling("studio"))
    assert (contact.name, contact.speaks, contact.listed) == ("hub", True, True)
    assert contact.url == f"https://127.0.0.1:{port}", "as it is to be joined"


@pytest.mark.parametrize(
    ("typed", "who", "asked"),
    [
        ("10.77.0.99", Who.BALANCER, "http://10.77.0.99:4000"),
        ("10.77.0.99", Who.WORKER, "https://10.77.0.99:4100"),
        ("studio.local:4200", Who.WORKER, "https://studio.local:4200"),
        ("fd00::9", Who.BALANCER, "http://[fd00::9]:4000"),
        ("[fd00::9]:4001", Who.BALANCER, "http://[fd00::9]:4001"),
        ("https://hub", Who.BALANCER, "https://hub:443"),
        (" http://hub:4000/v1 ", Who.BALANCER, "http://hub:4000"),
    ],
)
def test_an_address_is_enough_for_the_doctor(typed, who, asked):
    target = asked_target(typed, who)
    assert (target.url, target.name, target.who, target.known) == (asked, asked, who, Known.GIVEN)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "::rubbish",
        "http://",
        "ftp://10.0.0.9",
        "tunnel://studio",
        "a b",
        "a..b",
        "10.0.0.9:99999",
        "hub:0",
    ],
)
@pytest.mark.parametrize("who", list(Who))
def test_what_is_no_address_is_told_so(typed, who):
    with pytest.raises(NoAddress, match=f"is no address of a {who.value}: name it like http"):
        asked_target(typed, who)


def test_a_txt_record_is_read_as_it_is_written():
    strings = [f"{name}={value}".encode() for name, value in {"v": "2", "id": "studio"}.items()]
    text = b"".join(bytes([len(one)]) + one for one in strings)
    assert properties(text) == {b"v": b"2", b"id": b"studio"}
    assert properties(b"\x04flag\x00\x03a=b\x03A=c") == {b"flag": None, b"a": b"b", b"A": b"c"}
    assert properties(b"\xffcut") == {b"cut": None}
    assert properties(b"") == {}
