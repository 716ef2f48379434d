"""What every engine owes the agent, whichever it is: one suite over all of them, each for real.

An agent is started as a user starts it, asked over HTTP, and its engine is looked at from outside: by its own
counts where it has any, else by its processes. What an engine cannot do is in its row (`engines.py`), and is
tested as such.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from agent.conftest import RunningAgent, end_agent
from agent.meeting import within_sessions
from agent.scenes import alive, until

from tests.engines import chats
from tests.engines.chats import CHAT, Told
from tests.engines.conftest import engine_of, engines_of, start_agent
from tests.engines.engines import REAL_ENGINES, LongPrompts, RealEngine
from worker_agent import wire
from worker_agent.continuation import SEAM_CHARACTERS
from worker_agent.engines import ENGINES
from worker_agent.wire import EngineState, ModelOrder, ModelState, Report, ServedModel

pytestmark = pytest.mark.timeout(900)

MODEL = "small"
LONG_STORY = "Write a very long story about a tree."
"""1500 tokens and more, greedily: measured with each of the engines."""
STORY = "Tell a short story about a fox and a river."
SEAMS = (3, 8, 15, 22, 30)
"""After so many pieces of an answer."""
SENTENCE = "The quick brown fox jumps over the lazy dog. "
"""Ten tokens."""
LONG_ANSWER = 1500
"""Tokens: half a minute and more of any engine here."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An agent with the engine that is looked at."""

    row: RealEngine
    agent: RunningAgent


@pytest.fixture(
    scope="session",
    params=[pytest.param(row, id=row.mark, marks=getattr(pytest.mark, row.mark)) for row in REAL_ENGINES],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """One agent for all tests of an engine; one that hurts the engine leaves it ready again."""
    row: RealEngine = request.param
    start = row.find()
    bounds = ("--slots", str(row.slots), "--context-tokens", str(row.context_tokens), "--threads", "1")
    flags = ("--name", MODEL, *bounds)
    folder = tmp_path_factory.mktemp("agent")
    running = start_agent(start.python, row.name, start.model, folder, start.variables, flags)
    yield Subject(row, running)
    end_agent(running)
    print("\n".join(running.log[-100:]))


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with within_sessions(240) as session:
        yield session


# Asking


def question(text: str, tokens: int, begun: str | None = None) -> dict[str, Any]:
    return chats.question(MODEL, text, tokens, begun)


async def ask(
    client: aiohttp.ClientSession,
    subject: Subject,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    answer: Told | None = None,
) -> Told:
    return await chats.ask(client, subject.agent.url, body, headers, answer)


async def report_of(client: aiohttp.ClientSession, subject: Subject, state: EngineState) -> Report:
    """The first report with this state; of one that is ready, when it was found out whether it continues."""
    no_limit = aiohttp.ClientTimeout(total=None)
    async with asyncio.timeout(subject.row.start_seconds):
        async with client.get(subject.agent.url + wire.REPORT_PATH, timeout=no_limit) as stream:
            async for line in stream.content:
                report = Report.from_line(line)
                known = report.models[0].continues or not subject.row.continues
                if report.state is state and (state is not EngineState.READY or known):
                    return report
    raise AssertionError("the report stream ended")


async def until_reported(client: aiohttp.ClientSession, subject: Subject, running: int) -> None:
    """Waits for a report of so many requests at the engine, abandoned ones included."""
    async with asyncio.timeout(60), client.get(subject.agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            if Report.from_line(line).running == running:
                return


async def until_model(client: aiohttp.ClientSession, subject: Subject, state: ModelState) -> ServedModel:
    """The model when it is first reported in this state."""
    async with asyncio.timeout(60), client.get(subject.agent.url + wire.REPORT_PATH) as stream:
        async for line in stream.content:
            [model] = Report.from_line(line).models
            if model.state is state:
                return model
    raise AssertionError("the report stream ended")


async def order(client: aiohttp.ClientSession, subject: Subject, word: str) -> int:
    """What a balancer that has met the agent may have done with the model. The answer's status."""
    path, body = f"{wire.MODELS_PATH}/{word}", ModelOrder(name=MODEL).model_dump_json().encode()
    async with client.post(subject.agent.url + path, data=body) as answer:
        return answer.status


# Looking at the engine, past the agent


async def count(client: aiohttp.ClientSession, subject: Subject, *names: str) -> int:
    """Its own counts by these names, added up."""
    engine = engine_of(subject.agent)
    argv = engine.cmdline()
    secret = ENGINES[subject.row.name].secret_variable
    headers = {} if secret is None else {"Authorization": f"Bearer {engine.environ()[secret]}"}
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}/metrics"
    async with client.get(url, headers=headers) as answer:
        page = await answer.text()
    found = [re.search(rf"^{name}(?:{{[^\n]*}})? ([\d.]+)", page, re.MULTILINE) for name in names]
    return sum(int(float(match[1])) for match in found if match is not None)


def processor_seconds(subject: Subject) -> float:
    """That the engine has used until now, with all its processes."""
    engine = engine_of(subject.agent)
    times = [process.cpu_times() for process in (engine, *engine.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


async def until_it_works(client: aiohttp.ClientSession, subject: Subject) -> None:
    """Waits until it computes something."""
    before = processor_seconds(subject)
    async with asyncio.timeout(60):
        while True:
            if subject.row.busy:
                works = await count(client, subject, *subject.row.busy) > 0
            else:
                works = processor_seconds(subject) > before + 0.5
            if works:
                return
            await asyncio.sleep(0.05)


async def until_it_rests(client: aiohttp.ClientSession, subject: Subject, *, seconds: float = 30.0) -> None:
    """Waits until it computes nothing, as it says itself where it counts.

    Its processes' clocks are asked first: llama.cpp looks whether its client has left only after a second in
    which it told nobody anything, so that asking for its counts all the time would keep it from noticing.
    """
    row = subject.row
    async with asyncio.timeout(seconds):
        if row.rests_by_clock:
            before, still = processor_seconds(subject), 0
            while still < 5:
                await asyncio.sleep(0.1)
                now = processor_seconds(subject)
                still = still + 1 if now - before < 0.03 else 0
                before = now
        while row.busy and await count(client, subject, *row.busy) > 0:
            assert not row.rests_by_clock, "its processes rest, and it says that it works"
            await asyncio.sleep(0.1)


# The contract


async def test_it_is_loaded_once_it_has_generated_and_says_what_it_holds(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    row, report = subject.row, await report_of(client, subject, EngineState.READY)
    [served] = report.models
    assert (report.engine, report.slots, report.running) == (row.name, row.slots, 0)
    assert (served.name, served.state, served.context_tokens) == (
        MODEL,
        ModelState.LOADED,
        row.context_tokens,
    )
    assert served.identity
    assert served.memory_bytes is not None
    assert served.memory_bytes > (served.size_bytes or 0) > 0
    assert report.memory_held_bytes == served.memory_bytes
    if row.tells_memory:
        assert served.memory_tokens is not None
        assert served.memory_tokens >= row.slots * row.context_tokens
        assert (served.cache_tokens or 0) >= served.memory_tokens
    else:
        assert (served.memory_tokens, served.cache_tokens) == (None, None)


async def test_it_streams_piece_by_piece_to_the_end_mark(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    await report_of(client, subject, EngineState.READY)
    answer = await ask(client, subject, question(LONG_STORY, 12))
    assert answer.done
    assert answer.errors == []
    assert len(answer.pieces) > 5
    assert answer.finish_reasons == ["length"]
    if subject.row.usage_in_streams:
        [usage] = answer.usages
        assert usage["completion_tokens"] == 12
    else:
        assert answer.usages == []


async def test_it_works_on_as_many_at_once_as_it_reports_and_the_next_is_refused(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    row = subject.row
    await report_of(client, subject, EngineState.READY)
    told = [Told() for _ in range(row.slots)]
    asking = [
        asyncio.ensure_future(ask(client, subject, question(LONG_STORY, 100), answer=answer))
        for answer in told
    ]
    await until(lambda: all(answer.pieces for answer in told), seconds=60)
    await until_reported(client, subject, row.slots)
    if row.busy:
        assert await count(client, subject, *row.busy) == row.slots
    async with client.post(subject.agent.url + CHAT, json=question("Hi", 1)) as refused:
        assert refused.status == 429
        assert (await refused.json())["error"]["code"] == "no_free_slot"
        assert refused.headers["Retry-After"]
    assert not any(one.done() for one in asking)
    await asyncio.gather(*asking)
    assert all(answer.done and answer.finish_reasons == ["length"] for answer in told)
    await until_reported(client, subject, 0)


async def test_clients_that_leave_while_tokens_come_free_the_engine_and_their_slots(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    row = subject.row
    await report_of(client, subject, EngineState.READY)
    made = 0 if row.made is None else await count(client, subject, row.made)
    told = [Told() for _ in range(row.slots)]
    asking = [
        asyncio.ensure_future(ask(client, subject, question(LONG_STORY, LONG_ANSWER), answer=answer))
        for answer in told
    ]
    await until(lambda: all(len(answer.pieces) > 2 for answer in told), seconds=60)
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await until_it_rests(client, subject)
    await until_reported(client, subject, 0)
    if row.made is not None:  # it did not go on to the end
        assert await count(client, subject, row.made) < made + row.slots * LONG_ANSWER // 2
    assert (await ask(client, subject, question("Name three trees.", 4))).done


async def test_a_client_that_leaves_before_the_first_token_frees_the_engine_and_its_slot(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    row = subject.row
    await report_of(client, subject, EngineState.READY)
    read = 0 if row.read is None else await count(client, subject, row.read)
    answer = Told()
    body = question(SENTENCE * row.prompt_repeats, 1)
    asking = asyncio.ensure_future(ask(client, subject, body, answer=answer))
    await until_it_works(client, subject)
    assert not answer.pieces
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until_it_rests(client, subject, seconds=30 if row.drops_prompts else 120)
    await until_reported(client, subject, 0)
    if row.read is not None:  # it did not read to the end
        assert await count(client, subject, row.read) < read + 7 * row.prompt_repeats
    assert (await ask(client, subject, question("Name three trees.", 4))).done


async def test_a_prompt_that_is_too_long_gets_its_own_refusal_or_an_error(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    if subject.row.long_prompts is LongPrompts.TAKEN:
        pytest.skip(f"{subject.row.name} takes prompts of any length")
    await report_of(client, subject, EngineState.READY)
    body = question(SENTENCE * (subject.row.context_tokens // 4), 1)
    if subject.row.long_prompts is LongPrompts.REFUSED:
        async with client.post(subject.agent.url + CHAT, json=body) as answer:
            assert answer.status == 400
    else:
        told = await ask(client, subject, body)
        assert (told.errors, told.done) == (["stream_incomplete"], False)
    assert (await ask(client, subject, question("Name three trees.", 4))).done


async def test_an_answer_that_was_begun_elsewhere_goes_on_without_a_seam_or_is_refused(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    row = subject.row
    ready = await report_of(client, subject, EngineState.READY)
    assert ready.models[0].continues is row.continues
    headers = {wire.CONTINUE_HEADER: "1"}
    if not row.continues:
        body = question(STORY, 8, begun="Once upon a time, there")
        async with client.post(subject.agent.url + CHAT, json=body, headers=headers) as answer:
            assert answer.status == 409
            assert (await answer.json())["error"]["code"] == "cannot_continue"
        return
    whole = await ask(client, subject, question(STORY, 60))
    clean = []
    for cut in SEAMS:
        begun = "".join(whole.pieces[:cut]).rstrip()
        rest = whole.text[len(begun) :]
        went_on = await ask(client, subject, question(STORY, 12, begun=begun), headers)
        clean.append(went_on.text[:SEAM_CHARACTERS] == rest[:SEAM_CHARACTERS])
    # Nothing is missing and nothing is said twice. At one of them two words may have been as good as equal.
    assert sum(clean) >= len(SEAMS) - 1


async def test_no_other_program_can_use_it_past_the_agent(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    secret = ENGINES[subject.row.name].secret_variable
    if secret is None:
        pytest.skip(f"{subject.row.name} takes no key")
    await report_of(client, subject, EngineState.READY)
    engine = engine_of(subject.agent)
    argv = engine.cmdline()
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}{CHAT}"
    async with client.post(url, json=question("Hi", 1)) as answer:
        assert answer.status == 401
    assert engine.environ()[secret] not in " ".join(argv)


async def test_unloaded_by_order_it_leaves_no_process_and_is_loaded_again_for_who_asks(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    await report_of(client, subject, EngineState.READY)
    engine = engine_of(subject.agent)
    gone = [process.pid for process in (engine, *engine.children(recursive=True))]
    assert await order(client, subject, "unload") == 200
    unloaded = await until_model(client, subject, ModelState.UNLOADED)
    await until(lambda: not engines_of(subject.agent) and not any(map(alive, gone)))
    assert unloaded.load_seconds is not None  # measured, when it was loaded
    assert (await ask(client, subject, question("Name three trees.", 4))).done
    await report_of(client, subject, EngineState.READY)
    assert engine_of(subject.agent).pid not in gone


async def test_one_that_is_killed_amid_an_answer_is_told_and_generates_again(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    await report_of(client, subject, EngineState.READY)
    first = engine_of(subject.agent)
    helpers = [process.pid for process in (first, *first.children(recursive=True))]
    answer = Told()
    asking = asyncio.ensure_future(ask(client, subject, question(LONG_STORY, LONG_ANSWER), answer=answer))
    await until(lambda: len(answer.pieces) > 2, seconds=60)
    os.kill(first.pid, signal.SIGKILL)
    await asking
    assert (answer.errors, answer.done) == (["engine_died"], False)
    resting = await report_of(client, subject, EngineState.RESTING)
    assert [model.name for model in resting.models] == [MODEL]  # it will serve it again
    assert resting.detail.startswith(f"{subject.row.name} ended by signal 9")
    await report_of(client, subject, EngineState.READY)
    assert engine_of(subject.agent).pid != first.pid
    assert not any(map(alive, helpers))
    assert (await ask(client, subject, question("Name three trees.", 4))).done


async def test_a_stop_lets_a_running_answer_end_and_leaves_no_process(
    client: aiohttp.ClientSession, subject: Subject
) -> None:
    await report_of(client, subject, EngineState.READY)
    family = subject.agent.family()
    assert len(family) >= 3
    answer = Told()
    asking = asyncio.ensure_future(ask(client, subject, question(LONG_STORY, 40), answer=answer))
    await until(lambda: answer.pieces, seconds=60)
    subject.agent.process.send_signal(signal.SIGTERM)
    assert (await asking).done
    assert await asyncio.to_thread(subject.agent.process.wait, 60) == 0
    await until(lambda: not any(map(alive, family)))
