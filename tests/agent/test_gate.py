"""Who is let in: balancers that hold the key, or the code that is shown, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.meeting import AGENT, BALANCER, KEY, Met, gate_with, met
from agent.scenes import until
from worker_agent import cluster_key, handshake, wire
from worker_agent.changes import Changes
from worker_agent.cluster_key import ClusterKey
from worker_agent.gate import Challenges, Gate, GatePolicy, Sessions
from worker_agent.gateway import Gateway
from worker_agent.handshake import NONCE_SECONDS, PLAIN, Role, Transcript
from worker_agent.server import ServerPolicy, listening
from worker_agent.wire import EngineState, Report

SECRET = "sixteen-and-more-of-a-secret"


class NoModels:
    """An agent whose models must never be asked: nobody who may comes here."""

    running = 0
    names = ()

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"a stranger came as far as the models: {name}")


@dataclass
class Scene:
    gate: Gate
    url: str
    client: aiohttp.ClientSession

    def balancer(self, key: str = KEY, name: str = BALANCER) -> Met:
        return Met(self.client, self.url, handshake.key_bytes(key), balancer=name)

    async def status(self, session: str) -> int:
        async with self.client.get(
            self.url + wire.REPORT_PATH, headers={wire.SESSION_HEADER: session}
        ) as answer:
            return answer.status


@contextlib.asynccontextmanager
async def scene_of(gate: Gate) -> AsyncIterator[Scene]:
    def report() -> Report:
        return Report(
            id=AGENT, state=EngineState.STARTING, engine="fake", slots=2, hardware="a secret machine"
        )

    gateway = Gateway(NoModels(), report, Changes(), gate)  # type: ignore[arg-type]
    async with (
        listening(gateway.application(), "127.0.0.1", 0, ServerPolicy()) as server,
        aiohttp.ClientSession() as client,
    ):
        yield Scene(gate, f"http://127.0.0.1:{server.port}", client)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with scene_of(gate_with()) as made:
        yield made


# Those who hold the key ...


async def test_a_balancer_that_holds_the_key_is_let_in_and_the_agent_proves_it_too(scene: Scene) -> None:
    balancer = await met(scene.client, scene.url)
    assert await scene.status(balancer.session) == 200


async def test_the_first_that_is_said_of_an_agent_is_its_id_and_what_it_wants_to_be_shown(
    scene: Scene,
) -> None:
    hello = await scene.balancer().hello()
    assert (hello.id, hello.by) == (AGENT, wire.ProvenBy.KEY)


async def test_a_balancer_that_comes_back_is_known_by_its_new_session_and_a_little_by_its_last(
    scene: Scene,
) -> None:
    first = await scene.balancer().meet()
    second = await scene.balancer().meet()
    assert first != second
    assert [await scene.status(session) for session in (first, second)] == [200, 200]


# ... and all others.


@pytest.mark.parametrize(
    "change",
    [
        lambda said: replace(said, fingerprint="ab" * 32),
        lambda said: replace(said, agent="another"),
        lambda said: replace(said, balancer="another"),
        lambda said: replace(said, balancer_nonce="n" * 32),
        lambda said: replace(said, wire=1),
    ],
    ids=["another certificate", "another agent", "another balancer", "another nonce", "another version"],
)
async def test_a_proof_of_anything_else_is_none(scene: Scene, change: object) -> None:
    balancer = scene.balancer()
    said = balancer.transcript(await balancer.hello())
    proof = change(said).proof(balancer.key, Role.BALANCER)  # type: ignore[operator]
    status, answer = await balancer.prove(said, proof)
    assert status == 403
    assert answer["error"]["code"] == "cluster_key_wrong"  # type: ignore[index]
    assert await scene.status(said.session(balancer.key)) == 401
    assert scene.gate.wrong_proofs == 1


async def test_an_agents_proof_cannot_be_handed_back_to_it(scene: Scene) -> None:
    balancer = scene.balancer()
    said = balancer.transcript(await balancer.hello())
    status, _ = await balancer.prove(said, said.proof(balancer.key, Role.AGENT))
    assert status == 403


async def test_another_key_is_refused_and_tells_nothing_of_ours(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    balancer = scene.balancer(key=SECRET)
    said = balancer.transcript(await balancer.hello())
    for _ in range(20):
        status, answer = await balancer.prove(said)
        assert status == 403
    assert "proof" not in answer
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # not one for each
    for secret in (KEY, SECRET, said.proof(balancer.key, Role.BALANCER)):
        assert secret not in caplog.text


async def test_a_handshake_that_was_overheard_is_good_for_nothing(scene: Scene) -> None:
    balancer = scene.balancer()
    said = balancer.transcript(await balancer.hello())
    assert (await balancer.prove(said))[0] == 200
    status, answer = await balancer.prove(said)
    assert (status, answer["error"]["code"]) == (403, "nonce_unknown")  # type: ignore[index]


async def test_who_asks_for_nonces_without_end_pushes_nobodys_out(scene: Scene) -> None:
    balancer = scene.balancer()
    said = balancer.transcript(await balancer.hello())
    flood = scene.balancer(key=SECRET, name="flood")
    for _ in range(300):
        await flood.hello()
    assert (await balancer.prove(said))[0] == 200


async def test_what_is_no_message_is_told_what_is_wrong_with_it(scene: Scene) -> None:
    stranger = scene.balancer()
    for path in (wire.HELLO_PATH, wire.PROVE_PATH):
        for body, status in (
            (b"", 400),
            (b"[]", 400),
            (b'{"wire": 1}', 400),
            (b'{"balancer": "x", "nonce": "short"}', 400),
            (b'{"balancer": "a\\nb", "nonce": "' + b"n" * 32 + b'"}', 400),
            (b" " * 65537, 413),
        ):
            got, answer = await stranger.post(path, body)
            assert (got, "error" in answer) == (status, True)


PATHS = (
    *(wire.REPORT_PATH, wire.MODELS_PATH, wire.KEY_PATH, *wire.INFERENCE_PATHS),
    *(f"{wire.MODELS_PATH}/{word}" for word in ("load", "unload", "delete", "download", "cancel")),
    *("/", "/metrics", "/v1/models", "/agent/v1/hello/", "/agent/v1/../v1/report", "//agent/v1/report"),
)


@pytest.mark.parametrize("path", PATHS)
async def test_a_stranger_is_refused_on_every_route_by_every_method(scene: Scene, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        async with scene.client.request(
            method, scene.url + path, data=b"{}" if method == "POST" else None
        ) as got:
            assert got.status == 401, (method, path)


@pytest.mark.parametrize("path", [wire.HELLO_PATH, wire.PROVE_PATH])
async def test_also_the_open_routes_are_open_by_one_method_only(scene: Scene, path: str) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        async with scene.client.request(method, scene.url + path) as answer:
            assert answer.status == 401


async def test_a_stranger_learns_of_an_agents_health_whether_it_would_serve_and_no_more(scene: Scene) -> None:
    async with scene.client.get(scene.url + "/health") as answer:
        assert (answer.status, await answer.json()) == (503, {"status": "starting"})
    balancer = await met(scene.client, scene.url)
    async with scene.client.get(scene.url + "/health", headers=balancer.headers) as answer:
        assert (answer.status, (await answer.json())["hardware"]) == (503, "a secret machine")


async def test_a_body_is_not_waited_for_before_a_stranger_is_refused(scene: Scene) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(scene.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000000\r\n\r\n{"
    )
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 401")
    writer.close()


# What is remembered ...

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=30)
TRANSCRIPTS = st.builds(
    Transcript,
    balancer=WORDS,
    agent=WORDS,
    balancer_nonce=WORDS,
    agent_nonce=WORDS,
    fingerprint=st.sampled_from(["ab" * 32, "cd" * 32, PLAIN]),
    wire=st.integers(1, 3),
)


@given(TRANSCRIPTS, TRANSCRIPTS, st.sampled_from(Role), st.sampled_from(Role))
def test_a_proof_holds_for_what_was_said_by_whom_and_for_nothing_else(
    said: Transcript, other: Transcript, role: Role, another: Role
) -> None:
    key = handshake.key_bytes(KEY)
    same = (said, role) == (other, another)
    assert handshake.is_proof(other, key, another, said.proof(key, role)) == same
    assert not handshake.is_proof(said, handshake.key_bytes(SECRET), role, said.proof(key, role))
    assert said.session(key) not in (said.proof(key, Role.AGENT), said.proof(key, Role.BALANCER))


@given(st.text(max_size=100))
def test_no_nonce_is_good_that_was_not_given_out(nonce: str) -> None:
    assert not Challenges(b"k" * 32, 10).is_good(nonce, 0.0)


@given(st.floats(0, 1e9), st.floats(0, 100), st.integers(0, 80))
def test_a_nonce_is_good_for_its_time_once_and_unchanged(began: float, later: float, place: int) -> None:
    challenges = Challenges(b"k" * 32, 10)
    nonce = challenges.give("chance-of-thirty-two-characters-", began)
    assert challenges.is_good(nonce, began + later) == (later <= NONCE_SECONDS) or abs(later - 30) < 0.01
    place %= len(nonce)
    changed = nonce[:place] + ("0" if nonce[place] != "0" else "1") + nonce[place + 1 :]
    assert not challenges.is_good(changed, began)
    assert not Challenges(b"l" * 32, 10).is_good(nonce, began)
    challenges.use_up(nonce, began)
    assert not challenges.is_good(nonce, began)


def test_used_nonces_are_bounded_and_forgotten_when_they_are_too_old_anyway() -> None:
    challenges = Challenges(b"k" * 32, 3)
    for count in range(3):
        challenges.use_up(challenges.give(str(count), 0.0), 0.0)
    fresh = challenges.give("a", 1.0)
    assert not challenges.is_good(fresh, 1.0)
    assert challenges.is_good(challenges.give("b", 40.0), 40.0)


def test_ten_thousand_sessions_leave_no_more_than_are_allowed() -> None:
    sessions = Sessions(GatePolicy(sessions=64))
    for count in range(10_000):
        sessions.begin(f"balancer-{count % 3000}", f"secret-{count}", float(count))
        assert len(sessions) <= 128
    assert sessions.whose("secret-9999", 10_000.0) == "balancer-999"
    assert sessions.whose("secret-0", 10_000.0) is None


def test_a_former_session_ends_with_its_time() -> None:
    sessions = Sessions(GatePolicy(former_seconds=60))
    sessions.begin("a", "first", 0.0)
    sessions.begin("a", "second", 100.0)
    assert [sessions.whose("first", now) for now in (100.0, 159.0, 160.0)] == ["a", "a", None]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz")), max_size=30),
    st.sampled_from("uvw"),
)
def test_all_sessions_but_one_end_together(begun: list[tuple[str, str]], kept: str) -> None:
    sessions = Sessions(GatePolicy())
    for balancer, secret in begun:
        sessions.begin(balancer, balancer + secret, 0.0)
    kept, secrets = f"a{kept}", [balancer + secret for balancer in "abc" for secret in "uvwxyz"]
    whose = sessions.whose(kept, 1.0)
    sessions.end_all_but(kept)
    assert sessions.whose(kept, 1.0) == whose
    assert all(sessions.whose(secret, 1.0) is None for secret in secrets if secret != kept)


# The key ...


@contextlib.asynccontextmanager
async def pending(
    key: ClusterKey, policy: GatePolicy | None = None
) -> AsyncIterator[tuple[Scene, list[str], asyncio.Task[None]]]:
    """An agent without a key, the codes that it has shown, and what shows them."""
    shown: list[str] = []
    gate = Gate(AGENT, key, PLAIN, policy, show=lambda text: shown.append(text.rpartition(" ")[2]))
    async with scene_of(gate) as scene, asyncio.TaskGroup() as tasks:
        showing = tasks.create_task(gate.show_codes())
        await until(lambda: shown)
        yield scene, shown, showing
        showing.cancel()


def by_code(scene: Scene, code: str) -> Met:
    return Met(scene.client, scene.url, handshake.key_of_code(code, AGENT, PLAIN))


SILENT = GatePolicy(silence_seconds=0.01)


async def test_a_machine_that_nobody_meets_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    await Gate(AGENT, ClusterKey(KEY, None), PLAIN, SILENT).tell_of_silence()
    (record,) = caplog.records
    assert record.getMessage().startswith("no balancer has met this machine yet")
    assert "`worker-agent doctor --network` says why" in record.getMessage()
    assert "`balancer cluster show`" in record.getMessage()


async def test_a_machine_that_was_met_or_shows_a_code_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene_of(Gate(AGENT, ClusterKey(KEY, None), PLAIN, SILENT)) as scene:
        await met(scene.client, scene.url, KEY)
        await scene.gate.tell_of_silence()
    await Gate(AGENT, ClusterKey(None, tmp_path / "cluster_key"), PLAIN, SILENT).tell_of_silence()
    assert "no balancer has met" not in caplog.text


async def test_who_types_the_code_gives_the_agent_its_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = ClusterKey(None, tmp_path / "cluster_key")
    async with pending(key) as (scene, shown, showing):
        assert (scene.gate.tag, (await scene.balancer().hello()).by) == ("", wire.ProvenBy.CODE)
        other = by_code(scene, shown[0].lower().replace("-", " ")).another("other")
        await other.meet()
        balancer = by_code(scene, shown[0])
        session = await balancer.meet()
        body = wire.NewKey(key=KEY).model_dump_json().encode()
        assert await balancer.post(wire.KEY_PATH, body, session) == (204, {})
        assert [await scene.status(each) for each in (other.session, session)] == [401, 200]
        await met(scene.client, scene.url, KEY)
        assert (await scene.balancer().hello()).by is wire.ProvenBy.KEY
        assert (await by_code(scene, shown[0]).prove(balancer.transcript(await balancer.hello())))[0] == 403
        assert scene.gate.tag == handshake.cluster_tag(KEY)
        await until(showing.done)
    assert "guessed" not in caplog.text
    assert cluster_key.found(tmp_path, None).value == KEY
    assert (tmp_path / "cluster_key").stat().st_mode & 0o777 == 0o600
    assert len(shown) == 1


async def test_a_key_that_another_process_puts_into_the_file_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A service waits to be let in, and somebody runs `worker-agent join INVITATION` on the same machine."""
    file = tmp_path / "cluster_key"
    caplog.set_level(logging.INFO)
    async with pending(ClusterKey(None, file), GatePolicy(look_seconds=0.01)) as (scene, shown, showing):
        other = by_code(scene, shown[0])
        await other.meet()
        file.touch(0o600)
        file.write_text("two words are no key")
        await until(lambda: "holds no cluster key" in caplog.text)
        assert (scene.gate.tag, showing.done()) == ("", False)
        file.unlink()
        cluster_key.kept(file, KEY)
        await until(showing.done)
        assert scene.gate.tag == handshake.cluster_tag(KEY)
        assert await scene.status(other.session) == 401
        await met(scene.client, scene.url, KEY)
    assert caplog.text.count("holds no cluster key") == 1
    assert KEY not in caplog.text


async def test_a_key_is_one_word(scene: Scene) -> None:
    balancer = await met(scene.client, scene.url)
    body = orjson.dumps({"key": "two words are no cluster key"})
    assert (await balancer.post(wire.KEY_PATH, body, balancer.session))[0] == 400
    await met(scene.client, scene.url)


async def test_a_balancer_that_leaves_while_its_key_is_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent has one key then, and the sessions of no other one."""
    writes, goes_on = threading.Event(), threading.Event()
    keep = cluster_key.kept

    def slowly(path: Path, key: str) -> None:
        writes.set()
        goes_on.wait(20)
        keep(path, key)

    monkeypatch.setattr(cluster_key, "kept", slowly)
    async with scene_of(Gate(AGENT, ClusterKey(KEY, tmp_path / "cluster_key"))) as scene:
        one = await met(scene.client, scene.url)
        other = one.another("other")
        await other.meet()
        body = wire.NewKey(key=SECRET).model_dump_json().encode()
        giving = asyncio.ensure_future(one.post(wire.KEY_PATH, body, one.session))
        await until(writes.is_set)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
        # The agent has seen that: what it is asked next, it is asked afterwards.
        assert await scene.status(other.session) == 200
        goes_on.set()
        await until(lambda: scene.gate.tag == handshake.cluster_tag(SECRET))
        assert [await scene.status(each.session) for each in (one, other)] == [200, 401]


async def test_a_code_is_good_for_a_few_guesses(caplog: pytest.LogCaptureFixture) -> None:
    async with pending(ClusterKey(None, None), GatePolicy(rest_seconds=0)) as (scene, shown, _):
        wrong = by_code(scene, "2222-2222")
        for _ in range(5):
            said = wrong.transcript(await wrong.hello())
            status, answer = await wrong.prove(said)
            assert (status, answer["error"]["code"]) == (403, "code_wrong")  # type: ignore[index]
        await until(lambda: len(shown) == 2)
        right = by_code(scene, shown[0])
        assert (await right.prove(right.transcript(await right.hello())))[0] in (403, 503)
        await until(lambda: len(caplog.records) > 1)
        await by_code(scene, shown[1]).meet()


async def test_between_two_codes_there_is_none() -> None:
    async with pending(ClusterKey(None, None), GatePolicy(wrong_codes=1, rest_seconds=60)) as (
        scene,
        shown,
        _,
    ):
        wrong = by_code(scene, "2222-2222")
        await wrong.prove(wrong.transcript(await wrong.hello()))
        right = by_code(scene, shown[0])
        status, answer = await right.prove(right.transcript(await right.hello()))
        assert (status, answer["error"]["code"]) == (503, "no_code_yet")  # type: ignore[index]


async def test_a_code_that_nobody_types_is_replaced() -> None:
    async with pending(ClusterKey(None, None), GatePolicy(code_seconds=0.05)) as (_, shown, _):
        await until(lambda: len(shown) >= 3)
    assert len(set(shown)) == len(shown)


async def test_a_new_key_ends_the_sessions_of_all_others(scene: Scene) -> None:
    one = await met(scene.client, scene.url)
    other = one.another("other")
    await other.meet()
    body = wire.NewKey(key=SECRET).model_dump_json().encode()
    assert (await one.post(wire.KEY_PATH, body, one.session))[0] == 204
    assert [await scene.status(each.session) for each in (one, other)] == [200, 401]
    assert (await one.prove(one.transcript(await one.hello())))[0] == 403
    await met(scene.client, scene.url, SECRET)


async def test_a_key_that_the_settings_give_is_changed_in_memory_and_that_is_told(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    balancer = await met(scene.client, scene.url)
    body = wire.NewKey(key=SECRET).model_dump_json().encode()
    await balancer.post(wire.KEY_PATH, body, balancer.session)
    assert "WORKER_AGENT_CLUSTER_KEY" in caplog.text
    assert SECRET not in caplog.text


async def test_a_key_that_cannot_be_kept_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    gate = Gate(AGENT, ClusterKey(KEY, tmp_path / "file" / "cluster_key"))
    async with scene_of(gate) as scene:
        balancer = await met(scene.client, scene.url)
        body = wire.NewKey(key=SECRET).model_dump_json().encode()
        status, answer = await balancer.post(wire.KEY_PATH, body, balancer.session)
        assert (status, answer["error"]["code"]) == (500, "key_not_kept")  # type: ignore[index]
        await met(scene.client, scene.url, KEY)


async def test_no_key_travels_in_the_clear_between_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_agent.gate.is_loopback", lambda _address: False)
    async with scene_of(gate_with()) as scene:
        balancer = await met(scene.client, scene.url)
        body = wire.NewKey(key=SECRET).model_dump_json().encode()
        status, answer = await balancer.post(wire.KEY_PATH, body, balancer.session)
        assert (status, answer["error"]["code"]) == (403, "tls_needed")  # type: ignore[index]
