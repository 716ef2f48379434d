"""Tells balancers by address that an agent is here, so that they come to meet it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp
import orjson

from worker_agent import wire

_LOG = logging.getLogger(__name__)
_ANSWER_SECONDS = 5.0
_FIRST_REST_SECONDS = 1.0
_REFUSAL_BYTES = 4096  # of an answer that says no; who answers may be anything
_REFUSAL_CHARACTERS = 300
MOST_FOUND = 8
"""Balancers that are joined without having been named."""


def rest_seconds(failures: int) -> float:
    """How long until the next `Join` after so many failures in a row; 0: the last one went well. Pure."""
    if failures == 0:
        return wire.JOIN_INTERVAL_SECONDS
    return float(min(wire.JOIN_INTERVAL_SECONDS, _FIRST_REST_SECONDS * 2 ** min(failures - 1, 10)))


class Joining:
    """Keeps joining balancers; says so in the log when that begins to work or to fail."""

    def __init__(self, join: wire.Join) -> None:
        self._join = join
        self._named: tuple[str, ...] = ()
        self._found: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()

    def found(self, url: str) -> None:
        """A balancer was found at this URL: it is joined beside those that were named. No more than a few
        are; one that does not answer makes room for another."""
        url = url.rstrip("/")
        if url in self._named or url in self._found:
            return
        if len(self._found) >= MOST_FOUND:
            failing = next((url for url, failed in self._found.items() if failed.is_set()), None)
            if failing is None:
                return
            del self._found[failing]
        self._found[url] = asyncio.Event()
        self._changed.set()

    def forget_found(self) -> None:
        """Those that were found so far may be of another cluster than ours is now."""
        self._found.clear()
        self._changed.set()

    async def run(self, named: Sequence[str]) -> None:
        """Joins these and those that are found, until cancelled."""
        self._named = tuple(url.rstrip("/") for url in named)
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with (
            aiohttp.ClientSession(
                timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for url in self._named:
                tasks.create_task(self._keep(session, url, asyncio.Event()), name=f"join {url}")
            joined: dict[str, asyncio.Task[None]] = {}
            while True:
                for url in joined.keys() - self._found.keys():
                    joined.pop(url).cancel()
                for url in self._found.keys() - joined.keys():
                    keeping = self._keep(session, url, self._found[url])
                    joined[url] = tasks.create_task(keeping, name=f"join {url}")
                self._changed.clear()
                await self._changed.wait()

    async def _keep(self, session: aiohttp.ClientSession, url: str, failed: asyncio.Event) -> None:
        failures = 0
        known: str | None = None  # what the log said last
        while True:
            trouble = await _join(session, url, self._join)
            failures = failures + 1 if trouble else 0
            if trouble:
                failed.set()
            else:
                failed.clear()
            if trouble != known:
                known = trouble
                if trouble:
                    _LOG.warning("cannot join %s: %s; trying on", url, trouble)
                else:
                    _LOG.info("asked %s to come and meet this machine", url)
            await asyncio.sleep(rest_seconds(failures))


async def _join(session: aiohttp.ClientSession, url: str, join: wire.Join) -> str:
    """What went wrong, for people; empty: nothing."""
    try:
        async with session.post(
            url + wire.JOIN_PATH,
            data=join.model_dump_json(),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            allow_redirects=False,
            # Nothing in it is secret, and whoever answers must still prove himself when he comes to meet us.
            ssl=False,
        ) as answer:
            if answer.status < 300:
                return ""
            hint = " (is this a balancer's address?)" if answer.status in (404, 405) else ""
            said = refusal(await _beginning(answer.content))
            return f"it answered with status {answer.status}{hint}" + (f": {said}" if said else "")
    except TimeoutError:
        return f"no answer within {_ANSWER_SECONDS:.0f} s"
    except (aiohttp.InvalidURL, UnicodeError):  # the latter from looking up what cannot be a host's name
        return "this is not a URL; one looks like http://192.168.1.10:4000"
    except aiohttp.ServerDisconnectedError:
        hint = ": does it speak TLS? Then give https://" if url.startswith("http://") else ""
        return f"it closed the connection without an answer{hint}"
    except aiohttp.ClientError as error:
        reason = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else None
        return reason or type(error).__name__


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while len(body) < _REFUSAL_BYTES and (chunk := await content.read(_REFUSAL_BYTES - len(body))):
        body += chunk
    return bytes(body)


def refusal(body: bytes) -> str:
    """The balancer's own sentence out of its error, printable and short; empty: there is none. Pure."""
    try:
        message = orjson.loads(body)["error"]["message"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return ""
    if not isinstance(message, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in message[:_REFUSAL_CHARACTERS])
