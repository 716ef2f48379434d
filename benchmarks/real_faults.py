"""Real answers of real engines, broken in the middle: `python -m benchmarks.faults --real`.

Two agents with the embedded llama.cpp on this machine; the one that streams is killed, engine and all, some
words in. What each says greedily when nothing happens to it is asked first. A continuation is `exact` where
the whole text is that of the one that was killed. Greedy text may differ later for honest reasons (another
number of threads, what is in its cache), so a `clean` seam is told apart: the text agrees with that run up to
the seam and for `SEAM_CHARS` beyond it, so that no character is missing or doubled where the two parts meet.
Where the killed worker itself had said something else this time, neither can be told: there is a dash.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil

from benchmarks.asking import Answer, Json, ask, chat
from benchmarks.history import Outcome
from benchmarks.rooms import engines
from benchmarks.rooms.listing import listing, show, write
from benchmarks.serving import admin_headers, session
from benchmarks.tables import RESULTS, Column, Row, machine

TITLE = "Real streams whose worker is killed"
MAX_TOKENS = 64
WORDS_BEFORE = 12
"""Parts of the text at the client when the worker is killed."""
SEAM_CHARS = 12
NAMES = [name for name, _ in engines.NAMES_AND_SLOTS]
QUESTIONS = (
    "Tell me about the sea.",
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse.",
    "How does bread rise?",
    "Describe a walk through a forest in autumn.",
)
COLUMNS = (
    Column("case", "case"),
    Column("outcome", "outcome"),
    Column("attempts", "attempts"),
    Column("exact", "exact"),
    Column("clean", "clean seam"),
    Column("gap_s", "gap, s", 2),
    Column("seam", "characters before the seam"),
    Column("same", "characters as in the greedy run"),
    Column("of", "of"),
)


@dataclass(frozen=True, slots=True)
class Seam:
    """Where the second worker went on, judged by the longest pause after the kill."""

    chars: int
    gap_seconds: float


def seam_of(answer: Answer, killed_at: float) -> Seam | None:
    """None: nothing came after the kill."""
    later = [
        (after[0] - before[0], number)
        for number, (before, after) in enumerate(pairwise(answer.pieces), 1)
        if after[0] >= killed_at
    ]
    if not later:
        return None
    gap, number = max(later)
    return Seam(sum(len(text) for _, text in answer.pieces[:number]), gap)


def common(text: str, reference: str) -> int:
    """So many characters at the beginning of both are the same."""
    return next(
        (place for place, (ours, theirs) in enumerate(zip(text, reference, strict=False)) if ours != theirs),
        min(len(text), len(reference)),
    )


def row(case: str, answer: Answer, reference: str, killed_at: float, attempts: int) -> Row:
    """One case. With one attempt the kill hit nothing: there is no seam to judge."""
    seam, same = seam_of(answer, killed_at), common(answer.text, reference)
    success = answer.outcome is Outcome.SUCCESS
    enough = seam is not None and same >= min(seam.chars + SEAM_CHARS, len(reference))
    # The killed worker's own words, before anybody else had a say.
    comparable = attempts > 1 and (seam is None or same >= seam.chars)
    return {
        "case": case,
        "outcome": answer.outcome.value,
        "attempts": attempts,
        "detail": answer.detail or None,
        "exact": float(success and answer.text == reference) if comparable else None,
        "clean": float(success and enough) if comparable else None,
        "gap_s": seam.gap_seconds if seam else None,
        "seam": seam.chars if seam else None,
        "same": same,
        "of": len(reference),
    }


async def _case(number: int, folder: Path) -> Row:
    question = QUESTIONS[number % len(QUESTIONS)] + (f" Part {number}." if number >= len(QUESTIONS) else "")
    greedy = {"temperature": 0, "seed": 1}
    async with (
        engines.room(engines.agents(2), "expected_latency", folder) as room,
        session() as http,
    ):
        body = chat(engines.MODEL, question, stream=True, max_tokens=MAX_TOKENS, **greedy)
        references = await _references(http, room, body)
        answer = Answer(sent=asyncio.get_running_loop().time())
        name_of_it = {"X-Request-ID": f"real-{number}"}
        asking = asyncio.ensure_future(ask(http, room.url, body, headers=name_of_it, into=answer))
        while len(answer.pieces) < WORDS_BEFORE and not asking.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        name = next((one["id"] for one in await _workers(http, room) if one["running"]), NAMES[0])
        killed_at = asyncio.get_running_loop().time()
        _kill(room.workers[NAMES.index(name)])
        await asking
        why = f"{room.url}/admin/requests/real-{number}/why"
        async with http.get(why, headers=admin_headers(folder / "balancer")) as response:
            attempts = len((await response.json())["attempts"])
    return row(question, answer, references[name], killed_at, attempts)


async def _references(http: aiohttp.ClientSession, room: engines.Room, body: Json) -> dict[str, str]:
    """What each agent says when nothing happens to it, asked twice: its prompt is in its cache, as it will be
    when it is asked for good."""
    said = {}
    for worker in await _workers(http, room):
        for _ in range(2):
            said[worker["id"]] = (await ask(http, worker["url"], body)).text
    return said


async def _workers(http: aiohttp.ClientSession, room: engines.Room) -> list[Json]:
    """As the balancer sees them."""
    async with http.get(f"{room.url}/health") as response:
        workers: list[Json] = (await response.json())["workers"]
    return workers


def _kill(victim: engines.Started) -> None:
    """The agent and its engine, at once, as a machine that loses its power."""
    top = psutil.Process(victim.process.pid)
    for process in (top, *top.children(recursive=True)):
        process.kill()


async def measure(cases: int) -> list[Row]:
    """A row for each case, in a room of its own."""
    rows = []
    for number in range(cases):
        with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
            rows.append(await _case(number, Path(folder)))
        print(f"{number + 1} of {cases}: {rows[-1]}", file=sys.stderr)
    return rows


def main(cases: int, path: Path | None) -> None:
    """Prints and writes the rows, and how many were continued, exact and clean."""
    rows = asyncio.run(measure(cases))
    write(path or RESULTS / "real_faults.json", TITLE, rows, machine())
    show(listing(TITLE, COLUMNS, rows), machine())
    for key in ("exact", "clean"):
        told = [one for one in rows if one[key] is not None]
        print(f"{key}: {sum(bool(one[key]) for one in told)} of {len(told)}")
