"""Remote APIs over TLS that speak as documented: Anthropic's Messages API, Azure's OpenAI API (the newer and
the dated ones), and OpenAI's own. They insist on what the real ones insist on, and say what they were told.

Their answer is `WORDS`, unless the script of an answer says otherwise.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import trustme
from aiohttp import web

Json = dict[str, Any]

KEY = "secret-of-a-remote-api"
WORDS = ("The ", "tree ", "is ", "an ", "oak.")
ANTHROPIC_VERSION = "2023-06-01"
ANTHROPIC_FIELDS = {
    *("model", "messages", "max_tokens", "system", "temperature", "top_p", "top_k", "stop_sequences"),
    *("stream", "tools", "tool_choice"),
}
OPENAI_FIELDS = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed"),
    *(
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "n",
        "logprobs",
        "response_format",
        "prompt",
        "input",
    ),
    *("frequency_penalty", "presence_penalty", "parallel_tool_calls", "reasoning_effort", "encoding_format"),
}


class Authority:
    """A CA of our own, and certificates of it."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def serves(self, *names: str) -> ssl.SSLContext:
        """For a server that is called so."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*names).configure_cert(context)
        return context


@dataclass(frozen=True, slots=True)
class Told:
    """A request as it came."""

    path: str
    """With what follows the question mark."""
    headers: Mapping[str, str]
    """By names in lower case."""
    body: Json
    peer: object
    """The other end of its connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How to answer one request."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Json | None = None
    """In place of the answer."""
    events: tuple[Json, ...] | None = None
    """In place of the stream."""
    ends_early: bool = False
    """The connection ends in its proper form, and the stream does not."""
    piece_bytes: int | None = None
    """The stream comes in pieces of so many bytes."""
    stalls: bool = False
    """Of the body only its beginning comes."""


PLAIN = Answer()


class RemoteApi:
    """A server on loopback. Use it as an asynchronous context manager."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._runner: web.AppRunner | None = None
        self.port = 0
        self.key = KEY
        self.script: deque[Answer] = deque()
        self.told: list[Told] = []
        """Requests for answers."""
        self.looked_in: list[Told] = []
        """All others."""

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        self.routes(app)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def routes(self, app: web.Application) -> None:
        raise NotImplementedError

    async def note(self, request: web.Request) -> Told:
        data = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        told = Told(request.path_qs, headers, orjson.loads(data) if data else {}, peer)
        (self.told if request.method == "POST" else self.looked_in).append(told)
        return told

    def next(self) -> Answer:
        return self.script.popleft() if self.script else PLAIN

    async def stream(self, request: web.Request, answer: Answer, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        size = answer.piece_bytes or len(data)
        for at in range(0, len(data), max(size, 1)):
            await response.write(data[at : at + size])
            await asyncio.sleep(0)
        return response


async def _stalled(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
    response.content_length = 100
    await response.prepare(request)
    await response.write(b"{")
    await asyncio.Event().wait()
    return response


def _said(answer: Answer) -> web.Response:
    return web.json_response(answer.body, status=answer.status, headers=answer.headers)


class Anthropic(RemoteApi):
    """https://docs.anthropic.com/en/api/messages and its streaming page."""

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/messages", self.messages)

    def error(self, status: int, kind: str, message: str, **headers: str) -> Answer:
        body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
        return Answer(status=status, body=body, headers=headers)

    def insist(self, told: Told) -> Answer | None:
        if told.headers.get("x-api-key") != self.key:
            return self.error(401, "authentication_error", "invalid x-api-key")
        if told.headers.get("anthropic-version") != ANTHROPIC_VERSION:
            return self.error(400, "invalid_request_error", "anthropic-version: header is required")
        return None

    def wrong(self, body: Json) -> str | None:
        if unknown := body.keys() - ANTHROPIC_FIELDS:
            return f"{sorted(unknown)[0]}: Extra inputs are not permitted"
        if not isinstance(body.get("max_tokens"), int):
            return "max_tokens: Field required"
        if not 0 <= body.get("temperature", 1) <= 1:
            return "temperature: range: 0..1"
        if not body.get("messages"):
            return "messages: at least one message is required"
        for message in body["messages"]:
            if message["role"] not in ("user", "assistant"):
                return "messages: Unexpected role"
            for block in message["content"]:
                if block["type"] == "text" and not block["text"].strip():
                    return "messages: text content blocks must contain non-whitespace text"
        return None

    async def models(self, request: web.Request) -> web.Response:
        told = await self.note(request)
        if (refused := self.insist(told)) is not None:
            return _said(refused)
        rows = [
            {"type": "model", "id": "claude-x", "display_name": "X", "created_at": "2025-01-01T00:00:00Z"}
        ]
        return web.json_response({"data": rows, "has_more": False, "first_id": "x", "last_id": "x"})

    async def messages(self, request: web.Request) -> web.StreamResponse:
        told = await self.note(request)
        if (refused := self.insist(told)) is not None:
            return _said(refused)
        answer = self.next()
        if answer.body is not None:
            return _said(answer)
        if (wrong := self.wrong(told.body)) is not None:
            return _said(self.error(400, "invalid_request_error", wrong))
        events = self.events(told.body) if answer.events is None else answer.events
        if answer.ends_early:
            events = events[:-1]
        data = b"".join(
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events
        )
        return await self.stream(request, answer, data)

    def events(self, body: Json) -> tuple[Json, ...]:
        if body.get("tools"):
            return self.calling(body)
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": body["model"],
        }
        usage = {"input_tokens": 12, "output_tokens": 1, "cache_read_input_tokens": 4}
        message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
        return (
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                for word in WORDS
            ),
            {"type": "content_block_stop", "index": 0},
            *self.ending("end_turn"),
        )

    def ending(self, reason: str) -> tuple[Json, ...]:
        delta = {"stop_reason": reason, "stop_sequence": None}
        return (
            {"type": "message_delta", "delta": delta, "usage": {"output_tokens": len(WORDS)}},
            {"type": "message_stop"},
        )

    def calling(self, body: Json) -> tuple[Json, ...]:
        tool = body["tools"][0]["name"]
        message = {
            "id": "msg_2",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": body["model"],
        }
        message |= {"stop_reason": None, "usage": {"input_tokens": 12, "output_tokens": 1}}
        pieces = ("", '{"city":', ' "Bonn"}')
        return (
            {"type": "message_start", "message": message},
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "tool_use", "id": "toolu_1", "name": tool, "input": {}},
            },
            *(
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "input_json_delta", "partial_json": piece},
                }
                for piece in pieces
            ),
            {"type": "content_block_stop", "index": 0},
            *self.ending("tool_use"),
        )


class OpenAiLike(RemoteApi):
    """What OpenAI's own API and Azure's have in common."""

    def error(self, status: int, code: str, message: str, **headers: str) -> Answer:
        body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
        return Answer(status=status, body=body, headers=headers)

    def insist(self, told: Told) -> Answer | None:
        if told.headers.get("authorization") != f"Bearer {self.key}":
            return self.error(401, "invalid_api_key", f"Incorrect API key provided: {self.key[:6]}***")
        return None

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/models", self.models)
        for path in ("chat/completions", "completions", "embeddings"):
            app.router.add_post(f"/v1/{path}", self.answers)

    async def models(self, request: web.Request) -> web.Response:
        told = await self.note(request)
        if (refused := self.insist(told)) is not None:
            return _said(refused)
        return web.json_response({"object": "list", "data": [{"id": "gpt-4o-mini", "object": "model"}]})

    async def answers(self, request: web.Request) -> web.StreamResponse:
        told = await self.note(request)
        if (refused := self.insist(told)) is not None:
            return _said(refused)
        answer = self.next()
        if answer.stalls:
            return await _stalled(request, answer)
        if answer.body is not None:
            return _said(answer)
        if unknown := told.body.keys() - OPENAI_FIELDS:
            message = f"Unrecognized request argument supplied: {sorted(unknown)[0]}"
            return _said(self.error(400, "unknown_parameter", message))
        if request.path.endswith("/embeddings"):
            rows = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            return web.json_response({"object": "list", "data": rows, "model": "ada", "usage": usage})
        return await self.stream(request, answer, self.chunks(told.body, answer))

    def preface(self) -> tuple[Json, ...]:
        return ()

    def chunks(self, body: Json, answer: Answer) -> bytes:
        head = {
            "id": "c1",
            "object": "chat.completion.chunk",
            "created": 7,
            "model": "gpt-4o-mini-2024-07-18",
        }

        def chunk(delta: Json, finish: str | None = None) -> Json:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {**head, "choices": [choice], "usage": None}

        usage = {"prompt_tokens": 12, "completion_tokens": len(WORDS), "total_tokens": 12 + len(WORDS)}
        told = [
            *self.preface(),
            chunk({"role": "assistant", "content": ""}),
            *(chunk({"content": word}) for word in WORDS),
            chunk({}, "stop"),
            {**head, "choices": [], "usage": usage},
        ]
        data = b"".join(b"data: %b\n\n" % orjson.dumps(one) for one in told)
        return data if answer.ends_early else data + b"data: [DONE]\n\n"


class Azure(OpenAiLike):
    """https://learn.microsoft.com/azure/ai-foundry/openai: the v1 API, and the dated data plane."""

    def __init__(self, tls: ssl.SSLContext | None, deployment: str, api_version: str | None = None) -> None:
        super().__init__(tls)
        self._deployment = deployment
        self._api_version = api_version

    def insist(self, told: Told) -> Answer | None:
        if told.headers.get("api-key") != self.key:
            return self.error(401, "401", "Access denied due to invalid subscription key")
        return None

    def routes(self, app: web.Application) -> None:
        paths: Mapping[str, Callable[[web.Request], Any]] = {
            "chat/completions": self.answers,
            "embeddings": self.answers,
        }
        if self._api_version is None:
            app.router.add_get("/openai/v1/models", self.models)
            for path, handler in paths.items():
                app.router.add_post(f"/openai/v1/{path}", handler)
            return
        app.router.add_get("/openai/models", self.dated(self.models))
        for path, handler in paths.items():
            app.router.add_post(f"/openai/deployments/{self._deployment}/{path}", self.dated(handler))

    def dated(self, handler: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.StreamResponse:
            if request.query.get("api-version") != self._api_version:
                return _said(self.error(404, "404", "Resource not found"))
            return await handler(request)

        return answer

    def preface(self) -> tuple[Json, ...]:
        """What Azure found in the prompt, before anything is answered."""
        results = [{"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False}}}]
        head = {"id": "", "object": "", "created": 0, "model": ""}
        return ({**head, "choices": [], "prompt_filter_results": results},)
