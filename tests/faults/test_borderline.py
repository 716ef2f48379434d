"""Where two good rules of the data plane meet: each scene was seen to go wrong once."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson

from tests.e2e.conftest import OpenRoom, Room
from tests.fakes.engine import FakeEngine, Fault
from tests.faults.asking import (
    CHAT,
    ask,
    ask_many,
    asked_for,
    body_of,
    question,
    rows,
    until,
)

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def said(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None} | more
    return b"data: " + orjson.dumps({"id": "x", "model": "fake", "choices": [choice]}) + b"\n\n"


FINISH = said("", finish_reason="stop")
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def raw_worker(answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """A worker that writes exactly what `answer` does; its row for the JSON file."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            lengths = [int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")]
            body = await reader.readexactly(sum(lengths))
            if head.startswith("get"):
                models = b'{"object":"list","data":[{"id":"fake"}]}'
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(models), models)
                )
            else:
                await answer(orjson.loads(body), writer)
            await writer.drain()

    async with listening(converse) as port:
        yield {"id": "raw", "host": "127.0.0.1", "port": port, "type": "openai"}


@contextlib.asynccontextmanager
async def listening(
    converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server on the port that is yielded; nothing of it is left behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await converse(reader, writer)
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(attend(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def holds_little(room: Room) -> None:
    """What a client does not read waits in the balancer, and next to nothing of it in the kernel."""
    for server in room.balancer._server._listening:
        for sock in server.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@contextlib.asynccontextmanager
async def slow_client(room: Room, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """A client that reads nothing but what is asked of the reader, over a connection that holds little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", room.balancer.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    data = orjson.dumps(body)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (room.balancer.port, len(data), data)
    )
    try:
        yield reader
    finally:
        writer.close()


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    tail = b""
    while piece := await reader.read(65536):
        tail = (tail + piece)[-300:]
        if tail.endswith(b"0\r\n\r\n"):
            return tail
    return tail


async def test_a_connection_that_was_held_up_at_its_answers_end_is_used_again(open_room: OpenRoom):
    """The client reads slowly; the last that comes of the answer, its end included, holds the worker up. The
    next request over that connection must be heard."""
    short = chunk(said("short")) + chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n"
    long = chunk(said("x" * 1000) * 100) + chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n"
    answers = iter((short, long))

    async def answer(_body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + next(answers, short))

    async with raw_worker(answer) as row, open_room(row) as room:
        await room.ready()
        holds_little(room)
        assert (await ask(room)).succeeded
        async with slow_client(room, body_of(question())) as reader:
            assert (await read_to_the_end(reader)).endswith(b"0\r\n\r\n")
            await room.idle()
        async with asyncio.timeout(5):
            assert (await ask(room)).text == "short"


async def test_a_client_that_reads_nothing_is_not_its_workers_silence(open_room: OpenRoom):
    """A stream is held up for its client. Its worker is well: it is neither given up nor tried elsewhere."""
    event = said("x" * 1000)
    requests = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        requests.append(body)
        writer.write(HEAD)
        for _ in range(80 if body["messages"][0]["content"].startswith("Question") else 1):
            writer.write(chunk(event * 100))
            await writer.drain()
        writer.write(chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n")

    async with raw_worker(answer) as row, open_room(row) as room:
        await room.ready()
        holds_little(room)
        async with slow_client(room, body_of(question())) as reader:
            await reader.readexactly(100)
            for _ in range(100):
                await asyncio.sleep(0.1)
                view = room.worker("raw")
                assert (view.stuck, view.breaker.value, view.running) == (False, "closed", 1)


async def test_a_prompt_that_kills_engines_kills_two_over_warm_connections_too(open_room: OpenRoom):
    """S3: connections that were used before make no difference."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine()) for _ in range(5)]
        room = await stack.enter_async_context(open_room(*rows(*engines), health_check_interval=60))
        await room.ready(5)
        await ask_many(room, 20)
        assert all(asked_for(engine) for engine in engines)
        for engine in engines:
            engine.always(Fault.die())
        before = sum(len(asked_for(engine)) for engine in engines)
        came = await ask(room)
        assert came.failed_explicitly
        deaths = sum(engine._server is None for engine in engines)
        assert deaths <= 2, f"{deaths} engines died, {sum(len(asked_for(e)) for e in engines) - before} asked"
        assert came.errors[0]["code"] == "request_quarantined"


async def test_workers_without_room_use_up_no_continuation(open_room: OpenRoom):
    """A stream breaks; the next two workers have no room at the moment, the fourth would go on."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine()) for _ in range(4)]
        room = await stack.enter_async_context(open_room(*rows(*engines)))
        await room.ready(4)
        numbered: dict[int, int] = {}

        def place(number: int) -> Callable[[Any], bool]:
            def when(request: Any) -> bool:
                if not request.is_inference:
                    return False
                order = numbered.setdefault(id(request), len(numbered))
                return order == number

            return when

        for engine in engines:
            engine.always(Fault.status(503), when=place(1))
            engine.always(Fault.status(503), when=place(2))
            engine.always(Fault.close(at_token=5), when=place(0))
        (await ask(room)).insist_on_success()


async def test_two_workers_that_are_restarted_make_no_prompt_suspect(open_room: OpenRoom):
    """A rolling restart: each worker ends its streams and is back at once. The prompts were innocent."""
    slow = {"tokens": 400, "token_seconds": 0.02}
    async with FakeEngine(**slow) as one, FakeEngine(**slow) as two:
        async with open_room(*rows(one, two)) as room:
            await room.ready(2)
            asked = question()
            task = asyncio.ensure_future(ask(room, asked))
            engines = [one, two]
            for _ in range(2):
                await until(lambda: any(e.running and asked_for(e) for e in engines), "it runs")
                busy = next(e for e in engines if e.running)
                last = asked_for(busy)[-1]
                await until(lambda last=last: last.tokens_sent >= 3, "some tokens")
                busy.die()
                await asyncio.sleep(0.3)
                await busy.listen()
            await task
            await room.ready(2)
            again = await ask(room, asked)
            assert again.status == 200, again.errors


async def test_an_answer_that_is_whole_is_not_thrown_away_for_how_its_connection_ended(open_room: OpenRoom):
    """finish_reason came, then the connection was reset: nobody has to compute all of it again."""

    async def answer(_body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        seen.append(1)
        writer.write(HEAD + chunk(said("whole")) + chunk(FINISH))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    seen: list[int] = []
    async with raw_worker(answer) as row, open_room(row, breaker_trip_after=1000) as room:
        await room.ready()
        came = await ask(room, stream=False)
        assert (came.status, came.text, len(seen)) == (200, "whole", 1)


async def test_an_answer_without_choices_is_none(open_room: OpenRoom):
    async def answer(_body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        body = b'{"choices":[]}'
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    async with raw_worker(answer) as row, open_room(row, max_retries=0) as room:
        await room.ready()
        came = await ask(room, stream=False)
        assert came.status != 200


async def test_events_of_several_lines_reach_the_client_as_events(open_room: OpenRoom):
    async def answer(_body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        torn = (
            b'data: {"id":"x","model":"fake",\ndata: "choices":[{"index":0,"delta":{"content":"torn"}}]}\n\n'
        )
        writer.write(HEAD + chunk(said("not ")) + chunk(torn) + chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n")

    async with raw_worker(answer) as row, open_room(row, max_retries=0) as room:
        await room.ready()
        came = await ask(room)
        assert (came.text, came.no_chunks) == ("not torn", 0) or came.failed_explicitly


async def test_whoever_was_faster_is_held_up_for_a_slow_client(open_room: OpenRoom):
    """A chat is asked twice; the second worker begins first, and the loser's end takes nothing from it: what
    its client does not read is not read from it."""
    sent = {"bytes": 0}
    event = chunk(said("x" * 1000) * 10)
    short = HEAD + chunk(said("short")) + chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n"
    asked: list[str] = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["messages"][0]["content"] != "late":
            writer.write(short)
            return
        asked.append("late")
        if len(asked) == 1:
            await asyncio.sleep(60)
        writer.write(HEAD)
        for _ in range(6000):
            writer.write(event)
            await writer.drain()
            sent["bytes"] += len(event)
        writer.write(chunk(FINISH) + chunk(DONE) + b"0\r\n\r\n")

    async with raw_worker(answer) as one, raw_worker(answer) as two:
        async with open_room(one | {"id": "a"}, two | {"id": "b"}, hedge=True) as room:
            await room.ready(2)
            holds_little(room)
            await ask_many(room, 60)
            body = body_of("late")
            async with slow_client(
                room, body | {"messages": [{"role": "user", "content": "late"}]}
            ) as reader:
                async with asyncio.timeout(20):
                    await reader.readexactly(100)
                await asyncio.sleep(1)
                assert len(asked) == 2
                assert sent["bytes"] < 20_000_000
                async with asyncio.timeout(20):
                    assert b"[DONE]" in await read_to_the_end(reader)


async def test_a_refusal_that_comes_before_the_whole_body_was_sent_is_read(open_room: OpenRoom):
    """413, and the connection closed without reading on: the client is told that, and nobody else asked."""
    asked = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status, body = b"200 OK", b'{"object":"list","data":[{"id":"fake"}]}'
        if head.startswith(b"POST"):
            asked.append(1)
            status, body = b"413 Too Large", b'{"error":{"message":"too long","type":"x","code":null}}'
        writer.write(
            b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (status, len(body), body)
        )
        await writer.drain()

    async with listening(converse) as port:
        async with open_room({"id": "raw", "host": "127.0.0.1", "port": port, "type": "openai"}) as room:
            await room.ready()
            messages = [{"role": "user", "content": "x" * 20_000_000}]
            body = io.BytesIO(orjson.dumps({"model": "fake", "messages": messages}))
            headers = {"Content-Type": "application/json"}
            async with room.http.post(f"{room.url}{CHAT}", data=body, headers=headers) as response:
                assert (response.status, len(asked)) == (413, 1), await response.text()


async def test_the_only_other_worker_is_busy_for_a_moment(open_room: OpenRoom):
    async with FakeEngine() as one, FakeEngine() as two, open_room(*rows(one, two)) as room:
        await room.ready(2)
        order: list[int] = []

        def nth(number: int) -> Callable[[Any], bool]:
            def when(request: Any) -> bool:
                if not request.is_inference:
                    return False
                if id(request) not in order:
                    order.append(id(request))
                return order.index(id(request)) == number

            return when

        for engine in (one, two):
            engine.always(Fault.status(503), when=nth(1))
            engine.always(Fault.close(at_token=5), when=nth(0))
        (await ask(room)).insist_on_success()
