"""The HTTP client towards workers: one request, its answer as bytes come. Knows no dialect.

Written by hand, as the one place where every layer costs each token of each stream: a protocol on llhttp
(`httptools`, the parser that aiohttp uses too), one pool of idle connections per address. It fails closed:
whatever is not what HTTP says ends the connection and the exchange. No proxy from the environment, no
redirect, no cookie is ever followed (RELIABILITY R9, R10).

Agents have certificates of their own making. Theirs are compared by fingerprint, before a byte of a request
is sent.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self, cast
from urllib.parse import quote, unquote, urlsplit

import httptools

from balancer import trust
from worker_agent.keep_alive import keep_alive

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
IDLE_SECONDS = 15.0
"""An agent keeps idle connections for 75 s; ours are given up long before, so that a request does not meet
a connection that is being closed."""
DISTRUST_SECONDS = 60.0
STALE_SECONDS = 0.5
"""A connection that was about to be closed when the request was written shows it within a way there and back;
who closes it later has read the request."""
MAX_AGE_SECONDS = 300.0
"""No connection serves a further request after that, however busy it is: the name of its host may lead
elsewhere by now."""
MAX_IDLE = 256
"""Connections that are kept for one address."""
REST_SECONDS = 1.0
"""What is left of an answer after its own end (HTTP's, as a rule) may take so long; then the connection is
not used again."""
ANY_CERTIFICATE: Final = "any"
"""In place of a pin: whoever is there may show any certificate, which is looked at afterwards
(`Exchange.fingerprint`). For the handshake alone."""
TUNNEL_SCHEME: Final = "tunnel://"
MAX_WRONG_TUNNELS = 4
"""Anybody may open connections under an agent's id: so many of them are tried before that agent counts as not
reached; each has its part of the time for connecting."""
_KEEP_ALIVE_SECONDS = 3, 2, 2
"""TCP's: silence before the first question, between two, and how many. A cut cable is found after 7 s, by
no other means where no report is expected (RELIABILITY M2)."""


class UpstreamError(Exception):
    """The exchange with a worker failed; the message is for people and holds no text of the exchange."""


class Unreachable(UpstreamError):
    """No connection came about: the worker has seen nothing of the request."""


class OtherCertificate(Unreachable):
    """Whoever is there is somebody else, or was set up anew; nothing was said to it."""

    def __init__(self) -> None:
        super().__init__("its certificate is another one than when it was met")


class OutOfFiles(UpstreamError):
    """This machine may open no further connection; nothing is known of the worker."""


class Broke(UpstreamError):
    """The connection ended before the answer did, or what came is not HTTP."""


class Stale(Broke):
    """A connection from the pool was closed by the other side before a byte of the answer came: most likely
    it was about to be closed when the request was written. To be tried again on a fresh one."""


@dataclass(frozen=True, slots=True)
class TimeoutPolicy:
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    """Between two pieces of an answer. Before its first word, the engine is taken to be loading or reading
    the prompt, which takes minutes on a slow machine; then only the request's own limit counts."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a worker's answer."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case; of one that came twice, the last."""

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def retry_after(self) -> float | None:
        """Seconds; the date form of the header is not used between machines that agree on no clock."""
        value = self.headers.get("retry-after", "")
        return float(value) if value.isascii() and value.isdigit() and len(value) <= 6 else None


class Listener(Protocol):
    """Who hears an answer, piece by piece, from the event loop. Nothing comes after `end` or `failed`."""

    def head(self, head: Head) -> None: ...
    def body(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...


class Address(NamedTuple):
    host: str
    """Of a tunnel: the agent's id."""
    port: int
    tls: bool
    ca_file: str | None = None
    """Whose certificates are trusted; None: those that the system trusts."""
    pin: str | None = None
    """SHA-256, in hex, of the one certificate that is accepted, whoever signed it; or `ANY_CERTIFICATE`."""
    tunnel: bool = False
    """The connection is one that the agent has opened."""

    @classmethod
    def of(cls, url: str, ca_file: str | None = None) -> Address:
        """Of `http://host:port`, whatever path follows, or `tunnel://ID`."""
        parts = urlsplit(url)
        if url.startswith(TUNNEL_SCHEME):
            return cls(unquote(parts.netloc), 0, tls=True, tunnel=True)
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, ca_file if tls else None)

    @property
    def authority(self) -> str:
        """As the header `Host` has it: without the port where it is the scheme's own."""
        if self.tunnel:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def tunnel_url(agent_id: str) -> str:
    """Where an agent is that opens the connections itself."""
    return TUNNEL_SCHEME + quote(agent_id, safe="")


@dataclass(frozen=True, slots=True)
class Way:
    """How a worker is reached, and what goes with every request to it."""

    address: Address
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    fingerprint: str
    """Of the certificate that it came from; empty without TLS."""


class Dialled(Protocol):
    """Connections that agents have opened and wait on."""

    async def take(self, agent_id: str) -> socket.socket:
        """One of them, from now on the caller's. Raises `OSError` where there is none."""
        ...


class Exchange(asyncio.Protocol):
    """One connection to a worker, and at most one request on it."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._status = 0
        self._by_length = False
        """The end of the body shows by its framing; else by the end of the connection."""
        self._whole = False
        self._keeps = False
        self._heard = False
        self._served = 0
        self._sent_at = 0.0
        self._resting: asyncio.TimerHandle | None = None
        self._opened_at = 0.0
        self.idle_since = 0.0
        self.paused = False
        self.fingerprint = ""
        """SHA-256, in hex, of the certificate of whoever is there; empty without TLS."""

    # What the holder of the exchange may do

    def pause(self) -> None:
        """Read nothing more until `resume`: the worker is held up, once what is on the way has come."""
        self.paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        self.paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Ends it, and the connection with it: the worker sees that nobody listens any more."""
        self._listener = None
        self._drop()

    def leave(self) -> None:
        """The holder has all that it wants. What is left of the answer is read past, and the connection kept
        if that does not take long."""
        self._listener = None
        if self._whole:
            self._give_back()
        elif not self._keeps:
            self._drop()
        elif self.is_open:
            self.resume()
            self._resting = asyncio.get_running_loop().call_later(REST_SECONDS, self._drop)

    # What the pool does with it

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def belongs_to(self, pool: _Pool) -> None:
        """A connection whose certificate was any is one of those pinned to it, from now on."""
        self._pool.open -= 1
        self._pool = pool
        pool.open += 1

    def send(self, request: bytes, body: bytes, listener: Listener) -> None:
        self._listener = listener
        self._parser = httptools.HttpResponseParser(self)
        self._keeps = self._pool.keeps
        self._heard = self._whole = False
        transport = self._transport
        assert transport is not None
        if len(body) < 64 * 1024:
            transport.write(request + body)
        else:
            transport.writelines((request, body))
        self._served += 1
        self._sent_at = asyncio.get_running_loop().time()

    # What the connection tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool.open += 1
        self._opened_at = asyncio.get_running_loop().time()
        self.fingerprint = _fingerprint(transport.get_extra_info("ssl_object"))
        if (sock := transport.get_extra_info("socket")) is not None:
            keep_alive(sock, *_KEEP_ALIVE_SECONDS)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None or self._whole:
            self._drop()  # nobody has asked: it belongs to no answer
            return
        self._heard = True
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(Broke("it wants to speak something other than HTTP"))
        except httptools.HttpParserError:
            self._fail(Broke("what it says is not HTTP"))
        else:
            if self._whole:
                if self._listener is None:
                    self._give_back()
            elif self._status == 0:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._fail(Broke("the head of its answer is too long"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.open -= 1
        self._pool.forget(self)
        if self._resting is not None:
            self._resting.cancel()
        if self._listener is None or self._whole:
            return
        if exc is None and self._status and not self._by_length:
            self._end()
        elif not self._heard and self._served > 1 and self._age() < STALE_SECONDS:
            self._pool.distrust()
            self._fail(Stale("the connection was closed meanwhile"))
        else:
            why = f": {_name(exc)}" if exc is not None else ""
            where = "the connection broke" if self._heard else "it hung up without an answer"
            self._fail(Broke(where + why))

    # What the parser tells

    def on_message_begin(self) -> None:
        self._status = 0
        self._head_bytes = 0
        self._headers = {}
        self._by_length = False
        if self._whole:
            raise httptools.HttpParserCallbackError  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) >= MAX_HEADERS:
            raise httptools.HttpParserCallbackError
        key = name.decode("latin-1").lower()
        self._headers[key] = value.decode("latin-1")
        if key == "content-length" or key == "transfer-encoding":
            self._by_length = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            return  # "100 Continue" and the like: the answer is yet to come
        self._status = status
        if self._listener is not None:
            self._listener.head(Head(status, self._headers))

    def on_body(self, data: bytes) -> None:
        if self._listener is not None and self._status:
            self._listener.body(data)

    def on_message_complete(self) -> None:
        if not self._status:
            return
        assert self._parser is not None
        self._keeps = self._keeps and self._parser.should_keep_alive()
        self._end()

    # Ends

    def _age(self) -> float:
        return asyncio.get_running_loop().time() - self._sent_at

    def _end(self) -> None:
        self._whole = True
        listener = self._listener
        if listener is not None:
            listener.end()

    def _fail(self, error: UpstreamError) -> None:
        listener, self._listener = self._listener, None
        self._drop()
        if listener is not None and not self._whole:  # what follows a whole answer takes nothing from it
            listener.failed(error)

    def _give_back(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        self._parser = None
        transport = self._transport
        keeps = self._keeps and asyncio.get_running_loop().time() - self._opened_at < MAX_AGE_SECONDS
        # With a part of the request still to be sent, it was answered early: the rest is owed to nobody else.
        if keeps and transport is not None and self.is_open and not transport.get_write_buffer_size():
            if self.paused:  # by a client that was slow to the end
                self.resume()
            self._pool.keep(self)
        else:
            self._drop()

    def _drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Pool:
    """The idle connections to one address, the last used first."""

    def __init__(self, address: Address, dialled: Dialled | None) -> None:
        self.address = address
        self.open = 0
        """Connections, idle or not."""
        self._connecting = 0
        self._dialled = dialled
        self._idle: deque[Exchange] = deque()
        self._distrusted_until = 0.0

    @property
    def keeps(self) -> bool:
        """Connections are used again. llama.cpp's server promises to keep them and closes at the end of each
        stream: 6 to 10 of 20 pooled requests met a closed one (ENGINES 1c), so who was found to do that gets
        a new connection each time, for a while."""
        return asyncio.get_running_loop().time() >= self._distrusted_until

    @property
    def is_needed(self) -> bool:
        """There is something to remember of this address."""
        return self.open > 0 or self._connecting > 0 or not self.keeps

    def distrust(self) -> None:
        self._distrusted_until = asyncio.get_running_loop().time() + DISTRUST_SECONDS

    def take(self, now: float) -> Exchange | None:
        while self._idle:
            exchange = self._idle.pop()
            if exchange.is_open and now - exchange.idle_since < IDLE_SECONDS:
                return exchange
            exchange.abort()
        return None

    def keep(self, exchange: Exchange) -> None:
        exchange.idle_since = asyncio.get_running_loop().time()
        self._idle.append(exchange)
        if len(self._idle) > MAX_IDLE or not self.keeps:
            self._idle.popleft().abort()

    def forget(self, exchange: Exchange) -> None:
        if exchange.idle_since:
            with suppress(ValueError):
                self._idle.remove(exchange)

    def tidy(self, now: float) -> None:
        while self._idle and now - self._idle[0].idle_since >= IDLE_SECONDS:
            self._idle.popleft().abort()

    async def connect(self, seconds: float) -> Exchange:
        """Raises `OSError`, of which `TimeoutError` is one, and `OtherCertificate`."""
        self._connecting += 1
        try:
            async with asyncio.timeout(seconds):
                if self.address.tunnel:
                    return await self._through_a_tunnel(seconds / MAX_WRONG_TUNNELS)
                exchange = await self._opened(None)
                self._insist_on_pin(exchange)
                return exchange
        finally:
            self._connecting -= 1

    async def _through_a_tunnel(self, seconds_each: float) -> Exchange:
        for tried in range(1, MAX_WRONG_TUNNELS + 1):
            sock = await self._taken()
            try:
                async with asyncio.timeout(seconds_each):
                    exchange = await self._opened(sock)
                self._insist_on_pin(exchange)
            except (OSError, OtherCertificate):
                if tried == MAX_WRONG_TUNNELS:
                    raise
            else:
                return exchange
        raise ConnectionRefusedError

    async def _taken(self) -> socket.socket:
        if self._dialled is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no agent can open connections here")
        return await self._dialled.take(self.address.host)

    async def _opened(self, sock: socket.socket | None) -> Exchange:
        loop = asyncio.get_running_loop()
        host, port, tls, ca_file, pin, _ = self.address
        context = None
        if tls:
            context = trust.pinning() if pin is not None else trust.context(ca_file)
        if sock is not None:
            try:
                _, exchange = await loop.create_connection(
                    lambda: Exchange(self), sock=sock, ssl=context, server_hostname="" if context else None
                )
            except BaseException:
                sock.close()
                raise
            return exchange
        # A pinned certificate is for nobody's name, and there is no need to tell the network ours for it.
        name = "" if pin is not None and tls else None
        _, exchange = await loop.create_connection(
            lambda: Exchange(self), host, port, ssl=context, server_hostname=name
        )
        return exchange

    def _insist_on_pin(self, exchange: Exchange) -> None:
        pin = self.address.pin
        if pin not in (None, ANY_CERTIFICATE) and exchange.fingerprint != pin:
            exchange.abort()
            raise OtherCertificate


class Upstream:
    """Connections to all workers. Use it as an asynchronous context manager."""

    def __init__(self, policy: TimeoutPolicy, dialled: Dialled | None = None) -> None:
        """`dialled`: where the connections of agents are that open them themselves."""
        self.policy = policy
        self._dialled = dialled
        self._pools: dict[Address, _Pool] = {}
        self._tidying: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._tidy()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
        for pool in self._pools.values():
            while (exchange := pool.take(0.0)) is not None:
                exchange.abort()
        self._pools.clear()
        await asyncio.sleep(0)  # aborted connections are closed by the next turn of the loop

    async def send(
        self,
        address: Address,
        request: bytes,
        body: bytes,
        listener: Listener,
        *,
        fresh: bool = False,
    ) -> Exchange:
        """Sends, at once where a connection is there; what comes of it goes to the listener.

        `request`: line and headers with the empty line after them. `fresh`: on no connection that was used
        before. Raises `Unreachable`, of a pinned address `OtherCertificate`, and `OutOfFiles`.
        """
        pool = self._pools.get(address) or self._pool(address)
        exchange = None if fresh else pool.take(asyncio.get_running_loop().time())
        if exchange is None:
            exchange = await self._connected(pool)
        exchange.send(request, body, listener)
        return exchange

    async def ask(
        self,
        address: Address,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        limit_bytes: int,
        seconds: float,
    ) -> Answer:
        """The whole answer. Raises `UpstreamError`, for one that is longer than allowed too, and
        `TimeoutError`."""
        request = _request(address, method, path, headers, len(body))
        async with asyncio.timeout(seconds):
            for fresh in (False, True):
                hearing = _Hearing(limit_bytes)
                exchange = await self.send(address, request, body, hearing, fresh=fresh)
                try:
                    head = await hearing.head_of()
                    said = await hearing.rest()
                except Stale:
                    if fresh:
                        raise
                    continue
                except BaseException:
                    exchange.abort()
                    raise
                fingerprint = exchange.fingerprint
                exchange.leave()
                return Answer(head.status, head.headers, said, fingerprint)
        raise AssertionError("the second try gives an answer or raises")

    @asynccontextmanager
    async def reading(
        self, address: Address, path: str, headers: Mapping[str, str], *, limit_bytes: int
    ) -> AsyncIterator[Lines]:
        """An answer that may last for ever, to be read line by line; its connection ends with the block.

        Raises `UpstreamError` here and while it is read.
        """
        request = _request(address, "GET", path, headers, 0)
        lines = Lines(limit_bytes)
        lines.exchange = exchange = await self.send(address, request, b"", lines, fresh=True)
        try:
            lines.status = (await lines.head_of()).status
            yield lines
        finally:
            exchange.abort()

    async def listens(self, address: Address, seconds: float) -> bool:
        """Whether somebody may take connections there. False only where the machine itself says that nobody
        does."""
        try:
            exchange = await self._pool(address).connect(seconds)
        except ConnectionRefusedError:
            return False
        except (OSError, Unreachable):  # a TimeoutError too
            return True
        exchange.abort()
        return True

    async def _connected(self, pool: _Pool) -> Exchange:
        try:
            exchange = await pool.connect(self.policy.connect_seconds)
        except TimeoutError:
            raise Unreachable("no connection in time") from None
        except ConnectionRefusedError as error:
            raise Unreachable("connection refused: nothing listens there") from error
        except ssl.SSLError as error:
            raise Unreachable(trust.complaint(error)) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfFiles("the balancer has no file descriptor left") from error
            raise Unreachable(_name(error)) from error
        if not exchange.is_open:
            raise Unreachable("the connection was closed at once")
        if pool.address.pin == ANY_CERTIFICATE:
            exchange.belongs_to(self._pool(pool.address._replace(pin=exchange.fingerprint or None)))
        return exchange

    def _pool(self, address: Address) -> _Pool:
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = _Pool(address, self._dialled)
        return pool

    def _tidy(self) -> None:
        loop = asyncio.get_running_loop()
        for pool in list(self._pools.values()):
            pool.tidy(loop.time())
            if not pool.is_needed:
                del self._pools[pool.address]
        self._tidying = loop.call_later(IDLE_SECONDS / 3, self._tidy)


class _Hearing:
    """Gathers an answer for somebody who awaits it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._head: Head | None = None
        self._body = bytearray()
        self._ended = False
        self._error: UpstreamError | None = None
        self._news = asyncio.Event()

    def head(self, head: Head) -> None:
        self._head = head
        self._news.set()

    def body(self, data: bytes) -> None:
        self._body += data
        self._insist_on_limit()
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def failed(self, error: UpstreamError) -> None:
        self._error = self._error or error
        self._news.set()

    async def head_of(self) -> Head:
        """Raises `UpstreamError`."""
        while self._head is None:
            await self._more()
        return self._head

    async def rest(self) -> bytes:
        """All of the body that is left. Raises `UpstreamError`."""
        while not self._ended or self._error is not None:
            await self._more()
        return bytes(self._body)

    def _insist_on_limit(self) -> None:
        if len(self._body) > self._limit:
            self._error = self._error or Broke(f"an answer of more than {self._limit} bytes")

    async def _more(self) -> None:
        self._news.clear()
        if self._error is not None:
            raise self._error
        await self._news.wait()


class Lines(_Hearing):
    """An answer that is read line by line, none of which is longer than the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.exchange: Exchange | None = None
        self.status = 0

    async def line(self) -> bytes:
        """The next, with its newline; empty at the end. Raises `UpstreamError`."""
        while (newline := self._body.find(b"\n")) < 0 and not self._ended:
            await self._more()
        length = newline + 1 or len(self._body)
        line = bytes(self._body[:length])
        del self._body[:length]
        if self.exchange is not None and self.exchange.paused and not self._is_full:
            self.exchange.resume()
        return line

    @property
    def _is_full(self) -> bool:
        return len(self._body) > self._limit // 2

    def _insist_on_limit(self) -> None:
        if self._is_full and self.exchange is not None:
            self.exchange.pause()  # whoever sends faster than is read waits
        if len(self._body) > self._limit and b"\n" not in self._body[: self._limit]:
            self._error = self._error or Broke(f"a line of more than {self._limit} bytes")


def _request(address: Address, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
    lines = {"Host": address.authority, **headers, "Accept-Encoding": "identity"}
    if length or method != "GET":
        lines |= {"Content-Type": "application/json", "Content-Length": str(length)}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1")


def _fingerprint(tls: ssl.SSLObject | None) -> str:
    certificate = None if tls is None else tls.getpeercert(binary_form=True)
    return "" if certificate is None else sha256(certificate).hexdigest()


def _name(error: BaseException) -> str:
    """What happened, without what was sent: `connection refused`, `SSLError`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.split("(", 1)[0].strip().lower() or type(error).__name__
    return type(error).__name__
