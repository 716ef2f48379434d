"""What of this machine the network can reach: the engine's inference routes, relayed, and the report stream.

The engine stays on loopback behind a key of its own. A body is parsed here and sent on with the engine's own
model name; bytes of the answer pass as they come. A client that leaves takes its engine connection along at
once, whatever the answer's state; an engine that dies takes the client's, so that half an answer never looks
whole. Prompts and answers are not logged, nor are the errors of parsers, which quote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson
from aiohttp import web

from worker_agent import wire
from worker_agent.sources import Sources
from worker_agent.supervised import Plan, Serving
from worker_agent.wire import EngineState, Report

_LOG = logging.getLogger(__name__)

_ANSWER_HEADERS = ("Content-Type", "Retry-After", "Cache-Control")
_END_MARKER = b"[DONE]"
_TAIL_BYTES = 64  # more than the marker and what may follow it in its event
_THREAD_FROM_BYTES = 1024 * 1024  # parsing so much would hold up every stream for some 10 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPolicy:
    """Bounds towards the network."""

    body_bytes: int = 32 * 1024 * 1024
    """Pictures travel inside of JSON."""
    body_seconds: float = 30.0
    """A request's body must have arrived by then."""
    connect_seconds: float = 5.0
    """To the engine; it is on loopback, but a full listen queue takes its time."""
    keep_alive_seconds: float = 75.0
    """Longer than the balancer keeps an idle connection, so that it is never the one to be surprised."""
    report_streams: int = 16
    """Balancers and curious people at once."""
    sources: Sources = field(default_factory=Sources)
    """Who is served at all."""


class Backend(Protocol):
    """The engine as a relay sees it."""

    @property
    def plan(self) -> Plan: ...
    @property
    def serving(self) -> Serving | None: ...
    def heard(self, serving: Serving) -> None: ...
    def doubt(self, serving: Serving) -> None: ...


class Changes:
    """Wakes whoever waits for the next change."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """Is set at the next change. Taken before looking at what may change, it misses none."""
        return self._next

    def announce(self) -> None:
        """Something changed."""
        self._next.set()
        self._next = asyncio.Event()


class _Refused(Exception):
    """Ends a request with an error in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def response(self) -> web.Response:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return web.json_response(
            {"error": error},
            status=self.status,
            headers=headers,
            dumps=lambda body: orjson.dumps(body).decode(),
        )


class Gateway:
    """The agent's HTTP side. `application` is served by `app`."""

    def __init__(
        self,
        engine: Backend,
        report: Callable[[], Report],
        changes: Changes,
        policy: GatewayPolicy | None = None,
    ) -> None:
        self._engine = engine
        self._report = report
        self._changes = changes
        self._policy = policy or GatewayPolicy()
        self._open: dict[int, web.Request] = {}  # by identity: a request is no hashable value
        self._streams = 0
        self._draining = False
        self._closing = False
        self._session: aiohttp.ClientSession | None = None

    @property
    def running(self) -> int:
        """Requests held open towards the engine now."""
        return len(self._open)

    @property
    def draining(self) -> bool:
        """New requests are refused."""
        return self._draining

    def application(self) -> web.Application:
        """Serve it with `handler_cancellation=True`: a client that leaves must end its handler."""
        app = web.Application(client_max_size=self._policy.body_bytes, middlewares=[self._answer_for_errors])
        app.add_routes([web.post(path, self._relay) for path in wire.INFERENCE_PATHS])
        app.add_routes([web.get(wire.REPORT_PATH, self._tell_reports), web.get("/health", self._health)])
        app.cleanup_ctx.append(self._with_session)
        return app

    # The end, in this order:

    def drain(self) -> None:
        """Refuses new requests; those that run go on."""
        self._draining = True
        self._changes.announce()

    async def drained(self) -> None:
        """Waits until no request runs."""
        while self._open:
            await self._changes.next.wait()

    def close(self) -> None:
        """Ends the report streams, and cuts what still runs, visibly for the other side."""
        self._closing = True
        for request in self._open.values():
            _cut(request)
        self._changes.announce()

    # One request ...

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        plan, serving = self._engine.plan, self._engine.serving
        if request.path not in plan.spec.paths:
            raise _Refused(404, "endpoint_not_served", f"{plan.spec.name} does not serve {request.path} here")
        if body.get("model") != plan.name:
            raise _Refused(404, "model_not_found", f"this machine serves {plan.name} only")
        if self._draining:
            raise _Refused(503, "stopping", "this machine is about to stop", retry_after=5)
        if serving is None:
            report = self._report()
            message = f"the engine is {report.state}. {report.detail}".strip()
            raise _Refused(503, "engine_not_ready", message, retry_after=2)
        try:
            sent = orjson.dumps({**body, "model": serving.model})
        except orjson.JSONEncodeError:  # orjson reads deeper nesting than it writes (254 levels)
            raise _Refused(400, "nested_too_deeply", "the request's body is nested too deeply") from None
        if len(self._open) >= plan.slots:
            raise _Refused(429, "no_free_slot", f"all {plan.slots} slots are taken", retry_after=1)
        async with self._slot(request):
            return await self._pass_on(request, sent, serving)

    @contextlib.asynccontextmanager
    async def _slot(self, request: web.Request) -> AsyncIterator[None]:
        self._open[id(request)] = request
        self._changes.announce()
        try:
            yield
        finally:
            del self._open[id(request)]
            self._changes.announce()

    async def _read(self, request: web.Request) -> Mapping[str, Any]:
        if request.content_type != "application/json":
            raise _Refused(415, "content_type", "the content type must be application/json")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            # A megabyte of gzip was seen to become 280 of memory on its way to being refused for its size.
            raise _Refused(415, "content_encoding", "compressed requests are not read")
        try:
            async with asyncio.timeout(self._policy.body_seconds):
                data = await request.read()
        except TimeoutError:
            raise _Refused(408, "body_too_slow", "the request's body did not arrive in time") from None
        parse = orjson.loads
        try:
            body = await asyncio.to_thread(parse, data) if len(data) > _THREAD_FROM_BYTES else parse(data)
        except orjson.JSONDecodeError:
            raise _Refused(400, "not_json", "the request's body is not valid JSON") from None
        if not isinstance(body, dict):
            raise _Refused(400, "not_an_object", "the request's body must be a JSON object")
        return body

    async def _pass_on(self, request: web.Request, body: bytes, serving: Serving) -> web.StreamResponse:
        assert self._session is not None
        address = serving.address
        try:
            answer = await self._session.post(
                address.url + request.path,
                data=body,
                headers={
                    **address.headers,
                    "Content-Type": "application/json",
                    "Accept-Encoding": "identity",
                },
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self._engine.doubt(serving)
            raise _Refused(502, "engine_unreachable", "the engine accepts no connection", 1) from None
        except (aiohttp.ClientError, TimeoutError):
            raise _Refused(502, "engine_died", "the engine ended before it answered", 1) from None
        try:
            if (
                answer.status == 401 or 300 <= answer.status < 400
            ):  # between it and us; not the client's to see
                raise _Refused(502, "engine_refused", f"the engine answered with status {answer.status}", 1)
            return await self._stream(request, answer, serving)
        finally:
            answer.close()  # at once, also when we are cancelled; it is a release where all has been read

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, serving: Serving
    ) -> web.StreamResponse:
        headers = {name: answer.headers[name] for name in _ANSWER_HEADERS if name in answer.headers}
        response = web.StreamResponse(status=answer.status, headers=headers)
        response.content_length = answer.content_length
        self._engine.heard(serving)
        await response.prepare(request)
        tail = b""
        while True:
            try:
                chunk = await answer.content.readany()
            except aiohttp.ClientError:
                _cut(request)
                return response
            if not chunk:
                break
            self._engine.heard(serving)
            tail = (tail + chunk[-_TAIL_BYTES:])[-_TAIL_BYTES:]
            await response.write(chunk)
        if answer.content_type == "text/event-stream" and _END_MARKER not in tail:
            _cut(request)  # an engine that speaks HTTP/1.0 ends its answer by dying, too
            return response
        await response.write_eof()
        return response

    # What is said of the machine ...

    async def _tell_reports(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= self._policy.report_streams:
            raise _Refused(503, "too_many_watchers", "too many report streams are open", retry_after=10)
        self._streams += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            while True:
                change = self._changes.next
                await response.write(self._report().to_line())
                if self._closing:
                    return response
                # What changes meanwhile is told by the next line: a busy agent must not write faster than a
                # balancer reads, who would see the past, and take what is buffered for signs of life.
                await asyncio.sleep(wire.REPORT_GAP_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wire.REPORT_INTERVAL_SECONDS - wire.REPORT_GAP_SECONDS):
                        await change.wait()
        finally:
            self._streams -= 1

    async def _health(self, _request: web.Request) -> web.Response:
        """For people and their monitoring: 200 if a request would be served now."""
        report = self._report()
        ready = report.state is EngineState.READY
        return web.Response(
            status=200 if ready else 503, body=report.to_line(), content_type="application/json"
        )

    # ... and around all of it.

    @web.middleware
    async def _answer_for_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            _insist_on_the_room(request, self._policy.sources)
            return await handler(request)
        except _Refused as refused:
            return refused.response()
        except web.HTTPRequestEntityTooLarge:
            limit = self._policy.body_bytes
            return _Refused(413, "body_too_large", f"a body may have {limit} bytes").response()
        except ConnectionError:
            # The other side went away while it was written to: nobody is left to be told, nothing is wrong.
            raise asyncio.CancelledError from None
        except web.HTTPException as error:
            return _Refused(error.status, "http_error", error.reason).response()

    async def _with_session(self, _app: web.Application) -> AsyncIterator[None]:
        # No proxy from the environment (trust_env is off), no cookies; slots bound the connections already.
        connector = aiohttp.TCPConnector(limit=0, force_close=not self._engine.plan.spec.keep_alive)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._policy.connect_seconds)
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout, auto_decompress=False
        ) as self._session:
            yield


def _insist_on_the_room(request: web.Request, sources: Sources) -> None:
    if not sources.admit(request.remote or ""):
        raise _Refused(
            403,
            "not_of_this_room",
            f"{request.remote} is no private address: name its network in allow_networks to have it served",
        )
    if "Origin" in request.headers or "Sec-Fetch-Site" in request.headers:
        # Balancers send neither; a web page in somebody's browser cannot help sending one.
        raise _Refused(403, "browser", "an agent does not serve web pages: ask the balancer")


def _cut(request: web.Request) -> None:
    """Ends the connection without ending the answer: half a text must not look whole to the other side."""
    if request.transport is not None:
        request.transport.abort()
