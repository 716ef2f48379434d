"""The settings of a balancer, composed once: defaults < JSON file < environment < flags.

Only `app` and the command line read them; every other part is given its own policy value.
"""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as UnreadableVariable

from balancer import trust
from balancer.config_file import (
    ConfigFile,
    DiscoverEntry,
    Placed,
    SecretReference,
    Tunables,
    WorkerEntry,
    expected,
    read_placed,
)
from balancer.discovery import Entry
from balancer.names import Source
from worker_agent import plain_files
from worker_agent.forgiving_json import ConfigFaults

PREFIX = "BALANCER_"
UNPREFIXED = frozenset(
    {
        "health_check_interval",
        "request_timeout",
        "max_retries",
        "max_concurrent_batch",
        "log_level",
        "enable_metrics",
    }
)
"""Settings whose variable is their own name in capitals; that of any other has `PREFIX` before it."""

OWN_FILES = ("admin_key_file", "cluster_key_file", "tls_cert_file", "tls_key_file")
"""Settings that name a file. In the JSON file a relative path starts at its folder."""

MAX_SECRET_BYTES = 8192

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_LIKE_A_KEY = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_+=-]{20,}")
"""What is no plain name of a variable, or looks like this where a file should be, may be a key that was put
in the wrong place: it is not shown."""


class SettingsError(Exception):
    """A variable, a flag or a secret that cannot be used; a line for each, fit for the terminal."""


class Settings(Tunables, BaseSettings):
    """Every setting with its final value, and the workers that the file lists."""

    model_config = SettingsConfigDict(
        strict=False,  # variables and flags are text
        frozen=True,
        extra="forbid",
        case_sensitive=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )

    workers: tuple[WorkerEntry, ...] = ()
    discover: tuple[DiscoverEntry, ...] = ()

    _room: tuple[Entry, ...] = PrivateAttr(default=())
    _admin_key: str | None = PrivateAttr(default=None)
    _cluster_key: str | None = PrivateAttr(default=None)
    _config: Path | None = PrivateAttr(default=None)
    _flags: Mapping[str, object] = PrivateAttr(default_factory=dict)
    _sources: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _worker_sources: tuple[str, ...] = PrivateAttr(default=())
    _named: tuple[Source, ...] = PrivateAttr(default=())

    @property
    def room(self) -> tuple[Entry, ...]:
        """The configured workers as the roster takes them; their keys are in no dump and no repr."""
        return self._room

    @property
    def admin_key(self) -> str | None:
        """As given by a variable or a file; None: neither does. In no dump and no repr, as the next."""
        return self._admin_key

    @property
    def cluster_key(self) -> str | None:
        return self._cluster_key

    @property
    def config(self) -> Path | None:
        """The JSON file that they were read from."""
        return self._config

    def named_sources(self) -> tuple[Source, ...]:
        """The DNS names to look up, with the keys for what is behind them."""
        return self._named

    @property
    def worker_sources(self) -> tuple[str, ...]:
        """Where each of `workers` is listed."""
        return self._worker_sources

    def source_of(self, name: str) -> str:
        """Where a setting has its value from: `default`, a place in the file (`balancer.json:12:3`), a
        variable or a flag."""
        return self._sources.get(name, "default")

    def taking(self, names: Collection[str], other: Settings) -> Settings:
        """These, with the values that the other ones have for some."""
        taken = self.model_copy(update={name: getattr(other, name) for name in names})
        if "discover" in names:
            taken._named = other._named
        return taken

    def read_again(self) -> Settings:
        """From the same file, variables and flags, as they are now. Blocking. Raises as `load` does."""
        return load(self._config, self._flags)

    def files(self) -> tuple[Path, ...]:
        """All files that say what the settings are: the JSON file first, then those that it names as it is
        now, or, where it cannot be read, named before. Blocking; cheap while the file stays the same."""
        if self._config is None:
            return ()
        folder = self._config.parent
        named = _named_files(self, Path(), folder)
        with suppress(ConfigFaults):
            named += _named_files(read_placed(self._config).content, folder, folder)
        return (self._config, *dict.fromkeys(named))


NAMES = tuple(name for name in Settings.model_fields if name != "workers")
"""Of every setting beside the workers."""


def variable(key: str) -> str:
    """The environment variable of a setting."""
    return key.upper() if key in UNPREFIXED else PREFIX + key.upper()


def load(config: Path | None, flags: Mapping[str, object]) -> Settings:
    """The settings from all layers; a flag that is None was not given.

    Raises `ConfigFaults` for the file, and `SettingsError` for variables, flags and secrets. A secret file
    with a relative path lies beside the config file.
    """
    placed = Placed(ConfigFile(), {}, ()) if config is None else read_placed(config)
    file = placed.content
    given = {key: value for key, value in flags.items() if value is not None}
    for name in ("workers", "discover"):
        if os.environ.get(variable(name)):
            raise SettingsError(f"{variable(name)} is set, but workers are listed in the JSON file only")
    try:
        settings = _layered(file, given, config)
    except ValidationError as error:
        raise SettingsError(_sentences(error, given)) from None
    except UnreadableVariable as error:
        # Only the one setting that is an object is read as JSON, before it is validated.
        raise SettingsError(
            f"{variable('scorer_weights')} is not JSON: expected {expected(('scorer_weights',))}"
        ) from error
    folder = Path() if config is None else config.parent
    settings._admin_key = _own_key("admin_key", settings.admin_key_file)
    settings._cluster_key = _own_key("cluster_key", settings.cluster_key_file)
    settings._room = _entries(settings.workers, folder)
    settings._config, settings._flags = config, given
    settings._named = _named_sources(settings.discover, folder)
    file_name = "" if config is None else config.name
    settings._sources = _sources(placed, given, file_name, settings.policy)
    settings._worker_sources = tuple(f"{file_name}:{place.line}:{place.column}" for place in placed.workers)
    return settings


def _sources(placed: Placed, flags: Mapping[str, object], file: str, policy: str) -> Mapping[str, str]:
    """Of each setting that is not at its default: the layer that came last."""
    found = {name: f"{file}:{place.line}:{place.column}" for name, place in placed.keys.items()}
    if policy != placed.content.policy:
        found.pop("scorer_weights", None)  # as in `_layered`
    for name in (*Tunables.model_fields, "admin_key", "cluster_key"):
        if os.environ.get(variable(name)):
            found[name] = variable(name)
    for name, value in flags.items():
        found[name] = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    return found


def _named_files(content: ConfigFile | Settings, own: Path, folder: Path) -> list[Path]:
    """Keys and certificates. `own`: where relative paths start that are of the balancer itself; `folder`:
    those of workers."""
    named = [(own, getattr(content, name)) for name in OWN_FILES]
    for entry in content.workers:
        named += [(folder, entry.ca_file), (folder, entry.api_key.file if entry.api_key else None)]
    named += [(folder, entry.api_key.file if entry.api_key else None) for entry in content.discover]
    return [start / Path(name).expanduser() for start, name in named if name is not None]


def _layered(file: ConfigFile, flags: Mapping[str, object], config: Path | None) -> Settings:
    from_file = file.model_dump(exclude_unset=True, exclude={"schema_", "workers", "discover"}) | {
        "workers": file.workers,
        "discover": file.discover,
    }
    policy = flags.get("policy") or os.environ.get(variable("policy")) or file.policy
    if policy != file.policy:
        from_file.pop("scorer_weights", None)  # they are of the scorers of the file's own policy
    for key in OWN_FILES:
        if from_file.get(key) is not None and config is not None:
            from_file[key] = str(config.parent / Path(from_file[key]).expanduser())

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, dict(flags)),
                _Environment(settings_cls),
                InitSettingsSource(settings_cls, from_file),
            )

    return Layered()


class _Environment(EnvSettingsSource):
    """The environment, under the names that `variable` gives."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        return self.env_vars.get(variable(field_name)), field_name, False


def _sentences(error: ValidationError, flags: Mapping[str, object]) -> str:
    lines = []
    for details in error.errors(include_url=False):
        key = str(details["loc"][0]) if details["loc"] else ""
        if key not in Settings.model_fields:
            lines.append(f"--{key.replace('_', '-')} is not a setting")
            continue
        if key in flags:
            name, value = f"--{key.replace('_', '-')}", str(flags[key])
        else:
            name, value = variable(key), os.environ.get(variable(key), "")
        shown = value if value.isprintable() and len(value) <= 60 else ascii(value[:57]) + "..."
        own = str(details["ctx"]["error"]) if details["type"] == "value_error" and "ctx" in details else ""
        lines.append(f"{name} is {shown!r}: {own or f'expected {expected((key,))}'}")
    return "\n".join(lines)


# Secrets ...


def _own_key(name: str, file: str | None) -> str | None:
    """The balancer's own key of that name; None: it is not given. Raises `SettingsError`."""
    if os.environ.get(variable(name), "").strip():
        reference = SecretReference(env=variable(name))
    elif file is not None:
        reference = SecretReference(file=file)
    else:
        return None
    try:
        return _secret(reference, Path())
    except SettingsError as error:
        raise SettingsError(f"the {name.replace('_', ' ')} {error}") from None


def _entries(workers: tuple[WorkerEntry, ...], folder: Path) -> tuple[Entry, ...]:
    """Raises `SettingsError` with a line for each key and each CA that cannot be had."""
    entries, lines = [], []
    trusted: dict[str | None, ssl.SSLContext] = {}
    for entry in workers:
        headers: Mapping[str, str] = {}
        worker = entry.worker()
        if entry.api_key is not None:
            try:
                headers = entry.headers(_secret(entry.api_key, folder))
            except SettingsError as error:
                lines.append(f'the api_key of worker "{entry.effective_id}" {error}')
        if entry.ca_file is not None:
            path = folder / Path(entry.ca_file).expanduser()
            worker = dataclasses.replace(worker, ca_file=str(path))
            try:
                trusted[str(path)] = trust.read(str(path))
            except OSError as error:
                why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
                lines.append(f'the ca_file of worker "{entry.effective_id}", {path}, cannot be used: {why}')
        elif worker.url.startswith("https:") and None not in trusted:
            trusted[None] = trust.read()
        entries.append(Entry(worker, headers))
    if lines:
        raise SettingsError("\n".join(lines))
    trust.replace(trusted)  # only now: settings that cannot be used leave those before as they were
    return tuple(entries)


def _named_sources(names: tuple[DiscoverEntry, ...], folder: Path) -> tuple[Source, ...]:
    """Raises `SettingsError` with a line for each key that cannot be had."""
    sources, lines = [], []
    for entry in names:
        pattern, headers = entry.pattern(), {}
        if entry.api_key is not None:
            try:
                headers = dict(pattern.headers(_secret(entry.api_key, folder)))
            except SettingsError as error:
                lines.append(f'the api_key for "{entry.name}" {error}')
        sources.append(Source(entry.name, entry.effective_port, Entry(pattern.worker(), headers)))
    if lines:
        raise SettingsError("\n".join(lines))
    return tuple(sources)


def _secret(reference: SecretReference, folder: Path) -> str:
    if reference.env is not None:
        named = f" {reference.env}" if _VARIABLE.fullmatch(reference.env) else ' that "env" names'
        where = f"comes from the environment variable{named}, which"
        secret = os.environ.get(reference.env, "").strip()
        if not secret:
            raise SettingsError(f"{where} is not set, or empty")
    else:
        path = folder / Path(reference.file or "").expanduser()
        hidden = _LIKE_A_KEY.fullmatch(path.name) is not None
        named = "a file (its name looks like a key, and is not shown)" if hidden else f"the file {path}"
        where = f"comes from {named}, which"
        try:
            data = plain_files.read(path, MAX_SECRET_BYTES + 1)
            secret = data.decode("ascii").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not plain ASCII text"
            raise SettingsError(f"{where} cannot be read: {reason}") from error
        if not secret or len(data) > MAX_SECRET_BYTES:
            raise SettingsError(f"{where} is {'too long' if secret else 'empty'}")
    # Anything else would end the header line early, or not survive it.
    if not all("!" <= character <= "~" for character in secret):
        raise SettingsError(
            f"{where} holds a space, a line break or a character beyond ASCII: expected one word"
        )
    return secret
