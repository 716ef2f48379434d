"""One request at the engine: sent on, its answer handed back event by event, ended early where need be.

However it ends, the other side is told: with a status before the answer has begun, with an error event after
that, and in neither case with the end mark of a whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import orjson
from aiohttp import web

from worker_agent.events import MAX_EVENT_BYTES, EventGate, EventTooLong, error_event
from worker_agent.supervised import Serving

_ANSWER_HEADERS = ("Content-Type", "Retry-After", "Cache-Control")
_REST_SECONDS = 0.1  # for what follows an end mark (its HTTP end), so that the connection can be kept
_NEVER_PAUSED_BYTES = 32 * 1024  # a connection with nothing in its buffer takes so much, whoever reads or not


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an answer is not whole, as the other side is told."""

    code: str
    message: str


ENGINE_DIED = Fault("engine_died", "the engine ended before its answer did: ask again")
STREAM_INCOMPLETE = Fault("stream_incomplete", "the engine stopped short of its answer's end: ask again")
EVENT_TOO_LONG = Fault(
    "stream_incomplete", f"the engine wrote an event of more than {MAX_EVENT_BYTES} bytes: ask again"
)
ANSWER_TOO_LONG = Fault("stream_incomplete", "the engine's answer does not end: ask for fewer tokens")


class Refused(Exception):
    """Ends a request with an error in OpenAI's form. The message holds nothing of what was sent."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_after: int | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """`more`: what the error says besides, under keys of its own."""
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
        self.more = more or {}

    def response(self) -> web.Response:
        """What is answered."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code, **self.more}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return web.Response(
            body=orjson.dumps({"error": error}),
            status=self.status,
            headers=headers,
            content_type="application/json",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePolicy:
    """Bounds of one answer."""

    write_seconds: float = 60.0
    """A client that takes nothing for so long is gone (RELIABILITY H3)."""
    answer_bytes: int = 64 * 1024 * 1024
    """Of one stream; an engine that is lost in blanks must come to an end, too (E5)."""


class Attendant(Protocol):
    """Whoever looks after the engine, as an exchange tells it what comes."""

    def heard(self, exchange: Exchange, *, piece: bool) -> None: ...
    def held(self, exchange: Exchange) -> None: ...
    def resumed(self, exchange: Exchange) -> None: ...
    def done(self, exchange: Exchange) -> None: ...
    def unreached(self, exchange: Exchange, *, refused: bool) -> None: ...
    async def is_gone(self, serving: Serving) -> bool: ...


class Exchange:
    """One request at the engine."""

    def __init__(
        self,
        request: web.Request,
        serving: Serving,
        attendant: Attendant,
        policy: ExchangePolicy,
        choices: int,
    ) -> None:
        self.serving = serving
        self.abandoned = False
        """The engine was at work on it when it was given up."""
        self._request = request
        self._attendant = attendant
        self._policy = policy
        self._choices = choices
        self._scope: asyncio.Timeout | None = None
        self._stopped: Fault | None = None

    def stop(self, fault: Fault) -> None:
        """Ends it now, and tells the other side why. Only the first reason counts."""
        if self._stopped is None:
            self._stopped = fault
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())

    def cut(self) -> None:
        """Ends the connection without ending the answer: half of it must not look whole to the other side."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def carry(self, session: aiohttp.ClientSession, body: bytes) -> web.StreamResponse:
        """The whole of it. Raises `Refused` while nothing of an answer has been sent."""
        try:
            with self._stoppable() as scope:
                async with scope:
                    answer = await self._post(session, body)
        except TimeoutError:
            raise self._refusal() from None
        try:
            # Statuses that are between the engine and us, and not the client's to see.
            if answer.status == 401 or 300 <= answer.status < 400:
                self.abandoned = False
                raise Refused(502, "engine_refused", f"the engine answered with status {answer.status}", 1)
            self._attendant.heard(self, piece=False)
            if answer.content_type == "text/event-stream":
                return await self._hand_on_events(answer)
            return await self._hand_on_bytes(answer)
        finally:
            answer.close()  # at once, also when we are cancelled; it is a release where all has been read

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[asyncio.Timeout]:
        """A scope that `stop` ends with `TimeoutError`."""
        self._scope = asyncio.timeout(0 if self._stopped is not None else None)
        try:
            yield self._scope
        finally:
            self._scope = None

    def _refusal(self) -> Refused:
        assert self._stopped is not None
        return Refused(503, self._stopped.code, self._stopped.message, retry_after=2)

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> aiohttp.ClientResponse:
        address = self.serving.address
        self.abandoned = True
        try:
            return await session.post(
                address.url + self._request.path,
                data=body,
                headers={
                    **address.headers,
                    "Content-Type": "application/json",
                    "Accept-Encoding": "identity",
                },
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.abandoned = False
            self._attendant.unreached(self, refused=isinstance(error, aiohttp.ClientConnectorError))
            raise Refused(502, "engine_unreachable", "the engine accepts no connection", 1) from None
        except (aiohttp.ClientError, TimeoutError):
            self.abandoned = False
            if self._stopped is not None:
                raise self._refusal() from None
            fault = await self._why_it_ended()
            raise Refused(502, fault.code, fault.message, 1) from None

    async def _hand_on_events(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = self._response(answer)
        gate = EventGate(self._choices)
        fault: Fault | None = None
        try:
            with self._stoppable() as scope:
                async with scope:
                    await response.prepare(self._request)
                    fault = await self._pump(answer, response, gate)
        except TimeoutError:
            fault = self._stopped
        if fault is not None:
            await self._write(response, error_event(fault.code, fault.message))
        await self._within_reason(response.write_eof())
        if gate.over and not answer.content.at_eof():
            with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(_REST_SECONDS):
                    while await answer.content.readany():
                        pass
        return response

    async def _pump(
        self, answer: aiohttp.ClientResponse, response: web.StreamResponse, gate: EventGate
    ) -> Fault | None:
        """Hands on events to the end of the answer; says why, if that is not its own end."""
        seen, received = 0, 0
        while not gate.over:
            try:
                chunk = await answer.content.readany()
            except aiohttp.ClientError:
                break
            if not chunk:
                break
            received += len(chunk)
            try:
                passed = gate.feed(chunk)
            except EventTooLong:
                return EVENT_TOO_LONG
            self._attendant.heard(self, piece=gate.events > seen)
            seen = gate.events
            if gate.over:
                self._let_go()
            if passed:
                await self._write(response, passed)
            if received > self._policy.answer_bytes:
                return ANSWER_TOO_LONG
        self._let_go()
        if (missing := gate.end()) is not None:
            if missing:
                await self._write(response, missing)
            return None
        return self._stopped or await self._why_it_ended()

    async def _why_it_ended(self) -> Fault:
        """An engine that died is held against the request; one that broke off and lives is not."""
        return ENGINE_DIED if await self._attendant.is_gone(self.serving) else STREAM_INCOMPLETE

    async def _hand_on_bytes(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """An answer in one piece, or the engine's own refusal."""
        response = self._response(answer)
        response.content_length = answer.content_length
        try:
            with self._stoppable() as scope:
                async with scope:
                    await response.prepare(self._request)
                    while chunk := await answer.content.readany():
                        self._attendant.heard(self, piece=True)
                        if answer.content.at_eof():
                            self._let_go()
                        await self._write(response, chunk)
        except (aiohttp.ClientError, TimeoutError):
            self.cut()  # too late for a status, and no place for an error
            return response
        self._let_go()
        await self._within_reason(response.write_eof())
        return response

    def _let_go(self) -> None:
        """The engine has done its part. Its slot is free before the client can know that the answer is whole,
        and ask for the next."""
        self.abandoned = False
        self._attendant.done(self)

    def _response(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = {name: answer.headers[name] for name in _ANSWER_HEADERS if name in answer.headers}
        return web.StreamResponse(status=answer.status, headers=headers)

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        """Raises `ConnectionError` for a client that is gone, or takes nothing any more."""
        transport = self._request.transport
        idle = transport is not None and transport.get_write_buffer_size() == 0
        if idle and len(data) <= _NEVER_PAUSED_BYTES:  # nearly always: there is nothing to wait for
            await response.write(data)
            return
        self._attendant.held(self)
        try:
            await self._within_reason(response.write(data))
        finally:
            self._attendant.resumed(self)

    async def _within_reason(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(self._policy.write_seconds):
                await writing
        except TimeoutError:
            self.cut()
            raise ConnectionResetError("the client takes nothing any more") from None
