"""Where an invitation said that the balancers are, kept for every later start. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from worker_agent import private_files
from worker_agent.private_files import FileFault

FILE = "balancers"
"""In the data folder: a URL in each line."""
MOST = 8


def keep(folder: Path, urls: Sequence[str]) -> None:
    """These from now on, in place of those of an earlier invitation; no more than `MOST`. Raises `FileFault`
    where they cannot be written."""
    path = folder / FILE
    try:
        if urls:
            private_files.replace(path, "".join(f"{url}\n" for url in urls[:MOST]).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FileFault(
            f"cannot keep the balancers' addresses in {path}: {reason}; choose another --data-dir"
        ) from None


def kept(folder: Path, is_url: Callable[[str], bool]) -> tuple[str, ...]:
    """Their URLs; none where none were kept. Raises `FileFault` for a file that must not be used."""
    path = folder / FILE
    try:
        urls = tuple(private_files.read(path).decode("utf-8", "replace").split())
    except FileNotFoundError:
        return ()
    if len(urls) > MOST or not all(map(is_url, urls)):
        raise FileFault(f"{path} does not hold the addresses of balancers: remove it, and join again")
    return urls
