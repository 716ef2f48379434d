"""The real dispatcher and its rivals on simulated rooms: `python -m benchmarks.simulate`.

Each row is one simulation; the table shows their means over the seeds. Nothing depends on the machine that
this runs on: the same arguments give the same rows.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import orjson
from rich.console import Console

from benchmarks.sim.fleets import FLEETS, Fleet, fleet_named
from benchmarks.sim.policies import POLICIES
from benchmarks.sim.scene import simulate
from benchmarks.sim.workloads import WORKLOADS, Workload, workload_named
from benchmarks.tables import RESULTS, Column, Row, shown, table

FIGURES = (
    Column("makespan_over_bound", "makespan / bound", 2),
    Column("makespan_over_least", "makespan / least", 2),
    Column("prefill_over_min", "prefill / least", 2),
    Column("ttft_p50", "TTFT p50, s", 2),
    Column("ttft_p99", "TTFT p99, s", 1),
    Column("goodput", "goodput", 3),
    Column("lost", "lost", 0),
    Column("batch_done", "batch done", 2),
)
TITLE = "Simulated rooms"


def summary(rows: Sequence[Row]) -> tuple[list[Column], list[Row]]:
    """Columns and rows of a table with a line for each policy: the mean of all seeds, and how far they are
    from it at most. Figures that none of the rows has are left out.
    """
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    columns = [Column("figure", "policy"), *(Column(policy, policy) for policy in policies)]
    figures = [figure for figure in FIGURES if any(row[figure.key] is not None for row in rows)]
    lines: list[Row] = []
    for figure in figures:
        line: dict[str, str | float | None] = {"figure": figure.title}
        for policy in policies:
            line[policy] = _cell(figure, [row for row in rows if row["policy"] == policy])
        lines.append(line)
    return columns, lines


def _cell(figure: Column, rows: Sequence[Row]) -> str | None:
    values = [row[figure.key] for row in rows]
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return None  # a mean of those that were through in time would flatter
    mean = statistics.fmean(numbers)
    spread = max(abs(number - mean) for number in numbers)
    return shown(mean, figure.digits) + (f" ±{shown(spread, figure.digits)}" if len(numbers) > 1 else "")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each fleet, workload and figure, a dot for each seed. Raises `ModuleNotFoundError`."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    groups = list(_grouped(rows))
    drawn = [[figure for figure in FIGURES if _points(figure, group)] for _, group in groups]
    width = max(map(len, drawn), default=1)
    canvas, panels = pyplot.subplots(
        len(groups), width, squeeze=False, figsize=(4 * width, 3 * len(groups)), layout="constrained"
    )
    for line, (about, group), figures in zip(panels, groups, drawn, strict=True):
        for panel in line[len(figures) :]:
            panel.set_visible(False)
        for panel, figure in zip(line, figures, strict=False):
            points = _points(figure, group)
            panel.plot([value for _, value in points], [policy for policy, _ in points], "o", alpha=0.6)
            panel.set_title(f"{about}: {figure.title}", fontsize=9)
            panel.invert_yaxis()
            if figure.key in ("makespan_over_bound", "makespan_over_least"):
                panel.set_xscale("log")
                panel.set_xlim(left=1)
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_formatter("")
    canvas.savefig(path)


def _points(figure: Column, rows: Sequence[Row]) -> list[tuple[str, float]]:
    values = [(str(row["policy"]), row[figure.key]) for row in rows]
    return [(policy, value) for policy, value in values if isinstance(value, int | float)]


def _grouped(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    """The rows of each fleet and workload, with both names."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['fleet']}, {row['workload']}", []).append(row)
    return groups.items()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description="The real dispatcher and its rivals on simulated rooms.",
    )
    fleets, workloads = ", ".join(FLEETS), ", ".join(WORKLOADS)
    parser.add_argument(
        "--fleet", nargs="+", default=["mixed7"], metavar="FLEET", help=f"{fleets} or a JSON file"
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        default=["batch", "chat60"],
        metavar="WORKLOAD",
        help=f"{workloads} or a JSON file",
    )
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="1 2 3, and 1 when quick")
    parser.add_argument("--quick", action="store_true", help="smaller workloads: a rough answer in a minute")
    parser.add_argument("--json", type=Path, default=RESULTS / "simulate.json", help="where the rows go")
    parser.add_argument("--plot", type=Path, help="where a picture of the rows goes (needs matplotlib)")
    return parser


def _named(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> Iterable[tuple[str, Fleet, str, Workload]]:
    try:
        fleets = [(Path(name).stem, fleet_named(name)) for name in options.fleet]
        workloads = [(Path(name).stem, workload_named(name)) for name in options.workload]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for (fleet_name, fleet), (workload_name, workload) in product(fleets, workloads):
        yield fleet_name, fleet, workload_name, workload.quick() if options.quick else workload


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plot:
        try:
            importlib.import_module("matplotlib")
        except ModuleNotFoundError:
            parser.error("--plot needs matplotlib: put `uv run --with matplotlib` before this command")
    seeds = options.seed or ([1] if options.quick else [1, 2, 3])
    rows: list[Row] = []
    for fleet_name, fleet, workload_name, workload in _named(parser, options):
        for policy, seed in product(options.policy, seeds):
            begun = time.monotonic()
            try:
                rows.append(simulate(fleet_name, fleet, workload_name, workload, policy, seed))
            except ValueError as error:
                parser.error(str(error))
            seconds = time.monotonic() - begun
            print(f"{fleet_name}, {workload_name}, {policy}, seed {seed}: {seconds:.1f} s", file=sys.stderr)
    about = {"seeds": ", ".join(map(str, seeds)), "quick": "yes" if options.quick else "no"}
    content = {"title": TITLE, "about": about, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has no width to fit into
    for name, group in _grouped(rows):
        console.print(table(f"{name} (seeds: {about['seeds']})", *summary(group)))
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
