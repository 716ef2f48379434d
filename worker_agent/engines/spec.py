"""What the agent must know of an engine, as data. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from worker_agent.memory import Load, Need
from worker_agent.models.local import Format
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
    need: Need | None = None
    """What was reserved for it; None: not known."""
    local: bool = False
    """The model is on this disk: nothing has to be asked of the hub."""
    offload: bool = True
    """Every layer goes to the GPU, where the engine has one; False: as many as the engine sees fit."""
    devices: tuple[int, ...] = ()
    """The GPUs that it gets, as `nvidia-smi` counts them; empty: whichever the engine takes."""
    gpus: int = 0
    """How many GPUs the model is spread over; 0: there are none."""
    batch_tokens: int | None = None
    """Tokens of prompts worked on in one step; None: as many as the engine likes."""
    gpu_share: float | None = None
    """Of each of those GPUs' memory, what it may take."""
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


def _as_it_is(load: Load) -> Need:
    return Need(
        weights_bytes=load.weights_bytes,
        cache_bytes=load.slots * load.context_tokens * load.token_bytes,
        overhead_bytes=0,
        pool=load.pool,
    )


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
    most_slots: int = 4096
    roomy_slots: int = 0
    """Where there is memory for more than the default slots, up to so many."""
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
    formats: frozenset[Format] = frozenset()
    """What it reads."""
    need: Callable[[Load], Need] = _as_it_is
    """What it will take."""
    generous_share: float = 0.5
    """Of what models may take here: contexts longer than the default are given while it needs no more."""
    install: str = ""
    """The command that installs it."""
    minimum_version: str = ""
    """Older ones have faults that strangers can use, or lack flags that we give; empty: none is known."""
    minimum_reason: str = ""
    """Why not an older one, as the end of a sentence."""
    protected: frozenset[str] = frozenset()
    """Flags that the user's `args` may not set: they would open the engine to the network past the agent, let
    it run code that comes with a model, or name another model than the agent says it serves."""
    by_setting: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Flags for which there is a setting of ours, which has to know the value too."""
    spreading: frozenset[str] = frozenset()
    """Flags by which the user spreads a model over GPUs or machines: what it takes of this one is then not
    known, and the agent does not choose the GPUs."""
    protected_variables: tuple[str, ...] = ()
    """Variables that the user's `environment` may not set, for the same reasons; one that ends with `_` is
    for all that begin so."""


def refused_argument(spec: EngineSpec, args: Collection[str]) -> str | None:
    """One sentence about the first of the user's words that this engine must not be given; None: all is well.

    Engines take underscores for hyphens, and the beginning of a flag for the whole of it.
    """
    for word in args:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in spec.by_setting:
            return f"{flag} is not for `args`: set `{spec.by_setting[flag]}`, which the balancer is told too"
        whole = flag in spec.protected
        begun = flag.startswith("--") and len(flag) > 2 and any(p.startswith(flag) for p in spec.protected)
        if whole or begun:
            return (
                f"{flag} cannot be given to {spec.name} by `args`: the agent sets it, or it would open the"
                " engine to others or run code from a model. Take it out"
            )
    return None


def spreads(spec: EngineSpec, args: Collection[str]) -> bool:
    """Whether the user's words spread the model over GPUs or machines."""
    return any(word.partition("=")[0].replace("_", "-") in spec.spreading for word in args)


def refused_variable(spec: EngineSpec, environment: Collection[str]) -> str | None:
    """The same for the user's variables."""
    for name in environment:
        mine = name == spec.secret_variable
        if mine or any(
            name.startswith(each) if each.endswith("_") else name == each for each in spec.protected_variables
        ):
            return (
                f"{name} cannot be given to {spec.name} by `environment`: the agent sets what it stands for."
                " Take it out"
            )
    return None


def is_older(version: str, minimum: str) -> bool:
    """Whether a version such as `0.32.0+cpu` or `b11549` is before another. One without numbers is not."""
    return bool(_numbers(version)) and _numbers(version) < _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,9}", version.partition("+")[0])))


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
