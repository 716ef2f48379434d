"""A client that leaves, wherever its request stands, frees what it held at once."""

import asyncio

import pytest

from tests.e2e.conftest import OpenRoom, Room, listed
from tests.fakes.engine import FakeEngine, Outcome
from tests.fakes.faults import Fault

BODY = {"model": "fake", "messages": [{"role": "user", "content": "Name some trees."}]}


def asking(room: Room, stream: bool) -> asyncio.Task[bytes]:
    async def ask() -> bytes:
        async with room.http.post(
            f"{room.url}/v1/chat/completions", json=BODY | {"stream": stream}
        ) as answer:
            return await answer.read()

    return asyncio.ensure_future(ask())


async def leave(task: asyncio.Task[bytes]) -> None:
    """Closes the client's connection."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("token", [0, 5], ids=["before the first word", "in the middle"])
async def test_the_engine_stops_when_the_client_leaves(open_room: OpenRoom, stream: bool, token: int):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.script(Fault.stall(at_token=token))
        task = asking(room, stream)
        await engine.stalled()
        await leave(task)
        await engine.idle()
        await room.idle()
        assert engine.requests[0].outcome is Outcome.CLIENT_LEFT
        assert room.worker("a").success_rate == 1.0
        assert 'status="499"' in await room.metrics()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_the_line_never_reaches_an_engine(open_room: OpenRoom, stream: bool):
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "a", max_concurrent_requests=1)) as room:
            await room.ready()
            engine.script(Fault.stall(at_token=0))
            first = asking(room, stream)
            await engine.stalled()
            queued = asking(room, stream)
            await room.until(lambda: room.balancer.snapshot().waiting == 1, "one waits")
            await leave(queued)
            await room.until(lambda: room.balancer.snapshot().waiting == 0, "the line is empty")
            engine.resume()
            assert await first
            assert len(engine.requests) == 1


async def test_a_client_that_leaves_between_two_attempts_is_forgotten(open_room: OpenRoom):
    async with FakeEngine() as engine, open_room(engine) as room:
        engine.always(Fault.status(500))
        task = asking(room, stream=False)
        await engine.seen(1)
        await room.idle()
        await leave(task)
        await room.until(lambda: room.balancer.snapshot().running == 0, "nothing runs")
        await room.idle()


async def test_its_slot_goes_to_the_next_in_line(open_room: OpenRoom):
    async with FakeEngine() as engine:
        async with open_room(listed(engine, "a", max_concurrent_requests=1)) as room:
            await room.ready()
            engine.script(Fault.stall(at_token=2))
            leaving = asking(room, stream=True)
            await engine.stalled()
            staying = asking(room, stream=False)
            await room.until(lambda: room.balancer.snapshot().waiting == 1, "one waits")
            await leave(leaving)
            assert b"chat.completion" in await staying


async def test_many_that_leave_at_random_leave_nothing_behind(open_room: OpenRoom):
    async with FakeEngine(token_seconds=0.005, slots=8) as engine:
        async with open_room(listed(engine, "a", max_concurrent_requests=8)) as room:
            await room.ready()
            tasks = [asking(room, stream=number % 2 == 0) for number in range(40)]
            await engine.seen(10)
            for task in tasks[::2]:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(answer, bytes) for answer in answers) >= 20
            await engine.idle()
            await room.idle()
            assert engine.peak <= 8
