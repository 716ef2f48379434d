"""The HTTP client towards workers: one POST, its answer as bytes come. Knows no dialect.

Everything that can go wrong comes out as one of three errors of this module. No proxy from the
environment, no redirect, no cookie is ever followed (RELIABILITY R9, R10).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp

LARGE_BODY_BYTES = 256 * 1024
REST_SECONDS = 0.1


class UpstreamError(Exception):
    """The exchange with a worker failed; the message is for people and holds no text of the exchange."""


class Unreachable(UpstreamError):
    """No connection came about: the worker has seen nothing of the request."""


class Broke(UpstreamError):
    """The connection ended before the answer did, or what came is not HTTP."""


class Silent(UpstreamError):
    """No byte came for longer than the read timeout."""


@dataclass(frozen=True, slots=True)
class TimeoutPolicy:
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    """Between two pieces of an answer. Before its first word, the engine is taken to be loading or reading
    the prompt, which takes minutes on a slow machine; then only the request's own limit counts."""


class Response:
    """A worker's answer whose head has come."""

    def __init__(self, response: aiohttp.ClientResponse, read_seconds: float) -> None:
        self._response = response
        self._read_seconds = read_seconds

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def content_type(self) -> str:
        return self._response.content_type

    @property
    def retry_after(self) -> float | None:
        """Seconds; the date form of the header is not used between machines that agree on no clock."""
        value = self._response.headers.get("Retry-After", "")
        return float(value) if value.isascii() and value.isdigit() and len(value) <= 6 else None

    async def chunks(self, begun: Callable[[], bool] = lambda: True) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises `Broke`, and `Silent` for a pause once the answer has `begun`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as patience:
                while chunk := await self._response.content.readany():
                    patience.reschedule(None)  # the reader's own time does not count as the worker's
                    yield chunk
                    if begun():
                        patience.reschedule(loop.time() + self._read_seconds)
        except TimeoutError:
            if not patience.expired():
                raise
            raise Silent(f"nothing came for {self._read_seconds:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Broke(f"the connection broke: {_name(error)}") from error

    async def rest(self) -> None:
        """Reads past what follows an answer that is through (its HTTP end, as a rule), so that the connection
        can serve another; a worker that lets even that wait loses the connection."""
        with suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
            async with asyncio.timeout(REST_SECONDS):
                while await self._response.content.readany():
                    pass

    async def whole(self, limit: int) -> bytes:
        """The body in one piece. Raises `Broke`, `Silent`; more than `limit` bytes count as broken."""
        body = bytearray()
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > limit:
                    raise Broke(f"an answer of more than {limit} bytes")
        return bytes(body)


class Upstream:
    """Connections to all workers: a pool for those that keep what they promise, fresh ones for the rest."""

    def __init__(self, policy: TimeoutPolicy) -> None:
        self._policy = policy
        # An agent keeps idle connections for 75 s; ours are given up long before, so that a request
        # does not meet a connection that is being closed.
        self._pooled = self._session(aiohttp.TCPConnector(limit=0, keepalive_timeout=15))
        # llama.cpp's server promises to keep a connection and closes it after a stream (ENGINES 1c).
        self._fresh = self._session(aiohttp.TCPConnector(limit=0, force_close=True))

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._policy.connect_seconds),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=2**16,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pooled.close()
        await self._fresh.close()

    @asynccontextmanager
    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, keep_alive: bool
    ) -> AsyncIterator[Response]:
        """Send, and wait for the head. Leaving the context early closes the connection: the worker sees it.

        Raises `Unreachable` and `Broke`.
        """
        session = self._pooled if keep_alive else self._fresh
        try:
            response = await session.post(
                url,
                data=_in_pieces(body),
                headers={**headers, "Accept-Encoding": "identity"},  # what comes is read as it is
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(_name(error)) from error
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise Broke(f"no answer: {_name(error)}") from error
        try:
            yield Response(response, self._policy.read_seconds)
        finally:
            response.close()  # after a body that was read to its end the connection is back in the pool


def _in_pieces(body: bytes) -> bytes | io.BytesIO:
    """A large body is written piece by piece, so that it does not hold up everything else."""
    return body if len(body) <= LARGE_BODY_BYTES else io.BytesIO(body)


def _name(error: BaseException) -> str:
    """What happened, without what was sent: `connection refused`, `ServerDisconnectedError`."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror:
        return error.os_error.strerror.split("(", 1)[0].strip().lower() or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "no connection in time"
    return type(error).__name__
