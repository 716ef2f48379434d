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
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from balancer.continuation import Kept, Seam, marker
from balancer.core.errors import Rejected
from balancer.core.model import Ended, Endpoint, Measures, ModelName, Probe, Verdict, Worker
from balancer.core.retry import Cause
from balancer.dialects.framing import EventFrames, FramingError, event
from balancer.dialects.openai import (
    DONE,
    AnswerError,
    Assembly,
    Request,
    StreamReader,
    Usage,
    parse_whole,
    read_complaint,
    trial,
)
from balancer.dialects.passing import Passage
from balancer.upstream import (
    Address,
    Broke,
    Exchange,
    Head,
    Silent,
    Stale,
    Unreachable,
    Upstream,
    UpstreamError,
)
from balancer.worker_types import WORKER_TYPES
from worker_agent.wire import CONTINUE_HEADER

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""An answer in one piece: a thousand embeddings of 4096 numbers, written out, are about this."""
MAX_ERROR_BYTES = 64 * 1024

LONGEST_HOLD_SECONDS = 60.0
"""A worker may ask to be left alone for so long; asked for more, we look in earlier."""

PROBE_SECONDS = 30.0
"""A worker that needs longer for a word is not well."""

KNOCK_SECONDS = 1.0
"""In which a worker whose connection broke has to take another, to count as alive."""

_AGENTS_WORDS: Mapping[str, Cause] = {
    "engine_died": Cause.CRASHED,
    "engine_unreachable": Cause.CRASHED,
    "engine_wedged": Cause.SILENT,
    "engine_not_ready": Cause.BUSY,
    "stopping": Cause.BUSY,
    "cannot_continue": Cause.CANNOT_CONTINUE,
}
"""What an agent's error codes say about the attempt."""


class Delivery(Protocol):
    """Where a streamed answer goes. Nothing here waits."""

    def send(self, data: bytes) -> None:
        """A piece of the answer."""
        ...

    def comes_from(self, exchange: Exchange | None, /) -> None:
        """Whom to hold up while the client reads slower than its worker writes; None: nobody."""
        ...


@dataclass(slots=True)
class Stream:
    """A streamed answer on its way, over however many attempts."""

    delivery: Delivery
    kept: Kept | None = None
    """What has come, for going on elsewhere; None: this answer could not."""
    seam: Seam | None = None
    """Set when it is to be gone on with."""
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
    gone: bool = False
    """Nobody takes connections there any more."""


class Failed(Exception):
    """An attempt did not lead to a whole answer."""

    def __init__(self, cause: Cause, detail: str, words: str = "") -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail
        self.words = words
        self.rejected: Rejected | None = None
        self.hold_seconds: float | None = None


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


class Relay:
    def __init__(
        self,
        upstream: Upstream,
        clock: Callable[[], float],
        headers: Callable[[Worker], Mapping[str, str]],
    ) -> None:
        """`headers`: what a worker's configuration adds to each request (its API key)."""
        self._upstream = upstream
        self._clock = clock
        self._headers = headers
        self._heads: dict[tuple[Worker, Endpoint, bool], tuple[Address, bytes]] = {}

    async def attempt(
        self,
        worker: Worker,
        model: ModelName,
        request: Request,
        passed_on: Mapping[str, str],
        stream: Stream | None,
        progress: Progress,
    ) -> Outcome:
        """Never raises for what a worker does. `model`: as the worker calls it. `passed_on`: headers that go
        from the client's request to the worker's. `stream`: for a client that streams; else the answer
        comes with the outcome."""
        try:
            answer = await self._exchange(worker, model, request, passed_on, stream, progress)
        except Failed as failed:
            cause, gone = failed.cause, False
            if cause is Cause.BROKE and not WORKER_TYPES[worker.type].tells_of_crashes:
                # What broke the connection may have been the end of the engine itself.
                gone = not await self._upstream.listens(Address.of(worker.url), KNOCK_SECONDS)
                cause = Cause.CRASHED if gone else cause
            return Outcome(
                cause=cause,
                detail=failed.detail,
                rejected=failed.rejected,
                words=failed.words,
                hold_seconds=failed.hold_seconds,
                gone=gone,
            )
        return Outcome(cause=None, answer=answer)

    async def probe(self, probe: Probe) -> Ended:
        """Have a worker generate something that nobody asked for; says how it went."""
        request = trial(probe.endpoint, probe.model, _trial_text(probe.prompt_tokens), probe.output_tokens)
        progress = Progress(self._clock())
        outcome = Outcome(cause=Cause.SILENT)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                outcome = await self.attempt(probe.worker, probe.model, request, {}, None, progress)
        except TimeoutError:
            pass  # as silent as it was taken to be
        # A worker that says what is wrong with a request is well; one that is new and slow is not broken.
        verdict = Verdict.GOOD if outcome.cause in (None, Cause.REJECTED) else Verdict.BAD
        if probe.measures and outcome.cause not in (None, Cause.UNREACHABLE):
            verdict = Verdict.UNKNOWN
        return Ended(
            probe.ticket,
            verdict,
            progress.measures(self._clock()),
            unreachable=outcome.cause is Cause.UNREACHABLE,
            hold_seconds=outcome.hold_seconds,
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
        kind = WORKER_TYPES[worker.type]
        streams = request.endpoint is not Endpoint.EMBEDDINGS and (request.stream or kind.streams_always)
        body = request.to_worker(model, stream=streams)
        address, fixed = self._head(worker, request.endpoint, streams)
        head = fixed + b"".join(_header(name, value) for name, value in passed_on.items())
        if stream is not None and stream.seam is not None:
            head += _header(CONTINUE_HEADER, "1")
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        fresh = False
        while True:
            listener = _Listener(
                request, stream, progress, self._clock, self._upstream.policy.read_seconds, streams
            )
            try:
                exchange = await self._upstream.post(address, head, body, listener, fresh=fresh)
            except Unreachable as error:
                raise Failed(Cause.UNREACHABLE, str(error)) from error
            try:
                return await listener.answer(exchange)
            except Stale as error:
                if fresh:
                    raise Failed(Cause.BROKE, str(error)) from error
                fresh = True

    def _head(self, worker: Worker, endpoint: Endpoint, streams: bool) -> tuple[Address, bytes]:
        """Where a request of this kind goes, and the beginning of its head."""
        key = worker, endpoint, streams
        known = self._heads.get(key)
        if known is None:
            if len(self._heads) > 4096:  # workers come and go
                self._heads.clear()
            address = Address.of(worker.url)
            host = f"[{address.host}]" if ":" in address.host else address.host
            headers = {
                "Host": f"{host}:{address.port}",
                **self._headers(worker),
                "Content-Type": "application/json",
                "Accept": "text/event-stream" if streams else "application/json",
                "Accept-Encoding": "identity",  # what comes is read as it is
            }
            lines = b"".join(_header(name, value) for name, value in headers.items())
            known = self._heads[key] = address, f"POST {endpoint.value} HTTP/1.1\r\n".encode() + lines
        return known


class _Listener:
    """Hears one answer, and hands it on."""

    def __init__(
        self,
        request: Request,
        stream: Stream | None,
        progress: Progress,
        clock: Callable[[], float],
        read_seconds: float,
        streams: bool,
    ) -> None:
        self._request = request
        self._stream = stream
        self._progress = progress
        self._clock = clock
        self._read_seconds = read_seconds
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[bytes | None] = self._loop.create_future()
        self._exchange: Exchange | None = None
        self._take: Callable[[bytes], None] = self._to_buffer
        self._buffer = bytearray()
        self._limit = MAX_ANSWER_BYTES
        self._complains: Head | None = None
        self._reader: StreamReader | None = None
        self._passage: Passage | None = None
        self._frames: EventFrames | None = None
        self._assembly: Assembly | None = None
        self._heard = 0.0
        self._patience: asyncio.TimerHandle | None = None

    async def answer(self, exchange: Exchange) -> bytes | None:
        """The answer in one piece; None: it was streamed. Raises `Failed` and `Stale`. Cancelled, it ends the
        exchange at once."""
        self._exchange = exchange
        delivery = self._stream.delivery if self._stream is not None else None
        if delivery is not None:
            delivery.comes_from(exchange)
        try:
            answer = await self._done
        except BaseException:
            exchange.abort()
            raise
        finally:
            if self._patience is not None:
                self._patience.cancel()
            if delivery is not None:
                delivery.comes_from(None)
        exchange.leave()
        return answer

    # What comes

    def head(self, head: Head) -> None:
        if head.status != 200:
            self._complains = head
            self._limit = MAX_ERROR_BYTES
        elif self._streams and head.content_type == "text/event-stream":
            self._open()

    def _open(self) -> None:
        request, stream = self._request, self._stream
        if stream is None:
            self._reader = StreamReader(request.model, usage_wanted=True, choices=request.choices)
            self._frames = EventFrames()
            self._assembly = Assembly(request.endpoint, request.model)
            self._take = self._to_assembly
        else:
            seam = stream.seam
            wanted = request.usage_wanted
            self._reader = StreamReader(request.model, wanted, request.choices)
            self._passage = Passage(self._reader, seam.read if seam is not None else None)
            self._take = self._to_client

    def body(self, data: bytes) -> None:
        if self._done.done():
            return
        try:
            self._take(data)
        except Exception as error:
            self._fail(_as_failure(error))

    def end(self) -> None:
        if self._done.done():
            return
        try:
            self._at_end()
        except Exception as error:
            self._fail(_as_failure(error))

    def failed(self, error: UpstreamError) -> None:
        if self._done.done():
            return
        if isinstance(error, Stale):
            self._done.set_exception(error)
        else:
            self._fail(Failed(Cause.BROKE, str(error)))

    # ... and where it goes

    def _to_buffer(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > self._limit:
            raise AnswerError(f"an answer of more than {self._limit} bytes")

    def _to_client(self, data: bytes) -> None:
        passage = self._passage
        assert passage is not None
        self._pass_on(passage.feed(data))
        if passage.reader.done or self._seam_ended():
            self._finish()

    def _pass_on(self, data: bytes) -> None:
        stream, reader = self._stream, self._reader
        assert stream is not None and reader is not None
        if not reader.begun:
            return
        progress = self._progress
        progress.tokens = reader.tokens
        self._heard = now = self._clock()
        if progress.first_byte is None:
            if not progress.first(now):
                raise Failed(Cause.OUTRUN, "another worker answered first")
            self._watch(now)
            if stream.seam is not None:
                data = marker() + data
        if data:
            stream.begun = True
            stream.delivery.send(data)
            if stream.kept is not None and stream.seam is None:
                stream.kept.add(data)

    def _to_assembly(self, data: bytes) -> None:
        frames, reader, assembly = self._frames, self._reader, self._assembly
        assert frames is not None and reader is not None and assembly is not None
        self._take_in(frames.feed(data), reader, assembly)
        self._limit -= len(data)
        if self._limit < 0:
            raise AnswerError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if reader.done:
            self._finish()

    def _take_in(self, events: list[bytes], reader: StreamReader, assembly: Assembly) -> None:
        for data in events:
            if reader.done:
                break
            if (chunk := reader.read_chunk(data)) is not None:
                assembly.add(chunk)
        if reader.begun:
            self._progress.tokens = reader.tokens
            self._heard = now = self._clock()
            if self._progress.first_byte is None:
                self._progress.first(now)
                self._watch(now)

    # Ends

    def _at_end(self) -> None:
        if self._passage is not None:
            self._pass_on(self._passage.end())
            self._finish()
        elif self._frames is not None and self._reader is not None and self._assembly is not None:
            self._take_in(self._frames.end(), self._reader, self._assembly)
            self._finish()
        elif self._complains is not None:
            raise _complaint(self._complains, bytes(self._buffer))
        else:
            self._whole()

    def _whole(self) -> None:
        """An answer that came in one piece."""
        request, progress = self._request, self._progress
        answer, progress.usage = parse_whole(bytes(self._buffer), request.model)
        if self._stream is not None:
            raise AnswerError("it was asked for a stream and answered in one piece")
        if request.endpoint is Endpoint.EMBEDDINGS:  # of a text in one piece, nobody saw the first token
            progress.first(self._clock())
        progress.tokens = progress.usage.output_tokens or 0
        self._done.set_result(orjson.dumps(answer))

    def _seam_ended(self) -> bool:
        stream = self._stream
        return stream is not None and stream.seam is not None and stream.seam.ended

    def _finish(self) -> None:
        """The stream is at its end, by its own word or by HTTP's; a closed connection is none (D1)."""
        reader = self._reader
        assert reader is not None
        self._progress.usage = reader.usage
        if not reader.is_whole and not self._seam_ended():
            raise Failed(Cause.BROKE, "its stream ended before the answer did")
        if self._stream is not None:
            self._stream.delivery.send(event(DONE))
            self._done.set_result(None)
        elif self._assembly is not None:
            self._done.set_result(orjson.dumps(self._assembly.result()))

    def _fail(self, failure: Failed) -> None:
        if not self._done.done():
            if self._reader is not None:
                self._progress.usage = self._reader.usage
            self._done.set_exception(failure)
            if self._exchange is not None:
                self._exchange.abort()

    # Silence, once the answer has begun

    def _watch(self, now: float) -> None:
        self._patience = self._loop.call_at(now + self._read_seconds, self._look)

    def _look(self) -> None:
        now = self._clock()
        if self._exchange is not None and self._exchange.paused:
            self._heard = now  # the reader's own time does not count as the worker's
        if now - self._heard >= self._read_seconds:
            self._fail(Failed(Cause.SILENT, str(Silent(f"nothing came for {self._read_seconds:g} s"))))
        else:
            self._watch(self._heard)


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


def _complaint(head: Head, body: bytes) -> Failed:
    """What a status other than 200 means: for the client to mend, for us to wait, or a broken worker."""
    complaint = read_complaint(body)
    detail = f"it answered with status {head.status}"
    cause = _AGENTS_WORDS.get(complaint.code or "")
    if cause is not None and head.status != 503:
        return Failed(cause, detail, complaint.message)
    if head.status in (429, 503):
        failed = Failed(Cause.BUSY, detail, complaint.message)
        if head.retry_after is not None:
            failed.hold_seconds = min(head.retry_after, LONGEST_HOLD_SECONDS)
        return failed
    if head.status in (400, 413, 422):
        failed = Failed(Cause.REJECTED, detail, complaint.message)
        failed.rejected = Rejected(
            head.status, complaint.message, code=complaint.code, param=complaint.param
        )
        return failed
    # 401, 403 and 404 too: the worker's key or model is not as configured, which is not the client's doing.
    return Failed(Cause.ERRED, detail, complaint.message)
