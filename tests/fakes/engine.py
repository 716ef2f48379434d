"""A real HTTP server that behaves like an LLM engine, and misbehaves exactly as it is told.

The stage on which the fault tests play. It listens on a real port, in the test's own loop
(`async with FakeEngine(tokens=8) as engine: ...engine.url...`) or as a process of its own
(`async with engine_process("--tokens", "8") as process: ...`, or `python -m tests.fakes.engine`, whose
first line is its URL), and speaks OpenAI's API and as much of Ollama's as a balancer needs to know it.

Its text follows from the prompt alone (`tests.fakes.speech`). An answer that was begun is continued: in
chat a trailing assistant message, in the way of one engine or another (`Continues`), in completions what
follows the last line break of the prompt.

What goes wrong is a script, one `Fault` for each coming inference request:

    engine.script(Fault.status(500), Fault.stall(at_token=3), OK)

Nothing here needs a sleep in a test: wait with `seen`, `stalled`, `idle` or `until`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import os
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, cast

import orjson

from tests.fakes.agent_gate import PATHS, AgentGate
from tests.fakes.faults import DONE_EVENT, OK, Fault, Flood, How, Part, Place, error_body
from tests.fakes.speech import Prompt, Spelling, Utterance, flat, reference_embedding, reference_text
from worker_agent import wire

Json = dict[str, Any]

__all__ = [
    "LLAMA_CPP",
    "MLX",
    "OK",
    "VLLM",
    "Continues",
    "EngineProcess",
    "FakeEngine",
    "Fault",
    "Outcome",
    "Request",
    "Spelling",
    "engine_process",
    "on",
    "reference_embedding",
    "reference_text",
]

CONTINUE_HEADER = "x-llm-continue"
"""By which a balancer tells an agent to go on with the last message; as a request has it, in lower case."""
WAIT_HEADER = "x-llm-wait"
INFERENCE_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
CREATED = 1_700_000_000  # any moment does, and always the same makes answers comparable
MAX_REQUEST_BYTES = 64 * 1024 * 1024
REQUESTS_KEPT = 10_000  # a fake that runs for an hour in a process must not grow
WAIT_SECONDS = 10.0  # of a test for something that normally takes milliseconds


class Continues(Enum):
    """When a trailing assistant message is a beginning to go on with, and not a turn that is over."""

    ALWAYS = "always"
    """llama.cpp."""
    BY_FLAGS = "flags"
    """With `continue_final_message: true` and `add_generation_prompt: false` (vLLM; the first without the
    second is refused)."""
    BY_HEADER = "header"
    """With `X-LLM-Continue: 1`: an agent of ours."""
    NEVER = "never"
    """mlx_lm."""


# What came ......................................................................................


class Outcome(Enum):
    """How a request ended, as the engine saw it."""

    COMPLETED = "completed"
    """All that it wanted to send was given to the kernel."""
    CLIENT_LEFT = "client_left"
    """The client closed (or half closed) its connection before that."""
    BROKEN = "broken"
    """The engine itself broke it off: a fault of the script, `die`, or the end of the test."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request as it arrived, and what became of it."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    raw: bytes
    """The body as it came."""
    body: Json
    """The body parsed; empty where it was not a JSON object."""
    started: float
    """On the loop's clock, like `ended`."""
    closes: bool
    """The client wants the connection closed after the answer."""
    reused: bool = False
    """The connection had a request before."""
    fault: Fault = OK
    tokens_sent: int = 0
    """Of a stream: written. Not streamed: generated."""
    outcome: Outcome | None = None
    """None: not ended yet."""
    ended: float | None = None

    @property
    def is_inference(self) -> bool:
        return self.path in INFERENCE_PATHS


When = Callable[[Request], bool]


def on(path: str) -> When:
    """Requests to this path, as a condition for `script` and `always`."""
    return lambda request: request.path == path


def _inference(request: Request) -> bool:
    return request.is_inference


class _Refused(Exception):
    """The request is answered with an error, as a sane engine would."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _BrokenOff(Exception):
    """The script says that the answer breaks off here."""

    def __init__(self, how: How) -> None:
        super().__init__(how.name)
        self.how = how


# The wire .......................................................................................


class _Connection(asyncio.Protocol):
    """One client: bytes in, bytes out, and at once the news that it left."""

    transport: asyncio.Transport

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._inbox = bytearray()
        self._came = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._used = False
        self.busy = False
        """A request is being answered."""
        self.dropped = False
        """By us."""
        self.left = False
        """By the client."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Nothing may linger in the process: `drain` returns when the kernel has it all.
        self.transport.set_write_buffer_limits(high=0)
        self._engine._welcome(self)

    def data_received(self, data: bytes) -> None:
        self._inbox += data
        if len(self._inbox) > MAX_REQUEST_BYTES:
            self.transport.abort()
        self._came.set()

    def eof_received(self) -> None:
        # A client that half closes has left, as for most engines. `abort`, since a polite close would
        # first wait for what it does not read any more.
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = not self.dropped
        self._came.set()
        self._writable.set()
        self._engine._farewell(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def write(self, data: bytes) -> None:
        """Returns when the kernel has it. Whoever left gets nothing, without an error."""
        if not self.left:
            self.transport.write(data)
            await self._writable.wait()

    def drop(self, how: How) -> None:
        """End the connection from our side; nothing more comes from it."""
        self.dropped = True
        if self.transport.is_closing():
            return
        if how is How.RESET:
            linger = struct.pack("ii", 1, 0)  # on, for 0 s: close() sends RST
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if how in (How.RESET, How.DIE):
            self.transport.abort()  # without a linger, what the kernel does for a process that was killed
        else:
            self.transport.close()

    async def receive(self, now: Callable[[], float]) -> Request | None:
        """The next request; None when there is no more. Bytes that are not HTTP/1 drop the connection."""
        if self.dropped:
            return None
        reused, self._used = self._used, True
        try:
            lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            started = now()
            method, path, version = lines[0].split(" ")
            pairs = (line.partition(":") for line in lines[1:])
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            if headers.get("transfer-encoding", "").lower() == "chunked":
                raw = await self._chunks()
            else:
                raw = await self._exactly(int(headers.get("content-length", 0)))
        except EOFError:
            return None
        except ValueError:
            self.drop(How.CLOSE)
            return None
        body: object = None
        with suppress(orjson.JSONDecodeError):
            body = orjson.loads(raw)
        return Request(
            method=method,
            path=path.partition("?")[0],
            headers=headers,
            raw=raw,
            body=body if isinstance(body, dict) else {},
            started=started,
            closes=version == "HTTP/1.0" or headers.get("connection", "").lower() == "close",
            reused=reused,
        )

    async def _until(self, mark: bytes) -> bytes:
        while (end := self._inbox.find(mark)) < 0:
            await self._more()
        return (await self._exactly(end + len(mark)))[:end]

    async def _exactly(self, size: int) -> bytes:
        while len(self._inbox) < size:
            await self._more()
        taken = bytes(self._inbox[:size])
        del self._inbox[:size]
        return taken

    async def _chunks(self) -> bytes:
        whole = bytearray()
        while size := int(await self._until(b"\r\n"), 16):
            whole += (await self._exactly(size + 2))[:-2]
            if len(whole) > MAX_REQUEST_BYTES:
                raise ValueError("too long")
        await self._until(b"\r\n")
        return bytes(whole)

    async def _more(self) -> None:
        if self.left:
            raise EOFError
        self._came.clear()
        await self._came.wait()


class _Answer:
    """One answer on its way out, which goes wrong where its fault says so."""

    def __init__(self, engine: FakeEngine, connection: _Connection, request: Request) -> None:
        self._engine = engine
        self._connection = connection
        self._request = request
        self._fault = request.fault
        self._body_bytes = 0
        self._streams = False
        self._begun = False
        self._places = {stall.place.byte for stall in self._fault.stalls}
        if self._fault.breaks:
            self._places.add(self._fault.breaks.place.byte)
        self.keeps_alive = not (request.closes or engine.http_1_0)

    async def whole(self, body: bytes, *, status: int = 200) -> None:
        """An answer in one piece."""
        length = len(body) + self._fault.length_off_by
        await self._head(status, "application/json", f"Content-Length: {length}")
        await self._send(body)

    async def open_stream(self) -> None:
        self._streams = True
        if self._engine.close_after_stream:
            self.keeps_alive = False
        framing = None if self._engine.http_1_0 else "Transfer-Encoding: chunked"
        await self._head(200, "text/event-stream; charset=utf-8", framing)

    async def event(self, data: Json | bytes) -> None:
        """One event of the stream: a chunk, or a line that is ready to be sent."""
        comment = b": a comment\n\n" if self._fault.comments_between else b""
        event = data if isinstance(data, bytes) else b"data: " + orjson.dumps(data) + b"\n\n"
        await self._send((comment + event) * (2 if self._fault.doubles else 1))

    async def while_reading(self, seconds: float) -> None:
        """The prompt is being read: signs of life in the stream, if this engine gives any."""
        every = self._engine.keepalive_seconds if self._streams else None
        parts = max(1, round(seconds / every)) if every else 1
        for part in range(1, parts + 1):
            await asyncio.sleep(seconds / parts)
            if every:
                await self._send(b": keepalive %d/%d\n\n" % (part, parts))

    async def part(self, part: Part, data: Json | bytes) -> None:
        """One of the events that end a stream, unless it is forgotten."""
        if part not in self._fault.omits:
            await self.event(data)

    async def close_stream(self) -> None:
        if not self._engine.http_1_0:
            await self._connection.write(b"0\r\n\r\n")

    async def at_token(self, tokens: int) -> None:
        """So many tokens are through: the moment for whatever the script has in store here."""
        self._request.tokens_sent = tokens
        self._engine._changed()
        await self._stall(Place(token=tokens))
        if self._streams:
            for place, data in self._fault.inserts:
                if place == tokens:
                    await self._send(data)
            for flood in self._fault.floods:
                if flood.at_token == tokens:
                    await self._flood(flood)
        self._break(Place(token=tokens))

    async def _flood(self, flood: Flood) -> None:
        for _ in count() if flood.times is None else range(flood.times):
            if self._connection.left:
                return
            await self._send(flood.data)
            await asyncio.sleep(0)  # everything else in this loop goes on meanwhile

    async def before_head(self) -> None:
        await self._stall(Place())
        self._break(Place())

    async def _head(self, status: int, content_type: str, framing: str | None) -> None:
        lines = [
            f"HTTP/1.{0 if self._engine.http_1_0 else 1} {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {content_type}",
        ]
        if framing:
            lines.append(framing)
        if self._streams and self._engine.close_after_stream:
            lines.append("Keep-Alive: timeout=5, max=100")
        elif not self.keeps_alive and not self._engine.http_1_0:
            lines.append("Connection: close")
        lines += [f"{name}: {value}" for name, value in self._fault.headers]
        await self._connection.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        self._begun = True
        await self._at_byte(0)

    async def _send(self, data: bytes) -> None:
        for piece in self._pieces(data):
            chunked = self._streams and not self._engine.http_1_0
            await self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if self._fault.slice_bytes:
                await asyncio.sleep(0)  # a client in this loop now reads the pieces one by one
            self._body_bytes += len(piece)
            await self._at_byte(self._body_bytes)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """The data, cut by the script: into slices, and where something happens at a byte."""
        size = self._fault.slice_bytes or max(1, len(data))
        cuts = {byte - self._body_bytes for byte in self._places if byte is not None}
        cuts = {cut for cut in cuts if 0 < cut < len(data)} | set(range(0, len(data), size)) | {len(data)}
        edges = sorted(cuts)
        return (data[start:end] for start, end in pairwise(edges))

    async def _at_byte(self, byte: int) -> None:
        if byte in self._places:
            await self._stall(Place(byte=byte))
            self._break(Place(byte=byte))

    def _break(self, place: Place) -> None:
        breaks = self._fault.breaks
        if breaks and breaks.place == place and (self._streams or breaks.how is not How.END):
            raise _BrokenOff(breaks.how)

    async def _stall(self, place: Place) -> None:
        for stall in self._fault.stalls:
            if stall.place == place:
                with suppress(TimeoutError):
                    async with asyncio.timeout(stall.seconds):
                        await self._wait_for_resume(
                            stall.comment_seconds if self._streams and self._begun else None
                        )

    async def _wait_for_resume(self, comment_seconds: float | None) -> None:
        with self._engine._counted_as_stalled() as resumed:
            while not resumed.is_set():
                try:
                    async with asyncio.timeout(comment_seconds):
                        await resumed.wait()
                except TimeoutError:
                    await self._send(b": keepalive\n\n")


# The engine .....................................................................................


@dataclass(kw_only=True, eq=False)
class FakeEngine:
    """An engine on a real port, in the loop of the test, for the length of an `async with`.

    Its options may be changed while it runs and count from the next request on. Leaving the block raises
    what broke inside the fake itself: a bug in here may not pass for a fault of the script.
    """

    models: tuple[str, ...] = ("fake",)
    any_model: bool = False
    """Answers to every model name, as llama.cpp does; False: 404 for one that it has not, as vLLM does."""
    tokens: int = 16
    """Tokens of a whole answer; it ends with `stop` there, and with `length` where max_tokens is less."""
    first_token_seconds: float = 0.0
    token_seconds: float = 0.0
    slots: int = 4
    """Requests that it works on at once; the others wait in its own line. Fixed while it runs."""
    context_tokens: int | None = None
    """Told by /v1/models; a prompt with more is refused with 400. None: not told, no limit."""
    sends_usage: bool = True
    continues: Continues = Continues.ALWAYS
    """In chat. In completions every engine does."""
    spelling: Spelling = Spelling.SPACE_BEFORE
    trims: bool = False
    """An answer that is to be continued is taken without the space at its end (chat templates do), and that
    space is said again."""
    swallows_space: bool = False
    """What it says first in a continuation has no space before it, as if the beginning had ended with one."""
    owned_by: str | None = "fake"
    """What /v1/models says of the owner, by which engines are told apart; None: nothing (mlx_lm)."""
    shows_slots: bool = False
    """/slots tells which are at work (llama.cpp)."""
    keepalive_seconds: float | None = None
    """How often a stream has a comment while the prompt is read (mlx_lm)."""
    agent_id: str | None = None
    """Plays an agent of this id too: answers only to balancers that it has met, reports each second, and is
    heard by its balancer to fall silent. It speaks no TLS."""
    http_1_0: bool = False
    """Speaks HTTP/1.0: a stream ends with the connection, none is kept alive (mlx_lm)."""
    close_after_stream: bool = False
    """Says `Keep-Alive` and closes the connection when a stream ended (llama.cpp)."""
    notices_leaving: bool = True
    """Stops when its client leaves. False: it works on for nobody, and keeps the slot so long."""
    loading: bool = False
    """503 on /health and for inference, as llama.cpp answers while it loads a model."""
    loads: dict[str, float] = field(default_factory=dict)
    """Models that are on its disk only, with the seconds that loading each takes, as it says. Who asks for
    one waits until `has_loaded` is called, or is told at once that it takes too long (`X-LLM-Wait`)."""
    progress: float | None = None
    """Of a model that is being loaded, the share that is done, as it says."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: one that is free; `url` tells which."""
    on_death: Callable[[], None] | None = None
    """What `Fault.die` does; None: `die`."""

    requests: deque[Request] = field(init=False, default_factory=lambda: deque(maxlen=REQUESTS_KEPT))
    """The inference requests in the order of their arrival (the last `REQUESTS_KEPT`)."""
    probes: deque[Request] = field(init=False, default_factory=lambda: deque(maxlen=REQUESTS_KEPT))
    """All other requests: health, models, paths that do not exist."""
    running: int = field(init=False, default=0)
    """Requests in a slot now."""
    waiting: int = field(init=False, default=0)
    """Requests in the engine's own line now."""
    peak: int = field(init=False, default=0)
    """The most requests that were open at one moment: above `slots`, somebody sent too many."""
    loading_models: set[str] = field(init=False, default_factory=set)
    """Those of `loads` that somebody has asked for."""
    stalling: int = field(init=False, default=0)
    """Requests that stand at a `Fault.stall` now."""
    connections: int = field(init=False, default=0)
    """How many were ever made to it."""
    open: int = field(init=False, default=0)
    """Inference requests that have arrived and not ended, those with a scripted error included."""
    gate: AgentGate | None = field(init=False, default=None)
    """An agent's. What is refused there has not arrived."""

    def __post_init__(self) -> None:
        if self.agent_id is not None:
            self.gate = AgentGate(self.agent_id)
        self._arrived = 0
        self._script: deque[tuple[When, Fault]] = deque()
        self._always: list[tuple[When, Fault]] = []
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._bugs: list[BaseException] = []
        self._change = asyncio.Event()
        self._resumed = asyncio.Event()
        self._room = asyncio.Semaphore(self.slots)
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None

    # ... for tests: where it is, what goes wrong, what came

    @property
    def url(self) -> str:
        """`http://host:port`, without a path."""
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> FakeEngine:
        await self.listen()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        tasks = list(self._connections.values())
        self.die()
        if self._reserved:
            self._reserved.close()
            self._reserved = None
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._bugs and kind is None:
            raise BaseExceptionGroup("the fake engine itself broke", self._bugs)

    def script(self, *faults: Fault, when: When = _inference) -> None:
        """Appends what becomes of the next requests, one fault each; after them all is well (or `always`).

        With `when`, the first request that meets the condition takes the fault.
        """
        self._script.extend((when, fault) for fault in faults)

    def always(self, fault: Fault, *, when: When = _inference) -> None:
        """What becomes of every request that the script leaves alone. `always(OK)` ends it."""
        self._always.insert(0, (when, fault))

    def calm(self) -> None:
        """Nothing goes wrong with requests that come from now on, whatever was scripted."""
        self._script.clear()
        self._always.clear()

    async def seen(self, number: int, *, within: float = WAIT_SECONDS) -> Request:
        """Waits for the `number`-th inference request (from 1) and gives it. Raises TimeoutError."""
        await self.until(lambda: self._arrived >= number, f"{number} requests", within=within)
        return self.requests[number - 1 - (self._arrived - len(self.requests))]

    async def stalled(self, number: int = 1, *, within: float = WAIT_SECONDS) -> None:
        """Waits until so many requests stand at a `Fault.stall`. Raises TimeoutError."""
        await self.until(lambda: self.stalling >= number, f"{number} stalled", within=within)

    async def idle(self, *, within: float = WAIT_SECONDS) -> None:
        """Waits until no inference request is open (which it is too before one came). Raises TimeoutError."""
        await self.until(lambda: self.open == 0, "idle", within=within)

    async def until(
        self, true: Callable[[], bool], what: str = "it", *, within: float = WAIT_SECONDS
    ) -> None:
        """Waits until this holds, looking whenever anything changed here. Raises TimeoutError."""
        try:
            async with asyncio.timeout(within):
                while not true():
                    await self._change.wait()
        except TimeoutError:
            raise TimeoutError(
                f"waited {within} s for {what}: {self._arrived} requests came, {self.running} run, "
                f"{self.waiting} wait, {self.stalling} stall"
            ) from None

    def resume(self) -> None:
        """Lets every request that stands at a `Fault.stall` go on."""
        self._resumed.set()
        self._resumed = asyncio.Event()

    def has_loaded(self, name: str) -> None:
        """The model is there: who waits for it is answered, and an agent's next report says so."""
        self.loads.pop(name, None)
        self.loading_models.discard(name)
        self._changed()

    def refuse(self) -> None:
        """Stops listening and closes idle connections: new ones are refused. What runs goes on."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._reserved = self._bind()  # bound, not listening: nobody else gets the port
        for connection in list(self._connections):
            if not connection.busy:
                connection.drop(How.CLOSE)

    def die(self) -> None:
        """Refuses, and drops every connection, as if the process had been killed. `listen` revives it."""
        self.refuse()
        if self.gate is not None:
            self.gate.forget()
        for connection in list(self._connections):
            connection.drop(How.DIE)

    async def listen(self) -> None:
        """Listens (again), on the port that it always had."""
        if self._server is None:
            self._reserved = self._reserved or self._bind()
            self.port = self._reserved.getsockname()[1]
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: _Connection(self), sock=self._reserved, backlog=1024
            )
            self._reserved = None

    # ... for connections and answers

    def _bind(self) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((self.host, self.port))
        return bound

    def _welcome(self, connection: _Connection) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._connections[connection] = task  # kept until it is done, whichever way
        task.add_done_callback(lambda _: self._part_from(connection))

    def _farewell(self, connection: _Connection) -> None:
        """The connection is lost. Whatever was done for it ends at once (or, if so configured, does not)."""
        task = self._connections.get(connection)
        if task and (not connection.busy or connection.dropped or self.notices_leaving):
            task.cancel()

    def _part_from(self, connection: _Connection) -> None:
        task = self._connections.pop(connection)
        if not task.cancelled() and (bug := task.exception()):
            self._bugs.append(bug)
            connection.drop(How.CLOSE)

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    @contextmanager
    def _counted_as_stalled(self) -> Iterator[asyncio.Event]:
        self.stalling += 1
        self._changed()
        try:
            yield self._resumed
        finally:
            self.stalling -= 1
            self._changed()

    async def _converse(self, connection: _Connection) -> None:
        """Answers the requests of one connection, one after the other."""
        while (request := await connection.receive(asyncio.get_running_loop().time)) is not None:
            connection.busy = True
            try:
                if not await self._attend(connection, request):
                    connection.drop(How.CLOSE)
            finally:
                connection.busy = False

    async def _attend(self, connection: _Connection, request: Request) -> bool:
        """One request, from its arrival to its outcome. False: the connection ends with it."""
        if self.gate is not None and (told := _at_the_gate(self.gate, request)) is not None:
            answer = _Answer(self, connection, request)
            await answer.whole(told[1], status=told[0])
            return answer.keeps_alive
        (self.requests if request.is_inference else self.probes).append(request)
        request.fault = self._next_fault(request)
        self._arrived += request.is_inference
        self.open += request.is_inference
        self.peak = max(self.peak, self.open)
        self._changed()
        try:
            keeps_alive = await self._answer(connection, request)
            # Before anything is awaited, or a client that has all it wanted could "leave" meanwhile.
            request.outcome = Outcome.CLIENT_LEFT if connection.left else Outcome.COMPLETED
            return keeps_alive
        except _BrokenOff as broken:
            request.outcome = Outcome.BROKEN
            if broken.how is How.DIE:
                (self.on_death or self.die)()
            else:
                connection.drop(broken.how)
            return False
        finally:
            if request.outcome is None:
                request.outcome = Outcome.CLIENT_LEFT if connection.left else Outcome.BROKEN
            request.ended = asyncio.get_running_loop().time()
            self.open -= request.is_inference
            self._changed()

    async def _answer(self, connection: _Connection, request: Request) -> bool:
        """Sends the answer, right or wrong. False: the connection ends with it."""
        answer = _Answer(self, connection, request)
        try:
            if request.fault.reply:
                await answer.before_head()
                await answer.whole(request.fault.reply.body, status=request.fault.reply.status)
            elif request.path == wire.REPORT_PATH and self.agent_id is not None:
                await answer.before_head()
                await self._report(answer)
            elif not request.is_inference:
                told = self._told(request.path)
                await answer.before_head()
                await answer.whole(told)
            elif await self._is_too_slow_to_load(request):
                await answer.whole(self._loading_body(request), status=503)
            elif request.path == "/v1/embeddings":
                await self._embed(answer, request.body, self._model_for(request))
            else:
                await self._generate(answer, request, self._model_for(request))
        except _Refused as refused:
            await answer.whole(error_body(refused.status, str(refused)), status=refused.status)
        except _BrokenOff as broken:
            if broken.how is not How.END:
                raise
            await answer.close_stream()
        return answer.keeps_alive

    def _next_fault(self, request: Request) -> Fault:
        for index, (when, fault) in enumerate(self._script):
            if when(request):
                del self._script[index]
                return fault
        return next((fault for when, fault in self._always if when(request)), OK)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self._changed()
        try:
            yield
        finally:
            self.running -= 1
            self._room.release()

    async def _is_too_slow_to_load(self, request: Request) -> bool:
        """The model will not be there before its asker has waited for long enough. Else it is there now."""
        name = request.body.get("model")
        if name not in self.loads:
            return False
        self.loading_models.add(name)
        self._changed()
        if self.loads[name] > float(request.headers.get(WAIT_HEADER, "inf")):
            return True
        while name in self.loads:
            await self._change.wait()
        return False

    def _loading_body(self, request: Request) -> bytes:
        eta = self.loads[request.body["model"]]
        told = {"worker": self.agent_id, "progress": self.progress, "eta_seconds": eta}
        error = {"message": "it is being loaded", "type": "server_error", "code": "model_loading"}
        return orjson.dumps({"error": error | {"param": None, "loading": told}})

    # ... what it says of itself

    def _told(self, path: str) -> bytes:
        match path:
            case "/health" | "/v1/health" if self.loading:
                raise _Refused(503, "Loading model")
            case "/health" | "/v1/health":
                return orjson.dumps({"status": "ok"})
            case "/v1/models":
                return orjson.dumps(
                    {"object": "list", "data": [self._model_card(name) for name in self.models]}
                )
            case "/slots" if self.shows_slots:
                return orjson.dumps(
                    [{"id": slot, "is_processing": slot < self.running} for slot in range(self.slots)]
                )
            case "/api/tags":
                return orjson.dumps({"models": [_ollama_card(name) for name in self.models]})
            case "/api/version":
                return orjson.dumps({"version": "0.12.0"})
        raise _Refused(404, f"there is no {path}")

    async def _report(self, answer: _Answer) -> None:
        """For as long as somebody listens."""
        await answer.open_stream()
        while True:
            report = wire.Report(
                id=self.agent_id or "",
                state=wire.EngineState.STARTING if self.loading else wire.EngineState.READY,
                engine="fake",
                models=tuple(
                    wire.ServedModel(
                        name=name, paths=INFERENCE_PATHS, **self._served_as_well(), **self._standing(name)
                    )
                    for name in self.models
                ),
                slots=self.slots,
                running=self.open,
            )
            await answer.event(report.to_line())
            told = dict(self.loads), set(self.loading_models), self.progress
            for _ in range(round(wire.REPORT_INTERVAL_SECONDS / wire.REPORT_GAP_SECONDS)):
                await asyncio.sleep(wire.REPORT_GAP_SECONDS)
                if told != (self.loads, self.loading_models, self.progress):
                    break

    def _standing(self, name: str) -> Json:
        """How far a model is loaded, as an agent tells it."""
        if name not in self.loads:
            return {}
        if name not in self.loading_models:
            return {"state": wire.ModelState.UNLOADED, "load_seconds": self.loads[name]}
        loading = {"state": wire.ModelState.LOADING, "eta_seconds": self.loads[name]}
        return loading | {"progress": self.progress}

    def _served_as_well(self) -> Json:
        """What an agent says of continuing, where the contract has a word for it."""
        if "continues" not in wire.ServedModel.model_fields:
            return {}
        return {"continues": self.continues is not Continues.NEVER}

    def _model_card(self, name: str) -> Json:
        card: Json = {"id": name, "object": "model", "created": CREATED}
        if self.owned_by is not None:
            card["owned_by"] = self.owned_by
        if self.context_tokens is not None:  # as vLLM and as llama.cpp tell it
            card |= {"max_model_len": self.context_tokens, "meta": {"n_ctx": self.context_tokens}}
        return card

    # ... and what it is for

    def _model_for(self, request: Request) -> str:
        """The name under which the request is answered, if it is one that a sane engine would answer."""
        if request.method != "POST":
            raise _Refused(405, f"{request.path} wants POST")
        if self.loading:
            raise _Refused(503, "Loading model")
        if not request.body:
            raise _Refused(400, "the body is not a JSON object")
        name = request.body.get("model", self.models[0])
        if name not in self.models and not self.any_model:
            raise _Refused(404, f"the model {name!r} does not exist")
        return str(name)

    async def _embed(self, answer: _Answer, body: Json, model: str) -> None:
        wanted = body.get("input")
        texts = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise _Refused(400, "input: a text or a list of texts is wanted")
        in_base64 = body.get("encoding_format") == "base64"
        vectors = [reference_embedding(text) for text in texts]
        prompt_tokens = sum(_tokens_in(text) for text in texts)
        async with self._slot():
            await answer.before_head()
            await asyncio.sleep(self.first_token_seconds)
            told: Json = {
                "object": "list",
                "model": model,
                "data": [
                    {
                        "object": "embedding",
                        "index": index,
                        "embedding": _base64(vector) if in_base64 else vector,
                    }
                    for index, vector in enumerate(vectors)
                ],
            }
            if self.sends_usage:
                told["usage"] = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
            await answer.whole(orjson.dumps(told))

    async def _generate(self, answer: _Answer, request: Request, model: str) -> None:
        form, prompt = _asked(request)
        speech = self._begun_or_new(request, prompt)
        # What was said already is a part of the prompt.
        asked = prompt[:-1] if speech.said and not isinstance(prompt, str) else prompt
        prompt_tokens = _tokens_in(flat(asked)) + (speech.said if asked is not prompt else 0)
        if self.context_tokens is not None and prompt_tokens > self.context_tokens:
            raise _Refused(400, f"the prompt has {prompt_tokens} tokens, the context {self.context_tokens}")
        left = speech.left(self.tokens)
        allowed = min(left, _max_tokens(request.body, default=left))
        words = speech.tokens() if request.fault.never_stops else islice(speech.tokens(self.tokens), allowed)
        if speech.said and self.swallows_space:
            words = (word.lstrip(" ") if number == 0 else word for number, word in enumerate(words))
        head: Json = {"id": f"{form.id_prefix}{self._arrived:08}", "created": CREATED, "model": model}
        head |= {key: value for key, value in request.fault.claims if key != "usage"}
        finish = "length" if allowed < left else "stop"
        async with self._slot():
            await answer.before_head()
            if request.body.get("stream") is True:
                options = request.body.get("stream_options")
                asks_usage = isinstance(options, dict) and options.get("include_usage") is True
                with_usage = self.sends_usage and asks_usage
                head |= {"object": form.chunk_object} | ({"usage": None} if with_usage else {})
                await self._stream(answer, words, form, head, finish, prompt_tokens, request.fault)
            else:
                texts = [text async for text in self._spoken(answer, words)]
                choice = form.whole("".join(texts)) | {"index": 0, "logprobs": None, "finish_reason": finish}
                head |= {"object": form.object, "choices": [choice]}
                if self.sends_usage:
                    head["usage"] = _usage(prompt_tokens, len(texts), request.fault)
                await answer.whole(orjson.dumps(head))

    def _begun_or_new(self, request: Request, prompt: Prompt) -> Utterance:
        if isinstance(prompt, str):
            return Utterance.of_completion(prompt, self.spelling)
        flagged = request.body.get("continue_final_message") is True
        if (
            self.continues is Continues.BY_FLAGS
            and flagged
            and request.body.get("add_generation_prompt", True)
        ):
            raise _Refused(400, "cannot set both continue_final_message and add_generation_prompt to true")
        continues = {
            Continues.ALWAYS: True,
            Continues.BY_FLAGS: flagged,
            Continues.BY_HEADER: request.headers.get(CONTINUE_HEADER) == "1",
            Continues.NEVER: False,
        }[self.continues]
        return Utterance.of_chat(prompt, continues, self.spelling, self.trims)

    async def _stream(
        self,
        answer: _Answer,
        words: Iterator[str],
        form: _Form,
        head: Json,
        finish: str,
        prompt_tokens: int,
        fault: Fault,
    ) -> None:
        def chunk(piece: Json, finish_reason: str | None = None) -> Json:
            return head | {
                "choices": [piece | {"index": 0, "logprobs": None, "finish_reason": finish_reason}]
            }

        await answer.open_stream()
        if form.opening:
            await answer.event(chunk(form.opening))
        tokens = 0
        async for text in self._spoken(answer, words):
            await answer.event(chunk(form.piece(text)))
            tokens += 1
        await answer.part(Part.FINISH, chunk(form.closing, finish))
        if "usage" in head:
            usage = _usage(prompt_tokens, tokens, fault)
            await answer.part(Part.USAGE, head | {"choices": [], "usage": usage})
        await answer.part(Part.DONE, DONE_EVENT)
        await answer.close_stream()

    async def _spoken(self, answer: _Answer, words: Iterator[str]) -> AsyncIterator[str]:
        """The tokens at their pace. What the script has for a place happens once its token was taken."""
        await answer.at_token(0)
        for number, text in enumerate(words, 1):
            if number == 1:
                await answer.while_reading(self.first_token_seconds)
            else:
                await asyncio.sleep(self.token_seconds)
            yield text
            await answer.at_token(number)


# The options in which well-known engines differ.
LLAMA_CPP: Json = {
    "owned_by": "llamacpp",
    "any_model": True,
    "close_after_stream": True,
    "shows_slots": True,
    "continues": Continues.ALWAYS,
}
VLLM: Json = {"owned_by": "vllm", "continues": Continues.BY_FLAGS}
MLX: Json = {
    "owned_by": None,
    "http_1_0": True,
    "keepalive_seconds": 0.05,
    "continues": Continues.NEVER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How one of the two kinds of generation looks in JSON."""

    id_prefix: str
    object: str
    chunk_object: str
    opening: Json
    """What the first event of a stream says; empty: there is no such event."""
    closing: Json
    piece: Callable[[str], Json]
    whole: Callable[[str], Json]


_CHAT = _Form(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    piece=lambda text: {"delta": {"content": text}},
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
)
_COMPLETION = _Form(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    opening={},
    closing={"text": ""},
    piece=lambda text: {"text": text},
    whole=lambda text: {"text": text},
)


def _at_the_gate(gate: AgentGate, request: Request) -> tuple[int, bytes] | None:
    """Status and body of what the gate says; None: it may pass."""
    if request.path in PATHS:
        return gate.answer(request.path, request.raw)
    return None if gate.has_met(request.headers.get(wire.SESSION_HEADER.lower())) else gate.unknown()


def _asked(request: Request) -> tuple[_Form, Prompt]:
    if request.path == "/v1/completions":
        prompt = request.body.get("prompt")
        if not isinstance(prompt, str):
            raise _Refused(400, "prompt: a text is wanted")
        return _COMPLETION, prompt
    messages = request.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refused(400, "messages: a list with at least one message is wanted")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise _Refused(400, "messages: each has a role")
    return _CHAT, messages


def _max_tokens(body: Json, default: int) -> int:
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit is None:
        return default
    if not isinstance(limit, int) or limit < 1:
        raise _Refused(400, "max_tokens: a whole number from 1 is wanted")
    return limit


def _tokens_in(text: str) -> int:
    return len(text.split())


def _usage(prompt_tokens: int, completion_tokens: int, fault: Fault) -> Json:
    claimed = dict(fault.claims).get("usage")
    return claimed or {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _ollama_card(name: str) -> Json:
    return {
        "name": name,
        "model": name,
        "modified_at": "2025-01-01T00:00:00Z",
        "size": 1,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": {"format": "gguf", "family": "fake", "parameter_size": "1B", "quantization_level": "Q4_1"},
    }


# As a process ...................................................................................


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A fake engine that can really be killed."""

    url: str
    process: asyncio.subprocess.Process


@asynccontextmanager
async def engine_process(*arguments: str) -> AsyncIterator[EngineProcess]:
    """`python -m tests.fakes.engine` with these arguments, ready to be asked; killed on leaving."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __spec__.name, *arguments, stdout=asyncio.subprocess.PIPE, cwd=_CHECKOUT
    )
    assert process.stdout
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            url = (await process.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError(f"the fake engine did not start: exit status {await process.wait()}")
        yield EngineProcess(url, process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


_CHECKOUT = Path(__file__).parents[2]


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fakes.engine", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free; the first line tells which")
    parser.add_argument("--model", action="append", help="may be given more than once")
    parser.add_argument("--any-model", action="store_true", help="answer to every model name")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--first-token-seconds", type=float, default=0.0)
    parser.add_argument("--token-seconds", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context-tokens", type=int)
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--http-1-0", action="store_true")
    parser.add_argument("--close-after-stream", action="store_true")
    parser.add_argument("--owned-by", default="fake")
    parser.add_argument("--agent-id", help="report like an agent of this id")
    parser.add_argument("--continues", type=Continues, choices=list(Continues), default=Continues.ALWAYS)
    parser.add_argument("--ignores-leaving", action="store_true", help="work on for clients that left")
    parser.add_argument("--loading-seconds", type=float, default=0.0, help="so long 503 after the start")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument(
        "--fault", type=Fault.parse, action="append", default=[], help="of the next request: stall:at_token=3"
    )
    parser.add_argument("--always", type=Fault.parse, default=OK, help="of every request after those")
    parser.add_argument("--dies-of", metavar="TEXT", help="exit with 1 at a request that has it in its body")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> None:
    engine = FakeEngine(
        models=tuple(options.model or ("fake",)),
        any_model=options.any_model,
        tokens=options.tokens,
        first_token_seconds=options.first_token_seconds,
        token_seconds=options.token_seconds,
        slots=options.slots,
        context_tokens=options.context_tokens,
        sends_usage=not options.no_usage,
        http_1_0=options.http_1_0,
        close_after_stream=options.close_after_stream,
        owned_by=options.owned_by,
        agent_id=options.agent_id,
        continues=options.continues,
        notices_leaving=not options.ignores_leaving,
        shows_slots=True,
        loading=options.loading_seconds > 0,
        host=options.host,
        port=options.port,
        on_death=lambda: os._exit(1),
    )
    engine.always(options.always)
    if options.dies_of is not None:
        poison = options.dies_of.encode()
        engine.always(Fault.die(at_token=0), when=lambda request: poison in request.raw)
    engine.script(*options.fault)
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, told_to_stop.set)
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if options.ignore_sigterm else told_to_stop.set)
    loop.call_later(options.loading_seconds, setattr, engine, "loading", False)
    async with engine:
        sys.stdout.write(f"{engine.url}\n")
        sys.stdout.flush()
        await told_to_stop.wait()


if __name__ == "__main__":
    asyncio.run(_run(_parse_arguments(sys.argv[1:])))
