"""What lies in a model's folder, as `model.json` says: written last, so that a folder with it is complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from worker_agent.models.local import Format
from worker_agent.models.names import MANIFEST, is_file_name, model_name

_MOST_BYTES = 4 * 1024 * 1024
_READ_BYTES = 1024 * 1024


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("not a file below the model's folder")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]


class ManifestFile(BaseModel):
    """One file, as it was when it had been compared with the hub's hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: FileName
    size: int = Field(ge=0, le=2**53)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """A model that was fetched and verified."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = 1
    name: Annotated[str, AfterValidator(model_name)]
    repo: str = Field(max_length=128)
    revision: str | None = Field(default=None, max_length=128)
    """As it was asked for: a branch, a tag."""
    commit: str = Field(pattern="^[0-9a-f]{40,64}$")
    format: Format
    main: FileName | None = None
    """The GGUF file to load; None: the folder."""
    files: tuple[ManifestFile, ...] = Field(min_length=1)
    fetched_at: str = Field(default="", max_length=64)
    """ISO 8601, UTC."""


class Damaged(Exception):
    """The folder is not what its manifest says, or has none that can be read; the sentence says how."""


def parse(folder: Path) -> Manifest:
    """The folder's manifest, whatever of the files is there. Raises `Damaged`."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise Damaged(f"{path} is too large")
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise Damaged(f"{path} is damaged: {error.errors(include_url=False)[0]['msg']}") from None


def read(folder: Path) -> Manifest:
    """The folder's manifest, when all its files are there in full length. Raises `Damaged`.

    Their content is not read: it was verified when they came, and `wrong_files` does it again.
    """
    manifest = parse(folder)
    for file in manifest.files:
        size = size_of(folder, file.name)
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes in place of {file.size}"
            raise Damaged(f"{file.name} {found}")
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest into the folder: whole or not at all, also where the power goes."""
    temporary = folder / f".{MANIFEST}"
    with temporary.open("wb") as file:
        file.write(manifest.model_dump_json(indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in the folder survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(folder: Path, name: str) -> int | None:
    """Of a file below the folder, in bytes; None: there is no plain file, or a link leads to it."""
    path = folder
    for part in name.split("/"):
        if path.is_symlink():
            return None
        path = path / part
    if path.is_symlink() or not path.is_file():
        return None
    return path.stat().st_size


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> str:
    """Of a file's content, as hexadecimal digits; `on_bytes` hears how many bytes were read since the last
    call. Raises `OSError`."""
    return _digest(hashlib.sha256(), path, on_bytes)


def blob_id_of(path: Path) -> str:
    """The id that git gives to a file's content. Raises `OSError`."""
    start = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return _digest(start, path, lambda _count: None)


def _digest(digest: hashlib._Hash, path: Path, on_bytes: Callable[[int], None]) -> str:
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def wrong_files(
    folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] = lambda _count: None
) -> tuple[str, ...]:
    """Names of the files whose content is not what was verified. Reads all of them."""
    return tuple(file.name for file in manifest.files if not _is_right(folder, file, on_bytes))


def _is_right(folder: Path, file: ManifestFile, on_bytes: Callable[[int], None]) -> bool:
    if size_of(folder, file.name) != file.size:
        return False
    try:
        return sha256_of(folder / file.name, on_bytes) == file.sha256
    except OSError:
        return False
