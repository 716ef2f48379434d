"""Is an engine ready? Only once it has generated a token, and only if it is ours that did.

Engines were seen alive without a model, healthy until their first prompt, and silent beside another process
that answered on their port. So: its loading is over, the port is held by our process, a chat request with a
wrong key is refused where the engine takes keys, and one token comes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import psutil

from worker_agent.engines.spec import EngineSpec, generated, probe_body

_POLL_SECONDS = 0.1
_ASK_SECONDS = 5.0
_CHAT_PATH = "/v1/chat/completions"
_REFUSED_TRIES = 5  # a second apart: macOS refuses connections to a listener whose short queue is full
_SILENT_TRIES = 3  # of _ASK_SECONDS each: the system takes connections for a stopped process, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where one start of an engine is to be found."""

    port: int
    secret: str | None
    """None: the engine takes no key."""

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request to it carries."""
        return {} if self.secret is None else {"Authorization": f"Bearer {self.secret}"}


class NotOurs(Exception):
    """Another program answers on the engine's port."""


def free_port() -> int:
    """A loopback port that nobody listens on now. Another may take it before the engine does: `NotOurs`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an engine says of itself when it is ready."""

    context_tokens: int | None
    """Per request; None: it does not say."""
    capacity_page: str
    """The answer of its spec's `capacity_path`; empty: none."""


async def until_it_generates(
    session: aiohttp.ClientSession, spec: EngineSpec, address: Address, model: str, guard_pid: int
) -> Told:
    """Returns once it has generated a token.

    Has no limit of its own: supervision has one. Raises `NotOurs`.
    """
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            if await _status(session, address, spec.ready_path) == 200:
                await _insist_on_ours(session, address, guard_pid)
                if await _generates(session, address, model):
                    return Told(
                        context_tokens=await _context_tokens(session, spec, address),
                        capacity_page=await _capacity_page(session, spec, address),
                    )
        await asyncio.sleep(_POLL_SECONDS)


async def answers_at_all(
    session: aiohttp.ClientSession, spec: EngineSpec, address: Address, progress: Callable[[], int]
) -> bool:
    """Whether anything is heard of it within a few tries. Any word will do: busy is not deaf.

    `progress` counts what running requests have got from it: while that grows, silence on its health path
    means nothing.
    """
    before, refused, silent = progress(), 0, 0
    while refused < _REFUSED_TRIES and silent < _SILENT_TRIES:
        try:
            await _status(session, address, spec.ready_path)
        except TimeoutError:
            silent += 1
        except aiohttp.ClientError:
            refused += 1
            await asyncio.sleep(1.0)
        else:
            return True
        if progress() != before:
            return True
    return False


async def _status(session: aiohttp.ClientSession, address: Address, path: str) -> int:
    async with session.get(
        address.url + path,
        headers=address.headers,
        timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS),
        allow_redirects=False,
    ) as answer:
        return answer.status


async def _insist_on_ours(session: aiohttp.ClientSession, address: Address, guard_pid: int) -> None:
    if await asyncio.to_thread(_held_by_another, address.port, guard_pid):
        raise NotOurs(f"another process listens on port {address.port}")
    if address.secret is not None:
        # Asked on the route that matters: older llama-servers list their models to everybody. Engines look at
        # the key before the body, so that an empty one will do.
        status = await _status_for_a_wrong_key(session, address)
        if status not in (401, 403):
            raise NotOurs(f"the engine on port {address.port} answers a wrong key with status {status}")


async def _status_for_a_wrong_key(session: aiohttp.ClientSession, address: Address) -> int:
    async with session.post(
        address.url + _CHAT_PATH,
        data=b"{}",
        headers={"Authorization": "Bearer wrong", "Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS),
        allow_redirects=False,
    ) as answer:
        return answer.status


def _held_by_another(port: int, guard_pid: int) -> bool:
    """Whether none of the guard's descendants listens on the port. False where the system does not say."""
    try:
        ours = psutil.Process(guard_pid).children(recursive=True)
        listening = [
            connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            for process in ours
            for connection in process.net_connections(kind="tcp")
        ]
    except psutil.Error:
        return False
    return not any(listening)


async def _generates(session: aiohttp.ClientSession, address: Address, model: str) -> bool:
    async with session.post(
        address.url + _CHAT_PATH,
        data=orjson.dumps(probe_body(model)),
        headers={**address.headers, "Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=None),
        allow_redirects=False,
    ) as answer:
        return answer.status == 200 and generated(_json(await answer.read()))


async def _context_tokens(session: aiohttp.ClientSession, spec: EngineSpec, address: Address) -> int | None:
    async with session.get(
        address.url + "/v1/models",
        headers=address.headers,
        timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS),
        allow_redirects=False,
    ) as answer:
        try:
            return spec.read_context_tokens(_json(await answer.read())["data"][0])
        except (LookupError, TypeError, AttributeError):  # MLX answers 200 with nothing in it
            return None


async def _capacity_page(session: aiohttp.ClientSession, spec: EngineSpec, address: Address) -> str:
    """Good to have: an engine whose page does not come is ready all the same."""
    if spec.capacity_path is None:
        return ""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(
            address.url + spec.capacity_path,
            headers=address.headers,
            timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS),
            allow_redirects=False,
        ) as answer:
            if answer.status == 200:
                return (await answer.read()).decode(errors="replace")
    return ""


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
