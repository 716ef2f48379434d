"""The gateway in front of an engine that is a real process: what is told of one that dies, gets stuck, or
works on for clients that have left; and whether one can go on with answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web

from agent.meeting import OpenGate
from agent.scenes import OneModel, fake_plan, pids, until
from worker_agent import wire
from worker_agent.changes import Changes
from worker_agent.gateway import Gateway
from worker_agent.liveness import LivenessPolicy
from worker_agent.orphans import OrphanPolicy
from worker_agent.plans import Plan
from worker_agent.readiness import Address
from worker_agent.resident import Resident
from worker_agent.server import ServerPolicy, listening
from worker_agent.supervised import Serving, SupervisedEngine
from worker_agent.supervision import State, SupervisionPolicy
from worker_agent.watch import Backend, WatchPolicy
from worker_agent.wire import EngineState, Report

CHAT = "/v1/chat/completions"
WORD = b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'
SUPERVISION = SupervisionPolicy(start_limit_seconds=10, stop_grace_seconds=0.3, first_rest_seconds=0.01)
PATIENT = WatchPolicy(tick_seconds=0.05, probe_pause_seconds=0.05)
IMPATIENT = WatchPolicy(
    tick_seconds=0.05,
    probe_pause_seconds=0.05,
    liveness=LivenessPolicy(
        gap_floor_seconds=0.5,
        gap_ceiling_seconds=0.5,
        reading_floor_seconds=0.5,
        unknown_seconds_per_byte=0.001,
    ),
    orphans=OrphanPolicy(seconds=0.5, seconds_beside_others=0.5),
)


@dataclass
class Room:
    gateway: Gateway
    resident: Resident
    url: str
    client: aiohttp.ClientSession

    def ask(
        self, user: str = "", *, headers: dict[str, str] | None = None, **more: object
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        body = {"model": "public", "stream": True, "user": user, "messages": [], **more}
        return self.client.post(self.url + CHAT, json=body, headers=headers)


@contextlib.asynccontextmanager
async def room_before(engine: Backend, changes: Changes, watch: WatchPolicy) -> AsyncIterator[Room]:
    def report() -> Report:
        return Report(id="a", state=EngineState.READY, engine="fake", slots=2)

    resident = Resident(engine, changes, watch)
    gateway = Gateway(OneModel(resident), report, changes, OpenGate())
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        resident.attended(),
        listening(gateway.application(), "127.0.0.1", 0, ServerPolicy()) as server,
        aiohttp.ClientSession(connector=connector) as client,
    ):
        yield Room(gateway, resident, f"http://127.0.0.1:{server.port}", client)


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@contextlib.asynccontextmanager
async def real_engine(
    starts: Path, watch: WatchPolicy = PATIENT
) -> AsyncIterator[tuple[Room, SupervisedEngine]]:
    changes = Changes()
    engine = SupervisedEngine(fake_plan(starts, "serve"), SUPERVISION, changes.announce)
    async with engine.supervised(), room_before(engine, changes, watch) as room:
        engine.want()
        await until(lambda: engine.state is State.READY)
        yield room, engine


def error_in(event: bytes) -> dict[str, str]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    error: dict[str, str] = orjson.loads(event[6:])["error"]
    return error


@pytest.mark.parametrize("user", ["stall", "torn"])
async def test_an_engine_killed_in_an_answer_is_told_in_its_place_and_replaced(
    starts: Path, user: str
) -> None:
    async with real_engine(starts) as (room, engine), room.ask(user) as answer:
        assert await answer.content.readany() == WORD
        os.kill(pids(starts)[0], signal.SIGKILL)
        assert error_in(await answer.read())["code"] == "engine_died"
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)


async def test_one_killed_before_it_answers_is_a_502(starts: Path) -> None:
    async with real_engine(starts) as (room, _):
        os.kill(pids(starts)[0], signal.SIGSTOP)
        asking = asyncio.ensure_future(status_and_code(room))
        await until(lambda: room.gateway.running == 1)
        os.kill(pids(starts)[0], signal.SIGKILL)
        assert await asking == (502, "engine_died")


async def status_and_code(room: Room, user: str = "") -> tuple[int, str]:
    async with room.ask(user) as answer:
        return answer.status, (await answer.json())["error"]["code"]


async def test_one_that_is_stuck_in_an_answer_is_told_and_restarted(starts: Path) -> None:
    async with real_engine(starts, IMPATIENT) as (room, engine), room.ask("stall") as answer:
        assert await answer.content.readany() == WORD
        error = error_in(await answer.read())
        assert error["code"] == "engine_wedged"
        assert "stuck: nothing came for" in error["message"]
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)
        async with room.ask() as next_one:
            assert (await next_one.read()).endswith(b"data: [DONE]\n\n")


async def test_one_that_is_stuck_before_an_answer_is_a_503_and_restarted(starts: Path) -> None:
    async with real_engine(starts, IMPATIENT) as (room, engine):
        os.kill(pids(starts)[0], signal.SIGSTOP)
        assert await status_and_code(room) == (503, "engine_wedged")
        assert engine.detail.startswith("stuck: nothing came for")
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)


async def test_one_whose_words_flow_is_left_alone_beside_an_answer_that_stalls(starts: Path) -> None:
    async with (
        real_engine(starts, IMPATIENT) as (room, engine),
        room.ask("stall"),
        room.ask("endless") as words,
    ):
        got = 0
        async for _ in words.content.iter_any():
            got += 1
            if got > 100:  # two seconds: four times the patience
                break
        assert engine.state is State.READY
        assert len(pids(starts)) == 1


async def test_a_slot_is_taken_until_the_engine_has_noticed_that_the_client_left(starts: Path) -> None:
    async with real_engine(starts) as (room, engine):
        for _ in range(2):
            async with room.ask("nap") as answer:
                await answer.content.readany()
        await until(lambda: room.gateway.running == 0)
        assert room.resident.watch.taken == 2
        assert await status_and_code(room) == (429, "no_free_slot")
        assert engine.serving is not None
        async with room.client.get(engine.serving.address.url + "/wake"):
            pass
        await until(lambda: room.resident.watch.taken == 0)
        async with room.ask() as answer:
            assert answer.status == 200
        assert len(pids(starts)) == 1


async def test_an_answer_that_came_to_its_end_leaves_nothing_behind(starts: Path) -> None:
    async with real_engine(starts) as (room, _):
        async with room.ask() as answer:
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        await until(lambda: room.gateway.running == 0)
        assert room.resident.watch.taken == 0


async def test_one_that_works_for_nobody_for_too_long_is_restarted(starts: Path) -> None:
    async with real_engine(starts, IMPATIENT) as (room, engine):
        async with room.ask("nap") as answer:
            await answer.content.readany()
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)
        assert room.resident.watch.taken == 0


async def test_what_still_runs_at_the_end_is_told_so(starts: Path) -> None:
    async with real_engine(starts) as (room, _), room.ask("endless") as answer:
        await answer.content.readany()
        room.gateway.drain()
        assert await status_and_code(room) == (503, "stopping")
        await answer.content.readany()  # it goes on meanwhile
        await room.gateway.close()
        *_, last, nothing = (await answer.read()).split(b"\n\n")
        assert error_in(last + b"\n\n")["code"] == "stopping"
        assert nothing == b""


# Going on with an answer. The engine is a server of this process, so that it can be of any kind.

TEXT = "In a deep wood there lived a fox who had never seen the river before that day."


@dataclass
class Storyteller:
    """Tells TEXT, a word a piece; `goes_on`: what it makes of a beginning."""

    goes_on: Callable[[str], str]
    asked: int = 0
    may_begin: asyncio.Event | None = None
    hangs_up: bool = False

    async def chat(self, request: web.Request) -> web.StreamResponse:
        messages = (await request.json())["messages"]
        self.asked += 1
        if self.hangs_up:
            assert request.transport is not None
            request.transport.abort()
        given = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
        text = TEXT if given is None else self.goes_on(given)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.may_begin is not None:
            await self.may_begin.wait()
        for number, word in enumerate(text.split(" ")):
            content = word if number == 0 else f" {word}"
            event = orjson.dumps({"choices": [{"delta": {"content": content}}]})
            await response.write(b"data: " + event + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass
class Always:
    """Supervision of an engine that is always there."""

    plan: Plan
    serving: Serving | None

    def heard(self, serving: Serving) -> None: ...
    def doubt(self, serving: Serving) -> None: ...
    def stuck(self, serving: Serving, reason: str) -> None:
        raise AssertionError(reason)


@contextlib.asynccontextmanager
async def storytellers_room(
    storyteller: Storyteller, plan: Plan, watch: WatchPolicy = PATIENT
) -> AsyncIterator[Room]:
    app = web.Application()
    app.router.add_post(CHAT, storyteller.chat)
    spec = replace(plan.spec, continue_chat=dict, busy_path=None)
    async with listening(app, "127.0.0.1", 0, ServerPolicy()) as server:
        serving = Serving(address=Address(port=server.port, secret=None), model="m", context_tokens=None)
        async with room_before(Always(replace(plan, spec=spec), serving), Changes(), watch) as room:
            yield room


def exactly(given: str) -> str:
    return TEXT.removeprefix(given)


async def test_one_that_goes_on_exactly_is_found_out_and_asked_to(starts: Path) -> None:
    storyteller = Storyteller(exactly)
    async with storytellers_room(storyteller, fake_plan(starts, "serve")) as room:
        await until(lambda: room.resident.watch.continues)
        assert storyteller.asked == 2
        begun = [{"role": "user", "content": "?"}, {"role": "assistant", "content": TEXT[:9]}]
        async with room.ask(messages=begun, headers={wire.CONTINUE_HEADER: "1"}) as answer:
            told = [orjson.loads(event[6:]) for event in (await answer.read()).split(b"\n\n")[:-2]]
        words = "".join(event["choices"][0]["delta"]["content"] for event in told)
        assert words == TEXT[9:]


@pytest.mark.parametrize(
    "goes_on",
    [lambda _: TEXT, lambda given: given[-5:] + exactly(given), lambda _: "Sure! A fox ...", lambda _: ""],
    ids=["begins anew", "repeats", "answers", "says nothing"],
)
async def test_one_that_does_not_is_not_asked_to(starts: Path, goes_on: Callable[[str], str]) -> None:
    storyteller = Storyteller(goes_on)
    async with storytellers_room(storyteller, fake_plan(starts, "serve")) as room:
        await until(lambda: storyteller.asked == 6)  # three stories, twice each
        assert not room.resident.watch.continues
        begun = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "In a deep"}]
        async with room.ask(messages=begun, headers={wire.CONTINUE_HEADER: "1"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (409, "cannot_continue")


async def test_an_engine_that_goes_while_the_question_rests_is_just_gone(starts: Path) -> None:
    storyteller = Storyteller(exactly, hangs_up=True)
    patient = replace(PATIENT, probe_pause_seconds=60.0)
    async with storytellers_room(storyteller, fake_plan(starts, "serve"), patient) as room:
        await until(lambda: storyteller.asked == 1)
        engine = room.resident.engine
        assert isinstance(engine, Always)
        looked = asyncio.get_running_loop().time() + 0.5
        await until(lambda: asyncio.get_running_loop().time() > looked)
        engine.serving = None
        assert room.resident.watch.taken == 0
        assert not room.resident.watch.continues


async def test_a_client_that_does_not_read_is_not_taken_for_an_engine_that_is_stuck(starts: Path) -> None:
    storyteller = Storyteller(lambda _: " ".join(["x" * 10_000] * 5_000))
    begun = [{"role": "assistant", "content": "a"}]
    async with storytellers_room(storyteller, fake_plan(starts, "serve"), IMPATIENT) as room:
        await until(lambda: storyteller.asked == 6)
        async with room.ask(messages=begun) as answer:
            await answer.content.readany()
            patience = asyncio.get_running_loop().time() + 2  # four times what an engine gets
            await until(lambda: asyncio.get_running_loop().time() > patience)
            assert room.gateway.running == 1
            await answer.content.readany()
    await until(lambda: room.gateway.running == 0)


async def test_a_user_who_needs_the_slot_gets_it_and_the_question_is_asked_later(starts: Path) -> None:
    storyteller = Storyteller(exactly, may_begin=asyncio.Event())
    async with storytellers_room(storyteller, fake_plan(starts, "serve", slots=1)) as room:
        await until(lambda: storyteller.asked == 1)
        async with room.ask() as answer:
            assert answer.status == 200
            assert not room.resident.watch.continues
            storyteller.may_begin.set()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        await until(lambda: room.resident.watch.continues)
        assert storyteller.asked == 4  # the one that was given up, the user's, two that told


async def test_users_who_come_one_after_the_other_while_the_question_rests_are_served(starts: Path) -> None:
    storyteller = Storyteller(exactly, may_begin=asyncio.Event())
    patient = replace(PATIENT, probe_pause_seconds=1.0)
    async with storytellers_room(storyteller, fake_plan(starts, "serve", slots=1), patient) as room:
        await until(lambda: storyteller.asked == 1)
        storyteller.may_begin.set()
        for _ in range(5):
            async with room.ask() as answer:
                assert (answer.status, (await answer.read())[-14:]) == (200, b"data: [DONE]\n\n")
            assert room.resident.watch.taken == 0


async def test_whoever_has_read_an_answers_end_finds_the_slot_free(starts: Path) -> None:
    storyteller = Storyteller(exactly)
    async with storytellers_room(storyteller, fake_plan(starts, "serve", slots=1)) as room:
        await until(lambda: room.resident.watch.continues)
        for _ in range(50):
            async with room.ask() as answer:
                assert answer.status == 200
                async for line in answer.content:
                    if line == b"data: [DONE]\n":  # and not the end of HTTP's answer
                        break
                assert room.resident.watch.taken == 0
