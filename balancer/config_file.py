"""The JSON file that people edit: its schema, and faults that say where and what instead, all at once.

`parse` is pure; `read` adds the reading of the file.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import NoDecode

from balancer.core.model import ModelName, Worker, WorkerId
from balancer.core.placement import POLICIES
from balancer.worker_types import DEFAULT_TYPE, OLLAMA_DEFAULT_TAG, WORKER_TYPES, WorkerType, row_of
from worker_agent.forgiving_json import (
    Array,
    Complaint,
    ConfigFaults,
    Fault,
    Node,
    Object,
    Place,
    Scalar,
    did_you_mean,
    find,
    is_key,
    key_of,
    place_of,
    plain,
    read_text,
    shown,
    shown_kind,
    tree,
    value_of,
)
from worker_agent.sources import Network, parse_networks

MAX_WORKERS = 1024
MAX_NAMES = 64  # that are looked up
MAX_ALIASES = 256  # of one worker
DEFAULT_MAX_CONCURRENT_REQUESTS = 5


class _Misnamed(ValueError):
    """A name within a value that does not fit the rest of it: the fault is told where the name stands."""

    def __init__(self, sentence: str, *within: str, key: bool) -> None:
        super().__init__(sentence)
        self.within = within
        """The way from the value to the name."""
        self.key = key
        """The name is the key itself, not what stands behind it."""


# The schema. The docstrings of the fields are the descriptions in the published JSON schema ...


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _printable(value: str) -> str:
    if not value.isprintable() or not value.strip():
        raise ValueError(f"{shown(value)} holds nothing, or a character that cannot be printed")
    return value


Name = Annotated[str, Field(min_length=1, max_length=128)]
PrintableName = Annotated[Name, AfterValidator(_printable)]
KeyFile = Annotated[str, Field(min_length=1, max_length=1024)]
Seconds = Annotated[float, Field(ge=0.1, le=86_400)]
Weight = Annotated[float, Field(ge=0, le=1000)]


class SecretReference(_Strict):
    """Where a key is to be read when the balancer starts: exactly one of the two."""

    env: Name | None = None
    """The name of an environment variable that holds the key."""
    file: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """A file that holds the key and nothing else; a relative path starts at the folder of this JSON file."""

    @model_validator(mode="before")
    @classmethod
    def _never_the_key_itself(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(
                'a key does not belong into this file: write {"env": "NAME"} or {"file": "PATH"}, '
                "and put the key there"
            )
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> SecretReference:
        if self.env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.env):
            raise _Misnamed(
                "this is no name of a variable: expected one like OPENAI_API_KEY, never the key itself",
                "env",
                key=False,
            )
        if (self.env is None) == (self.file is None):
            raise ValueError('api_key takes exactly one of {"env": "NAME"} and {"file": "PATH"}')
        return self


class Location(NamedTuple):
    """Where a worker is."""

    tls: bool
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^\]/@]+\]|[^:/\[\]@]+)(:(?P<port>\d{1,5}))?(?P<path>(/[A-Za-z0-9._~-]+)*)/?"
)


def located(url: str, port: int) -> Location:
    """The parts of a url; where it names no port, 443 for https, and this one for http.

    Raises `ValueError` for what is no such url.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError(
            f"{shown(_harmless(url))} is not a url: expected one like https://host:port or https://host/v1,"
            " without user, question mark or key"
        )
    tls = found["scheme"] == "https"
    number = int(found["port"] or (443 if tls else port))
    if not 1 <= number <= 65535:
        raise ValueError(f"{number} is not a port: expected one from 1 to 65535")
    return Location(tls, _bare_host(found["host"]), number, found["path"])


def _plain_url(value: str) -> str:
    located(value, 80)
    return value


class WorkerEntry(_Strict):
    """One serving endpoint of the room, or a remote API to fall back on."""

    host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Name or address of the machine, alone: no `http://`, no port. Or give `url`."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Left out: 4100 for agent, 11434 for ollama, 1234 for lm_studio, 8080 for llama_cpp, 8000 for openai and
    vllm."""
    url: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """In place of `host`, `port` and `tls`: `https://host:port`. A path after it stands for `/v1`, as in the
    `base_url` of OpenAI's SDKs: `https://api.example.com/api/v1`."""
    type: Literal["agent", "ollama", "lm_studio", "openai", "llama_cpp", "vllm", "azure", "anthropic"] = (
        DEFAULT_TYPE
    )
    """How to talk to it. Left out: openai, which every compatible server answers to. llama_cpp and vllm tell
    more of themselves than that. azure and anthropic are remote APIs, and always fallbacks."""
    id: PrintableName | None = None
    """Its name in logs, metrics and the dashboard. Left out: `host:port`. For an agent: its own id."""
    model: PrintableName | None = None
    """The one model to ask of it. Left out: all models that it reports."""
    aliases: Annotated[dict[PrintableName, PrintableName], Field(max_length=MAX_ALIASES)] = Field(
        default_factory=dict
    )
    """Further names under which clients may ask, each with this worker's own name of the model: {"qwen":
    "qwen2.5:7b-instruct-q4_K_M"}. Workers with one alias for their models share the requests for it."""
    fallback: bool | None = None
    """It is outside of the room, and may cost money: asked only where no worker of the room can answer, and
    never for a request that is to stay local. Left out: true for azure and anthropic, else false."""
    models: Annotated[dict[PrintableName, PrintableName], Field(max_length=MAX_ALIASES)] = Field(
        default_factory=dict
    )
    """Of a fallback: the names under which clients may ask, each with the API's own name (for azure: of the
    deployment): {"llama-3.1-8b": "gpt-4o-mini"}. It is asked for these and no others."""
    max_concurrent_requests: int | None = Field(default=None, ge=1, le=4096)
    """At most so many requests at once. Left out: 5, and for an agent what its engine can do."""
    continues: bool | None = None
    """Whether it goes on with a chat answer that another worker began and could not end. Left out: tried
    with three short questions of our own when it first matters. An agent says so itself."""
    api_key: SecretReference | None = None
    """Sent as `Authorization: Bearer`; to azure as `api-key`, to anthropic as `x-api-key`."""
    api_version: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    """Of type azure: the dated API to speak, `2024-10-21`. Left out: the newer one, which has no dates."""
    tls: bool | None = None
    """Speak HTTPS to it. Left out: true for an agent, else false. An agent's certificate is remembered when
    it is first met; false is for one whose own settings say `"tls": false`."""
    ca_file: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Certificates (PEM) by which its own is verified, in place of those that the system trusts: of a private
    CA, or its own. A relative path starts at the folder of this JSON file."""

    @field_validator("host")
    @classmethod
    def _host_alone(cls, value: str | None) -> str | None:
        return None if value is None else _bare_host(value)

    @field_validator("url")
    @classmethod
    def _url_without_secrets(cls, value: str | None) -> str | None:
        return None if value is None else _plain_url(value)

    @field_validator("api_version")
    @classmethod
    def _a_date(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d{4}-\d{2}-\d{2}(-preview)?", value):
            raise ValueError(f"{shown(value)} is no version of Azure's API: expected one like 2024-10-21")
        return value

    @model_validator(mode="after")
    def _is_somewhere(self) -> WorkerEntry:
        if self.host is None and self.url is None and self._row.default_url is None:
            if self.type == "azure":
                raise ValueError('"url" is missing: expected one like "https://NAME.openai.azure.com"')
            raise ValueError('"host" is missing: expected the name or address of a machine, or "url" instead')
        if self.url is not None:
            for key in ("host", "port", "tls"):
                if key in self.model_fields_set:
                    raise _Misnamed(f'"url" says it all: leave out "{key}"', key, key=True)
        if self.type == "agent" and self._path:
            raise _Misnamed(
                f"an agent has no path: expected the url without {shown(self._path)}", "url", key=False
            )
        if self.ca_file is not None and self.type == "agent":
            raise _Misnamed(
                "an agent's certificate is remembered when it is first met: leave out ca_file",
                "ca_file",
                key=True,
            )
        if self.ca_file is not None and not self._is_https:
            raise _Misnamed(
                'ca_file is for https: add "tls": true, or write https:// in the url', "ca_file", key=True
            )
        return self

    @model_validator(mode="after")
    def _key_where_it_is_sent(self) -> WorkerEntry:
        if self.api_key is not None and self._row.key_headers is None:
            takers = ", ".join(name for name, row in WORKER_TYPES.items() if row.key_headers is not None)
            raise ValueError(f'api_key is sent to the types {takers}; this worker is of type "{self.type}"')
        return self

    @model_validator(mode="after")
    def _fallbacks_are_told_from_the_room(self) -> WorkerEntry:
        if self._row.is_remote and self.fallback is False:
            raise _Misnamed(f"type {self.type} is always a fallback: leave this out", "fallback", key=False)
        if self.fallback and not self._row.is_remote and self.type != DEFAULT_TYPE:
            raise _Misnamed(
                f"type {self.type} is of the room: a fallback is of type openai, azure or anthropic",
                *("fallback",),
                key=False,
            )
        if self.is_fallback:
            self._insist_on_what_a_fallback_needs()
        elif self.models:
            raise _Misnamed(
                '"models" is for a fallback: use "aliases" for a worker of the room', "models", key=True
            )
        if self.api_version is not None and self.type != "azure":
            raise _Misnamed("api_version is for type azure", "api_version", key=True)
        return self

    def _insist_on_what_a_fallback_needs(self) -> None:
        for key, why in (
            ("aliases", 'its names stand in "models"'),
            ("model", 'its names stand in "models"'),
            ("continues", "it goes on with no answer that was begun in the room"),
        ):
            if key in self.model_fields_set:
                raise _Misnamed(f"a fallback has no {shown(key)}: {why}", key, key=True)
        if self.api_key is None:
            raise ValueError(
                '"api_key" is missing: a remote API is used with a key only, expected {"env": "NAME"} or'
                ' {"file": "PATH"}'
            )
        if not self.models:
            raise ValueError(
                '"models" is missing: expected what may be asked of it, {"name for clients": "name there"}'
            )
        if self._row.is_remote and not self._is_https:
            raise ValueError(
                f"type {self.type} is spoken to over https only: its key would be read by others"
            )
        for name, own in self.models.items():
            # It becomes a part of the path.
            if self.api_version is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", own):
                raise _Misnamed(f"{shown(own)} is no name of a deployment", "models", name, key=False)

    @model_validator(mode="after")
    def _continues_where_nobody_says(self) -> WorkerEntry:
        if self.continues is not None and self.type == "agent":
            raise ValueError("continues is for workers without an agent: an agent finds out by itself")
        return self

    @model_validator(mode="after")
    def _aliases_of_what_is_served(self) -> WorkerEntry:
        if self.model is None:
            return self
        for alias, own in self.aliases.items():
            if self._as_configured(own) != self.model:
                hint = did_you_mean(own, [self.model], listed=False) or ': name that, or leave "model" out'
                raise _Misnamed(
                    f'the alias {shown(alias)} is for {shown(own)}, but "model" of this worker is'
                    f" {shown(self.model)}{hint}",
                    "aliases",
                    alias,
                    key=False,
                )
        return self

    def _as_configured(self, own: str) -> str:
        """Ollama's name of a model with its default tag and without it are one name."""
        if self.model is not None and self.type == "ollama" and _tagged(own) == _tagged(self.model):
            return self.model
        return own

    @property
    def _row(self) -> WorkerType:
        return WORKER_TYPES[self.type]

    @property
    def is_fallback(self) -> bool:
        return self._row.is_remote or bool(self.fallback)

    @property
    def _address(self) -> Location:
        if self.host is not None:
            tls = self.type == "agent" if self.tls is None else self.tls
            return Location(tls, self.host, self.port or self._row.default_port, "")
        return located(self.url or self._row.default_url or "", self._row.default_port)

    @property
    def _is_https(self) -> bool:
        return self._address.tls

    @property
    def _path(self) -> str:
        return self._address.path

    @property
    def effective_port(self) -> int:
        return self._address.port

    @property
    def effective_id(self) -> WorkerId:
        return WorkerId(self.id or f"{self._address.host}:{self.effective_port}")

    def headers(self, key: str) -> Mapping[str, str]:
        """What carries its key with every request."""
        made = row_of(self.worker()).key_headers
        return {} if made is None else made(key)

    def worker(self) -> Worker:
        """The unit of routing that this entry describes, defaults filled in."""
        cap = self.max_concurrent_requests
        if cap is None and self.type != "agent":  # only an agent knows how much its engine does at once
            cap = DEFAULT_MAX_CONCURRENT_REQUESTS
        names = self.models if self.is_fallback else self.aliases
        return Worker(
            id=self.effective_id,
            type=self.type,
            url=self._address.url,
            cap=cap,
            only=frozenset() if self.model is None else frozenset({ModelName(self.model)}),
            aliases=tuple(
                (ModelName(name), ModelName(self._as_configured(own))) for name, own in names.items()
            ),
            continues=self.continues,
            fallback=self.is_fallback,
            ca_file=self.ca_file,
            api_version=self.api_version,
        )


class DiscoverEntry(_Strict):
    """Workers behind a DNS name: each address that it has, now and later, is a worker."""

    dns: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """A name whose addresses (A, AAAA) are all workers: `llm-agents.default.svc.cluster.local`."""
    srv: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """In place of `dns`, a name of SRV records, which tell of ports too: `_llm-worker._tcp.lab.example`."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Beside `dns`. Left out: as for workers of this type."""
    type: Literal["agent", "ollama", "lm_studio", "openai", "llama_cpp", "vllm"] = "agent"
    """How to talk to what is there, by `http://` unless it is an agent."""
    model: PrintableName | None = None
    """The one model to ask of them. Left out: all models that each reports."""
    aliases: Annotated[dict[PrintableName, PrintableName], Field(max_length=MAX_ALIASES)] = Field(
        default_factory=dict
    )
    """As of a worker; not for agents."""
    max_concurrent_requests: int | None = Field(default=None, ge=1, le=4096)
    """Of each, as of a worker; not for agents."""
    api_key: SecretReference | None = None
    """The same for all, as of a worker."""

    @field_validator("dns", "srv")
    @classmethod
    def _name_alone(cls, value: str | None) -> str | None:
        return None if value is None else _bare_host(value)

    @model_validator(mode="after")
    def _one_name(self) -> DiscoverEntry:
        if (self.dns is None) == (self.srv is None):
            raise ValueError('expected exactly one of "dns": "NAME" and "srv": "_SERVICE._tcp.DOMAIN"')
        if self.srv is not None and self.port is not None:
            raise _Misnamed("SRV records tell of the port: leave it out", "port", key=True)
        if self.type == "agent":
            for key in ("model", "aliases", "max_concurrent_requests"):
                if key in self.model_fields_set:
                    raise _Misnamed("an agent says this itself: leave it out", key, key=True)
        if self.api_key is not None and WORKER_TYPES[self.type].key_headers is None:
            raise _Misnamed(f"nothing of type {self.type} takes a key", "api_key", key=True)
        return self

    @property
    def name(self) -> str:
        return self.dns or self.srv or ""

    @property
    def effective_port(self) -> int | None:
        """None: the records tell."""
        return None if self.dns is None else self.port or WORKER_TYPES[self.type].default_port

    def pattern(self) -> WorkerEntry:
        """What each of its workers is, but for where."""
        more = {key: getattr(self, key) for key in ("model", "aliases", "max_concurrent_requests", "api_key")}
        return WorkerEntry(
            host=self.name,
            type=self.type,
            **{key: value for key, value in more.items() if key in self.model_fields_set},
        )


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else name + OLLAMA_DEFAULT_TAG


_SCORERS = {
    "reliability": "Share of its requests that went well, the latest counting most.",
    "expected_latency": "The least time that the request may take anywhere, by that of this worker.",
    "availability": "Share of the worker's slots that are free.",
    "success_rate": "Share of its latest requests that went well.",
    "response_time": "The best average in the room by its own average.",
    "idleness": "1 for those with the least share of their slots in use, 0 for others.",
    "rest": "1 for the one that was picked longest ago, 0 for others.",
}
"""What each scorer of any policy looks at, for those who edit the file."""


class ScorerWeights(RootModel[dict[str, Weight]]):
    """How much each scorer of the policy counts; at least one above 0."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "additionalProperties": False,
            "properties": {
                name: {"type": "number", "minimum": 0, "maximum": 1000, "description": description}
                for name, description in _SCORERS.items()
            },
        },
    )

    def of(self, policy: str) -> ScorerWeights:
        """These, and for what is left out the policy's own.

        Raises `ValueError` for a scorer that the policy does not have, and where all weigh 0.
        """
        own = POLICIES[policy].weights
        for name in self.root:
            if name not in own:
                raise _Misnamed(
                    f"the policy {shown(policy)} has no scorer {shown(name)}: expected {' or '.join(own)}",
                    name,
                    key=True,
                )
        weights = {**own, **self.root}
        if not any(weights.values()):
            raise ValueError("every scorer weighs 0: expected at least one weight above 0")
        return ScorerWeights(weights)


def _default_data_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "llm-room-balancer"
    return Path.home() / ".local" / "share" / "llm-room-balancer"


def _folder(value: object) -> object:
    match value:
        case None:
            return _default_data_dir()
        case "":
            raise ValueError("an empty path: expected a folder, or null for the platform's own place")
        case str() if "\0" in value:
            raise ValueError("a path cannot hold a NUL character")
        case str() if value == "~" or value.startswith("~/"):  # another user's `~name` is not looked up
            return Path.home() / value[2:]
        case str():
            return Path(value)
    return value


def _capital(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _listed(value: object, what: str) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"expected {what}")
    return [part.strip().lower() for part in parts]


def _host_names(value: object) -> tuple[str, ...]:
    """From a list, or from names with commas between them. Raises `ValueError`."""
    names = _listed(value, "names such as balancer.lab.org")
    for name in names:
        if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
            raise ValueError(
                f"{name[:60]!r} is not a name such as balancer.lab.org, alone and without a port"
            )
    return tuple(names)


def _web_origins(value: object) -> tuple[str, ...]:
    """From a list, or from origins with commas between them. Raises `ValueError`."""
    origins = _listed(value, "origins such as https://chat.lab.org")
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+", origin):
            raise ValueError(f"{origin[:60]!r} is not an origin such as https://chat.lab.org, without a path")
    return tuple(origins)


class Tunables(_Strict):
    """Every setting beside the workers, with default and bounds: of file, environment and flags."""

    host: Annotated[str, Field(min_length=1, max_length=253)] = "0.0.0.0"
    """The address to listen on; 0.0.0.0: all of this machine's."""
    port: int = Field(default=4000, ge=1, le=65535)
    """The port to listen on."""
    data_dir: Annotated[
        Path, BeforeValidator(_folder), WithJsonSchema({"type": ["string", "null"], "minLength": 1})
    ] = Field(default_factory=_default_data_dir)
    """Where batches and files are kept; null: the platform's place under the home directory."""
    admin_key_file: KeyFile | None = None
    """Holds the key for /admin; null: `admin_key` in data_dir, made on the first start. A relative path
    starts at the folder of this JSON file. The variable BALANCER_ADMIN_KEY comes before it."""
    cluster_key_file: KeyFile | None = None
    """Holds the key with which agents let their models be managed; null: `cluster_key` in data_dir, made on
    the first start. A relative path as above. The variable BALANCER_CLUSTER_KEY comes before it."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_capital)] = "INFO"
    """The least that is logged."""
    log_format: Literal["text", "json"] = "text"
    """text: lines for people. json: one object in each line, for programs."""
    watch_config: bool = True
    """Read this file again whenever it is saved, and apply what has changed."""
    allow_networks: Annotated[
        tuple[Network, ...],
        NoDecode,
        BeforeValidator(parse_networks),
        WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    ] = ()
    """Served beside private addresses, such as a campus network: 131.1.0.0/16."""
    allow_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_host_names),
        WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    ] = ()
    """Names by which clients call the balancer, beside addresses, localhost, names of one word and its own
    host name: balancer.lab.org."""
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_web_origins),
        WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    ] = ()
    """Web pages that may ask, by their origin, beside those of the balancer's own: https://chat.lab.org."""
    auth: Literal["lan", "keys"] = "lan"
    """Who may ask for answers. lan: whoever has an address that is served. keys: of those, who brings a key
    made by `balancer keys create`."""
    tls: Literal["off", "self-signed", "files"] = "off"
    """How clients are spoken to. self-signed: with a certificate that is made and kept in data_dir. files:
    with that of tls_cert_file and tls_key_file."""
    tls_cert_file: KeyFile | None = None
    """The certificate (PEM), with those between it and its root. A relative path starts at the folder of
    this JSON file."""
    tls_key_file: KeyFile | None = None
    """Its private key (PEM), without a password. A relative path as above."""
    enable_metrics: bool = True
    """Serve /metrics for Prometheus."""
    mdns: bool = True
    """Look for agents on the local network by mDNS, and let agents find this balancer."""
    health_check_interval: Seconds = 5.0
    """Seconds between two probes of a worker that has no agent."""
    request_timeout: Seconds = 300.0
    """Seconds that an interactive request may take in all, once a worker has it."""
    request_timeout_batch: Seconds = 3600.0
    """The same for requests of class batch: a slow machine may take long over a long paper."""
    connect_timeout: Seconds = 10.0
    """Seconds that connecting to a worker may take."""
    read_timeout: Seconds = 60.0
    """Seconds that a worker may stay silent within an answer."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """How often a failed request is tried again, on another worker where there is one."""
    continue_streams: bool = True
    """Where a worker fails in the middle of a streamed answer, let another one of the same model go on."""
    hedge: bool = False
    """Where a chat's first word is late and another worker is idle, ask that one too; the first answers. At
    most one in twenty chats is asked twice."""
    comment_after: float = Field(default=5.0, ge=0, le=3600)
    """Seconds after which a streaming client that waits is told why, in a comment; 0: never."""
    max_queue: int = Field(default=1000, ge=0, le=100_000)
    """Interactive requests that may wait for room at once; one more is refused."""
    max_queue_batch: int = Field(default=10_000, ge=0, le=1_000_000)
    """The same for requests of class batch."""
    max_wait: Seconds = 120.0
    """Seconds that an interactive request waits for room before it is refused."""
    max_wait_batch: Seconds = 86_400.0
    """The same for requests of class batch."""
    batch_reserve: float = Field(default=0.5, ge=0, le=0.9)
    """Share of a worker's slots that is kept from class batch while people use it."""
    batch_floor: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the room's work that class batch gets even under continuous chats."""
    max_body_mib: int = Field(default=32, ge=1, le=1024)
    """The largest request body, in MiB."""
    body_timeout: Seconds = 30.0
    """Seconds in which the whole body of a request has to come."""
    slow_reader_timeout: Seconds = 60.0
    """Seconds that a client may leave its answer unread before it is dropped."""
    max_connections: int = Field(default=10_000, ge=8, le=1_000_000)
    """Connections of clients at once; one more is refused."""
    max_connections_per_address: int = Field(default=200, ge=1, le=1_000_000)
    """The same from one address; programs on the balancer's own machine are not held to it."""
    hot_path: bool = True
    """Read requests for answers by the balancer's own fast reader; false: all by aiohttp."""
    max_concurrent_batch: int = Field(default=50, ge=1, le=10_000)
    """Batch lines that are under way at once."""
    policy: Literal["expected_latency", "weighted_random", "least_loaded", "round_robin"] = "expected_latency"
    """How a worker is picked. expected_latency: by the seconds that the request is expected to take on each,
    learned from what each has done; the others look only at who is free."""
    scorer_weights: ScorerWeights = Field(default=ScorerWeights({}), validate_default=True)
    """How much each scorer of the policy counts; one that is left out has the policy's own weight. In
    expected_latency a weight is an exponent: the larger, the more often the best worker is picked."""
    breaker_trip_after: int = Field(default=3, ge=1, le=1000)
    """Failures in a row after which a worker is left alone."""
    breaker_rest: Seconds = 10.0
    """Seconds for which it is left alone before a probe."""
    drain_timeout: float = Field(default=30.0, ge=0, le=86_400)
    """Seconds that running requests may still take when the balancer stops."""

    @field_validator("scorer_weights")
    @classmethod
    def _weights_of_the_policy(cls, weights: ScorerWeights, info: ValidationInfo) -> ScorerWeights:
        policy = info.data.get("policy")  # not there: it is at fault itself
        return weights if policy is None else weights.of(policy)


class ConfigFile(Tunables):
    """The JSON file of a room: its workers, and any setting that is not to stay at its default."""

    schema_: str | None = Field(default=None, alias="$schema")
    """The JSON schema that an editor may use for completion."""
    workers: Annotated[tuple[WorkerEntry, ...], Field(max_length=MAX_WORKERS)] = ()
    """The workers that always belong to the room; agents also join by themselves."""
    discover: Annotated[tuple[DiscoverEntry, ...], Field(max_length=MAX_NAMES)] = ()
    """DNS names behind which there are workers, looked up again and again."""


def published_schema() -> str:
    """The JSON schema of the file, as `configs/balancer.schema.json` has it."""
    return json.dumps(_schema() | {"title": "The JSON file of llm-room-balancer"}, indent=2) + "\n"


# Reading ...


@dataclass(frozen=True, slots=True)
class Placed:
    """The content of a file, and where in it everything stands."""

    content: ConfigFile
    keys: Mapping[str, Place]
    """Of each setting that the file has; of the others there is none."""
    workers: tuple[Place, ...]
    """Of each entry, in the order of `content.workers`."""


def read(path: Path) -> ConfigFile:
    """The file's content, defaults filled in.

    Raises `ConfigFaults` with everything that is wrong with it, a missing file included.
    """
    return read_placed(path).content


def read_placed(path: Path) -> Placed:
    """The same, with the places of everything."""
    return _placed(read_text(path), str(path))


def parse(text: str, name: str) -> ConfigFile:
    """The content of a file that calls itself `name`, defaults filled in.

    Raises `ConfigFaults`, and nothing else.
    """
    return _placed(text, name).content


def _placed(text: str, name: str) -> Placed:
    document = _document(text)
    faults = sorted(document.faults)
    if faults or document.content is None:
        raise ConfigFaults([Fault(name, place, sentence) for place, sentence in faults])
    return Placed(document.content, document.keys, document.entries)


@functools.lru_cache(maxsize=1)
def _document(text: str) -> _Document:
    """The file is looked at several times a second, and seldom another one."""
    return _Document(text)


class _Document:
    """One text on its way to a `ConfigFile`; what is wrong is collected on the way."""

    def __init__(self, text: str) -> None:
        self.content: ConfigFile | None = None
        self.faults: list[Complaint] = []
        self.keys: Mapping[str, Place] = {}
        self.entries: tuple[Place, ...] = ()
        root = tree(text, self.faults, instead='{"workers": [...]}')
        if root is None:
            return
        values = plain(root, self.faults)
        spoiled = {place for place, _ in self.faults}
        try:
            self.content = ConfigFile.model_validate(values)
        except ValidationError as error:
            told = (_sentence(details, root) for details in error.errors(include_url=False))
            # What could not even be read was told already.
            self.faults += [complaint for complaint in told if complaint[0] not in spoiled]
        self.faults += _clashes(root)
        self.entries = tuple(place_of(entry.token) for entry in _entries(root))
        if not self.faults and isinstance(root, Object):
            self.keys = {key_of(token): place_of(token) for token, _ in root.members}


# From pydantic's complaints to ours ...


def _sentence(details: ErrorDetails, root: Node) -> Complaint:
    loc = details["loc"]
    if loc[-1:] == ("[key]",):  # pydantic's way to say that the key is wrong, not its value
        name = f"the name {shown(loc[-2])}"
        return find(
            root, loc[:-1], key=True
        ), f"{name} cannot be used: expected 1 to 128 printable characters"
    place = find(root, loc, key=details["type"] == "extra_forbidden")
    subject = _subject(loc)
    match details["type"]:
        case "extra_forbidden" if "api_key" in loc:  # a key that was put in the wrong place is not shown
            return place, "unknown key: expected one of env, file"
        case "extra_forbidden":
            known = list(_schema_at(loc[:-1]).get("properties", {}))
            return place, f"unknown key {shown(loc[-1])}{did_you_mean(str(loc[-1]), known)}"
        case "missing":
            return place, f"{subject} is missing: expected {expected(loc)}"
        case "value_error":
            error = details.get("ctx", {}).get("error", details["msg"])
            if isinstance(error, _Misnamed):
                place = find(root, (*loc, *error.within), key=error.key)
            return place, str(error)
    if loc[-1:] == ("url",) or loc[-1:] == ("host",) or "api_key" in loc:
        kind = shown_kind(details["input"])
        return place, f"{subject} is {kind}: expected {expected(loc)}"
    choices = _schema_at(loc).get("enum", [])
    hint = did_you_mean(str(details["input"]), choices, listed=False)
    return place, f"{subject} is {shown(details['input'])}: expected {expected(loc)}{hint}"


def expected(loc: Sequence[str | int]) -> str:
    """What may stand at a place of the schema, in words: `a whole number from 1 to 65535 (default 4000)`."""
    if not loc:
        return 'an object like {"workers": [...]}'
    schema = _schema_at(loc)
    default = schema.get("default")
    return _words(schema) + (f" (default {shown(default)})" if isinstance(default, str | int | float) else "")


def _words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        choices = ", ".join(shown(choice) for choice in schema.get("enum", [schema.get("const")]))
        return f"one of {choices}" if "enum" in schema else choices
    match schema.get("type"):
        case "integer" | "number" as kind:
            noun = "a whole number" if kind == "integer" else "a number"
            return f"{noun} from {schema.get('minimum', '')} to {schema.get('maximum', '')}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list in [ ], of at most {schema.get('maxItems', MAX_WORKERS)}"
        case "object" if "properties" not in schema:
            return "an object in { } of names, each with " + _words(_resolved(schema["additionalProperties"]))
        case "object":
            return "an object in { } with " + ", ".join(schema.get("properties", {}))
    if "maxLength" in schema:
        return f"text in double quotes, 1 to {schema['maxLength']} characters"
    return "text in double quotes"


@functools.cache
def _schema() -> dict[str, Any]:
    return ConfigFile.model_json_schema()


def _schema_at(loc: Sequence[str | int]) -> dict[str, Any]:
    schema = _resolved(_schema())
    for part in loc:
        members = schema.get("properties") or {part: schema.get("additionalProperties")}
        inner = schema.get("items") if isinstance(part, int) else members.get(part)
        schema = _resolved(inner or {})
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while True:
        if "anyOf" in schema:  # only ever `X or null` here
            schema = schema["anyOf"][0]
        elif "$ref" in schema:
            schema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        else:
            return schema


def _subject(loc: Sequence[str | int]) -> str:
    match loc:
        case []:
            return "the file"
        case [*_, str(key), int(index)]:
            return f"{key}[{index}]"
    return shown(loc[-1])


# What one entry cannot know: the others ...


def _clashes(root: Node) -> Iterator[Complaint]:
    """Two workers under one id, or one server listed twice; read from the nodes, valid entries or not."""
    ids: dict[str, Place] = {}
    servers: dict[tuple[str, int, str], Place] = {}
    for entry in _entries(root):
        place = place_of(entry.token)
        scalars = {key: (place, value) for key, place, value in _scalars(entry)}
        _, host = scalars.get("host", (place, None))
        _, kind = scalars.get("type", (place, DEFAULT_TYPE))
        _, port = scalars.get("port", (place, None))
        row = WORKER_TYPES.get(kind) if isinstance(kind, str) else None
        if port is None and row is not None:
            port = row.default_port
        at_server, url = scalars.get("url", (place, row.default_url if row is not None else None))
        path = ""
        if isinstance(host, str):
            at_server = scalars["host"][0]
        elif isinstance(url, str):
            with suppress(ValueError):
                _, host, port, path = located(url, port if isinstance(port, int) else 80)
        at_id, own = scalars.get("id", (place, None))
        if isinstance(host, str) and isinstance(port, int):
            server = f"{host}:{port}"
            earlier = servers.setdefault((host.lower().strip("[]"), port, path), place)
            if earlier is not place:
                yield at_server, f"{shown(server + path)} is the worker of line {earlier.line} already"
            else:
                own = own or server
        if isinstance(own, str):
            earlier = ids.setdefault(own, place)
            if earlier is not place:
                yield at_id, f"the id {shown(own)} is taken by the worker of line {earlier.line}"


def _entries(root: Node) -> Iterator[Object]:
    if isinstance(root, Object):
        for token, node in root.members:
            if is_key(token, "workers") and isinstance(node, Array):
                yield from (item for item in node.items if isinstance(item, Object))


def _scalars(entry: Object) -> Iterator[tuple[str, Place, object]]:
    for token, node in entry.members:
        if isinstance(node, Scalar):
            try:
                yield key_of(token), place_of(node.token), value_of(node.token)
            except ValueError:
                continue


# Words ...


def _bare_host(value: str) -> str:
    """The host without brackets; raises `ValueError` with what to write instead."""
    scheme, found, rest = value.partition("://")
    if found:
        alone = rest.split("/")[0].rpartition("@")[2].split(":")[0]
        advice = f": write {shown(alone)}" if alone else ""
        tls = ', and "tls": true beside it' if scheme.lower() == "https" else ""
        raise ValueError(
            f"{shown(_harmless(value))} is an address with a scheme, expected the host alone{advice}{tls}"
        )
    if "@" in value:
        raise ValueError(f"expected the host alone, without a user: {shown(value.rpartition('@')[2])}")
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if _is_ipv6(bare):
        return bare
    name, found, port = value.rpartition(":")
    if found and port.isascii() and port.isdigit():
        raise ValueError(f'{shown(value)} holds a port, expected "host": {shown(name)}, "port": {port[:5]}')
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise ValueError(
            f"{shown(value)} is not a host: expected a name like mac-studio.local, or an address"
        )
    return value


def _harmless(url: str) -> str:
    """Without a password, and what else may be no matter for a screen."""
    scheme, found, rest = url.partition("://")
    return scheme + found + rest.split("/")[0].split("?")[0].rpartition("@")[2] if found else url


def _is_ipv6(text: str) -> bool:
    try:
        scope = ipaddress.IPv6Address(text).scope_id
    except ValueError:
        return False
    return scope is None or re.fullmatch(r"[A-Za-z0-9_.-]+", scope) is not None
