"""Supervision performed: a real process that misbehaves on demand."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from agent.scenes import alive, fake_plan, pids, until
from worker_agent import readiness
from worker_agent.engines.spec import Capacity, Launch
from worker_agent.readiness import answers_at_all, free_port
from worker_agent.supervised import SupervisedEngine
from worker_agent.supervision import State, SupervisionPolicy

FAST = SupervisionPolicy(start_limit_seconds=10, stop_grace_seconds=0.3, first_rest_seconds=0.01)


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


def engine_of(
    starts: Path, mode: str, policy: SupervisionPolicy = FAST, on_change: Callable[[], None] = lambda: None
) -> SupervisedEngine:
    return SupervisedEngine(fake_plan(starts, mode), policy, on_change)


async def test_it_is_ready_once_it_has_generated_and_gone_when_it_is_not_wanted(starts: Path) -> None:
    seen: list[State] = []
    engine = engine_of(starts, "serve", on_change=lambda: seen.append(engine.state))
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        assert engine.serving is not None
        assert engine.serving.context_tokens == 512
        engine.unwant()
        assert engine.serving is None
        await asyncio.wait_for(engine.stopped(), 10)
    assert seen == [State.STARTING, State.READY, State.STOPPING, State.STOPPED]
    assert not alive(pids(starts)[0])


async def test_what_it_holds_is_read_once_it_is_ready(starts: Path) -> None:
    plan = fake_plan(starts, "serve")

    def capacity(launch: Launch, context_tokens: int | None, page: str) -> Capacity:
        return Capacity(memory_tokens=launch.slots * (context_tokens or 0), cache_tokens=len(page))

    for path, cached in (("/capacity", len('{"tokens": 4096}')), ("/not-there", 0), (None, 0)):
        spec = replace(plan.spec, capacity_path=path, read_capacity=capacity)
        engine = SupervisedEngine(replace(plan, spec=spec), FAST, lambda: None)
        async with engine.supervised():
            engine.want()
            await until(lambda engine=engine: engine.state is State.READY)
            assert engine.serving is not None
            assert engine.serving.capacity == Capacity(memory_tokens=2 * 512, cache_tokens=cached)
            engine.unwant()
            await asyncio.wait_for(engine.stopped(), 10)


async def test_one_that_crashes_once_is_started_again(starts: Path) -> None:
    engine = engine_of(starts, "serve-once")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        assert len(pids(starts)) == 2


async def test_a_crash_loop_ends_after_five_starts_and_says_why(starts: Path) -> None:
    engine = engine_of(starts, "exit")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.FAILED)
        assert len(pids(starts)) == 5
        assert "fake ended with code 3 (the model file is broken), 5 times" in engine.detail
        assert engine.detail.isprintable()


async def test_one_that_is_killed_while_it_serves_is_replaced_by_a_new_process(starts: Path) -> None:
    engine = engine_of(starts, "serve")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        os.kill(pids(starts)[0], signal.SIGKILL)
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)


async def test_one_that_loads_for_ever_is_given_up_in_time_and_tried_again(starts: Path) -> None:
    engine = engine_of(starts, "mute", replace(FAST, start_limit_seconds=1, first_rest_seconds=0.2))
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.RESTING)
        assert engine.detail.startswith("it generated nothing within 1 s")
        await until(lambda: len(pids(starts)) >= 2)
    assert not any(map(alive, pids(starts)))


async def test_one_that_ignores_sigterm_is_killed_after_the_grace(starts: Path) -> None:
    engine = engine_of(starts, "stubborn")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        engine.unwant()
        await asyncio.wait_for(engine.stopped(), 10)
    assert not alive(pids(starts)[0])


async def test_an_engines_own_children_go_with_it(starts: Path) -> None:
    engine = engine_of(starts, "parent")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        [child] = pids(starts.with_suffix(".child"))
        assert alive(child)
        engine.unwant()
        await asyncio.wait_for(engine.stopped(), 10)
    await until(lambda: not alive(child))


async def test_another_process_that_answers_on_its_port_is_not_taken_for_it(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr(
        "worker_agent.readiness.free_port", lambda: port
    )  # the port is stolen after it was found
    stranger_starts = starts.with_name("stranger")
    stranger = engine_of(stranger_starts, "serve")
    engine = engine_of(starts, "elsewhere")
    async with stranger.supervised(), engine.supervised():
        stranger.want()
        await until(lambda: stranger.state is State.READY)
        engine.want()
        await until(lambda: engine.state is State.FAILED)
        assert engine.detail.startswith(f"another process listens on port {port}")
        assert stranger.state is State.READY


async def test_one_that_lists_its_models_to_everybody_is_ready_all_the_same(starts: Path) -> None:
    engine = engine_of(starts, "serve")
    async with engine.supervised(), aiohttp.ClientSession() as session:
        engine.want()
        await until(lambda: engine.state is State.READY)
        assert engine.serving is not None
        async with session.get(engine.serving.address.url + "/v1/models") as models:
            assert models.status == 200  # without any key
        assert len(pids(starts)) == 1


async def test_one_that_generates_for_a_wrong_key_is_not_taken_for_ours(starts: Path) -> None:
    engine = engine_of(starts, "open")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.FAILED)
        assert "answers a wrong key with status 200" in engine.detail


async def test_one_that_lives_but_listens_no_more_is_replaced_when_somebody_doubts_it(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.readiness._REFUSED_TRIES", 1)
    engine = engine_of(starts, "closing")
    async with engine.supervised(), aiohttp.ClientSession() as session:
        engine.want()
        await until(lambda: engine.state is State.READY)
        serving = engine.serving
        assert serving is not None
        assert await answers_at_all(session, engine.plan.spec, serving.address, lambda: 0)
        async with session.get(serving.address.url + "/close"):
            pass
        await until(lambda: not _listens(serving.address.port))
        engine.doubt(serving)
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def test_one_that_is_stopped_is_deaf_unless_a_running_answer_goes_on(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.readiness._ASK_SECONDS", 0.1)
    engine = engine_of(starts, "serve")
    async with engine.supervised(), aiohttp.ClientSession() as session:
        engine.want()
        await until(lambda: engine.state is State.READY)
        serving = engine.serving
        assert serving is not None
        os.kill(pids(starts)[0], signal.SIGSTOP)
        arrivals = itertools.count()
        assert await answers_at_all(session, engine.plan.spec, serving.address, lambda: next(arrivals))
        assert not await answers_at_all(session, engine.plan.spec, serving.address, lambda: 0)


async def test_one_that_is_silent_is_replaced_when_somebody_doubts_it(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.readiness._ASK_SECONDS", 0.1)
    reasons: list[str] = []
    engine = engine_of(starts, "serve", on_change=lambda: reasons.append(engine.detail))
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        serving = engine.serving
        assert serving is not None
        os.kill(pids(starts)[0], signal.SIGSTOP)
        engine.doubt(serving)
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)
    assert "its process lives but does not answer; it is being restarted" in reasons
    assert not alive(pids(starts)[0])


async def test_one_that_is_silent_but_still_heard_of_is_left_alone(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.readiness._ASK_SECONDS", 0.1)
    loop = asyncio.get_running_loop()
    engine = engine_of(starts, "serve")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        serving = engine.serving
        assert serving is not None
        os.kill(pids(starts)[0], signal.SIGSTOP)
        engine.doubt(serving)
        enough = loop.time() + 1  # three tries of 0.1 s are long over by then

        def heard_for_a_second() -> bool:
            engine.heard(serving)
            return loop.time() >= enough

        await until(heard_for_a_second)
        assert engine.serving is serving


async def test_leaving_while_it_starts_leaves_no_process(starts: Path) -> None:
    engine = engine_of(starts, "mute")
    async with engine.supervised():
        engine.want()
        await until(lambda: pids(starts))
    assert not alive(pids(starts)[0])


async def test_a_machine_without_a_free_port_or_file_tries_again(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    free_port = readiness.free_port

    def first_none() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return free_port()

    monkeypatch.setattr(readiness, "free_port", first_none)
    engine = engine_of(starts, "serve")
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
    assert engine.reason == "it could not be started: Too many open files"


async def test_who_is_asked_before_a_restart_may_have_it_stay_down(starts: Path) -> None:
    asked: list[int] = []

    async def refuse() -> None:
        asked.append(len(pids(starts)))
        engine.unwant()

    engine = SupervisedEngine(fake_plan(starts, "serve"), FAST, lambda: None, refuse)
    async with engine.supervised():
        engine.want()
        await until(lambda: engine.state is State.READY)
        os.kill(pids(starts)[0], signal.SIGKILL)
        await until(lambda: engine.state is State.STOPPED)
    assert (asked, len(pids(starts))) == ([1], 1)
