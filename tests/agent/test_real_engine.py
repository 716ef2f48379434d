"""The whole agent as a process, with the real llama.cpp engine and a small real model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from agent.conftest import MODEL, RunningAgent, end_agent, start_agent
from agent.meeting import within_sessions
from agent.scenes import alive, until, wait_until
from worker_agent import wire
from worker_agent.wire import EngineState, Report

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"
LONG_STORY = "Write a very long story about a tree."
"""It takes 1500 tokens at least."""
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 150
"""1500 tokens: ten seconds of prefill on one slow thread."""


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with within_sessions() as session:
        yield session


def question(text: str, *, tokens: int, begun: str | None = None) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": True, "temperature": 0}


async def reports(client: aiohttp.ClientSession, agent: RunningAgent) -> AsyncIterator[Report]:
    async with client.get(agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            yield Report.from_line(line)


async def report_of(client: aiohttp.ClientSession, agent: RunningAgent, state: EngineState) -> Report:
    """The first report with this state; of one that is ready, when it has been asked whether it continues."""
    async with asyncio.timeout(40):
        async for report in reports(client, agent):
            if report.state is state and (state is not EngineState.READY or report.models[0].continues):
                return report
    raise AssertionError("the report stream ended")


async def metric(client: aiohttp.ClientSession, agent: RunningAgent, name: str) -> int:
    """What the engine itself says, past the agent."""
    headers = {"Authorization": f"Bearer {agent.engine_secret()}"}
    async with client.get(f"http://127.0.0.1:{agent.engine_port()}/metrics", headers=headers) as answer:
        found = re.search(rf"^llamacpp:{name} (\d+)", await answer.text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


async def until_it_rests(agent: RunningAgent) -> None:
    """Waits until the engine computes no more.

    Told by the processor's clock: llama.cpp looks whether its client has left only after a second in which no
    other answer was ready, so that asking it for its metrics all the time would keep it from noticing.
    """
    engine = agent.engine()

    def used() -> float:
        times = engine.cpu_times()
        return float(times.user + times.system)

    async with asyncio.timeout(30):
        before, idle = used(), 0
        while idle < 3:
            await asyncio.sleep(0.1)
            now = used()
            idle = idle + 1 if now - before < 0.03 else 0
            before = now


async def test_it_reports_the_model_once_it_has_generated(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    report = await report_of(client, shared_agent, EngineState.READY)
    [model] = report.models
    assert (report.engine, report.slots, model.name, model.context_tokens) == ("llama.cpp", 2, MODEL, 2048)
    assert model.identity == "SmolLM2-135M-Instruct.Q4_1.gguf"
    # 30 layers of 3 heads, 64 wide, keys and values in f16: 23040 bytes a token, of the cache's 512 MiB.
    assert (model.memory_tokens, model.cache_tokens) == (4096, 4096 + 512 * 2**20 // 23040)


async def test_it_streams_token_by_token_to_the_end_marker(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    async with client.post(shared_agent.url + CHAT, json=question("Hi", tokens=12)) as answer:
        assert answer.content_type == "text/event-stream"
        events = [line async for line in answer.content if line.strip()]
    assert events[-1] == b"data: [DONE]\n"
    assert len(events) > 5


async def test_twenty_streams_in_a_row_meet_no_stale_connection(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    for _ in range(20):
        async with client.post(shared_agent.url + CHAT, json=question("Hi", tokens=2)) as answer:
            assert answer.status == 200
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_while_tokens_come_frees_the_engines_slot(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    made = await metric(client, shared_agent, "tokens_predicted_total")
    async with client.post(shared_agent.url + CHAT, json=question(LONG_STORY, tokens=1500)) as answer:
        await answer.content.readany()
    await until_it_rests(shared_agent)
    assert await metric(client, shared_agent, "requests_processing") == 0
    assert await metric(client, shared_agent, "tokens_predicted_total") < made + 1000


async def test_a_slot_counts_as_taken_until_the_engine_has_let_go_of_it(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    async with client.post(shared_agent.url + CHAT, json=question(LONG_STORY, tokens=1500)) as answer:
        await answer.content.readany()
    await until_nothing_runs(client, shared_agent)
    assert await metric(client, shared_agent, "requests_processing") == 0


async def until_nothing_runs(client: aiohttp.ClientSession, agent: RunningAgent) -> None:
    """As the agent reports it."""
    async with asyncio.timeout(30):
        async for report in reports(client, agent):
            if report.running == 0:
                return


@pytest.mark.parametrize("cut", [1, 3, 8, 15, 30])
async def test_an_answer_that_was_begun_elsewhere_goes_on_without_a_seam(
    client: aiohttp.ClientSession, shared_agent: RunningAgent, cut: int
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    text = "Tell a short story about a fox and a river."
    pieces = await words(client, shared_agent, question(text, tokens=48))
    begun = "".join(pieces[:cut])
    rest = "".join(pieces)[len(begun) :]
    body = question(text, tokens=48 - cut, begun=begun)
    headers = {wire.CONTINUE_HEADER: "1"}
    went_on = "".join(await words(client, shared_agent, body, headers))
    # Two greedy runs may part later on; at the seam nothing is missing and nothing is said twice.
    assert went_on[:8] == rest[:8]


async def words(
    client: aiohttp.ClientSession,
    agent: RunningAgent,
    body: dict[str, object],
    headers: dict[str, str] | None = None,
) -> list[str]:
    """What a stream says, piece by piece."""
    async with client.post(agent.url + CHAT, json=body, headers=headers) as answer:
        assert answer.status == 200
        *events, done, _ = (await answer.read()).split(b"\n\n")
    assert done == b"data: [DONE]"
    choices = [json.loads(event.removeprefix(b"data: "))["choices"] for event in events]
    deltas = [choice[0]["delta"] for choice in choices if choice]
    return [delta["content"] for delta in deltas if delta.get("content")]


async def test_a_client_that_leaves_before_the_first_token_stops_the_engines_reading(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    read = await metric(client, shared_agent, "prompt_tokens_total")
    asking = asyncio.ensure_future(_ask(client, shared_agent, question(LONG_PROMPT, tokens=1)))
    await until_it_works(client, shared_agent)
    asking.cancel()
    await until_it_rests(shared_agent)
    assert await metric(client, shared_agent, "requests_processing") == 0
    assert (
        await metric(client, shared_agent, "prompt_tokens_total") < read + 1000
    )  # it did not read to the end
    await until_nothing_runs(client, shared_agent)


async def _ask(client: aiohttp.ClientSession, agent: RunningAgent, body: dict[str, object]) -> bytes:
    async with client.post(agent.url + CHAT, json=body) as answer:
        return await answer.read()


async def until_it_works(client: aiohttp.ClientSession, agent: RunningAgent) -> None:
    async with asyncio.timeout(10):
        while await metric(client, agent, "requests_processing") == 0:
            await asyncio.sleep(0.02)


async def test_the_engines_own_refusal_of_a_long_prompt_passes_through(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    async with client.post(shared_agent.url + CHAT, json=question(LONG_PROMPT * 3, tokens=1)) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["type"] == "exceed_context_size_error"


async def test_no_other_program_can_use_the_engine_past_the_agent(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    url = f"http://127.0.0.1:{shared_agent.engine_port()}{CHAT}"
    async with client.post(url, json=question("Hi", tokens=1)) as answer:
        assert answer.status == 401
    assert shared_agent.engine_secret() not in " ".join(shared_agent.engine().cmdline())


async def test_neither_prompts_nor_answers_are_logged(
    client: aiohttp.ClientSession, shared_agent: RunningAgent
) -> None:
    await report_of(client, shared_agent, EngineState.READY)
    canary = "zanzibarine"
    async with client.post(shared_agent.url + CHAT, json=question(canary, tokens=2)) as answer:
        await answer.read()
    async with client.post(
        shared_agent.url + CHAT, data=f'{{"{canary}', headers={"Content-Type": "application/json"}
    ) as answer:
        assert answer.status == 400
    reader, writer = await asyncio.open_connection("127.0.0.1", int(shared_agent.url.rpartition(":")[2]))
    writer.write(f"{canary} not http\r\n\r\n".encode())
    await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert not [line for line in shared_agent.log if canary in line]


async def test_an_engine_killed_mid_answer_is_told_and_generates_again_soon(
    client: aiohttp.ClientSession, own_agent: RunningAgent
) -> None:
    await report_of(client, own_agent, EngineState.READY)
    first = own_agent.engine().pid
    async with client.post(own_agent.url + CHAT, json=question(LONG_STORY, tokens=1500)) as answer:
        await answer.content.readany()
        os.kill(first, signal.SIGKILL)
        assert last_error(await answer.read()) == "engine_died"
    resting = await report_of(client, own_agent, EngineState.RESTING)
    assert [model.name for model in resting.models] == [MODEL]  # it will serve it again
    assert resting.detail.startswith("llama.cpp ended by signal 9")
    await report_of(client, own_agent, EngineState.READY)
    assert own_agent.engine().pid != first
    async with client.post(own_agent.url + CHAT, json=question("Hi", tokens=1)) as answer:
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


def last_error(stream: bytes) -> str:
    """The code of the error that a stream ends with."""
    *_, last, nothing = stream.split(b"\n\n")
    assert nothing == b""
    code: str = json.loads(last.removeprefix(b"data: "))["error"]["code"]
    return code


async def test_a_killed_agent_leaves_no_engine(
    client: aiohttp.ClientSession, own_agent: RunningAgent
) -> None:
    await report_of(client, own_agent, EngineState.READY)
    family = own_agent.family()
    assert len(family) == 3
    own_agent.process.kill()
    own_agent.process.wait()
    await until(lambda: not any(map(alive, family)))


async def test_sigterm_lets_a_running_answer_end_then_leaves_nothing(
    client: aiohttp.ClientSession, own_agent: RunningAgent
) -> None:
    await report_of(client, own_agent, EngineState.READY)
    family = own_agent.family()
    async with client.post(own_agent.url + CHAT, json=question("Tell me a story.", tokens=60)) as answer:
        await answer.content.readany()
        own_agent.process.send_signal(signal.SIGTERM)
        assert (await report_of(client, own_agent, EngineState.STOPPING)).running == 1
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    assert await asyncio.to_thread(own_agent.process.wait, 20) == 0
    await until(lambda: not any(map(alive, family)))


async def test_a_second_signal_does_not_wait_for_running_answers(
    client: aiohttp.ClientSession, own_agent: RunningAgent
) -> None:
    await report_of(client, own_agent, EngineState.READY)
    async with client.post(own_agent.url + CHAT, json=question(LONG_STORY, tokens=1900)) as answer:
        await answer.content.readany()
        own_agent.process.send_signal(signal.SIGTERM)
        await report_of(client, own_agent, EngineState.STOPPING)
        own_agent.process.send_signal(signal.SIGINT)
        assert last_error(await answer.read()) == "stopping"
    assert await asyncio.to_thread(own_agent.process.wait, 5) == 0


def test_an_agent_whose_parent_is_gone_stops(tmp_path: Path) -> None:
    agent = start_agent(tmp_path, ["--exit-with-parent"], stdin=subprocess.PIPE)
    try:
        family = agent.family()
        assert agent.process.stdin is not None
        agent.process.stdin.close()
        assert agent.process.wait(20) == 0
        wait_until(lambda: not any(map(alive, family)))
    finally:
        end_agent(agent)
