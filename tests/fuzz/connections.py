"""Bytes of a connection: from a client to either server, and from a worker to the client of workers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

from balancer.core.dispatcher import Snapshot
from balancer.core.model import Endpoint
from balancer.hot_path import ServerPolicy
from balancer.inference import InferencePolicy
from balancer.upstream import MAX_HEAD_BYTES, Exchange, Head, UpstreamError
from tests.e2e.fronts import Served, serving
from tests.fuzz.mutation import cuts
from tests.fuzz.target import Target, looped

TURNS = 12
"""Of the loop, in which what can be answered without waiting is."""
_STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
_LOOP_DETECTED = 508
NOBODY = Snapshot(workers=(), waiting=0, waiting_batch=0, running=0, models={})


class Wire(asyncio.Transport):
    """A connection without a network: what is written to it is kept."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 4000)})
        self.protocol = protocol
        self.written = bytearray()
        self.over = False
        self.paused = False
        protocol.connection_made(self)

    def feed(self, data: bytes) -> None:
        """As the other side sends it; nothing once this side has closed."""
        if not self.over and not self.paused:
            self.protocol.data_received(data)

    def cut(self) -> None:
        self.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.over:
            self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        if not self.over:
            self.over = True
            asyncio.get_running_loop().call_soon(lambda: self.protocol.connection_lost(None))

    abort = close

    def is_closing(self) -> bool:
        return self.over

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


async def turn(times: int = TURNS) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@asynccontextmanager
async def _server(hot: bool) -> AsyncIterator[Served]:
    limits = InferencePolicy(max_body_bytes=4000)
    nobody = partial(serving, snapshot=lambda: NOBODY, join=lambda *_: None)
    async with nobody(ServerPolicy(hot_path=hot), limits) as served:
        yield served


async def http(served: Served, data: bytes) -> None:
    """No 5xx but the one for a circle of balancers, and nothing is left of the connection."""
    wire = Wire(served.server._protocol())
    for piece in cuts(data):
        wire.feed(piece)
        await asyncio.sleep(0)
    await turn()
    wire.cut()
    await turn()
    statuses = [int(status) for status in _STATUS.findall(bytes(wire.written))]
    assert all(status < 500 or status == _LOOP_DETECTED for status in statuses), statuses
    assert not served.server.ours
    assert served.server.connections.count == 0
    served.inference.asked.clear()


class _Pool:
    """Where a connection to a worker goes when its answer is over."""

    keeps = True
    open = 0

    def keep(self, exchange: Exchange) -> None:
        pass

    forget = keep

    def distrust(self) -> None:
        pass


class _Heard:
    """Whoever waits for a worker's answer."""

    def __init__(self) -> None:
        self.heads = 0
        self.over = False

    def head(self, head: Head) -> None:
        assert not self.over
        self.heads += 1
        assert self.heads == 1
        assert 200 <= head.status <= 999
        assert sum(len(name) + len(value) for name, value in head.headers.items()) <= 2 * MAX_HEAD_BYTES
        assert head.retry_after is None or head.retry_after >= 0
        head.content_type.encode()

    def body(self, data: bytes) -> None:
        assert not self.over
        assert self.heads
        assert data

    def end(self) -> None:
        assert not self.over
        self.over = True

    def failed(self, error: UpstreamError) -> None:
        assert not self.over
        self.over = True


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


async def upstream(_: None, data: bytes) -> None:
    """One head, then its body, then one end, of one kind or the other; whatever the worker sends."""
    heard = _Heard()
    exchange = Exchange(cast(Any, _Pool()))
    wire = Wire(exchange)
    exchange.send(b"POST / HTTP/1.1\r\n\r\n", b"{}", heard)
    for piece in cuts(data):
        wire.feed(piece)
    wire.cut()
    await turn(3)
    assert heard.over


_PATHS = tuple(one.value.encode() for one in Endpoint)
_HTTP_WORDS = (
    *_PATHS,
    *(
        b"POST ",
        b"GET ",
        b"DELETE ",
        b"OPTIONS ",
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
        b" HTTP/2.0\r\n",
        b"PRI * ",
    ),
    *(
        b"Content-Length: 2\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Host: localhost\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(
        b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: llm-tunnel\r\n",
        b"X-Priority: batch\r\n",
        b": ",
    ),
    *(
        b"Authorization: Bearer x\r\n",
        b"X-Admin-Key: x\r\n",
        b"Origin: http://evil\r\n",
        b"X-Local-Only: 1\r\n",
    ),
    *(
        b"/v1/models",
        b"/v1/models/%ff",
        b"/health",
        b"/admin/workers",
        b"/cluster/v1/join",
        b"/cluster/v1/tunnel",
    ),
    *(
        b"X-Cluster-Agent: a\r\n",
        b"Content-Encoding: gzip\r\n",
        b"2\r\n{}\r\n",
        b"0\r\n\r\n",
        b"\r\n\r\n",
        b"?a=%",
        b"//",
    ),
    *(
        b"Cookie: a=b\r\n",
        b"Content-Type: application/json\r\n",
        b'{"wire":2,"id":"a","port":1}',
        b"*",
        b"X-Request-ID: ",
    ),
)

TARGETS = (
    Target("http", looped(partial(_server, True), http), _HTTP_WORDS, is_slow=True),
    Target("http_on_aiohttp", looped(partial(_server, False), http), _HTTP_WORDS, is_slow=True),
    Target(
        "upstream",
        looped(_nothing, upstream),
        (
            *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 200 OK\r\n", b"\r\n\r\n"),
            *(
                b"Content-Length: 5\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b": ",
            ),
            *(
                b"HTTP/1.1 101 Switching\r\n",
                b"HTTP/1.1 204 No\r\n\r\n",
                b"Connection: close\r\n",
                b"Retry-After: 1\r\n",
            ),
            *(
                b"HTTP/1.1 304 Not\r\n\r\n",
                b"Upgrade: h2c\r\n",
                b"X: " + b"a" * 9000 + b"\r\n",
                b"a: b\r\n" * 130,
            ),
        ),
    ),
)
