"""The settings of an agent, composed once: defaults < JSON file < environment < flags.

Only `app` and the command line read them; every other part is given its own policy value.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from worker_agent.forgiving_json import (
    Complaint,
    ConfigFaults,
    Fault,
    Node,
    Object,
    find,
    is_key,
    place_of,
    plain,
    read_text,
    tree,
)
from worker_agent.handshake import LEAST_KEY_CHARACTERS, MOST_KEY_CHARACTERS, is_cluster_key
from worker_agent.log_format import LogFormat
from worker_agent.sources import Network, parse_networks
from worker_agent.wire import DEFAULT_AGENT_PORT, Word

PREFIX = "WORKER_AGENT_"
EngineName = Literal["auto", "llama.cpp", "llama-cpp-python", "mlx", "vllm"]


class SettingsError(Exception):
    """A file, a variable or a flag that cannot be used; one line for each fault."""


def default_data_dir() -> Path:
    """Where an agent keeps its id: the user's data folder, by the platform's own custom."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "llm-room-balancer" / "worker-agent"


def _split(value: object) -> object:
    """A variable is a list with commas; a file's list is one already."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _http_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://, like http://192.168.1.10:4000")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as the look-up of a name does
    except ValueError:  # UnicodeError is one
        host, port = "", None
    if not host or not host.isprintable() or " " in host or port == 0:
        raise ValueError(
            "must name a host and a port, like http://192.168.1.10:4000;"
            " between the dots of a name are 1 to 63 characters"
        )
    return url


def is_http_url(text: str) -> bool:
    """Whether it may stand in `balancers`."""
    try:
        return bool(_http_url(text))
    except ValueError:
        return False


_NO_KEY = f"must hold one word of {LEAST_KEY_CHARACTERS} to {MOST_KEY_CHARACTERS} characters"


def _key(key: SecretStr) -> SecretStr:
    if not is_cluster_key(key.get_secret_value()):
        raise ValueError(_NO_KEY)
    return key


class ModelOptions(BaseModel):
    """How one model is served; what is left out is as for all."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: Annotated[str, Field(min_length=1)] | None = None
    """A GGUF file, a folder or a hub name; None: the downloaded model of this name."""
    engine: EngineName = "auto"
    slots: int | None = Field(default=None, ge=1, le=4096)
    context_tokens: int | None = Field(default=None, ge=256, le=100_000_000)
    threads: int | None = Field(default=None, ge=1, le=1024)
    args: tuple[str, ...] = ()
    """More words for the engine's own command line, after ours; see docs/ENGINES.md."""
    environment: dict[str, str] = Field(default_factory=dict)
    """More variables for the engine."""
    preload: bool = False
    """Load it when the agent starts."""
    pin: bool = False
    """Never unload it to make room for another model."""
    keep_alive_seconds: float | None = Field(default=None, ge=0)
    """Unload it when nobody has asked for it for so long; 0: never; None: as the agent's own setting says."""


class Settings(BaseSettings):
    """Every setting with its final value."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    engine: EngineName = "auto"
    model: Annotated[str, Field(min_length=1)] | None = None
    """A GGUF file, a folder or a hub name; None: the small embedded one."""
    name: Word | None = None
    """What clients ask for; None: made from the model's."""
    id: Word | None = None
    """Unique in the room; None: made once from the host's name and kept in `data_dir`."""
    host: str = "0.0.0.0"
    port: int = Field(default=DEFAULT_AGENT_PORT, ge=0, le=65535)
    """0: any free one."""
    slots: int | None = Field(default=None, ge=1, le=4096)
    """Requests at once; None: the engine's default (llama.cpp and MLX 4, vLLM 32)."""
    context_tokens: int | None = Field(default=None, ge=256, le=100_000_000)
    """Of prompt and answer together, per slot; None: chosen by engine, model and memory."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Of the engine; None: every processor that we may use."""
    data_dir: Path | None = None
    """None: the user's data folder (`~/.local/share/llm-room-balancer/worker-agent` on Linux)."""
    args: tuple[str, ...] = ()
    """More words for the engine's own command line, for `model`; see docs/ENGINES.md."""
    models: dict[Word, ModelOptions] = Field(default_factory=dict)
    """Further models by the names that clients ask for, and options of those that were downloaded."""
    models_dir: Path | None = None
    """Where downloads go; None: `models` in `data_dir`."""
    keep_alive_seconds: float = Field(default=1800.0, ge=0)
    """A model that was loaded on demand is unloaded when nobody has asked for it for so long; 0: never."""
    load_wait_seconds: float = Field(default=300.0, ge=0, le=86_400)
    """How long a request may wait for its model to be loaded, where its sender does not say."""
    memory_share: float = Field(default=0.9, gt=0.1, le=1.0)
    """Of the memory that is really free for models, what they may take."""
    hub_token_file: Path | None = None
    """Holds the token for the hub; else HF_TOKEN or what `hf auth login` has kept."""
    cluster_key: Annotated[SecretStr, AfterValidator(_key)] | None = None
    """Shared with the balancers that may use this machine; None: `cluster_key` in `data_dir`, and where there
    is none, the agent waits until somebody approves it on the balancer."""
    cluster_key_file: Path | None = None
    """Holds it, in place of `cluster_key`."""
    tls: bool = True
    """Speak TLS, with a certificate of our own making that balancers remember."""
    dial_out: bool = False
    """Open the connections to `balancers` from here, for a machine that they cannot reach."""
    keep_awake: bool = True
    """Keep the machine from sleeping while requests run."""
    spare: bool = True
    """Take fewer requests on battery, when the machine is hot or its memory is short."""
    balancers: Annotated[
        tuple[Annotated[str, AfterValidator(_http_url)], ...], NoDecode, BeforeValidator(_split)
    ] = ()
    """To join by address, where multicast does not reach."""
    allow_networks: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(parse_networks)] = ()
    """Served beside private addresses, such as a campus network: 131.1.0.0/16."""
    allow_hosts: Annotated[tuple[Word, ...], NoDecode, BeforeValidator(_split)] = ()
    """DNS names by which balancers ask this machine, beside its addresses and its own name."""
    mdns: bool = True
    drain_seconds: float = Field(default=10.0, ge=0, le=3600)
    """How long running answers may take to end when the agent is stopped."""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(lambda level: str(level).lower())
    ] = Field(default="info", validation_alias=AliasChoices("WORKER_AGENT_LOG_LEVEL", "log_level"))
    """Also read from LOG_LEVEL."""
    log_format: LogFormat = "text"
    """text: lines for people. json: one object in each line, for programs."""


def load(config: Path | None, flags: Mapping[str, object]) -> Settings:
    """The settings from all layers; a flag that is None was not given. Raises `SettingsError`."""
    from_file, root = (None, None) if config is None else _read(config)

    class Layers(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if from_file is None:
                return init_settings, env_settings
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return _with_cluster_key(Layers(**given))  # type: ignore[arg-type]
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        lines = []
        for fault in faults:
            place = _where(config, root, fault["loc"], tuple(given))
            told = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{place}{'.'.join(map(str, fault['loc']))}: {told}")
        raise SettingsError("\n".join(lines)) from None


def _with_cluster_key(settings: Settings) -> Settings:
    """With the key out of the file, where it is in one. Raises `SettingsError`."""
    file = settings.cluster_key_file
    if settings.cluster_key is not None or file is None:
        return settings
    try:
        key = file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError(f"cluster_key_file: {file} cannot be read: {reason}") from None
    if not is_cluster_key(key):
        raise SettingsError(f"cluster_key_file: {file} {_NO_KEY}")
    return settings.model_copy(update={"cluster_key": SecretStr(key)})


def _read(config: Path) -> tuple[dict[str, Any], Node]:
    """What the file sets, and where. Raises `SettingsError` for one that cannot be read, or sets what is no
    setting."""
    if not config.is_file():
        raise SettingsError(f"there is no file {config}")
    try:
        text = read_text(config)
    except ConfigFaults as error:
        raise SettingsError(str(error)) from None
    complaints: list[Complaint] = []
    root = tree(text, complaints, instead='{"port": 4100}')
    found = None if root is None else plain(root, complaints)
    if root is not None and not isinstance(found, dict):
        complaints.append((place_of(root.token), 'expected an object in { }, with settings such as "port"'))
    known = list(Settings.model_fields)
    if root is not None and isinstance(found, dict):
        complaints += [
            (find(root, (key,), key=True), _no_setting(key, known)) for key in found if key not in known
        ]
    if root is None or not isinstance(found, dict) or complaints:
        raise SettingsError(
            str(ConfigFaults([Fault(str(config), place, told) for place, told in sorted(complaints)]))
        )
    return found, root


def _where(config: Path | None, root: Node | None, loc: tuple[str | int, ...], given: Sequence[str]) -> str:
    """The place of a value, as the beginning of a line; empty where it does not come from the file."""
    if config is None or not isinstance(root, Object) or not loc:
        return ""
    name = "log_level" if loc[0] == f"{PREFIX}LOG_LEVEL" else str(loc[0])
    in_file = any(is_key(token, name) for token, _ in root.members)
    if not in_file or name in given or os.environ.get(PREFIX + name.upper()):
        return ""
    place = find(root, (name, *loc[1:]), key=False)
    return f"{config}:{place.line}:{place.column}: "


def _no_setting(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"there are {', '.join(known)}"
    return f"{key[:60]!a} is not a setting; {hint}"
