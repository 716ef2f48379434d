"""The MLX path for real: an agent that runs `mlx_lm server`, on a Mac or on MLX's CPU build for Linux."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from agent.conftest import RunningAgent, end_agent
from agent.scenes import alive, until

from tests.engines.conftest import start_agent, told
from worker_agent import wire
from worker_agent.wire import EngineState, Report

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(600)]

CHAT = "/v1/chat/completions"
MODEL = "small"
HOW = """\
Make an environment with MLX and what the agent depends on, and a folder with a small chat model (f32
safetensors for a CPU; `config.json`, tokenizer and chat template beside it):
  python3 -m venv V && uv pip install --python V/bin/python mlx-lm && \
uv pip install --python V/bin/python -r pyproject.toml
  (on Linux "mlx[cpu]" besides; its own BLAS is slow there, 3 tokens/s: have OpenBLAS in LD_PRELOAD)
then: WORKER_AGENT_TEST_MLX=V/bin WORKER_AGENT_TEST_MLX_MODEL=FOLDER uv run pytest -m mlx tests/engines"""


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One for all tests. There is no hub cache, which `GET /v1/models` does not survive."""
    python, model = told("WORKER_AGENT_TEST_MLX", HOW) / "python", told("WORKER_AGENT_TEST_MLX_MODEL", HOW)
    folder = tmp_path_factory.mktemp("agent")
    variables = {"HF_HUB_CACHE": str(folder / "none")}
    running = start_agent(python, "mlx", model, folder, variables, ["--name", MODEL, "--slots", "2"])
    yield running
    end_agent(running)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


async def report_of(client: aiohttp.ClientSession, agent: RunningAgent, state: EngineState) -> Report:
    """The first report with this state."""
    async with asyncio.timeout(200), client.get(agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            if (report := Report.from_line(line)).state is state:
                return report
    raise AssertionError("the report stream ended")


def question(text: str, tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(
    client: aiohttp.ClientSession,
    agent: RunningAgent,
    body: dict[str, Any],
    events: list[bytes] | None = None,
) -> list[bytes]:
    """The data of each event of the whole answer; `events` can be looked at while it comes."""
    events = [] if events is None else events
    async with client.post(agent.url + CHAT, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                events.append(line.removeprefix(b"data: ").strip())
    return events


async def test_it_reports_the_model_once_it_has_generated(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    report = await report_of(client, agent, EngineState.READY)
    [served] = report.models
    assert (report.engine, report.slots, served.name) == ("mlx", 2, MODEL)
    assert (served.context_tokens, served.memory_tokens, served.continues) == (None, None, False)


async def test_it_streams_to_the_end_marker_with_usage(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    *events, done = await ask(client, agent, question("Name three trees.", 8))
    assert done == b"[DONE]"
    [usage] = [event["usage"] for event in map(json.loads, events) if event.get("usage")]
    assert 1 <= usage["completion_tokens"] <= 8


async def test_two_answers_come_at_once_over_http_1_0(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    answers: list[list[bytes]] = [[], []]
    asking = [
        asyncio.ensure_future(ask(client, agent, question("Count to fifty.", 40), events))
        for events in answers
    ]
    await until(lambda: all(len(events) > 3 for events in answers), seconds=60)
    assert not any(one.done() for one in asking)
    await asyncio.gather(*asking)
    assert all(events[-1] == b"[DONE]" for events in answers)


async def test_after_clients_that_left_others_are_answered(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await report_of(client, agent, EngineState.READY)
    for _ in range(3):
        events: list[bytes] = []
        leaving = asyncio.ensure_future(ask(client, agent, question("Count to a thousand.", 1500), events))
        await until(lambda events=events: len(events) > 2, seconds=60)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    answered = await ask(client, agent, question("Name three trees.", 4))
    assert answered[-1] == b"[DONE]"


async def test_an_answer_that_was_begun_elsewhere_is_refused(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    """It would close the text as a finished turn, and begin anew."""
    await report_of(client, agent, EngineState.READY)
    body = question("Name three trees.", 8)
    body["messages"].append({"role": "assistant", "content": "An oak, a"})
    async with client.post(agent.url + CHAT, json=body, headers={wire.CONTINUE_HEADER: "1"}) as answer:
        assert answer.status == 409
        assert (await answer.json())["error"]["code"] == "cannot_continue"


async def test_a_stop_leaves_no_process(client: aiohttp.ClientSession, agent: RunningAgent) -> None:
    await report_of(client, agent, EngineState.READY)
    family = agent.family()
    assert len(family) >= 3
    agent.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(agent.process.wait, 30) == 0
    await until(lambda: not any(map(alive, family)))
