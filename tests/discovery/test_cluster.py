"""A balancer and agents meet: who is let in, who is not, and what a stranger gets to see."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from balancer.cluster import MAX_STRANGERS, WARNINGS_AT_ONCE, Cluster, NoSuchPending, NotApproved
from balancer.core.model import Endpoint, ModelName, Probe, Ticket, Verdict, Worker, WorkerId
from balancer.keys import CannotRotate, ClusterKeys, KeyFault
from balancer.meeting import (
    NO_KEY_HELD,
    AnotherCertificate,
    IsPending,
    KeyRefused,
    NotMet,
    greeted,
    is_session_unknown,
    session_of,
)
from balancer.pins import MAX_PINS, Memory, Pins
from balancer.relay import Relay
from balancer.upstream import Answer, OtherCertificate, TimeoutPolicy, Unreachable, Upstream, Way
from tests.fakes.agent_gate import KEY as AGENT_KEY
from tests.fakes.engine import FakeEngine
from tests.fakes.met_agent import KEY, MetAgent
from worker_agent import certificate, wire
from worker_agent.handshake import Role, Transcript, cluster_tag, parse_invitation

LONG = {"limit_bytes": 1000, "seconds": 20.0}


class Room:
    """A cluster, and the agents of a test."""

    def __init__(self, upstream: Upstream, folder: Path) -> None:
        self.upstream = upstream
        self.folder = folder
        self.met: list[Worker] = []
        self.cluster = self.started()

    def started(self, key: str = KEY, former: tuple[str, ...] = ()) -> Cluster:
        """The balancer, with what it has kept on its disk."""
        memory = Memory(self.folder)
        self.cluster = Cluster(
            *(self.upstream, memory, ClusterKeys(key, former, self.folder)),
            balancer_id=memory.balancer_id(),
            pins=memory.pins(),
            clock=asyncio.get_running_loop().time,
            on_met=self.met.append,
        )
        return self.cluster

    @asynccontextmanager
    async def agent(self, agent_id: str = "a", name: str = "", **about: object) -> AsyncIterator[MetAgent]:
        async with MetAgent(agent_id, self.folder / f"agent-{name or agent_id}", **about).running() as agent:  # type: ignore[arg-type]
            yield agent


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with asyncio.timeout(60), Upstream(TimeoutPolicy()) as upstream:
        yield Room(upstream, tmp_path)


def worker(agent: MetAgent, **about: object) -> Worker:
    return Worker(id=WorkerId(agent.id), type="agent", url=agent.url, **about)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [one for one in caplog.records if one.name == "balancer.cluster"]
    return [one.getMessage() for one in told if one.levelno >= logging.WARNING]


async def echoed(room: Room, agent: MetAgent) -> Answer:
    return await room.cluster.ask(worker(agent), "POST", "/echo", b"said", **LONG)


# Those who hold the key ...


@pytest.mark.parametrize("tls", [True, False])
async def test_an_agent_with_the_key_is_met_and_answers(room, tls):
    async with room.agent(tls=tls) as agent:
        way = await room.cluster.meet(worker(agent))
        answer = await echoed(room, agent)
    assert (answer.status, answer.body) == (200, b"said")
    assert way.address.pin == (agent.fingerprint if tls else None)
    assert room.cluster.remembered == ({"a": agent.fingerprint} if tls else {})
    assert set(room.met) == {worker(agent)}


async def test_there_is_no_way_to_an_agent_that_was_not_met_where_it_is_now(room):
    async with room.agent() as agent:
        assert room.cluster.way(worker(agent)) is None
        await room.cluster.meet(worker(agent))
        moved = Worker(id=WorkerId("a"), type="agent", url="https://127.0.0.1:9")
        assert room.cluster.way(moved) is None
        assert room.cluster.way(worker(agent)) is not None


async def test_an_agent_that_was_started_again_is_met_again_within_the_same_order(room):
    async with room.agent() as agent:
        await room.cluster.meet(worker(agent))
        agent.start_again()
        assert (await echoed(room, agent)).body == b"said"


# ... and those who do not


async def test_an_agent_of_another_key_is_not_met_and_is_told_of_once(room, caplog):
    async with room.agent(key="another-key-altogether") as agent:
        for _ in range(3):
            with pytest.raises(KeyRefused, match="another cluster key"):
                await room.cluster.meet(worker(agent))
    assert (room.met, room.cluster.remembered, room.cluster.sessions) == ([], {}, ())
    (stranger,) = room.cluster.strangers
    assert (stranger.id, stranger.url, stranger.is_other_certificate) == ("a", agent.url, False)
    assert len(warnings(caplog)) == 1


async def hello_of_a(_request: web.Request) -> web.Response:
    return web.Response(body=wire.HelloAnswer(id="a", nonce="n" * 32).model_dump_json().encode())


@asynccontextmanager
async def rogue(
    folder: Path,
    prove: Callable[[wire.Proof], bytes],
    hello: Callable[[web.Request], Awaitable[web.StreamResponse]] = hello_of_a,
) -> AsyncIterator[str]:
    """Somebody who speaks the protocol, holds no key, and answers a proof as told."""
    asked: list[str] = []

    async def proven(request: web.Request) -> web.Response:
        return web.Response(body=prove(wire.parse_proof(await request.read())))

    async def anything(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    app = web.Application()
    app.router.add_post(wire.HELLO_PATH, hello)
    app.router.add_post(wire.PROVE_PATH, proven)
    app.router.add_route("*", "/{path:.*}", anything)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        context = certificate.kept(folder / "rogue.pem").server_context()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
        assert not asked, "it was asked something before it had proved anything"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "prove",
    [
        lambda _: wire.ProofAnswer(proof="0" * 64).model_dump_json().encode(),
        lambda proof: wire.ProofAnswer(proof=proof.proof).model_dump_json().encode(),  # ours, handed back
        lambda _: b"{}",
        lambda _: b"\xff" * 1000,
    ],
)
async def test_a_rogue_worker_gets_nothing(room, prove):
    async with rogue(room.folder, prove) as url:
        with pytest.raises(NotMet, match=NO_KEY_HELD):
            await room.cluster.meet(Worker(id=WorkerId("a"), type="agent", url=url))
    assert (room.met, room.cluster.remembered, room.cluster.sessions) == ([], {}, ())


async def test_whoever_has_taken_an_agents_id_is_refused_until_it_is_forgotten(room):
    async with room.agent() as agent:
        await room.cluster.meet(worker(agent))
    room.started()  # it is remembered over a restart
    async with room.agent(name="second") as second:
        with pytest.raises(AnotherCertificate, match="balancer cluster forget a"):
            await room.cluster.meet(worker(second))
        assert second.asked == []  # nothing was said to it at all
        (stranger,) = room.cluster.strangers
        assert stranger.is_other_certificate
        assert await room.cluster.forget("a")
        assert room.cluster.strangers == ()
        await room.cluster.meet(worker(second))
        assert room.cluster.remembered == {"a": second.fingerprint}
    assert not await room.cluster.forget("nobody")


@asynccontextmanager
async def in_between(folder: Path, agent: MetAgent) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A relay that ends TLS with a certificate of its own, and reads all that passes."""
    read: list[bytes] = []

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            read.append(data)
            sink.write(data)
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_agent = ssl.create_default_context()
        to_agent.check_hostname, to_agent.verify_mode = False, ssl.CERT_NONE
        with closing(writer):
            inner, outer = await asyncio.open_connection("127.0.0.1", agent.port, ssl=to_agent)
            with closing(outer):
                await asyncio.gather(carry(reader, outer), carry(inner, writer), return_exceptions=True)

    context = certificate.kept(folder / "between.pem").server_context()
    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", read


async def test_one_in_between_with_a_certificate_of_his_own_gets_no_session(room):
    async with room.agent() as agent, in_between(room.folder, agent) as (url, read):
        between = Worker(id=WorkerId("a"), type="agent", url=url)
        with pytest.raises(NotMet):
            await room.cluster.meet(between)
        assert room.cluster.sessions == ()
        assert KEY.encode() not in b"".join(read)
        assert agent.gate.wrong_proofs == 1  # the balancer proved for another certificate than the agent's
        # Once the agent was met, the one in between gets not even a hello.
        await room.cluster.meet(worker(agent))
        read.clear()
        with pytest.raises(AnotherCertificate):
            await room.cluster.meet(between)
        assert read == []


async def test_a_session_is_sent_to_nobody_but_who_was_met(room):
    async with room.agent() as agent:
        way = await room.cluster.meet(worker(agent))
    async with room.agent("b", port=agent.port) as other:
        with pytest.raises(OtherCertificate):
            await room.upstream.ask(way.address, "POST", "/echo", way.headers, b"", **LONG)
        assert other.asked == []


async def test_an_answer_that_was_recorded_is_worth_nothing(room):
    """Every meeting has nonces of its own."""
    said: list[bytes] = []
    async with room.agent() as agent:
        ask = room.upstream.ask

        async def listened(*args: object, **more: object) -> Answer:
            answer: Answer = await ask(*args, **more)
            said.append(answer.body)
            return answer

        room.upstream.ask = listened
        await room.cluster.meet(worker(agent))
        room.upstream.ask = ask
    recorded = iter(said)

    async def replayed(*_args: object, **_more: object) -> Answer:
        return Answer(200, {}, next(recorded), agent.fingerprint)

    room.upstream.ask = replayed
    with pytest.raises(NotMet, match=NO_KEY_HELD):
        await room.cluster.meet(worker(agent))


async def test_who_speaks_no_tls_is_told_of_with_what_to_do(room):
    async with room.agent(tls=False) as agent:
        secure = Worker(id=WorkerId("a"), type="agent", url=agent.url.replace("http:", "https:"))
        with pytest.raises(NotMet, match='"tls": false'):
            await room.cluster.meet(secure)


async def test_a_flood_of_strangers_stays_within_bounds(room, caplog):
    async with room.agent(key="another-key-altogether") as agent:
        for number in range(MAX_STRANGERS + 10):
            with pytest.raises(NotMet):
                await room.cluster.meet(Worker(id=WorkerId(f"n{number}"), type="agent", url=agent.url))
    assert len(room.cluster.strangers) == MAX_STRANGERS
    assert len(warnings(caplog)) == WARNINGS_AT_ONCE


# Letting in by a code ...


async def test_an_agent_without_a_key_waits_and_is_let_in_by_its_code(room):
    async with room.agent(key=None) as agent:
        with pytest.raises(IsPending, match="balancer workers approve a CODE"):
            await room.cluster.meet(worker(agent))
        assert (room.met, room.cluster.sessions) == ([], ())
        (waiting,) = room.cluster.pending
        assert (waiting.id, waiting.url, waiting.fingerprint) == ("a", agent.url, agent.fingerprint)
        code = await agent.code()
        with pytest.raises(NotApproved, match="does not show this code"):
            await room.cluster.approve("a", "22222222")
        assert agent.held_key is None
        with pytest.raises(NoSuchPending, match="these do: a"):
            await room.cluster.approve("b", code)
        await room.cluster.approve("a", code.lower().replace("-", " "))
        assert agent.held_key == KEY
        assert room.cluster.pending == ()
        assert [one.id for one in room.met] == ["a"]
        assert (await echoed(room, agent)).body == b"said"


async def test_the_key_is_not_given_over_a_connection_that_others_can_read(room):
    async with room.agent(key=None, tls=False) as agent:
        with pytest.raises(IsPending):
            await room.cluster.meet(worker(agent))
        with pytest.raises(NotApproved, match="no TLS"):
            await room.cluster.approve("a", await agent.code())
        assert agent.asked == [wire.HELLO_PATH]


# ... and the key changed


async def test_a_new_key_reaches_who_is_here_and_who_comes_back(room):
    async with room.agent("here") as here, room.agent("away") as away:
        for agent in (here, away):
            await room.cluster.meet(worker(agent))
    async with room.agent("here", port=here.port) as here:
        await room.cluster.meet(worker(here))
        outcomes = await room.cluster.rotate()
        fresh = room.cluster.key
        assert fresh != KEY
        assert outcomes["here"] == "has the new key"
        assert "when it is next met" in outcomes["away"]
        assert here.held_key == fresh
        assert (await echoed(room, here)).body == b"said"  # nothing was cut
        assert room.cluster.tags == {cluster_tag(fresh), cluster_tag(KEY)}
    assert (room.folder / "cluster_key").read_text().strip() == fresh
    assert (room.folder / "cluster_keys_former").read_text().split() == [KEY]
    room.started(fresh, (KEY,))
    async with room.agent("away", key=None, port=away.port) as away:  # with the key that it has kept
        assert away.held_key == KEY
        await room.cluster.meet(worker(away))
        assert away.held_key == fresh


async def test_a_former_key_opens_nothing_for_who_was_never_met(room):
    room.started("the-key-that-holds-now", (KEY,))
    async with room.agent() as agent:
        with pytest.raises(KeyRefused):
            await room.cluster.meet(worker(agent))
        assert agent.held_key == KEY


async def test_a_machine_that_is_removed_and_forgotten_gets_no_new_key(room):
    """How the machine of somebody who leaves is put out: it holds a key that held once, and no more."""
    async with room.agent() as agent, room.agent("b") as other:
        for one in (agent, other):
            await room.cluster.meet(worker(one))
        room.cluster.gone(WorkerId("a"))  # as `balancer remove` does
        assert await room.cluster.forget("a")
        assert await room.cluster.rotate() == {"b": "has the new key"}
        with pytest.raises(KeyRefused):
            await room.cluster.meet(worker(agent))
        assert (agent.held_key, other.held_key) == (KEY, room.cluster.key)
        assert "a" not in room.cluster.remembered


async def test_a_key_of_the_settings_is_not_changed(room):
    room.cluster._keys = ClusterKeys(KEY)
    with pytest.raises(CannotRotate, match="the settings give"):
        await room.cluster.rotate()
    assert room.cluster.key == KEY


async def test_an_invitation_holds_what_a_machine_needs(room):
    invitation = parse_invitation(room.cluster.invitation(["192.168.1.10:4000"]))
    assert (invitation.key, invitation.balancers) == (KEY, ("192.168.1.10:4000",))


# Requests go within the session


def relay_to(room: Room) -> Relay:
    async def meet(worker: Worker, refused: Way | None) -> Way:
        try:
            return await room.cluster.met(worker, refused)
        except NotMet as error:
            raise Unreachable(str(error)) from error

    return Relay(room.upstream, asyncio.get_running_loop().time, room.cluster.way, meet)


def probe_of(engine: FakeEngine, number: int = 1) -> Probe:
    agent = Worker(id=WorkerId("a"), type="agent", url=engine.url)
    return Probe(Ticket(number), agent, Endpoint.CHAT, ModelName("fake"))


async def test_a_request_meets_whom_it_needs_and_nothing_is_looked_at_without_a_session(room):
    """Not met, met, started again, of another key."""
    room.started(AGENT_KEY)
    async with FakeEngine(agent_id="a") as engine:
        relay = relay_to(room)
        for _ in range(2):
            assert (await relay.probe(probe_of(engine))).verdict is Verdict.GOOD
            engine.gate.forget()
        arrived = len(engine.requests)
        engine.gate.key = "a-key-that-nobody-else-has"
        assert (await relay.probe(probe_of(engine))).unreachable
        assert len(engine.requests) == arrived == 2
        assert room.cluster.sessions == ()


async def test_all_requests_to_an_agent_that_was_started_again_share_one_meeting(room):
    room.started(AGENT_KEY)
    async with FakeEngine(agent_id="a", slots=20) as engine:
        relay = relay_to(room)
        await room.cluster.met(probe_of(engine).worker)
        engine.gate.forget()
        hellos = engine.gate.hellos
        ended = await asyncio.gather(*(relay.probe(probe_of(engine, number)) for number in range(20)))
        assert {one.verdict for one in ended} == {Verdict.GOOD}
        assert engine.gate.hellos == hellos + 1


async def test_whoever_leaves_a_meeting_leaves_it_to_the_others_and_the_last_one_ends_it(room):
    reached, answers = asyncio.Event(), asyncio.Event()

    async def hello(request: web.Request) -> web.StreamResponse:
        reached.set()
        await answers.wait()
        return await hello_of_a(request)

    async with rogue(room.folder, lambda _: b"{}", hello) as url:
        there = Worker(id=WorkerId("a"), type="agent", url=url)
        first, second = (asyncio.ensure_future(room.cluster.met(there)) for _ in range(2))
        await reached.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        (meeting,) = room.cluster._meetings.values()
        assert not meeting.task.cancelled()
        second.cancel()
        await asyncio.sleep(0)
        answers.set()  # whoever comes next has a meeting of his own
        with pytest.raises(NotMet, match=NO_KEY_HELD):
            await room.cluster.met(there)
        await asyncio.gather(second, meeting.task, return_exceptions=True)
        assert meeting.task.cancelled()
        assert room.cluster._meetings == {}


async def test_an_agent_is_in_the_room_and_remembered_although_who_met_it_has_left_before_the_disk_did(
    room, monkeypatch
):
    """A watch has its patience, and a disk may need longer than that."""
    writes, goes_on = asyncio.Event(), threading.Event()
    loop, keep = asyncio.get_running_loop(), Memory.keep

    def slowly(memory: Memory, pins: bytes) -> None:
        loop.call_soon_threadsafe(writes.set)
        goes_on.wait(20)
        keep(memory, pins)

    monkeypatch.setattr(Memory, "keep", slowly)
    async with room.agent() as agent:
        meeting = asyncio.ensure_future(room.cluster.met(worker(agent)))
        await writes.wait()
        meeting.cancel()
        await asyncio.gather(meeting, return_exceptions=True)
        assert room.met == [worker(agent)]
        assert room.cluster.way(worker(agent)) is not None
        goes_on.set()
        await room.cluster.forget("nobody")
        while Memory(room.folder).pins().of("a") is None:
            await asyncio.sleep(0.005)


async def test_a_rotation_comes_to_its_end_although_who_asked_for_it_has_left(room, monkeypatch):
    held = asyncio.Event()
    give = Cluster._give_key

    async def slowly(cluster: Cluster, way: Way, key: str) -> None:
        await held.wait()
        await give(cluster, way, key)

    monkeypatch.setattr(Cluster, "_give_key", slowly)
    async with room.agent() as agent:
        await room.cluster.met(worker(agent))
        rotation = asyncio.ensure_future(room.cluster.rotate())
        while room.cluster.key == KEY:
            await asyncio.sleep(0.005)
        rotation.cancel()
        await asyncio.gather(rotation, return_exceptions=True)
        held.set()
        while agent.held_key != room.cluster.key:
            await asyncio.sleep(0.005)
        assert (room.folder / "cluster_key").read_text().strip() == room.cluster.key


async def test_two_agents_of_one_id_that_are_met_at_the_same_time_are_not_both_let_in(room):
    async with room.agent(name="one") as one, room.agent(name="other") as other:
        results = await asyncio.gather(
            *(room.cluster.meet(worker(agent)) for agent in (one, other)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, AnotherCertificate)]
        (met,) = (result for result in results if isinstance(result, Way))
        assert len(refused) == 1
        assert room.cluster.remembered == {"a": met.address.pin}
        assert [session.fingerprint for session in room.cluster.sessions] == [met.address.pin]


# What agents answer: pure ...

TRANSCRIPT = Transcript("b", "a", "x" * 32, "y" * 32, "f" * 64, wire.WIRE_VERSION)
ANYTHING = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=80),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=10,
    ).map(orjson.dumps),
    st.fixed_dictionaries(
        {
            "id": st.text(max_size=200),
            "nonce": st.text(max_size=200),
            "by": st.sampled_from(["key", "code", "x"]),
        }
    ).map(lambda fields: orjson.dumps(fields, option=orjson.OPT_PASSTHROUGH_SUBCLASS)),
    st.fixed_dictionaries({"proof": st.text("0123456789abcdef", min_size=60, max_size=66)}).map(orjson.dumps),
)


@given(st.integers(100, 599), ANYTHING)
def test_whatever_somebody_answers_is_a_sentence_and_never_a_session(status, body):
    answer = Answer(status, {}, body, "f" * 64)
    hello = wire.Hello(balancer="b", nonce="x" * 32)
    try:
        greeting = greeted(hello, answer)
    except NotMet as refused:
        assert str(refused).isprintable()
    else:
        assert greeting.transcript.fingerprint == "f" * 64
        assert greeting.transcript.agent.isprintable()
    with pytest.raises(NotMet) as caught:
        session_of(TRANSCRIPT, b"k" * 32, answer)
    assert str(caught.value).isprintable()
    is_session_unknown(status, body)


def test_the_right_proof_is_a_session_and_the_same_for_another_certificate_is_none():
    proof = wire.ProofAnswer(proof=TRANSCRIPT.proof(b"k" * 32, Role.AGENT)).model_dump_json().encode()
    answer = Answer(200, {}, proof, "f" * 64)
    assert session_of(TRANSCRIPT, b"k" * 32, answer) == TRANSCRIPT.session(b"k" * 32)
    other = Transcript("b", "a", "x" * 32, "y" * 32, "e" * 64, wire.WIRE_VERSION)
    with pytest.raises(NotMet, match=NO_KEY_HELD):
        session_of(other, b"k" * 32, answer)


# What is kept ...


def test_pins_bind_once_and_forget_the_one_that_was_met_longest_ago():
    pins = Pins()
    assert pins.bind("a", "1" * 64)
    assert not pins.bind("a", "1" * 64)
    with pytest.raises(ValueError):
        pins.bind("a", "2" * 64)
    for number in range(MAX_PINS - 1):
        pins.bind(f"n{number}", "3" * 64)
    pins.bind("a", "1" * 64)  # met again
    pins.bind("one more", "4" * 64)
    assert len(pins) == MAX_PINS
    assert (pins.of("a"), pins.of("n0"), pins.of("one more")) == ("1" * 64, None, "4" * 64)
    assert Pins.from_json(pins.to_json()).all() == pins.all()


@pytest.mark.parametrize("held", [b"", b"[]", b'{"agents": {}}', b'{"version": 1, "agents": {"a": "short"}}'])
def test_a_list_of_agents_that_is_broken_is_no_empty_one(tmp_path, held):
    path = tmp_path / "known_agents"
    path.write_bytes(held)
    path.chmod(0o600)
    with pytest.raises(KeyFault, match="known_agents cannot be used"):
        Memory(tmp_path).pins()


def test_what_is_kept_is_for_our_own_eyes_and_found_again(tmp_path):
    memory = Memory(tmp_path)
    balancer = memory.balancer_id()
    memory.keep(Pins({"a": "1" * 64}).to_json())
    assert Memory(tmp_path).balancer_id() == balancer
    assert Memory(tmp_path).pins().all() == {"a": "1" * 64}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_only_so_many_former_keys_are_kept():
    keys = ClusterKeys("key-0")
    for number in range(1, 6):
        keys = keys.followed_by(f"key-{number}")
    assert (keys.current, keys.former) == ("key-5", ("key-4", "key-3", "key-2"))
