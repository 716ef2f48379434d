"""Who this agent is: the same id after every restart, another one for each agent on a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_AGENTS_PER_FOLDER = 16


class NoIdentity(Exception):
    """The data folder cannot be used; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An agent of this machine."""

    id: str
    """Unique in the room."""
    certificate: Path
    """Where its own certificate is kept."""


def made_id(hostname: str, token: str) -> str:
    """`studio-3fa9` for `Studio.local`. Pure; the token keeps two machines of one name apart."""
    short = re.sub(r"[^a-z0-9]+", "-", hostname.partition(".")[0].lower()).strip("-")[:48]
    return f"{short or 'machine'}-{token}"


@contextlib.contextmanager
def identity(folder: Path, given: str | None = None) -> Iterator[Identity]:
    """The agent's while the block lasts; a `given` id is used as it is.

    Kept in `folder` as `agent-1.id`, the next agent on this machine as `agent-2.id` and so on: each holds a
    lock on its file while it runs, and takes the first that is free. One whose id is given holds one on the
    folder, where there is one. Raises `NoIdentity`.
    """
    if given is not None:
        with _in_use(folder):
            yield Identity(given, folder / f"agent-{hashlib.sha256(given.encode()).hexdigest()[:12]}.pem")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, number = _first_free(folder)
    except OSError as error:
        raise NoIdentity(
            f"cannot keep this agent's id in {folder}: {error.strerror}; give --data-dir or --id"
        ) from None
    try:
        yield Identity(_kept(descriptor), folder / f"agent-{number}.pem")
    finally:
        os.close(descriptor)  # which gives the lock back


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Others who use the folder may do so too; who wants to remove it can tell (`uninstall`)."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no such folder, or a file system that locks only files
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _first_free(folder: Path) -> tuple[int, int]:
    """Its file, locked, and its number."""
    for number in range(1, _AGENTS_PER_FOLDER + 1):
        descriptor = os.open(folder / f"agent-{number}.id", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor, number
    raise NoIdentity(f"{_AGENTS_PER_FOLDER} agents run from {folder} already; give --data-dir or --id")


def _kept(descriptor: int) -> str:
    known = os.pread(descriptor, 128, 0).decode(errors="replace").strip()
    if known and known.isprintable():
        return known
    new = made_id(socket.gethostname(), secrets.token_hex(2))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{new}\n".encode(), 0)
    return new
