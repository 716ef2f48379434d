"""Fetches one model, as a process of its own: `python -m worker_agent.models.download ORDER`.

ORDER is JSON (`Order`); the hub's token comes as HF_TOKEN, and only so. Progress goes to standard output, a
JSON object a line. It ends with 0 when the model is in its place, verified; else with 1, after lines that say
why. It may be ended at any moment, and goes on from there when it is started again: what is here in part is
`NAME.part` in the staging folder, and nothing is believed before its hash was compared with the hub's.

Blocking all through.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from worker_agent.models.catalog import BeingFetched, Catalog, NotAModel, describe, lock
from worker_agent.models.hub import Cut, Hub, HubError, NoSuchRevision, Repository
from worker_agent.models.local import Format
from worker_agent.models.manifest import (
    Damaged,
    Manifest,
    ManifestFile,
    blob_id_of,
    parse,
    read,
    sha256_of,
    size_of,
    sync_folder,
    write,
)
from worker_agent.models.names import MANIFEST, BadName, model_name, repository, revision
from worker_agent.models.selection import (
    HubFile,
    NothingToFetch,
    Selection,
    is_config,
    is_mlx,
    refused_config,
    select,
)

_T = TypeVar("_T")

PART = ".part"
_STATE = ".fetching.json"
_TELL_SECONDS = 0.25
_MOST_TRIES = 6
"""Without a byte more in between; each that brings some begins the count anew."""
_LONGEST_WAIT_SECONDS = 60.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_GIB = 2**30
_SENTENCE_PIECE = 120
"""Lines of a child are cut by the one who reads them, so a long sentence goes in pieces."""


class Order(BaseModel):
    """What is to be fetched, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    """The catalog's."""
    endpoint: str
    repo: str
    name: str
    revision: str | None = None
    file: str | None = None
    formats: tuple[Format, ...] = ()
    limit_bytes: int | None = Field(default=None, ge=0)
    """What the weights may take; None: anything."""
    margin_bytes: int = Field(default=_GIB, ge=0)
    """Of the disk, what is left to others."""
    retry_seconds: float = Field(default=1.0, ge=0)
    """Before the second try; twice as long before each further one."""


class Refused(Exception):
    """It cannot be fetched; the sentence says why and what to do."""


class Telling:
    """What the process says of itself."""

    def __init__(self, say: Callable[[dict[str, object]], None]) -> None:
        self._say = say
        self._last = float("-inf")
        self.done = 0

    def total(self, done: int, total: int) -> None:
        """How much is here already, and how much there will be."""
        self.done = done
        self._say({"done": done, "total": total})

    def more(self, count: int) -> None:
        """So many bytes more, or less where some have to come again."""
        self.done += count
        now = time.monotonic()
        if count and now - self._last >= _TELL_SECONDS:
            self._last = now
            self._say({"done": self.done})

    def verifying(self, sentence: str) -> None:
        """Everything is here; the sentence says how far it is with comparing it."""
        self._say({"done": self.done, "verifying": True, "note": sentence})

    def note(self, sentence: str) -> None:
        """Something that delays it."""
        self._say({"note": sentence[:_SENTENCE_PIECE]})


def fetch(order: Order, token: str | None, telling: Telling) -> Manifest:
    """The model, in its place and verified. Raises `Refused`; what has come stays for another start."""
    try:
        return _Fetching(order, token, telling).run()
    except (HubError, NothingToFetch, NotAModel, BadName) as error:
        raise Refused(str(error)) from None
    except Cut as error:
        raise Refused(f"{error}; what has come is kept: start it again to go on") from None
    except OSError as error:
        raise Refused(_of_the_disk(order.folder, error)) from None


def _of_the_disk(folder: str, error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return f"the disk with {folder} is full: make room and start it again; it goes on from there"
    if error.errno == errno.EFBIG:
        return f"the file system of {folder} takes no file of this size (FAT32?): set models_dir elsewhere"
    return f"{folder} cannot be used: {error.strerror or type(error).__name__}; check it, or set models_dir"


class _Fetching:
    def __init__(self, order: Order, token: str | None, telling: Telling) -> None:
        self._order = order
        self._catalog = Catalog(Path(order.folder))
        self._name = model_name(order.name)
        self._repo = repository(order.repo)
        self._revision = None if order.revision is None else revision(order.revision)
        self._staging = self._catalog.staging(self._name)
        self._telling = telling
        self._hub = Hub(order.endpoint, token)

    def run(self) -> Manifest:
        with self._alone():
            found = self._repository()
            selection = select(
                self._repo,
                found.files,
                tags=found.tags,
                formats=self._order.formats,
                wanted=self._order.file,
                limit_bytes=self._order.limit_bytes,
            )
            for file in selection.files:
                if file.sha256 is None and file.blob_id is None:
                    raise Refused(
                        f"the hub tells no hash of {file.name}, so it cannot be verified: not fetched"
                    )
            self._begin(found, selection)
            self._check_room(selection)
            for file in selection.files:
                if is_config(file.name):
                    self._fetch(found.commit, file)
                    self._judge(file)
            for file in selection.files:
                self._fetch(found.commit, file)
            return self._publish(found, selection, self._all_verified(selection))

    # ... where it stands

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The staging folder is there, and ours alone while the block lasts."""
        folder = self._catalog.folder / self._name
        if self._catalog.has(self._name):
            raise Refused(
                f"{self._name} is here already: delete it first, or choose another name with --name"
            )
        self._staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            lock(descriptor, self._name)
            if not os.path.samestat(os.fstat(descriptor), self._staging.stat()):
                raise BeingFetched(f"{self._name} has just been downloaded by another process")
            self._take_over_damaged(folder)
            yield
        finally:
            os.close(descriptor)  # which gives the lock back

    def _take_over_damaged(self, folder: Path) -> None:
        """A model of this name that lost a file: the others need not come again."""
        if not folder.exists() and not folder.is_symlink():
            return
        if folder.is_symlink() or not (folder / MANIFEST).is_file():
            raise Refused(
                f"{folder} is in the way, and not ours: move it, or choose another name with --name"
            )
        try:
            manifest = parse(folder)
        except Damaged as error:
            raise Refused(f"{self._name} is here and damaged ({error}): delete it first") from None
        if (manifest.repo, manifest.revision) != (self._repo, self._revision):
            raise Refused(f"{self._name} is here, damaged, and from {manifest.repo}: delete it first")
        self._note_begun(manifest.commit)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                place = self._staging / path.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place.with_name(place.name + PART))
        shutil.rmtree(folder)

    def _repository(self) -> Repository:
        """At the commit at which an earlier start began, so that its bytes are still of use; else at the
        revision that was asked for."""
        if (commit := self._begun_at()) is not None:
            try:
                return self._again(lambda: self._hub.repository(self._repo, commit))
            except NoSuchRevision:
                self._forget()
        return self._again(lambda: self._hub.repository(self._repo, self._revision))

    def _note_begun(self, commit: str) -> None:
        state = {"repo": self._repo, "revision": self._revision, "commit": commit}
        (self._staging / _STATE).write_bytes(orjson.dumps(state))

    def _begun_at(self) -> str | None:
        try:
            state = orjson.loads((self._staging / _STATE).read_bytes())
            if (state["repo"], state["revision"]) == (self._repo, self._revision):
                return revision(str(state["commit"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._forget()
        return None

    def _forget(self) -> None:
        """Everything of an earlier start that this one has no use for."""
        for path in self._staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _begin(self, found: Repository, selection: Selection) -> None:
        self._note_begun(found.commit)
        here = 0
        for file in selection.files:
            part = self._part(file)
            part.parent.mkdir(parents=True, exist_ok=True)
            if not part.exists() and size_of(self._staging, file.name) is not None:
                (self._staging / file.name).rename(part)  # an earlier start ended while it put them in place
            if part.is_symlink() or (part.exists() and part.stat().st_size > file.size):
                part.unlink()
            here += self._size(file)
        self._telling.total(here, sum(file.size for file in selection.files))

    def _check_room(self, selection: Selection) -> None:
        """Raises `Refused` where the disk has not the room for what is still to come."""
        needed = sum(file.size - self._size(file) for file in selection.files)
        free = shutil.disk_usage(self._staging).free
        if needed + self._order.margin_bytes > free:
            raise Refused(
                f"{self._name} needs {_gib(needed)} more on the disk with {self._order.folder}, of whose"
                f" {_gib(free)} the last {_gib(self._order.margin_bytes)} are left alone:"
                " make room there, or set models_dir"
            )

    # ... one file

    def _part(self, file: HubFile) -> Path:
        return self._staging / f"{file.name}{PART}"

    def _size(self, file: HubFile) -> int:
        return size_of(self._staging, f"{file.name}{PART}") or 0

    def _fetch(self, commit: str, file: HubFile) -> None:
        self._again(lambda: self._go_on(commit, file), lambda: self._size(file))

    def _go_on(self, commit: str, file: HubFile) -> None:
        """From where the file ends until it is whole."""
        here = self._size(file)
        descriptor = os.open(self._part(file), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            if here < file.size:
                with self._hub.content(self._repo, commit, file.name, here) as (begin, pieces):
                    os.ftruncate(descriptor, begin)
                    os.lseek(descriptor, begin, os.SEEK_SET)
                    self._telling.more(begin - here)
                    here = self._take(descriptor, pieces, begin, file)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if here < file.size:
            raise Cut(f"{file.name} ended after {here} of {file.size} bytes")

    def _take(self, descriptor: int, pieces: Iterator[bytes], here: int, file: HubFile) -> int:
        for piece in pieces:
            if here + len(piece) > file.size:
                os.ftruncate(descriptor, 0)
                raise Refused(
                    f"the hub sends more of {file.name} than the {file.size} bytes that it told: refused"
                )
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            here += len(piece)
            self._telling.more(len(piece))
        return here

    def _judge(self, file: HubFile) -> None:
        """A configuration that asks for code of its own ends it, before gigabytes have come for nothing."""
        self._verified(file)
        content = self._part(file).read_bytes()
        if why := refused_config(file.name, content):
            raise Refused(f"{self._repo}: {why}")
        formats = self._order.formats
        if file.name == "config.json" and is_mlx(json.loads(content)) and Format.MLX not in formats:
            raise Refused(
                f"{self._repo} is quantised for MLX, and the engines here read {' or '.join(formats)}:"
                " choose a repository of those"
            )

    def _all_verified(self, selection: Selection) -> tuple[ManifestFile, ...]:
        verified: list[ManifestFile] = []
        for file in selection.files:
            self._telling.verifying(f"{len(verified)} of {len(selection.files)} files are verified")
            verified.append(self._verified(file))
        return tuple(verified)

    def _verified(self, file: HubFile) -> ManifestFile:
        """Compares the content with the hub's hash. Raises `Refused` when the file is out of the way."""
        part = self._part(file)
        sha256 = sha256_of(part)
        right = sha256 == file.sha256 if file.sha256 is not None else blob_id_of(part) == file.blob_id
        if not right:
            self._catalog.quarantine(self._name, part)
            raise Refused(
                f"{file.name} is not what the hub says it is (its hash differs): it lies in the quarantine,"
                f" and {self._name} is not offered; start it again to fetch this file anew"
            )
        return ManifestFile(name=file.name, size=file.size, sha256=sha256)

    def _publish(
        self, found: Repository, selection: Selection, verified: tuple[ManifestFile, ...]
    ) -> Manifest:
        wanted = {f"{file.name}{PART}" for file in selection.files}
        for path in sorted(self._staging.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()  # an empty one
            elif str(path.relative_to(self._staging)) not in wanted:
                path.unlink()
        for file in selection.files:
            self._part(file).rename(self._staging / file.name)
        place = self._staging / selection.main if selection.main else self._staging
        model = describe(str(place), self._name)
        manifest = Manifest(
            name=self._name,
            repo=self._repo,
            revision=self._revision,
            commit=found.commit,
            format=model.format,
            main=selection.main or None,
            files=verified,
            fetched_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write(self._staging, manifest)
        read(self._staging)
        self._staging.rename(self._catalog.folder / self._name)
        sync_folder(self._catalog.folder)
        return manifest

    # ... trying again

    def _again(self, what: Callable[[], _T], come: Callable[[], int] = lambda: 0) -> _T:
        """What `what` returns, tried again where the hub stops; `come` tells how much has come by then."""
        patience = _Patience(self._order.retry_seconds, come, self._telling)
        return Retrying(
            retry=retry_if_exception_type(Cut), stop=patience.is_over, wait=patience.wait, reraise=True
        )(what)


class _Patience:
    """How often, and after how long, something is tried again: more patient with one who brings something."""

    def __init__(self, first_seconds: float, come: Callable[[], int], telling: Telling) -> None:
        self._first_seconds = first_seconds
        self._come = come
        self._telling = telling
        self._most = come()
        self._tries = 0

    def is_over(self, _state: RetryCallState) -> bool:
        if (now := self._come()) > self._most:
            self._most, self._tries = now, 0
        self._tries += 1
        return self._tries >= _MOST_TRIES

    def wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        seconds: float = self._first_seconds * 2 ** (self._tries - 1) * random.uniform(0.75, 1.25)
        if isinstance(error, Cut) and error.wait_seconds is not None:
            seconds = max(seconds, error.wait_seconds)
        self._telling.note(f"{error}; it is tried again")
        return min(seconds, _LONGEST_WAIT_SECONDS)


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def _say(line: dict[str, object]) -> None:
    sys.stdout.buffer.write(orjson.dumps(line) + b"\n")
    sys.stdout.buffer.flush()


def _say_why(sentence: str) -> None:
    for start in range(0, len(sentence), _SENTENCE_PIECE):
        _say({"failed": sentence[start : start + _SENTENCE_PIECE]})


def main(argv: list[str]) -> int:
    """Carries out the order."""
    token = os.environ.pop("HF_TOKEN", None)
    try:
        order = Order.model_validate_json(argv[0])
    except (IndexError, ValidationError) as error:
        _say_why(f"not an order: {type(error).__name__}")
        return 2
    try:
        fetch(order, token, Telling(_say))
    except Refused as error:
        _say_why(str(error))
        return 1
    except Exception as error:
        # No message and no traceback: they could hold addresses that are signed.
        last = traceback.extract_tb(error.__traceback__)[-1]
        _say_why(
            f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: please report it"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
