"""The door of an agent, and what comes back to a balancer that knocks at one."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from aiohttp import web

from balancer.meeting import NotMet, greeted, is_session_unknown, proof_of, session_of
from balancer.pins import Pins
from balancer.upstream import Answer
from tests.fuzz.connections import TURNS, Wire, turn
from tests.fuzz.mutation import cuts
from tests.fuzz.target import Target, looped, pure
from worker_agent import handshake, wire
from worker_agent.changes import Changes
from worker_agent.cluster_key import ClusterKey
from worker_agent.gate import Gate
from worker_agent.gateway import Gateway
from worker_agent.server import ServerPolicy, _Connection
from worker_agent.wire import EngineState, Report

FINGERPRINT = "ab" * 32
KEY = "the-key-that-is-nowhere-in-the-corpus"
_STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)


class _Nothing:
    """An agent's models, none of which can be reached without a session."""

    names: tuple[str, ...] = ()
    running = 0

    def knows(self, name: str) -> bool:
        raise AssertionError("a stranger got through the gate")

    plan = resident = entered = knows

    def drain(self) -> None: ...

    def stop_all(self, fault: object) -> None: ...

    def cut_all(self) -> None: ...


@dataclass
class _Agent:
    server: web.Server
    gate: Gate


@asynccontextmanager
async def _agent() -> AsyncIterator[_Agent]:
    def report() -> Report:
        return Report(id="a", state=EngineState.READY, engine="llama.cpp", slots=1)

    gate = Gate("a", ClusterKey(KEY, None), FINGERPRINT)
    gateway = Gateway(_Nothing(), report, Changes(), gate)
    runner = web.AppRunner(gateway.application(), handler_cancellation=True)
    await runner.setup()
    assert runner.server is not None
    try:
        yield _Agent(runner.server, gate)
    finally:
        await runner.cleanup()


async def door(agent: _Agent, data: bytes) -> None:
    """Nobody gets in, whatever they send; what is answered is a refusal, a hello or the bare state."""
    connection = Wire(_Connection(agent.server, ServerPolicy(), lambda: None, dialled=False))
    for piece in cuts(data):
        connection.feed(piece)
    await turn()
    connection.cut()
    await turn(TURNS)
    answered = bytes(connection.written)
    statuses = {int(status) for status in _STATUS.findall(answered)}
    assert all(status < 500 for status in statuses), statuses
    for secret in (KEY, FINGERPRINT, "llama.cpp"):
        assert secret.encode() not in answered
    assert len(agent.gate._sessions) == 0


HELLO = wire.Hello(balancer="b", nonce="n" * 32)


def greeting(data: bytes) -> None:
    """What anybody may answer to a hello: a transcript with what it said, or a sentence."""
    status, body = (200, 403, 401, 500)[data[0] % 4] if data else 200, data[1:]
    answer = Answer(status, {}, body, FINGERPRINT)
    is_session_unknown(status, body)
    try:
        greeting = greeted(HELLO, answer)
    except NotMet as error:
        assert str(error).isprintable(), error
        return
    assert greeting.transcript.fingerprint == FINGERPRINT
    proof_of(greeting.transcript, handshake.key_bytes(KEY))


def proven(data: bytes) -> None:
    """And to a proof: never a session."""
    status, body = (200, 403, 401, 500)[data[0] % 4] if data else 200, data[1:]
    said = handshake.Transcript("b", "a", "n" * 32, "m" * 32, FINGERPRINT, wire.WIRE_VERSION)
    try:
        session_of(said, handshake.key_bytes(KEY), Answer(status, {}, body, FINGERPRINT))
    except NotMet as error:
        assert str(error).isprintable(), error
    else:
        raise AssertionError("a session out of nothing")


def pins(data: bytes) -> None:
    """The file of those that were met, however it was broken."""
    with suppress(ValueError):
        known = Pins.from_json(data)
        assert Pins.from_json(known.to_json()).all() == known.all()


TARGETS = (
    Target(
        "door",
        looped(_agent, door),
        (
            *(
                b"POST /agent/v1/hello HTTP/1.1\r\n",
                b"POST /agent/v1/prove HTTP/1.1\r\n",
                b"GET /health HTTP/1.1\r\n",
            ),
            *(
                b"Host: localhost\r\n",
                b"X-Cluster-Session: \r\n",
                b"X-Cluster-Session: " + b"0" * 64 + b"\r\n",
            ),
            *(
                b"Content-Length: 2\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"/agent/v1/cluster-key",
                b"/v1/embeddings",
            ),
            *(
                b"/agent/v1/report",
                b"/agent/v1/models",
                b"/%2e%2e/",
                b"//",
                b"HEAD ",
                b"OPTIONS ",
                b"\r\n\r\n",
            ),
            *(
                b'{"wire":2,"balancer":"b","nonce":"' + b"n" * 32 + b'"}',
                b"Connection: close\r\n",
                b"Expect: 100-continue\r\n",
            ),
        ),
        is_slow=True,
    ),
    Target(
        "greeting",
        pure(greeting),
        (b'"wire":2', b'"id":"a"', b'"nonce":"', b'"by":"code"', b'"by":"key"', b"n" * 32),
    ),
    Target(
        "proven",
        pure(proven),
        (b'{"proof":"', b"0" * 64, b'"error"', b'"code":"cluster_key_wrong"', b'"message"'),
    ),
    Target("pins", pure(pins), (b'"version":1', b'"agents":{', b'"a":"' + b"0" * 64 + b'"', b'"":"x"')),
)
