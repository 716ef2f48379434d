"""What a client sees of models that are not loaded, and of fallbacks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import OpenRoom, Room, listed
from tests.fakes.engine import FakeEngine
from tests.fakes.faults import Fault
from tests.fakes.speech import reference_text

MESSAGES = [{"role": "user", "content": "Name some trees."}]
TEXT = reference_text(MESSAGES, 16)


def agent(engine: FakeEngine) -> dict[str, Any]:
    return listed(engine, str(engine.agent_id), type="agent")


async def ask(
    room: Room, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, dict[str, str], dict[str, Any]]:
    body = {"model": "fake", "messages": MESSAGES} | fields
    async with room.http.post(f"{room.url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, dict(response.headers), json.loads(await response.read())


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def offer(room: Room, name: str) -> Any:
    return room.worker(name).offers[0]


# A model that is not loaded


async def test_who_asks_for_it_waits_until_it_is_loaded(open_room: OpenRoom):
    async with FakeEngine(agent_id="a", loads={"fake": 30.0}) as engine, open_room(agent(engine)) as room:
        await room.until(lambda: room.worker("a").offers and not offer(room, "a").loaded, "it is unloaded")
        asked = asyncio.ensure_future(ask(room))
        await room.until(lambda: offer(room, "a").loading, "it is being loaded")
        engine.has_loaded("fake")
        status, headers, answer = await asked
        assert (status, text_of(answer)) == (200, TEXT)
        assert headers["X-Balancer-Attempts"] == "1"
        await room.until(lambda: offer(room, "a").loaded, "it is loaded")
        await room.idle()


async def test_a_stream_is_told_how_far_it_is(open_room: OpenRoom):
    async with (
        FakeEngine(agent_id="a", loads={"fake": 12.0}, progress=0.4) as engine,
        open_room(agent(engine), comment_after=0.05) as room,
    ):
        await room.ready()
        body = {"model": "fake", "messages": MESSAGES, "stream": True}
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body) as response:
            comment = (await response.content.readline()).decode()
            assert comment.startswith(": loading model=fake worker=a")
            engine.has_loaded("fake")
            rest = (await response.content.read()).decode()
        assert "data: [DONE]" in rest


async def test_who_cannot_wait_so_long_is_told_when_to_come_again(open_room: OpenRoom):
    async with (
        FakeEngine(agent_id="a", loads={"fake": 90.0}, progress=0.25) as engine,
        open_room(agent(engine), max_wait=20) as room,
    ):
        await room.ready()
        status, headers, answer = await ask(room)
        assert status == 503
        assert headers["Retry-After"] == "90"
        error = answer["error"]
        assert (error["code"], error["type"], error["param"]) == ("model_loading", "server_error", None)
        assert error["loading"] == {"worker": "a", "progress": 0.25, "eta_seconds": pytest.approx(90, abs=1)}
        assert engine.loading_models == {"fake"}, "it was begun all the same"
        assert room.worker("a").success_rate == 1.0, "that is nobody's fault"
        engine.has_loaded("fake")
        await room.until(lambda: offer(room, "a").loaded, "it is loaded")
        assert (await ask(room))[0] == 200


async def test_while_it_is_loaded_others_are_told_so_without_being_sent(open_room: OpenRoom):
    async with (
        FakeEngine(agent_id="a", loads={"fake": 90.0}) as engine,
        open_room(agent(engine), max_wait=20) as room,
    ):
        await room.ready()
        await ask(room)
        await room.until(lambda: offer(room, "a").loading, "it is being loaded")
        sent = len(engine.requests)
        status, _, answer = await ask(room)
        assert (status, answer["error"]["code"]) == (503, "model_loading")
        assert len(engine.requests) == sent


async def test_its_other_models_are_answered_meanwhile(open_room: OpenRoom):
    async with (
        FakeEngine(agent_id="a", models=("fake", "other"), loads={"fake": 90.0}) as engine,
        open_room(agent(engine), max_wait=20) as room,
    ):
        await room.ready()
        assert (await ask(room))[0] == 503
        assert (await ask(room, model="other"))[0] == 200


async def test_another_worker_that_has_it_answers(open_room: OpenRoom):
    """The agent unloads it before its report says so."""
    async with (
        FakeEngine(agent_id="a") as first,
        FakeEngine(agent_id="b") as second,
        open_room(agent(first), agent(second), max_wait=20) as room,
    ):
        await room.ready(2)
        refusal = {"error": {"code": "model_loading", "message": "x", "loading": {"eta_seconds": 90}}}
        first.always(Fault.reply_with(json.dumps(refusal).encode(), status=503))
        for _ in range(8):
            status, headers, _ = await ask(room)
            assert (status, headers["X-Balancer-Worker"]) == (200, "b")


async def test_it_is_loaded_once_and_not_on_every_machine(open_room: OpenRoom):
    async with (
        FakeEngine(agent_id="a", loads={"fake": 90.0}) as first,
        FakeEngine(agent_id="b", loads={"fake": 90.0}) as second,
        open_room(agent(first), agent(second), max_wait=20) as room,
    ):
        await room.ready(2)
        answers = await asyncio.gather(*(ask(room) for _ in range(8)))
        assert {status for status, _, _ in answers} == {503}
        assert len(first.loading_models) + len(second.loading_models) == 1


# Fallbacks


@pytest.fixture
def paid(tmp_path: Path) -> Any:
    """The entry of an engine that stands for a paid API."""
    (tmp_path / "key").write_text("sk-1\n")

    def entry(engine: FakeEngine) -> dict[str, Any]:
        more = {"fallback": True, "api_key": {"file": "key"}, "models": {"fake": "theirs"}}
        return listed(engine, "paid", **more)

    return entry


async def test_a_fallback_answers_where_nobody_of_the_room_can(open_room: OpenRoom, paid):
    async with (
        FakeEngine() as local,
        FakeEngine(models=("theirs",)) as api,
        open_room(listed(local, "local"), paid(api)) as room,
    ):
        await room.ready(2)
        status, headers, _ = await ask(room)
        assert (status, "X-Balancer-Fallback" in headers) == (200, False)
        assert api.requests == type(api.requests)()
        local.die()
        status, headers, answer = await ask(room, {"X-Request-ID": "abc"})
        assert (status, text_of(answer)) == (200, TEXT)
        assert (headers["X-Balancer-Fallback"], headers["X-Balancer-Worker"]) == ("1", "paid")
        assert 'balancer_fallback_requests_total{model="fake",worker="paid"} 1.0' in await room.metrics()
        async with room.http.get(f"{room.url}/v1/models") as response:
            assert [row["id"] for row in (await response.json())["data"]] == ["fake"]


@pytest.mark.parametrize(
    ("headers", "metadata"),
    [
        ({"X-Local-Only": "True"}, {}),
        ({"x-local-only": "1"}, {}),
        ({"X-Local-Only": "true"}, {"local_only": False}),
        ({}, {"local_only": True}),
        ({}, {"local_only": "true"}),
    ],
)
async def test_what_must_stay_in_the_room_does(open_room: OpenRoom, paid, headers, metadata):
    async with FakeEngine(models=("theirs",)) as api, open_room(paid(api)) as room:
        await room.ready()
        status, _, answer = await ask(room, headers, metadata=metadata)
        assert (status, answer["error"]["code"]) == (404, "model_not_local")
        assert "local only" in answer["error"]["message"]
        assert not api.requests


async def test_that_it_must_is_told_to_a_worker_which_may_be_a_balancer(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        assert (await ask(room, {"X-Local-Only": "true"}))[0] == 200
        assert (await ask(room))[0] == 200
        first, second = engine.requests
        assert first.headers["x-local-only"] == "1"
        assert "x-local-only" not in second.headers


@pytest.mark.parametrize(
    ("headers", "metadata"),
    [({"X-Local-Only": "yes"}, {}), ({}, {"local_only": "yes"}), ({}, {"local_only": 2})],
)
async def test_who_misspells_it_is_told_so(open_room: OpenRoom, headers, metadata):
    async with FakeEngine() as engine, open_room(engine) as room:
        assert (await ask(room, headers, metadata=metadata))[0] == 400
        assert not engine.requests


async def test_what_the_room_has_failed_at_is_answered_outside(open_room: OpenRoom, paid):
    async with (
        FakeEngine() as local,
        FakeEngine(models=("theirs",)) as api,
        open_room(listed(local, "local"), paid(api)) as room,
    ):
        await room.ready(2)
        local.always(Fault.status(500))
        status, headers, _ = await ask(room)
        assert (status, headers["X-Balancer-Fallback"], headers["X-Balancer-Attempts"]) == (200, "1", "2")


async def test_a_stream_that_the_room_began_is_not_gone_on_with_outside(open_room: OpenRoom, paid):
    async with (
        FakeEngine() as local,
        FakeEngine(models=("theirs",)) as api,
        open_room(listed(local, "local"), paid(api), max_wait=1) as room,
    ):
        await room.ready(2)
        local.script(Fault.die(at_token=5))
        body = {"model": "fake", "messages": MESSAGES, "stream": True}
        async with room.http.post(f"{room.url}/v1/chat/completions", json=body) as response:
            told = (await response.content.read()).decode()
        assert "stream_broken" in told
        assert not api.requests
