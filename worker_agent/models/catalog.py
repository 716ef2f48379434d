"""What models the folder holds, and what a path that the user gave is.

models/NAME/model.json          the manifest, written last: a folder without one is no model
models/NAME/...                 the model's files
models/.staging/NAME/...        what is being fetched, or was until something came between
models/quarantine/NAME/...      a file whose content was not what the hub had promised
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worker_agent import gguf, model_config
from worker_agent.models.local import Format, LocalModel
from worker_agent.models.manifest import Damaged, Manifest, read, sync_folder, wrong_files
from worker_agent.models.names import MANIFEST, QUARANTINE, BadName, model_name
from worker_agent.models.selection import PICKLES, is_config, is_mlx, refused_config, shard_names

_STAGING = ".staging"
_DELETED = "deleted."  # no model's staging folder is called so: their names have no manifest's dot first
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_MOST_CONFIG_BYTES = 8 * 1024 * 1024
_GGUF_MAGIC = b"GGUF"


class NotAModel(Exception):
    """It cannot be served, or is not there; the sentence says why and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One folder with a manifest."""

    name: str
    manifest: Manifest | None = None
    model: LocalModel | None = None
    """None: it cannot be loaded; `fault` says why."""
    fault: str = ""


class Catalog:
    """The models in one folder, which only we write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scan(self) -> tuple[LocalModel, ...]:
        """Every complete and verified model, by name. Blocking: call it in a thread. Raises `OSError` where
        the folder is there and cannot be read."""
        return tuple(entry.model for entry in self.entries() if entry.model is not None)

    def entries(self) -> tuple[Entry, ...]:
        """Every model with a manifest, also the damaged ones, by name. Blocking. Raises `OSError` where the
        folder is there and cannot be read."""
        try:
            folders = sorted(
                path for path in self.folder.iterdir() if not path.is_symlink() and path.is_dir()
            )
        except FileNotFoundError:
            return ()
        return tuple(
            _entry(folder)
            for folder in folders
            if _may_be_model(folder.name) and (folder / MANIFEST).is_file()
        )

    def begun(self) -> tuple[tuple[str, int], ...]:
        """The downloads that have not ended, by name, with the bytes that have come. Blocking."""
        try:
            folders = sorted(path for path in (self.folder / _STAGING).iterdir() if _is_folder(path))
        except OSError:
            return ()
        come = ((folder.name, _bytes_in(folder)) for folder in folders if _may_be_model(folder.name))
        return tuple((name, count) for name, count in come if count)

    def has(self, name: str) -> bool:
        """Whether there is a complete model of that name. Blocking, for as long as it takes to look."""
        try:
            read(self.folder / model_name(name))
        except (Damaged, BadName):
            return False
        return True

    def delete(self, name: str) -> None:
        """Removes a model's files, also those of a download that never ended. Blocking.

        Raises `NotAModel` where there is none of that name, it is being fetched, or the disk does not let us.
        """
        folder = self.folder / _checked(name)
        begun = self.staging(name)
        is_model = not folder.is_symlink() and (folder / MANIFEST).is_file()
        refused = self.folder / QUARANTINE / name
        if not is_model and not _is_folder(begun) and not _is_folder(refused):
            raise NotAModel(f"there is no downloaded model {name!r}; see: worker-agent models list")
        try:
            with _held(begun, name):
                if is_model:
                    self._remove(folder)
                self._remove(begun)
                self._remove(refused)
                self._remove_remains()
        except OSError as error:
            raise NotAModel(f"{name} cannot be deleted: {error.strerror}") from None

    def verify(self, name: str, on_bytes: Callable[[int], None] = lambda _count: None) -> tuple[str, ...]:
        """The files of a model that are not what was verified when they came; those go to the quarantine, and
        the model is not offered any more. Blocking: reads all of it. Raises `NotAModel`."""
        folder = self.folder / _checked(name)
        try:
            manifest = read(folder)
            wrong = wrong_files(folder, manifest, on_bytes)
            for file in wrong:
                self.quarantine(name, folder / file)
        except Damaged as error:
            raise NotAModel(f"{name} is damaged: {error}; download it again") from None
        except OSError as error:
            raise NotAModel(f"{name} cannot be verified: {error.strerror}") from None
        return wrong

    def staging(self, name: str) -> Path:
        """Where a model's files are until all are here and verified."""
        return self.folder / _STAGING / name

    def quarantine(self, name: str, file: Path) -> Path:
        """Moves a file away from where anything could load it, and returns where it is now. What this model
        had there before goes: a disk is not to fill up with refused files."""
        folder = self.folder / QUARANTINE / name
        if _is_folder(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        place = folder / f"{file.name}.refused"
        file.replace(place)
        return place

    def _remove(self, folder: Path) -> None:
        """At once for everybody who looks, however long the disk takes. Links are removed, never followed."""
        if not _is_folder(folder):
            return
        grave = self.folder / _STAGING / f".{_DELETED}{folder.name}.{os.getpid()}"
        grave.parent.mkdir(exist_ok=True)
        folder.rename(grave)
        sync_folder(folder.parent)
        shutil.rmtree(grave)

    def _remove_remains(self) -> None:
        """Of a deletion that was cut short."""
        staging = self.folder / _STAGING
        if staging.is_dir():
            for grave in staging.glob(f".{_DELETED}*"):
                shutil.rmtree(grave, ignore_errors=True)


def describe(path: str, name: str) -> LocalModel:
    """The model at a path that the user gave; what is no path is taken for a hub name (`Format.HUB`).

    Blocking. Raises `NotAModel`.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            return _folder(place, name)
        if place.is_file():
            return _file(place, name)
    except OSError as error:  # a folder above it is not for us, or its file went while it was read
        raise NotAModel(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    if not _HUB_NAME.fullmatch(path) or path.lower().endswith((".gguf", ".safetensors", *PICKLES)):
        raise NotAModel(f"there is no file or folder {path}")
    return LocalModel(name=name, path=path, format=Format.HUB, origin="given")


def _entry(folder: Path) -> Entry:
    try:
        manifest = read(folder)
        if manifest.name != folder.name:
            raise Damaged(f"its manifest is that of {manifest.name}")
    except Damaged as error:
        return Entry(name=folder.name, fault=str(error))
    try:
        place = folder / manifest.main if manifest.main else folder
        found = describe(str(place), manifest.name)
    except NotAModel as error:
        return Entry(name=folder.name, manifest=manifest, fault=str(error))
    model = LocalModel(
        name=manifest.name,
        path=found.path,
        format=found.format,
        size_bytes=found.size_bytes,
        facts=found.facts,
        origin=f"hub:{manifest.repo}@{manifest.commit}",
        ours=True,
    )
    return Entry(name=folder.name, manifest=manifest, model=model)


def _file(path: Path, name: str) -> LocalModel:
    lower = path.name.lower()
    if lower.endswith(PICKLES):
        raise NotAModel(
            f"{path} is a pickle file, which can run code when it is loaded:"
            " use the model as safetensors or GGUF"
        )
    if lower.endswith(".safetensors"):
        raise NotAModel(
            f"{path} is weights alone: give its folder, which holds config.json and the tokenizer too"
        )
    if not lower.endswith(".gguf"):
        raise NotAModel(f"{path} is neither a GGUF file nor a folder with config.json and safetensors")
    parts = [path.with_name(part) for part in shard_names(path.name)]
    if missing := next((part for part in parts if not part.is_file()), None):
        raise NotAModel(f"{path.name} is one part of {len(parts)}, and {missing.name} is not beside it")
    try:
        size = sum(part.stat().st_size for part in parts)
        with parts[0].open("rb") as file:
            head = file.read(gguf.HEAD_BYTES)
    except OSError as error:
        raise NotAModel(f"{path} cannot be read: {error.strerror}") from None
    if head[:4] != _GGUF_MAGIC:
        raise NotAModel(f"{path} is called GGUF and is not: fetch it again")
    return LocalModel(
        name=name,
        path=str(parts[0]),
        format=Format.GGUF,
        size_bytes=size,
        facts=gguf.facts(head),
        origin="given",
    )


def _folder(path: Path, name: str) -> LocalModel:
    try:
        names = sorted(file.name for file in path.iterdir() if file.is_file())
    except OSError as error:
        raise NotAModel(f"{path} cannot be read: {error.strerror}") from None
    weights = [file for file in names if file.endswith(".safetensors")]
    if not weights or "config.json" not in names:
        return _folder_of_gguf(path, names, name)
    if missing := next((part for file in weights for part in shard_names(file) if part not in names), None):
        raise NotAModel(f"{path} lacks {missing}: fetch it again")
    config: dict[str, object] = {}
    for file in names:
        if is_config(file):
            content = _config(path / file)
            config = json.loads(content) if file == "config.json" else config
    return LocalModel(
        name=name,
        path=str(path),
        format=Format.MLX if is_mlx(config) else Format.SAFETENSORS,
        size_bytes=sum((path / file).stat().st_size for file in weights),
        facts=model_config.facts(config),
        origin="given",
    )


def _folder_of_gguf(path: Path, names: list[str], name: str) -> LocalModel:
    models = [file for file in names if file.lower().endswith(".gguf") and shard_names(file)[0] == file]
    if len(models) == 1:
        return _file(path / models[0], name)
    if models:
        raise NotAModel(f"{path} holds several GGUF files: give the path of one, such as {path / models[0]}")
    if any(file.lower().endswith(PICKLES) for file in names):
        raise NotAModel(
            f"{path} has its weights as pickle files, which can run code when they are loaded:"
            " use the model as safetensors or GGUF"
        )
    raise NotAModel(f"{path} holds no model: neither a GGUF file nor config.json with safetensors")


def _config(path: Path) -> bytes:
    """A configuration's content. Raises `NotAModel` where it asks for code, or is damaged."""
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise NotAModel(f"{path} is too large for a configuration")
        content = path.read_bytes()
    except OSError as error:
        raise NotAModel(f"{path} cannot be read: {error.strerror}") from None
    if why := refused_config(path.name, content):
        raise NotAModel(f"{path.parent}: {why}")
    return content


def _may_be_model(name: str) -> bool:
    try:
        model_name(name)
    except BadName:
        return False
    return True


def _checked(name: str) -> str:
    try:
        return model_name(name)
    except BadName as error:
        raise NotAModel(str(error)) from None


def _bytes_in(folder: Path) -> int:
    """Of its files, without what is noted beside them."""
    total = 0
    for path in folder.rglob("[!.]*"):
        with contextlib.suppress(OSError):  # it has just become whole
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


class BeingFetched(NotAModel):
    """Another process works on this model's files."""


@contextlib.contextmanager
def _held(folder: Path, name: str) -> Iterator[None]:
    """Nobody else fetches this model while the block lasts. Raises `BeingFetched`."""
    if not _is_folder(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        lock(descriptor, name)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


def lock(descriptor: int, name: str) -> None:
    """Takes the lock of a staging folder for as long as the descriptor is open. Raises `BeingFetched`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BeingFetched(
            f"{name} is being downloaded at this moment: wait for it, or cancel it first"
        ) from None
