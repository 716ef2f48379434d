"""What stands between a client and a worker costs: ours, and that of others, on this machine.

`python -m benchmarks.overhead [--quick] [--only NAME ...] [--workers N ...] [--json FILE]`
`python -m benchmarks.overhead --install` gets the others into a cache folder of this user

The same load goes to the same cheap mock workers in several ways, in turns, so that whatever else happens on
the machine happens to all: `direct`, through a `balancer` that runs as its users run it with its whole
policy, through a balancer and an agent, and through every other proxy that is installed. What stands in the
way has a core of its own where the system lets one choose, all of its processes together; mocks and load
share another. CPU time is the kernel's account of those processes, the figure that least depends on the
neighbours; with an agent it is that of both.

CPU time is counted in ticks of 10 ms: a round must burn some hundred of them, so a figure from `--quick`
is good for about 5 %. `--workers 4 400` measures only ours, with so many workers: what a request costs must
not grow with the room.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from balancer.settings import Settings
from benchmarks import rivals
from benchmarks.load import Load
from benchmarks.mock_worker import MODEL
from benchmarks.processes import Cores, NotReady, Started, free_ports, started
from benchmarks.rooms.listing import listing, show, write
from benchmarks.static_agent import KEY, agent_id
from benchmarks.tables import RESULTS, Column, Row, machine

TITLE = "What stands in the way costs"
SERVE = (sys.executable, "-m", "balancer", "serve")
READY_SECONDS = 60.0
SETTLE_SECONDS = 2.0  # after "ready", before memory is read: imports and first probes are through
WORKERS = 4
OPEN_FILES = 16_384


class LoadFailed(Exception):
    """An answer was wrong or did not come: there are no figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long it is measured. Figures are medians over the rounds, latencies those of all rounds."""

    rounds: int
    flood_seconds: float
    rate_seconds: float
    streams_each: int
    """Streams one after the other on each of `STREAMS` connections, 1.3 s each."""
    held: int
    """Streams that are open at once when memory is read, once for each subject."""


FULL = Effort(rounds=7, flood_seconds=4.0, rate_seconds=5.0, streams_each=4, held=1000)
QUICK = Effort(rounds=2, flood_seconds=2.0, rate_seconds=3.0, streams_each=2, held=1000)
"""Ends within a minute for `direct` and `balancer`."""

CONNECTIONS = 16
RATE = 50.0  # requests a second: a busy room of people, nearly idle for the balancer
STREAMS = 100

COLUMNS = (
    Column("target", "way"),
    Column("requests_per_s", "requests/s"),
    Column("core_percent", "core, %"),
    Column("cpu_us_per_request", "us/request", 1),
    Column("cpu_us_per_chunk", "us/chunk", 1),
    Column("added_p50_ms", "added p50 ms", 2),
    Column("added_p99_ms", "p99 ms", 2),
    Column("rss_idle_mb", "RSS MiB", 1),
    Column("rss_1000_mb", "with 1000 streams", 1),
)


@dataclass(slots=True, kw_only=True)
class Subject:
    """One way to the mocks, and what was measured on it, a figure a round."""

    target: str
    url: str
    started: Sequence[Started] = ()
    """What stands in the way; empty: nothing does."""
    version: str = ""
    rss_idle_mb: float | None = None
    rss_1000_mb: float | None = None
    requests_per_s: list[float] = field(default_factory=list)
    core_percent: list[float] = field(default_factory=list)
    cpu_us_per_request: list[float] = field(default_factory=list)
    cpu_us_per_chunk: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        return sum(one.cpu_seconds() for one in self.started)

    def rss_mb(self) -> float | None:
        """In MiB."""
        return sum(one.rss_mib() for one in self.started) if self.started else None


@dataclass(frozen=True, slots=True)
class Stage:
    """What every subject is given."""

    workers: Sequence[int]
    """Ports of the mocks."""
    cores: Cores
    folder: Path

    def own(self, name: str) -> Path:
        """A folder for one subject."""
        path = self.folder / "".join(c if c.isalnum() else "-" for c in name)
        path.mkdir()
        return path


Way = Callable[[Stage], AbstractAsyncContextManager[Subject]]
"""Starts a subject, ready. Raises `NotReady` or `NotInstalled`."""

# The ways ...


@asynccontextmanager
async def mock_workers(count: int, cores: Cores, folder: Path) -> AsyncIterator[list[int]]:
    """So many mock workers in one process; gives their ports."""
    arguments = (sys.executable, "-m", "benchmarks.mock_worker", "--ports", str(count))
    async with _saying_its_ports(arguments, folder / "mock.log", cores.others) as (_, ports):
        yield ports


@asynccontextmanager
async def _saying_its_ports(
    arguments: Sequence[str], words: Path, core: int | None
) -> AsyncIterator[tuple[Started, list[int]]]:
    async with started(arguments, words, core=core, stdout=asyncio.subprocess.PIPE) as one:
        assert one.process.stdout
        line = await asyncio.wait_for(one.process.stdout.readline(), READY_SECONDS)
        if not line:
            raise NotReady(f"{arguments[2]} ended: {one.last_words()}")
        yield one, [int(port) for port in line.split()]


@asynccontextmanager
async def direct(stage: Stage) -> AsyncIterator[Subject]:
    """Nothing in the way."""
    yield Subject(target="direct", url=f"http://127.0.0.1:{stage.workers[0]}")


def balancer(target: str, *, hot_path: bool = True, agents: bool = False) -> Way:
    """Ours, with its defaults; with `agents`, each mock is the engine of one."""

    @asynccontextmanager
    async def way(stage: Stage) -> AsyncIterator[Subject]:
        folder = stage.own(target)
        async with AsyncExitStack() as stack:
            stands: list[Started] = []
            entries = [
                {
                    "id": f"mock-{number}",
                    "host": "127.0.0.1",
                    "port": port,
                    "type": "openai",
                    "model": MODEL,
                    "max_concurrent_requests": 256,
                }
                for number, port in enumerate(stage.workers)
            ]
            if agents:
                engines = [word for port in stage.workers for word in ("--engine", str(port))]
                agent, ports = await stack.enter_async_context(
                    _saying_its_ports(
                        (sys.executable, "-m", "benchmarks.static_agent", *engines),
                        folder / "agent.log",
                        stage.cores.subject,
                    )
                )
                stands.append(agent)
                entries = [
                    {"id": agent_id(number), "host": "127.0.0.1", "port": port, "type": "agent"}
                    for number, port in enumerate(ports)
                ]
            (folder / "balancer.json").write_bytes(orjson.dumps({"workers": entries}))
            (port,) = free_ports(1)
            one = await stack.enter_async_context(
                started(
                    (
                        *(*SERVE, "--config", str(folder / "balancer.json"), "--host", "127.0.0.1"),
                        *("--port", str(port), "--no-mdns", "--data-dir", str(folder / "data")),
                    ),
                    folder / "balancer.log",
                    core=stage.cores.subject,
                    environment={"BALANCER_CLUSTER_KEY": KEY}
                    | ({"BALANCER_HOT_PATH": str(hot_path).lower()} if HAS_HOT_PATH else {}),
                )
            )
            url = f"http://127.0.0.1:{port}"
            await one.ready(lambda: _knows(url, len(entries)), READY_SECONDS)
            yield await _settled(Subject(target=target, url=url, started=(one, *stands)))

    return way


HAS_HOT_PATH = "hot_path" in Settings.model_fields


def rival(one: rivals.Rival) -> Way:
    """One of the others."""

    @asynccontextmanager
    async def way(stage: Stage) -> AsyncIterator[Subject]:
        program = rivals.program_of(one)
        port, spare = free_ports(2)
        place = rivals.Place(
            program=program,
            port=port,
            spare_port=spare,
            workers=stage.workers,
            folder=stage.own(one.name),
        )
        launch = one.launch(place)
        async with (
            started(
                launch.argv,
                place.folder / "words.log",
                core=stage.cores.subject,
                environment=launch.environment,
            ) as process,
            rivals.beside(launch),
        ):
            url = f"http://127.0.0.1:{port}"
            await process.ready(lambda: _answers(url), one.ready_seconds)
            subject = Subject(target=one.name, url=url, started=(process,), version=rivals.version(one))
            yield await _settled(subject)

    return way


async def _settled(subject: Subject) -> Subject:
    await asyncio.sleep(SETTLE_SECONDS)
    subject.rss_idle_mb = subject.rss_mb()
    return subject


async def _knows(url: str, workers: int) -> bool:
    """Our balancer knows so many workers that can generate."""
    with suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession() as http, http.get(f"{url}/readyz") as response:
            known = await response.json()
            return bool(known["workers_ready"] >= workers)
    return False


async def _answers(url: str) -> bool:
    """A request goes through to a mock and back, in one piece and as a stream."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    timeout = aiohttp.ClientTimeout(total=5.0)
    with suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession(timeout=timeout) as http:
            for stream in (False, True):
                async with http.post(
                    f"{url}/v1/chat/completions", json=asked | {"stream": stream}
                ) as response:
                    if response.status != 200 or b" word" not in await response.read():
                        return False
            return True
    return False


def ways() -> dict[str, Way]:
    """All that can be measured, by name."""
    ours = {"balancer": balancer("balancer")}
    if HAS_HOT_PATH:
        name = "balancer (aiohttp front)"
        ours[name] = balancer(name, hot_path=False)
    ours["balancer + agent"] = balancer("balancer + agent", agents=True)
    return {"direct": direct} | ours | {one.name: rival(one) for one in rivals.RIVALS}


# Measuring ...


async def load(url: str, cores: Cores, *shape: str) -> Load:
    """One load, from a process of its own. Raises `LoadFailed` where an answer was wrong."""
    with tempfile.NamedTemporaryFile(prefix="load-") as words:
        arguments = (sys.executable, "-m", "benchmarks.load", url, *shape)
        async with started(
            arguments, Path(words.name), core=cores.others, stdout=asyncio.subprocess.PIPE
        ) as one:
            said, _ = await one.process.communicate()
            if one.process.returncode:
                raise LoadFailed(f"{shape[0]}: {_last_line(one)}")
            return Load(**orjson.loads(said))


def _last_line(one: Started) -> str:
    return one.last_words().strip().rpartition("\n")[2][:300]


async def _round(subject: Subject, effort: Effort, cores: Cores) -> None:
    """Each of the three shapes once. CPU of a shape is that of all its requests, connecting included."""
    before = subject.cpu_seconds()
    flooded = await load(
        subject.url, cores, "flood", f"--connections={CONNECTIONS}", f"--seconds={effort.flood_seconds}"
    )
    burnt = subject.cpu_seconds() - before
    subject.requests_per_s.append(flooded.requests / flooded.seconds)
    subject.core_percent.append(100 * burnt / flooded.seconds)
    subject.cpu_us_per_request.append(1e6 * burnt / flooded.requests)

    rated = await load(subject.url, cores, "rate", f"--per-second={RATE}", f"--seconds={effort.rate_seconds}")
    subject.latencies_ms += rated.latencies_ms

    before = subject.cpu_seconds()
    streamed = await load(
        subject.url, cores, "streams", f"--at-once={STREAMS}", f"--each={effort.streams_each}"
    )
    subject.cpu_us_per_chunk.append(1e6 * (subject.cpu_seconds() - before) / streamed.events)


async def _memory(subject: Subject, effort: Effort, cores: Cores) -> None:
    """With so many streams open. Raises `LoadFailed`."""
    if not subject.started:
        return
    with tempfile.NamedTemporaryFile(prefix="load-") as words:
        arguments = (sys.executable, "-m", "benchmarks.load", subject.url, "hold", f"--at-once={effort.held}")
        async with started(
            arguments, Path(words.name), core=cores.others, stdout=asyncio.subprocess.PIPE
        ) as one:
            assert one.process.stdout
            if not await one.process.stdout.readline():
                raise LoadFailed(f"hold: {_last_line(one)}")
            subject.rss_1000_mb = subject.rss_mb()


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def row(subject: Subject, direct: Subject) -> Row:
    """The figures of a subject; what it adds is counted from the way without it."""
    p50, p99 = (_percentile(subject.latencies_ms, percent) for percent in (50, 99))
    figures: dict[str, str | float | None] = {column.key: None for column in COLUMNS} | {
        "target": subject.target,
        "version": subject.version or None,
        "requests_per_s": statistics.median(subject.requests_per_s),
        "p50_ms": p50,
        "p99_ms": p99,
    }
    if subject.started:
        figures |= {
            "core_percent": statistics.median(subject.core_percent),
            "cpu_us_per_request": statistics.median(subject.cpu_us_per_request),
            "cpu_us_per_chunk": statistics.median(subject.cpu_us_per_chunk),
            "added_p50_ms": p50 - _percentile(direct.latencies_ms, 50),
            "added_p99_ms": p99 - _percentile(direct.latencies_ms, 99),
            "rss_idle_mb": subject.rss_idle_mb,
            "rss_1000_mb": subject.rss_1000_mb,
        }
    return figures


@dataclass(slots=True)
class Outcome:
    """The rows, `direct` first, and why others are missing."""

    rows: list[Row]
    left_out: dict[str, str]


async def measure(effort: Effort, chosen: dict[str, Way], workers: int) -> Outcome:
    """Raises SystemExit where `direct` cannot be measured."""
    cores = Cores.of_this_machine()
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="overhead-", ignore_cleanup_errors=True) as folder:
        async with AsyncExitStack() as stack:
            ports = await stack.enter_async_context(mock_workers(workers, cores, Path(folder)))
            stage = Stage(ports, cores, Path(folder))
            subjects: list[Subject] = []
            for name, way in chosen.items():
                try:
                    subjects.append(await stack.enter_async_context(way(stage)))
                except (NotReady, rivals.NotInstalled) as error:
                    _leave_out(left_out, name, error)
            first, order = subjects[0], list(subjects)
            await _rounds(subjects, left_out, effort, cores)
            if first not in subjects:
                raise SystemExit(f"the mock itself could not be measured: {left_out[first.target]}")
            return Outcome([row(one, first) for one in order if one in subjects], left_out)


async def _rounds(subjects: list[Subject], left_out: dict[str, str], effort: Effort, cores: Cores) -> None:
    """Whoever fails is removed from the subjects."""
    for number in range(effort.rounds):
        print(f"round {number + 1} of {effort.rounds}", file=sys.stderr)
        for subject in tuple(subjects):
            try:
                await _round(subject, effort, cores)
            except LoadFailed as error:
                subjects.remove(subject)
                _leave_out(left_out, subject.target, error)
        subjects.reverse()  # nobody is always first
    for subject in subjects:
        try:
            await _memory(subject, effort, cores)
        except LoadFailed as error:
            _leave_out(left_out, f"{effort.held} streams through {subject.target}", error)


def _leave_out(left_out: dict[str, str], name: str, error: Exception) -> None:
    left_out[name] = str(error)
    print(f"{name} is left out: {error}", file=sys.stderr)


async def growth(effort: Effort, counts: Sequence[int]) -> Outcome:
    """Ours with so many workers each time."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for count in counts:
        name = f"balancer, {count} workers"
        outcome = await measure(effort, {"direct": direct, name: balancer(name)}, count)
        rows += outcome.rows[1:]
        left_out |= outcome.left_out
    return Outcome(rows, left_out)


def _allow_open_files() -> None:
    """Every stream is two of them for a proxy; what we start inherits the limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _until_terminated(measuring: Callable[[], Awaitable[Outcome]]) -> Outcome:
    """SIGTERM ends it as Ctrl-C does: in order, so that no process of ours is left."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measuring()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="What stands between a client and a worker costs: ours and others', on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="a rough answer")
    parser.add_argument("--install", action="store_true", help="get the others, and measure nothing")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"beside direct, of: {', '.join(list(ways())[1:])}"
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, metavar="N", help="only ours, with so many workers each time"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "overhead.json", help="where the rows go")
    return parser


def _chosen(only: Sequence[str] | None) -> dict[str, Way]:
    """Raises SystemExit for a name that nobody has."""
    all_of_them = ways()
    for name in only or ():
        if name not in all_of_them:
            raise SystemExit(f"there is no {name!r}; there are: {', '.join(all_of_them)}")
    return {
        name: way for name, way in all_of_them.items() if only is None or name in only or name == "direct"
    }


def _install() -> None:
    for one in rivals.RIVALS:
        try:
            rivals.install(one)
            print(f"{one.name} {rivals.version(one)}")
        except rivals.NotInstalled as error:
            print(f"{one.name}: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.install:
        _install()
        return
    _allow_open_files()
    effort = QUICK if options.quick else FULL
    chosen = _chosen(options.only)
    try:
        outcome = asyncio.run(
            _until_terminated(
                lambda: (
                    growth(effort, options.workers) if options.workers else measure(effort, chosen, WORKERS)
                )
            )
        )
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("interrupted: all processes are ended, no results were written") from None
    about = machine() | {
        "rounds": effort.rounds,
        "pinned": "yes" if Cores.of_this_machine().subject is not None else "no",
        "hot_path": "yes" if HAS_HOT_PATH else "there is none yet",
    }
    about |= {f"left out: {name}": reason for name, reason in outcome.left_out.items()}
    write(options.json, TITLE, outcome.rows, about)
    show(listing(TITLE, COLUMNS, outcome.rows), about)


if __name__ == "__main__":
    main()
