"""What the balancer adds to a request, on this machine.

`uv run python -m benchmarks.overhead [--quick] [--json FILE]`

The same load goes to the same cheap mock worker in two ways, in turns, so that whatever else happens on
the machine happens to both: `direct`, and through a `balancer` that runs as its users run it. The
balancer has a core of its own where the system lets one choose; mock and load share another. CPU time is
the kernel's account of the balancer's process, the figure that least depends on the neighbours.

CPU time is counted in ticks of 10 ms: a round must burn some hundred of them, so a figure from `--quick`
is good for about 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import psutil

from benchmarks.load import Load
from benchmarks.mock_worker import MODEL
from benchmarks.tables import RESULTS, Column, Row, machine, publish

SERVE = (sys.executable, "-m", "balancer", "serve")
READY_SECONDS = 30.0
SETTLE_SECONDS = 1.0  # after "ready", before memory is read: imports and first probes are through
POLL_SECONDS = 0.05
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long it is measured. Figures are medians over the rounds, latencies those of all rounds."""

    rounds: int
    flood_seconds: float
    rate_seconds: float
    streams_each: int
    """Streams one after the other on each of `STREAMS` connections, 1.3 s each."""


FULL = Effort(rounds=7, flood_seconds=4.0, rate_seconds=5.0, streams_each=4)
QUICK = Effort(rounds=2, flood_seconds=2.0, rate_seconds=3.0, streams_each=2)
"""Ends within a minute."""

CONNECTIONS = 16
RATE = 50.0  # requests a second: a busy room of people, nearly idle for the balancer
STREAMS = 100

COLUMNS = (
    Column("subject", "way"),
    Column("requests_per_second", f"requests/s, {CONNECTIONS} connections"),
    Column("core_percent", "its core busy, %"),
    Column("cpu_us_per_request", "CPU us/request", 1),
    Column("p50_ms", f"p50 ms at {RATE:.0f}/s", 2),
    Column("added_p50_ms", "added p50 ms", 2),
    Column("added_p99_ms", "added p99 ms", 2),
    Column("cpu_us_per_event", f"CPU us/streamed chunk, {STREAMS} streams", 1),
    Column("rss_idle_mib", "RSS MiB idle", 1),
    Column("rss_after_mib", "RSS MiB after", 1),
)


@dataclass(slots=True, kw_only=True)
class Subject:
    """One way to the mock, and what was measured on it, a figure a round."""

    name: str
    url: str
    process: psutil.Process | None = None
    """What stands in the way; None: nothing does."""
    rss_idle_mib: float | None = None
    requests_per_second: list[float] = field(default_factory=list)
    core_percent: list[float] = field(default_factory=list)
    cpu_us_per_request: list[float] = field(default_factory=list)
    cpu_us_per_event: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """User and system time so far, of child processes too; 0 where nothing stands in the way."""
        if self.process is None:
            return 0.0
        family = [self.process, *self.process.children(recursive=True)]
        return float(sum(times.user + times.system for times in (one.cpu_times() for one in family)))

    def rss_mib(self) -> float | None:
        return None if self.process is None else float(self.process.memory_info().rss) / MEBIBYTE


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where; None: the system does not let one choose, or there is one core only."""

    subject: int | None
    others: int | None

    @classmethod
    def of_this_machine(cls) -> Cores:
        if sys.platform != "linux":
            return cls(None, None)
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1]) if len(allowed) > 1 else cls(None, None)


def _pin(pid: int, core: int | None) -> None:
    if core is not None and sys.platform == "linux":
        os.sched_setaffinity(pid, {core})


@asynccontextmanager
async def _process(
    arguments: Sequence[str], core: int | None, words: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process on that core, ended when the block is left: politely, and after 5 s for certain.

    What it says goes to the file `words`; without one, its stdout is a pipe, its stderr ours.
    """
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE if words is None else words, stderr=words
    )
    try:
        _pin(process.pid, core)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 5.0)
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def mock_worker(core: int | None) -> AsyncIterator[int]:
    """A mock worker; gives its port."""
    async with _process((sys.executable, "-m", "benchmarks.mock_worker"), core) as process:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), READY_SECONDS)
        if not line:
            raise SystemExit("the mock worker did not start")
        yield int(line)


@asynccontextmanager
async def balancer(worker_port: int, core: int | None) -> AsyncIterator[Subject]:
    """A balancer in front of that worker, ready. Raises SystemExit with its last words where it is not."""
    worker = {
        "id": "mock",
        "host": "127.0.0.1",
        "port": worker_port,
        "type": "openai",
        "model": MODEL,
        "max_concurrent_requests": 256,
    }
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        config = Path(folder) / "balancer.json"
        config.write_bytes(orjson.dumps({"workers": [worker]}))
        arguments = (*SERVE, "--config", str(config), "--port", str(port), "--no-mdns")
        async with _process(arguments, core, words.fileno()) as process:
            subject = Subject(
                name="balancer", url=f"http://127.0.0.1:{port}", process=psutil.Process(process.pid)
            )
            if not await _ready(process, subject.url):
                words.seek(0)
                raise SystemExit(
                    f"the balancer did not get ready:\n{words.read()[-2000:].decode(errors='replace')}"
                )
            await asyncio.sleep(SETTLE_SECONDS)
            subject.rss_idle_mib = subject.rss_mib()
            yield subject


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


async def _ready(process: asyncio.subprocess.Process, url: str) -> bool:
    """Waits until it says that it is ready. False: it ended, or did not say so in `READY_SECONDS`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS), aiohttp.ClientSession() as http:
            while process.returncode is None:
                with suppress(aiohttp.ClientConnectionError):
                    async with http.get(f"{url}/readyz") as response:
                        if response.status == 200:
                            return True
                await asyncio.sleep(POLL_SECONDS)
    return False


async def load(url: str, core: int | None, *shape: str) -> Load:
    """One load, from a process of its own. Raises SystemExit where an answer was wrong."""
    async with _process((sys.executable, "-m", "benchmarks.load", url, *shape), core) as process:
        said, _ = await process.communicate()
        if process.returncode:
            raise SystemExit(f"the load on {url} ended with an error, so there are no figures")
        return Load(**orjson.loads(said))


async def _round(subject: Subject, effort: Effort, core: int | None) -> None:
    """Each of the three shapes once. CPU of a shape is that of all its requests, connecting included."""
    before = subject.cpu_seconds()
    flooded = await load(
        subject.url, core, "flood", f"--connections={CONNECTIONS}", f"--seconds={effort.flood_seconds}"
    )
    burnt = subject.cpu_seconds() - before
    subject.requests_per_second.append(flooded.requests / flooded.seconds)
    subject.core_percent.append(100 * burnt / flooded.seconds)
    subject.cpu_us_per_request.append(1e6 * burnt / flooded.requests)

    rated = await load(subject.url, core, "rate", f"--per-second={RATE}", f"--seconds={effort.rate_seconds}")
    subject.latencies_ms += rated.latencies_ms

    before = subject.cpu_seconds()
    streamed = await load(
        subject.url, core, "streams", f"--at-once={STREAMS}", f"--each={effort.streams_each}"
    )
    subject.cpu_us_per_event.append(1e6 * (subject.cpu_seconds() - before) / streamed.events)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def row(subject: Subject, direct: Subject) -> Row:
    """The figures of a subject; what it adds is counted from the way without it."""
    p50, p99 = (_percentile(subject.latencies_ms, percent) for percent in (50, 99))
    figures: dict[str, str | float | None] = {
        "subject": subject.name,
        "requests_per_second": statistics.median(subject.requests_per_second),
        "p50_ms": p50,
        "p99_ms": p99,
    }
    if subject.process is not None:
        figures |= {
            "core_percent": statistics.median(subject.core_percent),
            "cpu_us_per_request": statistics.median(subject.cpu_us_per_request),
            "added_p50_ms": p50 - _percentile(direct.latencies_ms, 50),
            "added_p99_ms": p99 - _percentile(direct.latencies_ms, 99),
            "cpu_us_per_event": statistics.median(subject.cpu_us_per_event),
            "rss_idle_mib": subject.rss_idle_mib,
            "rss_after_mib": subject.rss_mib(),
        }
    return figures


async def measure(effort: Effort) -> list[Row]:
    """The rows, `direct` first."""
    cores = Cores.of_this_machine()
    async with AsyncExitStack() as stack:
        worker_port = await stack.enter_async_context(mock_worker(cores.others))
        direct = Subject(name="direct", url=f"http://127.0.0.1:{worker_port}")
        subjects = [direct, await stack.enter_async_context(balancer(worker_port, cores.subject))]
        for number in range(effort.rounds):
            print(f"round {number + 1} of {effort.rounds}", file=sys.stderr)
            for subject in subjects:
                await _round(subject, effort, cores.others)
            subjects.reverse()  # nobody is always first
        return [row(subject, direct) for subject in sorted(subjects, key=lambda one: one is not direct)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="What the balancer adds to a request, on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="a rough answer within a minute")
    parser.add_argument("--json", type=Path, default=RESULTS / "overhead.json", help="where the rows go")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    about = machine() | {
        "rounds": effort.rounds,
        "pinned": "yes" if Cores.of_this_machine().subject is not None else "no",
    }
    publish(options.json, "What the balancer adds", COLUMNS, asyncio.run(measure(effort)), about)


if __name__ == "__main__":
    main()
