"""What of this machine the network can reach: the engines' inference routes, relayed, and the report stream.

All of it is for balancers that have met this agent (`gate`); strangers learn only whether it would serve.
Engines stay on loopback behind keys of their own. A body is parsed here and sent on with the engine's own
model name; bytes of the answer pass as they come. A request for a model that is not loaded waits for that
before anything is answered, so that it can still be refused. A client that leaves takes its engine connection
along at once, whatever the answer's state; half an answer ends with an error, so that it never looks whole.
Prompts and answers are not logged, nor are the errors of parsers, which quote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from aiohttp import web

from worker_agent import wire
from worker_agent.changes import Changes
from worker_agent.continuation import is_begun
from worker_agent.events import choices_of
from worker_agent.exchange import Exchange, ExchangePolicy, Fault, Refused
from worker_agent.gate import Gate
from worker_agent.hosts import Hosts
from worker_agent.plans import Plan
from worker_agent.resident import Resident
from worker_agent.server import is_dialled
from worker_agent.sources import Sources
from worker_agent.wire import EngineState, Report

_CHAT_PATH, _COMPLETIONS_PATH, _ = wire.INFERENCE_PATHS
_THREAD_FROM_BYTES = 1024 * 1024  # parsing so much would hold up every stream for some 10 ms
_LONGEST_WAIT_SECONDS = 86_400.0
_HEALTH_PATH = "/health"
_OPEN = Gate.OPEN | {("GET", _HEALTH_PATH), ("HEAD", _HEALTH_PATH)}
"""What is answered without a session."""
_STOPPING = Fault("stopping", "this machine is about to stop: ask again")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPolicy:
    """Bounds towards the network."""

    body_bytes: int = 32 * 1024 * 1024
    """Pictures travel inside of JSON."""
    held_bytes: int = 512 * 1024 * 1024
    """Of all requests that are being read or answered."""
    body_seconds: float = 30.0
    """A request's body must have arrived by then."""
    wait_seconds: float = 300.0
    """For a model to be loaded, where the request does not say."""
    goodbye_seconds: float = 1.0
    """For telling those whose answers are ended early."""
    report_streams: int = 16
    """Balancers and curious people at once."""
    sources: Sources = field(default_factory=Sources)
    """Who is served at all."""
    hosts: Hosts = field(default_factory=lambda: Hosts(()))
    """By which names."""
    exchange: ExchangePolicy = field(default_factory=ExchangePolicy)


class Models(Protocol):
    """The models of this machine, as requests see them."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def running(self) -> int: ...
    def knows(self, name: str) -> bool: ...
    def plan(self, name: str) -> Plan | None: ...
    def resident(self, name: str) -> Resident | None: ...
    def entered(self, name: str, wait_seconds: float) -> AbstractAsyncContextManager[Resident]: ...
    def drain(self) -> None: ...
    def stop_all(self, fault: Fault) -> None: ...
    def cut_all(self) -> None: ...


class Gateway:
    """The agent's HTTP side. `application` is served by `app`."""

    def __init__(
        self,
        models: Models,
        report: Callable[[], Report],
        changes: Changes,
        gate: Gate,
        policy: GatewayPolicy | None = None,
        orders: Sequence[web.RouteDef] = (),
    ) -> None:
        """`orders`: further routes, which are behind the gate as all are."""
        self._models = models
        self._report = report
        self._changes = changes
        self._gate = gate
        self._policy = policy or GatewayPolicy()
        self._orders = orders
        self._held_bytes = 0
        self._streams = 0
        self._draining = False
        self._closing = False

    @property
    def running(self) -> int:
        """Requests held open towards engines now."""
        return self._models.running

    @property
    def draining(self) -> bool:
        """New requests are refused."""
        return self._draining

    def application(self) -> web.Application:
        """Serve it with `handler_cancellation=True`: a client that leaves must end its handler."""
        app = web.Application(client_max_size=self._policy.body_bytes, middlewares=[self._answer_for_errors])
        app.add_routes([web.post(path, self._relay) for path in wire.INFERENCE_PATHS])
        app.add_routes([web.get(wire.REPORT_PATH, self._tell_reports), web.get(_HEALTH_PATH, self._health)])
        app.add_routes(self._gate.routes())
        app.add_routes(self._orders)
        app.on_response_prepare.append(_say_nothing_of_us)
        return app

    # The end, in this order:

    def drain(self) -> None:
        """Refuses new requests and those that wait for a model; those that run go on."""
        self._draining = True
        self._models.drain()
        self._changes.announce()

    async def drained(self) -> None:
        """Waits until no request runs."""
        while self._models.running:
            await self._changes.next.wait()

    async def close(self) -> None:
        """Ends the report streams, and what still runs: with an error that says so, or by cutting it."""
        self._closing = True
        self._models.stop_all(_STOPPING)
        self._changes.announce()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._policy.goodbye_seconds):
                await self.drained()
        self._models.cut_all()

    # One request ...

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        _insist_on_readable(request)
        size = request.content_length or 0
        if size > self._policy.body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._policy.body_bytes, size)
        if self._held_bytes + size > self._policy.held_bytes:
            raise Refused(503, "too_much_at_once", "too many long requests are under way: ask again", 5)
        self._held_bytes += size
        try:
            return await self._answer(request, await self._read(request))
        finally:
            self._held_bytes -= size

    async def _answer(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        name = body.get("model")
        if not isinstance(name, str) or not self._models.knows(name):
            names = ", ".join(self._models.names) or "no model"
            raise Refused(404, "model_not_found", f"this machine serves {names} only")
        if (plan := self._models.plan(name)) is not None:
            _insist_on_endpoint(request, plan)
        if request.path in (_CHAT_PATH, _COMPLETIONS_PATH) and body.get("stream") is not True:
            # An engine computes an answer in one piece to its end, whoever has left meanwhile.
            raise Refused(
                400, "stream_required", 'an agent answers with "stream": true only: ask the balancer'
            )
        if self._draining:
            raise Refused(503, _STOPPING.code, _STOPPING.message, retry_after=5)
        if request.headers.get(wire.CONTINUE_HEADER) == "1":
            body = self._going_on(request, name, body)
        choices, rest = choices_of(body), _encoded(body)
        del body  # while it waits, one form of it is enough
        async with self._models.entered(name, self._wait_seconds(request)) as resident:
            _insist_on_endpoint(request, resident.plan)
            serving = resident.serving
            assert serving is not None
            sent = _addressed(rest, serving.model)
            exchange = Exchange(request, serving, resident.watch, self._policy.exchange, choices)
            with resident.watch.attending(exchange, len(sent)):
                return await exchange.carry(resident.session, sent)

    def _going_on(self, request: web.Request, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if request.path != _CHAT_PATH or not is_begun(body):
            raise Refused(
                400,
                "nothing_to_continue",
                f"{wire.CONTINUE_HEADER} goes with a chat that ends with an answer's text",
            )
        resident = self._models.resident(name)
        continue_chat = None if resident is None else resident.plan.spec.continue_chat
        if resident is None or continue_chat is None or not resident.watch.continues:
            raise Refused(
                409,
                "cannot_continue",
                f"{name} has not shown here that it can go on: ask another machine",
            )
        return continue_chat(body)

    def _wait_seconds(self, request: web.Request) -> float:
        """How long it may wait for its model."""
        try:
            wished = float(request.headers.get(wire.WAIT_HEADER, ""))
        except ValueError:
            wished = math.nan
        if math.isnan(wished):
            return self._policy.wait_seconds
        return min(max(0.0, wished), _LONGEST_WAIT_SECONDS)

    async def _read(self, request: web.Request) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(self._policy.body_seconds):
                data = await request.read()
        except web.RequestPayloadError:
            raise Refused(400, "body_broken", "the request's body came to no end") from None
        except TimeoutError:
            raise Refused(408, "body_too_slow", "the request's body did not arrive in time") from None
        parse = orjson.loads
        try:
            body = await asyncio.to_thread(parse, data) if len(data) > _THREAD_FROM_BYTES else parse(data)
        except orjson.JSONDecodeError:
            raise Refused(400, "not_json", "the request's body is not valid JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "not_an_object", "the request's body must be a JSON object")
        return body

    # What is said of the machine ...

    async def _tell_reports(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= self._policy.report_streams:
            raise Refused(503, "too_many_watchers", "too many report streams are open", retry_after=10)
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

    async def _health(self, request: web.Request) -> web.Response:
        """For monitoring: 200 if a request would be served now. Strangers are told no more than that."""
        report = self._report()
        ready = report.state is EngineState.READY
        body = report.to_line()
        if not self._gate.has_met(request):
            body = orjson.dumps({"status": "ok" if ready else report.state.value})
        return web.Response(status=200 if ready else 503, body=body, content_type="application/json")

    # ... and around all of it.

    @web.middleware
    async def _answer_for_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            _insist_on_the_room(request, self._policy)
            if _route(request) not in _OPEN:
                self._gate.insist(request)
            return await handler(request)
        except Refused as refused:
            return refused.response()
        except web.HTTPRequestEntityTooLarge:
            limit = self._policy.body_bytes
            return Refused(413, "body_too_large", f"a body may have {limit} bytes").response()
        except ConnectionError:
            # The other side went away while it was written to: nobody is left to be told, nothing is wrong.
            raise asyncio.CancelledError from None
        except web.HTTPException as error:
            return Refused(error.status, "http_error", error.reason).response()


def _route(request: web.Request) -> tuple[str, str]:
    """As it was registered, however its path was written; of what there is none for, an empty one."""
    resource = request.match_info.route.resource
    return request.method, "" if resource is None else resource.canonical


async def _say_nothing_of_us(_request: web.Request, response: web.StreamResponse) -> None:
    """A stranger need not know which versions run here."""
    response.headers.pop("Server", None)


def _insist_on_the_room(request: web.Request, policy: GatewayPolicy) -> None:
    if is_dialled(request):
        return  # we went there ourselves, so neither a stranger nor a web page can have led it here
    if not policy.hosts.admit(request.headers.get("Host")):
        raise Refused(
            403,
            "wrong_host",
            "this is not one of this machine's names: ask by its address or its own name, or put the name"
            " into allow_hosts",
        )
    if not policy.sources.admit(request.remote or ""):
        raise Refused(
            403,
            "not_of_this_room",
            f"{request.remote} is no private address: name its network in allow_networks to have it served",
        )
    if "Origin" in request.headers or "Sec-Fetch-Site" in request.headers:
        # Balancers send neither; a web page in somebody's browser cannot help sending one.
        raise Refused(403, "browser", "an agent does not serve web pages: ask the balancer")


def _insist_on_readable(request: web.Request) -> None:
    """What can be told of a body before it is read. Raises `Refused`."""
    if request.content_type != "application/json":
        raise Refused(415, "content_type", "the content type must be application/json")
    if request.headers.get("Transfer-Encoding") is not None:
        # A million chunks of a byte keep the loop busy for a second; balancers know how long bodies are.
        raise Refused(411, "length_required", "send the body with a Content-Length")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        # A megabyte of gzip was seen to become 280 of memory on its way to being refused for its size.
        raise Refused(415, "content_encoding", "compressed requests are not read")


def _insist_on_endpoint(request: web.Request, plan: Plan) -> None:
    if request.path not in plan.spec.paths:
        raise Refused(404, "endpoint_not_served", f"{plan.spec.name} does not serve {request.path} here")


def _encoded(body: Mapping[str, Any]) -> bytes:
    """As JSON, without the model, which the engine has its own name for. Raises `Refused`."""
    try:
        return orjson.dumps({key: value for key, value in body.items() if key != "model"})
    except orjson.JSONEncodeError:  # orjson reads deeper nesting than it writes (254 levels)
        raise Refused(400, "nested_too_deeply", "the request's body is nested too deeply") from None


def _addressed(rest: bytes, model: str) -> bytes:
    """The body that `_encoded` made, with this model."""
    between = b"" if rest == b"{}" else b","
    return b"".join(
        (b'{"model":', orjson.dumps(model), between, memoryview(rest)[1:])
    )  # one copy: it may be long
