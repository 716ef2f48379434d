"""Files that people name in settings: never waited for, whatever is there in their place. Blocking."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def insist_on_plain(path: Path) -> None:
    """Raises `OSError` for what is not there, and for a pipe, a socket or a device: to read one may take for
    ever. Links are followed."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder the system itself says that it is one
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def read(path: Path, limit_bytes: int) -> bytes:
    """The beginning of the file. Raises `OSError`."""
    insist_on_plain(path)
    with path.open("rb") as file:
        return file.read(limit_bytes)
