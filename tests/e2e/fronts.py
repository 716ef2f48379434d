"""The HTTP server towards clients with a fake behind it in place of the journey, and raw bytes in front."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Never, cast

from aiohttp import web

from balancer.admin import Admin, Configuration, Levers, Membership
from balancer.admin_door import AdminDoor
from balancer.batch.presets import Shelf
from balancer.core.dispatcher import Snapshot
from balancer.core.errors import BadRequest
from balancer.fleet_models import FleetModels
from balancer.front import Front, FrontPolicy
from balancer.hot_path import HttpServer, ServerPolicy
from balancer.inference import Admitted, Client, Head, Inference, InferencePolicy
from balancer.keys import AdminKey
from balancer.origins import OriginPolicy, Origins
from worker_agent.wire import Join

WAIT_SECONDS = 20.0


@dataclass
class Asked:
    """What reached the fake."""

    path: str
    body: bytes
    headers: dict[str, str]


class FakeInference(Inference):
    """Admits as the real one does, and answers with the digest of the body; or as `script` says."""

    def __init__(self, policy: InferencePolicy) -> None:
        self.policy = policy
        self.access = None
        self.draining = False
        self._sources = {}
        self.asked: list[Asked] = []
        self.cancelled = 0
        self.script: Callable[[Asked, Client], object] | None = None

    async def answer(self, admitted: Admitted, body: bytes, client: Client) -> None:
        asked = Asked(admitted.head.endpoint.value, body, dict(admitted.head.headers))
        self.asked.append(asked)
        try:
            if self.script is not None:
                await self.script(asked, client)
                return
            if body.startswith(b"refuse"):
                raise BadRequest("refused")
            answer = json.dumps({"digest": hashlib.sha256(body).hexdigest(), "size": len(body)}).encode()
            client.begin(200, {"Content-Type": "application/json"}, len(answer))
            client.write(answer)
            client.end()
        except BadRequest as error:
            client.begin(400, {"Content-Type": "application/json"}, len(error.message))
            client.write(error.message.encode())
            client.end()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def note(self, head: Head, refusal: Exception) -> None:
        pass


@dataclass
class Served:
    """A server that runs, and what stands behind it."""

    server: HttpServer
    inference: FakeInference
    port: int
    opened: list[asyncio.StreamWriter] = field(default_factory=list)
    is_secure: bool = False

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=2**20, ssl=_trusting_all() if self.is_secure else None
        )
        self.opened.append(writer)
        return reader, writer

    async def connect_and_send(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        writer.write(data)
        return reader, writer

    async def exchange(self, *pieces: bytes) -> bytes:
        """All that is answered until the connection is closed, to bytes sent in these pieces; the client
        leaves its half open."""
        reader, writer = await self.connect()
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_SECONDS):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                await asyncio.sleep(0.005)


def _trusting_all() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def unreachable(*_: object) -> Never:
    raise AssertionError("a route beside inference was called")


@asynccontextmanager
async def serving(
    policy: ServerPolicy,
    inference_policy: InferencePolicy | None = None,
    body_seconds: float = 30.0,
    snapshot: Callable[[], Snapshot] = unreachable,
    join: Callable[[Join, str], None] = unreachable,
    tls: ssl.SSLContext | None = None,
    slow_reader_seconds: float = 60.0,
) -> AsyncIterator[Served]:
    inference = FakeInference(inference_policy or InferencePolicy())
    clock = asyncio.get_running_loop().time
    front = Front(
        inference,
        FrontPolicy(body_seconds=body_seconds, slow_reader_seconds=slow_reader_seconds),
        snapshot=snapshot,
        join=join,
        metrics=None,
        admin=Admin(
            AdminDoor(AdminKey("the admin key of this test", clock), clock),
            Levers(
                snapshot=snapshot,
                drain=unreachable,
                membership=cast(Membership, None),
                models=cast(FleetModels, None),
                find=unreachable,
                shelf=cast(Shelf, None),
                configuration=cast(Configuration, None),
            ),
        ).application(),
    )
    application: web.Application = front.application()
    async with HttpServer(inference, application, Origins(OriginPolicy()), policy, tls) as server:
        served = Served(server, inference, await server.listen("127.0.0.1", 0), is_secure=tls is not None)
        try:
            yield served
        finally:
            for writer in served.opened:
                writer.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def answers(data: bytes) -> list[Answer]:
    """The answers in what a connection gave; an unfinished one raises `ValueError`."""
    found = []
    while data:
        head, gap, data = data.partition(b"\r\n\r\n")
        if not gap:
            raise ValueError(f"no whole head: {head[:200]!r}")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                size, _, data = data.partition(b"\r\n")
                count = int(size, 16)
                body, data = body + data[:count], data[count + 2 :]
                if not count:
                    break
        else:
            count = int(headers.get("content-length", "0"))
            if len(data) < count:
                raise ValueError("a body is shorter than announced")
            body, data = data[:count], data[count:]
        status = int(first.split(" ")[1])
        if status >= 200:
            found.append(Answer(status, headers, body))
    return found


def post(
    body: bytes = b"{}",
    *lines: str,
    path: str = "/v1/chat/completions",
    host: str = "Host: localhost",
    kind: str = "Content-Type: application/json",
    length: str | None = None,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request as bytes; `lines`: further headers. Empty strings leave a header out."""
    size = f"Content-Length: {len(body)}" if length is None else length
    head = [f"POST {path} {version}", *(line for line in (host, kind, *lines, size) if line)]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


CLOSE = "Connection: close"
