"""Presets: a named set of questions for a document, as JSON that people edit.

`parse` is pure and gives every fault as a sentence; `Shelf` looks presets up in two folders, the user's
own first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from balancer.package_data import configs

MAX_PRESET_BYTES = 256 * 1024
MAX_PROMPTS = 50
MAX_OWN = 500  # presets that are kept for others; whoever writes files by hand is not counted
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"


class PresetError(Exception):
    """A preset cannot be used; `faults` says why, one sentence each."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class _Strict(BaseModel):
    # A misspelt key would otherwise be a setting that silently does nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Prompt(_Strict):
    """One question that is asked of each document."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$")
    """The heading of the answer in the report, and its key in the results."""
    text: str = Field(min_length=1, max_length=20_000)
    max_tokens: int = Field(default=600, ge=1, le=100_000)
    """How long the answer may become."""
    temperature: float = Field(default=0.2, ge=0, le=2)


class Preset(_Strict):
    """What is asked of each document."""

    name: str = Field(min_length=1, max_length=64, pattern=NAME_PATTERN)
    description: str = Field(default="", max_length=400)
    system: str = Field(default="", max_length=20_000)
    """Who the model is to be; empty: no system message."""
    prompts: tuple[Prompt, ...] = Field(strict=False)

    @field_validator("prompts")
    @classmethod
    def _can_be_told_apart(cls, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
        # Here and not as lengths of the field: those count valid prompts, and would blame the list as well.
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"a preset has 1 to {MAX_PROMPTS} prompts, this one has {len(prompts)}")
        names = [prompt.name for prompt in prompts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two prompts are named {twice[0]!r}; the answers need names of their own")
        return prompts

    @property
    def fingerprint(self) -> str:
        """Changes with everything that can change an answer; the description may be reworded freely."""
        asked = self.model_dump(mode="json", exclude={"description"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def parse(data: bytes) -> Preset:
    """The preset in a JSON document; raises `PresetError` with all its faults."""
    if len(data) > MAX_PRESET_BYTES:
        raise PresetError(f"The file has {len(data)} bytes; a preset has at most {MAX_PRESET_BYTES}.")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PresetError(f"The file is not UTF-8 text: byte {error.start} cannot be read.") from None
    except RecursionError:
        raise PresetError("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise PresetError(
            f"The file is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    if not isinstance(fields, dict):
        raise PresetError("A preset is a JSON object: it starts with { and ends with }.")
    try:
        return Preset.model_validate(fields)
    except ValidationError as error:
        raise PresetError(*(_sentence(fault) for fault in error.errors(include_url=False))) from None


def _sentence(fault: Mapping[str, object]) -> str:
    kind, path = str(fault["type"]), fault["loc"]
    parts = path if isinstance(path, tuple) else ()
    where = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    message = str(fault["msg"]).removeprefix("Value error, ")
    match kind:
        case "missing":
            return f"`{where}` is missing."
        case "extra_forbidden":
            return f"`{where}` is not a key of a preset; is it misspelt?"
        case "string_pattern_mismatch":
            return f"`{where}` may hold letters, digits, - and _ only, and starts with a letter or digit."
        case _:
            return f"`{where}`: {message[:1].lower()}{message[1:]}."


@dataclass(frozen=True, slots=True)
class Found:
    """One preset file on a shelf: usable, or with its faults."""

    name: str
    place: Traversable
    own: bool
    """It lies in the user's folder (and hides a preset of ours with the same name)."""
    preset: Preset | None
    faults: tuple[str, ...] = ()


def own_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the user's own presets are looked for unless a folder is named."""
    home = environment.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "llm-room-balancer" / "presets"


@dataclass(frozen=True, slots=True)
class Shelf:
    """The presets that can be named: the user's own folder, then those that came with the program."""

    own: Path

    def all(self) -> list[Found]:
        """By name; of two with the same name the user's own."""
        found = {entry.name.removesuffix(".json"): entry for entry in _json_files(configs() / "presets")}
        own = {entry.name.removesuffix(".json"): entry for entry in _json_files(self.own)}
        return [_found(name, place, name in own) for name, place in sorted((found | own).items())]

    def get(self, name: str) -> Preset:
        """Raises `PresetError`: there is none of that name, or it has faults."""
        presets = {found.name: found for found in self.all()}
        if name not in presets:
            raise PresetError(
                f"There is no preset {name!r}. There are: {', '.join(presets)}. "
                f"Put your own into {self.own}/{name}.json, or name another folder with --presets."
            )
        found = presets[name]
        if found.preset is None:
            raise PresetError(*(f"{found.place}: {fault}" for fault in found.faults))
        return found.preset

    def is_built_in(self, name: str) -> bool:
        """One of that name came with the program."""
        return any(entry.name == f"{name}.json" for entry in _json_files(configs() / "presets"))

    def keep(self, name: str, data: bytes) -> bool:
        """Puts a preset, given as JSON, into the user's own folder; whether there was none of that name.

        Raises `PresetError` for its faults, and `OSError`.
        """
        path = self._own_file(name)
        preset = parse(data)
        if preset.name != name:
            raise PresetError(
                f"`name` is {preset.name!r}, but it is to be kept as {name!r}: make them agree."
            )
        self.own.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if is_new and len(_json_files(self.own)) >= MAX_OWN:
            raise PresetError(f"{self.own} holds {MAX_OWN} presets already: remove some.")
        draft = path.with_name(f".{name}.{os.getpid()}.draft")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)  # whoever reads meanwhile sees the old one or the new one, whole
        finally:
            draft.unlink(missing_ok=True)
        return is_new

    def discard(self, name: str) -> bool:
        """Removes a preset from the user's own folder; False: there is none of that name.

        Raises `PresetError` for what is no name, and `OSError`.
        """
        try:
            self._own_file(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _own_file(self, name: str) -> Path:
        """A name as a preset may have it is no way out of the folder."""
        if not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
            raise PresetError(
                "The name of a preset has 1 to 64 lower-case letters, digits, - and _, and starts with a "
                "letter or digit."
            )
        return self.own / f"{name}.json"


def read(place: Traversable) -> Preset:
    """The preset in one file; raises `PresetError`, for a file that cannot be read too."""
    try:
        with place.open("rb") as file:
            preset = parse(file.read(MAX_PRESET_BYTES + 1))
    except OSError as error:
        raise PresetError(f"The file cannot be read: {error.strerror or error}.") from None
    stem = place.name.removesuffix(".json")
    if preset.name != stem:
        raise PresetError(f"`name` is {preset.name!r}, but the file is called {place.name}: make them agree.")
    return preset


def _json_files(folder: Traversable) -> list[Traversable]:
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if entry.name.endswith(".json") and entry.is_file()]


def _found(name: str, place: Traversable, own: bool) -> Found:
    try:
        return Found(name, place, own, read(place))
    except PresetError as error:
        return Found(name, place, own, None, error.faults)
