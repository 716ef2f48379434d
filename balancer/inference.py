"""Requests for answers, whichever server has read them off the wire: who may ask, what is asked, the
journey, and the words of every error.

A server (`front` on aiohttp, `hot_path` on a protocol of our own) gives it heads and bodies, and a `Client`
to write the answer to.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from balancer.core.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    LoopDetected,
    QueueFull,
    RequestError,
    ShuttingDown,
    UnsupportedMedia,
)
from balancer.core.model import Candidate, Choice, Endpoint, ServiceClass, Worker
from balancer.dialects import openai
from balancer.dialects.framing import event
from balancer.history import share_of
from balancer.journey import Journey, Story
from worker_agent.sources import Sources
from worker_agent.wire import HOPS_HEADER, REQUEST_ID_HEADER

log = logging.getLogger(__name__)

LARGE_BODY_BYTES = 1024 * 1024
"""To read a megabyte of JSON takes about 10 ms."""

MAX_HOPS = 4
"""A balancer may well be another one's worker; more of them in a row are a circle."""

PRIORITY_HEADER = "X-Priority"
"""A request's class, by name. Goes on to the worker, which may be a balancer too; others ignore it."""

_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

JSON_TYPE = "application/json"
STREAM_HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


@dataclass(frozen=True, slots=True)
class InferencePolicy:
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    """Of all requests that wait or run."""
    sources: Sources = field(default_factory=Sources)
    """Who is served at all."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request as far as its headers."""

    endpoint: Endpoint
    headers: Mapping[str, str]
    """By names in lower case. None of them came twice."""
    remote: str
    """The address at the other end of the connection."""


class Client(Protocol):
    """A client's connection as far as one answer needs it. Nothing here waits or raises: a client that is
    gone swallows what is written, and its server cancels whoever answers it."""

    def begin(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        """The head of the answer. `length`: of the body, in bytes; None: its end shows by its framing
        (chunks; for HTTP/1.0 by closing). Content-Length, Transfer-Encoding, Connection and Date are the
        server's to add."""
        ...

    def write(self, data: bytes) -> None:
        """A piece of the body, sent at once."""
        ...

    def end(self) -> None:
        """The body is whole."""
        ...

    def on_room(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Whom to tell that the client reads slower than it is written to (more than 64 KiB wait), and that
        it has caught up. Told at once if it is behind already. A server drops a client that stays behind
        for longer than its policy says."""
        ...


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request whose head was found to be right; its body may be read."""

    head: Head
    request_id: str
    hops: int
    named_class: ServiceClass | None
