"""A balancer's half of the handshake, as the agent's tests need it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import secrets
import socket
import ssl
from asyncio import sslproto
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import aiohttp
import orjson
from aiohttp import web
from pydantic import BaseModel

from worker_agent import handshake, wire
from worker_agent.certificate import fingerprint_of
from worker_agent.cluster_key import ClusterKey
from worker_agent.gate import Gate, GatePolicy
from worker_agent.handshake import PLAIN, Role, Transcript

KEY = "0123456789abcdef-the-cluster-key"
AGENT = "studio-3fa9"
BALANCER = "balancer-77aa"


def gate_with(key: str | None = KEY, policy: GatePolicy | None = None) -> Gate:
    """One that keeps nothing on the disk."""
    return Gate(AGENT, ClusterKey(key, None), PLAIN, policy)


class OpenGate(Gate):
    """Lets everybody in: for tests of what is behind it."""

    def __init__(self) -> None:
        super().__init__(AGENT, ClusterKey(KEY, None))

    def has_met(self, request: web.Request) -> bool:
        return True


@dataclass
class Met:
    """A balancer that talks to one agent."""

    client: aiohttp.ClientSession
    url: str
    key: bytes
    fingerprint: str = PLAIN
    balancer: str = BALANCER
    session: str = ""
    agent: str = AGENT
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    async def post(self, path: str, body: bytes, session: str = "") -> tuple[int, dict[str, object]]:
        headers = {wire.SESSION_HEADER: session} if session else {}
        async with self.client.post(self.url + path, data=body, headers=headers, ssl=False) as answer:
            data = await answer.read()
            return answer.status, orjson.loads(data) if data else {}

    async def hello(self) -> wire.HelloAnswer:
        said = wire.Hello(balancer=self.balancer, nonce=self.nonce).model_dump_json().encode()
        status, answer = await self.post(wire.HELLO_PATH, said)
        assert status == 200, answer
        return wire.HelloAnswer.model_validate(answer)

    def transcript(self, hello: wire.HelloAnswer) -> Transcript:
        return Transcript(
            balancer=self.balancer,
            agent=hello.id,
            balancer_nonce=self.nonce,
            agent_nonce=hello.nonce,
            fingerprint=self.fingerprint,
            wire=wire.WIRE_VERSION,
        )

    async def prove(self, transcript: Transcript, proof: str | None = None) -> tuple[int, dict[str, object]]:
        said = wire.Proof(
            balancer=self.balancer,
            nonce=self.nonce,
            agent_nonce=transcript.agent_nonce,
            proof=proof or transcript.proof(self.key, Role.BALANCER),
        )
        return await self.post(wire.PROVE_PATH, said.model_dump_json().encode())

    async def meet(self) -> str:
        """The session, which the agent has proved to have too."""
        transcript = self.transcript(await self.hello())
        status, answer = await self.prove(transcript)
        assert status == 200, answer
        said = wire.ProofAnswer.model_validate(answer)
        assert handshake.is_proof(transcript, self.key, Role.AGENT, said.proof)
        self.session = transcript.session(self.key)
        return self.session

    @property
    def headers(self) -> dict[str, str]:
        return {wire.SESSION_HEADER: self.session}

    def another(self, balancer: str) -> Met:
        return replace(self, balancer=balancer, session="", nonce=secrets.token_urlsafe(24))


async def met(client: aiohttp.ClientSession, url: str, key: str = KEY, fingerprint: str = PLAIN) -> Met:
    """A balancer that has met the agent at this URL."""
    balancer = Met(client, url, handshake.key_bytes(key), fingerprint)
    await balancer.meet()
    return balancer


_SESSIONS: dict[int, str] = {}


def meet_process(port: int, key: str | bytes = KEY, balancer: str = BALANCER) -> None:
    """Meets the agent that listens there, with TLS; blocking. Clients `within_sessions` come within that."""

    def ask(path: str, message: BaseModel) -> bytes:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=unverified())
        with contextlib.closing(connection):
            connection.request("POST", path, message.model_dump_json())
            return connection.getresponse().read()

    nonce = secrets.token_urlsafe(24)
    hello = wire.parse_hello_answer(ask(wire.HELLO_PATH, wire.Hello(balancer=balancer, nonce=nonce)))
    transcript = Transcript(
        balancer=balancer,
        agent=hello.id,
        balancer_nonce=nonce,
        agent_nonce=hello.nonce,
        fingerprint=fingerprint_at(port),
        wire=wire.WIRE_VERSION,
    )
    secret = handshake.key_bytes(key) if isinstance(key, str) else key
    proof = transcript.proof(secret, Role.BALANCER)
    said = wire.Proof(balancer=balancer, nonce=nonce, agent_nonce=hello.nonce, proof=proof)
    answer = wire.parse_proof_answer(ask(wire.PROVE_PATH, said))
    assert handshake.is_proof(transcript, secret, Role.AGENT, answer.proof)
    _SESSIONS[port] = transcript.session(secret)


async def _within(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    if (session := _SESSIONS.get(request.url.port or 0)) is not None:
        request.headers[wire.SESSION_HEADER] = session
    return await handler(request)


@contextlib.asynccontextmanager
async def within_sessions(seconds: float = 60) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of agents that run as processes and were met; gives up after so long."""
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=seconds),
        connector=aiohttp.TCPConnector(ssl=False),
        middlewares=(_within,),
    ) as session:
        yield session
    await _end_of_connections()


async def _end_of_connections() -> None:
    """Under TLS and with asyncio's own loop a stream that was left says its goodbye after its client was
    closed, for up to 30 s. A loop that ends before that leaves the socket to whichever test comes next."""
    for one in gc.get_objects():
        if isinstance(one, sslproto.SSLProtocol) and not one._server_side and one._transport is not None:
            one._transport.abort()
    await asyncio.sleep(0)  # in which aborted connections are closed


def unverified() -> ssl.SSLContext:
    """Takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def fingerprint_at(port: int) -> str:
    """Of the certificate that is served there."""
    with socket.create_connection(("127.0.0.1", port)) as plain, unverified().wrap_socket(plain) as tls:
        found = tls.getpeercert(binary_form=True)
        assert found is not None
        return fingerprint_of(found)
