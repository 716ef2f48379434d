"""Files with a secret of this machine: for their owner alone, and whole or not there at all. Blocking."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

LIMIT_BYTES = 64 * 1024


class FileFault(Exception):
    """A file that must not be used, or cannot be; a sentence for the terminal, with what to do."""


def read(path: Path, limit_bytes: int = LIMIT_BYTES, *, anybodys_for_root: bool = False) -> bytes:
    """What the file holds. Raises `FileNotFoundError`, and `FileFault` for what others may have put there or
    read, and for what is longer.

    `anybodys_for_root`: an administrator may use what belongs to a service's user.
    """
    try:
        # Not through a link that somebody else may have put there, and never waiting for a pipe's writer.
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(number, "rb") as file:
            _insist_on_own(path, os.fstat(number), anybodys_for_root)
            data = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise FileFault(f"{path} cannot be read: {reason}; choose another --data-dir") from error
    if len(data) > limit_bytes:
        raise FileFault(f"{path} is too long to be ours: remove it")
    return data


def _insist_on_own(path: Path, about: os.stat_result, anybodys_for_root: bool) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise FileFault(f"{path} is no file: remove it")
    user = os.geteuid()
    if user != about.st_uid and not (user == 0 and anybodys_for_root):
        raise FileFault(f"{path} belongs to another user: remove it, or choose another --data-dir")
    if about.st_mode & 0o077:
        raise FileFault(
            f"{path} may be known to others, who can read or write that file: remove it; or keep it with "
            f"`chmod 600 {path}`"
        )


def write_new(path: Path, data: bytes) -> None:
    """Under its name only when it is whole and on the disk for good. Raises `FileExistsError`, also where
    somebody was faster by a moment, and `OSError`."""
    draft = _draft(path, data)
    try:
        os.link(draft, path)  # which, unlike a rename, never replaces what is there
    finally:
        draft.unlink()
    _keep_names(path.parent)


def replace(path: Path, data: bytes) -> None:
    """The same, in place of what is there. Raises `OSError`."""
    draft = _draft(path, data)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise
    _keep_names(path.parent)


def _draft(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(number)
    except OSError:
        draft.unlink()
        raise
    return draft


def _keep_names(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
