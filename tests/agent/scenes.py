"""What several test files of the agent need: waiting for conditions, a fake engine's plan."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil

from worker_agent.engines.spec import EngineSpec, Launch, positive
from worker_agent.exchange import Fault, Refused
from worker_agent.plans import Plan
from worker_agent.resident import Resident

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


async def until(what: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Returns once `what` is true; fails when it does not come true in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not what():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


def wait_until(what: Callable[[], object], *, seconds: float = 20.0) -> None:
    """The same for tests without a loop."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A zombie, which only waits for somebody to read its exit code, is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def fake_plan(starts: Path, mode: str, *, slots: int = 2) -> Plan:
    """A plan for `fake_engine.py`, which notes each start in the file `starts`."""

    def argv(launch: Launch) -> list[str]:
        return [sys.executable, "-I", "-S", str(FAKE_ENGINE), str(launch.port), str(starts), mode]

    spec = EngineSpec(
        name="fake",
        argv=argv,
        secret_variable="FAKE_KEY",
        ready_path="/health",
        start_limit_seconds=10,
        request_model=lambda _launch: "fake",
        keep_alive=False,
        default_slots=slots,
        default_context_tokens=512,
        read_context_tokens=lambda model: positive(model.get("context")),
        busy_path="/busy",
        read_busy=lambda page: int(json.loads(page)["busy"]) if page else None,
        busy_pauses_seconds=(0.05,),
    )
    return Plan(spec=spec, model="m", name="public", slots=slots, context_tokens=None, threads=1)


def pids(starts: Path) -> list[int]:
    """Of every start so far, oldest first."""
    return [int(line) for line in starts.read_text().split()] if starts.exists() else []


class OneModel:
    """The models of an agent with one engine, which the test runs."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident

    @property
    def names(self) -> tuple[str, ...]:
        return (self._resident.plan.name,)

    @property
    def running(self) -> int:
        return self._resident.watch.open

    def knows(self, name: str) -> bool:
        return name in self.names

    def plan(self, name: str) -> Plan | None:
        return self._resident.plan

    def resident(self, name: str) -> Resident | None:
        return self._resident

    @contextlib.asynccontextmanager
    async def entered(self, name: str, wait_seconds: float) -> AsyncIterator[Resident]:
        if self._resident.serving is None:
            raise Refused(503, "engine_not_ready", "the engine is resting.", retry_after=2)
        if self._resident.is_full:
            raise Refused(429, "no_free_slot", "all slots are taken", retry_after=1)
        yield self._resident

    def drain(self) -> None: ...

    def stop_all(self, fault: Fault) -> None:
        self._resident.watch.stop_all(fault)

    def cut_all(self) -> None:
        self._resident.watch.cut_all()
