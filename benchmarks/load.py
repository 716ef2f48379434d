"""Load on one address, from a process of its own, so that it is not measured with what it loads.

`python -m benchmarks.load URL SHAPE` prints one line of JSON, a `Load`. An answer that is not right ends
it with an error: the speed of wrong answers is no figure. Where it does not stream it asks for one token,
which the mock has at once: what is measured is the way, not a pace of generation. Three shapes:

- `flood`: so many connections, each with the next request as soon as it has its answer;
- `rate`: so many requests a second, each on a connection that is free;
- `streams`: so many streams at once, each followed by the next.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import cast
from urllib.parse import urlsplit

import orjson
import uvloop

from benchmarks.mock_worker import MODEL, STREAM_EVENTS

REQUEST_BYTES = 4096  # a prompt of some 1 000 tokens
ANSWER_SECONDS = 30.0
"""An answer that takes longer is none."""

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class Load:
    """What was sent and how long it took."""

    requests: int = 0
    events: int = 0
    """Of streams, `[DONE]` not counted."""
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    """From the moment a request was written to the last byte of its answer. Of the shape `rate` only."""


class WrongAnswer(Exception):
    """Something came back that is not the mock's answer."""


class Exchange(asyncio.Protocol):
    """One connection on which one request at a time is sent; it looks only for the end of the answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[bytes] | None = None
        self._came = bytearray()
        self._length: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(WrongAnswer(f"the connection ended after {bytes(self._came[:300])!r}"))

    def data_received(self, data: bytes) -> None:
        self._came += data
        if self._length is None:
            head = self._came.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _CONTENT_LENGTH.search(self._came, 0, head + 2)
            self._length = head + 4 + int(length[1]) if length else -1
        ended = self._came.endswith(b"\r\n0\r\n\r\n") if self._length < 0 else len(self._came) >= self._length
        if ended and self._answer and not self._answer.done():
            self._answer.set_result(bytes(self._came))

    async def ask(self, request: bytes) -> bytes:
        """The whole answer, head included. Raises `WrongAnswer` for another status than 200."""
        self._came.clear()
        self._length = None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        answer = await self._answer
        if not answer.startswith(b"HTTP/1.1 200"):
            raise WrongAnswer(f"{answer[:300]!r}")
        return answer

    def close(self) -> None:
        self._transport.close()


class Client:
    """Requests to one address, and how they went."""

    def __init__(self, host: str, port: int, *, stream: bool, times: bool) -> None:
        self._host, self._port = host, port
        body = {
            "model": MODEL,
            "messages": [],
            "stream": stream,
            "max_tokens": STREAM_EVENTS if stream else 1,
        }
        words = "word " * ((REQUEST_BYTES - len(orjson.dumps(body))) // len("word "))
        body["messages"] = [{"role": "user", "content": words}]
        content = orjson.dumps(body)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        )
        self._request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        self._stream, self._times = stream, times
        self.load = Load()

    async def connect(self) -> Exchange:
        _, exchange = await asyncio.get_running_loop().create_connection(Exchange, self._host, self._port)
        return exchange

    async def ask(self, exchange: Exchange) -> None:
        sent = time.perf_counter()
        answer = await exchange.ask(self._request)
        self.load.requests += 1
        if self._times:
            self.load.latencies_ms.append((time.perf_counter() - sent) * 1000)
        if self._stream:
            self._count_events(answer)

    def _count_events(self, answer: bytes) -> None:
        events = answer.count(b"data: {")
        if events != STREAM_EVENTS or b"data: [DONE]" not in answer:
            raise WrongAnswer(f"a stream of {events} events, {STREAM_EVENTS} were sent")
        self.load.events += events


async def flood(client: Client, connections: int, seconds: float) -> None:
    async def keep_asking(until: float) -> None:
        exchange = await client.connect()
        while time.perf_counter() < until:
            await client.ask(exchange)
        exchange.close()

    until = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(keep_asking(until))


async def rate(client: Client, per_second: float, seconds: float) -> None:
    free = [await client.connect()]

    async def ask_once() -> None:
        exchange = free.pop() if free else await client.connect()
        await client.ask(exchange)
        free.append(exchange)

    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_second * seconds)):
            await asyncio.sleep(begun + number / per_second - loop.time())
            group.create_task(ask_once())
    for exchange in free:
        exchange.close()


async def streams(client: Client, at_once: int, each: int) -> None:
    async def keep_streaming(number: int) -> None:
        await asyncio.sleep(number / at_once)  # spread over a second, or all events would come in one burst
        exchange = await client.connect()
        for _ in range(each):
            await client.ask(exchange)
        exchange.close()

    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(keep_streaming(number))


async def _measured(client: Client, shape: Callable[[], Awaitable[None]], limit_seconds: float) -> Load:
    begun = time.perf_counter()
    async with asyncio.timeout(limit_seconds):
        await shape()
    client.load.seconds = time.perf_counter() - begun
    return client.load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("url")
    shapes = parser.add_subparsers(dest="shape", required=True)
    flooding = shapes.add_parser("flood")
    flooding.add_argument("--connections", type=int, required=True)
    flooding.add_argument("--seconds", type=float, required=True)
    rated = shapes.add_parser("rate")
    rated.add_argument("--per-second", type=float, required=True)
    rated.add_argument("--seconds", type=float, required=True)
    streaming = shapes.add_parser("streams")
    streaming.add_argument("--at-once", type=int, required=True)
    streaming.add_argument("--each", type=int, required=True)
    options = parser.parse_args()
    url = urlsplit(options.url)
    client = Client(
        url.hostname or "127.0.0.1",
        url.port or 80,
        stream=options.shape == "streams",
        times=options.shape == "rate",
    )
    if options.shape == "flood":
        load = _measured(
            client,
            lambda: flood(client, options.connections, options.seconds),
            options.seconds + ANSWER_SECONDS,
        )
    elif options.shape == "rate":
        load = _measured(
            client,
            lambda: rate(client, options.per_second, options.seconds),
            options.seconds + ANSWER_SECONDS,
        )
    else:
        load = _measured(
            client, lambda: streams(client, options.at_once, options.each), options.each * ANSWER_SECONDS
        )
    print(orjson.dumps(asdict(uvloop.run(load))).decode())


if __name__ == "__main__":
    main()
