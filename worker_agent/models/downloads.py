"""The downloads of an agent: each in a process of its own behind the guard, told in the reports."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from worker_agent.models.catalog import Catalog
from worker_agent.models.local import Format
from worker_agent.models.names import BadName, model_name, name_for, repository, revision
from worker_agent.process import allowed_environment, running
from worker_agent.wire import Download, DownloadState, ModelOrder

DEFAULT_ENDPOINT = "https://huggingface.co"
MOST_TOLD = 16
"""Of `wire.Report`."""
_PACE_SECONDS = 10.0
_LONGEST_DETAIL = 400
_MOST_BYTES = 2**53
_GIB = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPolicy:
    """How models are fetched."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)
    """The hub's; it goes to `endpoint` and nowhere else."""
    formats: tuple[Format, ...] = (Format.GGUF,)
    """What the engines here read, best first (`choice.preferred_format`)."""
    limit_bytes: int | None = None
    """What weights may take here, where no file is named; None: anything."""
    margin_bytes: int = _GIB
    """Of the disk, what is left to others."""
    retry_seconds: float = 1.0
    """Before the second try; twice as long before each further one."""
    at_once: int = 1
    most_waiting: int = 8
    told_seconds: float = 600.0
    """How long one that has ended is still told."""


class DownloadRefused(Exception):
    """It is not begun; `code` is for programs, the sentence says what to do."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def hub_token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The hub's token: from the file, else HF_TOKEN, else what `hf auth login` has kept.

    Blocking. Raises `DownloadRefused` where a file was named and cannot be read.
    """
    if file is not None:
        try:
            return file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise DownloadRefused("no_token", f"the hub's token cannot be read: {error}") from None
    if given := environment.get("HF_TOKEN", "").strip():
        return given
    if environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() in ("1", "true", "yes", "on"):
        return None
    kept = environment.get("HF_TOKEN_PATH") or os.path.join(_hf_home(environment), "token")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(kept).expanduser().read_text().strip() or None
    return None


def _hf_home(environment: Mapping[str, str]) -> str:
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return environment.get("HF_HOME") or os.path.join(cache, "huggingface")


def hub_endpoint(environment: Mapping[str, str]) -> str:
    """The hub that HF_ENDPOINT names, else the public one."""
    return environment.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


class _Job:
    """One download, from the order until it is told no more."""

    def __init__(self, order: ModelOrder, repo: str, name: str) -> None:
        self.order = order
        self.repo = repo
        self.name = name
        self.state = DownloadState.DOWNLOADING
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.detail = ""
        self.note = ""
        self.ended_at: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self._why: list[str] = []
        self._paces: deque[tuple[float, int]] = deque()

    def hear(self, line: str, now: float) -> None:
        """A line of the process; what is none of ours is passed over."""
        try:
            said = orjson.loads(line)
        except orjson.JSONDecodeError:
            return
        if not isinstance(said, dict):
            return
        if (total := _count(said.get("total"))) is not None:
            self.total_bytes = total
        if (done := _count(said.get("done"))) is not None:
            self._came(done, now)
        if said.get("verifying") is True:
            self.state = DownloadState.VERIFYING
        if isinstance(why := said.get("failed"), str):
            self._why.append(why)
        self.note = _printable(str(said.get("note", "")))

    def _came(self, done: int, now: float) -> None:
        self.done_bytes = done
        self._paces.append((now, done))
        while now - self._paces[0][0] > _PACE_SECONDS:
            self._paces.popleft()

    def end(self, state: DownloadState, detail: str, now: float) -> None:
        self.state, self.detail, self.note, self.ended_at = state, _printable(detail), "", now

    def why(self, code: int) -> str:
        """Why the process ended so."""
        return (
            "".join(self._why)
            or f"the process that downloads ended with code {code}: start it again to go on"
        )

    def told(self, waits: bool) -> Download:
        return Download(
            repo=self.repo,
            name=self.name,
            state=self.state,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            eta_seconds=self._eta() if self.state is DownloadState.DOWNLOADING else None,
            detail="waits for another download to end" if waits else self.detail or self.note,
        )

    def _eta(self) -> float | None:
        if self.total_bytes is None or len(self._paces) < 2:
            return None
        (since, first), (until, last) = self._paces[0], self._paces[-1]
        if until <= since or last <= first:
            return None
        return min((self.total_bytes - last) * (until - since) / (last - first), 1e6)


def _count(value: object) -> int | None:
    """Bytes, as a report may hold them; None: it is none, or a hub claims more than there is."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_BYTES
    return int(value) if is_one else None  # type: ignore[call-overload]


def _printable(sentence: str) -> str:
    """As a report may hold it."""
    return "".join(letter if letter.isprintable() else "?" for letter in sentence[:_LONGEST_DETAIL])


class Downloads:
    """Fetches models into the catalog's folder."""

    def __init__(self, catalog: Catalog, policy: DownloadPolicy, on_change: Callable[[], None]) -> None:
        self._catalog = catalog
        self._policy = policy
        self._on_change = on_change
        self._turns = asyncio.Semaphore(policy.at_once)
        self._open = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: list[_Job] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Downloads happen while the block lasts; those that are under way at its end go on at the next
        `start`, from where they were."""
        self._open = True
        try:
            yield
        finally:
            self._open = False
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def start(self, order: ModelOrder) -> Download:
        """Begins a download, or tells of the same one that is under way. Raises `DownloadRefused`."""
        repo, name = self._names(order)
        under_way = [job for job in self._jobs if job.ended_at is None]
        for job in under_way:
            if job.name.casefold() == name.casefold() and not job.cancelled:
                if (job.repo, job.order.revision, job.order.file) == (repo, order.revision, order.file):
                    return self._told(job)
                raise DownloadRefused("name_taken", f"{name} is being downloaded from {job.repo} already")
        if not self._open:
            raise DownloadRefused("stopping", "this agent is stopping")
        if self._catalog.has(name):
            raise DownloadRefused(
                "model_exists", f"{name} is here already: delete it first, or give another name"
            )
        if len(under_way) >= self._policy.at_once + self._policy.most_waiting:
            raise DownloadRefused(
                "too_many_downloads",
                f"{len(under_way)} downloads wait or run already: try again when one has ended",
            )
        job = _Job(order, repo, name)
        leaving = [old.task for old in under_way if old.name == name and old.task is not None]
        self._jobs = [old for old in self._jobs if old.name != name]
        self._jobs.append(job)
        # Awaited by `running`. Not in a task group: what goes wrong with a download ends nothing else.
        job.task = asyncio.get_running_loop().create_task(self._perform(job, leaving))
        self._tasks.add(job.task)
        job.task.add_done_callback(lambda task: self._ended(job, task))
        self._on_change()
        return self._told(job)

    def cancel(self, name: str) -> bool:
        """Ends the download of that name, keeping what has come for a later `start`; False: there is none."""
        for job in self._jobs:
            if job.ended_at is None and name in (job.name, job.repo) and job.task is not None:
                job.cancelled = True
                job.task.cancel()
                return True
        return False

    def told(self) -> tuple[Download, ...]:
        """Those under way and those that ended lately, in the order of their starts; at most MOST_TOLD."""
        now = time.monotonic()
        self._jobs = [
            job
            for job in self._jobs
            if job.ended_at is None or now - job.ended_at < self._policy.told_seconds
        ]
        while len(self._jobs) > MOST_TOLD:
            oldest = next((job for job in self._jobs if job.ended_at is not None), self._jobs[-1])
            self._jobs.remove(oldest)
        return tuple(self._told(job) for job in self._jobs)

    def _told(self, job: _Job) -> Download:
        before = [other for other in self._jobs[: self._jobs.index(job)] if other.ended_at is None]
        return job.told(waits=job.ended_at is None and len(before) >= self._policy.at_once)

    def _names(self, order: ModelOrder) -> tuple[str, str]:
        try:
            repo = repository(order.repo if order.repo is not None else order.name)
            if order.revision is not None:
                revision(order.revision)
            # Of `org/model` the second part; of an order that names both, the name.
            is_named = order.repo is not None and order.name != order.repo
            return repo, model_name(order.name) if is_named else name_for(repo)
        except BadName as error:
            raise DownloadRefused("bad_name", str(error)) from None

    async def _perform(self, job: _Job, leaving: list[asyncio.Task[None]]) -> None:
        """The job's whole life, once those are gone that were cancelled and still hold its files."""
        try:
            if leaving:
                await asyncio.wait(leaving)
            async with self._turns:
                log.info("downloading %s as %s", job.repo, job.name)
                code = await self._run(job)
        except OSError as error:
            self._end(job, DownloadState.FAILED, f"its process cannot be started: {error.strerror}")
        else:
            state = DownloadState.DONE if code == 0 else DownloadState.FAILED
            self._end(job, state, "" if code == 0 else job.why(code))

    def _ended(self, job: _Job, task: asyncio.Task[None]) -> None:
        """A task that was cancelled, perhaps before its first step, or that failed, says nothing itself."""
        self._tasks.discard(task)
        if task.cancelled():
            sentence = "cancelled; what has come is kept: start it again to go on"
            self._end(job, DownloadState.FAILED, sentence)
        elif (error := task.exception()) is not None:
            log.error("the download of %s failed", job.repo, exc_info=error)
            self._end(job, DownloadState.FAILED, f"an error of ours ({type(error).__name__}); see the log")

    async def _run(self, job: _Job) -> int:
        argv = [sys.executable, "-m", "worker_agent.models.download", self._order_for(job)]

        def hear(line: str) -> None:
            job.hear(line, time.monotonic())
            self._on_change()

        async with running(argv, _environment(os.environ, self._policy.token), hear) as process:
            return await process.wait()

    def _order_for(self, job: _Job) -> str:
        policy = self._policy
        order = {
            "folder": str(self._catalog.folder.absolute()),
            "endpoint": policy.endpoint,
            "repo": job.repo,
            "name": job.name,
            "revision": job.order.revision,
            "file": job.order.file,
            "formats": policy.formats,
            "limit_bytes": policy.limit_bytes,
            "margin_bytes": policy.margin_bytes,
            "retry_seconds": policy.retry_seconds,
        }
        return orjson.dumps(order).decode()

    def _end(self, job: _Job, state: DownloadState, detail: str) -> None:
        job.end(state, detail, time.monotonic())
        if state is DownloadState.DONE:
            log.info("%s is here", job.name)
        else:
            log.warning("%s was not downloaded: %s", job.name, detail)
        self._on_change()


def _environment(ours: Mapping[str, str], token: str | None) -> dict[str, str]:
    """What the process sees: of the hub's own variables none but the token and the wish to stay offline."""
    theirs = {
        name: value
        for name, value in allowed_environment(ours).items()
        if not name.startswith(("HF_", "HUGGINGFACE_")) or name == "HF_HUB_OFFLINE"
    }
    return theirs if token is None else {**theirs, "HF_TOKEN": token}
