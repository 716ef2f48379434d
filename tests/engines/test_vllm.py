"""The vLLM path for real: an agent that runs vLLM, and a balancer over that agent and a vLLM without one.

vLLM's CPU build is enough; on a machine with a GPU its ordinary one serves as well. What it needs beside
our own command line is in `VLLM_VARIABLES`, and no flag at all.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent.conftest import RunningAgent, end_agent
from agent.meeting import within_sessions

from balancer.prefills import FLAGS
from tests.e2e.conftest import OpenRoom, free_port
from tests.engines import chats
from tests.engines.chats import Told, ask
from tests.engines.conftest import engine_of, environment, start_agent
from tests.engines.engines import VLLM_VARIABLES, told
from worker_agent import wire
from worker_agent.continuation import SEAM_CHARACTERS
from worker_agent.wire import EngineState, Report

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODEL = "small"
SLOTS = 4
"""Fewer than there are questions at once, so that both engines have some."""
START_SECONDS = 400.0
STORY = "Tell a short story about a fox and a river."


@pytest.fixture(scope="session")
def python() -> Path:
    return told("WORKER_AGENT_TEST_VLLM") / "python"


@pytest.fixture(scope="session")
def model() -> Path:
    return told("WORKER_AGENT_TEST_VLLM_MODEL")


@dataclass
class PlainEngine:
    """vLLM as people run it without us."""

    command: list[str]
    output: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment(**VLLM_VARIABLES),
                start_new_session=True,
            )

    def kill(self) -> None:
        """All of it, without a word."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def agent(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One for all tests; one that hurts its engine leaves it ready again."""
    flags = ["--name", MODEL, "--slots", str(SLOTS), "--context-tokens", "2048", "--id", "agent"]
    running = start_agent(python, "vllm", model, tmp_path_factory.mktemp("agent"), VLLM_VARIABLES, flags)
    yield running
    end_agent(running)


@pytest.fixture(scope="session")
def plain(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainEngine]:
    port = free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--max-num-seqs", str(SLOTS), "--max-model-len", "2048"),
    ]
    engine = PlainEngine(command, tmp_path_factory.mktemp("plain") / "log", port)
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with within_sessions(120) as session:
        yield session


async def report_of(client: aiohttp.ClientSession, agent: RunningAgent, state: EngineState) -> Report:
    """The first report with this state; of one that is ready, when it was found out whether it continues."""
    no_limit = aiohttp.ClientTimeout(total=None)
    async with asyncio.timeout(START_SECONDS):
        async with client.get(agent.url + wire.REPORT_PATH, timeout=no_limit) as stream:
            async for line in stream.content:
                report = Report.from_line(line)
                if report.state is state and (state is not EngineState.READY or report.models[0].continues):
                    return report
    raise AssertionError("the report stream ended")


async def until_it_answers(client: aiohttp.ClientSession, plain: PlainEngine) -> None:
    async with asyncio.timeout(START_SECONDS):
        while True:
            assert plain.process is not None
            assert plain.process.poll() is None, plain.output.read_text(errors="replace")[-4000:]
            try:
                async with client.get(plain.url + "/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it does not listen yet
            await asyncio.sleep(0.2)


def question(text: str, tokens: int, begun: str | None = None) -> dict[str, Any]:
    return chats.question(MODEL, text, tokens, begun)


# The agent and its engine


async def test_it_reports_what_the_engine_holds_once_it_has_generated(
    client: aiohttp.ClientSession, agent: RunningAgent, model: Path
) -> None:
    report = await report_of(client, agent, EngineState.READY)
    [served] = report.models
    assert (report.engine, report.slots, served.name, served.context_tokens) == ("vllm", SLOTS, MODEL, 2048)
    assert served.identity == model.name
    assert served.memory_tokens is not None
    assert served.memory_tokens >= 2048
    assert served.memory_tokens == served.cache_tokens
    assert served.continues


async def test_it_tells_what_came_from_its_prefix_cache(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    body = question("The quick brown fox jumps over the lazy dog. " * 40, 4)
    first, second = await ask(client, agent.url, body), await ask(client, agent.url, body)
    assert first.done
    assert second.done
    assert second.usage["prompt_tokens"] == first.usage["prompt_tokens"]
    assert second.usage["prompt_tokens_details"]["cached_tokens"] > 0


# An engine of its own, and one behind an agent, under one balancer

QUESTIONS = tuple(
    f"Tell a long story about {what}."
    for what in (
        "a fox and a river",
        "a lighthouse and a storm",
        "a child who counts to one hundred",
        "a baker in winter",
        "two friends on a mountain",
        "an old clock",
    )
)
TOKENS = 120


async def test_without_an_agent_it_goes_on_only_with_the_flags_that_a_balancer_finds(
    client: aiohttp.ClientSession, plain: PlainEngine
) -> None:
    await until_it_answers(client, plain)
    whole = await ask(client, plain.url, question(STORY, 48))
    begun = "".join(whole.pieces[:15]).rstrip()
    rest = whole.text[len(begun) :]
    body = question(STORY, 33, begun=begun)
    assert (await ask(client, plain.url, {**body, **FLAGS})).text[:SEAM_CHARACTERS] == rest[:SEAM_CHARACTERS]
    assert (await ask(client, plain.url, body)).text[:SEAM_CHARACTERS] != rest[:SEAM_CHARACTERS]


@pytest.mark.parametrize("pieces", [2, 40])
@pytest.mark.parametrize("victim", ["agent", "plain"])
async def test_streams_of_a_killed_engine_go_on_at_the_other(
    client: aiohttp.ClientSession,
    agent: RunningAgent,
    plain: PlainEngine,
    open_room: OpenRoom,
    victim: str,
    pieces: int,
) -> None:
    """`continues` is not told of the one without an agent: the balancer finds out with questions of its own,
    in the moment in which it first matters."""
    await asyncio.gather(report_of(client, agent, EngineState.READY), until_it_answers(client, plain))
    # Without comments the status waits for the first word, and its headers name the worker.
    async with open_room(*rows(agent, plain), comment_after=120) as room:
        await room.ready(2)
        answers = [Told() for _ in QUESTIONS]
        asking = [
            asyncio.ensure_future(ask(client, room.url, question(text, TOKENS), answer=answer))
            for text, answer in zip(QUESTIONS, answers, strict=True)
        ]
        await room.until(
            lambda: any(
                pieces <= len(answer.pieces) < TOKENS // 2
                for answer in answers
                if answer.workers == [victim] and not answer.finish_reasons
            ),
            f"a stream that {victim} has begun",
        )
        hit = room.worker(victim).running
        kill(victim, agent, plain)
        try:
            async with asyncio.timeout(120):
                await asyncio.gather(*asking)
            await room.idle()
        finally:
            if plain.process is None:
                plain.start()
    assert 0 < sum(len(answer.seams) for answer in answers) <= hit
    await until_it_answers(client, plain)
    for answer, text in zip(answers, QUESTIONS, strict=True):
        await is_one_answer(client, plain, answer, text)


def rows(agent: RunningAgent, plain: PlainEngine) -> list[dict[str, Any]]:
    port = int(agent.url.rpartition(":")[2])
    return [
        {"id": "agent", "host": "127.0.0.1", "port": port, "type": "agent"},
        {
            "id": "plain",
            "host": "127.0.0.1",
            "port": plain.port,
            "type": "openai",
            "max_concurrent_requests": SLOTS,
        },
    ]


def kill(victim: str, agent: RunningAgent, plain: PlainEngine) -> None:
    if victim == "plain":
        plain.kill()
    else:
        os.killpg(engine_of(agent).pid, signal.SIGKILL)


async def is_one_answer(client: aiohttp.ClientSession, plain: PlainEngine, answer: Told, text: str) -> None:
    """What came is one whole answer, as if nothing had happened."""
    assert answer.done
    assert len({event["id"] for event in answer.events}) == 1
    assert len({event["created"] for event in answer.events}) == 1
    assert {event["model"] for event in answer.events} == {MODEL}
    assert answer.roles == ["assistant"]
    assert answer.finish_reasons in (["length"], ["stop"])
    prompt = await tokens_of(client, plain, {"messages": question(text, 1)["messages"]})
    assert answer.usage["prompt_tokens"] == len(prompt)
    if answer.finish_reasons == ["length"]:
        assert answer.usage["completion_tokens"] == TOKENS
    # The same text may be other tokens where it was said in two parts; and the one that ends it is not text.
    said = len(await tokens_of(client, plain, {"prompt": answer.text, "add_special_tokens": False}))
    assert abs(answer.usage["completion_tokens"] - said) <= 1 + len(answer.seams)
    for seam in answer.seams:
        stem = answer.text[:seam].rstrip()
        given = await tokens_of(client, plain, {"prompt": stem, "add_special_tokens": False})
        likely = await likely_next(client, plain, prompt + given)
        assert any(answer.text[len(stem) :].startswith(token) for token in likely)


async def tokens_of(client: aiohttp.ClientSession, plain: PlainEngine, body: dict[str, Any]) -> list[int]:
    async with client.post(plain.url + "/tokenize", json={"model": MODEL, **body}) as answer:
        return list((await answer.json())["tokens"])


async def likely_next(client: aiohttp.ClientSession, plain: PlainEngine, prompt: list[int]) -> list[str]:
    """The five likeliest tokens after these, from the engine itself and without any way of going on: two
    greedy runs part where two of them are nearly as likely, but neither says another one."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    async with client.post(plain.url + "/v1/completions", json=body) as answer:
        [choice] = (await answer.json())["choices"]
        return list(choice["logprobs"]["top_logprobs"][0])
