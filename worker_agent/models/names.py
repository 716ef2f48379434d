"""Which names a model, a repository and a file may have here. Pure.

All of them come from somebody else: a request, a hub. They are held against lists of what is allowed, so that
each is one folder or file below ours on every system, and stands in a URL as it is.
"""

from __future__ import annotations

import re

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+@=,()-]{0,159}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])", re.IGNORECASE)
"""What Windows takes for a device, whatever comes after its first dot."""
_MOST_PARTS = 4
_LONGEST = 128  # of `wire.Word`

MANIFEST = "model.json"
QUARANTINE = "quarantine"


class BadName(ValueError):
    """The sentence says which name it is and what is allowed."""


def model_name(name: str) -> str:
    """`name`, which can be a folder of ours. Raises `BadName`."""
    if _MODEL.fullmatch(name) and not _troubles(name) and name.lower() != QUARANTINE:
        return name
    raise BadName(
        f"{name[:100]!a} cannot be a model's name here: up to 96 letters, digits, '.', '_' and '-',"
        " of which the first is a letter or a digit"
    )


def repository(repo: str) -> str:
    """`repo`, as the hub writes it. Raises `BadName`."""
    if len(repo) <= _LONGEST and _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo:
        return repo
    raise BadName(
        f"{repo[:100]!a} is not a repository's name; it looks like mlx-community/Qwen2.5-7B-Instruct-4bit"
    )


def revision(name: str) -> str:
    """`name`, which can be a branch, a tag or a commit. Raises `BadName`."""
    if _REVISION.fullmatch(name) and not any(part in ("", ".", "..") for part in name.split("/")):
        return name
    raise BadName(f"{name[:100]!a} is not a branch, a tag or a commit")


def name_for(repo: str) -> str:
    """What a repository's model is called where nobody says otherwise: `Qwen2.5-7B-Instruct-4bit`.

    Raises `BadName`.
    """
    return model_name(repository(repo).partition("/")[2].lstrip("_"))


def leaves_its_folder(name: str) -> bool:
    """Whether a hub's file name would be another place on some system: no honest hub has such a name."""
    parts = re.split(r"[/\\]", name)
    return (
        "\\" in name
        or any(ord(character) < 32 or ord(character) == 127 for character in name)
        or re.match(r"[A-Za-z]:", name) is not None
        or any(part in ("", ".", "..") for part in parts)
    )


def is_file_name(name: str) -> bool:
    """Whether a hub's file name may be a file below a model's folder."""
    parts = name.split("/")
    return (
        len(name) <= 400
        and len(parts) <= _MOST_PARTS
        and all(_PART.fullmatch(part) and not _troubles(part) for part in parts)
        and name.lower() != MANIFEST  # ours
    )


def _troubles(part: str) -> bool:
    """Some systems drop dots and spaces at the end, and some names are devices."""
    return part[-1] in ". " or _DEVICES.fullmatch(part.partition(".")[0]) is not None
