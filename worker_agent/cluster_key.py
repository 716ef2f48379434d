"""Where an agent's cluster key comes from, and where a new one is kept. Blocking."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from worker_agent import private_files
from worker_agent.handshake import is_cluster_key
from worker_agent.private_files import FileFault

_LOG = logging.getLogger(__name__)
FILE = "cluster_key"
"""In the data folder."""


@dataclass(slots=True)
class ClusterKey:
    """The key that the room shares."""

    value: str | None = field(repr=False)
    """None: this machine was given none yet."""
    file: Path | None
    """Where a new one is kept; None: the settings give the key, and only the user changes those."""

    def keep(self, key: str) -> None:
        """The key is this from now on. Raises `FileFault` where it cannot be written: then it stays."""
        if self.file is None:
            _LOG.warning(
                "the cluster key was changed, but the settings still give the former one: put the new one"
                " into WORKER_AGENT_CLUSTER_KEY or cluster_key_file, or take both away and join again"
            )
        else:
            kept(self.file, key)
        self.value = key

    def look(self) -> bool:
        """Whether there is one, perhaps since somebody has put it into the file. Raises `FileFault`."""
        if self.value is None and self.file is not None:
            self.value = _in(self.file)
        return self.value is not None


def found(folder: Path, given: str | None) -> ClusterKey:
    """The key that the settings give, else the one that is kept in the data folder, if any.

    Raises `FileFault` for a file that must not be used.
    """
    if given is not None:
        return ClusterKey(given, None)
    path = folder / FILE
    return ClusterKey(_in(path), path)


def _in(path: Path) -> str | None:
    """None: there is no such file. Raises `FileFault`."""
    try:
        key = private_files.read(path).decode().strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        key = ""
    if not is_cluster_key(key):
        raise FileFault(f"{path} holds no cluster key: remove it, and join again")
    return key


def kept(path: Path, key: str) -> None:
    """Writes the key, for the next start too. Raises `FileFault`."""
    try:
        private_files.replace(path, f"{key}\n".encode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FileFault(
            f"cannot keep the cluster key in {path}: {reason}; choose another --data-dir"
        ) from None
