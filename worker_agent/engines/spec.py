"""What the agent must know of an engine, as data. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from worker_agent.wire import INFERENCE_PATHS

_SAMPLE = re.compile(r"^([a-zA-Z_:]{1,128})(?:\{[^\n]{0,4096}\})? (\d{1,9}(?:\.\d{1,9})?)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one start of an engine is told."""

    python: str
    """The interpreter that this agent runs on; engines of its environment run on it too."""
    program: str | None = None
    """An engine's own executable where one was found, instead of a module run by `python`."""
    model: str
    """A file, a folder or a hub name, as the engine takes it."""
    name: str
    """What clients ask for."""
    port: int
    """On 127.0.0.1, free a moment ago."""
    slots: int
    context_tokens: int | None
    """Of prompt and answer together, per slot; None: the model's own."""
    threads: int
    cache_bytes_per_token: int | None = None
    """Of keys and values, where the model's file tells it."""
    args: tuple[str, ...] = ()
    """More words for the command line, from the user's own configuration, never from the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How many tokens an engine holds; None: not known."""

    memory_tokens: int | None = None
    """Of all requests that run at once, together."""
    cache_tokens: int | None = None
    """Of earlier prompts that it remembers, about."""


def _unknown(_launch: Launch, _context_tokens: int | None, _page: str) -> Capacity:
    return Capacity()


def _not_told(_page: str) -> int | None:
    return None


def _nothing(_launch: Launch) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine: how it is started, asked and watched."""

    name: str
    argv: Callable[[Launch], list[str]]
    environment: Callable[[Launch], Mapping[str, str]] = _nothing
    """Variables that it needs beside the allowed ones of our own environment."""
    secret_variable: str | None
    """The variable that carries a per-start API key, so that no other program of the machine can use the
    engine past the agent; None: it has no such key."""
    ready_path: str
    """Answers 200 when loading is over. Not enough to be called ready: a token must have been generated."""
    start_limit_seconds: float
    """From spawn to the first generated token, a download of the model included."""
    request_model: Callable[[Launch], str]
    """What goes into the `model` field of requests to it."""
    keep_alive: bool
    """False: it announces keep-alive, and closes after a stream all the same. A connection per request."""
    paths: tuple[str, ...] = INFERENCE_PATHS[:2]
    """Which of `INFERENCE_PATHS` it serves for a chat model."""
    default_slots: int
    default_context_tokens: int | None
    read_context_tokens: Callable[[Mapping[str, Any]], int | None]
    """Tokens per request, from one entry of its `GET /v1/models`; None: it does not say."""
    capacity_path: str | None = None
    """A page that tells what it holds, read once when it is ready; None: it has none."""
    read_capacity: Callable[[Launch, int | None, str], Capacity] = _unknown
    """From the launch, the tokens per request, and that page (empty where there is none)."""
    busy_path: str | None = None
    """A page that tells how many requests it works on now, abandoned ones included; None: it has none."""
    read_busy: Callable[[str], int | None] = _not_told
    """From that page; None: it does not say."""
    busy_pauses_seconds: tuple[float, ...] = (0.2,)
    """Before each look at that page while it is waited for; the last one is repeated."""
    continue_chat: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """Makes of a chat request whose last message is the beginning of an answer one that it goes on with;
    None: no way is known. Whether it works is found out at each start (`continuation`)."""


def probe_body(model: str) -> dict[str, object]:
    """The smallest request that proves that an engine generates: one token."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": False}


def generated(answer: Any) -> bool:
    """Whether the answer to `probe_body` is a completion, and not an error sent with status 200."""
    try:
        return bool(answer["choices"][0]["message"]["role"] == "assistant")
    except (LookupError, TypeError):
        return False


def sum_of_metrics(page: str, names: Collection[str]) -> int | None:
    """All samples of these metrics on a page in Prometheus' text format, added up; None: there are none."""
    found = [int(float(value)) for name, value in _SAMPLE.findall(page) if name in names]
    return sum(found) if found else None


def positive(value: Any) -> int | None:
    """A count as another program claims it; None: it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
