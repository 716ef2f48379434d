"""aiohttp's server for everything that the hot path does not read, with what it leaves open closed.

- Of bytes that are no request it would put some into its answer and a traceback into the log. Here the
  answer is a fixed text, and the log gets a line in a second however many there are.
- Versions of HTTP that it takes for 1.1, and a target that names another host than the Host header does,
  are refused.
- A body in a million pieces of a byte would keep the loop busy for a second: such a connection is ended.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from balancer.clean_head import is_host
from balancer.core.errors import BadRequest, RequestError
from balancer.dialects.openai import error_body
from balancer.origins import Origins, is_for_answers

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_HEADERS = 128
MAX_LINE_BYTES = 8190

NOISE_SECONDS = 1.0

TINY_CHUNKS = 20_000
"""Pieces of a body below 256 bytes each: so many at once, and more only at the rate below. Each costs about
0.7 us of the loop, whatever it holds."""
TINY_CHUNKS_PER_SECOND = 1_000.0
_CONTINUE = "100-continue"
_TINY_CHUNK = re.compile(rb"\r\n0*[0-9A-Fa-f]{1,2}(?:[ \t]*;[^\r\n]*)?\r\n")

_TLS_HELLO = b"\x16\x03"
_NO_TLS_HERE = bytes.fromhex("15 0301 0002 02 46")
"""A fatal alert, `protocol_version`: a TLS client says that, and not that it cannot read what came."""

LAST = web.RequestKey("last", bool)
"""The connection is to end with this request's answer."""


class Noise:
    """What came over connections and was no request: counted, and told once in a while."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quiet_until = 0.0
        self._untold = 0

    def heard(self, address: str, what: str) -> None:
        """`what`: in our words; nothing of what came is logged."""
        self._untold += 1
        now = self._clock()
        if now >= self._quiet_until:
            log.info("%s from %s (%d such since the last line)", what, address, self._untold)
            self._untold, self._quiet_until = 0, now + NOISE_SECONDS


class HardenedHandler(web.RequestHandler):
    """One connection in aiohttp's hands, from its beginning or handed over by the hot path."""

    __slots__ = ("_address", "_begun", "_chunks", "_chunks_at", "_lost", "_noise")

    def __init__(
        self,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        *,
        noise: Noise,
        address: str,
        idle_seconds: float,
        lost: Callable[[], None],
    ) -> None:
        """`idle_seconds`: for a whole head to come. `lost`: told once, when the connection has ended."""
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # as web.AppRunner has it
            auto_decompress=False,
            lingering_time=0,
            keepalive_timeout=idle_seconds,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        self._request_handler = _of_plain_expectations(server.request_handler)
        self._noise = noise
        self._address = address
        self._lost = lost
        self._begun = False
        self._chunks = 0.0
        self._chunks_at = 0.0

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._lost()

    def outgoing(self) -> asyncio.Transport:
        """The connection, for whoever takes it over with the request that is under way; it is read no
        further. Raises `BadRequest` where there is more on it than that, and `ConnectionResetError`."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        if self._messages or transport.get_write_buffer_size():
            raise BadRequest("This connection carries another request: ask on one of its own.")
        transport.pause_reading()
        return transport

    def let_go(self) -> None:
        """The connection is another's now, and open: here it counts as ended. The request under way is
        cancelled."""
        self.transport = None
        self.connection_lost(None)

    def end_if_idle(self) -> None:
        if not self._request_in_progress and not self._messages:
            self.force_close()

    def eof_received(self) -> None:
        """A client that closes its half of the connection has left."""
        if self.transport is not None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._begun = True
            if data.startswith(_TLS_HELLO):
                self._noise.heard(self._address, "TLS on a port without it: clients have to use http://")
                if self.transport is not None:
                    self.transport.write(_NO_TLS_HERE)
                self.force_close()
                return
        if data.count(b"\r\n") > len(data) >> 8 and self._floods(data):
            self._noise.heard(self._address, "a body in too many pieces")
            if self.transport is not None:
                self.transport.write(too_many_pieces())
            self.force_close()
            return
        super().data_received(data)

    def _floods(self, data: bytes) -> bool:
        tiny = sum(1 for _ in _TINY_CHUNK.finditer(data))
        now = self._loop.time()
        earlier = self._chunks - (now - self._chunks_at) * TINY_CHUNKS_PER_SECOND
        self._chunks, self._chunks_at = max(0.0, earlier) + tiny, now
        return self._chunks > TINY_CHUNKS

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no request, or came apart while it was read; and our own defects."""
        if status >= 500:
            log.error("a defect of the balancer, in answering a request", exc_info=exc)
            error = RequestError("The balancer failed; its log says where.")
        else:
            self._noise.heard(self._address, "bytes that are no HTTP request")
            error = BadRequest("This is not a proper HTTP request.")
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionError("a part of an answer is out already")
        response = web.Response(
            status=status,
            body=error_body(error),
            content_type="application/json",
            headers={"Connection": "close"},
        )
        response.force_close()
        return response


def _of_plain_expectations(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """aiohttp would put an Expect that it does not know into its answer, or fail to; and that before any
    middleware is asked."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", _CONTINUE).lower() == _CONTINUE:
            return await handler(request)
        error = BadRequest("The header Expect can only be '100-continue'.")
        response = web.Response(
            status=417,
            body=error_body(error),
            content_type="application/json",
            headers={"Connection": "close"},
        )
        response.force_close()
        return response

    return handle


def too_many_pieces() -> bytes:
    return plain_answer(BadRequest("The request body comes in too many small pieces."))


def plain_answer(error: RequestError) -> bytes:
    """An error as the whole of what a connection that is about to be closed is told."""
    body = error_body(error)
    retry = "" if error.retry_after is None else f"Retry-After: {error.retry_after:.0f}\r\n"
    head = (
        f"HTTP/1.1 {error.status} Error\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def plain_requests(origins: Origins) -> Middleware:
    """The middleware that holds aiohttp's requests to what the hot path holds its own to.

    Raises `RequestError`: it stands within the middleware that gives errors their form.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            check_plain(request, origins)
        except BadRequest:
            request[LAST] = True  # who sends such things may have sent more of them
            raise
        if request.method == "OPTIONS" and is_for_answers(request.path):
            allowed = origins.preflight(request.headers)
            if allowed is not None:
                return web.Response(status=204, headers=allowed)
        return await handler(request)

    return middleware


def check_plain(request: web.Request, origins: Origins) -> None:
    """Raises `BadRequest`, `WrongHost` and `CrossSite`."""
    if request.version not in ((1, 0), (1, 1)):
        raise BadRequest("This server speaks HTTP/1.1 and HTTP/1.0.")
    host = request.headers.get("Host", "")
    if not is_host(host) and (host or request.version == (1, 1)):
        raise BadRequest("The Host header is empty, or holds what is no host.")
    target = request.raw_path
    if not target.startswith("/") and target != "*":
        authority = target.partition("://")[2].partition("/")[0].partition("?")[0]
        if authority.lower() != host.lower():
            raise BadRequest("The request's target names another host than its Host header.")
    if host:
        origins.check(request.headers, inference=is_for_answers(request.path))
