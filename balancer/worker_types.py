"""How each type of worker is observed and spoken to, as a table. Pure.

A worker type is a row; what all have in common lives in `watch` and `relay`. The answers of probes come
from other machines: everything in them is bounded and printable before it leaves this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import orjson

from balancer.core.model import Condition, Endpoint, ModelName, ModelOffer
from balancer.identity import identity, ollama_identity

MAX_PROBE_BYTES = 2 * 1024 * 1024  # vLLM spends about 500 bytes on a model, LM Studio 300
MAX_MODELS = 1024
MAX_NAME_CHARACTERS = 128
MAX_PATH_CHARACTERS = 4096
MAX_CONTEXT_TOKENS = 100_000_000

LOAD_BYTES_PER_SECOND = 1.5e9
"""A guess for all machines, until loading is measured."""
LEAST_LOAD_SECONDS = 1.0
LOAD_SECONDS_OF_UNKNOWN_SIZE = 10.0
"""A guess too: 15 GB at the rate above."""

OLLAMA_DEFAULT_TAG = ":latest"
"""What Ollama takes a name without a tag for: `llama3.2` and `llama3.2:latest` are one model there."""

GENERATING = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
EMBEDDING = frozenset({Endpoint.EMBEDDINGS})


class ProbeFailed(Exception):
    """The worker's answer to a probe does not show a worker that can be used; a sentence for people."""


def _unchanged(condition: Condition, status: int, body: bytes) -> Condition:
    return condition


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerType:
    """One way to observe a worker and to talk to it."""

    name: str
    default_port: int
    probe_path: str | None
    """What to GET to learn how it is; None: it reports by itself."""
    read_probe: Callable[[int, bytes], Condition]
    """From status and body of that answer; raises `ProbeFailed`."""
    residency_path: str | None = None
    """What to GET besides to learn which of its models are in memory; None: it does not tell. Not every
    version has it."""
    read_residency: Callable[[Condition, int, bytes], Condition] = _unchanged
    """The condition that the probe gave, with what that answer adds to it; raises `ProbeFailed`."""
    keep_alive: bool
    """A connection may be used again. llama.cpp promises it and then closes at the end of each stream: 6 to
    10 of 20 pooled requests failed, none on fresh connections; it may sit behind any OpenAI-like address."""
    streams_always: bool
    """Ask for a stream even when the client did not: only a streamed generation ends when we hang up."""
    is_agent: bool = False
    """One of ours: it says when its engine died, where of others only a connection that breaks is seen, and
    it knows how its engine goes on with an answer that another began."""


# Reading ...


def _read_agent(status: int, body: bytes) -> Condition:
    raise ProbeFailed("an agent is not probed, it reports by itself")


def _read_ollama(status: int, body: bytes) -> Condition:
    """`/api/tags`: `{"models": [{"name": "llama3.2:latest", "details": {"family": "llama"}}]}`."""
    _accepted(status, body, "/api/tags")
    condition = _condition(_rows(body, "models"), _ollama_offer, engine="Ollama")
    return dataclasses.replace(condition, models=(*condition.models, *_without_tag(condition.models)))


def _without_tag(models: Iterable[ModelOffer]) -> Iterable[ModelOffer]:
    for offer in models:
        short = offer.name.removesuffix(OLLAMA_DEFAULT_TAG)
        if short and short != offer.name:
            yield dataclasses.replace(offer, name=ModelName(short), known_as=offer.name)


def _read_ollama_residency(condition: Condition, status: int, body: bytes) -> Condition:
    """`/api/ps`: the models that are in memory, in the form of `/api/tags`."""
    _accepted(status, body, "/api/ps")
    loaded = {row.get("name") for row in _rows(body, "models")}
    return dataclasses.replace(
        condition,
        models=tuple(
            dataclasses.replace(offer, loaded=offer.own_name in loaded) for offer in condition.models
        ),
    )


def _read_lm_studio(status: int, body: bytes) -> Condition:
    _accepted(status, body, "/v1/models")
    return _condition(_rows(body, "data"), _openai_offer, engine="LM Studio")


def _read_lm_studio_residency(condition: Condition, status: int, body: bytes) -> Condition:
    """`/api/v0/models`: all that it has on disk, with more about each than `/v1/models`.

    What only this list holds is left out: with just-in-time loading off, it can't be asked for.
    """
    _accepted(status, body, "/api/v0/models")
    rows = {row.get("id"): row for row in _rows(body, "data")}
    return dataclasses.replace(
        condition,
        models=tuple(
            (_lm_studio_offer(rows[offer.name]) or offer) if offer.name in rows else offer
            for offer in condition.models
        ),
    )


def _read_openai(status: int, body: bytes) -> Condition:
    if (
        status == 503 and "loading" in said_in(body).lower()
    ):  # llama.cpp: {"error": {"message": "Loading model"}}
        return Condition(ready=False, state="loading", detail="it loads its model")
    _accepted(status, body, "/v1/models")
    if not body.strip():
        # mlx_lm.server answers 200 with no body when it finds no hub cache; it serves its model all the same.
        return Condition(detail='it does not list its models: name the one to use with "model" in the config')
    rows = _rows(body, "data")
    return _condition(rows, _openai_offer, engine=_engine(rows))


def _accepted(status: int, body: bytes, path: str) -> None:
    if len(body) > MAX_PROBE_BYTES:
        raise ProbeFailed(f"its list of models is longer than {MAX_PROBE_BYTES} bytes")
    match status:
        case 200:
            return
        case 401 | 403:
            advice = 'check "api_key" of this worker in the config'
        case 404 | 405:
            advice = f'it has no {path}: check "type" and "port" of this worker in the config'
        case _:
            advice = said_in(body)
    raise ProbeFailed(f"it answered {path} with status {status}{': ' if advice else ''}{advice}")


def _rows(body: bytes, key: str) -> list[Mapping[str, object]]:
    try:
        answer: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ProbeFailed("its list of models is not JSON") from None
    rows = answer.get(key) if isinstance(answer, dict) else None
    if rows is None and isinstance(answer, dict) and key in answer:
        return []  # Ollama, written in Go, sends null for an empty list
    if not isinstance(rows, list):
        raise ProbeFailed(f'its list of models has no list "{key}"')
    return [row for row in rows if isinstance(row, dict)]


def _condition(
    rows: Sequence[Mapping[str, object]],
    offer: Callable[[Mapping[str, object]], ModelOffer | None],
    *,
    engine: str,
) -> Condition:
    models = list({found.name: found for row in rows if (found := offer(row)) is not None}.values())
    unusable = sum(offer(row) is None for row in rows)
    notes = []
    if unusable:
        notes.append(f"{unusable} models left out: a name is 1 to {MAX_NAME_CHARACTERS} printable characters")
    if len(models) > MAX_MODELS:
        notes.append(f"only the first {MAX_MODELS} of {len(models)} models are used")
    return Condition(models=tuple(models[:MAX_MODELS]), engine=engine, detail="; ".join(notes))


def _openai_offer(row: Mapping[str, object]) -> ModelOffer | None:
    name = _name(row.get("id"))
    if name is None:
        return None
    return ModelOffer(
        name=name,
        endpoints=_endpoints(row.get("type")),
        context_tokens=_context(row),
        identity=_identity(row, name),
    )


def _identity(row: Mapping[str, object], name: str) -> str:
    """vLLM takes any name for its model and tells in `root` what it loaded; llama.cpp tells the file type."""
    root, meta = row.get("root"), row.get("meta")
    if row.get("parent") is not None:
        return ""  # vLLM: a LoRA adapter, which is another model than its base
    told = meta.get("ftype") if isinstance(meta, dict) else row.get("quantization")
    model = root if isinstance(root, str) and len(root) <= MAX_PATH_CHARACTERS else name
    return identity(model, _word(told))


def _lm_studio_offer(row: Mapping[str, object]) -> ModelOffer | None:
    offer = _openai_offer(row)
    if offer is None or row.get("state") != "not-loaded":
        return offer
    return dataclasses.replace(offer, loaded=False, load_seconds=LOAD_SECONDS_OF_UNKNOWN_SIZE)


def _endpoints(kind: object) -> frozenset[Endpoint]:
    """By LM Studio's `type`; other servers do not tell, so that everything is offered."""
    match kind:
        case "llm" | "vlm":
            return GENERATING
        case "embedding" | "embeddings":
            return EMBEDDING
    return frozenset(Endpoint)


def _context(row: Mapping[str, object]) -> int | None:
    meta = row.get("meta")
    candidates: Iterable[object] = (
        row.get("max_model_len"),  # vLLM
        meta.get("n_ctx") if isinstance(meta, dict) else None,  # llama.cpp
        row.get("loaded_context_length"),  # LM Studio: as loaded, which may be less than the model could
        row.get("max_context_length"),
    )
    return next((tokens for value in candidates if (tokens := _tokens(value)) is not None), None)


def _tokens(value: object) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_CONTEXT_TOKENS
    return value if usable and isinstance(value, int) else None


def _engine(rows: Sequence[Mapping[str, object]]) -> str:
    owners = {"llamacpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang"}
    owner = rows[0].get("owned_by") if rows else None
    return owners.get(owner, "") if isinstance(owner, str) else ""


def _ollama_offer(row: Mapping[str, object]) -> ModelOffer | None:
    name = _name(row.get("name"))
    if name is None:
        return None
    details = row.get("details")
    family = details.get("family") if isinstance(details, dict) else None
    embeds = isinstance(family, str) and "bert" in family  # bert, nomic-bert: Ollama's embedding models
    told = details if isinstance(details, dict) else {}
    return ModelOffer(
        name=name,
        endpoints=EMBEDDING if embeds else frozenset(Endpoint),
        identity=ollama_identity(
            name, _word(told.get("parameter_size")), _word(told.get("quantization_level"))
        ),
        load_seconds=_load_seconds(row.get("size")),
    )


def _load_seconds(size_bytes: object) -> float:
    """A guess from the size of the file: nothing has been measured."""
    if not isinstance(size_bytes, int) or size_bytes <= 0:
        return LOAD_SECONDS_OF_UNKNOWN_SIZE
    return max(size_bytes / LOAD_BYTES_PER_SECOND, LEAST_LOAD_SECONDS)


def _word(value: object) -> str:
    """A short word that it tells; "" for anything else."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS else ""


def _name(value: object) -> ModelName | None:
    usable = isinstance(value, str) and 1 <= len(value) <= MAX_NAME_CHARACTERS and value.isprintable()
    return ModelName(value) if usable and isinstance(value, str) else None


def said_in(body: bytes) -> str:
    """The message in an OpenAI-like error body, short and printable; "" where there is none."""
    try:
        answer: object = orjson.loads(body[:MAX_PROBE_BYTES])
    except orjson.JSONDecodeError:
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        return ""
    return "".join(character if character.isprintable() else " " for character in message[:200])


# The table ...

DEFAULT_TYPE: Final[Literal["openai"]] = "openai"
"""What a worker in the config is taken for when it does not say; ollama and lm_studio answer to it too."""

WORKER_TYPES: Mapping[str, WorkerType] = {
    row.name: row
    for row in (
        WorkerType(
            name="agent",
            default_port=4100,
            probe_path=None,
            read_probe=_read_agent,
            keep_alive=True,
            streams_always=True,
            is_agent=True,
        ),
        WorkerType(
            name="ollama",
            default_port=11434,
            probe_path="/api/tags",
            read_probe=_read_ollama,
            residency_path="/api/ps",
            read_residency=_read_ollama_residency,
            keep_alive=True,
            streams_always=True,
        ),
        WorkerType(
            name="lm_studio",
            default_port=1234,
            probe_path="/v1/models",
            read_probe=_read_lm_studio,
            residency_path="/api/v0/models",
            read_residency=_read_lm_studio_residency,
            keep_alive=False,
            streams_always=True,
        ),
        WorkerType(
            name="openai",
            default_port=8000,
            probe_path="/v1/models",
            read_probe=_read_openai,
            keep_alive=False,
            streams_always=True,
        ),
    )
}
