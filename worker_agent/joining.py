"""Tells balancers by address that an agent is here: for networks where multicast does not pass."""

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


def rest_seconds(failures: int) -> float:
    """How long until the next `Join` after so many failures in a row; 0: the last one went well. Pure."""
    if failures == 0:
        return wire.JOIN_INTERVAL_SECONDS
    return float(min(wire.JOIN_INTERVAL_SECONDS, _FIRST_REST_SECONDS * 2 ** min(failures - 1, 10)))


async def join_all(balancers: Sequence[str], join: wire.Join) -> None:
    """Keeps joining each of them until cancelled; says so in the log when that begins to work or to fail."""
    timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    async with (
        aiohttp.ClientSession(
            timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        ) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for url in balancers:
            tasks.create_task(_keep_joining(session, url.rstrip("/"), join), name=f"join {url}")


async def _keep_joining(session: aiohttp.ClientSession, url: str, join: wire.Join) -> None:
    failures = 0
    known: str | None = None  # what the log said last
    while True:
        trouble = await _join(session, url, join)
        failures = failures + 1 if trouble else 0
        if trouble != known:
            known = trouble
            if trouble:
                _LOG.warning("cannot join %s: %s; trying on", url, trouble)
            else:
                _LOG.info("joined %s", url)
        await asyncio.sleep(rest_seconds(failures))


async def _join(session: aiohttp.ClientSession, url: str, join: wire.Join) -> str:
    """What went wrong, for people; empty: nothing."""
    try:
        async with session.post(
            url + wire.JOIN_PATH,
            data=join.model_dump_json(),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            allow_redirects=False,
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
