"""A worker that costs next to nothing: what is measured in front of it is not it.

`python -m benchmarks.mock_worker` prints its port as its first line. A POST that asks for one token gets
it at once: 700 bytes of JSON, or three events where it says `"stream":true`, since a proxy may stream from
its workers what its client wants in one piece. Any other is answered with `STREAM_EVENTS` server-sent
events of some 250 bytes at a steady pace. GET tells of the one model `mock`. It parses only as much HTTP
as a well-behaved client sends.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from typing import cast

import orjson
import uvloop

STREAM_EVENTS = 64
"""Chunks of one long stream; usage, where it is asked for, and `[DONE]` come after them."""
ANSWER_BYTES = 700
EVENT_BYTES = 250
MODEL = "mock"

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMS = re.compile(rb'"stream" ?: ?true')
_WANTS_USAGE = re.compile(rb'"include_usage" ?: ?true')
_WANTS_ONE_TOKEN = re.compile(rb'"max_(?:completion_)?tokens" ?: ?1[,}]')
_CHUNK: dict[str, object] = {
    "id": "chatcmpl-mock",
    "object": "chat.completion.chunk",
    "created": 0,
    "model": MODEL,
}


def _usage(tokens: int) -> dict[str, object]:
    return {"usage": {"prompt_tokens": 1000, "completion_tokens": tokens, "total_tokens": 1000 + tokens}}


def _filled(value: dict[str, object], size: int) -> bytes:
    """The JSON of this value, with a fingerprint so long that it has `size` bytes."""
    bare = len(orjson.dumps(value | {"system_fingerprint": ""}))
    return orjson.dumps(value | {"system_fingerprint": "x" * max(0, size - bare)})


def _with_length(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _event(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _event(_filled(_CHUNK | {"choices": [choice]}, EVENT_BYTES - len(b"data: \n\n")))


def _ending(tokens: int, with_usage: bool) -> bytes:
    usage = _event(orjson.dumps(_CHUNK | {"choices": []} | _usage(tokens))) if with_usage else b""
    return _chunk({}, "stop") + usage + _event(b"[DONE]") + b"0\r\n\r\n"


MODELS = _with_length(orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))
ANSWER = _with_length(
    _filled(
        {
            "id": "chatcmpl-mock",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " word"},
                    "finish_reason": "stop",
                }
            ],
        }
        | _usage(1),
        ANSWER_BYTES,
    )
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
OPENING = _chunk({"role": "assistant", "content": ""}, None)
MIDDLE = _chunk({"content": " word"}, None)
LONG_ENDING = {with_usage: _ending(STREAM_EVENTS - 2, with_usage) for with_usage in (False, True)}
SHORT_STREAM = {
    with_usage: STREAM_HEAD + OPENING + MIDDLE + _ending(1, with_usage) for with_usage in (False, True)
}


class MockWorker(asyncio.Protocol):
    """One connection. Its answers are made of constants."""

    def __init__(self, event_seconds: float) -> None:
        self._event_seconds = event_seconds
        self._inbox = b""
        self._transport: asyncio.Transport
        self._next_event: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_event:
            self._next_event.cancel()

    def data_received(self, data: bytes) -> None:
        self._inbox = self._inbox + data if self._inbox else data
        while (head := self._inbox.find(b"\r\n\r\n")) >= 0:
            length = _CONTENT_LENGTH.search(self._inbox, 0, head + 2)
            end = head + 4 + (int(length[1]) if length else 0)
            if len(self._inbox) < end:
                return
            request, self._inbox = self._inbox[:end], self._inbox[end:]
            if request.startswith(b"GET"):
                self._transport.write(MODELS)
            elif not _STREAMS.search(request, head):
                self._transport.write(ANSWER)
            else:
                with_usage = _WANTS_USAGE.search(request, head) is not None
                if _WANTS_ONE_TOKEN.search(request, head):
                    self._transport.write(SHORT_STREAM[with_usage])
                else:
                    self._transport.write(STREAM_HEAD + OPENING)
                    self._go_on(STREAM_EVENTS - 1, asyncio.get_running_loop().time(), LONG_ENDING[with_usage])

    def _go_on(self, left: int, since: float, ending: bytes) -> None:
        """Sends the next event when it is due, counted from the start, so that a late one delays no other."""
        due = since + (STREAM_EVENTS - left) * self._event_seconds
        self._next_event = asyncio.get_running_loop().call_at(due, self._send, left, since, ending)

    def _send(self, left: int, since: float, ending: bytes) -> None:
        self._transport.write(MIDDLE if left > 1 else ending)
        if left > 1:
            self._go_on(left - 1, since, ending)


async def _serve(port: int, event_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, told_to_stop.set)
    async with await loop.create_server(
        lambda: MockWorker(event_seconds), "127.0.0.1", port, backlog=1024
    ) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await told_to_stop.wait()
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mock_worker")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--event-seconds", type=float, default=0.02, help="between two events of a stream")
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.event_seconds))


if __name__ == "__main__":
    main()
