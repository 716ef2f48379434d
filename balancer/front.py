"""The HTTP side towards clients, on aiohttp: every route of the balancer. The inference routes have a faster
server of their own for plain requests (`hot_path`); what that one does not take is read here too.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import orjson
from aiohttp import web

from balancer.core.dispatcher import Snapshot, WorkerView
from balancer.core.errors import (
    BadRequest,
    BodyTimeout,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RequestError,
)
from balancer.core.model import Endpoint, ModelName, ModelOffer
from balancer.dialects import openai
from balancer.identity import conflicts
from balancer.inference import (
    Head,
    Inference,
    as_refusal,
    insist_on_plain_json,
    refusal_headers,
    request_id,
)
from balancer.metrics import CONTENT_TYPE, Metrics
from worker_agent.log_format import current_request
from worker_agent.wire import JOIN_PATH, Join, WireError, parse_join

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HIGH_WATER_BYTES = 64 * 1024
"""Of an answer that its client has yet to read, before its worker is held up."""


@dataclass(frozen=True, slots=True)
class FrontPolicy:
    body_seconds: float = 30.0
    """For the whole body to arrive, once the head has."""
    slow_reader_seconds: float = 60.0
    """A client that reads nothing of what waits for it for so long is dropped."""


class Front:
    """The routes of the balancer."""

    def __init__(
        self,
        inference: Inference,
        policy: FrontPolicy,
        *,
        snapshot: Callable[[], Snapshot],
        join: Callable[[Join, str], None],
        metrics: Metrics | None,
        admin: web.Application,
        further: Sequence[web.AbstractRouteDef] = (),
    ) -> None:
        """`join`: what to do with an agent that asks to be watched, and its address. `metrics`: None where
        they are switched off. `admin`: what is answered under `/admin`; it sees to the key by itself.
        `further`: routes that say the same to everybody, the page's files and the API's description."""
        self._inference = inference
        self._policy = policy
        self._snapshot = snapshot
        self._join = join
        self._metrics = metrics
        self._admin = admin
        self._further = tuple(further)

    def application(self) -> web.Application:
        app = web.Application(
            client_max_size=self._inference.policy.max_body_bytes, middlewares=[self._guarded]
        )
        for endpoint in Endpoint:
            app.router.add_post(endpoint.value, self._answering(endpoint))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_post(JOIN_PATH, self._joining)
        app.add_routes(self._further)
        app.add_subapp("/admin", self._admin)  # with a middleware of its own, around whatever is in there
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may ask at all, and every error in the form that clients read."""
        own_id = request_id(_headers(request))
        current_request.set(own_id)
        try:
            if request.remote is not None:
                self._inference.insist_on_source(request.remote)
            response = await handler(request)
        except ConnectionError:
            raise asyncio.CancelledError from None  # nobody is left to be answered
        except Exception as error:
            refusal = _as_refusal(request, error)
            log.info(
                "%s %s %s refused: %d %s",
                *(request.remote, request.method, _route(request), refusal.status),
                refusal.code or refusal.type,
            )
            response = web.Response(
                body=openai.error_body(refusal),
                status=refusal.status,
                headers=refusal_headers(own_id, refusal),
            )
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        if self._inference.draining:
            response.force_close()
        return response

    # Inference

    def _answering(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            admitted = self._inference.admit(Head(endpoint, _headers(request), request.remote or ""))
            body = await self._whole_body(request)
            client = _Client(request, self._policy.slow_reader_seconds)
            return await client.sent(self._inference.answer(admitted, body, client))

        return handle

    async def _body(self, request: web.Request) -> bytes:
        """Of a request that was not admitted by its head already."""
        insist_on_plain_json(_headers(request))
        return await self._whole_body(request)

    async def _whole_body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._policy.body_seconds):
                return await request.read()
        except TimeoutError:
            raise BodyTimeout(
                f"The request body did not arrive within {self._policy.body_seconds:g} s."
            ) from None
        except web.HTTPRequestEntityTooLarge:
            raise self._inference.too_large() from None

    # The room

    async def _models(self, request: web.Request) -> web.Response:
        return _json(openai.models_body(self._readable_models(request)))

    async def _model(self, request: web.Request) -> web.Response:
        name = ModelName(request.match_info["model"])
        models = self._readable_models(request)
        if name not in models:
            raise ModelNotFound(name, list(models))
        return _json(openai.model_entry(name, models[name]))

    def _readable_models(self, request: web.Request) -> Mapping[ModelName, tuple[ModelOffer, ...]]:
        """Those that the client may ask for."""
        may_read = self._inference.readable(_headers(request), request.remote or "")
        return {name: offers for name, offers in self._snapshot().models.items() if may_read(name)}

    async def _health(self, _request: web.Request) -> web.Response:
        """The process lives; what it sees of the room, for people and for `balancer workers`."""
        return _json({"status": "ok", **room_body(self._snapshot())})

    async def _ready(self, _request: web.Request) -> web.Response:
        """200 once a request could be served: for load balancers, service managers and scripts."""
        room = self._snapshot()
        workers = sum(view.state == "ready" for view in room.workers)
        ready = workers > 0 and not self._inference.draining
        body = {"ready": ready, "workers_ready": workers, "workers": len(room.workers)}
        return _json(body, status=200 if ready else 503)

    async def _scrape(self, _request: web.Request) -> web.Response:
        if self._metrics is None:
            raise NotFound("Metrics are switched off (ENABLE_METRICS=false).")
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _joining(self, request: web.Request) -> web.Response:
        try:
            join = parse_join(await self._body(request))
        except WireError as error:
            raise BadRequest(f"This is not a join of a worker agent: {error}.") from None
        self._join(join, request.remote or "")
        return _json({"joined": join.id})


def _route(request: web.Request) -> str:
    """The pattern that its path fits: what stands in a path may be anybody's text, and is not logged."""
    resource = request.match_info.route.resource
    return "an unknown path" if resource is None else resource.canonical


class _Client:
    """A client of aiohttp's server: what is written for it waits here for the handler, which sends it."""

    def __init__(self, request: web.Request, slow_reader_seconds: float) -> None:
        self._request = request
        self._slow_reader_seconds = slow_reader_seconds
        self._response: web.StreamResponse | None = None
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._ended = False
        self._news = asyncio.Event()
        self._pause: Callable[[], None] = lambda: None
        self._resume: Callable[[], None] = lambda: None

    def begin(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        self._response = web.StreamResponse(status=status, headers=headers)
        self._response.content_length = length

    def write(self, data: bytes) -> None:
        self._pieces.append(data)
        self._bytes += len(data)
        self._news.set()
        if self._bytes > HIGH_WATER_BYTES:
            self._pause()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def on_room(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._pause, self._resume = pause, resume
        if self._bytes > HIGH_WATER_BYTES:
            pause()

    async def sent(self, answering: Coroutine[None, None, None]) -> web.StreamResponse:
        """Sends what `answering` writes, until that is whole; ends it if the client leaves."""
        task = asyncio.ensure_future(answering)
        task.add_done_callback(lambda _: self._news.set())
        try:
            while not self._ended:
                await self._news.wait()
                self._news.clear()
                await self._send()
                if task.done() and not self._ended:
                    break
            await task
            response = self._response
            if response is None:
                raise asyncio.CancelledError
            await self._send()
            await response.write_eof()
            return response
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _send(self) -> None:
        response = self._response
        if response is None or not self._pieces:
            return
        if not response.prepared:
            await response.prepare(self._request)
        data = b"".join(self._pieces)
        self._pieces.clear()
        await self._written(response, data)
        self._bytes -= len(data)
        if self._bytes <= HIGH_WATER_BYTES:
            self._resume()

    async def _written(self, response: web.StreamResponse, data: bytes) -> None:
        """Waits for the client to read, as long as it does read."""
        transport = cast(asyncio.WriteTransport | None, self._request.transport)
        if transport is None or (
            len(data) <= HIGH_WATER_BYTES // 2 and not transport.get_write_buffer_size()
        ):
            # Nearly always: nothing waits to be read, and so little is taken without waiting, even where TLS
            # makes it somewhat more.
            await response.write(data)
            return
        writing = asyncio.ensure_future(response.write(data))
        unread = math.inf
        try:
            while not (await asyncio.wait({writing}, timeout=self._slow_reader_seconds))[0]:
                left = transport.get_write_buffer_size()
                if left >= unread:
                    transport.abort()
                    raise asyncio.CancelledError
                unread = left
            await writing
        finally:
            writing.cancel()


def _headers(request: web.Request) -> Mapping[str, str]:
    """By names in lower case. One that came twice holds all that was said, with commas between (RFC 9110,
    5.3): which of two that contradict each other counts is not ours to choose."""
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        key = name.lower()
        said = headers.get(key)
        headers[key] = value if said is None or said == value else f"{said}, {value}"
    return headers


def _as_refusal(request: web.Request, error: Exception) -> RequestError:
    """Any error as one that has a form for clients."""
    match error:
        case RequestError():
            return error
        case web.HTTPNotFound():
            return NotFound(
                f"There is no {request.path} here. This endpoint speaks OpenAI's API: set the client's base "
                "URL to this address with /v1; GET /v1/models lists the models."
            )
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(f"{request.path} takes {', '.join(sorted(error.allowed_methods))}.")
        case web.HTTPException() if 400 <= error.status < 500:
            return BadRequest(f"The request is not right: {error.reason}.")
    return as_refusal(error)


def room_body(room: Snapshot) -> Mapping[str, object]:
    """The room as JSON, for `/health`."""
    return {
        "waiting": room.waiting,
        "waiting_batch": room.waiting_batch,
        "running": room.running,
        "warnings": conflicts(room.models),
        "workers": [worker_body(view) for view in room.workers],
    }


def worker_body(view: WorkerView) -> Mapping[str, object]:
    """One worker as JSON."""
    return {
        "id": view.worker.id,
        "type": view.worker.type,
        "url": view.worker.url,
        "state": view.state,
        "detail": view.detail,
        "breaker": view.breaker.value,
        "running": view.running,
        "slots": view.slots,
        "models": view.models,
        "success_rate": round(view.success_rate, 4),
        "average_seconds": view.average_seconds,
        "prefill_tokens_per_second": _rounded(view.prefill_tokens_per_second),
        "tokens_per_second": _rounded(view.tokens_per_second),
        "engine": view.engine,
        "hardware": view.hardware,
        "advice": view.advice,
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
