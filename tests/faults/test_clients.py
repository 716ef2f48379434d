"""Clients that leave, half close, retry, read slowly or wait long (RELIABILITY 7, C1 to C6, C9, H3)."""

from __future__ import annotations

import asyncio
import socket

import openai
import orjson
import pytest

from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import OK, FakeEngine, Outcome
from tests.fakes.faults import Fault
from tests.faults.asking import (
    CHAT,
    Came,
    ask,
    asked_for,
    attempts_at,
    body_of,
    messages_of,
    question,
    rows,
    until,
)


async def leave(task: asyncio.Task[Came]) -> None:
    """Closes the client's connection."""
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_whoever_leaves_the_line_reaches_no_engine(open_room: OpenRoom, stream: bool):
    """C1."""
    async with FakeEngine(slots=1) as one, open_room(*rows(one, max_concurrent_requests=1)) as room:
        one.script(Fault.stall(at_token=0))
        first = asyncio.ensure_future(ask(room))
        await one.stalled()
        queued = [asyncio.ensure_future(ask(room, stream=stream)) for _ in range(20)]
        await room.until(lambda: room.balancer.snapshot().waiting == 20, "twenty wait")
        for task in queued:
            await leave(task)
        await room.until(lambda: room.balancer.snapshot().waiting == 0, "nobody waits")
        one.resume()
        (await first).insist_on_success()
        (await ask(room)).insist_on_success()
        assert len(asked_for(one)) == 2


@pytest.mark.parametrize("place", [Fault.stall(), Fault.stall(at_token=0), Fault.stall(at_token=5)], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("http_1_0", [False, True], ids=["HTTP 1.1", "HTTP 1.0"])
async def test_whoever_leaves_stops_the_engine(
    open_room: OpenRoom, place: Fault, stream: bool, http_1_0: bool
):
    """C2 before the head and in the prefill, C3 between tokens, C4 for answers in one piece (which others let
    run to their end)."""
    async with FakeEngine(http_1_0=http_1_0) as one, open_room(*rows(one)) as room:
        one.script(place)
        asked = asyncio.ensure_future(ask(room, stream=stream))
        await one.stalled()
        await leave(asked)
        await one.idle()
        await room.idle()
        assert one.requests[0].outcome is Outcome.CLIENT_LEFT
        assert len(asked_for(one)) == 1, "nobody tries again for somebody who is gone"
        assert room.worker("a").success_rate == 1.0


async def test_whoever_leaves_while_an_answer_goes_on_elsewhere_stops_that(open_room: OpenRoom):
    """C3 after a continuation."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        one.script(Fault.close(at_token=5))
        two.script(Fault.close(at_token=5))
        for engine in (one, two):
            engine.always(Fault.stall(at_token=2))
        asked = asyncio.ensure_future(ask(room))
        await until(lambda: one.stalling + two.stalling == 1, "the second one is at it")
        await leave(asked)
        await one.idle()
        await two.idle()
        await room.idle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_half_a_goodbye_is_a_goodbye(open_room: OpenRoom, stream: bool):
    """C5: a client that closes its side after the request is taken to have left."""
    async with FakeEngine() as one, open_room(*rows(one)) as room:
        one.script(Fault.stall(at_token=3))
        _, writer = await asyncio.open_connection("127.0.0.1", room.balancer.port)
        writer.write(request(room, body_of(question(), stream=stream)))
        await one.stalled()
        writer.write_eof()
        await one.idle()
        assert one.requests[0].outcome is Outcome.CLIENT_LEFT
        await room.idle()
        writer.close()


def request(room: Room, body: dict) -> bytes:
    content = orjson.dumps(body)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{room.balancer.port}\r\nContent-Type: application/json\r\n"
    )
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.timeout(60)
async def test_clients_that_retry_do_not_multiply_what_workers_get(open_room: OpenRoom):
    """C6 and O2: 200 clients with the SDK's own two retries, while every worker fails everything. All that
    reaches the workers is at most 1.2 times what was offered and 10 a second, and at once all is well again
    once they are."""
    loop = asyncio.get_running_loop()
    async with FakeEngine(slots=50) as one, FakeEngine(slots=50) as two:
        cap = {"max_concurrent_requests": 50}
        async with open_room(*rows(one, two, **cap), breaker_trip_after=1000, max_queue=5000) as room:
            for engine in (one, two):
                engine.always(Fault.status(500))
            began = loop.time()
            client = room.openai.with_options(max_retries=1)
            asked = [question() for _ in range(200)]
            ends = await asyncio.gather(*(sdk(client, one_) for one_ in asked), return_exceptions=True)
            assert all(isinstance(end, openai.APIStatusError) for end in ends)
            offered = 2 * len(asked)  # each client came twice
            saved = 10 * (loop.time() - began) + 10 * 10  # what the budget had and has got since
            assert sum(attempts_at((one, two)).values()) <= 1.2 * offered + saved
            for engine in (one, two):
                engine.always(OK)
            (await ask(room, stream=False)).insist_on_success()


async def sdk(client: openai.AsyncOpenAI, asked: str) -> str:
    answer = await client.chat.completions.create(model="fake", messages=messages_of(asked))
    return answer.choices[0].message.content or ""


async def test_the_official_sdk_reads_past_comments(open_room: OpenRoom):
    """C9: a long prefill and a long wait, with comments in between; whoever does not stream sees none."""
    async with FakeEngine(slots=1) as one:
        async with open_room(*rows(one, max_concurrent_requests=1), comment_after=0.1) as room:
            one.script(Fault.stall(at_token=0))
            prefilled = Came(question(), CHAT)
            first = asyncio.ensure_future(ask(room, into=prefilled))
            await one.stalled()
            asked = question()
            second = asyncio.ensure_future(sdk_stream(room.openai, asked))
            waiting = Came(question(), CHAT)
            third = asyncio.ensure_future(ask(room, into=waiting))
            whole = asyncio.ensure_future(ask(room, stream=False))
            await until(lambda: prefilled.comments and waiting.comments, "both were told")
            one.resume()
            (await first).insist_on_success()
            assert await second == Came(asked, CHAT).reference()
            (await third).insist_on_success()
            (await whole).insist_on_success()
            assert any(comment.startswith("queued position=") for comment in waiting.comments), (
                waiting.comments
            )
            assert all("position" not in comment for comment in prefilled.comments), prefilled.comments


async def sdk_stream(client: openai.AsyncOpenAI, asked: str) -> str:
    chunks = await client.chat.completions.create(model="fake", messages=messages_of(asked), stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def test_who_was_told_to_wait_is_told_in_the_stream_when_it_was_in_vain(open_room: OpenRoom):
    """C9: the head was sent with the first comment, so the refusal is an error event."""
    async with FakeEngine(slots=1) as one:
        limits = {"comment_after": 0.1, "max_wait": 0.5}
        async with open_room(*rows(one, max_concurrent_requests=1), **limits) as room:
            one.script(Fault.stall(at_token=0))
            first = asyncio.ensure_future(ask(room))
            await one.stalled()
            came = await ask(room)
            assert came.status == 200
            assert came.comments
            assert came.failed_explicitly
            one.resume()
            (await first).insist_on_success()


async def test_a_client_that_does_not_read_holds_up_its_own_engine_only(open_room: OpenRoom):
    """H3: what waits for it is bounded; all others go on; and when it leaves, its engine is told."""
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        busy, slow = await not_reading(room, one, two)
        for _ in range(10):
            (await ask(room)).insist_on_success()
        assert busy.requests[0].outcome is None
        slow.close()
        await busy.idle()
        assert busy.requests[0].outcome is Outcome.CLIENT_LEFT
        await room.idle()


async def test_a_client_that_does_not_read_for_too_long_is_dropped(open_room: OpenRoom):
    """H3: after `slow_reader_timeout`; its engine is free again."""
    async with FakeEngine() as one, FakeEngine() as two:
        async with open_room(*rows(one, two), slow_reader_timeout=0.5) as room:
            busy, slow = await not_reading(room, one, two)
            await busy.idle()
            assert busy.requests[0].outcome is Outcome.CLIENT_LEFT
            await room.idle()
            slow.close()


async def not_reading(room: Room, *engines: FakeEngine) -> tuple[FakeEngine, socket.socket]:
    """A client with an endless answer that it does not read, and the engine that it comes from."""
    for engine in engines:
        engine.script(Fault.flood(LONG_EVENT, at_token=3))
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", room.balancer.port))
    await loop.sock_sendall(slow, request(room, body_of(question())))
    await until(lambda: any(engine.running for engine in engines), "it is being answered")
    busy = next(engine for engine in engines if engine.running)
    for engine in engines:
        if engine is not busy:
            engine.calm()
    return busy, slow


LONG_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % (
    b"x" * 4096
)
