"""Where the files of `configs/` are: beside the packages in a checkout, inside `balancer` in a wheel."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def configs() -> Traversable:
    """The folder `configs/` of this installation; raises `FileNotFoundError` when it was left out."""
    return _first_folder(files("balancer") / "configs", Path(__file__).parent.parent / "configs")


def _first_folder(*places: Traversable) -> Traversable:
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        "this installation has no configs folder; reinstall llm-room-balancer (looked in: "
        + ", ".join(map(str, places))
        + ")"
    )
