"""One attempt: send a request to a worker, hand its answer on, say how it went.

Chat and completions are streamed from the worker also for clients that do not stream: only a stream can be
stopped at once when the client leaves (llama.cpp computes a whole answer to its end, ENGINES 8), and only
a stream shows whether the answer is whole.

A stream's bytes are handed on from the event loop's own callbacks, piece by piece as they come; what awaits
an attempt is woken once, at its end.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import orjson

from balancer.continuation import Kept, Seam, marker
from balancer.core.errors import BadRequest, Rejected
from balancer.core.model import Ended, Endpoint, Loading, Measures, ModelName, Probe, Verdict, Worker
from balancer.core.retry import Cause
from balancer.dialects.framing import EventFrames, FramingError, event
from balancer.dialects.openai import (
    DONE,
    AnswerError,
    Assembly,
    Request,
    StreamReader,
    Usage,
    WorkerComplaint,
    parse_whole,
    read_complaint,
    trial,
)
from balancer.dialects.passing import Passage
from balancer.patience import SECOND_CHANCE_SECONDS, TOLERATED_LAG_SECONDS
from balancer.prefills import Prefills, Unanswered
from balancer.upstream import (
    Address,
    Exchange,
    Head,
    OutOfFiles,
    Stale,
    Unreachable,
    Upstream,
    UpstreamError,
    Way,
)
from balancer.worker_types import USER_AGENT, Translator, WorkerType, row_of, without_key
from worker_agent.wire import CONTINUE_HEADER, SESSION_UNKNOWN, WAIT_HEADER

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""An answer in one piece: a thousand embeddings of 4096 numbers, written out, are about this."""
MAX_ERROR_BYTES = 64 * 1024

LARGE_BODY_BYTES = 1024 * 1024
"""To put so long a request into other words takes about 10 ms."""

LONGEST_HOLD_SECONDS = 60.0
"""A worker may ask to be left alone for so long; asked for more, we look in earlier."""

PROBE_SECONDS = 30.0
"""A worker that needs longer for a word is not well."""

ERROR_BODY_SECONDS = 5.0
"""For what a worker says beside the status of an error; then the status alone counts."""

KNOCK_SECONDS = 0.2
"""In which a machine says that nobody takes connections there, after one broke; the retry waits for it."""

_AGENTS_WORDS: Mapping[str, Cause] = {
    "engine_died": Cause.CRASHED,
    "engine_unreachable": Cause.ERRED,
    "stream_incomplete": Cause.BROKE,
    "engine_wedged": Cause.SILENT,
    "engine_not_ready": Cause.BUSY,
    "stopping": Cause.BUSY,
    "cannot_continue": Cause.CANNOT_CONTINUE,
}
"""What an agent's error codes say about the attempt."""

_OF_ONE_MODEL = frozenset({"model_does_not_fit", "model_failed"})
"""What an agent says of a model that it cannot load as things are; its reports say the same."""
_OVERLOADED = frozenset({"overloaded_error", "rate_limit_error"})
"""Errors of a remote API, within an answer, that say that it has no room."""
_WITHOUT_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""Said with a status that is for too many requests, and not over in a moment."""
_KEY_IS_WRONG = re.compile(
    r"(?:incorrect|invalid|missing|expired) api[ _-]?key|api[ _-]?key (?:not|is|has)\b", re.I
)
"""How a message begins where an API says so with the status of a wrong request (xAI's, Google's)."""
_CODE = re.compile(r"[\w.:\[\]-]{1,64}", re.ASCII)
"""What a worker's code for an error may be: it reaches logs and metrics."""


class Delivery(Protocol):
    """Where a streamed answer goes. Nothing here waits."""

    def send(self, data: bytes) -> None:
        """A piece of the answer."""
        ...

    def comes_from(self, exchange: Exchange, /) -> None:
        """Whom to hold up while the client reads slower than its worker writes, from now on."""
        ...

    def let_go(self, exchange: Exchange, /) -> None:
        """It is over; its connection may serve others."""
        ...


@dataclass(slots=True)
class Stream:
    """A streamed answer on its way, over however many attempts."""

    delivery: Delivery
    kept: Kept | None = None
    """What has come, for going on elsewhere; None: this answer could not."""
    seam: Seam | None = None
    """Set when it is to be gone on with."""
    prefilled: bool = False
    """Its request ends with what has come; else there was nothing worth it."""
    continued: int = 0
    """How often it has gone on elsewhere."""
    begun: bool = False
    """Something of the answer was sent: it cannot start over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt went."""

    cause: Cause | None
    """None: the answer is whole."""
    detail: str = ""
    """What happened, without anything of prompt or answer."""
    answer: bytes | None = None
    """The answer in one piece, when it was not delivered as a stream."""
    rejected: Rejected | None = None
    """With cause REJECTED: what to tell the client."""
    words: str = ""
    """The worker's own. They may quote the request: for its client, not for a log."""
    hold_seconds: float | None = None
    loading: Loading | None = None
    """With cause LOADING: how far it is."""
    gone: bool = False
    """Nobody takes connections there any more."""
    told: bool = False
    """It is the word of the worker's agent."""


class Failed(Exception):
    """An attempt did not lead to a whole answer."""

    def __init__(self, cause: Cause, detail: str, words: str = "") -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail
        self.words = words
        self.rejected: Rejected | None = None
        self.hold_seconds: float | None = None
        self.progress: float | None = None
        self.eta_seconds: float | None = None
        """Of a model that is being loaded."""
        self.is_of_key = False
        """The worker does not take who asks: what it says of that may show a part of the key."""
        self.is_stranger = False
        """The agent does not know our session, and has looked at nothing of the request."""


@dataclass(slots=True)
class Progress:
    """How far an attempt has come; whoever interrupts it finds here what was measured until then."""

    began: float
    on_first: Callable[[], bool] = lambda: True
    """Called once, when the first token has come. False: another attempt was faster, this one is over."""
    first_byte: float | None = None
    tokens: int = 0
    """Of the answer until now."""
    usage: Usage = field(default_factory=Usage)
    exchange: Exchange | None = None

    @property
    def held(self) -> bool:
        """Nothing comes since nothing is read: the client reads more slowly than the worker writes."""
        return self.exchange is not None and self.exchange.paused

    def first(self, now: float) -> bool:
        """A token has come; only the first matters. False: this attempt is over."""
        if self.first_byte is None:
            self.first_byte = now - self.began
            return self.on_first()
        return True

    def measures(self, now: float) -> Measures:
        return Measures(
            seconds=now - self.began,
            first_byte=self.first_byte,
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.usage.cached_tokens,
            output_tokens=self.usage.output_tokens,
        )


class _KnownHead(NamedTuple):
    fixed: bytes
    """The beginning of the head."""
    way: Way
    """From which it was made."""


class Relay:
    def __init__(
        self,
        upstream: Upstream,
        clock: Callable[[], float],
        way_to: Callable[[Worker], Way | None],
        meet: Callable[[Worker, Way | None], Awaitable[Way]],
    ) -> None:
        """`way_to`: how a worker is reached, with what goes along with each request (its API key, an agent's
        session); None: an agent that was not met. `meet` finds that out, also where the agent does not know
        the way's session any more; it raises `Unreachable`."""
        self._upstream = upstream
        self._clock = clock
        self._way_to = way_to
        self._meet = meet
        self._prefills = Prefills(self._answer_of, clock)
        self._heads: dict[tuple[Worker, Endpoint, bool, ModelName | None], _KnownHead] = {}

    async def attempt(
        self,
        worker: Worker,
        model: ModelName,
        request: Request,
        passed_on: Mapping[str, str],
        stream: Stream | None,
        progress: Progress,
        wait_seconds: float | None = None,
    ) -> Outcome:
        """Never raises for what a worker does. `model`: as the worker calls it. `passed_on`: headers that go
        from the client's request to the worker's. `stream`: for a client that streams; else the answer
        comes with the outcome. `wait_seconds`: for how long an agent may have it wait for the model to be
        loaded; None: as long as it likes."""
        if wait_seconds is not None and row_of(worker).is_agent:
            passed_on = {**passed_on, WAIT_HEADER: f"{max(wait_seconds, 0.0):.3f}"}
        try:
            answer = await self._exchange(worker, model, request, passed_on, stream, progress)
        except Failed as failed:
            cause, gone, kind = failed.cause, False, row_of(worker)
            if cause is Cause.BROKE and not (kind.is_agent or kind.is_remote):
                # What broke the connection may have been the end of the engine itself.
                gone = not await self._upstream.listens(_address(worker), KNOCK_SECONDS)
                cause = Cause.CRASHED if gone else cause
            return Outcome(
                cause=cause,
                detail=failed.detail,
                rejected=self._without_key(worker, failed.rejected),
                words="" if kind.is_remote else self._words_of(worker, failed),
                hold_seconds=failed.hold_seconds,
                loading=Loading(worker.id, failed.progress, failed.eta_seconds)
                if cause is Cause.LOADING
                else None,
                gone=gone,
                told=kind.is_agent,
            )
        return Outcome(cause=None, answer=answer)

    def _words_of(self, worker: Worker, failed: Failed) -> str:
        if failed.is_of_key and self._secrets(worker):
            return ""
        return self._hidden(worker, failed.words) or ""

    def _without_key(self, worker: Worker, rejected: Rejected | None) -> Rejected | None:
        if rejected is None:
            return None
        message = self._hidden(worker, rejected.message) or ""
        code, param = self._hidden(worker, rejected.code), self._hidden(worker, rejected.param)
        return Rejected(rejected.status, message, code=code, param=param)

    def _hidden(self, worker: Worker, text: str | None) -> str | None:
        return None if text is None else without_key(text, self._secrets(worker))

    def _secrets(self, worker: Worker) -> Mapping[str, str]:
        """Headers that nobody else shall see."""
        way = self._way_to(worker)
        return {} if way is None else way.headers

    async def probe(self, probe: Probe) -> Ended:
        """Have a worker generate something that nobody asked for; says how it went."""
        request = trial(probe.endpoint, probe.model, _trial_text(probe.prompt_tokens), probe.output_tokens)
        progress = Progress(self._clock())
        outcome = Outcome(cause=Cause.SILENT)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                outcome = await self.attempt(
                    probe.worker, probe.model, request, {}, None, progress, wait_seconds=PROBE_SECONDS / 2
                )
        except TimeoutError:
            pass  # as silent as it was taken to be
        # A worker that says what is wrong with a request is well; one that is new and slow is not broken.
        verdict = Verdict.GOOD if outcome.cause in (None, Cause.REJECTED) else Verdict.BAD
        if outcome.cause is Cause.LOADING:
            verdict = Verdict.UNKNOWN
        if probe.measures and outcome.cause not in (None, Cause.UNREACHABLE):
            verdict = Verdict.UNKNOWN
        return Ended(
            probe.ticket,
            verdict,
            progress.measures(self._clock()),
            unreachable=outcome.cause is Cause.UNREACHABLE,
            hold_seconds=outcome.hold_seconds,
            loading=outcome.loading,
        )

    async def _exchange(
        self,
        worker: Worker,
        model: ModelName,
        request: Request,
        passed_on: Mapping[str, str],
        stream: Stream | None,
        progress: Progress,
    ) -> bytes | None:
        kind = row_of(worker)
        goes_on = stream is not None and stream.prefilled and request.endpoint is Endpoint.CHAT
        if goes_on and not kind.is_agent:
            request = await self._going_on(worker, model, request)
        streams = request.endpoint is not Endpoint.EMBEDDINGS and (request.stream or kind.streams_always)
        if kind.body is None:
            body = request.to_worker(model, stream=streams)
        else:
            body = await _translated(kind.body, worker, request, model, streams)
        rest = b""
        if not kind.is_remote:  # what is told of the room is for the room
            rest += b"".join(_header(name, value) for name, value in passed_on.items())
        if goes_on and kind.is_agent:
            rest += _header(CONTINUE_HEADER, "1")
        rest += b"Content-Length: %d\r\n\r\n" % len(body)
        way = self._way_to(worker) or await self._met(worker, None)
        fresh = met_again = False
        while True:
            head = self._head(worker, way, request.endpoint, streams, model) + rest
            listener = _Listener(
                request,
                stream,
                progress,
                self._clock,
                self._upstream.policy.read_seconds,
                kind,
                streams=streams,
            )
            try:
                exchange = await self._upstream.send(way.address, head, body, listener, fresh=fresh)
            except OutOfFiles as error:
                raise Failed(Cause.BUSY, str(error)) from error
            except Unreachable as error:
                # Of a worker that hung up on the request a moment ago it is the end of an engine.
                raise Failed(Cause.BROKE if fresh else Cause.UNREACHABLE, str(error)) from error
            try:
                return await listener.answer(exchange)
            except Stale as error:
                if fresh:
                    raise Failed(Cause.BROKE, str(error)) from error
                fresh = True
            except Failed as failed:
                if not failed.is_stranger or met_again:
                    raise
                way, met_again, fresh = await self._met(worker, way), True, False

    async def _met(self, worker: Worker, refused: Way | None) -> Way:
        try:
            return await self._meet(worker, refused)
        except Unreachable as error:
            raise Failed(Cause.UNREACHABLE, str(error)) from error

    async def _going_on(self, worker: Worker, model: ModelName, request: Request) -> Request:
        """The request in the words of a worker without an agent. Raises `Failed` if it has none for it."""
        way = await self._prefills.way(worker, model)
        if way is None:
            raise Failed(Cause.CANNOT_CONTINUE, "it does not go on with an answer that another began")
        return request.with_fields(way)

    async def _answer_of(self, worker: Worker, model: ModelName, request: Request) -> bytes | None:
        outcome = await self.attempt(worker, model, request, {}, None, Progress(self._clock()))
        if outcome.cause not in (None, Cause.REJECTED):
            raise Unanswered
        return outcome.answer

    def _head(self, worker: Worker, way: Way, endpoint: Endpoint, streams: bool, model: ModelName) -> bytes:
        """The beginning of the head of a request of this kind."""
        # Only Azure's dated APIs have a path for each model.
        key = worker, endpoint, streams, None if worker.api_version is None else model
        known = self._heads.get(key)
        if known is None or (known.way is not way and known.way != way):
            if len(self._heads) > 4096:  # workers come and go
                self._heads.clear()
            kind = row_of(worker)
            headers = {
                "Host": way.address.authority,
                **way.headers,
                "Content-Type": "application/json",
                "Accept": "text/event-stream" if streams else "application/json",
                "Accept-Encoding": "identity",  # what comes is read as it is
            }
            if kind.is_remote:
                headers["User-Agent"] = USER_AGENT
            lines = b"".join(_header(name, value) for name, value in headers.items())
            path = kind.place(worker, endpoint.value, model)
            known = _KnownHead(f"POST {path} HTTP/1.1\r\n".encode() + lines, way)
            self._heads[key] = known
        return known.fixed


def _address(worker: Worker) -> Address:
    return Address.of(worker.url, worker.ca_file)


async def _translated(
    body: Callable[[Worker, Request, ModelName, bool], bytes],
    worker: Worker,
    request: Request,
    model: ModelName,
    streams: bool,
) -> bytes:
    """The body for another API. Raises `Failed` for a request that cannot be asked there: as with what a
    worker cannot go on with, another one may be able to; if none is, its client is told."""
    try:
        if len(request.body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(body, worker, request, model, streams)
        return body(worker, request, model, streams)
    except BadRequest as error:
        failed = Failed(Cause.CANNOT_CONTINUE, "it cannot be asked that")
        failed.rejected = Rejected(error.status, error.message, code=error.code, param=error.param)
        raise failed from error


class _Taker(Protocol):
    """What is made of the body of an answer."""

    @property
    def reader(self) -> StreamReader | None:
        """Of a stream."""
        ...

    def take(self, data: bytes) -> bool:
        """True: the answer is whole. Raises for what is none."""
        ...

    def result(self) -> bytes | None:
        """At the end of the body: the answer in one piece; None: it was handed on. Raises if it is not
        whole."""
        ...


class _InOnePiece:
    """An error, or an answer that is no stream."""

    reader = None

    def __init__(
        self, head: Head, request: Request, progress: Progress, kind: WorkerType, *, to_stream: bool
    ) -> None:
        """`to_stream`: its client streams."""
        self._head = head
        self._kind = kind
        self._request = request
        self._progress = progress
        self._to_stream = to_stream
        self._body = bytearray()
        self._limit = MAX_ANSWER_BYTES if head.status == 200 else MAX_ERROR_BYTES

    def take(self, data: bytes) -> bool:
        self._body += data
        if len(self._body) > self._limit:
            raise AnswerError(f"an answer of more than {self._limit} bytes")
        return False

    def result(self) -> bytes | None:
        if self._head.status != 200:
            raise _complaint(self._head, bytes(self._body), self._kind)
        answer, self._progress.usage = parse_whole(bytes(self._body), self._request.model)
        if self._to_stream:
            raise AnswerError("it was asked for a stream and answered in one piece")
        self._progress.tokens = self._progress.usage.output_tokens or 0
        return _written(answer)


class _Assembled:
    """A stream for a client that wants the answer in one piece."""

    def __init__(self, request: Request) -> None:
        self.reader = StreamReader(request.model, usage_wanted=True, choices=request.choices)
        self._frames = EventFrames()
        self._assembly = Assembly(request.endpoint, request.model)
        self._left = MAX_ANSWER_BYTES

    def take(self, data: bytes) -> bool:
        self._left -= len(data)
        if self._left < 0:
            raise AnswerError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        self._add(self._frames.feed(data))
        return self.reader.done

    def _add(self, events: list[bytes]) -> None:
        for event_data in events:
            if self.reader.done:
                break
            if (chunk := self.reader.read_chunk(event_data)) is not None:
                self._assembly.add(chunk)

    def result(self) -> bytes | None:
        self._add(self._frames.end())
        _insist_on_end(self.reader)
        return _written(self._assembly.result())


class _HandedOn:
    """A stream for a client that streams."""

    def __init__(self, request: Request, stream: Stream, begins: Callable[[], bool]) -> None:
        """`begins`: told of the first piece before it is sent; False: somebody else was faster."""
        seam = stream.seam
        self._begins = begins
        self._begun = False
        self.reader = StreamReader(request.model, request.usage_wanted, request.choices)
        self._passage = Passage(self.reader, seam.read if seam is not None else None)
        self._stream = stream
        self._seam = seam

    def take(self, data: bytes) -> bool:
        self._send(self._passage.feed(data))
        return self.reader.done or (self._seam is not None and self._seam.ended)

    def _send(self, data: bytes) -> None:
        if data:
            stream = self._stream
            if not self._begun:
                if not self._begins():
                    raise Failed(Cause.OUTRUN, "another worker answered first")
                self._begun = stream.begun = True
                if self._seam is not None:
                    stream.continued += 1
                    data = marker() + data
            stream.delivery.send(data)
            if self._seam is None and stream.kept is not None:
                stream.kept.add(data)
        if self._passage.fault is not None:
            raise self._passage.fault

    def result(self) -> bytes | None:
        self._send(self._passage.end())
        if self._seam is None or not self._seam.ended:
            _insist_on_end(self.reader)
        self._stream.delivery.send(event(DONE))
        return None


class _Translated:
    """An answer in the words of another API."""

    def __init__(self, taker: _Taker, translator: Translator) -> None:
        self._taker = taker
        self._translator = translator

    @property
    def reader(self) -> StreamReader | None:
        return self._taker.reader

    def take(self, data: bytes) -> bool:
        return self._given(self._translator.feed(data))

    def _given(self, data: bytes) -> bool:
        try:
            whole = self._taker.take(data) if data else False
        except AnswerError as error:
            if error.code in _OVERLOADED:
                raise Failed(Cause.BUSY, f"it answered with {error.code}") from error
            raise
        if self._translator.fault is not None:
            raise self._translator.fault
        return whole

    def result(self) -> bytes | None:
        self._given(self._translator.end())
        return self._taker.result()


def _written(answer: object) -> bytes:
    try:
        return orjson.dumps(answer)
    except orjson.JSONEncodeError:  # it reads deeper than it writes
        raise AnswerError("its answer is nested too deeply") from None


def _insist_on_end(reader: StreamReader) -> None:
    """Raises `Failed` where an answer ended without its protocol's end: a closed connection is none (D1)."""
    if not reader.is_whole:
        raise Failed(Cause.BROKE, "its stream ended before the answer did")


class _Listener:
    """Hears one answer."""

    def __init__(
        self,
        request: Request,
        stream: Stream | None,
        progress: Progress,
        clock: Callable[[], float],
        read_seconds: float,
        kind: WorkerType,
        *,
        streams: bool,
    ) -> None:
        self._request = request
        self._stream = stream
        self._progress = progress
        self._clock = clock
        self._read_seconds = read_seconds
        self._kind = kind
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[bytes | None] = self._loop.create_future()
        self._exchange: Exchange | None = None
        self._taker: _Taker | None = None
        self._heard = 0.0
        self._patience: asyncio.TimerHandle | None = None

    async def answer(self, exchange: Exchange) -> bytes | None:
        """The answer in one piece; None: it was handed on. Raises `Failed` and `Stale`. Cancelled, it ends
        the exchange at once."""
        self._exchange = self._progress.exchange = exchange
        try:
            answer = await self._done
        except BaseException:
            exchange.abort()
            raise
        finally:
            if self._patience is not None:
                self._patience.cancel()
            self._progress.exchange = None
            if self._stream is not None:
                self._stream.delivery.let_go(exchange)
        exchange.leave()
        return answer

    # What comes

    def head(self, head: Head) -> None:
        translated = self._kind.translated_events
        if head.status != 200:
            self._patience = self._loop.call_later(ERROR_BODY_SECONDS, self.end)
        if head.status != 200 or not self._streams or head.content_type != "text/event-stream":
            to_stream = self._stream is not None
            self._taker = _InOnePiece(head, self._request, self._progress, self._kind, to_stream=to_stream)
            translated = self._kind.translated_whole if head.status == 200 else None
        elif self._stream is None:
            self._taker = _Assembled(self._request)
        else:
            self._taker = _HandedOn(self._request, self._stream, self._begins)
        if translated is not None:
            self._taker = _Translated(self._taker, translated(int(datetime.now(UTC).timestamp())))

    def body(self, data: bytes) -> None:
        taker = self._taker
        if taker is None or self._done.done():
            return
        try:
            if taker.take(data):
                self._finish(taker)
            elif taker.reader is None:
                self._heard = self._clock()
                if self._patience is None:
                    self._watch()
            elif taker.reader.begun:
                self._heard_of(taker.reader)
        except Exception as error:
            self._fail(_as_failure(error))

    def end(self) -> None:
        if self._taker is None or self._done.done():
            return
        try:
            self._finish(self._taker)
        except Exception as error:
            self._fail(_as_failure(error))

    def failed(self, error: UpstreamError) -> None:
        if self._done.done():
            return
        if isinstance(error, Stale):
            self._done.set_exception(error)
        elif self._is_whole:
            self.end()  # however its connection ended
        else:
            self._fail(Failed(Cause.BROKE, str(error)))

    @property
    def _is_whole(self) -> bool:
        """All of the answer has come, if not all that HTTP wants after it."""
        taker = self._taker
        return taker is not None and taker.reader is not None and taker.reader.is_whole

    # What follows

    def _heard_of(self, reader: StreamReader) -> None:
        self._progress.tokens = reader.tokens
        self._heard = self._clock()
        if self._patience is None:
            self._begins()

    def _begins(self) -> bool:
        self._heard = self._clock()
        self._watch()
        if not self._progress.first(self._heard):
            return False
        if self._stream is not None and self._exchange is not None:
            self._stream.delivery.comes_from(self._exchange)
        return True

    def _finish(self, taker: _Taker) -> None:
        answer = taker.result()
        if taker.reader is not None:
            self._heard_of(taker.reader)
            self._progress.usage = taker.reader.usage
        elif self._request.endpoint is Endpoint.EMBEDDINGS:
            self._progress.first(self._clock())  # of a text in one piece, nobody saw the first token
        self._done.set_result(answer)

    def _fail(self, failure: Failed) -> None:
        if self._done.done():
            return
        if self._taker is not None and self._taker.reader is not None:
            self._progress.usage = self._taker.reader.usage
        self._done.set_exception(failure)
        if self._exchange is not None:
            self._exchange.abort()

    # Silence, once the answer has begun

    def _watch(self) -> None:
        self._patience = self._loop.call_at(self._heard + self._read_seconds, self._look)

    def _look(self) -> None:
        if self._clock() - (self._heard + self._read_seconds) > TOLERATED_LAG_SECONDS:
            self._heard = self._clock() - self._read_seconds + SECOND_CHANCE_SECONDS  # the loop stood still
        if self._exchange is not None and self._exchange.paused:
            self._heard = self._clock()  # the reader's own time does not count as the worker's
        if self._clock() - self._heard < self._read_seconds:
            self._watch()
        elif self._is_whole:
            self.end()
        else:
            self._fail(Failed(Cause.SILENT, f"nothing came for {self._read_seconds:g} s"))


def _as_failure(error: Exception) -> Failed:
    match error:
        case Failed():
            return error
        case AnswerError():
            cause = _AGENTS_WORDS.get(error.code or "", Cause.ERRED)
            return Failed(cause, error.detail, error.words)
        case FramingError():
            return Failed(Cause.ERRED, str(error))
    log.error("a defect of the balancer, in reading a worker's answer", exc_info=error)
    return Failed(Cause.ERRED, "the balancer failed to read its answer")


def _header(name: str, value: str) -> bytes:
    return f"{name}: {value}\r\n".encode("latin-1")


def _trial_text(tokens: int) -> str:
    """About so many tokens that no engine has read before: a cache cannot answer in its place."""
    return f"{secrets.token_hex(4)}{' word' * tokens}"


def _complaint(head: Head, body: bytes, kind: WorkerType) -> Failed:
    """What a status other than 200 means: for the client to mend, for us to wait, or a broken worker."""
    complaint = read_complaint(body)
    if kind.is_remote:
        return _remote_complaint(head, complaint)
    detail = f"it answered with status {head.status}"
    if head.status == 503 and complaint.code == "model_loading":
        failed = Failed(Cause.LOADING, detail, complaint.message)
        failed.progress = complaint.progress
        failed.eta_seconds = head.retry_after if complaint.eta_seconds is None else complaint.eta_seconds
        return failed
    if head.status == 503 and complaint.code in _OF_ONE_MODEL:
        return Failed(Cause.BUSY, detail, complaint.message)  # its other models can be asked for at once
    if kind.is_agent and head.status == 401 and complaint.code == SESSION_UNKNOWN:
        failed = Failed(Cause.UNREACHABLE, "it was started again, and is met anew")
        failed.is_stranger = True
        return failed
    cause = _AGENTS_WORDS.get(complaint.code or "")
    if cause is not None and head.status != 503:
        return Failed(cause, detail, complaint.message)
    if head.status in (429, 503):
        failed = Failed(Cause.BUSY, detail, complaint.message)
        if head.retry_after is not None:
            failed.hold_seconds = min(head.retry_after, LONGEST_HOLD_SECONDS)
        return failed
    if head.status in (400, 413, 422):
        return _rejected(head.status, detail, complaint)
    # 401, 403 and 404 too: the worker's key or model is not as configured, which is not the client's doing.
    failed = Failed(Cause.ERRED, detail, complaint.message)
    failed.is_of_key = head.status in (401, 403)
    return failed


def _rejected(status: int, detail: str, complaint: WorkerComplaint) -> Failed:
    failed = Failed(Cause.REJECTED, detail, complaint.message)
    failed.rejected = Rejected(
        status, complaint.message, code=_plain(complaint.code), param=_plain(complaint.param)
    )
    return failed


def _plain(word: str | None) -> str | None:
    return word if word is not None and _CODE.fullmatch(word) else None


def _remote_complaint(head: Head, complaint: WorkerComplaint) -> Failed:
    """The same of an API that others run."""
    detail = f"it answered with status {head.status}"
    is_of_key = complaint.code == "invalid_api_key" or _KEY_IS_WRONG.match(complaint.message) is not None
    if head.status in (400, 413, 422) and not is_of_key:
        return _rejected(head.status, detail, complaint)
    # No other words of it: they tell of the account, and some show a part of the key.
    if head.status in (401, 402) or is_of_key:
        return Failed(Cause.ERRED, f'{detail}: check its "api_key", and its account')
    if head.status in (429, 503, 529):
        failed = Failed(Cause.BUSY, detail)
        if complaint.code in _WITHOUT_CREDIT:
            failed.detail = f"{detail}: its account has no credit left"
            failed.hold_seconds = LONGEST_HOLD_SECONDS
        elif head.retry_after is not None:
            failed.hold_seconds = min(head.retry_after, LONGEST_HOLD_SECONDS)
        return failed
    return Failed(Cause.ERRED, detail)
