"""`worker-agent uninstall`: takes the service away, and with `--data` everything that the agent keeps.

All of it lies in one folder. What does not look like that folder is not touched; links in it are removed and
never followed; while an agent runs with it, nothing is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from worker_agent import service
from worker_agent.keepers import Machine, ServiceError, this_machine
from worker_agent.settings import SettingsError, default_data_dir, load

_ID = re.compile(r"agent-\d{1,2}\.id")
_SECRET = re.compile(r"\.?(cluster_key|balancers|agent-[0-9a-f]{1,12}\.pem)(\.[0-9a-f]{16})?")
"""The key of the room, where its balancers are, the agent's certificate, and what a crash left of any of them
while it was written."""
_FOLDERS = ("models", "logs")
_OF_FILE_BROWSERS = (".DS_Store", ".directory")
_MANIFEST = "model.json"
_STAGING = ".staging"
_BESIDE_MODELS = (_STAGING, "quarantine", *_OF_FILE_BROWSERS)
_GROUP = "llm-room-balancer"
"""The folder around the default one, which goes when nothing else of ours lies in it."""


class Refused(Exception):
    """It is not removed; the sentence says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What would be removed."""

    folder: Path
    files: int
    size_bytes: int
    models: tuple[str, ...] = ()
    """Those that were fetched."""
    strange: tuple[str, ...] = ()
    """What somebody else has put beside them."""

    def __str__(self) -> str:
        """Some lines for the person who is asked."""
        lines = [f"{self.folder}: {self.files} files, {_size(self.size_bytes)}"]
        if self.models:
            lines.append(f"  models: {', '.join(self.models)}")
        if self.strange:
            lines.append(f"  not fetched by the agent, and removed too: {', '.join(self.strange)}")
        return "\n".join(lines)


def _size(size_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def examine(folder: Path, *, uid: int) -> Contents:
    """What an agent's data folder holds. Raises `Refused` for what does not look like one, or is not ours."""
    found = os.lstat(folder)
    if folder.is_symlink():
        raise Refused(f"{folder} is a link: name the folder that it leads to, {folder.resolve()}")
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder")
    if uid not in (0, found.st_uid):
        raise Refused(f"{folder} belongs to somebody else: they, or root, may remove it")
    names = sorted(entry.name for entry in os.scandir(folder))
    unknown = [name for name in names if not _is_known(name)]
    if unknown:
        raise Refused(
            f"{folder} holds what no agent has put there ({', '.join(unknown[:5])}): remove it by hand"
        )
    models, strange = _models(folder / "models")
    # Whoever only fetched models, and never ran an agent, has no id there.
    if names and folder != default_data_dir() and not models and not any(map(_ID.fullmatch, names)):
        raise Refused(
            f"{folder} does not look like an agent's, which has a file agent-1.id: remove it by hand"
        )
    files, size = _measure(folder, found.st_dev)
    return Contents(folder=folder, files=files, size_bytes=size, models=models, strange=strange)


def _is_known(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in (_ID, _SECRET)) or name in (*_FOLDERS, *_OF_FILE_BROWSERS)


def _measure(folder: Path, device: int) -> tuple[int, int]:
    """How many files there are below it, and their bytes on disk. Links count as what they are."""
    files = size = 0
    for entry in os.scandir(folder):
        found = entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            if found.st_dev != device:
                raise Refused(f"{entry.path} is another disk, mounted there: unmount it first")
            below = _measure(Path(entry.path), device)
            files, size = files + below[0], size + below[1]
        else:
            files, size = files + 1, size + found.st_blocks * 512
    return files, size


def _models(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if folder.is_symlink() or not folder.is_dir():
        return (), ()
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name not in _BESIDE_MODELS)
    fetched = [name for name in names if (folder / name / _MANIFEST).is_file()]
    return tuple(fetched), tuple(name for name in names if name not in fetched)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else uses this data folder while the block lasts. Raises `Refused` where somebody does.

    An agent holds a lock on its id (`identity`), and whoever fetches a model one on where it arrives.
    """
    with contextlib.ExitStack() as stack:
        busy = [folder, *sorted(folder.glob("agent-*.id")), *sorted(folder.glob(f"models/{_STAGING}/*"))]
        for path in busy:
            _hold(stack, path)
        yield


def _hold(stack: contextlib.ExitStack, path: Path) -> None:
    if path.is_symlink():
        return
    try:
        # To be locked over NFS a file must be open for writing; a folder cannot be.
        kind = os.O_RDONLY if path.is_dir() else os.O_RDWR
        descriptor = os.open(path, kind | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"an agent uses {path}, or a download does: stop it first") from None
    except OSError as error:
        if path.is_file():
            raise Refused(f"{path} cannot be locked ({error.strerror}): is an agent running?") from None
        # Some file systems lock files only. An agent holds one of those too.


def remove(contents: Contents) -> None:
    """Removes the folder with all that is in it. Raises `Refused` where something stays."""
    folder = contents.folder
    if not shutil.rmtree.avoids_symlink_attacks:
        raise Refused(f"this system's Python cannot remove {folder} safely: remove it by hand")
    stayed: list[str] = []
    # No link is followed, also not one that is put there meanwhile.
    shutil.rmtree(folder, onerror=lambda _function, path, _error: stayed.append(str(path)))
    if stayed:
        raise Refused(f"not everything could be removed; this stayed: {', '.join(stayed[:5])}")
    if folder.parent.name == _GROUP:
        with contextlib.suppress(OSError):  # something else lies in it
            folder.parent.rmdir()


# The command line.


def command(
    data: Annotated[bool, typer.Option("--data", help="Remove models, id and logs too.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where they are, if not in the user's data folder.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The agent's JSON file, for where they are.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes the service, and with --data everything that the agent keeps on this machine."""
    machine = this_machine(typer.echo)
    try:
        folders = _folders(machine, data_dir, config)
        doomed = [examine(folder, uid=machine.uid) for folder in folders] if data else []
        for contents in doomed:
            typer.echo(str(contents))
        if doomed and not yes:
            typer.confirm("Remove all of it?", abort=True)
        removed = [service.uninstall(machine, scope) for scope, _, _ in list(service.installed(machine))]
        if not removed:
            typer.echo("no service was installed")
        for contents in doomed:
            with held(contents.folder):
                remove(contents)
            typer.echo(f"removed {contents.folder}")
    except (ServiceError, Refused, SettingsError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"{error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    if not data:
        for folder in folders:
            typer.echo(f"models, id and logs stay in {folder}: --data removes them too")
    typer.echo("The program itself goes by `uv tool uninstall llm-room-balancer`, or with its checkout.")


def _folders(machine: Machine, data_dir: Path | None, config: Path | None) -> list[Path]:
    """Those that there are: the one that was named, else those of our services and of the settings."""
    settings = load(config, {})
    if settings.models_dir is not None:
        typer.echo(f"{settings.models_dir}, where your settings have models kept, stays")
    if data_dir is not None:
        if not os.path.lexists(data_dir):
            raise Refused(f"there is no folder {data_dir}")
        return [data_dir.absolute()]
    recorded = [keeps.data_dir(text) for _, keeps, text in service.installed(machine)]
    named = [Path(each) for each in recorded if each] + [settings.data_dir or default_data_dir()]
    return [folder for folder in dict.fromkeys(each.absolute() for each in named) if os.path.lexists(folder)]
