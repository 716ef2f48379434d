"""Shows findings to people: a table where somebody looks at a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker_agent.findings import Finding, Level, summary

_STYLES = {Level.OK: "green", Level.NOTE: "dim", Level.WARNING: "yellow", Level.FAULT: "bold red"}


def show(findings: Sequence[Finding]) -> None:
    """Prints them, each with its fix below it, and how many are faults."""
    if not sys.stdout.isatty():
        for one in findings:
            fix = f"\n    fix: {one.fix}" if one.fix else ""
            sys.stdout.write(f"{one.level.value}: {one.area}: {one.sentence}{fix}\n")
        sys.stdout.write(f"{summary(findings)}\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for one in findings:
        # Text: what another machine says of itself is no markup.
        said = Text(one.sentence)
        if one.fix:
            said.append(f"\n-> {one.fix}", style="cyan")
        table.add_row(Text(one.level.value, _STYLES[one.level]), Text(one.area), said)
    console = Console()
    console.print(table)
    console.print(Text(summary(findings), style="bold"))
