"""How papers are called: for people to read, and on disk as reports. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePath

MAX_STEM_BYTES = 200
"""File systems take names of 255 bytes; this leaves room for a number and `.md`."""


def readable(path: PurePath | str) -> str:
    """A path or name that can be printed and written anywhere.

    A disk's names are bytes; what is no UTF-8 in them (an old `caf\\xe9.txt`) is shown as U+FFFD.
    """
    return os.fsencode(path).decode("utf-8", "replace")


def report_names(files: Sequence[PurePath]) -> tuple[str, ...]:
    """A file name for each report: the paper's own, with a number where another paper has it already.

    A long one is shortened, so that every disk takes it. Names that differ only in case count as the same,
    as they do on a Mac's disk.
    """
    own = [_shortened(readable(file.stem)) for file in files]
    stems = {stem.casefold() for stem in own}
    taken: set[str] = set()
    names: list[str] = []
    for stem in own:
        name, number = stem, 1
        # A made-up name must not take away the name of a paper that comes later.
        while name.casefold() in taken or (number > 1 and name.casefold() in stems):
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(f"{name}.md")
    return tuple(names)


def _shortened(stem: str) -> str:
    # "ignore" drops the character that the cut goes through.
    return stem.encode()[:MAX_STEM_BYTES].decode("utf-8", "ignore")
