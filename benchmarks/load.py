"""Load on one address, from a process of its own, so that it is not measured with what it loads.

`python -m benchmarks.load URL SHAPE` prints one line of JSON, a `Load`. An answer that is not right ends
it with an error: the speed of wrong answers is no figure. Where it does not stream it asks for one token,
which the mock has at once: what is measured is the way, not a pace of generation. The shapes:

- `flood`: so many connections, each with the next request as soon as it has its answer;
- `rate`: so many requests a second, each on a connection that is free;
- `streams`: so many streams at once, each followed by the next;
- `hold`: so many streams that stay open, until it is told to end (SIGTERM). It prints `held` when all are.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast
from urllib.parse import urlsplit

import orjson
import uvloop

from benchmarks.mock_worker import HELD_TOKENS, MODEL, STREAM_EVENTS, STREAM_WORDS

REQUEST_BYTES = 4096  # a prompt of some 1 000 tokens
ANSWER_SECONDS = 30.0
"""An answer that takes longer is none."""
HOLD_SECONDS = 45.0
HELD_STEP = 25
"""So many streams are opened at once."""

CHUNKED = -1
LAST_CHUNK = b"\r\n0\r\n\r\n"

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
    """One connection on which one request at a time is sent; it looks only for the end of the answer.

    All is done from the loop's callbacks, without a task or a future for a request: a load that is slower
    than what it loads measures itself.
    """

    def __init__(
        self, answered: Callable[[Exchange, bytes], None], failed: Callable[[Exception], None]
    ) -> None:
        """`answered` is called with each whole answer, its head included, and may send the next request."""
        self._answered, self._failed = answered, failed
        self._transport: asyncio.Transport
        self._came = b""
        self._pieces: list[bytes] = []
        self._length: int | None = None
        self._waits = False
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waits:
            self._failed(WrongAnswer(f"the connection ended after {b''.join(self._pieces)[:300]!r}"))

    def send(self, request: bytes) -> None:
        self._waits = True
        self.sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._pieces and self._length is None:
            data = b"".join([*self._pieces, data])
            self._pieces.clear()
        self._pieces.append(data)
        if self._length is None:
            head = data.find(b"\r\n\r\n")
            if head < 0:
                return
            length = _CONTENT_LENGTH.search(data, 0, head + 2)
            self._length = head + 4 + int(length[1]) if length else CHUNKED
        if self._length == CHUNKED:
            self._came = (self._came + data)[-len(LAST_CHUNK) :]
            if self._came != LAST_CHUNK:
                return
        elif sum(map(len, self._pieces)) < self._length:
            return
        self._end()

    def _end(self) -> None:
        answer = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._came, self._length, self._waits = b"", None, False
        if answer.startswith(b"HTTP/1.1 200"):
            self._answered(self, answer)
        else:
            self._failed(WrongAnswer(f"{answer[:300]!r}"))

    def begun(self) -> bool:
        """Something of a stream has come, its head not counted."""
        return any(b"data: {" in piece for piece in self._pieces)

    def close(self) -> None:
        self._waits = False
        self._transport.close()


class Client:
    """Requests to one address, and how they went."""

    def __init__(self, host: str, port: int, *, max_tokens: int, stream: bool) -> None:
        self._host, self._port = host, port
        body = {"model": MODEL, "stream": stream, "max_tokens": max_tokens, "messages": []}
        words = "word " * ((REQUEST_BYTES - len(orjson.dumps(body))) // len("word "))
        body["messages"] = [{"role": "user", "content": words}]
        content = orjson.dumps(body)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        )
        self.request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        self.load = Load()
        self._over = asyncio.get_running_loop().create_future()

    async def connect(self, answered: Callable[[Exchange, bytes], None]) -> Exchange:
        """A connection on which nothing is sent yet."""
        loop = asyncio.get_running_loop()
        _, exchange = await loop.create_connection(
            lambda: Exchange(answered, self.fail), self._host, self._port
        )
        return exchange

    def fail(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    async def over(self) -> None:
        """Waits for `finish`. Raises what `fail` was given."""
        await self._over

    def count_events(self, answer: bytes) -> None:
        words = answer.count(b'" word"')
        if words != STREAM_WORDS or b"data: [DONE]" not in answer:
            raise WrongAnswer(f"a stream of {words} words, {STREAM_WORDS} were sent: {answer[:600]!r}")
        self.load.events += STREAM_EVENTS


async def flood(client: Client, connections: int, seconds: float) -> None:
    until = time.perf_counter() + seconds
    left = connections

    def answered(exchange: Exchange, answer: bytes) -> None:
        nonlocal left
        client.load.requests += 1
        if time.perf_counter() < until:
            exchange.send(client.request)
            return
        exchange.close()
        left -= 1
        if not left:
            client.finish()

    for exchange in [await client.connect(answered) for _ in range(connections)]:
        exchange.send(client.request)
    await client.over()


async def rate(client: Client, per_second: float, seconds: float) -> None:
    number = int(per_second * seconds)
    free: list[Exchange] = []

    def answered(exchange: Exchange, answer: bytes) -> None:
        client.load.latencies_ms.append((time.perf_counter() - exchange.sent) * 1000)
        client.load.requests += 1
        free.append(exchange)
        if client.load.requests == number:
            client.finish()

    loop = asyncio.get_running_loop()
    begun = loop.time()
    for turn in range(number):
        await asyncio.sleep(begun + turn / per_second - loop.time())
        exchange = free.pop() if free else await client.connect(answered)
        exchange.send(client.request)
    await client.over()
    for exchange in free:
        exchange.close()


async def streams(client: Client, at_once: int, each: int) -> None:
    left = at_once * each

    def answered(exchange: Exchange, answer: bytes) -> None:
        nonlocal left
        try:
            client.count_events(answer)
        except WrongAnswer as error:
            client.fail(error)
            return
        client.load.requests += 1
        left -= 1
        if left >= at_once:
            exchange.send(client.request)
        else:
            exchange.close()
        if not left:
            client.finish()

    for _ in range(at_once):
        (await client.connect(answered)).send(client.request)
        await asyncio.sleep(1 / at_once)  # spread over a second, or all events would come in one burst
    await client.over()


async def hold(client: Client, at_once: int) -> None:
    """Prints a line when something of every stream has come, and holds them until it is told to end."""

    def answered(_: Exchange, answer: bytes) -> None:
        client.fail(WrongAnswer(f"a stream that was to stay open ended: {answer[-300:]!r}"))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, client.finish)
    held: list[Exchange] = []
    ending = asyncio.ensure_future(client.over())
    while len(held) < at_once:
        opened = [await client.connect(answered) for _ in range(min(HELD_STEP, at_once - len(held)))]
        for exchange in opened:
            exchange.send(client.request)
        while not all(exchange.begun() for exchange in opened) and not ending.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        held += opened
    if not ending.done():
        print("held", flush=True)
    await ending
    for exchange in held:
        exchange.close()


async def _measured(options: argparse.Namespace) -> Load:
    url = urlsplit(options.url)
    tokens = {"streams": STREAM_EVENTS, "hold": HELD_TOKENS}.get(options.shape, 1)
    client = Client(url.hostname or "127.0.0.1", url.port or 80, max_tokens=tokens, stream=tokens > 1)
    begun = time.perf_counter()
    match options.shape:
        case "flood":
            shape, limit = flood(client, options.connections, options.seconds), options.seconds
        case "rate":
            shape, limit = rate(client, options.per_second, options.seconds), options.seconds
        case "streams":
            shape, limit = streams(client, options.at_once, options.each), options.each * ANSWER_SECONDS
        case _:
            shape, limit = hold(client, options.at_once), HOLD_SECONDS
    async with asyncio.timeout(limit + ANSWER_SECONDS):
        await shape
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
    holding = shapes.add_parser("hold")
    holding.add_argument("--at-once", type=int, required=True)
    load = uvloop.run(_measured(parser.parse_args()))
    print(orjson.dumps(asdict(load)).decode())


if __name__ == "__main__":
    main()
