"""What clients see when workers fail: the design's reliability targets, counted (RELIABILITY 9).

`python -m benchmarks.faults [--count N] [--only ROW ...] [--json FILE]`
`python -m benchmarks.faults --real [--count N]` kills real engines in the middle of real answers

A balancer runs as its users run it; its workers are fake engines whose text follows from the prompt alone, so
that every lost or doubled character shows. Each case is one request whose first worker fails as the row says;
four sound requests go with it, as a room's workers mostly work. A row counts what the client was told:

- `failed`: an error where the design promises none; in a row of answers that cannot be continued, anything
  but a complete answer or an explicit error;
- `lost`: the worst: it was told of success and the text was not all, or not right;
- `continued`: the text went on at another worker, exactly. A whole answer whose worker fails may go on or be
  begun again; so may a stream of which nothing had reached the client.

Detection is from the fault to the moment when another worker is asked (or the client is told); the gap is
the longest pause within a text. Rows whose fault takes the balancer seconds to see (a frozen machine, an
engine that hangs) and rows that kill real processes have fewer cases unless `--count` says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import real_faults
from benchmarks.asking import Answer, ask, chat
from benchmarks.history import Outcome
from benchmarks.processes import NotReady
from benchmarks.rooms.listing import listing, show, write
from benchmarks.serving import balancer, entry, session
from benchmarks.tables import RESULTS, Column, Row, machine
from tests.fakes.engine import FakeEngine, Fault, Request, engine_process, reference_text

TITLE = "What clients see when workers fail"
MODEL = "fake"
TOKENS = 24
TOKEN_SECONDS = 0.002
AT_TOKEN = 9
IN_AN_EVENT = 900
"""A byte of the body that lies within an event, some tokens in."""
WORKERS = 3
SLOTS = 64
AT_ONCE = 8
SOUND_FOR_EACH = 4
"""Requests without a fault beside each that has one: a fifth of the requests may be retried."""


class Shape(Enum):
    """How the client asks."""

    WHOLE = "whole"
    STREAM = "stream"
    TOOLS = "stream with tools"
    """It may not be continued: a tool's call could be half said."""

    def body(self, question: str) -> dict[str, Any]:
        function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
        tools: dict[str, Any] = {}
        if self is Shape.TOOLS:
            tools["tools"] = [{"type": "function", "function": function}]
        return chat(MODEL, question, stream=self is not Shape.WHOLE, **tools)


class Promise(Enum):
    """What the design says of such a case."""

    ANSWERED = "answered"
    """In full, and the client sees nothing of it."""
    CONTINUED = "continued"
    """In full, and what had come of it stays."""
    TOLD = "told"
    """In full, or with an explicit error."""


class Means(Enum):
    """How it fails."""

    SCRIPT = "script"
    """The engine does as scripted."""
    KILL = "kill"
    """The engine's process is killed (SIGKILL)."""
    FREEZE = "freeze"
    """An agent's process is stopped (SIGSTOP); its connections stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A row."""

    name: str
    shape: Shape
    promise: Promise
    fault: Fault = field(default_factory=Fault)
    means: Means = Means.SCRIPT
    after: int = 0
    """Words at the client before a process is killed or stopped."""
    http_1_0: bool = False
    slow: bool = False
    """To detect it takes seconds."""


def _each(
    name: str, fault: Fault, *, before: bool = True, http_1_0: bool = False, slow: bool = False
) -> Iterable[Scene]:
    """The scenes of a fault that comes before the first token, or else between tokens."""
    stream, eligible = ("no token yet", Promise.ANSWERED) if before else ("mid-stream", Promise.CONTINUED)
    more: dict[str, Any] = {"fault": fault, "http_1_0": http_1_0, "slow": slow}
    yield Scene(name=f"{name}, whole", shape=Shape.WHOLE, promise=Promise.ANSWERED, **more)
    yield Scene(name=f"{name}, {stream}", shape=Shape.STREAM, promise=eligible, **more)
    if not before:
        yield Scene(name=f"{name}, {stream}, tools", shape=Shape.TOOLS, promise=Promise.TOLD, **more)


SCENES: tuple[Scene, ...] = (
    *_each("closed before the head", Fault.close()),
    *_each("closed after the head", Fault.close(at_token=0)),
    *_each("closed between tokens", Fault.close(at_token=AT_TOKEN), before=False),
    *_each("closed in an event", Fault.close(at_byte=IN_AN_EVENT), before=False),
    *_each("reset before the head", Fault.reset()),
    *_each("reset between tokens", Fault.reset(at_token=AT_TOKEN), before=False),
    *_each("HTTP/1.0 ends early", Fault.close(at_token=AT_TOKEN), before=False, http_1_0=True),
    *_each("ends as if all were well", Fault.truncate(at_token=AT_TOKEN), before=False),
    *_each("error event", Fault.error_event(at_token=AT_TOKEN, then_done=True), before=False),
    *(scene for status in (500, 429, 503) for scene in _each(f"status {status}", Fault.status(status))),
    *_each("hangs before the head", Fault.stall(), slow=True),
    *_each("hangs between tokens", Fault.stall(at_token=AT_TOKEN), before=False, slow=True),
    Scene(name="killed, whole", shape=Shape.WHOLE, promise=Promise.ANSWERED, means=Means.KILL),
    Scene(
        name="killed, mid-stream", shape=Shape.STREAM, promise=Promise.CONTINUED, means=Means.KILL, after=5
    ),
    Scene(
        name="killed, mid-stream, tools", shape=Shape.TOOLS, promise=Promise.TOLD, means=Means.KILL, after=5
    ),
    Scene(name="frozen, whole", shape=Shape.WHOLE, promise=Promise.ANSWERED, means=Means.FREEZE),
    Scene(
        name="frozen, mid-stream", shape=Shape.STREAM, promise=Promise.CONTINUED, means=Means.FREEZE, after=5
    ),
    Scene(
        name="frozen, mid-stream, tools", shape=Shape.TOOLS, promise=Promise.TOLD, means=Means.FREEZE, after=5
    ),
)


@dataclass(frozen=True, slots=True)
class Effort:
    scripted: int = 100
    slow: int = 8
    processes: int = 3

    def cases(self, scene: Scene) -> int:
        if scene.means is not Means.SCRIPT:
            return self.processes
        return self.slow if scene.slow else self.scripted


COLUMNS = (
    Column("scene", "scene"),
    Column("tried", "tried"),
    Column("failed", "failed"),
    Column("lost", "lost"),
    Column("told", "told"),
    Column("continued", "continued"),
    Column("detection_p50_s", "detection p50, s", 3),
    Column("detection_p99_s", "p99, s", 3),
    Column("gap_p50_s", "gap p50, s", 3),
    Column("gap_p99_s", "p99, s", 3),
    Column("sound_failed", "sound ones failed"),
)


@dataclass(slots=True)
class Count:
    """A row as it grows."""

    tried: int = 0
    failed: int = 0
    lost: int = 0
    told: int = 0
    continued: int = 0
    sound_failed: int = 0
    detection: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Of failures, for people."""

    def row(self, scene: Scene) -> Row:
        return {
            "scene": scene.name,
            "promise": scene.promise.value,
            "tried": self.tried,
            "failed": self.failed,
            "lost": self.lost,
            "told": self.told,
            "continued": self.continued,
            "detection_p50_s": _percentile(self.detection, 50),
            "detection_p99_s": _percentile(self.detection, 99),
            "gap_p50_s": _percentile(self.gaps, 50),
            "gap_p99_s": _percentile(self.gaps, 99),
            "sound_failed": self.sound_failed,
            "first_failure": self.words[0] if self.words else None,
        }

    def judge(self, answer: Answer, reference: str, promise: Promise, *, had_begun: bool) -> None:
        """Counts one case by what its client was told."""
        self.tried += 1
        right = answer.text == reference
        if answer.outcome is Outcome.SUCCESS and not right:
            self.lost += 1
            self.words.append(f"success with a wrong text: {len(answer.text)} of {len(reference)} characters")
        elif not reference.startswith(answer.text):
            self.lost += 1
            self.words.append("an error after a wrong text")
        elif answer.outcome is Outcome.SUCCESS:
            self.continued += had_begun
        elif promise is Promise.TOLD and answer.outcome is Outcome.ERROR:
            self.told += 1
        else:
            self.failed += 1
            self.words.append(f"{answer.outcome.value} {answer.status}: {answer.detail}")


def _percentile(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


# Scripted faults ...


class Strikes:
    """Which request is to fail, and when it did: the first worker that is asked fails it."""

    CASE = re.compile(rb"case (\d+) of")

    def __init__(self) -> None:
        self.struck: dict[int, Request] = {}
        self.next: dict[int, Request] = {}

    def hits(self, request: Request) -> bool:
        """Asked by each engine of each request that comes."""
        found = self.CASE.search(request.raw)
        if found is None:
            return False
        number = int(found[1])
        if number in self.struck:
            self.next.setdefault(number, request)
            return False
        self.struck[number] = request
        return True


async def scripted(scene: Scene, cases: int, folder: Path) -> Count:
    """So many requests, each of which fails on the first worker that it gets."""
    count, strikes = Count(), Strikes()
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                FakeEngine(tokens=TOKENS, token_seconds=TOKEN_SECONDS, slots=SLOTS, http_1_0=scene.http_1_0)
            )
            for _ in range(WORKERS)
        ]
        entries = [entry(number, engine.url, SLOTS) for number, engine in enumerate(engines)]
        url = (await stack.enter_async_context(balancer(entries, folder))).url
        for engine in engines:
            engine.always(scene.fault, when=strikes.hits)
        http = await stack.enter_async_context(session())
        turns = iter(range(cases))

        async def work() -> None:
            for number in turns:
                await _case(http, url, scene, number, strikes, count)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(cases, cases if scene.slow else AT_ONCE)):
                group.create_task(work())
        for engine in engines:
            engine.resume()
    return count


async def _case(
    http: aiohttp.ClientSession, url: str, scene: Scene, number: int, strikes: Strikes, count: Count
) -> None:
    for turn in range(SOUND_FOR_EACH):
        question = f"sound {number}.{turn} of {scene.name}"
        answer = await ask(http, url, Shape.STREAM.body(question))
        right = answer.outcome is Outcome.SUCCESS and answer.text == _reference(question)
        count.sound_failed += not right
    question = f"case {number} of {scene.name}"
    answer = await ask(http, url, scene.shape.body(question))
    struck, after = strikes.struck.get(number), strikes.next.get(number)
    begun = after is not None and after.body["messages"][-1]["role"] == "assistant"
    count.judge(answer, _reference(question), scene.promise, had_begun=begun)
    if struck is None:
        return
    failed_at = struck.started if scene.slow else (struck.ended or struck.started)
    if scene.slow and scene.promise is not Promise.ANSWERED and answer.pieces:
        failed_at = answer.pieces[min(AT_TOKEN, len(answer.pieces)) - 1][0]
    count.detection.append(max(0.0, (after.started if after else answer.finished) - failed_at))
    if answer.outcome is Outcome.SUCCESS and begun:
        count.gaps.append(answer.longest_gap())


def _reference(question: str) -> str:
    return reference_text([{"role": "user", "content": question}], TOKENS)


# Processes that are killed or frozen ...

CASE_ID = "case"
IDLE_SECONDS = 60.0
LOOK_SECONDS = 0.25
QUIET_LOOKS = 4
SLOW_TOKEN_SECONDS = 0.05
"""So that there is a middle to be killed in."""


async def by_process(scene: Scene, cases: int, folder: Path) -> Count:
    """Each case has a room of its own: what is left of a worker must not help the next one."""
    count = Count()
    for number in range(cases):
        own = folder / str(number)
        own.mkdir()
        await _process_case(scene, number, own, count)
    return count


async def _process_case(scene: Scene, number: int, folder: Path, count: Count) -> None:
    frozen = scene.means is Means.FREEZE
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                engine_process(
                    *("--tokens", str(TOKENS), "--token-seconds", str(SLOW_TOKEN_SECONDS)),
                    *(("--agent-id", f"w{one}", "--continues", "header") if frozen else ()),
                )
            )
            for one in range(2)
        ]
        entries = [entry(one, worker.url, None if frozen else SLOTS) for one, worker in enumerate(workers)]
        served = await stack.enter_async_context(balancer(entries, folder))
        url = served.url
        http = await stack.enter_async_context(session())
        await _idle(http, url)
        question, name = f"case {number} of {scene.name}", {"X-Request-ID": CASE_ID}
        asking = asyncio.ensure_future(ask(http, url, scene.shape.body(question), headers=name))
        await asyncio.sleep(SLOW_TOKEN_SECONDS * (scene.after + 1.5))
        struck_at = asyncio.get_running_loop().time()
        victim = workers[await _busy(http, url)]
        try:
            victim.process.send_signal(signal.SIGSTOP if frozen else signal.SIGKILL)
            answer = await asking
        finally:
            if frozen:
                victim.process.send_signal(signal.SIGCONT)
        why = f"{url}/admin/requests/{CASE_ID}/why"
        async with http.get(why, headers=served.admin_headers) as response:
            attempts = (await response.json())["attempts"]
        if attempts[0]["ended"] == "answered":
            raise SystemExit(f"{scene.name}: the worker that was struck was not the one at work")
    begun = scene.shape is Shape.STREAM and any(at < struck_at for at, _ in answer.pieces)
    count.judge(answer, _reference(question), scene.promise, had_begun=begun)
    if scene.shape is Shape.WHOLE:  # seen only by how late the answer is
        detected_at = answer.finished - TOKENS * SLOW_TOKEN_SECONDS
    else:
        after = [at for at, _ in answer.pieces if at > struck_at + SLOW_TOKEN_SECONDS]
        detected_at = (after or [answer.finished])[0]
    count.detection.append(max(0.0, detected_at - struck_at))
    if answer.outcome is Outcome.SUCCESS and begun:
        count.gaps.append(answer.longest_gap())


async def _running(http: aiohttp.ClientSession, url: str) -> list[int]:
    """Requests at each worker, in their order."""
    async with http.get(f"{url}/health") as response:
        return [worker["running"] for worker in (await response.json())["workers"]]


async def _idle(http: aiohttp.ClientSession, url: str) -> None:
    """The balancer has measured its new workers with prompts of its own, and is through with that."""
    quiet = 0
    async with asyncio.timeout(IDLE_SECONDS):
        while quiet < QUIET_LOOKS:
            quiet = 0 if any(await _running(http, url)) else quiet + 1
            await asyncio.sleep(LOOK_SECONDS)


async def _busy(http: aiohttp.ClientSession, url: str) -> int:
    """The number of the worker that has the one request."""
    running = await _running(http, url)
    return running.index(max(running))


# All of them ...


async def measure(scenes: Sequence[Scene], effort: Effort) -> list[Row]:
    """A row for each scene, in that order."""
    rows = []
    for scene in scenes:
        with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
            act = scripted if scene.means is Means.SCRIPT else by_process
            count = await act(scene, effort.cases(scene), Path(folder))
        rows.append(count.row(scene))
        print(
            f"{scene.name}: {count.tried} tried, {count.failed} failed, {count.lost} lost"
            + (f"; first: {count.words[0]}" if count.words else ""),
            file=sys.stderr,
        )
    return rows


def kept_promises(rows: Sequence[Row]) -> bool:
    """No request failed and nothing was lost."""
    return not any(row["failed"] or row["lost"] or row["sound_failed"] for row in rows)


def _chosen(only: Sequence[str] | None) -> list[Scene]:
    """The scenes with one of these words in their name. Raises SystemExit where there is none."""
    found = [scene for scene in SCENES if only is None or any(word in scene.name for word in only)]
    if not found:
        raise SystemExit(f"no scene has that in its name; there are: {'; '.join(s.name for s in SCENES)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=TITLE + ".")
    parser.add_argument("--count", type=int, metavar="N", help="cases of each row")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="scenes with one of these in their name")
    parser.add_argument("--real", action="store_true", help="real engines, killed in the middle")
    parser.add_argument("--json", type=Path, help="where the rows go")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where a promise was broken."""
    options = _parser().parse_args(arguments)
    effort = Effort(*[options.count] * 3) if options.count else Effort()
    if options.real:
        real_faults.main(options.count or 5, options.json)
        return
    try:
        rows = asyncio.run(_until_terminated(lambda: measure(_chosen(options.only), effort)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("interrupted: all processes are ended, no results were written") from None
    except NotReady as error:
        raise SystemExit(f"the balancer: {error}") from None
    write(options.json or RESULTS / "faults.json", TITLE, rows, machine())
    show(listing(TITLE, COLUMNS, rows), machine())
    if not kept_promises(rows):
        raise SystemExit(1)


async def _until_terminated(measuring: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    """SIGTERM ends it as Ctrl-C does: in order, so that no process of ours is left."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measuring()


if __name__ == "__main__":
    main()
