"""Results with a line for each row: for benchmarks of more rooms than fit beside each other in a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.tables import Column, Row, shown

WIDTH = 170
"""Of a table that is printed into a file, which has no width to fit into."""


def listing(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A line for each row. Columns for which no row has a figure are left out."""
    drawn = Table(title=title, title_justify="left")
    told = [column for column in columns if any(row[column.key] is not None for row in rows)]
    for column in told:
        drawn.add_column(column.title, justify="right", no_wrap=column is columns[0])
    for row in rows:
        drawn.add_row(*(shown(row[column.key], column.digits) for column in told))
    return drawn


def write(path: Path, title: str, rows: Sequence[Row], about: Row) -> None:
    """The rows and what they were measured on, as `tables.publish` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "about": about, "rows": rows}
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def show(drawn: Table, about: Row) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(drawn)
    console.print(", ".join(f"{key}: {value}" for key, value in about.items()), style="dim")
