"""An agent process with several models, all of them the small real one under other names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from agent.conftest import MODEL, RunningAgent, end_agent, start_agent
from agent.meeting import within_sessions
from agent.scenes import until
from agent.test_command_line import downloaded
from worker_agent import installed, wire
from worker_agent.wire import ModelState, Report, ServedModel

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with within_sessions() as session:
        yield session


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    path = installed.detect().embedded_model
    assert path is not None
    config = tmp_path / "agent.json"
    models = {
        "second": {"path": path, "keep_alive_seconds": 2},
        "absent": {"path": str(tmp_path / "absent.gguf")},
        "expected": {},
    }
    config.write_text(json.dumps({"models": models}))
    first = ("--model", path, "--name", MODEL)
    running = start_agent(tmp_path / "data", ("--config", str(config), *first))
    yield running
    print("\n".join(line for line in running.log if "DEBUG" not in line))
    end_agent(running)


async def model_of(
    client: aiohttp.ClientSession, agent: RunningAgent, name: str, fits: Callable[[ServedModel], bool]
) -> Report:
    """The first report in which this model is like that."""
    async with asyncio.timeout(60), client.get(agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            report = Report.from_line(line)
            if any(model.name == name and fits(model) for model in report.models):
                return report
    raise AssertionError("the report stream ended")


def is_in(state: ModelState) -> Callable[[ServedModel], bool]:
    return lambda model: model.state is state


async def served(client: aiohttp.ClientSession, agent: RunningAgent, model: str) -> bool:
    question = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    async with client.post(agent.url + CHAT, json={"model": model, **question}) as answer:
        return answer.status == 200 and (await answer.read()).endswith(b"data: [DONE]\n\n")


def engines(agent: RunningAgent) -> int:
    argvs = [child.cmdline() for child in psutil.Process(agent.process.pid).children(recursive=True)]
    return sum(argv[1:3] == ["-m", "worker_agent.engines.llama_cpp_runner"] for argv in argvs)


async def test_a_second_model_is_loaded_on_demand_beside_the_first_and_unloaded_when_it_is_idle(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    report = await model_of(client, agent, MODEL, is_in(ModelState.LOADED))
    assert [model.name for model in report.models] == [MODEL, "second", "absent", "expected"]
    report = await model_of(client, agent, "expected", is_in(ModelState.FAILED))
    by_name = {model.name: model for model in report.models}
    assert by_name["second"].state is ModelState.UNLOADED
    assert "absent.gguf" in by_name["absent"].detail
    assert "worker-agent models download" in by_name["expected"].detail
    assert engines(agent) == 1
    assert await served(client, agent, "second")
    assert engines(agent) == 2
    report = await model_of(client, agent, "second", is_in(ModelState.LOADED))
    second = report.models[1]
    assert second.memory_bytes is not None
    assert report.memory_held_bytes == second.memory_bytes + (report.models[0].memory_bytes or 0)
    await model_of(client, agent, "second", is_in(ModelState.UNLOADED))
    assert await served(client, agent, MODEL)
    await until(lambda: engines(agent) == 1)


async def test_a_downloaded_model_is_the_main_one_where_its_name_was_given(
    client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    downloaded(tmp_path, "tiny")
    config = tmp_path / "agent.json"
    config.write_text(json.dumps({"models": {"tiny": {"slots": 3}}}))
    running = start_agent(tmp_path, ("--model", "tiny", "--config", str(config)))
    try:
        report = await model_of(client, running, "tiny", is_in(ModelState.LOADED))  # nobody asked for it
        assert [(model.name, model.slots) for model in report.models] == [("tiny", 3)]
        assert await served(client, running, "tiny")
    finally:
        end_agent(running)


async def test_a_model_is_loaded_and_unloaded_by_order_of_whoever_holds_the_key(
    client: aiohttp.ClientSession, agent: RunningAgent
) -> None:
    await model_of(client, agent, MODEL, is_in(ModelState.LOADED))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as stranger:
        assert await order(stranger, agent, "unload", MODEL) == 401
    assert await order(client, agent, "unload", MODEL) == 200
    assert engines(agent) == 0
    assert await order(client, agent, "load", MODEL) == 202
    await model_of(client, agent, MODEL, is_in(ModelState.LOADED))
    assert await served(client, agent, MODEL)


async def order(client: aiohttp.ClientSession, agent: RunningAgent, word: str, model: str) -> int:
    async with client.post(f"{agent.url}{wire.MODELS_PATH}/{word}", json={"name": model}) as answer:
        return answer.status
