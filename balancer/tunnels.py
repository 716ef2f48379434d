"""Connections that agents opened to us because we cannot reach them, waiting until we have something to ask.

A request for one comes to the balancer's own port; after the answer 101 its connection leaves the server and
is kept here, until somebody takes it to speak to that agent as on a connection of his own. Anybody may claim
any agent's id: who it is shows by its certificate, which is looked at before a byte of a request goes out.
So those of one address cannot crowd out those of another.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from urllib.parse import unquote

from aiohttp import web

from balancer.core.errors import BadRequest, RequestError
from balancer.hardened import HardenedHandler
from worker_agent import wire
from worker_agent.carrying import carried, keep_open

log = logging.getLogger(__name__)

_SWITCHING = (
    f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {wire.TUNNEL_PROTOCOL}\r\n\r\n"
).encode("ascii")


class TooManyTunnels(RequestError):
    status, type, code = 429, "rate_limit_error", "too_many_tunnels"
    retry_after = 10.0


@dataclass(frozen=True, slots=True)
class TunnelPolicy:
    max_agents: int = 64
    max_agents_per_address: int = 16
    """Behind one router there may be a whole room."""
    max_per_agent: int = 64
    """Connections that wait; one more takes the place of the oldest of the address that has the most."""
    max_waiting: int = 512
    """The same of all agents together."""
    idle_seconds: float = 300.0
    """That one waits; then it is closed, and the agent opens another. What lies between may have forgotten
    one that is older."""
    wait_seconds: float = 10.0
    """For an agent that has none left to open one."""
    tell_seconds: float = 10.0
    """An agent that has connections waiting is told of so often, as one that joins is."""


@dataclass(eq=False, slots=True)
class _Waiting:
    sock: socket.socket
    address: str
    since: float


@dataclass(slots=True)
class _Agent:
    tag: str = ""
    """Of the key that it says it holds."""
    waiting: list[_Waiting] = field(default_factory=list)
    """The newest last."""
    askers: deque[asyncio.Future[socket.socket]] = field(default_factory=deque)
    heard_at: float = 0.0
    """When a connection of it was last opened or taken."""
    told_at: float = 0.0
    turn: str = ""
    """The address whose connection was taken last."""


class Tunnels:
    """Those that wait, by the id of the agent that they are said to be of.

    `arrived(agent_id, tag)` is told of every connection, and again and again while one waits; it raises a
    `RequestError` for an agent that is not wanted. Call `tick` about once a second.
    """

    def __init__(
        self,
        *,
        arrived: Callable[[str, str], None],
        clock: Callable[[], float],
        policy: TunnelPolicy | None = None,
    ) -> None:
        self._arrived = arrived
        self._clock = clock
        self._policy = policy or TunnelPolicy()
        self._agents: dict[str, _Agent] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        """Connections, of all agents."""
        return sum(len(agent.waiting) for agent in self._agents.values())

    # In ...

    def route(self) -> web.AbstractRouteDef:
        """By which agents come."""
        return web.get(wire.TUNNEL_PATH, self._answer, allow_head=False)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """Ends as a handler whose client has left, once the connection is ours. Raises `RequestError`."""
        agent_id, tag = asked(request)
        address = request.remote or ""
        self.admit(agent_id, tag, address)
        handler = request.protocol
        assert isinstance(handler, HardenedHandler)
        sock = await _taken_out(handler)
        self.give(agent_id, sock, address)
        raise asyncio.CancelledError

    def admit(self, agent_id: str, tag: str, address: str) -> None:
        """Whether a connection of this agent may be given. Raises `RequestError`."""
        if agent_id not in self._agents:
            self._insist_on_room(address)
        self._arrived(agent_id, tag)  # whoever is refused is nobody, and changes nothing for who waits here
        agent = self._agents.setdefault(agent_id, _Agent())
        agent.tag, agent.heard_at = tag, self._clock()
        agent.told_at = agent.heard_at

    def give(self, agent_id: str, sock: socket.socket, address: str) -> None:
        """A connection on which this agent waits for a request, of one that was just admitted."""
        agent = self._agents.setdefault(agent_id, _Agent())
        agent.heard_at = self._clock()
        while agent.askers:
            asker = agent.askers.popleft()
            if not asker.done():
                asker.set_result(sock)
                return
        if len(agent.waiting) >= self._policy.max_per_agent:
            self._close_one([agent])
        elif self.waiting >= self._policy.max_waiting:
            self._close_one(self._agents.values())
        one = _Waiting(sock, address, self._clock())
        agent.waiting.append(one)
        self._loop.add_reader(sock, partial(self._ended, agent_id, one))

    def _insist_on_room(self, address: str) -> None:
        from_there = sum(
            any(one.address == address for one in agent.waiting) for agent in self._agents.values()
        )
        full = len(self._agents) >= self._policy.max_agents
        if full or from_there >= self._policy.max_agents_per_address:
            raise _too_many()

    def _close_one(self, agents: Iterable[_Agent]) -> None:
        """The oldest of the address that has the most."""
        waiting = [(one.since, one, agent) for agent in agents for one in agent.waiting]
        most, _ = Counter(one.address for _, one, _ in waiting).most_common(1)[0]
        _, one, agent = min((each for each in waiting if each[1].address == most), key=itemgetter(0))
        self._close(agent, one)

    # ... and out

    async def take(self, agent_id: str) -> socket.socket:
        """A connection to speak on, from now on the caller's. Waits for the agent to open one where it has
        lately done so. Raises `ConnectionRefusedError`."""
        agent = self._agents.get(agent_id)
        if agent is None:
            raise _nobody()
        while (one := _next(agent)) is not None:
            self._remove(agent, one)
            if _is_silent(one.sock):
                agent.heard_at = self._clock()
                return one.sock
            one.sock.close()
        if self._clock() - agent.heard_at >= self._policy.wait_seconds:
            raise _nobody()
        return await self._opened(agent)

    async def _opened(self, agent: _Agent) -> socket.socket:
        asker: asyncio.Future[socket.socket] = self._loop.create_future()
        agent.askers.append(asker)
        try:
            async with asyncio.timeout(self._policy.wait_seconds):
                return await asker
        except TimeoutError:
            raise _nobody() from None
        except asyncio.CancelledError:
            if asker.done() and not asker.cancelled() and asker.exception() is None:
                asker.result().close()
            raise
        finally:
            with suppress(ValueError):
                agent.askers.remove(asker)

    # What becomes of those that wait ...

    def tick(self) -> None:
        """Closes those that have waited for long, and tells of those who are there."""
        now = self._clock()
        for agent_id, agent in list(self._agents.items()):
            for one in list(agent.waiting):
                if now - one.since >= self._policy.idle_seconds:
                    self._close(agent, one)
            if not agent.waiting and not agent.askers and now - agent.heard_at >= self._policy.wait_seconds:
                del self._agents[agent_id]
            elif agent.waiting and now - agent.told_at >= self._policy.tell_seconds:
                agent.told_at = now
                try:
                    self._arrived(agent_id, agent.tag)
                except RequestError:
                    self._forget(agent_id)

    def aclose(self) -> None:
        """Ends them all."""
        for agent_id in list(self._agents):
            self._forget(agent_id)

    def _ended(self, agent_id: str, one: _Waiting) -> None:
        """It was closed; or the agent speaks, whose turn it is not."""
        agent = self._agents.get(agent_id)
        if agent is None or one not in agent.waiting:
            return
        self._close(agent, one)
        if not agent.waiting:  # as a rule all end at once, when an agent does: nobody need wait for it
            agent.heard_at = self._clock() - self._policy.wait_seconds
            _refuse(agent)

    def _forget(self, agent_id: str) -> None:
        agent = self._agents.pop(agent_id)
        for one in list(agent.waiting):
            self._close(agent, one)
        _refuse(agent)

    def _close(self, agent: _Agent, one: _Waiting) -> None:
        self._remove(agent, one)
        one.sock.close()

    def _remove(self, agent: _Agent, one: _Waiting) -> None:
        self._loop.remove_reader(one.sock)
        agent.waiting.remove(one)


def asked(request: web.Request) -> tuple[str, str]:
    """The id of the agent that asks for a tunnel, and the tag of its key, empty for none.

    Raises `BadRequest` for what is no such request.
    """
    headers = request.headers
    wants = headers.get("Upgrade", "").lower() == wire.TUNNEL_PROTOCOL
    if not wants or "upgrade" not in headers.get("Connection", "").lower():
        raise BadRequest(
            f"This is for worker agents that open a tunnel, by Connection: Upgrade and Upgrade: "
            f"{wire.TUNNEL_PROTOCOL}."
        )
    if request.can_read_body:
        raise BadRequest("A request for a tunnel has no body.")
    agent_id = unquote(headers.get(wire.AGENT_HEADER, ""))
    if not 1 <= len(agent_id) <= 128 or not agent_id.isprintable():
        raise BadRequest(f"The header {wire.AGENT_HEADER} is missing, or holds what is no id of an agent.")
    return agent_id, headers.get(wire.TAG_HEADER, "")


async def _taken_out(handler: HardenedHandler) -> socket.socket:
    """The connection of this handler as a socket, with the answer 101 written. Raises `BadRequest`, and
    `CancelledError` where it has ended."""
    transport = handler.outgoing()
    try:
        if transport.get_extra_info("ssl_object") is not None:
            transport.write(_SWITCHING)
            keep_open(transport.get_extra_info("socket"))
            sock = await carried(transport)
            handler.let_go()
            return sock
        # A descriptor of our own: the transport's is closed with it, and the connection stays.
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        handler.let_go()
        transport.set_protocol(asyncio.Protocol())
        transport.abort()
        try:
            sock.setblocking(False)
            keep_open(sock)
            sock.send(_SWITCHING)  # into an empty buffer: it goes out whole
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            log.warning("no tunnel can be opened: the balancer has no file descriptor left (see ulimit -n)")
        raise asyncio.CancelledError from None  # which ends the connection


def _next(agent: _Agent) -> _Waiting | None:
    """The newest of the address whose turn it is."""
    addresses = sorted({one.address for one in agent.waiting})
    if not addresses:
        return None
    agent.turn = next((address for address in addresses if address > agent.turn), addresses[0])
    return next(one for one in reversed(agent.waiting) if one.address == agent.turn)


def _is_silent(sock: socket.socket) -> bool:
    """It is open, and nothing was said on it."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _refuse(agent: _Agent) -> None:
    for asker in agent.askers:
        if not asker.done():
            asker.set_exception(_nobody())


def _nobody() -> ConnectionRefusedError:
    return ConnectionRefusedError(errno.ECONNREFUSED, "the agent has no connection open to here")


def _too_many() -> TooManyTunnels:
    return TooManyTunnels("As many tunnels are open as there may be. Try again in 10 s.")
