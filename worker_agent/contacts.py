"""Reaching other machines for a network doctor: name, connection, who answers, clock. Each within
`CONTACT_SECONDS`, and side by side.

An agent is met as a balancer would meet it, with the cluster key where there is one, by the name `doctor`: it
remembers a session for that name, and nothing else changes.
"""

from __future__ import annotations

import asyncio
import email.utils
import errno
import secrets
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from time import monotonic
from urllib.parse import urlsplit

import aiohttp
import orjson
import psutil

from worker_agent import handshake, wire
from worker_agent.finding import balancer_url
from worker_agent.findings import (
    Announced,
    Contact,
    Interface,
    Known,
    OwnPort,
    PortState,
    Proof,
    Who,
    as_host,
    parsed,
)
from worker_agent.handshake import Role, Transcript
from worker_agent.joining import refusal

CONTACT_SECONDS = 5.0
CONNECT_SECONDS = 2.0
CONNECTS = 5
"""To tell a slow way from a slow moment."""
MOST_TARGETS = 64
_BODY_BYTES = 4 * 1024 * 1024
_NAME = "doctor"
_USUAL = {Who.BALANCER: ("http", 4000), Who.WORKER: ("https", wire.DEFAULT_AGENT_PORT)}
"""What is meant by an address without a scheme."""


class NoAddress(ValueError):
    """What somebody typed is no address; a sentence for the terminal."""


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to be reached."""

    who: Who
    name: str
    host: str
    port: int
    known: Known
    tls: bool = True
    is_agent: bool = True
    """False: a server without an agent, of which only the connection is tried."""
    state: str = ""
    """As in `Contact`; so is `detail`."""
    detail: str = ""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{as_host(self.host)}:{self.port}"


def target_of(url: str, who: Who, known: Known, *, name: str = "") -> Target | None:
    """None for what is no URL with a host, as that of a worker that comes by itself (`tunnel://`)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if host is None or parts.scheme not in ("http", "https"):
        return None
    tls = parts.scheme == "https"
    return Target(who, name or url, host, port or (443 if tls else 80), known, tls=tls)


def asked_target(text: str, who: Who) -> Target:
    """What somebody typed on the doctor's command line: a URL, or `10.0.0.9`, `studio.local:4100`, which get
    the scheme and port that are usual. Raises `NoAddress`."""
    scheme, port = _USUAL[who]
    url = text.strip()
    if is_bare := "://" not in url:
        url = f"{scheme}://{url if parsed(url) is None else as_host(url)}"
    target = target_of(url, who, Known.GIVEN)
    if target is None or not _is_host(target.host) or urlsplit(url).port == 0:
        raise NoAddress(
            f"{text[:100]!a} is no address of a {who.value}: name it like {scheme}://192.168.1.10:{port}"
        )
    if is_bare and urlsplit(url).port is None:
        target = replace(target, port=port)
    return replace(target, name=target.url)


def _is_host(host: str) -> bool:
    try:
        host.encode("idna")  # as the look-up of a name does
    except UnicodeError:
        return parsed(host) is not None
    return host.isprintable() and not set(" \"'<>") & set(host)


def heard_targets(announced: Sequence[Announced], who: Who, known: Sequence[Target]) -> tuple[Target, ...]:
    """Of those that are heard, the ones that are not known already."""
    there = {(one.host, one.port) for one in known} | {one.name for one in known}
    found = {
        (one.source, one.port): target
        for one in announced
        if one.who is who
        and not one.fault
        and not {(one.source, one.port), one.id} & there
        and (target := target_of(_url(one), who, Known.HEARD, name=one.id)) is not None
    }
    return tuple(found.values())[:MOST_TARGETS]


def _url(heard: Announced) -> str:
    """By which an agent asks a balancer, or a balancer an agent."""
    if heard.who is Who.BALANCER:
        told = wire.Announced(heard.id, heard.tag, heard.fingerprint)
        return balancer_url(told, heard.source, heard.port)
    return f"https://{as_host(heard.source)}:{heard.port}"


Knock = Callable[[Target, Contact], Awaitable[Contact]]
"""Asks who is there, over a connection that works; gives the contact with what came of it."""


async def reach_all(targets: Sequence[Target], knock: Knock) -> tuple[Contact, ...]:
    """Each of them, in their order."""
    return tuple(await asyncio.gather(*(reach(one, knock) for one in targets[:MOST_TARGETS])))


async def reach(target: Target, knock: Knock) -> Contact:
    """How far it went."""
    contact = Contact(
        target.who,
        target.name,
        target.host,
        target.port,
        target.known,
        announces=target.is_agent,
        tls=target.tls,
        state=target.state,
        detail=target.detail,
    )
    contact = replace(contact, addresses=await _resolved(target.host))
    for address in contact.addresses:
        contact = await _connected(replace(contact, peer=address))
        if not contact.error:
            break
    if not contact.is_reached:
        return contact
    try:
        async with asyncio.timeout(CONTACT_SECONDS):
            return await knock(target, contact)
    except TimeoutError:
        return replace(contact, said=f"no answer within {CONTACT_SECONDS:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return replace(contact, said=f"no answer that is understood ({type(error).__name__})")


async def _resolved(host: str) -> tuple[str, ...]:
    if parsed(host) is not None:
        return (host,)
    loop = asyncio.get_running_loop()
    found: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def tell(addresses: tuple[str, ...]) -> None:
        if not found.done():
            found.set_result(addresses)

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in entries))
        except (OSError, UnicodeError):
            addresses = ()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, addresses)

    # A daemon: a name server that does not answer would hold up the end of a pool's thread, and so ours.
    threading.Thread(target=look_up, daemon=True).start()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await found
    except TimeoutError:
        return ()


async def _connected(contact: Contact) -> Contact:
    """With the times of some connections, or why there is none."""
    seconds: list[float] = []
    try:
        for _ in range(CONNECTS):
            began = monotonic()
            async with asyncio.timeout(CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(contact.peer, contact.port)
            seconds.append(monotonic() - began)
            writer.close()
    except OSError as error:
        if not seconds:
            return replace(contact, error=_name(error), source=_source(contact.peer, contact.port))
    return replace(
        contact,
        error="",
        connect_seconds=tuple(seconds),
        source=_source(contact.peer, contact.port),
    )


def _name(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def _source(address: str, port: int) -> str:
    """Our own address, by which the system would send to that one; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])
    return ""


# Who is there ...


async def connect_only(_target: Target, contact: Contact) -> Contact:
    """For servers without an agent: that they can be reached is all that is asked."""
    return replace(contact, speaks=True)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Knocks at agents."""

    key: str | None = field(repr=False)
    """The cluster key; None: they are only asked who they are."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """By id the certificate that is known of it, as SHA-256 in hex."""

    async def __call__(self, target: Target, contact: Contact) -> Contact:
        if not target.is_agent:
            return await connect_only(target, contact)
        fingerprint = b""
        if target.tls:
            try:
                fingerprint = await _fingerprint(contact.peer, contact.port)
            except ssl.SSLError:
                return replace(contact, said="it does not speak TLS there")
        pin: aiohttp.Fingerprint | bool = aiohttp.Fingerprint(fingerprint) if fingerprint else False
        root = replace(target, host=contact.peer).url
        async with _session() as session:
            return await self._met(session, root, pin, fingerprint.hex(), contact)

    async def _met(
        self,
        session: aiohttp.ClientSession,
        root: str,
        pin: aiohttp.Fingerprint | bool,
        fingerprint: str,
        contact: Contact,
    ) -> Contact:
        hello = wire.Hello(balancer=_NAME, nonce=secrets.token_urlsafe(24))
        answer = await _asked(session, "POST", root + wire.HELLO_PATH, pin, hello.model_dump_json())
        contact = replace(contact, clock_ahead_seconds=answer.clock_ahead_seconds)
        if answer.status != 200:
            return replace(contact, refused=answer.status == 403, said=answer.said)
        try:
            told = wire.parse_hello_answer(answer.body)
        except wire.WireError as error:
            return replace(contact, said=str(error))
        by_code = told.by is wire.ProvenBy.CODE
        contact = replace(contact, speaks=True, name=told.id, by_code=by_code)
        if self.pins.get(told.id, fingerprint) != fingerprint:
            return replace(contact, is_other_certificate=True)
        if self.key is None or by_code:  # a wrong proof would use up the code that it shows
            return contact
        transcript = Transcript(_NAME, told.id, hello.nonce, told.nonce, fingerprint, wire.WIRE_VERSION)
        key = handshake.key_bytes(self.key)
        proof = wire.Proof(
            balancer=_NAME,
            nonce=hello.nonce,
            agent_nonce=told.nonce,
            proof=transcript.proof(key, Role.BALANCER),
        )
        proved = await _asked(session, "POST", root + wire.PROVE_PATH, pin, proof.model_dump_json())
        return replace(contact, proof=_judged(proved, transcript, key), said=proved.said)


def _judged(answer: _Answer, transcript: Transcript, key: bytes) -> Proof:
    if answer.status == 403:
        return Proof.WRONG
    if answer.status != 200:
        return Proof.NOT_TRIED
    try:
        theirs = wire.parse_proof_answer(answer.body)
    except wire.WireError:
        return Proof.WRONG
    return Proof.RIGHT if handshake.is_proof(transcript, key, Role.AGENT, theirs.proof) else Proof.WRONG


async def _fingerprint(address: str, port: int) -> bytes:
    """SHA-256 of the certificate that is shown there, whoever made it. Raises `ssl.SSLError`, `OSError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname="")
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return sha256(certificate).digest()
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class Calling:
    """Knocks at balancers."""

    agent_id: str
    """Of the agent that runs on this machine; empty: none does."""

    async def __call__(self, target: Target, contact: Contact) -> Contact:
        root = replace(target, host=contact.peer).url
        async with _session() as session:
            ready = await _asked(session, "GET", f"{root}/readyz", False)
            contact = replace(contact, clock_ahead_seconds=ready.clock_ahead_seconds)
            if ready.status == 403:
                return replace(contact, refused=True, said=ready.said)
            if not is_ready_answer(ready.body):
                return replace(contact, said=ready.said or f"status {ready.status}")
            join = await _asked(
                session, "POST", root + wire.JOIN_PATH, False, f'{{"wire":{wire.WIRE_VERSION}}}'
            )
            if "wire version" in join.said:
                return replace(contact, said=join.said)
            contact = replace(contact, speaks=True)
            if not self.agent_id:
                return contact
            room = await _asked(session, "GET", f"{root}/health", False)
            return replace(contact, listed=is_listed(room.body, self.agent_id))


def is_ready_answer(body: bytes) -> bool:
    """Whether this is what a balancer answers on /readyz. Pure."""
    return isinstance(_object(body).get("ready"), bool)


def is_listed(body: bytes, agent_id: str) -> bool | None:
    """Whether the balancer's /health tells of this agent; None: it tells of nobody. Pure."""
    workers = _object(body).get("workers")
    if not isinstance(workers, list):
        return None
    return any(isinstance(one, dict) and one.get("id") == agent_id for one in workers)


def _object(body: bytes) -> Mapping[str, object]:
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


# Asking ...


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    said: str
    """The other side's own sentence, of an error."""
    clock_ahead_seconds: float | None


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)


async def _asked(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    pin: aiohttp.Fingerprint | bool,
    body: str | None = None,
) -> _Answer:
    headers = {"Accept-Encoding": "identity"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    async with session.request(
        method, url, data=body, headers=headers, ssl=pin, allow_redirects=False
    ) as answer:
        data = bytearray()
        while len(data) < _BODY_BYTES and (chunk := await answer.content.read(64 * 1024)):
            data += chunk
        said = refusal(bytes(data)) or f"status {answer.status}" if answer.status >= 300 else ""
        return _Answer(answer.status, bytes(data), said, _ahead(answer.headers.get("Date", "")))


def _ahead(date: str) -> float | None:
    """Seconds, from the header Date, which is exact to one."""
    try:
        theirs = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    return (theirs - datetime.now(UTC)).total_seconds() if theirs.tzinfo is not None else None


# Our own port ...


async def own_port(
    host: str, port: int, interfaces: Sequence[Interface], knock: Knock, *, who: Who, tls: bool
) -> tuple[OwnPort, str]:
    """What answers there, at each address where ours should; and the id that an agent gives."""
    targets = [
        Target(who, address, address, port, Known.LISTED, tls=tls)
        for address in own_addresses(host, interfaces)
    ]
    contacts = await reach_all(targets, knock)
    states = {
        target.host: PortState.CLOSED
        if not contact.is_reached
        else PortState.OURS
        if contact.speaks
        else PortState.STRANGER
        for target, contact in zip(targets, contacts, strict=True)
    }
    stranger = PortState.STRANGER in states.values()
    program = await asyncio.to_thread(_listener, port) if stranger else ""
    names = (contact.name for contact in contacts if contact.speaks)
    return OwnPort(port, states, program), next(names, "")


def own_addresses(host: str, interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Where something that is bound to `host` should answer for others to reach it. Pure."""
    bound = parsed(host)
    if bound is not None and not bound.is_unspecified and not bound.is_loopback:
        return (host,)
    lan = [one for one in interfaces if one.is_lan]
    ipv4 = [address for one in lan for address in one.ipv4]
    ipv6 = [address for one in lan for address in one.global_ipv6]
    return ("::1", *ipv6) if ipv6 and not ipv4 else ("127.0.0.1", *ipv4)


def _listener(port: int) -> str:
    """The name of the program, where we may know it."""
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()}, process {one.pid}"
    return ""
