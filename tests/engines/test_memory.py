"""Never out of memory: an agent in a memory cgroup, whose limit the kernel enforces by killing.

Five real models, of which only some fit at once, are asked for in turns and all together. What the kernel
says afterwards counts: how much the group ever used, and that nobody was killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from agent.conftest import RunningAgent, end_agent
from agent.meeting import meet_process, within_sessions

from tests.engines.cgroups import MemoryGroup, NoMemoryGroup, memory_group
from tests.engines.chats import CHAT, Told, ask, question
from tests.engines.conftest import engines_of, environment
from tests.engines.engines import embedded_model
from tests.fakes.agent_gate import KEY
from worker_agent import wire
from worker_agent.wire import ModelState, Report, ServedModel

pytestmark = [
    pytest.mark.memory_cgroup,
    pytest.mark.real_engine,
    # By a signal: the default way ends the process at once, and would leave the group behind.
    pytest.mark.timeout(300, method="signal"),
]

GIB = 2**30
LIMIT = 2 * GIB
"""For agent and engines together: two of the models, and not five."""
NAMES = ("one", "two", "three", "four", "five")
TOO_LARGE = "too-large"
TOO_LARGE_BYTES = 8 * GIB
ANSWERS = 40


@dataclass
class Machine:
    """An agent that has no more memory than its group."""

    group: MemoryGroup
    agent: RunningAgent
    folder: Path
    http: aiohttp.ClientSession

    async def ask(self, name: str, text: str, tokens: int = 8) -> Told:
        return await ask(self.http, self.agent.url, question(name, text, tokens))

    async def refused(self, name: str) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that is not answered."""
        async with self.http.post(self.agent.url + CHAT, json=question(name, "Hi", 1)) as answer:
            return answer.status, (await answer.json())["error"]

    async def status(self, name: str) -> int:
        async with self.http.post(self.agent.url + CHAT, json=question(name, "Hi", 1)) as answer:
            await answer.read()
            return answer.status

    def private_bytes(self) -> int:
        """What its processes hold that is no file."""
        pages = [Path(f"/proc/{pid}/status").read_text() for pid in self.group.pids]
        return sum(
            int(number) * 1024 for page in pages for number in re.findall(r"RssAnon:\s+(\d+) kB", page)
        )

    async def reports(self) -> AsyncIterator[Report]:
        async with self.http.get(self.agent.url + wire.REPORT_PATH) as stream:
            async for line in stream.content:
                yield Report.from_line(line)

    async def models(self) -> dict[str, ServedModel]:
        """As it reports them now."""
        async with aclosing(self.reports()) as reports:
            async for report in reports:
                return {model.name: model for model in report.models}
        raise AssertionError("the report stream ended")

    def insist_that_nobody_was_killed(self) -> None:
        assert self.group.out_of_memory == 0
        assert self.group.most_bytes < LIMIT
        print(f"\nat most {self.group.most_bytes / GIB:.2f} of {LIMIT / GIB:g} GiB were used")


def copies_of_the_model(folder: Path) -> dict[str, Path]:
    """Files of their own, none of which the kernel holds in memory for somebody else."""
    copies = {name: folder / f"{name}.gguf" for name in NAMES}
    for path in copies.values():
        shutil.copyfile(embedded_model(), path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return copies


def too_large_model(folder: Path) -> Path:
    """The same, as far as its head tells, with a hole at its end that takes no disk."""
    path = folder / f"{TOO_LARGE}.gguf"
    shutil.copyfile(embedded_model(), path)
    os.truncate(path, TOO_LARGE_BYTES)
    return path


@contextmanager
def agent_in(group: MemoryGroup, folder: Path) -> Iterator[RunningAgent]:
    """Each with two slots of 1024 tokens; the first is loaded from the start, the others on demand."""
    paths = {**copies_of_the_model(folder), TOO_LARGE: too_large_model(folder)}
    first = {"name": NAMES[0], "model": str(paths.pop(NAMES[0]))}
    others = {name: {"path": str(path), "engine": "llama.cpp"} for name, path in paths.items()}
    shared = {"engine": "llama.cpp", "slots": 2, "context_tokens": 1024, "threads": 1}
    config = folder / "worker_agent.json"
    config.write_text(json.dumps({**shared, **first, "models": others}))
    words = ("run", "--config", str(config), "--host", "127.0.0.1", "--port", "0", "--no-mdns")
    command = [
        *(*group.within, sys.executable, "-m", "worker_agent", *words),
        *("--data-dir", str(folder / "data"), "--log-level", "debug"),
    ]
    agent = RunningAgent(
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
        )
    )
    meet_process(agent.port, KEY)
    try:
        yield agent
    finally:
        end_agent(agent)
        print("\n".join(agent.log[-100:]))


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    """Its group is empty when the test is over, or removing it fails."""
    try:
        with memory_group(LIMIT) as group, agent_in(group, tmp_path) as agent:
            async with within_sessions(240) as http:
                yield Machine(group, agent, tmp_path, http)
    except NoMemoryGroup as error:
        pytest.skip(str(error))


def engines(machine: Machine) -> list[psutil.Process]:
    return engines_of(machine.agent)


async def test_five_models_take_turns_within_the_memory_of_two(machine: Machine) -> None:
    """One after the other, so that each has to make room for the next but one."""
    most = 0
    for turn in range(2):
        for name in NAMES:
            answer = await machine.ask(name, f"Tell a story about {turn} foxes and {name} trees. " * 12)
            assert answer.done
            assert answer.errors == []
            most = max(most, len(engines(machine)))
            machine.insist_that_nobody_was_killed()
    assert 2 <= most < len(NAMES)
    states = [model.state for name, model in (await machine.models()).items() if name in NAMES]
    assert set(states) == {ModelState.LOADED, ModelState.UNLOADED}


async def test_five_models_that_are_wanted_at_once_are_all_answered_and_take_turns(machine: Machine) -> None:
    """A line of requests for all of them in no order: they are collated, so that there are far fewer loads
    than requests."""
    chance = random.Random(5)
    asked = [chance.choice(NAMES) for _ in range(ANSWERS)]
    answers = await asyncio.gather(
        *(
            machine.ask(name, f"Tell a story about {number} foxes. " * chance.randint(1, 12))
            for number, name in enumerate(asked)
        )
    )
    assert all(answer.done and not answer.errors for answer in answers)
    machine.insist_that_nobody_was_killed()
    loads = sum("starting -> ready" in line for line in machine.agent.log)
    assert len(NAMES) <= loads <= ANSWERS // 2


async def test_a_model_that_never_fits_is_refused_with_the_numbers_before_anything_is_started(
    machine: Machine,
) -> None:
    await machine.ask("one", "Hi")
    [before] = engines(machine)
    status, error = await machine.refused(TOO_LARGE)
    assert (status, error["code"]) == (503, "model_does_not_fit")
    numbers = [float(number) for number in re.findall(r"(\d+\.\d) GiB", error["message"])]
    assert max(numbers) >= TOO_LARGE_BYTES / GIB, error["message"]
    assert 0 < min(numbers) < LIMIT / GIB, error["message"]
    # Nothing was started for it, and nobody had to make room for what cannot be.
    assert [engine.pid for engine in engines(machine)] == [before.pid]
    models = await machine.models()
    assert (models["one"].state, models[TOO_LARGE].state) == (ModelState.LOADED, ModelState.FAILED)
    machine.insist_that_nobody_was_killed()


HOG = """
import sys
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(held[::4096])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def somebody_else(group: MemoryGroup, held_bytes: int) -> Iterator[None]:
    """Another program that takes so much of the same memory."""
    command: Sequence[str] = [*group.within, sys.executable, "-c", HOG, str(held_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hog:
        assert hog.stdout is not None
        try:
            assert hog.stdout.readline() == b"held\n"
            yield
        finally:
            hog.kill()


async def test_memory_that_somebody_else_takes_is_not_given_to_a_model(machine: Machine) -> None:
    """What is free is measured before each load, not once."""
    assert (await machine.ask("one", "Hi")).done
    [one] = engines(machine)
    need = (await machine.models())["one"].memory_bytes
    assert need is not None
    # All but half of what a model needs, and what runs already.
    with somebody_else(machine.group, LIMIT - machine.private_bytes() - need // 2):
        status, error = await machine.refused("two")
        assert (status, error["code"]) == (503, "model_does_not_fit")
        assert [engine.pid for engine in engines(machine)] == [one.pid]
        assert (await machine.ask("one", "Hi")).done
    async with asyncio.timeout(120):
        while (await machine.status("two")) != 200:
            await asyncio.sleep(0.2)
    machine.insist_that_nobody_was_killed()
