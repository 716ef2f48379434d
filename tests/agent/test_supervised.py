"""Supervision performed: a real process that misbehaves on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from agent.scenes import alive, fake_plan, pids, until
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


async def test_one_that_lives_but_listens_no_more_is_replaced_when_somebody_doubts_it(
    starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_agent.readiness._DOUBT_TRIES", 1)
    engine = engine_of(starts, "closing")
    async with engine.supervised(), aiohttp.ClientSession() as session:
        engine.want()
        await until(lambda: engine.state is State.READY)
        serving = engine.serving
        assert serving is not None
        assert await answers_at_all(session, engine.plan.spec, serving.address)
        async with session.get(serving.address.url + "/close"):
            pass
        await until(lambda: not _listens(serving.address.port))
        engine.doubt(serving)
        await until(lambda: len(pids(starts)) == 2 and engine.state is State.READY)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def test_leaving_while_it_starts_leaves_no_process(starts: Path) -> None:
    engine = engine_of(starts, "mute")
    async with engine.supervised():
        engine.want()
        await until(lambda: pids(starts))
    assert not alive(pids(starts)[0])
