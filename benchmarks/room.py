"""Policies on real engines: a batch of papers through a balancer to unequal agents on this machine.

`python -m benchmarks.room [--quick] [--policy NAME ...] [--rounds N] [--chat] [--json FILE]`

Each row is one batch in a fresh room: agents, engines and balancer are started anew, so nothing is cached
from another policy. Within a round all policies get the same papers, and none is always first. Engines share
this machine's few cores with balancer and client: compare the rows of one run, not of two machines.

Cached tokens are the engines' own account of the answers that the client received. Prompts that were read
ahead (warm-ups) or twice (copies) are not in it; they are in `cpu_s`, the processor time of all agents and
engines during the batch, which is the honest measure of the work done.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.rooms import batch, engines
from benchmarks.rooms.listing import listing, show, write
from benchmarks.tables import RESULTS, Column, Row, machine, shown

TITLE = "A batch of papers on real engines"
ROUND_ROBIN = "round_robin"
SHIFT = 137
"""Characters by which the papers of a round begin later than those of the round before."""

Figures = dict[str, str | float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    policies: tuple[str, ...]
    workers: int
    rounds: int
    papers: int
    chars: int
    """Of a paper of middle length; a quarter of it in tokens."""
    max_tokens: int


FULL = Effort(
    policies=("expected_latency", ROUND_ROBIN, "weighted_random", "least_loaded"),
    workers=3,
    rounds=3,
    papers=12,
    chars=3600,
    max_tokens=24,
)
QUICK = Effort(
    policies=("expected_latency", ROUND_ROBIN), workers=2, rounds=1, papers=4, chars=1400, max_tokens=4
)
"""Ends within a minute."""

COLUMNS = (
    Column("policy", "policy"),
    Column("round", "round"),
    Column("makespan_s", "time, s", 1),
    Column("makespan_over_round_robin", "to r. robin", 2),
    Column("prompt_tokens", "prompts"),
    Column("cached_tokens", "cached"),
    Column("cached_share", "share", 2),
    Column("cpu_s", "CPU, s", 1),
    Column("requests", "requests"),
    Column("failed", "failed"),
    *(Column(f"requests_{name}", name) for name, _ in engines.NAMES_AND_SLOTS),
    Column("chats", "chats"),
    Column("chats_failed", "chats failed"),
    Column("ttft_p50_s", "p50, s", 2),
    Column("ttft_p99_s", "p99, s", 2),
)


def row(policy: str, number: int, outcome: batch.Outcome, cpu_seconds: float, chat: bool) -> Figures:
    """One batch. `makespan_over_round_robin` is not known yet: None."""
    answered = outcome.by_worker.total()
    counted = answered and not outcome.uncounted
    figures: Figures = {
        "policy": policy,
        "round": number,
        "makespan_s": outcome.seconds,
        "makespan_over_round_robin": None,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens if counted else None,
        "cached_share": outcome.cached_tokens / outcome.prompt_tokens if counted else None,
        "cpu_s": cpu_seconds,
        "requests": answered + len(outcome.failures),
        "failed": len(outcome.failures),
        "chats": len(outcome.first_token_seconds) + len(outcome.chat_failures) if chat else None,
        "chats_failed": len(outcome.chat_failures) if chat else None,
        "ttft_p50_s": _percentile(outcome.first_token_seconds, 50),
        "ttft_p99_s": _percentile(outcome.first_token_seconds, 99),
    }
    return figures | {f"requests_{name}": outcome.by_worker[name] for name, _ in engines.NAMES_AND_SLOTS}


def _percentile(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def measure(effort: Effort, *, chat: bool) -> list[Row]:
    """A row for each batch, in the order in which they ran."""
    rows: list[Figures] = []
    for number in range(effort.rounds):
        texts = batch.papers(effort.papers, effort.chars, shift=number * SHIFT)
        for policy in order(effort.policies, number):
            rows.append(await _run(policy, number + 1, texts, effort, chat))
            seconds, share = _number(rows[-1]["makespan_s"]), rows[-1]["cached_share"]
            print(
                f"round {number + 1} of {effort.rounds}, {policy}: {seconds:.1f} s, {shown(share, 2)} cached",
                file=sys.stderr,
            )
    return compared(rows)


def compared(rows: Sequence[Figures]) -> list[Row]:
    """The same rows, each with its time against round robin's."""
    return [one | {"makespan_over_round_robin": _over_round_robin(one, rows)} for one in rows]


def order(policies: Sequence[str], number: int) -> list[str]:
    """Of the round with that number, counted from 0: nobody is always first."""
    turn = number % len(policies)
    return [*policies[turn:], *policies[:turn]]


async def _run(policy: str, number: int, texts: Sequence[str], effort: Effort, chat: bool) -> Figures:
    # What was ended may still write its last words into it.
    with tempfile.TemporaryDirectory(prefix="room-", ignore_cleanup_errors=True) as folder:
        agents = engines.agents(effort.workers)
        async with engines.room(agents, policy, Path(folder)) as room:
            before = room.cpu_seconds()
            outcome = await batch.run(room.url, texts, max_tokens=effort.max_tokens, chats=chat)
            cpu_seconds = room.cpu_seconds() - before
    for failure in dict.fromkeys(outcome.failures + outcome.chat_failures):
        print(f"{policy}: {failure}", file=sys.stderr)
    return row(policy, number, outcome, cpu_seconds, chat)


def _over_round_robin(one: Figures, rows: Sequence[Figures]) -> float | None:
    """Against round robin's time with the same papers; None where one of the two has lost answers."""
    rivals = [rival for rival in rows if rival["policy"] == ROUND_ROBIN and rival["round"] == one["round"]]
    if not rivals or one["failed"] or rivals[0]["failed"]:
        return None
    return _number(one["makespan_s"]) / _number(rivals[0]["makespan_s"])


def medians(rows: Sequence[Row]) -> list[Row]:
    """A line for each policy: of each figure the median over the rounds that have it."""
    lines: list[Row] = []
    for policy in dict.fromkeys(one["policy"] for one in rows):
        own = [one for one in rows if one["policy"] == policy]
        line: Figures = {"policy": policy, "round": "median"}
        for key in own[0].keys() - line.keys():
            values = [_number(one[key]) for one in own if one[key] is not None]
            line[key] = statistics.median(values) if values else None
        lines.append(line)
    return lines


def _number(value: str | float | None) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no figure")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.room", description=TITLE + ".")
    parser.add_argument("--policy", nargs="+", metavar="NAME", help="as in the balancer's setting `policy`")
    parser.add_argument("--rounds", type=int, choices=range(1, 101), metavar="N")
    parser.add_argument("--papers", type=int, choices=range(1, 101), metavar="N")
    parser.add_argument("--workers", type=int, choices=(2, 3))
    parser.add_argument(
        "--chat", action="store_true", help=f"beside it, a chat every {batch.CHAT_SECONDS:g} s"
    )
    parser.add_argument("--quick", action="store_true", help="two policies: a rough answer within a minute")
    parser.add_argument("--json", type=Path, default=RESULTS / "room.json", help="where the rows go")
    return parser


async def _until_terminated(effort: Effort, *, chat: bool) -> list[Row]:
    """SIGTERM ends it as Ctrl-C does: in order, so that no process of ours is left."""
    measuring = asyncio.current_task()
    if measuring is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    return await measure(effort, chat=chat)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else FULL
    effort = replace(
        effort,
        policies=tuple(dict.fromkeys(options.policy or effort.policies)),
        rounds=options.rounds or effort.rounds,
        papers=options.papers or effort.papers,
        workers=options.workers or effort.workers,
    )
    about: dict[str, str | float] = machine() | {
        "model": engines.MODEL,
        "papers": effort.papers,
        "agents": "; ".join(map(str, engines.agents(effort.workers))),
    }
    try:
        rows = asyncio.run(_until_terminated(effort, chat=options.chat))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("interrupted: all processes are ended, no results were written") from None
    write(options.json, TITLE, rows, about)
    show(listing(TITLE, COLUMNS, [*rows, *medians(rows)] if effort.rounds > 1 else rows), about)


if __name__ == "__main__":
    main()
