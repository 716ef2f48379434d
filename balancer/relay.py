"""One attempt: send a request to a worker, hand its answer on, say how it went.

Chat and completions are streamed from the worker also for clients that do not stream: only a stream can be
stopped at once when the client leaves (llama.cpp computes a whole answer to its end, ENGINES 8), and only
a stream shows whether the answer is whole.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import orjson

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
from balancer.upstream import Broke, Response, Silent, Unreachable, Upstream, UpstreamError
from balancer.worker_types import WORKER_TYPES

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""An answer in one piece: a thousand embeddings of 4096 numbers, written out, are about this."""
MAX_ERROR_BYTES = 64 * 1024
MAX_UNBEGUN_BYTES = 1024 * 1024
"""So much of a stream may pass without a word of the answer before the worker is taken to be broken."""

LONGEST_HOLD_SECONDS = 60.0
"""A worker may ask to be left alone for so long; asked for more, we look in earlier."""

PROBE_SECONDS = 30.0
"""A worker that needs longer for a word is not well."""


class Delivery(Protocol):
    """Where a streamed answer goes."""

    @property
    def begun(self) -> bool:
        """Something was sent: from here on the request cannot start over."""
        ...

    async def send(self, worker: Worker, data: bytes) -> None:
        """Hand on a piece of the answer; waits while the client reads slower than the worker writes."""
        ...


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
    on_first: Callable[[], None] = lambda: None
    """Called once, when the first token has come."""
    first_byte: float | None = None
    tokens: int = 0
    """Of the answer until now."""
    usage: Usage = field(default_factory=Usage)

    def first(self, now: float) -> None:
        """A token has come; only the first matters."""
        if self.first_byte is None:
            self.first_byte = now - self.began
            self.on_first()

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

    async def attempt(
        self,
        worker: Worker,
        model: ModelName,
        request: Request,
        passed_on: Mapping[str, str],
        delivery: Delivery | None,
        progress: Progress,
    ) -> Outcome:
        """Never raises for what a worker does. `model`: as the worker calls it. `passed_on`: headers that go
        from the client's request to the worker's. `delivery`: for a client that streams; else the answer
        comes with the outcome."""
        try:
            answer = await self._exchange(worker, model, request, passed_on, delivery, progress)
        except Failed as failed:
            cut = delivery is not None and delivery.begun
            return Outcome(
                cause=Cause.CUT if cut else failed.cause,
                detail=failed.detail,
                rejected=failed.rejected,
                words=failed.words,
                hold_seconds=failed.hold_seconds,
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
        delivery: Delivery | None,
        progress: Progress,
    ) -> bytes | None:
        kind = WORKER_TYPES[worker.type]
        stream = request.endpoint is not Endpoint.EMBEDDINGS and (request.stream or kind.streams_always)
        headers = {
            **self._headers(worker),
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if stream else "application/json",
            **passed_on,
        }
        body = request.to_worker(model, stream=stream)
        url = worker.url + request.endpoint.value
        try:
            async with self._upstream.post(url, body, headers, keep_alive=kind.keep_alive) as response:
                if response.status != 200:
                    raise await _complaint(response)
                if not stream or response.content_type != "text/event-stream":
                    return await self._whole(response, request, delivery, progress)
                answer = None
                if delivery is None:
                    answer = await self._assembled(response, request, progress)
                else:
                    await self._streamed(response, request, worker, delivery, progress)
                if kind.keep_alive:
                    await response.rest()
                return answer
        except UpstreamError as error:
            raise Failed(_CAUSES[type(error)], str(error)) from error
        except AnswerError as error:
            raise Failed(Cause.ERRED, error.detail, error.words) from error
        except FramingError as error:
            raise Failed(Cause.ERRED, str(error)) from error

    async def _whole(
        self, response: Response, request: Request, delivery: Delivery | None, progress: Progress
    ) -> bytes:
        body = await response.whole(MAX_ANSWER_BYTES)
        answer, progress.usage = parse_whole(body, request.model)
        if delivery is not None:
            raise AnswerError("it was asked for a stream and answered in one piece")
        if request.endpoint is Endpoint.EMBEDDINGS:  # of a text in one piece, nobody saw the first token
            progress.first(self._clock())
        progress.tokens = progress.usage.output_tokens or 0
        return orjson.dumps(answer)

    async def _assembled(self, response: Response, request: Request, progress: Progress) -> bytes:
        assembly = Assembly(request.endpoint, request.model)
        reader = StreamReader(request.model, usage_wanted=True, choices=request.choices)
        held = 0
        async with aclosing(_events(response, reader)) as events:
            async for passed in events:
                for data in passed:
                    assembly.add(data)
                    held += len(data)
                if held > MAX_ANSWER_BYTES:
                    raise AnswerError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                self._note(reader, progress)
        return orjson.dumps(assembly.result())

    async def _streamed(
        self, response: Response, request: Request, worker: Worker, delivery: Delivery, progress: Progress
    ) -> None:
        reader = StreamReader(request.model, request.usage_wanted, request.choices)
        # Held back until the answer itself begins, so that until then another worker can take over.
        held = b""
        async with aclosing(_events(response, reader)) as events:
            async for passed in events:
                held += b"".join(map(event, passed))
                if not reader.begun:
                    if len(held) > MAX_UNBEGUN_BYTES:
                        raise AnswerError("its stream goes on without an answer")
                    continue
                self._note(reader, progress)
                if held:
                    await delivery.send(worker, held)
                    held = b""
        await delivery.send(worker, held + event(DONE))

    def _note(self, reader: StreamReader, progress: Progress) -> None:
        progress.usage = reader.usage
        progress.tokens = reader.tokens
        if reader.begun:
            progress.first(self._clock())


async def _events(response: Response, reader: StreamReader) -> AsyncGenerator[list[bytes], None]:
    """What the client shall have of each piece that comes, until the answer's own end.

    Raises `Failed` where the stream ends without it: a closed connection is no end (RELIABILITY D1).
    """
    frames = EventFrames()
    async with aclosing(response.chunks(lambda: reader.begun)) as chunks:
        async for chunk in chunks:
            yield _read(reader, frames.feed(chunk))
            if reader.done:
                break
        else:
            yield _read(reader, frames.end())
    if not reader.is_whole:
        raise Failed(Cause.BROKE, "its stream ended before the answer did")


def _trial_text(tokens: int) -> str:
    """About so many tokens that no engine has read before: a cache cannot answer in its place."""
    return f"{secrets.token_hex(4)}{' word' * tokens}"


def _read(reader: StreamReader, events: list[bytes]) -> list[bytes]:
    passed = []
    for data in events:
        if reader.done:
            break
        if (mine := reader.read(data)) is not None:
            passed.append(mine)
    return passed


_CAUSES: Mapping[type[UpstreamError], Cause] = {
    Unreachable: Cause.UNREACHABLE,
    Broke: Cause.BROKE,
    Silent: Cause.SILENT,
}


async def _complaint(response: Response) -> Failed:
    """What a status other than 200 means: for the client to mend, for us to wait, or a broken worker."""
    complaint = read_complaint(await response.whole(MAX_ERROR_BYTES))
    status = response.status
    detail = f"it answered with status {status}"
    if status in (429, 503):
        failed = Failed(Cause.BUSY, detail, complaint.message)
        if response.retry_after is not None:
            failed.hold_seconds = min(response.retry_after, LONGEST_HOLD_SECONDS)
        return failed
    if status in (400, 413, 422):
        failed = Failed(Cause.REJECTED, detail, complaint.message)
        failed.rejected = Rejected(status, complaint.message, code=complaint.code, param=complaint.param)
        return failed
    # 401, 403 and 404 too: the worker's key or model is not as configured, which is not the client's doing.
    return Failed(Cause.ERRED, detail, complaint.message)
