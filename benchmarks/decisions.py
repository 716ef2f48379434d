"""What a routing decision costs: the real dispatcher in a full room that is kept full.

`python -m benchmarks.decisions [--quick] [--json FILE]`

Time is virtual, the dispatcher's calls are timed on the real clock, each by itself; the garbage collector
runs as it does in production. `mean us` is all that the calls took over the number of events, so a call that
makes up for a hundred cheap ones is in it; `growth` is that mean over the one of the first row of its kind.
`waiting` is how much more is asked than the room has slots, and always is, since whoever is answered is
replaced. A policy may leave slots free for somebody better suited: then more wait (`waited`).
Compare rows of one run only: another machine, another figure.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import get_args

from balancer.core.dispatcher import DispatchPolicy
from balancer.core.model import Arrived, Began, Ended, Reported, Tick
from balancer.core.placement import POLICIES, PlacementPolicy
from benchmarks.rooms.asks import Kind
from benchmarks.rooms.crowded import Crowd, Watch
from benchmarks.rooms.listing import listing, show, write
from benchmarks.tables import RESULTS, Column, Row, machine

TITLE = "What a routing decision costs"
KINDS: tuple[Kind, ...] = get_args(Kind)
NS_PER_US = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Which rooms, and for how long each is watched."""

    kinds: tuple[Kind, ...]
    workers: tuple[int, ...]
    waiting: tuple[int, ...]
    events: int
    settle_seconds: float
    """Virtual, before anything is measured: until then prompts are being read that all came at once."""
    settle_limit_seconds: float
    limit_seconds: float
    """Real: a room that is too slow is settled for less, and measured on fewer events; its row says so."""


FULL = Effort(
    kinds=KINDS,
    workers=(8, 40, 400),
    waiting=(0, 1000, 10_000),
    events=20_000,
    settle_seconds=90.0,
    settle_limit_seconds=60.0,
    limit_seconds=30.0,
)
QUICK = Effort(
    kinds=("mixed",),
    workers=(8, 40, 400),
    waiting=(0, 1000),
    events=2000,
    settle_seconds=90.0,
    settle_limit_seconds=4.0,
    limit_seconds=2.0,
)
"""Ends within a minute."""

COLUMNS = (
    Column("kind", "asks"),
    Column("workers", "workers"),
    Column("waiting", "waiting"),
    Column("events", "events"),
    Column("mean_us", "mean us", 1),
    Column("p50_us", "p50", 1),
    Column("p99_us", "p99", 0),
    Column("max_us", "max", 0),
    Column("arrived_us", "arrived", 1),
    Column("began_us", "began", 1),
    Column("ended_us", "ended", 1),
    Column("reported_us", "reported", 1),
    Column("tick_us", "tick", 0),
    Column("growth", "growth", 2),
    Column("busy_share", "busy", 2),
    Column("waiting_seen", "waited", 0),
)
"""The last two say what the room was like: the share of its slots in use, and the length of its line."""

TIMED = {
    "arrived_us": Arrived,
    "began_us": Began,
    "ended_us": Ended,
    "reported_us": Reported,
    "tick_us": Tick,
}


def figures(watch: Watch, first_mean_us: float | None) -> dict[str, str | float | None]:
    """What was measured in a room. `first_mean_us`: in the first room of this kind; None: this is it."""
    calls = [spent / NS_PER_US for each in watch.spent_ns.values() for spent in each]
    mean = statistics.fmean(calls)
    cuts = statistics.quantiles(calls, n=100, method="inclusive")
    measured: dict[str, str | float | None] = {
        "events": len(calls),
        "mean_us": mean,
        "p50_us": cuts[49],
        "p99_us": cuts[98],
        "max_us": max(calls),
        "growth": mean / (first_mean_us or mean),
        "grants": watch.grants,
        "refusals": watch.refusals,
        "busy_share": statistics.fmean(watch.busy_shares) if watch.busy_shares else None,
        "waiting_seen": statistics.fmean(watch.waiting) if watch.waiting else None,
    }
    for key, event in TIMED.items():
        spent = watch.spent_ns.get(event)
        measured[key] = statistics.fmean(spent) / NS_PER_US if spent else None
    return measured


def measure(placement: PlacementPolicy, effort: Effort, seed: int) -> list[Row]:
    """A row for each room, the smallest of each kind first."""
    rows: list[Row] = []
    for kind in effort.kinds:
        first: float | None = None
        for workers, waiting in product(effort.workers, effort.waiting):
            begun = perf_counter()
            crowd = Crowd(placement, kind, workers, waiting, seed)
            crowd.run(
                events=sys.maxsize,
                virtual_seconds=effort.settle_seconds,
                real_seconds=effort.settle_limit_seconds,
            )
            settled = crowd.time.now
            watch = crowd.run(
                events=effort.events, virtual_seconds=float("inf"), real_seconds=effort.limit_seconds
            )
            rows.append(
                {"kind": kind, "workers": workers, "waiting": waiting, "settled_seconds": settled}
                | figures(watch, first)
            )
            first = first or float(rows[-1]["mean_us"] or 0)
            seconds = perf_counter() - begun
            print(f"{kind}, {workers} workers, {waiting} waiting: {seconds:.1f} s", file=sys.stderr)
    return rows


def processor() -> str:
    """What the system calls it; empty where it does not say."""
    if sys.platform == "darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=TITLE + ".")
    usual = DispatchPolicy().placement.name
    parser.add_argument("--policy", choices=POLICIES, default=usual, help=f"{usual} unless told otherwise")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="of the asks")
    parser.add_argument("--workers", nargs="+", type=_positive, metavar="N")
    parser.add_argument("--waiting", nargs="+", type=_natural, metavar="N", help="asks in line")
    parser.add_argument("--events", type=_positive, metavar="N", help="that are measured in each room")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--quick", action="store_true", help="fewer rooms: a rough answer within a minute")
    parser.add_argument("--json", type=Path, default=RESULTS / "decisions.json", help="where the rows go")
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    number = _natural(text)
    if not number:
        raise argparse.ArgumentTypeError("expected at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else FULL
    effort = replace(
        effort,
        kinds=tuple(options.kind or effort.kinds),
        workers=tuple(options.workers or effort.workers),
        waiting=effort.waiting if options.waiting is None else tuple(options.waiting),
        events=options.events or effort.events,
    )
    about = {"policy": options.policy, "cpu": processor()} | machine()
    placement = PlacementPolicy(name=options.policy)
    rows = measure(placement, effort, options.seed)
    write(options.json, TITLE, rows, about)
    show(listing(TITLE, COLUMNS, rows), about)


if __name__ == "__main__":
    main()
