"""A worker that costs next to nothing: what is measured in front of it is not it.

`python -m benchmarks.mock_worker --ports N` prints its ports as its first line: so many workers. A POST that
asks for one token gets it at once: 700 bytes of JSON, or three events where it says `"stream":true`, since a
proxy may stream from its workers what its client wants in one piece. Any other is answered with
`STREAM_EVENTS` server-sent events of some 250 bytes at a steady pace, or, where it asks for `HELD_TOKENS`
tokens, with a first event and then one every few seconds until its client leaves. GET tells of the one model
`mock`. For the one rival that knows no other API, `/api/chat` answers in Ollama's lines. It parses only as
much HTTP as a well-behaved client sends.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from dataclasses import dataclass
from typing import cast

import orjson
import uvloop

STREAM_EVENTS = 64
"""Chunks of one long stream; usage, where it is asked for, and `[DONE]` come after them."""
STREAM_WORDS = STREAM_EVENTS - 2
"""Of those, the ones with text: not the first and not the last."""
HELD_TOKENS = 100_000
"""Whoever asks for so many gets a stream that stays open."""
HELD_EVENT_SECONDS = 5.0
ANSWER_BYTES = 700
EVENT_BYTES = 250
MODEL = "mock"

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMS = re.compile(rb'"stream" ?: ?true')
_WANTS_USAGE = re.compile(rb'"include_usage" ?: ?true')
_TOKENS = re.compile(rb'"(?:max_(?:completion_)?tokens|num_predict)" ?: ?(\d+)')
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


@dataclass(frozen=True, slots=True)
class Script:
    """A stream in one API's form, as constants."""

    opening: bytes
    """With the head."""
    middle: bytes
    ending: bytes
    short: bytes
    """The whole of a stream of one token."""


def _line(content: str, done: bool) -> bytes:
    message = {"role": "assistant", "content": content}
    line: dict[str, object] = {"model": MODEL, "created_at": "2025-01-01T00:00:00Z", "message": message}
    end = {"done_reason": "stop", "prompt_eval_count": 1000, "eval_count": STREAM_EVENTS - 2} if done else {}
    data = _filled(line | {"done": done} | end, EVENT_BYTES - 1) + b"\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


OPENAI = {
    with_usage: Script(STREAM_HEAD + OPENING, MIDDLE, LONG_ENDING[with_usage], SHORT_STREAM[with_usage])
    for with_usage in (False, True)
}
OLLAMA_HEAD = STREAM_HEAD.replace(b"text/event-stream", b"application/x-ndjson")
OLLAMA = Script(
    OLLAMA_HEAD + _line("", False),
    _line(" word", False),
    _line("", True) + b"0\r\n\r\n",
    OLLAMA_HEAD + _line(" word", False) + _line("", True) + b"0\r\n\r\n",
)


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
            self._answer(request, head)

    def _answer(self, request: bytes, head: int) -> None:
        if request.startswith(b"GET"):
            self._transport.write(MODELS)
            return
        if request.startswith(b"POST /api/chat "):
            script = OLLAMA
        elif b'"stream"' not in request or not _STREAMS.search(request, head):
            self._transport.write(ANSWER)
            return
        else:
            script = OPENAI[_WANTS_USAGE.search(request, head) is not None]
        tokens = _TOKENS.search(request, head)
        if tokens and tokens[1] == b"1":
            self._transport.write(script.short)
            return
        self._transport.write(script.opening)
        if tokens and int(tokens[1]) >= HELD_TOKENS:
            self._send_held(script)  # a first word at once: many a proxy waits for it
        else:
            self._go_on(STREAM_EVENTS - 1, asyncio.get_running_loop().time(), script)

    def _hold(self, script: Script) -> None:
        loop = asyncio.get_running_loop()
        self._next_event = loop.call_later(HELD_EVENT_SECONDS, self._send_held, script)

    def _send_held(self, script: Script) -> None:
        self._transport.write(script.middle)
        self._hold(script)

    def _go_on(self, left: int, since: float, script: Script) -> None:
        """Sends the next event when it is due, counted from the start, so that a late one delays no other."""
        due = since + (STREAM_EVENTS - left) * self._event_seconds
        self._next_event = asyncio.get_running_loop().call_at(due, self._send, left, since, script)

    def _send(self, left: int, since: float, script: Script) -> None:
        self._transport.write(script.middle if left > 1 else script.ending)
        if left > 1:
            self._go_on(left - 1, since, script)


async def _serve(ports: int, event_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, told_to_stop.set)
    servers = [
        await loop.create_server(lambda: MockWorker(event_seconds), "127.0.0.1", 0, backlog=1024)
        for _ in range(ports)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await told_to_stop.wait()
    for server in servers:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mock_worker")
    parser.add_argument("--ports", type=int, default=1, help="how many workers")
    parser.add_argument("--event-seconds", type=float, default=0.02, help="between two events of a stream")
    options = parser.parse_args()
    uvloop.run(_serve(options.ports, options.event_seconds))


if __name__ == "__main__":
    main()
