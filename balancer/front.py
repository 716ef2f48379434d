"""The HTTP side towards clients, on aiohttp: reads a request within bounds, gives it to the journey, and
writes what comes back in OpenAI's forms.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import orjson
from aiohttp import web

from balancer.core.dispatcher import Snapshot
from balancer.core.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    Forbidden,
    LoopDetected,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnsupportedMedia,
)
from balancer.core.model import Candidate, Choice, Endpoint, ModelName, Served, ServiceClass, Worker
from balancer.dialects import openai
from balancer.dialects.framing import event
from balancer.history import share_of, why
from balancer.identity import conflicts
from balancer.journey import ClientLeft, Journey, Story
from balancer.metrics import CONTENT_TYPE, Metrics
from worker_agent.sources import Sources
from worker_agent.wire import HOPS_HEADER, JOIN_PATH, REQUEST_ID_HEADER, Join, WireError, parse_join

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LARGE_BODY_BYTES = 1024 * 1024
"""To read a megabyte of JSON takes about 10 ms."""

MAX_HOPS = 4
"""A balancer may well be another one's worker; more of them in a row are a circle."""

PRIORITY_HEADER = "X-Priority"
"""A request's class, by name. Goes on to the worker, which may be a balancer too; others ignore it."""

_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_REQUEST_ID = web.RequestKey("request_id", str)
_STORY = web.RequestKey("story", Story)


@dataclass(frozen=True, slots=True)
class FrontPolicy:
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    """Of all requests that wait or run."""
    body_seconds: float = 30.0
    """For the whole body to arrive, once the head has."""
    sources: Sources = field(default_factory=Sources)
    """Who is served at all."""


class Front:
    """The routes of the balancer."""

    def __init__(
        self,
        journey: Journey,
        policy: FrontPolicy,
        *,
        snapshot: Callable[[], Snapshot],
        join: Callable[[Join, str], None],
        find: Callable[[str], Served | None],
        metrics: Metrics | None,
        secret: bytes,
    ) -> None:
        """`join`: what to do with an agent that asks to be watched, and its address. `find`: a finished
        request by its id. `metrics`: None where they are switched off. `secret`: at most 64 bytes, for
        digests of prompts and keys that tell nothing to others."""
        self._journey = journey
        self._policy = policy
        self._snapshot = snapshot
        self._join = join
        self._find = find
        self._metrics = metrics
        self._secret = secret
        self.draining = False
        """Set when the balancer is about to end: nothing new is taken, connections are not kept."""
        self._held_bytes = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self._policy.max_body_bytes, middlewares=[self._guarded])
        for endpoint in Endpoint:
            app.router.add_post(endpoint.value, self._inference(endpoint))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/admin/requests/{id}/why", self._why)
        app.router.add_post(JOIN_PATH, self._joining)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may ask at all, and every error in the form that clients read."""
        try:
            if request.remote is not None and not self._policy.sources.admit(request.remote):
                raise Forbidden(
                    f"{request.remote} is no private address. To have its network served, name it in the "
                    "balancer's setting allow_networks."
                )
            response = await handler(request)
        except (ClientLeft, ConnectionError):
            raise asyncio.CancelledError from None  # nobody is left to be answered
        except Exception as error:
            refusal = _as_refusal(request, error)
            if _STORY not in request:  # what has a story is told by its end
                log.info(
                    "%s %s %s refused: %d %s",
                    *(request.remote, request.method, ascii(request.path), refusal.status),
                    refusal.code or refusal.type,
                )
            response = _refused(request, refusal)
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        if self.draining:
            response.force_close()
        return response

    # Inference

    def _inference(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if _hops(request) >= MAX_HOPS:
                raise LoopDetected(
                    f"The request has passed {MAX_HOPS} balancers: some of them name each other as workers."
                )
            if self.draining:
                raise ShuttingDown("This balancer is about to stop. Try again in a moment.")
            named_class = _class_in(request)
            body = await self._body(request)
            with self._holding(len(body)):
                asked = await _parsed(endpoint, body, self._secret)
                del body  # from here on it is held as what goes to a worker
                story = self._story(request, named_class or asked.service_class)
                request[_STORY] = story
                if asked.stream:
                    return await self._stream(request, asked, story)
                answer = await self._journey.serve(asked, story, None)
            return web.Response(
                body=answer, content_type="application/json", headers=_headers(story, len(story.attempts))
            )

        return handle

    def _story(self, request: web.Request, service_class: ServiceClass) -> Story:
        request_id = _request_id(request)
        passed_on = {
            REQUEST_ID_HEADER: request_id,
            HOPS_HEADER: str(_hops(request) + 1),
            PRIORITY_HEADER: service_class.value,
        }
        asker = _digest_of_key(request, self._secret)
        return self._journey.begin(request_id, request.remote or "", passed_on, service_class, asker)

    async def _stream(self, request: web.Request, asked: openai.Request, story: Story) -> web.StreamResponse:
        delivery = _EventStream(request, story)
        try:
            await self._journey.serve(asked, story, delivery)
        except RequestError as error:
            if delivery.response is None:
                raise
            # Too late for a status: an error event and no end mark, which SDKs raise as an exception.
            await delivery.write(event(openai.error_body(error)))
        response = delivery.response
        if response is None:
            raise ClientLeft
        await response.write_eof()
        return response

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Counts the bytes of all that waits or runs: a line of a thousand long papers is bounded too."""
        if self._held_bytes + size > self._policy.max_held_bytes:
            raise QueueFull("Too many long requests are under way. Try again in 5 s.", 5.0)
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size

    async def _body(self, request: web.Request) -> bytes:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            # Unpacked before it could be measured, a megabyte can become hundreds (RELIABILITY D14).
            raise UnsupportedMedia("Compressed request bodies are not accepted: leave out Content-Encoding.")
        if request.content_type != "application/json":
            raise UnsupportedMedia("Send the request as JSON, with 'Content-Type: application/json'.")
        try:
            async with asyncio.timeout(self._policy.body_seconds):
                return await request.read()
        except TimeoutError:
            raise BodyTimeout(
                f"The request body did not arrive within {self._policy.body_seconds:g} s."
            ) from None
        except web.HTTPRequestEntityTooLarge:
            raise BodyTooLarge(
                f"The request body is larger than {self._policy.max_body_bytes} bytes; "
                "the limit is the setting max_body_mib."
            ) from None

    # The room

    async def _models(self, _request: web.Request) -> web.Response:
        return _json(openai.models_body(self._snapshot().models))

    async def _model(self, request: web.Request) -> web.Response:
        name = ModelName(request.match_info["model"])
        models = self._snapshot().models
        if name not in models:
            raise ModelNotFound(name, list(models))
        return _json(openai.model_entry(name, models[name]))

    async def _health(self, _request: web.Request) -> web.Response:
        """The process lives; what it sees of the room, for people and for `balancer workers`."""
        return _json({"status": "ok", **room_body(self._snapshot())})

    async def _ready(self, _request: web.Request) -> web.Response:
        """200 once a request could be served: for load balancers, service managers and scripts."""
        room = self._snapshot()
        workers = sum(view.state == "ready" for view in room.workers)
        ready = workers > 0 and not self.draining
        body = {"ready": ready, "workers_ready": workers, "workers": len(room.workers)}
        return _json(body, status=200 if ready else 503)

    async def _scrape(self, _request: web.Request) -> web.Response:
        if self._metrics is None:
            raise NotFound("Metrics are switched off (ENABLE_METRICS=false).")
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _why(self, request: web.Request) -> web.Response:
        """Why a finished request went where it went. Holds no text of it."""
        served = self._find(request.match_info["id"])
        if served is None:
            raise NotFound(
                "No finished request of that id is remembered: it may be too long ago, or still under way."
            )
        return _json(why(served))

    async def _joining(self, request: web.Request) -> web.Response:
        try:
            join = parse_join(await self._body(request))
        except WireError as error:
            raise BadRequest(f"This is not a join of a worker agent: {error}.") from None
        self._join(join, request.remote or "")
        return _json({"joined": join.id})


class _EventStream:
    """A client's stream of events: begun with the first piece of the answer, not before, so that until then
    an error keeps its status."""

    def __init__(self, request: web.Request, story: Story) -> None:
        self._request = request
        self._story = story
        self.response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        return self.response is not None

    async def send(self, worker: Worker, data: bytes) -> None:
        if self.response is None:
            self.response = web.StreamResponse(
                headers={
                    "Content-Type": "text/event-stream; charset=utf-8",
                    "Cache-Control": "no-cache",
                    "X-Accel-Buffering": "no",  # nginx would hold the stream back
                    **_headers(self._story, len(self._story.attempts) + 1),
                }
            )
            try:
                await self.response.prepare(self._request)
            except ConnectionError as error:
                raise ClientLeft from error
        await self.write(data)

    async def write(self, data: bytes) -> None:
        if self.response is not None:
            try:
                await self.response.write(data)
            except ConnectionError as error:
                raise ClientLeft from error


async def _parsed(endpoint: Endpoint, body: bytes, secret: bytes) -> openai.Request:
    """Off the loop where it takes long enough to be felt by others."""
    if len(body) <= LARGE_BODY_BYTES:
        return openai.parse(endpoint, body, secret)
    return await asyncio.to_thread(openai.parse, endpoint, body, secret)


def _class_in(request: web.Request) -> ServiceClass | None:
    """As the header names it; None: it does not."""
    name = request.headers.get(PRIORITY_HEADER)
    if name is None:
        return None
    try:
        return ServiceClass(name.strip().lower())
    except ValueError:
        names = " or ".join(repr(known.value) for known in ServiceClass)
        raise BadRequest(f"The header {PRIORITY_HEADER} must be {names}, or left out.") from None


def _digest_of_key(request: web.Request, secret: bytes) -> str:
    """What tells clients with different API keys apart; empty: it came without one."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return ""
    digest = hashlib.blake2b(key.strip().encode("utf-8", "surrogateescape"), digest_size=8, key=secret)
    return f"key {digest.hexdigest()}"


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
    log.error(
        "a defect of the balancer, in answering %s %s", request.method, ascii(request.path), exc_info=error
    )
    return RequestError("The balancer failed; its log says where.")


def _refused(request: web.Request, error: RequestError) -> web.Response:
    headers = {REQUEST_ID_HEADER: _request_id(request)}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return web.Response(
        body=openai.error_body(error), status=error.status, content_type="application/json", headers=headers
    )


def _request_id(request: web.Request) -> str:
    """The client's own id where it is harmless in a log and a header, else one of ours."""
    known = request.get(_REQUEST_ID)
    if known is None:
        theirs = request.headers.get(REQUEST_ID_HEADER, "")
        known = theirs if _HARMLESS_ID.fullmatch(theirs) else f"req_{uuid.uuid4().hex}"
        request[_REQUEST_ID] = known
    return known


def _hops(request: web.Request) -> int:
    value = request.headers.get(HOPS_HEADER, "0")
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 4 else 0


def _headers(story: Story, attempts: int) -> dict[str, str]:
    """Where the answer comes from, and why. `attempts`: the one that answers included."""
    return {
        REQUEST_ID_HEADER: story.request_id,
        "X-Balancer-Worker": story.worker.id if story.worker else "",
        "X-Balancer-Model": story.model or "",
        "X-Balancer-Attempts": str(attempts),
        "X-Balancer-Reason": _reason(story.choice) if story.choice else "",
        "X-Balancer-Queue-Ms": str(round(story.queue_seconds * 1000)),
    }


def _reason(choice: Choice) -> str:
    """A decision in a line, for people."""
    if not choice.candidates:
        return choice.because
    share = share_of(choice, choice.worker_id)
    reason = f"picked with a chance of {share:.0%} among {len(choice.candidates)}"
    picked = next((one for one in choice.candidates if one.worker_id == choice.worker_id), None)
    if picked is not None:
        reason += _expectation(picked)
    return f"{choice.because}; {reason}" if choice.because else reason


def _expectation(picked: Candidate) -> str:
    words = ""
    if picked.expected_seconds is not None:
        words += f", expected to cost {picked.expected_seconds:.3g} s"
    if picked.cached_tokens:
        words += f", taken to remember {picked.cached_tokens} tokens of the prompt"
    return words


def room_body(room: Snapshot) -> Mapping[str, object]:
    """The room as JSON, for `/health`."""
    return {
        "waiting": room.waiting,
        "waiting_batch": room.waiting_batch,
        "running": room.running,
        "warnings": conflicts(room.models),
        "workers": [
            {
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
            for view in room.workers
        ],
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
