"""The contract between balancer and worker agent: paths, headers, reports, joins, the mDNS record.

Both sides import this module and it imports nothing of theirs, so a change here is a change of the
protocol: samples under ``tests/wire/samples/`` pin it. Everything that arrives over the network is
bounded and printable before anyone else sees it, since the other side may be old, broken or hostile.
Unknown keys are ignored, so that a newer agent can talk to an older balancer.

Pure: bytes and mappings in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

WIRE_VERSION = 2
"""Raised when an older peer could misread a message; peers of another version are refused by name."""

SERVICE_TYPE = "_llm-worker._tcp.local."
"""mDNS service type of an agent (RFC 6763 7.2: at most 15 characters between the underscore and the dot)."""

REPORT_PATH = "/agent/v1/report"
"""On the agent: one long-lived answer, a `Report` as JSON per line, at least one a second."""

BALANCER_SERVICE_TYPE = "_llm-balancer._tcp.local."
"""mDNS service type of a balancer, for agents that join."""

JOIN_PATH = "/cluster/v1/join"
"""On the balancer: an agent posts a `Join`, and the balancer comes to meet it (`HELLO_PATH`)."""

TUNNEL_PATH = "/cluster/v1/tunnel"
"""On the balancer: an agent that cannot be reached opens a connection itself, by a GET with `Upgrade:
llm-tunnel`, `X-Cluster-Agent: ID` and `X-Cluster-Tag: TAG`. After the answer 101 the parts are changed: the
balancer speaks on it as it would on a connection of its own, TLS first, and the agent serves."""
TUNNEL_PROTOCOL = "llm-tunnel"
AGENT_HEADER = "X-Cluster-Agent"
TAG_HEADER = "X-Cluster-Tag"
SPARE_TUNNELS = 4
"""Connections without a request that an agent keeps open at each balancer."""

HELLO_PATH = "/agent/v1/hello"
"""On the agent: POST of a `Hello`, answered with a `HelloAnswer`. The first half of the handshake."""
PROVE_PATH = "/agent/v1/prove"
"""On the agent: POST of a `Proof`, answered with a `ProofAnswer`, or 403 with a sentence."""
SESSION_HEADER = "X-Cluster-Session"
"""The secret of `handshake.Transcript.session`, with every further request to the agent. An agent that does
not know it (it was started again) answers 401 with code `session_unknown`, before anything else is looked
at: then the two must meet again."""
SESSION_UNKNOWN = "session_unknown"
KEY_PATH = "/agent/v1/cluster-key"
"""On the agent, within a session: POST of a `NewKey`, answered with 204: the cluster's key is this from now
on. All sessions but this one end."""

REPORT_INTERVAL_SECONDS = 1.0
REPORT_GAP_SECONDS = 0.05
"""An agent writes a report no sooner than this after the last: changes in between are told together. The
balancer reads faster (`WatchPolicy.report_gap_seconds`), or what it reads would fall ever further behind."""

LOST_AFTER_SECONDS = 3.0
"""Three missed reports (RELIABILITY D2): a dead, frozen or cut-off machine is known within 4 s."""

JOIN_INTERVAL_SECONDS = 10.0
"""An agent that was told a balancer's address repeats its `Join`, so that a restarted balancer learns it."""

MAX_REPORT_BYTES = 256 * 1024
MAX_TOKENS_HELD = 1_000_000_000
REQUEST_ID_HEADER = "X-Request-ID"
HOPS_HEADER = "X-Balancer-Hops"
"""How many balancers a request has passed, so that two that name each other do not pass it round for ever."""
CONTINUE_HEADER = "X-LLM-Continue"
"""A chat request with it, value "1", has as its last message the assistant's text so far; the engine goes on
exactly there. Only for models that say `continues`: from others it is a 409 with code `cannot_continue`."""
WAIT_HEADER = "X-LLM-Wait"
"""For how many seconds, as a decimal number, the sender would wait for a model to be loaded. Where that takes
longer an agent begins to load it all the same, and answers 503 with code `model_loading` at once. Without the
header it waits as long as its own settings say."""
DEFAULT_AGENT_PORT = 4100

MODELS_PATH = "/agent/v1/models"
"""On the agent, within a session: GET lists what it has (`ModelList`); POST of a `ModelOrder` to `/load`,
`/unload`, `/delete`, `/download` or `/cancel` below it does that. Load and download answer 202 at once, and
the reports tell how it goes."""

INFERENCE_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""What an agent relays to its engine. Nothing else of an engine is reachable from the network."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


def _one_word(text: str) -> str:
    if " " in text:
        raise ValueError("must be one word")
    return _printable(text)


Word = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
"""A name or an id as another machine claims it."""
Line = Annotated[str, Field(max_length=400), AfterValidator(_printable)]
"""A sentence for people: a reason, a piece of advice."""


class WireError(Exception):
    """The other side sent something that this version of the contract does not allow."""


class EngineState(StrEnum):
    STARTING = "starting"
    """The process runs and has not generated a token yet (a model is being loaded)."""
    READY = "ready"
    """It has really generated a token since it started."""
    STOPPING = "stopping"
    RESTING = "resting"
    """It died; it is started again after a pause that grows."""
    FAILED = "failed"
    """It died too often in a short time; it stays down until somebody looks."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


_M = TypeVar("_M", bound=_Message)


class ModelState(StrEnum):
    LOADED = "loaded"
    """It answers at once."""
    LOADING = "loading"
    UNLOADED = "unloaded"
    """It is on this machine's disk, and is loaded when somebody asks for it."""
    FAILED = "failed"
    """It cannot be loaded as things are; `detail` says why."""


class ServedModel(_Message):
    """One model that can be asked for by `name`."""

    name: Word
    context_tokens: int | None = Field(default=None, ge=1, le=100_000_000)
    """Tokens of prompt and answer together that one request may hold; None: not known."""
    paths: tuple[Word, ...] = ("/v1/chat/completions", "/v1/completions")
    """Which of `INFERENCE_PATHS` work for it."""
    identity: Line = ""
    """What it is, as its file or the hub calls it: `Qwen2.5-7B-Instruct-Q4_K_M.gguf`; empty: not known. The
    balancer makes of it what it compares."""
    memory_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS_HELD)
    """Tokens that all requests which run at once may hold together; None: not known."""
    cache_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS_HELD)
    """Tokens of earlier prompts that the engine can remember, about; None: not known."""
    continues: bool = False
    """It goes on with a chat answer that was begun elsewhere (`CONTINUE_HEADER`): probed on this engine since
    its start."""
    state: ModelState = ModelState.LOADED
    engine: str = Field(default="", max_length=128)
    """Which engine serves it, or will; empty: the report's."""
    slots: int | None = Field(default=None, ge=1, le=4096)
    """How many requests its engine works on at once; None: the report's. All models of a machine together
    get no more than the report's."""
    progress: float | None = Field(default=None, ge=0, le=1)
    """Of a model that is loading, the share that is done; None: not known."""
    eta_seconds: float | None = Field(default=None, ge=0, le=1_000_000)
    """Until it answers, from now: of a model that is loading, or that others have to make room for first."""
    load_seconds: float | None = Field(default=None, ge=0, le=1_000_000)
    """What loading it takes: measured, else estimated from its size; None: not known."""
    size_bytes: int | None = Field(default=None, ge=0, le=2**53)
    """Of its weights on disk."""
    memory_bytes: int | None = Field(default=None, ge=0, le=2**53)
    """What it needs while it is loaded: weights, caches, what its engine takes besides; None: not known."""
    detail: Line = ""
    """Why it is as it is, for people."""


class DownloadState(StrEnum):
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    """It is all here; its hashes are being compared with the hub's."""
    DONE = "done"
    FAILED = "failed"


class Download(_Message):
    """A model that is being fetched from the hub, or was lately."""

    repo: Word
    """`mlx-community/Qwen2.5-7B-Instruct-4bit`."""
    name: Word
    """By which it can be asked for when it is here."""
    state: DownloadState
    done_bytes: int = Field(default=0, ge=0, le=2**53)
    total_bytes: int | None = Field(default=None, ge=0, le=2**53)
    eta_seconds: float | None = Field(default=None, ge=0, le=1_000_000)
    detail: Line = ""
    """Why it failed, and what to do."""


class Report(_Message):
    """What an agent says of itself, each second and on every change."""

    wire: int = WIRE_VERSION
    id: Word
    """Stable over restarts of the agent, unique in the room."""
    state: EngineState
    engine: Word
    """`llama.cpp`, `mlx` or `vllm`."""
    models: tuple[ServedModel, ...] = Field(default=(), max_length=256)
    """What it serves while READY; in any other state what it will serve again, so that requests for it can
    wait. An agent knows its model before the engine has loaded it."""
    slots: int = Field(ge=1, le=4096)
    """How many requests the engine works on at once."""
    running: int = Field(default=0, ge=0, le=100_000)
    """Slots that are taken now: requests that the agent holds open towards the engine, and those whose client
    has left while the engine still works on them."""
    hardware: Line = ""
    """For people: `Apple M2 Ultra, 192 GiB` or `4 x86_64 cores, 16 GiB`."""
    detail: Line = ""
    """Why the state is what it is, with what to do next where something is wrong."""
    advice: tuple[Line, ...] = Field(default=(), max_length=8)
    """What would serve better on this machine and how to get it."""
    downloads: tuple[Download, ...] = Field(default=(), max_length=16)
    """Under way, and those that ended a short while ago."""
    memory_total_bytes: int | None = Field(default=None, ge=0, le=2**53)
    """What models may take here: of RAM, of unified memory, of the GPU's own."""
    memory_held_bytes: int | None = Field(default=None, ge=0, le=2**53)
    """Of that, what the loaded ones take."""

    def to_line(self) -> bytes:
        """One line of the report stream, newline included."""
        return self.model_dump_json().encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Report:
        """Raises `WireError` with a sentence that names what was wrong and the peer's version."""
        return _parse(cls, line)


class Join(_Message):
    """An agent asks a balancer, whose address it was told, to watch it."""

    wire: int = WIRE_VERSION
    id: Word
    port: int = Field(ge=1, le=65535)
    """Where the agent listens, on the address from which this message comes."""


Nonce = Annotated[str, Field(min_length=22, max_length=128), AfterValidator(_printable)]
"""At least 128 bits of chance, as text."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Hello(_Message):
    """A balancer wants to know an agent."""

    wire: int = WIRE_VERSION
    balancer: Word
    """Its id."""
    nonce: Nonce


class ProvenBy(StrEnum):
    """What an agent wants to be shown."""

    KEY = "key"
    """The cluster key."""
    CODE = "code"
    """It has none, and shows a code to whoever sits before it."""


class HelloAnswer(_Message):
    """Who the agent is."""

    wire: int = WIRE_VERSION
    id: Word
    nonce: Nonce
    by: ProvenBy = ProvenBy.KEY


class Proof(_Message):
    """The balancer's half of the handshake."""

    wire: int = WIRE_VERSION
    balancer: Word
    nonce: Nonce
    """The balancer's own, as in its `Hello`."""
    agent_nonce: Nonce
    proof: Digest


class ProofAnswer(_Message):
    """The agent's."""

    proof: Digest


class NewKey(_Message):
    """The cluster's key from now on."""

    key: Annotated[str, Field(min_length=16, max_length=512), AfterValidator(_one_word)]


class ModelOrder(_Message):
    """What a balancer wants done with one model of an agent's."""

    name: Word
    """Of a model that is there; of a download the name that it shall get, or the hub's own
    (`org/model`)."""
    repo: Word | None = None
    """To download: the hub's name, if `name` is not it."""
    revision: Word | None = None
    """Branch, tag or commit; None: the default branch."""
    file: Word | None = None
    """Of a repository that holds several GGUF files, the one to fetch (a file name or a quantisation such as
    `Q4_K_M`); None: the best that fits."""
    force: bool = False
    """To unload: also while it answers requests, which are ended."""


class ModelList(_Message):
    """What an agent has, for people and commands."""

    models: tuple[ServedModel, ...] = Field(default=(), max_length=256)
    downloads: tuple[Download, ...] = Field(default=(), max_length=16)


def parse_order(body: bytes) -> ModelOrder:
    """Raises `WireError`."""
    return _parse(ModelOrder, body)


def parse_models(body: bytes) -> ModelList:
    """Raises `WireError`."""
    return _parse(ModelList, body)


def parse_join(body: bytes) -> Join:
    """Raises `WireError`."""
    return _parse(Join, body)


def parse_hello(body: bytes) -> Hello:
    """Raises `WireError`."""
    return _parse(Hello, body)


def parse_hello_answer(body: bytes) -> HelloAnswer:
    """Raises `WireError`."""
    return _parse(HelloAnswer, body)


def parse_proof(body: bytes) -> Proof:
    """Raises `WireError`."""
    return _parse(Proof, body)


def parse_proof_answer(body: bytes) -> ProofAnswer:
    """Raises `WireError`."""
    return _parse(ProofAnswer, body)


def parse_new_key(body: bytes) -> NewKey:
    """Raises `WireError`."""
    return _parse(NewKey, body)


@dataclass(frozen=True, slots=True)
class Announced:
    """What an mDNS record says beside address and port. Anybody may say anything: a hint, no identity."""

    id: str
    """Of the agent, or of the balancer."""
    tag: str = ""
    """`handshake.cluster_tag` of the key that it holds; empty: none yet."""
    fingerprint: str = ""
    """Of an agent's certificate; empty: it does not say."""


def txt_record(announced: Announced) -> dict[str, str]:
    """As DNS-SD properties; each string within RFC 6763's 255 bytes."""
    record = {"v": str(WIRE_VERSION), "id": announced.id, "c": announced.tag, "fp": announced.fingerprint}
    return {name: value for name, value in record.items() if value}


def parse_txt(properties: Mapping[bytes, bytes | None]) -> Announced:
    """Raises `WireError` for a record of another version, or one without a usable id."""
    version = _text(properties.get(b"v"))
    if version != str(WIRE_VERSION):
        raise WireError(f"its record speaks wire version {_shown_version(version)}, this side {WIRE_VERSION}")
    named = _text(properties.get(b"id"))
    if not named or len(named) > 128 or not named.isprintable():
        raise WireError("its record has no usable id")
    tag, fingerprint = _text(properties.get(b"c")), _text(properties.get(b"fp"))
    return Announced(
        named,
        tag if re.fullmatch(r"[0-9a-f]{16}", tag) else "",
        fingerprint if re.fullmatch(r"[0-9a-f]{64}", fingerprint) else "",
    )


def _shown_version(version: str) -> str:
    """As another side gives it, fit for a sentence."""
    return version if version.isascii() and version.isalnum() and len(version) <= 8 else "unknown"


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _parse(kind: type[_M], data: bytes) -> _M:
    if len(data) > MAX_REPORT_BYTES:
        raise WireError(f"a message of {len(data)} bytes, at most {MAX_REPORT_BYTES} are read")
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise WireError(f"not JSON: {error.msg} at byte {error.pos}") from None
    if isinstance(fields, dict) and fields.get("wire", WIRE_VERSION) != WIRE_VERSION:
        theirs = _shown_version(str(fields["wire"]))
        raise WireError(f"it speaks wire version {theirs}, this side {WIRE_VERSION}: update the older one")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        raise WireError(f"{where}: {first['msg']}") from None
