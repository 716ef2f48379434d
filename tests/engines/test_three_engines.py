"""llama.cpp, MLX and vLLM behind one balancer, as one model under one name, while workers die.

What nobody may notice depends on what others can take over. An answer in one piece, and a stream of which no
word has come, begin anew on any engine. A stream that has begun goes on only where the same base model in
the same quantisation is served: so the scene has llama.cpp twice, and MLX and vLLM once each, with other
weights. A stream that was begun on one of these ends with an error that says so; it never looks whole.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent.conftest import RunningAgent, end_agent

from tests.e2e.conftest import free_port
from tests.e2e.processes import SHARED_KEY, Command, command
from tests.engines.chats import CHAT, Told, ask, question
from tests.engines.conftest import engine_of, start_agent
from tests.engines.engines import REAL_ENGINES, RealEngine

pytestmark = [pytest.mark.mlx, pytest.mark.vllm, pytest.mark.timeout(900)]

MODEL = "smollm2-135m"
SLOTS = {"llama-1": 2, "llama-2": 2, "mlx": 2, "vllm": 4}
CLIENTS = 14
"""More than there are slots."""
TOKENS = 48
ROWS = {row.mark: row for row in REAL_ENGINES}
START_SECONDS = 400.0


def start(worker: str, row: RealEngine, weights: str, folder: Path) -> RunningAgent:
    """`weights`: what its folder is called, which is what a balancer knows of base model and quantisation."""
    found = row.find()
    model = found.model
    if model is not None and model.is_dir():
        model = folder / weights
        model.symlink_to(found.model, target_is_directory=True)
    flags = ("--name", MODEL, "--id", worker, "--slots", str(SLOTS[worker]), "--threads", "1")
    context = ("--context-tokens", "2048")
    return start_agent(found.python, row.name, model, folder, found.variables, (*flags, *context))


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """It takes minutes to start: one for all scenes. One that kills its engine waits until it is back."""
    folder = tmp_path_factory.mktemp("vllm")
    running = start("vllm", ROWS["vllm"], "SmolLM2-135M-Instruct-bf16", folder)
    yield running
    end_agent(running)


@pytest.fixture
def agents(vllm: RunningAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningAgent]]:
    """All four by name."""
    running = {"vllm": vllm}
    rows = {"llama-1": ROWS["real_engine"], "llama-2": ROWS["real_engine"], "mlx": ROWS["mlx"]}
    try:
        for worker, row in rows.items():
            folder = tmp_path_factory.mktemp(worker)
            running[worker] = start(worker, row, "SmolLM2-135M-Instruct-f32", folder)
        yield running
    finally:
        for worker in rows.keys() & running.keys():
            end_agent(running[worker])


@dataclass
class Room:
    """A balancer, as its clients see it."""

    url: str
    agents: dict[str, RunningAgent]
    http: aiohttp.ClientSession

    async def states(self) -> dict[str, str]:
        async with self.http.get(f"{self.url}/health") as answer:
            return {worker["id"]: worker["state"] for worker in (await answer.json())["workers"]}

    async def until(self, worker: str, state: str) -> None:
        async with asyncio.timeout(START_SECONDS):
            while (await self.states()).get(worker) != state:
                await asyncio.sleep(0.05)

    def kill_engine(self, worker: str) -> None:
        os.kill(engine_of(self.agents[worker]).pid, signal.SIGKILL)

    def kill_agent(self, worker: str) -> None:
        self.agents[worker].process.kill()


@pytest.fixture
async def room(agents: dict[str, RunningAgent], tmp_path: Path) -> AsyncIterator[Room]:
    """Every worker is ready."""
    ports = {worker: int(agent.url.rpartition(":")[2]) for worker, agent in agents.items()}
    rows = [
        {"id": worker, "host": "127.0.0.1", "port": port, "type": "agent"} for worker, port in ports.items()
    ]
    config, log, port = tmp_path / "balancer.json", tmp_path / "balancer.log", free_port()
    # Without comments the status waits for the first word, and its headers name the worker.
    config.write_text(json.dumps({"workers": rows, "comment_after": 120}))
    words = ("serve", "--host", "127.0.0.1", "--port", str(port), "--no-mdns", "--config", str(config))
    async with command(
        *("balancer", *words, "--data-dir", str(tmp_path / "data")),
        output=log,
        home=tmp_path,
        **SHARED_KEY,
    ) as balancer:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
            made = Room(f"http://127.0.0.1:{port}", agents, http)
            await until_it_listens(made, balancer)
            await asyncio.gather(*(made.until(worker, "ready") for worker in agents))
            yield made


async def until_it_listens(room: Room, balancer: Command) -> None:
    async with asyncio.timeout(60):
        while True:
            assert balancer.process.returncode is None, balancer.text()
            try:
                await room.states()
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
            else:
                return


@dataclass
class Whole:
    """An answer in one piece."""

    status: int
    worker: str
    body: dict[str, Any]


@dataclass
class Traffic:
    """Clients that ask one question after the other, and what came of each."""

    room: Room
    streams: list[Told] = field(default_factory=list)
    """Those under way included."""
    whole: list[Whole] = field(default_factory=list)
    stopping: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def client(self, kinds: Iterator[str]) -> None:
        while not self.stopping:
            text = f"Tell a story about {next(self._numbers)} foxes and a river."
            if next(kinds) == "stream":
                self.streams.append(told := Told())
                await ask(self.room.http, self.room.url, question(MODEL, text, TOKENS), answer=told)
            else:
                body = {**question(MODEL, text, TOKENS), "stream": False}
                del body["stream_options"]
                async with self.room.http.post(self.room.url + CHAT, json=body) as answer:
                    worker = answer.headers.get("X-Balancer-Worker", "")
                    self.whole.append(Whole(answer.status, worker, await answer.json()))

    @property
    def answered(self) -> Counter[str]:
        """How many answers came to their end, by worker."""
        return Counter(
            [answer.worker for answer in self.whole]
            + [told.workers[0] for told in self.streams if told.done and told.workers]
        )

    def begun_on(self, worker: str) -> list[Told]:
        """Streams of which some words have come from there, and many more are to come."""
        return [
            told
            for told in self.streams
            if told.workers == [worker] and 1 < len(told.pieces) < TOKENS // 2 and not told.finish_reasons
        ]

    async def until_begun_on(self, worker: str) -> None:
        async with asyncio.timeout(120):
            while not self.begun_on(worker):
                await asyncio.sleep(0.005)

    async def until_all_answered(self) -> None:
        """Each worker at least once."""
        async with asyncio.timeout(240):
            while self.answered.keys() < SLOTS.keys():
                await asyncio.sleep(0.05)

    async def more(self, answers: int) -> None:
        """Waits for so many more."""
        before = self.answered.total()
        async with asyncio.timeout(300):
            while self.answered.total() < before + answers:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def traffic(room: Room, *kinds: str) -> AsyncIterator[Traffic]:
    """On leaving, what has been asked is answered to its end."""
    made = Traffic(room)
    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            turns = itertools.islice(itertools.cycle(kinds), number % len(kinds), None)
            clients.create_task(made.client(turns))
        try:
            yield made
        finally:
            made.stopping = True


def insist_on_whole_answers(asked: Traffic) -> None:
    """As if nothing had happened."""
    for answer in asked.whole:
        assert answer.status == 200, answer.body
        [choice] = answer.body["choices"]
        assert choice["message"]["content"]
        assert choice["finish_reason"] in ("stop", "length")
    for told in asked.streams:
        insist_on_one_stream(told)


def insist_on_one_stream(told: Told) -> None:
    assert told.errors == []
    assert told.done
    assert told.text
    assert len(told.finish_reasons) == 1
    assert set(told.roles) == {"assistant"}  # MLX says it with each piece
    assert len({event["id"] for event in told.events}) == 1
    assert {event["model"] for event in told.events} == {MODEL}
    assert told.usage["completion_tokens"] <= TOKENS + len(told.seams)


async def test_an_engine_and_an_agent_that_have_a_twin_die_and_nobody_notices(room: Room) -> None:
    async with traffic(room, "stream", "whole") as asked:
        await asked.until_all_answered()
        await asked.until_begun_on("llama-1")
        room.kill_engine("llama-1")
        await asked.more(CLIENTS)
        await room.until("llama-1", "ready")
        await asked.until_begun_on("llama-2")
        room.kill_agent("llama-2")
        await asked.more(2 * CLIENTS)
        assert (await room.states())["llama-2"] == "lost"
    insist_on_whole_answers(asked)
    assert sum(len(told.seams) for told in asked.streams) >= 2  # a stream of each was taken over
    print(f"\n{asked.answered.total()} answers: {dict(asked.answered)}")


async def test_answers_in_one_piece_survive_whoever_dies(room: Room) -> None:
    async with traffic(room, "whole") as asked:
        await asked.until_all_answered()
        room.kill_engine("vllm")
        await asked.more(CLIENTS)
        room.kill_agent("mlx")
        await asked.more(CLIENTS)
    insist_on_whole_answers(asked)
    print(f"\n{asked.answered.total()} answers: {dict(asked.answered)}")
    await room.until("vllm", "ready")


async def test_a_stream_begun_where_nobody_can_take_over_ends_with_an_error(room: Room) -> None:
    async with traffic(room, "stream") as asked:
        # At once: as soon as it is known to be slow here, all others are preferred to it.
        await asked.until_begun_on("mlx")
        begun = asked.begun_on("mlx")
        room.kill_engine("mlx")
        await asked.more(CLIENTS)
    cut = [told for told in asked.streams if told.errors]
    assert cut
    assert all(told.workers == ["mlx"] and told.pieces for told in cut)
    assert {id(told) for told in cut} >= {id(told) for told in begun}
    for told in cut:
        assert (told.errors, told.done, told.finish_reasons) == (["stream_broken"], False, [])
    for told in asked.streams:
        if not told.errors:
            insist_on_one_stream(told)
    print(f"\n{asked.answered.total()} answers: {dict(asked.answered)}; {len(cut)} ended with an error")
