"""The way to the endpoint: OpenAI-compatible HTTP, patient with one that is busy or starts again.

`pause_after` decides (pure) whether a failed try is worth another; `Endpoint` performs.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import aiohttp
import orjson
import tenacity
from pydantic import BaseModel, Field, ValidationError

from balancer.batch.asks import Request

MAX_ANSWER_BYTES = 16 * 1024 * 1024


class EndpointError(Exception):
    """The endpoint cannot be used at all; the message says what to do next."""


class AskFault(Exception):
    """This request got no answer and will get none now; the message says why."""


class ContextExceeded(AskFault):
    """The request holds more tokens than the model's context."""


class _TryAgain(Exception):
    """One try failed in a way that may pass."""


class Busy(_TryAgain):
    """The endpoint has no room now (429, 503), or nobody answers at all."""

    def __init__(self, reason: str, *, reachable: bool, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reachable = reachable
        self.retry_after = retry_after
        """Seconds, as the endpoint asked; None: it did not say."""


class Broke(_TryAgain):
    """A worker took the request and failed with it: it may be the request's fault."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try again."""

    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0
    """Of our own backoff, which doubles."""
    longest_retry_after_seconds: float = 120.0
    """A longer Retry-After is shortened: the endpoint may be back sooner than a guess of its own."""
    busy_seconds: float = 900.0
    """An endpoint that restarts and loads a model again is back in this time."""
    broken_tries: int = 3
    """Of one request, however often the endpoint was busy in between."""
    total_seconds: float = 1800.0
    """Of one request; RFC 9110 names no limit, and a slow machine may take minutes for a long answer."""
    connect_seconds: float = 10.0


def pause_after(
    patience: Patience, failure: Exception, *, tries: int, seconds: float, dice: Callable[[], float]
) -> float | None:
    """Seconds until the next try; None: give up. Pure.

    `tries` counts failures of this kind: all that `Broke`, or those that were `Busy` since a worker last took
    the request. `seconds` have passed since the first of the latter; what broke is not limited by time.
    `dice` gives a number from 0 to 1, so that many waiting requests do not come back together.
    """
    if not isinstance(failure, _TryAgain):
        return None
    if isinstance(failure, Broke) and tries >= patience.broken_tries:
        return None
    backoff = min(patience.longest_pause_seconds, patience.first_pause_seconds * 2.0 ** min(tries - 1, 30))
    pause = backoff * (0.5 + 0.5 * dice())
    if not isinstance(failure, Busy):
        return pause
    if failure.retry_after is not None:
        pause += min(failure.retry_after, patience.longest_retry_after_seconds)
    return pause if seconds + pause <= patience.busy_seconds else None


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one request."""

    text: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """Of the try that succeeded."""
    cut_short: bool


@dataclass(frozen=True, slots=True)
class OfferedModel:
    name: str
    context_tokens: int | None
    """None: the endpoint does not say."""


class Asker(Protocol):
    """What a run needs of an endpoint."""

    async def ask(self, request: Request) -> Reply:
        """Raises `AskFault`, `ContextExceeded` among them."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Completion(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str = Field(min_length=1)
    context_length: int | None = Field(default=None, ge=1)


class _Models(BaseModel):
    data: tuple[_Model, ...] = ()


def root_of(url: str) -> str:
    """The endpoint's address without a path, given with or without the `/v1` that SDKs want."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@asynccontextmanager
async def connected(
    url: str,
    *,
    api_key: str | None = None,
    patience: Patience | None = None,
    tls: ssl.SSLContext | bool = True,
) -> AsyncIterator[Endpoint]:
    """An endpoint to ask, for as long as the block lasts. `tls`: whom to trust, as aiohttp takes it."""
    patience = patience or Patience()
    headers = {"X-Priority": "batch"}  # who sits before a screen goes first
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    timeout = aiohttp.ClientTimeout(total=patience.total_seconds, sock_connect=patience.connect_seconds)
    # The run limits what is in flight; a second limit here would only count waiting as answering.
    connector = aiohttp.TCPConnector(limit=0, ssl=tls)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        yield Endpoint(root_of(url), session, patience)


@dataclass(slots=True)
class Endpoint:
    """An OpenAI-compatible server. Made by `connected`."""

    url: str
    _session: aiohttp.ClientSession
    _patience: Patience
    waiting: Callable[[str], None] = lambda reason: None
    """Told why a request is not answered yet, each time that it is tried again."""
    _dice: Callable[[], float] = random.random
    _gone: bool = field(default=False, init=False)
    """Nobody answered for as long as patience lasts: until somebody does, each request gets one try."""

    async def models(self) -> tuple[OfferedModel, ...]:
        """What it serves, by name; raises `EndpointError`."""
        try:
            status, _, body = await self._exchange("GET", "/v1/models", None)
        except _TryAgain as failure:
            raise EndpointError(
                f"{self.url} does not answer ({failure}). Start it with `balancer up`, "
                "or name another with --url."
            ) from None
        if status in (401, 403):
            raise EndpointError(f"{self.url} wants an API key: give it with --api-key.")
        try:
            if status != 200:
                raise ValueError
            models = _Models.model_validate_json(body).data
        except ValueError:
            raise EndpointError(
                f"{self.url} answers, but not as an OpenAI-compatible server "
                f"(status {status} for /v1/models). Is the --url right?"
            ) from None
        return tuple(sorted((OfferedModel(m.id, m.context_length) for m in models), key=lambda m: m.name))

    async def idle_reason(self) -> str | None:
        """Why nothing would be answered now, as a balancer's `/readyz` says; None: nothing is known."""
        try:
            status, _, body = await self._exchange("GET", "/readyz", None)
        except _TryAgain:
            return None
        try:
            told = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if status != 503 or not isinstance(told, dict) or told.get("ready") is not False:
            return None
        return f"none of its {told.get('workers', 0)} workers is ready (see `balancer workers`)"

    async def ask(self, request: Request) -> Reply:
        """One answer, after as many tries as patience allows. Raises `AskFault`, `ContextExceeded`."""
        loop = asyncio.get_running_loop()
        broke = busy = 0
        busy_since = 0.0
        pause: float | None = None

        def seen(state: tenacity.RetryCallState) -> bool:
            nonlocal broke, busy, busy_since, pause
            failure = state.outcome.exception() if state.outcome else None
            if not isinstance(failure, _TryAgain):
                return False
            if isinstance(failure, Broke):
                broke, busy = broke + 1, 0
            else:
                busy_since = busy_since if busy else loop.time()
                busy += 1
            tries, seconds = (busy, loop.time() - busy_since) if busy else (broke, 0.0)
            pause = pause_after(self._patience, failure, tries=tries, seconds=seconds, dice=self._dice)
            if isinstance(failure, Busy) and not failure.reachable:
                pause = None if self._gone else pause
                self._gone = self._gone or pause is None
            if pause is not None:
                self.waiting(str(failure))
            return pause is not None

        trying = tenacity.AsyncRetrying(retry=seen, wait=lambda _: pause or 0.0, reraise=True)
        try:
            return await trying(self._attempt, request)
        except _TryAgain as failure:
            raise AskFault(f"{failure} (and trying again did not help)") from None

    async def _attempt(self, request: Request) -> Reply:
        loop = asyncio.get_running_loop()
        started = loop.time()
        status, headers, body = await self._exchange(
            "POST", "/v1/chat/completions", orjson.dumps(request.body())
        )
        self._gone = False
        if status != 200:
            raise _fault(status, headers, body)
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError:
            raise Broke("the endpoint's answer is not a chat completion") from None
        choice, usage = completion.choices[0], completion.usage or _Usage()
        text = (choice.message.content or "").strip()
        if not text:
            raise Broke(f"the model gave an empty answer (finish_reason: {choice.finish_reason})")
        return Reply(
            text=text,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            seconds=loop.time() - started,
            cut_short=choice.finish_reason == "length",
        )

    async def _exchange(
        self, method: str, path: str, body: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Foreign exceptions end here: raises `Busy` or `Broke`."""
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            async with self._session.request(
                method, self.url + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                return response.status, response.headers, await _bounded(response)
        except aiohttp.InvalidURL:
            raise Busy("that is no address", reachable=False) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Busy(f"no connection: {error}", reachable=False) from None
        except TimeoutError:
            raise Broke(f"no answer within {self._patience.total_seconds:.0f} s") from None
        except aiohttp.ClientError as error:
            # The connection broke while we waited: the endpoint restarts, or a worker died under it.
            raise Busy(
                f"the connection broke: {str(error) or type(error).__name__}", reachable=True
            ) from None


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise Broke(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _fault(status: int, headers: Mapping[str, str], body: bytes) -> Exception:
    error = _error_of(body)
    said = str(error.get("message") or "")[:300] or "no reason given"
    if error.get("code") == "context_length_exceeded" or error.get("type") == "exceed_context_size_error":
        return ContextExceeded(said)
    sentence = f"the endpoint answered {status}: {said}"
    if status in (429, 503):
        return Busy(sentence, reachable=True, retry_after=retry_after(headers.get("Retry-After")))
    if status >= 500 or status == 408:
        return Broke(sentence)
    return AskFault(sentence)


def _error_of(body: bytes) -> Mapping[str, object]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    error = fields.get("error") if isinstance(fields, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else {}


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, in either form of RFC 9110 10.2.3; None: unreadable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
