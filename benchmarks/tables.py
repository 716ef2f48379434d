"""Figures as rows: the file that a benchmark leaves and the table that it prints are the same values."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
from rich.console import Console
from rich.table import Table

Row = Mapping[str, str | float | None]
"""One subject and its figures; None: there is no such figure for it."""

RESULTS = Path(__file__).parent / "results"
"""Where results go unless told otherwise; not in version control."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every row, and how a person reads it."""

    key: str
    title: str
    """With the unit."""
    digits: int = 0
    """After the point."""


def shown(value: str | float | None, digits: int) -> str:
    """For people; a dash where there is no figure."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.{digits}f}"


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A line for each figure and a column for each row: subjects are few, and titles with units are long.

    The first of `columns` names the subjects.
    """
    name, *figures = columns
    drawn = Table(name.title, title=title, title_justify="left")
    for row in rows:
        drawn.add_column(shown(row.get(name.key), name.digits), justify="right")
    for figure in figures:
        drawn.add_row(figure.title, *(shown(row.get(figure.key), figure.digits) for row in rows))
    return drawn


def machine() -> dict[str, str | float]:
    """What the figures were measured on; without it they mean nothing."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }


def publish(path: Path, title: str, columns: Sequence[Column], rows: Sequence[Row], about: Row) -> None:
    """Writes the rows and what they were measured on as JSON, then prints the table of the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "about": about, "rows": rows}
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    console = Console()
    console.print(table(title, columns, rows))
    console.print(", ".join(f"{key}: {value}" for key, value in about.items()), style="dim")
