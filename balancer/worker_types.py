"""How each type of worker is observed and spoken to, as a table. Pure.

A worker type is a row; what all have in common lives in `watch` and `relay`. The answers of probes come
from other machines: everything in them is bounded and printable before it leaves this module.

Where a worker's url has a path, it is what OpenAI's SDKs call a base url: it takes the place of `/v1`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import orjson

from balancer.core.model import Condition, Endpoint, ModelName, ModelOffer, Worker
from balancer.dialects import anthropic_upstream, openai_upstream
from balancer.dialects.framing import FramingError
from balancer.dialects.openai import AnswerError, Request
from balancer.identity import identity, ollama_identity

MAX_PROBE_BYTES = 2 * 1024 * 1024  # vLLM spends about 500 bytes on a model, LM Studio 300
MAX_MODELS = 1024
LEAST_KEY_CHARACTERS = 8
"""Of a key that is hidden in what a worker says: shorter ones are in any text."""
MAX_NAME_CHARACTERS = 128
MAX_PATH_CHARACTERS = 4096
MAX_CONTEXT_TOKENS = 100_000_000
MAX_REQUESTS = 1_000_000
"""That a worker may say to hold, or to work on at once."""

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

    def __init__(self, sentence: str, *, certain: bool = False) -> None:
        """`certain`: asking again would change nothing."""
        super().__init__(sentence)
        self.certain = certain


class Translator(Protocol):
    """Makes OpenAI's answer of another API's, as it comes."""

    @property
    def fault(self) -> AnswerError | FramingError | None:
        """What was wrong after the bytes that were given; no more are."""
        ...

    def feed(self, data: bytes) -> bytes: ...

    def end(self) -> bytes:
        """Of the last bytes. Raises `AnswerError` for what is no answer."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """What to GET with each probe besides. Not every version has it, and a worker can be used without it."""

    path: str
    read: Callable[[Condition, int, bytes], Condition]
    """The condition until now, with what this answer adds to it; raises `ProbeFailed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerType:
    """One way to observe a worker and to talk to it."""

    name: str
    default_port: int
    probe_path: str | None
    """What to GET to learn how it is; None: it reports by itself."""
    read_probe: Callable[[int, bytes], Condition]
    """From status and body of that answer; raises `ProbeFailed`."""
    more: tuple[Page, ...] = ()
    keep_alive: bool
    """A connection may be used again. llama.cpp promises it and then closes at the end of each stream: 6 to
    10 of 20 pooled requests failed, none on fresh connections; it may sit behind any OpenAI-like address."""
    streams_always: bool
    """Ask for a stream even when the client did not: only a streamed generation ends when we hang up."""
    is_agent: bool = False
    """One of ours: it says when its engine died, where of others only a connection that breaks is seen, and
    it knows how its engine goes on with an answer that another began."""
    key_headers: Callable[[str], Mapping[str, str]] | None = None
    """What to send along with a key; None: it takes none."""
    place: Callable[[Worker, str, ModelName | None], str] = lambda worker, path, _: _beneath(worker.url, path)
    """Where a path of OpenAI's API is there, for a model (as it calls it) where that matters."""

    # Of an API that others run

    is_remote: bool = False
    """It is asked as a fallback only, by the models that the config names, and told nothing of the room."""
    default_url: str | None = None
    endpoints: frozenset[Endpoint] = frozenset(Endpoint)
    """What of OpenAI's API it has, or what it has can be translated to."""
    lists_models: bool = True
    """By the names by which they are asked for."""
    body: Callable[[Worker, Request, ModelName, bool], bytes] | None = None
    """The request's body, given the worker, the model as it calls it, and whether it shall stream; None: as
    it is. Raises `BadRequest` for what cannot be asked there."""
    translated_events: Callable[[int], Translator] | None = None
    """Of a stream in another API's events, given the time in seconds since 1970; None: OpenAI's."""
    translated_whole: Callable[[int], Translator] | None = None
    """The same of an answer in one piece."""


# Where things are ...


def _base(url: str) -> str:
    """The path of a worker's url: `/api/v1` of `https://host:443/api/v1`; "" for none."""
    _, _, rest = url.partition("://")
    _, slash, path = rest.partition("/")
    return slash + path.rstrip("/") if path.strip("/") else ""


def _root(url: str) -> str:
    """The same without what stands for `/v1`."""
    return _base(url).removesuffix("/v1")


def _beneath(url: str, path: str) -> str:
    base = _base(url)
    if path.startswith("/v1/"):
        return (base or "/v1") + path.removeprefix("/v1")
    return _root(url) + path


def _in_azure(worker: Worker, path: str, model: ModelName | None) -> str:
    """Azure's newer API is OpenAI's at `/openai/v1`; the dated ones have a path for each deployment."""
    root = _root(worker.url).removesuffix("/openai") + "/openai"
    if worker.api_version is None:
        return root + path
    of = "" if model is None else f"/deployments/{model}"
    return f"{root}{of}{path.removeprefix('/v1')}?api-version={worker.api_version}"


def _in_anthropics(worker: Worker, path: str, _: ModelName | None) -> str:
    return _beneath(worker.url, "/v1/messages" if path == Endpoint.CHAT.value else path)


# What is sent ...

USER_AGENT = "llm-room-balancer"
"""Told to APIs that others run: some turn away who does not say what it is."""
ANTHROPIC_VERSION = "2023-06-01"
_NEW_LIMIT_HOSTS = ("https://api.openai.com",)
"""Where a chat's limit is called `max_completion_tokens`, and by some models not known otherwise."""


def _bearer(key: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _remote_body(worker: Worker, request: Request, model: ModelName, stream: bool) -> bytes:
    names = worker.url.startswith(_NEW_LIMIT_HOSTS)
    return openai_upstream.body(request, model, stream=stream, names_completion_limit=names)


def _azure_body(worker: Worker, request: Request, model: ModelName, stream: bool) -> bytes:
    names = worker.api_version is None  # a dated version may be older than that name
    return openai_upstream.body(request, model, stream=stream, names_completion_limit=names)


def _anthropic_body(_: Worker, request: Request, model: ModelName, stream: bool) -> bytes:
    return anthropic_upstream.body(request, model, stream=stream)


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


def _is_loading(status: int, body: bytes) -> bool:
    """llama.cpp: {"error": {"message": "Loading model"}}, to whatever it is asked."""
    return status == 503 and "loading" in said_in(body).lower()


_LOADING = Condition(ready=False, state="loading", detail="it loads its model")


def _read_openai(status: int, body: bytes) -> Condition:
    if _is_loading(status, body):
        return _LOADING
    _accepted(status, body, "/v1/models")
    if not body.strip():
        # mlx_lm.server answers 200 with no body when it finds no hub cache; it serves its model all the same.
        return Condition(detail='it does not list its models: name the one to use with "model" in the config')
    rows = _rows(body, "data")
    return _condition(rows, _openai_offer, engine=_engine(rows))


def _read_llama_cpp(status: int, body: bytes) -> Condition:
    if _is_loading(status, body):
        return dataclasses.replace(_LOADING, engine="llama.cpp")
    _accepted(status, body, "/v1/models")
    return _condition(_rows(body, "data"), _llama_cpp_offer, engine="llama.cpp")


def _llama_cpp_offer(row: Mapping[str, object]) -> ModelOffer | None:
    """One that serves several models loads them when they are asked for, and tells how each is."""
    offer, status = _openai_offer(row), row.get("status")
    state = status.get("value") if isinstance(status, dict) else None
    if offer is None or state not in ("unloaded", "loading"):
        return offer
    return dataclasses.replace(
        offer, loaded=False, loading=state == "loading", load_seconds=LOAD_SECONDS_OF_UNKNOWN_SIZE
    )


def _read_llama_cpp_props(condition: Condition, status: int, body: bytes) -> Condition:
    """`/props`: how many requests it works on at once, and which file it has loaded."""
    _accepted(status, body, "/props")
    told = _object(body, "/props")
    models = condition.models
    if len(models) == 1:
        path = told.get("model_path")
        known = identity(path) if isinstance(path, str) and len(path) <= MAX_PATH_CHARACTERS else ""
        offer = dataclasses.replace(models[0], identity=models[0].identity or known)
        if told.get("is_sleeping") is True:  # idle for long, it has put its model out of memory
            offer = dataclasses.replace(offer, loaded=False, load_seconds=LOAD_SECONDS_OF_UNKNOWN_SIZE)
        models = (offer,)
    return dataclasses.replace(condition, models=models, slots=_requests(told.get("total_slots")) or None)


def _read_llama_cpp_slots(condition: Condition, status: int, body: bytes) -> Condition:
    """`/slots`: a row for each, which it may be told not to show. Some versions show prompts in it."""
    _accepted(status, body, "/slots")
    slots = _json(body, "/slots")
    if not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
        raise ProbeFailed("its /slots are no list of slots")
    busy = sum(slot.get("is_processing") is True for slot in slots)
    return dataclasses.replace(condition, running=busy, slots=condition.slots or len(slots) or None)


def _read_llama_cpp_metrics(condition: Condition, status: int, body: bytes) -> Condition:
    """`/metrics`, where it was started to have them: they count those that wait, too."""
    _accepted(status, body, "/metrics")
    held = _metric(body, "llamacpp:requests_processing", "llamacpp:requests_deferred")
    if held is None:
        raise ProbeFailed("its /metrics tell no requests")
    return dataclasses.replace(condition, running=_requests(int(held)))


def _read_vllm(status: int, body: bytes) -> Condition:
    _accepted(status, body, "/v1/models")
    return _condition(_rows(body, "data"), _openai_offer, engine="vLLM")


def _read_vllm_metrics(condition: Condition, status: int, body: bytes) -> Condition:
    """`/metrics`: the requests that it holds, and how much all of them together may hold in its KV cache."""
    _accepted(status, body, "/metrics")
    held = _metric(body, "vllm:num_requests_running", "vllm:num_requests_waiting")
    if held is None:
        raise ProbeFailed("its /metrics tell no requests")
    full = _metric(body, "vllm:kv_cache_usage_perc")
    memory = _tokens(_kv_cache_tokens(body))
    models = tuple(dataclasses.replace(offer, memory_tokens=memory) for offer in condition.models)
    notes = [condition.detail] if condition.detail else []
    if full is not None and 0 <= full <= 1:
        notes.append(f"its KV cache is {full:.0%} full")
    return dataclasses.replace(
        condition, models=models, running=_requests(int(held)), detail="; ".join(notes)
    )


_KV_CACHE = re.compile(r"^vllm:cache_config_info\{([^\n]{1,8192})\}", re.MULTILINE)


def _kv_cache_tokens(page: bytes) -> int:
    """Of all its engines; 0: it does not say yet. A count that it does not have is the text `None`."""
    tokens = 0
    for found in _KV_CACHE.finditer(page.decode("utf-8", "replace")):
        labels = dict(re.findall(r'(\w+)="(\d{1,12})"', found[1]))
        # Where layers differ, a block is not so many tokens of all of them: newer versions count themselves.
        blocks = int(labels.get("num_gpu_blocks", 0)) * int(labels.get("block_size", 0))
        tokens += int(labels.get("kv_cache_size_tokens", blocks))
    return tokens


def _read_vllm_load(condition: Condition, status: int, body: bytes) -> Condition:
    """`/load`: the requests that its server holds. It says 0 unless it was started to count them."""
    _accepted(status, body, "/load")
    load = _requests(_object(body, "/load").get("server_load"))
    if load is None:
        raise ProbeFailed("its /load tells no number")
    if not load:
        return condition
    return dataclasses.replace(condition, running=max(load, condition.running or 0))


def _metric(page: bytes, *names: str) -> float | None:
    """The sum of all samples of these in a page of Prometheus'; None where one of them has none."""
    text = page.decode("utf-8", "replace")
    total = 0.0
    for name in names:
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? ([0-9.eE+-]{{1,32}})$", text, re.MULTILINE)
        try:
            values = [float(value) for value in found]
        except ValueError:
            return None
        if not values or not all(0 <= value <= MAX_REQUESTS for value in values):
            return None
        total += sum(values)
    return total


def _requests(value: object) -> int | None:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_REQUESTS
    return value if usable and isinstance(value, int) else None


# Reading what a remote API says ...


def _reads_remote(engine: str) -> Callable[[int, bytes], Condition]:
    """Whether it takes the key. What it lists is welcome, and nothing depends on it."""

    def read(status: int, body: bytes) -> Condition:
        if status in (401, 402, 403):
            raise ProbeFailed(_key_refused(status, body), certain=True)
        if status >= 500:
            raise ProbeFailed(f"it answers with status {status}")
        try:
            _accepted(status, body, "/v1/models")
            return _condition(_rows(body, "data"), _openai_offer, engine=engine)
        except ProbeFailed:
            return Condition(engine=engine)

    return read


def _key_refused(status: int, body: bytes) -> str:
    # Not what it says: OpenAI's answer shows a part of the key.
    if status == 402:
        return "it wants to be paid first (status 402): look at the account of its key"
    return f'it refuses its key (status {status}): check "api_key" of this worker in the config'


def named_models(worker: Worker, condition: Condition) -> Condition:
    """A remote API's condition with the models that the config names, under its own names for them.

    None of them goes on with an answer that a worker of the room began.
    """
    row = row_of(worker)
    listed = {offer.name: offer for offer in condition.models}
    own_names = sorted({own for _, own in worker.aliases})
    unlisted = [name for name in own_names if listed and row.lists_models and name not in listed]
    return dataclasses.replace(
        condition,
        models=tuple(
            ModelOffer(
                name=name,
                endpoints=row.endpoints,
                context_tokens=listed[name].context_tokens if name in listed else None,
                identity=f"{row.name}/{name}",
                continues=False,
            )
            for name in own_names
        ),
        detail=f'it does not list {", ".join(unlisted[:5])}, named in "models"' if unlisted else "",
    )


# What all answers have in common ...


def _accepted(status: int, body: bytes, path: str) -> None:
    if len(body) > MAX_PROBE_BYTES:
        raise ProbeFailed(f"its list of models is longer than {MAX_PROBE_BYTES} bytes")
    match status:
        case 200:
            return
        case 401 | 403:
            advice = 'check "api_key" of this worker in the config'
            raise ProbeFailed(f"it answered {path} with status {status}: {advice}", certain=True)
        case 404 | 405:
            advice = f'it has no {path}: check "type" and "port" of this worker in the config'
        case _:
            advice = said_in(body)
    raise ProbeFailed(f"it answered {path} with status {status}{': ' if advice else ''}{advice}")


def _json(body: bytes, what: str) -> object:
    try:
        answer: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ProbeFailed(f"its {what} is not JSON") from None
    return answer


def _object(body: bytes, what: str) -> Mapping[str, object]:
    answer = _json(body, what)
    if not isinstance(answer, dict):
        raise ProbeFailed(f"its {what} is not an object")
    return answer


def _rows(body: bytes, key: str) -> list[Mapping[str, object]]:
    answer = _json(body, "list of models")
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
        row.get("context_length"),  # OpenRouter, and a balancer like this one
        row.get("max_input_tokens"),  # Anthropic
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


def without_key(text: str, headers: Mapping[str, str]) -> str:
    """What a worker said, without the key that it was sent: some repeat it. `headers`: those it was sent."""
    for value in headers.values():
        key = value.rpartition(" ")[2]
        if len(key) >= LEAST_KEY_CHARACTERS:
            text = text.replace(key, "***")
    return text


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
            more=(Page("/api/ps", _read_ollama_residency),),
            keep_alive=True,
            streams_always=True,
        ),
        WorkerType(
            name="lm_studio",
            default_port=1234,
            probe_path="/v1/models",
            read_probe=_read_lm_studio,
            more=(Page("/api/v0/models", _read_lm_studio_residency),),
            keep_alive=False,
            streams_always=True,
            key_headers=_bearer,
        ),
        WorkerType(
            name="openai",
            default_port=8000,
            probe_path="/v1/models",
            read_probe=_read_openai,
            keep_alive=False,
            streams_always=True,
            key_headers=_bearer,
        ),
        WorkerType(
            name="llama_cpp",
            default_port=8080,
            probe_path="/v1/models",
            read_probe=_read_llama_cpp,
            more=(
                Page("/props", _read_llama_cpp_props),
                Page("/slots", _read_llama_cpp_slots),
                Page("/metrics", _read_llama_cpp_metrics),
            ),
            keep_alive=False,
            streams_always=True,
            key_headers=_bearer,
        ),
        WorkerType(
            name="vllm",
            default_port=8000,
            probe_path="/v1/models",
            read_probe=_read_vllm,
            more=(Page("/metrics", _read_vllm_metrics), Page("/load", _read_vllm_load)),
            keep_alive=True,
            streams_always=True,
            key_headers=_bearer,
        ),
        WorkerType(
            name="azure",
            default_port=443,
            probe_path="/v1/models",
            read_probe=_reads_remote("Azure OpenAI"),
            keep_alive=True,
            streams_always=True,
            key_headers=lambda key: {"api-key": key},
            place=_in_azure,
            is_remote=True,
            lists_models=False,  # it lists models, and is asked for deployments
            body=_azure_body,
        ),
        WorkerType(
            name="anthropic",
            default_port=443,
            probe_path="/v1/models?limit=1000",
            read_probe=_reads_remote("Anthropic"),
            keep_alive=True,
            streams_always=True,
            key_headers=lambda key: {"x-api-key": key, "anthropic-version": ANTHROPIC_VERSION},
            place=_in_anthropics,
            is_remote=True,
            default_url="https://api.anthropic.com",
            endpoints=frozenset({Endpoint.CHAT}),
            body=_anthropic_body,
            translated_events=anthropic_upstream.Events,
            translated_whole=anthropic_upstream.Whole,
        ),
    )
}

_REMOTE_OPENAI = WorkerType(
    name="openai",
    default_port=443,
    probe_path="/v1/models",
    read_probe=_reads_remote("OpenAI-compatible API"),
    keep_alive=True,
    streams_always=True,
    key_headers=_bearer,
    is_remote=True,
    body=_remote_body,
)


def row_of(worker: Worker) -> WorkerType:
    """How this worker is observed and spoken to."""
    if worker.fallback and worker.type == _REMOTE_OPENAI.name:
        return _REMOTE_OPENAI
    return WORKER_TYPES[worker.type]
