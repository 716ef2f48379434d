"""How each worker is, watched: the report stream of an agent, once it was met, polling for all others.

Performs; what an answer means is decided by `worker_types` and `wire`. One task per worker, told apart by
its id; each speaks to the rest of the program through `tell` only.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from balancer import trust
from balancer.core.model import (
    Condition,
    Endpoint,
    Event,
    Lost,
    ModelName,
    ModelOffer,
    Reported,
    Worker,
    WorkerId,
)
from balancer.identity import identity, with_automatic_names
from balancer.meeting import NotMet, is_session_unknown
from balancer.patience import Patience, patient
from balancer.upstream import Lines, OtherCertificate, UpstreamError, Way
from balancer.worker_types import (
    LEAST_LOAD_SECONDS,
    LOAD_BYTES_PER_SECOND,
    MAX_PROBE_BYTES,
    USER_AGENT,
    Page,
    ProbeFailed,
    named_models,
    row_of,
    said_in,
    without_key,
)
from worker_agent import wire

log = logging.getLogger(__name__)

MAX_COMPLAINT_BYTES = 4096
SHARING_ENGINE = "vllm"
"""Its requests can use one prefix at the same time; the slots of llama.cpp and MLX hold a copy each."""
NO_HEADERS: Final[Mapping[str, str]] = {}
_ENDLESS = aiohttp.ClientTimeout(total=None)  # every exchange here stands under a deadline of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPolicy:
    """When a worker is asked, and when its silence counts."""

    interval_seconds: float = 5.0
    """Between two probes of a worker without an agent."""
    remote_interval_seconds: float = 60.0
    """The same of an API that others run; after a failure it is looked for sooner."""
    seldom_seconds: float = 300.0
    """How long a page that a worker does not have is not asked for again."""
    probe_timeout_seconds: float = 5.0
    lost_after_failures: int = 2
    """Failed probes in a row; a refused connection needs no second."""
    lost_after_seconds: float = wire.LOST_AFTER_SECONDS
    """An agent's silence; also how long a try to reach it may take."""
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 5.0
    """Between tries to reach a lost agent: doubled up to the longest, less up to half by chance."""
    stranger_pause_seconds: float = 30.0
    """The longest for a guest that answered and was not let in."""
    report_gap_seconds: float = 0.02
    """Reports of one agent are read at most so often, so that a mad one cannot fill the event loop."""


class Unreached(Exception):
    """A worker could not be asked, or did not answer as a worker does; the sentence says why."""

    def __init__(self, sentence: str, *, certain: bool = False) -> None:
        super().__init__(sentence)
        self.certain = certain
        """There is no need to ask again: the machine is up and nobody listens, say, or the key is wrong."""


class Agents(Protocol):
    """The part of `cluster.Cluster` by which agents are met and heard."""

    def way(self, worker: Worker) -> Way | None: ...
    async def met(self, worker: Worker, refused: Way | None = ...) -> Way: ...
    def reports(self, way: Way) -> AbstractAsyncContextManager[Lines]: ...


class _Stranger(Exception):
    """The agent does not know the session."""


class Watches:
    """The watched workers. `tell` is called from the event loop and must not block."""

    def __init__(
        self,
        *,
        tell: Callable[[Event], None],
        session: aiohttp.ClientSession,
        agents: Agents,
        policy: WatchPolicy,
        is_at_work: Callable[[WorkerId], bool] = lambda _: False,
        chance: Callable[[], float] = random.random,
        on_report: Callable[[wire.Report], None] = lambda _: None,
    ) -> None:
        """`session`: for workers without an agent. `is_at_work`: answers come from this worker; one that is
        too busy for a probe is not lost. `on_report`: is given what an agent says of itself as it came,
        before the event that it becomes."""
        self._tell = tell
        self._session = session
        self._agents = agents
        self._policy = policy
        self._is_at_work = is_at_work
        self._chance = chance
        self._on_report = on_report
        self._watches: dict[WorkerId, _Watch] = {}
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def follow(
        self, worker: Worker, headers: Mapping[str, str] = NO_HEADERS, *, is_guest: bool = False
    ) -> None:
        """Watches the worker from now on, in place of any earlier watch of its id. `is_guest`: nothing is
        told of it before it was met."""
        self.forget(worker.id)
        watch = _Watch(
            *(worker, headers, self._tell, self._session, self._agents, self._policy, self._is_at_work),
            *(self._chance, self._on_report, is_guest),
        )
        self._watches[worker.id] = watch
        # Kept in _tasks, then in _leaving until it has ended; aclose awaits both.
        # In a context of its own: it outlives the request by which the worker may have come.
        task = asyncio.create_task(  # noqa: TID251
            watch.run(), name=f"watch {worker.id}", context=contextvars.Context()
        )
        self._tasks[worker.id] = task

    def wake(self, worker_id: WorkerId) -> None:
        """There is reason to try it now, not only after the pause."""
        if (watch := self._watches.get(worker_id)) is not None:
            watch.woken.set()

    def forget(self, worker_id: WorkerId) -> None:
        """Ends the watch; nothing more is told of the worker. Nothing happens if there is none."""
        self._watches.pop(worker_id, None)
        task = self._tasks.pop(worker_id, None)
        if task is not None:
            task.cancel()
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def aclose(self) -> None:
        """Ends all watches, and waits until their connections are closed."""
        for worker_id in list(self._tasks):
            self.forget(worker_id)
        await asyncio.gather(*self._leaving, return_exceptions=True)


class _Watch:
    """One worker under watch: what it last was, so that only changes are logged and losses told once."""

    def __init__(
        self,
        worker: Worker,
        headers: Mapping[str, str],
        tell: Callable[[Event], None],
        session: aiohttp.ClientSession,
        agents: Agents,
        policy: WatchPolicy,
        is_at_work: Callable[[WorkerId], bool],
        chance: Callable[[], float],
        on_report: Callable[[wire.Report], None],
        is_guest: bool,
    ) -> None:
        self._worker = worker
        self._type = row_of(worker)
        self._headers = headers
        self._tell = tell
        self._session = session
        self._agents = agents
        self._policy = policy
        self._is_at_work = is_at_work
        self._chance = chance
        self._on_report = on_report
        self._is_unknown = is_guest
        """Nobody has heard of it yet."""
        self.woken = asyncio.Event()
        self._lost: str | None = None
        self._last: Condition | None = None
        self._heard: float | None = None
        self._lacks: dict[str, float] = {}
        """Pages that it does not have, and until when that is believed."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                if self._type.probe_path is None:
                    await self._listen()
                else:
                    await self._poll(self._type.probe_path)
            except Exception:
                # A fault of ours must not look like health: the worker gets nothing, and the trace is kept.
                log.exception("the watch of worker %s broke", self._worker.id)
                self._is_lost("its watch broke, see the log")
            await asyncio.sleep(self._policy.longest_pause_seconds)

    # Told once ...

    def _is_well(self, condition: Condition) -> None:
        if self._last is None or self._lost is not None or self._last.state != condition.state:
            log.info(
                "worker %s at %s answers: %s",
                self._worker.id,
                self._worker.url,
                condition.detail or condition.state,
            )
        self._lost = None
        self._last = condition
        self._tell(Reported(self._worker.id, condition))

    def _is_lost(self, reason: str) -> None:
        if self._is_unknown:
            if reason != self._lost:
                log.debug("agent %s at %s is not here: %s", self._worker.id, self._worker.url, reason)
                self._lost = reason
            return
        if reason != self._lost:
            log.warning("worker %s at %s is lost: %s", self._worker.id, self._worker.url, reason)
            self._lost = reason
            self._lacks.clear()  # it may come back as a newer version
            self._tell(Lost(self._worker.id, reason, abandon=self._type.probe_path is None))

    # An agent: met, then one answer that does not end, a report in each line ...

    async def _listen(self) -> None:
        policy, loop = self._policy, asyncio.get_running_loop()
        pause = policy.first_pause_seconds
        while True:
            self.woken.clear()
            began, before = loop.time(), self._heard
            # A stream that broke has what is left of the silence to come back, a lost agent a whole one.
            silent_from = began if self._heard is None or self._lost is not None else self._heard
            longest = policy.longest_pause_seconds
            try:
                async with patient(silent_from + policy.lost_after_seconds) as silence:
                    await self._hear_or_meet_again(silence)
                reason, broke = "it ended its report stream", True
            except TimeoutError:
                reason, broke = f"no report for {policy.lost_after_seconds:g} s", False
            except Unreached as error:
                reason, broke = str(error), False
            except NotMet as error:
                reason, broke = str(error), False
                if error.certain and self._is_unknown:
                    longest = policy.stranger_pause_seconds
            except wire.WireError as error:
                reason, broke = f"its report is not usable: {error}", False
            except UpstreamError as error:
                reason, broke = str(error), True
            if self._heard != before:
                pause = policy.first_pause_seconds
                if broke and loop.time() - began >= wire.REPORT_INTERVAL_SECONDS:
                    continue  # a stream that had lived: back at once
            if not broke or self._heard == before:
                self._is_lost(reason)
            await self._rest(pause * (1 - self._chance() / 2))
            pause = min(2 * pause, longest)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.woken.wait()

    async def _hear_or_meet_again(self, silence: Patience) -> None:
        """Until the stream ends. An agent that does not know us any more is met again, once."""
        way: Way | None = None
        for _ in range(2):
            way = await self._agents.met(self._worker, way)
            self.woken.clear()  # by our own meeting too
            self._is_unknown = False
            try:
                await self._hear(way, silence)
                return
            except (_Stranger, OtherCertificate):
                continue
        raise Unreached("it does not know us a moment after it was met")

    async def _hear(self, way: Way, silence: Patience) -> None:
        """Until the stream ends; each report moves the end of the agent's time."""
        async with self._agents.reports(way) as lines:
            if lines.status != 200:
                await self._complain(lines)
            while line := await lines.line():
                report = wire.Report.from_line(line)
                if report.id != self._worker.id:
                    raise wire.WireError(
                        f'the agent there calls itself "{report.id}", not "{self._worker.id}"; '
                        "where it is listed in the config, give it that id"
                    )
                self._heard = asyncio.get_running_loop().time()
                silence.reschedule(self._heard + self._policy.lost_after_seconds)
                self._on_report(report)
                self._is_well(from_report(report))
                if self._agents.way(self._worker) is not way:
                    return  # others found that it does not know us
                await asyncio.sleep(self._policy.report_gap_seconds)

    async def _complain(self, lines: Lines) -> None:
        """Raises what an agent says about turning us away."""
        body = await lines.line()
        if is_session_unknown(lines.status, body):
            raise _Stranger
        said = said_in(body[:MAX_COMPLAINT_BYTES])
        raise Unreached(
            f"it answered {wire.REPORT_PATH} with status {lines.status}{f': {said}' if said else ''}"
        )

    # All others: asked again and again ...

    async def _poll(self, path: str) -> None:
        failures = 0
        while True:
            pause = self._interval_seconds
            try:
                condition = await self._probe(path)
            except Unreached as error:
                failures = 0 if self._is_at_work(self._worker.id) else failures + 1
                if error.certain or failures >= self._policy.lost_after_failures:
                    self._is_lost(str(error))
                if not error.certain:
                    pause = min(pause, self._policy.interval_seconds * 2.0 ** min(failures, 10))
            else:
                failures = 0
                self._is_well(condition)
            # Up to a tenth less by chance: workers of one room are not all asked in the same moment.
            await asyncio.sleep(pause * (1 - self._chance() / 10))

    @property
    def _interval_seconds(self) -> float:
        policy = self._policy
        return policy.remote_interval_seconds if self._type.is_remote else policy.interval_seconds

    async def _probe(self, path: str) -> Condition:
        status, body = await self._get(path)
        try:
            condition = self._type.read_probe(status, body)
        except ProbeFailed as error:
            # What a lost worker said is shown to everybody.
            raise Unreached(without_key(str(error), self._headers), certain=error.certain) from error
        if self._type.is_remote:
            return named_models(self._worker, condition)
        if self._type.more and condition.models:
            condition = await self._with_more(condition)
        return with_automatic_names(_with_engines_ways(_as_configured(self._worker, condition)))

    async def _with_more(self, condition: Condition) -> Condition:
        """What further pages tell makes a choice better; without them the worker can be used all the same."""
        now = asyncio.get_running_loop().time()
        pages = [page for page in self._type.more if self._lacks.get(page.path, now) <= now]
        for page, answer in zip(pages, await asyncio.gather(*map(self._besides, pages)), strict=True):
            if answer is None:
                continue
            status, body = answer
            try:
                condition = page.read(condition, status, body)
            except ProbeFailed:
                if status < 500 or status == 501:  # older versions have no such path, and log each try
                    self._lacks[page.path] = now + self._policy.seldom_seconds
        return condition

    async def _besides(self, page: Page) -> tuple[int, bytes] | None:
        try:
            return await self._get(page.path)
        except Unreached:
            return None

    async def _get(self, path: str) -> tuple[int, bytes]:
        """Status and body, within the time of a probe. Raises `Unreached`."""
        headers = dict(self._headers) if self._type.keep_alive else {**self._headers, "Connection": "close"}
        if self._type.is_remote:
            headers["User-Agent"] = USER_AGENT
        limit = self._policy.probe_timeout_seconds
        url = self._origin + self._type.place(self._worker, path, None)
        try:
            async with (
                asyncio.timeout(limit),
                self._session.get(
                    url, headers=headers, ssl=self._tls(), timeout=_ENDLESS, allow_redirects=False
                ) as response,
            ):
                return response.status, await _bounded(response.content)
        except TimeoutError:
            raise Unreached(f"no answer to {path} within {limit:g} s") from None
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise Unreached(_words(error), certain=_is_refused(error)) from error

    @property
    def _origin(self) -> str:
        """`https://host:port`."""
        scheme, _, rest = self._worker.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    def _tls(self) -> ssl.SSLContext | bool:
        if not self._worker.url.startswith("https:"):
            return True  # there is no TLS to configure
        try:
            return trust.context(self._worker.ca_file)
        except OSError as error:
            raise Unreached(f"its ca_file cannot be used: {error.strerror or error}", certain=True) from error


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    """At most one byte more than a probe may have, by which its reader knows."""
    body = bytearray()
    while len(body) <= MAX_PROBE_BYTES and (chunk := await content.read(64 * 1024)):
        body += chunk
    return bytes(body[: MAX_PROBE_BYTES + 1])


def _is_refused(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ClientConnectorError):
        return isinstance(error.os_error, ConnectionRefusedError)
    return isinstance(error, ConnectionRefusedError)


def _words(error: BaseException) -> str:
    """What happened on the way, for people; the exceptions' own texts repeat address and internals."""
    match error:
        case _ if _is_refused(error):
            return "connection refused: nothing listens there"
        case aiohttp.ClientConnectorDNSError():
            return "its host name is not known"
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLError() as reason):
            return trust.complaint(reason)
        case aiohttp.ClientConnectorSSLError(os_error=ssl.SSLError() as reason):
            return trust.complaint(reason)
        case aiohttp.ClientConnectorError():
            return f"cannot be reached: {error.os_error.strerror or error.os_error}"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | ConnectionResetError():
            return "it closed the connection"
    return f"does not speak HTTP as expected ({type(error).__name__})"


# Pure: what was heard, in the core's words ...


def from_report(report: wire.Report) -> Condition:
    """The condition that an agent's report describes."""
    return with_automatic_names(
        _with_engines_ways(
            Condition(
                models=tuple(map(_offer, report.models)),
                ready=report.state is wire.EngineState.READY,
                slots=report.slots,
                running=report.running,
                tells_loads=True,
                calibrates=True,
                engine=report.engine,
                state=report.state.value,
                detail=report.detail,
                hardware=report.hardware,
                advice=report.advice,
            )
        )
    )


def _offer(model: wire.ServedModel) -> ModelOffer:
    return ModelOffer(
        name=ModelName(model.name),
        endpoints=frozenset(endpoint for endpoint in Endpoint if endpoint.value in model.paths),
        context_tokens=model.context_tokens,
        identity=identity(model.identity),
        memory_tokens=model.memory_tokens,
        cache_tokens=model.cache_tokens,
        continues=model.continues,
        loaded=model.state is wire.ModelState.LOADED,
        loading=model.state is wire.ModelState.LOADING,
        load_seconds=_load_seconds(model),
        progress=model.progress if model.state is wire.ModelState.LOADING else None,
        failed=(model.detail or "failed") if model.state is wire.ModelState.FAILED else None,
        slots=model.slots,
    )


def _load_seconds(model: wire.ServedModel) -> float:
    """Until it answers: what its agent says, else a guess from its size."""
    if model.state is wire.ModelState.LOADED:
        return 0.0
    if model.eta_seconds is not None:
        return model.eta_seconds
    seconds = model.load_seconds
    if seconds is None:
        seconds = max((model.size_bytes or 0) / LOAD_BYTES_PER_SECOND, LEAST_LOAD_SECONDS)
    return seconds * (1 - (model.progress or 0.0)) if model.state is wire.ModelState.LOADING else seconds


def _with_engines_ways(condition: Condition) -> Condition:
    return dataclasses.replace(condition, shares_prefixes=condition.engine.lower() == SHARING_ENGINE)


def _as_configured(worker: Worker, condition: Condition) -> Condition:
    """A worker that answers but lists nothing serves what it is configured for."""
    models = condition.models
    if not models and condition.ready:
        models = tuple(ModelOffer(name=name, identity=identity(name)) for name in sorted(worker.only))
    if worker.continues is not None:
        models = tuple(dataclasses.replace(offer, continues=worker.continues) for offer in models)
    return dataclasses.replace(condition, models=models)
