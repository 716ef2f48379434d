"""A room under mixed load with a few faults, for as long as is wanted, and the invariants at its end.

`python -m benchmarks.soak [--minutes 10] [--seed N] [--rate 20] [--json FILE]`

A balancer runs as its users run it, with fake engines whose text follows from the prompt alone. Streams,
whole answers, embeddings, class batch and clients that leave come at random moments, and one in a hundred
meets a scripted fault on the first worker that gets it. All of that follows from the seed, which is printed:
the same seed is the same load. Afterwards the log of the run is checked (`benchmarks.history`), and memory,
files and their slopes are told. It exits with 1 where an invariant was violated.

The log is kept in memory: about a KiB for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.asking import CHAT, EMBEDDINGS, Answer, ask, chat
from benchmarks.history import (
    Asked,
    AtRest,
    Began,
    Bounds,
    Delivered,
    Ended,
    Ending,
    Finished,
    Kind,
    Outcome,
    Record,
    Resources,
    Said,
    Violation,
    violations,
)
from benchmarks.processes import MEBIBYTE, NotReady, Started
from benchmarks.rooms.listing import listing, show, write
from benchmarks.serving import Serving, balancer, entry, session
from benchmarks.tables import RESULTS, Column, Row, machine
from tests.fakes.engine import FakeEngine, Fault, Request, reference_embedding, reference_text
from tests.fakes.engine import Outcome as EngineOutcome

TITLE = "A room under mixed load with faults"
MODEL = "fake"
WORKERS = 3
SLOTS = 16
TOKENS = 24
TOKEN_SECONDS = 0.005
FAULTS = 0.01
"""Of all requests."""
DEAD_SECONDS = 1.0
"""So long an engine that died is away."""
WARM_UP = 1100
"""Requests before memory is first read: what the balancer keeps of the past (the last 1000) is full then."""
SAMPLE_SECONDS = 5.0
REST_SECONDS = 20.0
"""After the load, until nothing is under way."""
LEFT_SECONDS = 0.005
"""News that a client left may come so much after the request that follows it into the slot."""

TROUBLE: tuple[Fault, ...] = (
    Fault.close(),
    Fault.close(at_token=0),
    Fault.close(at_token=9),
    Fault.close(at_byte=900),
    Fault.reset(),
    Fault.reset(at_token=9),
    Fault.truncate(at_token=9),
    Fault.no_end(),
    Fault.status(500),
    Fault.status(503, retry_after="1"),
    Fault.error_event(at_token=9, then_done=True),
    Fault.garbage(at_token=9),
    Fault.stall(at_token=9, seconds=0.5),
    Fault.die(at_token=9),
)

SHAPES = {"stream": 45, "whole": 25, "embedding": 10, "batch": 12, "leaves": 8}
"""How often each is drawn, of 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request that will come."""

    number: int
    pause: float
    """Seconds since the one before."""
    shape: str
    leave_after: int
    fault: Fault | None

    @property
    def id(self) -> str:
        return f"soak-{self.number}"


class Plan:
    """What comes: the same for the same seed, request by request."""

    def __init__(self, seed: int, rate: float) -> None:
        self._dice = random.Random(seed)
        self._rate = rate
        self._number = 0

    def next(self) -> Planned:
        dice = self._dice
        self._number += 1
        pause, shape = dice.expovariate(self._rate), dice.choices([*SHAPES], [*SHAPES.values()])[0]
        leave_after, faulty, fault = dice.randrange(1, TOKENS), dice.random() < FAULTS, dice.choice(TROUBLE)
        return Planned(
            number=self._number,
            pause=pause,
            shape=shape,
            leave_after=leave_after,
            fault=fault if faulty else None,
        )


@dataclass(slots=True)
class Log:
    """What happened, gathered as it ends and told in order of time."""

    records: list[Record] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    calls: defaultdict[str, list[tuple[str, Request]]] = field(default_factory=lambda: defaultdict(list))
    """The engines' requests by our id: worker and request."""
    nobodys: int = 0

    def answered(self, planned: Planned, answer: Answer, reference: str) -> None:
        """One request as its client saw it."""
        self.outcomes[answer.outcome.value] += 1
        self.records.append(Asked(at=answer.sent, request=planned.id, reference=reference))
        if answer.outcome is Outcome.SUCCESS and all(at <= answer.finished for at, _ in answer.pieces):
            last = answer.pieces[-1][0] if answer.pieces else answer.finished
            self.records.append(Delivered(at=last, request=planned.id, text=answer.text))
        else:
            self.records += [Delivered(at=at, request=planned.id, text=text) for at, text in answer.pieces]
        self.records.append(
            Finished(at=answer.finished, request=planned.id, outcome=answer.outcome, detail=answer.detail)
        )

    def worked(self, worker: str, engine: FakeEngine, *, all_of_them: bool = False) -> None:
        """Takes what the engine is through with; `all_of_them`: also what it still has."""
        for request in list(engine.requests):
            if request.ended is None and not all_of_them:
                continue
            engine.requests.remove(request)
            mine = request.headers.get("x-request-id", "")
            self.calls[mine if mine.startswith("soak-") else ""].append((worker, request))

    def told(self) -> list[Record]:
        """All of it, in order of time."""
        for request_id, calls in self.calls.items():
            self.records += _attempts(request_id, sorted(calls, key=lambda call: call[1].started))
        self.calls.clear()
        return sorted(self.records, key=lambda record: record.at)


_ENDINGS = {
    EngineOutcome.COMPLETED: Ending.COMPLETED,
    EngineOutcome.CLIENT_LEFT: Ending.LEFT,
    EngineOutcome.BROKEN: Ending.FAILED,
    None: Ending.FAILED,
}


def _attempts(request_id: str, calls: Sequence[tuple[str, Request]]) -> Iterable[Record]:
    """One that began while another was still at it is a copy, and so is what asks for one token only."""
    before: list[Request] = []
    for number, (worker, request) in enumerate(calls):
        beside = any(other.ended is None or other.ended > request.started for other in before)
        copy = bool(request_id) and (beside or request.body.get("max_tokens") == 1)
        kind = Kind.COPY if copy else Kind.RETRY if before and request_id else Kind.FIRST
        call = f"{request_id}/{worker}/{request.started}/{number}"
        yield Began(at=request.started, worker=worker, call=call, request=request_id, kind=kind)
        if request.ended is not None:
            died = request.outcome is EngineOutcome.BROKEN and _kills(request.fault)
            ending = Ending.CRASHED if died else _ENDINGS[request.outcome]
            early = LEFT_SECONDS if ending is Ending.LEFT else 0.0
            yield Ended(at=max(request.started, request.ended - early), call=call, ending=ending)
        if not copy:
            before.append(request)


def _kills(fault: Fault) -> bool:
    return fault.breaks is not None and fault.breaks.how.name == "DIE"


class Room:
    """Engines that fail as planned, a balancer, and clients."""

    def __init__(
        self, engines: Mapping[str, FakeEngine], serving: Serving, http: aiohttp.ClientSession
    ) -> None:
        self.engines, self.serving, self._http = engines, serving, http
        self.log = Log()
        self.samples: list[Resources] = []
        self.faults = 0
        self._awaited: dict[bytes, Fault] = {}
        self._reviving: set[asyncio.Task[None]] = set()
        for engine in engines.values():
            engine.on_death = partial(self._die, engine)
            for fault in TROUBLE:
                engine.always(fault, when=partial(self._strikes, fault))

    async def one(self, planned: Planned, marker: str) -> None:
        """One request, from its beginning to its end."""
        question = f"{marker} number {planned.number}."
        if planned.fault is not None:
            self._awaited[question.encode()] = planned.fault
        headers = {"X-Request-ID": planned.id}
        if planned.shape == "batch":
            headers["X-Priority"] = "batch"
        if planned.shape == "embedding":
            body: dict[str, Any] = {"model": MODEL, "input": question}
            path, reference = EMBEDDINGS, str([reference_embedding(question)])
        else:
            path, reference = CHAT, reference_text([{"role": "user", "content": question}], TOKENS)
            body = chat(MODEL, question, stream=planned.shape in ("stream", "leaves"))
        leave_after = planned.leave_after if planned.shape == "leaves" else None
        answer = await ask(
            self._http, self.serving.url, body, path=path, headers=headers, leave_after=leave_after
        )
        self.log.answered(planned, answer, reference)

    def sample(self) -> None:
        """What the balancer holds now."""
        process = psutil.Process(self.serving.started.pid)
        rss, files = process.memory_info().rss / MEBIBYTE, process.num_fds()
        now = asyncio.get_running_loop().time()
        self.samples.append(Resources(at=now, rss_mib=rss, files=files))
        for worker, engine in self.engines.items():
            self.log.worked(worker, engine)

    async def rest(self) -> None:
        """Waits until nothing is under way, and notes what the balancer then counts."""
        counters: dict[str, float] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(REST_SECONDS):
                while not counters or any(counters.values()):
                    counters = await self._counters()
                    await asyncio.sleep(0.1)
        self.log.records.append(AtRest(at=asyncio.get_running_loop().time(), counters=counters))

    async def said(self) -> None:
        """Notes all that the balancer said beside its answers."""
        now = asyncio.get_running_loop().time()
        for page in ("/metrics", "/health"):
            async with self._http.get(self.serving.url + page) as response:
                self.log.records.append(Said(at=now, where=page, text=await response.text()))
        self.log.records.append(Said(at=now, where="log", text=_words(self.serving.started)))

    async def _counters(self) -> dict[str, float]:
        counters = {f"open at {worker}": float(engine.open) for worker, engine in self.engines.items()}
        async with self._http.get(f"{self.serving.url}/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(("balancer_waiting", "balancer_worker_running")):
                    name, _, value = line.rpartition(" ")
                    counters[name] = float(value)
        return counters

    def _strikes(self, fault: Fault, request: Request) -> bool:
        for question, awaited in self._awaited.items():
            if awaited is fault and question in request.raw:
                del self._awaited[question]
                self.faults += 1
                return True
        return False

    def _die(self, engine: FakeEngine) -> None:
        engine.die()
        task = asyncio.get_running_loop().create_task(self._revive(engine))
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)

    async def _revive(self, engine: FakeEngine) -> None:
        await asyncio.sleep(DEAD_SECONDS)
        await engine.listen()


def _words(one: Started) -> str:
    return one.words.read_text(errors="replace")


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The end of a run."""

    row: Row
    samples: Sequence[Resources]
    violations: Sequence[Violation]
    first_failures: Sequence[str]


async def run(minutes: float, seed: int, rate: float, folder: Path) -> Outcomes:
    """Warm-up, load, rest, check. Raises `NotReady`."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        engines = {
            f"w{number}": await stack.enter_async_context(
                FakeEngine(tokens=TOKENS, token_seconds=TOKEN_SECONDS, slots=SLOTS)
            )
            for number in range(WORKERS)
        }
        entries = [entry(number, engine.url, SLOTS) for number, engine in enumerate(engines.values())]
        serving = await stack.enter_async_context(balancer(entries, folder))
        http = await stack.enter_async_context(session())
        marker = f"canary-{seed}"
        await _warm_up(http, serving.url)
        room = Room(engines, serving, http)
        for engine in engines.values():
            engine.requests.clear()
        room.sample()
        begun = loop.time()
        plan = Plan(seed, rate)
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(_keep_sampling(room))
            due, number = begun, 0
            while (due := due + (planned := plan.next()).pause) < begun + 60 * minutes:
                await asyncio.sleep(due - loop.time())
                group.create_task(room.one(planned, marker))
                number += 1
            sampling.cancel()
        await room.rest()
        room.sample()
        await room.said()
        for worker, engine in engines.items():
            room.log.worked(worker, engine, all_of_them=True)
    log = room.log.told()
    for sample in (room.samples[0], room.samples[-1]):
        log.append(sample)
    bounds = Bounds(
        slots=dict.fromkeys(engines, SLOTS),
        secrets=(marker,),
        rss_growth_mib=16.0 + minutes / 60,
        files_growth=2 * WORKERS * SLOTS,
    )
    found = violations(log, bounds)
    failures = [
        f"{record.request}: {record.outcome.value} {record.detail}"
        for record in log
        if isinstance(record, Finished) and record.outcome in (Outcome.ERROR, Outcome.BROKEN)
    ]
    return Outcomes(_row(room, number, seed, found), room.samples, found, failures[:10])


async def _warm_up(http: aiohttp.ClientSession, url: str) -> None:
    turns = iter(range(WARM_UP))

    async def work() -> None:
        for turn in turns:
            await ask(http, url, chat(MODEL, f"warm {turn}", stream=False, max_tokens=2))

    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS * SLOTS):
            group.create_task(work())


async def _keep_sampling(room: Room) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        room.sample()


def _row(room: Room, requests: int, seed: int, found: Sequence[Violation]) -> Row:
    first, last = room.samples[0], room.samples[-1]
    return {
        "seed": str(seed),
        "requests": requests,
        "faults": room.faults,
        **{outcome.value: room.log.outcomes[outcome.value] for outcome in Outcome},
        "rss_first_mb": first.rss_mib,
        "rss_last_mb": last.rss_mib,
        "rss_mb_per_hour": slope(
            [(sample.at, sample.rss_mib) for sample in room.samples if sample.rss_mib is not None]
        ),
        "files_first": first.files,
        "files_last": last.files,
        "violations": len(found),
    }


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the line of least squares, for an hour; None for fewer than two points."""
    if len(points) < 2:
        return None
    mean_at = sum(at for at, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((at - mean_at) ** 2 for at, _ in points)
    return 3600 * sum((at - mean_at) * (value - mean) for at, value in points) / spread if spread else None


COLUMNS = (
    Column("seed", "seed"),
    Column("requests", "requests"),
    Column("faults", "faults"),
    *(Column(outcome.value, outcome.value) for outcome in Outcome),
    Column("rss_first_mb", "RSS MiB first", 1),
    Column("rss_last_mb", "last", 1),
    Column("rss_mb_per_hour", "MiB/h", 1),
    Column("files_first", "files first"),
    Column("files_last", "last"),
    Column("violations", "violations"),
)


async def _until_terminated(minutes: float, seed: int, rate: float) -> Outcomes:
    """SIGTERM ends it as Ctrl-C does: in order, so that no process of ours is left."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        return await run(minutes, seed, rate, Path(folder))


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where an invariant was violated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=TITLE + ".")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="the same load again; otherwise one is drawn")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--json", type=Path, default=RESULTS / "soak.json", help="where the rows go")
    options = parser.parse_args(arguments)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    try:
        outcomes = asyncio.run(_until_terminated(options.minutes, seed, options.rate))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("interrupted: all processes are ended, no results were written") from None
    except NotReady as error:
        raise SystemExit(f"the balancer: {error}") from None
    about = machine() | {"minutes": options.minutes, "rate": options.rate}
    write(options.json, TITLE, [outcomes.row, *map(_sample_row, outcomes.samples)], about)
    show(listing(TITLE, COLUMNS, [outcomes.row]), about)
    for failure in outcomes.first_failures:
        print(failure)
    for violation in outcomes.violations[:50]:
        print(violation)
    if outcomes.violations:
        raise SystemExit(1)


def _sample_row(sample: Resources) -> Row:
    return {"at_s": sample.at, "rss_mb": sample.rss_mib, "files": sample.files}


if __name__ == "__main__":
    main()
