"""Models over the fleet: what each worker has, and orders to load, unload, fetch and delete them.

`Stock` is told what the watches hear, and knows what every worker has; with `best_for_load` and `speaks_of`
it is pure. `FleetModels` performs an order at the workers that it concerns, all at once, and says of each how
that went: agents over their own admin API, within the session; Ollama over its API.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import aiohttp
import orjson
from aiohttp.http_exceptions import HttpProcessingError

from balancer import trust
from balancer.core.errors import Conflict, NotFound
from balancer.core.model import Condition, Endpoint, Event, Gone, Lost, Reported, Seen, Worker, WorkerId
from balancer.meeting import NotMet
from balancer.upstream import Answer, UpstreamError
from balancer.worker_types import said_in
from worker_agent import wire
from worker_agent.wire import Download, DownloadState, ModelOrder, ModelState

MAX_ANSWER_BYTES = 64 * 1024
MAX_PULLS = 16  # that are remembered, under way or not
MAX_PARTS = 256  # of one download
OLLAMA_KEEP_ALIVE = "30m"
"""For which Ollama keeps a model that was loaded by hand and that nobody asks for; by itself it would be five
minutes. The agents' own default."""
EVERYBODY = "all"
_ENDLESS = aiohttp.ClientTimeout(total=None)  # every exchange here stands under a deadline of its own


class Action(StrEnum):
    """What can be done with a model; the words of the agents' paths."""

    LOAD = "load"
    UNLOAD = "unload"
    DOWNLOAD = "download"
    DELETE = "delete"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an order went at one worker."""

    worker: WorkerId
    status: int
    """As HTTP has it: 200 done, 202 begun, 4xx refused, 5xx not carried out."""
    detail: str

    @property
    def ok(self) -> bool:
        return self.status < 300


# What there is: pure ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One model on one worker."""

    worker: WorkerId
    name: str
    """As the worker calls it."""
    names: tuple[str, ...]
    """By which clients may ask for it, its own among them; without those that were made automatically."""
    state: ModelState
    progress: float | None = None
    eta_seconds: float | None = None
    load_seconds: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    engine: str = ""
    detail: str = ""


@dataclass(slots=True)
class _Known:
    worker: Worker
    condition: Condition | None = None
    """None: nothing was heard of it, or nothing since it was lost."""
    report: wire.Report | None = None
    """Of an agent, which says more than a condition holds."""

    def own_names(self) -> dict[str, str]:
        """By every name that clients may use the worker's own."""
        condition = self.condition
        names = {str(one.name): str(one.own_name) for one in condition.models} if condition else {}
        return names | {str(alias): names[own] for alias, own in self.worker.aliases if own in names}

    def public_names(self, own: str) -> tuple[str, ...]:
        condition = self.condition
        made = {one.name for one in condition.models if one.automatic} if condition else frozenset()
        others = (name for name, of in self.own_names().items() if of == own and name not in made)
        return tuple(dict.fromkeys((own, *others)))


class Stock:
    """What every worker has, as it was last heard of. Give it every event of watches and roster."""

    def __init__(self) -> None:
        self._known: dict[WorkerId, _Known] = {}

    def notice(self, event: Event) -> None:
        match event:
            case Seen(worker):
                known = self._known.setdefault(worker.id, _Known(worker))
                if known.worker.url != worker.url:
                    known.condition = known.report = None
                known.worker = worker
            case Gone(worker_id):
                self._known.pop(worker_id, None)
            case Reported(worker_id, condition):
                if (known_of := self._known.get(worker_id)) is not None:
                    known_of.condition = condition
            case Lost(worker_id):
                if (known_of := self._known.get(worker_id)) is not None:
                    known_of.condition = known_of.report = None

    def heard(self, report: wire.Report) -> None:
        """What an agent says of itself."""
        if (known := self._known.get(WorkerId(report.id))) is not None:
            known.report = report

    @property
    def workers(self) -> dict[WorkerId, Worker]:
        return {worker_id: known.worker for worker_id, known in self._known.items()}

    def answers(self, worker_id: WorkerId) -> bool:
        known = self._known.get(worker_id)
        return known is not None and known.condition is not None

    def report(self, worker_id: WorkerId) -> wire.Report | None:
        known = self._known.get(worker_id)
        return known.report if known else None

    def own_name(self, worker_id: WorkerId, model: str) -> str | None:
        """What this worker calls the model that clients call so; None: it has no such model."""
        known = self._known.get(worker_id)
        return known.own_names().get(model) if known else None

    def embeds_only(self, worker_id: WorkerId, own_name: str) -> bool:
        known = self._known.get(worker_id)
        offers = known.condition.models if known and known.condition else ()
        return any(
            one.own_name == own_name and one.endpoints == frozenset({Endpoint.EMBEDDINGS}) for one in offers
        )

    def holdings(self) -> tuple[Holding, ...]:
        """Every model of every worker that answers."""
        return tuple(one for known in self._known.values() for one in _holdings(known))

    def downloads(self) -> tuple[tuple[WorkerId, Download], ...]:
        """As agents tell them."""
        return tuple(
            (worker_id, one)
            for worker_id, known in self._known.items()
            if known.report is not None
            for one in known.report.downloads
        )

    def free_bytes(self, worker_id: WorkerId) -> int | None:
        """Of what models may take on that machine; None: it does not say."""
        report = self.report(worker_id)
        if report is None or report.memory_total_bytes is None:
            return None
        return report.memory_total_bytes - (report.memory_held_bytes or 0)


def _holdings(known: _Known) -> Iterable[Holding]:
    if known.condition is None:
        return
    if known.report is not None:
        for model in known.report.models:
            yield Holding(
                worker=known.worker.id,
                name=model.name,
                names=known.public_names(model.name),
                state=model.state,
                progress=model.progress,
                eta_seconds=model.eta_seconds,
                load_seconds=model.load_seconds,
                size_bytes=model.size_bytes,
                memory_bytes=model.memory_bytes,
                engine=model.engine or known.report.engine,
                detail=model.detail,
            )
        return
    for offer in known.condition.models:
        if offer.known_as is not None:
            continue  # a further name of one that is listed under its own
        if offer.failed:
            state = ModelState.FAILED
        elif offer.loading:
            state = ModelState.LOADING
        else:
            state = ModelState.LOADED if offer.loaded else ModelState.UNLOADED
        yield Holding(
            worker=known.worker.id,
            name=offer.name,
            names=known.public_names(offer.name),
            state=state,
            progress=offer.progress,
            load_seconds=None if offer.loaded else offer.load_seconds,
            engine=known.condition.engine,
            detail=offer.failed or "",
        )


def best_for_load(
    holdings: Iterable[Holding], free_bytes: Callable[[WorkerId], int | None]
) -> Holding | None:
    """Where to load a model that several have on their disks: where most memory is free for models.

    Who does not tell comes after those who do, and a failed model after those that can be loaded. None: there
    is none to be loaded.
    """

    def rank(holding: Holding) -> tuple[bool, bool, int, str]:
        free = free_bytes(holding.worker)
        return holding.state is ModelState.FAILED, free is None, -(free or 0), holding.worker

    loadable = (one for one in holdings if one.state in (ModelState.UNLOADED, ModelState.FAILED))
    return min(loadable, key=rank, default=None)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def speaks_of(repo: str) -> str:
    """Which type of worker can fetch a model that is called so: `agent` for a name of the hub
    (`org/model`), `ollama` for one of Ollama's (`llama3.2:1b`, `hf.co/org/model:Q4_K_M`)."""
    return "agent" if _HUB_NAME.fullmatch(repo) else "ollama"


# Orders: performed ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """How long workers may take to answer."""

    answer_seconds: float = 10.0
    begun_seconds: float = 2.0
    """What takes longer than that, at a worker that answers when it is done, goes on behind the answer."""
    stalled_seconds: float = 600.0
    """Of silence in a download: a large file is verified in between."""
    load_seconds: float = 1800.0


class Failed(Exception):
    """A worker did not do what it was asked for; the sentence says why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Agents(Protocol):
    """The part of `cluster.Cluster` by which agents are asked."""

    async def ask(
        self, worker: Worker, method: str, path: str, body: bytes = ..., *, limit_bytes: int, seconds: float
    ) -> Answer: ...


class _Adapter(Protocol):
    """How workers of one type are spoken to about their models. Raises `Failed`."""

    async def perform(self, worker: Worker, action: Action, order: ModelOrder) -> Outcome: ...


class FleetModels:
    """Gives orders about models. `aclose` ends what it still waits for."""

    def __init__(
        self,
        stock: Stock,
        session: aiohttp.ClientSession,
        agents: Agents,
        *,
        headers: Callable[[Worker], Mapping[str, str]] = lambda _: {},
        is_draining: Callable[[WorkerId], bool] = lambda _: False,
        policy: OrderPolicy | None = None,
    ) -> None:
        """`session`: for workers without an agent. `headers`: what a worker's configuration adds to each
        request."""
        policy = policy or OrderPolicy()
        self.stock = stock
        self._is_draining = is_draining
        http = _Http(session, headers, policy.answer_seconds)
        self._ollama = _Ollama(http, stock, policy)
        self._adapters: Mapping[str, _Adapter] = {
            "agent": _Agent(agents, policy.answer_seconds),
            "ollama": self._ollama,
        }

    async def aclose(self) -> None:
        await self._ollama.aclose()

    # What there is

    def holdings(self) -> tuple[Holding, ...]:
        return tuple(
            dataclasses.replace(one, state=ModelState.LOADING)
            if one.state is ModelState.UNLOADED and self._ollama.is_loading(one.worker, one.name)
            else one
            for one in self.stock.holdings()
        )

    def downloads(self) -> tuple[tuple[WorkerId, Download], ...]:
        """Under way, and those that ended a short while ago."""
        return (*self.stock.downloads(), *self._ollama.downloads())

    # Orders; they raise `NotFound` and `Conflict` where there is nobody to be asked

    async def load(self, model: str, worker: str | None = None) -> tuple[Outcome, ...]:
        """On that worker, else on the one that suits best of those that have it on disk."""
        if worker is not None:
            known = self._worker(worker)
            return await self._all(Action.LOAD, [(known, ModelOrder(name=self._own_name(known, model)))])
        holders = self._holders(model)
        if there := [one for one in holders if one.state in (ModelState.LOADED, ModelState.LOADING)]:
            return tuple(_is_there(one) for one in there)
        usable = [one for one in holders if not self._is_draining(one.worker)]
        ours = [one for one in usable if self.stock.workers[one.worker].type in self._adapters]
        best = best_for_load(ours or usable, self.stock.free_bytes)
        if best is None:
            raise Conflict(
                f"Every worker that has {model} is draining: POST /admin/workers/ID/undrain first, or name "
                "the worker that shall load it."
            )
        return await self._all(Action.LOAD, [self._order(best)])

    async def unload(self, model: str, worker: str | None, *, force: bool) -> tuple[Outcome, ...]:
        """On that worker, else wherever it is loaded."""
        if worker is not None:
            known = self._worker(worker)
            order = ModelOrder(name=self._own_name(known, model), force=force)
            return await self._all(Action.UNLOAD, [(known, order)])
        loaded = [one for one in self._holders(model) if one.state in (ModelState.LOADED, ModelState.LOADING)]
        if not loaded:
            raise Conflict(f"{model} is loaded nowhere: GET /admin/models shows the state of each model.")
        return await self._all(Action.UNLOAD, [self._order(one, force=force) for one in loaded])

    async def delete(self, model: str, worker: str, *, force: bool) -> tuple[Outcome, ...]:
        known = self._worker(worker)
        order = ModelOrder(name=self._own_name(known, model), force=force)
        return await self._all(Action.DELETE, [(known, order)])

    async def download(self, order: ModelOrder, workers: Sequence[str]) -> tuple[Outcome, ...]:
        """`workers`: their ids; `EVERYBODY` alone: all that can fetch what is called so."""
        if list(workers) == [EVERYBODY]:
            kind = speaks_of(order.repo or order.name)
            chosen = [
                one
                for one in self.stock.workers.values()
                if one.type == kind and self.stock.answers(one.id) and not one.fallback
            ]
            if not chosen:
                raise Conflict(
                    f"No worker of type {kind} answers, and only such can fetch {order.repo or order.name}: "
                    "GET /admin/workers shows how each is."
                )
        else:
            chosen = [self._worker(name) for name in dict.fromkeys(workers)]
        return await self._all(Action.DOWNLOAD, [(one, order) for one in chosen])

    async def cancel(self, model: str, worker: str | None = None) -> tuple[Outcome, ...]:
        """A download, by its name or repository; on that worker, else wherever it is under way."""
        under_way = [
            (worker_id, one)
            for worker_id, one in self.downloads()
            if model in (one.name, one.repo)
            and one.state in (DownloadState.DOWNLOADING, DownloadState.VERIFYING)
            and worker in (None, worker_id)
        ]
        if not under_way:
            if worker is not None:
                self._worker(worker)
            raise NotFound(f"No download of {model} is under way: GET /admin/models lists the downloads.")
        workers = self._ollama.pulling() | self.stock.workers  # the former may have left the room since
        return await self._all(
            Action.CANCEL,
            [
                (workers[worker_id], ModelOrder(name=one.name))
                for worker_id, one in under_way
                if worker_id in workers
            ],
        )

    def _worker(self, worker: str) -> Worker:
        known = self.stock.workers.get(WorkerId(worker))
        if known is None:
            raise NotFound(f"There is no worker {worker!r}: GET /admin/workers lists them.")
        return known

    def _own_name(self, worker: Worker, model: str) -> str:
        """A worker that does not answer is asked all the same, by the name that was given."""
        if not self.stock.answers(worker.id):
            return model
        own = self.stock.own_name(worker.id, model)
        if own is None:
            raise NotFound(
                f"The worker {worker.id} has no model {model}: GET /admin/models lists what each has; "
                "POST /admin/models/download fetches more."
            )
        return own

    def _holders(self, model: str) -> list[Holding]:
        room = {worker_id for worker_id, worker in self.stock.workers.items() if not worker.fallback}
        holders = [
            one
            for one in self.holdings()
            if one.worker in room and self.stock.own_name(one.worker, model) == one.name
        ]
        if not holders:
            raise NotFound(
                f"No worker that answers has a model {model}: GET /admin/models lists what there is; "
                "POST /admin/models/download fetches more."
            )
        return holders

    def _order(self, holding: Holding, *, force: bool = False) -> tuple[Worker, ModelOrder]:
        return self.stock.workers[holding.worker], ModelOrder(name=holding.name, force=force)

    async def _all(self, action: Action, orders: Sequence[tuple[Worker, ModelOrder]]) -> tuple[Outcome, ...]:
        return tuple(await asyncio.gather(*(self._one(worker, action, order) for worker, order in orders)))

    async def _one(self, worker: Worker, action: Action, order: ModelOrder) -> Outcome:
        adapter = self._adapters.get(worker.type)
        try:
            if adapter is None:
                raise Failed(
                    409,
                    f"a worker of type {worker.type} manages its models by itself: use its own program, or "
                    "run a worker agent on that machine",
                )
            return await adapter.perform(worker, action, order)
        except Failed as failed:
            return Outcome(worker=worker.id, status=failed.status, detail=str(failed))


def _is_there(holding: Holding) -> Outcome:
    loaded = holding.state is ModelState.LOADED
    detail = "is loaded already" if loaded else "is being loaded already"
    more = "; name another worker to have it there too"
    return Outcome(worker=holding.worker, status=200 if loaded else 202, detail=detail + more)


class _Http:
    """One exchange with a worker, bounded in time and size."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        headers: Callable[[Worker], Mapping[str, str]],
        answer_seconds: float,
    ) -> None:
        self.session = session
        self.headers = headers
        self._answer_seconds = answer_seconds

    async def ask(
        self,
        worker: Worker,
        method: str,
        path: str,
        body: bytes,
        *,
        seconds: float | None = None,
    ) -> tuple[int, bytes]:
        """Status and body. Raises `Failed`."""
        limit = seconds or self._answer_seconds
        headers = {**self.headers(worker), "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(limit),
                self.session.request(
                    method,
                    worker.url + path,
                    data=body,
                    headers=headers,
                    ssl=_tls(worker),
                    timeout=_ENDLESS,
                    allow_redirects=False,
                ) as response,
            ):
                return response.status, await _bounded(response.content)
        except TimeoutError:
            raise Failed(504, f"it did not answer within {limit:g} s") from None
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise _unreached(error) from error


def _tls(worker: Worker) -> ssl.SSLContext | bool:
    """Raises `OSError` for a file of certificates that cannot be read."""
    return trust.context(worker.ca_file) if worker.url.startswith("https:") else True


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while len(body) < MAX_ANSWER_BYTES and (chunk := await content.read(MAX_ANSWER_BYTES - len(body))):
        body += chunk
    return bytes(body)


def _unreached(error: BaseException) -> Failed:
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLError() as reason):
            why = trust.complaint(reason)
        case aiohttp.ClientConnectorSSLError(os_error=ssl.SSLError() as reason):
            why = trust.complaint(reason)
        case aiohttp.ClientConnectorDNSError():
            why = "its host name is not known"
        case aiohttp.ClientConnectorError():
            why = f"it cannot be reached: {error.os_error.strerror or type(error).__name__}"
        case _:
            why = f"it broke off ({type(error).__name__})"
    return Failed(502, why)


def _refused(status: int, body: bytes) -> Failed:
    """A worker's own words, and its status; but a 401 of ours would ask for our own key."""
    said = said_in(body) or f"it answered with status {status}"
    return Failed(status if 400 <= status < 600 and status != 401 else 502, said)


# Agents ...


class _Agent:
    """Over the agent's own admin API."""

    def __init__(self, agents: Agents, seconds: float) -> None:
        self._agents = agents
        self._seconds = seconds

    async def perform(self, worker: Worker, action: Action, order: ModelOrder) -> Outcome:
        path = f"{wire.MODELS_PATH}/{action.value}"
        body = order.model_dump_json(exclude_defaults=True).encode()
        answer = await self._asked(worker, path, body)
        if answer.status >= 300:
            raise _refused(answer.status, answer.body)
        begun = (
            answer.status == 202
        )  # of others that would do, each means something else in an answer of ours
        return Outcome(worker=worker.id, status=202 if begun else 200, detail=_DONE[action, begun])

    async def _asked(self, worker: Worker, path: str, body: bytes) -> Answer:
        try:
            return await self._agents.ask(
                *(worker, "POST", path, body), limit_bytes=MAX_ANSWER_BYTES, seconds=self._seconds
            )
        except TimeoutError:
            raise Failed(504, f"it did not answer within {self._seconds:g} s") from None
        except NotMet as error:
            if error.certain:
                raise Failed(409, f"it is not asked: {error}") from error
            raise Failed(502, f"it cannot be reached: {error}") from error
        except UpstreamError as error:
            raise Failed(502, f"it cannot be reached: {error}") from error


_DONE: Mapping[tuple[Action, bool], str] = {
    (Action.LOAD, True): "is being loaded; GET /admin/models shows how far it is",
    (Action.LOAD, False): "is loaded",
    (Action.UNLOAD, True): "is being unloaded",
    (Action.UNLOAD, False): "is unloaded",
    (Action.DOWNLOAD, True): "is being fetched; GET /admin/models shows how far it is",
    (Action.DOWNLOAD, False): "is there",
    (Action.DELETE, True): "is being deleted",
    (Action.DELETE, False): "is deleted",
    (Action.CANCEL, True): "is being cancelled",
    (Action.CANCEL, False): "is cancelled",
}
"""By action, and whether it was only begun."""


# Ollama ...


@dataclass(slots=True)
class _Pull:
    """One download at an Ollama."""

    worker: Worker
    repo: str
    began: float
    state: DownloadState = DownloadState.DOWNLOADING
    detail: str = ""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By digest how many bytes have come, and of how many."""

    def take(self, line: Mapping[str, Any]) -> None:
        """One line of its answer: `{"status": "pulling 8eeb52dfb3bb", "digest": "sha256:...", "total": 5,
        "completed": 3}`, `{"status": "verifying sha256 digest"}`, `{"status": "success"}` or
        `{"error": "..."}`."""
        if isinstance(error := line.get("error"), str):
            self.failed(error)
            return
        digest, total, completed = line.get("digest"), line.get("total"), line.get("completed", 0)
        if isinstance(digest, str) and isinstance(total, int) and isinstance(completed, int):
            if digest in self.parts or len(self.parts) < MAX_PARTS:
                self.parts[digest] = (max(0, min(completed, total)), max(0, total))
            return
        match line.get("status"):
            case "success":
                self.state = DownloadState.DONE
            case str(status) if status.startswith("verifying"):
                self.state = DownloadState.VERIFYING

    def failed(self, why: str) -> None:
        self.state = DownloadState.FAILED
        self.detail = "".join(one if one.isprintable() else " " for one in why[:300])

    def told(self, now: float) -> Download:
        done = sum(part[0] for part in self.parts.values())
        total = sum(part[1] for part in self.parts.values())
        seconds = now - self.began
        going = self.state is DownloadState.DOWNLOADING and done > 0 and seconds > 0
        return Download(
            repo=self.repo,
            name=self.repo,
            state=self.state,
            done_bytes=min(done, 2**53),
            total_bytes=min(total, 2**53) if total else None,
            eta_seconds=min(1e6, (total - done) * seconds / done) if going else None,
            detail=self.detail,
        )


_Key = tuple[WorkerId, str]


class _Ollama:
    """Over Ollama's API. It answers a load or a pull only at its end: both go on in tasks of their own."""

    def __init__(self, http: _Http, stock: Stock, policy: OrderPolicy) -> None:
        self._http = http
        self._stock = stock
        self._policy = policy
        self._loads: dict[_Key, asyncio.Task[None]] = {}
        self._pulls: dict[_Key, tuple[_Pull, asyncio.Task[None]]] = {}

    async def aclose(self) -> None:
        tasks = [*self._loads.values(), *(task for _, task in self._pulls.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_loading(self, worker: WorkerId, model: str) -> bool:
        return (worker, model) in self._loads

    def downloads(self) -> Iterable[tuple[WorkerId, Download]]:
        now = asyncio.get_running_loop().time()
        return [(worker, pull.told(now)) for (worker, _), (pull, _) in self._pulls.items()]

    def pulling(self) -> dict[WorkerId, Worker]:
        return {worker_id: pull.worker for (worker_id, _), (pull, _) in self._pulls.items()}

    async def perform(self, worker: Worker, action: Action, order: ModelOrder) -> Outcome:
        match action:
            case Action.LOAD:
                begun = await self._load(worker, order.name)
            case Action.UNLOAD:
                await self._generate(worker, order.name, 0, self._policy.answer_seconds)
                begun = False
            case Action.DOWNLOAD:
                begun = await self._pull(worker, order)
            case Action.DELETE:
                await self._delete(worker, order)
                begun = False
            case Action.CANCEL:
                await self._cancel(worker, order.name)
                begun = False
        return Outcome(worker=worker.id, status=202 if begun else 200, detail=_DONE[action, begun])

    async def _load(self, worker: Worker, model: str) -> bool:
        """Whether it is only begun."""
        key = worker.id, model
        task = self._loads.get(key)
        if task is None:
            work = self._generate(worker, model, OLLAMA_KEEP_ALIVE, self._policy.load_seconds)
            # Kept in _loads until it ends; aclose awaits it.
            task = self._loads[key] = asyncio.create_task(work, name=f"load {model}")  # noqa: TID251
            task.add_done_callback(lambda ended: self._loaded(key, ended))
        return await self._is_only_begun(task)

    def _loaded(self, key: _Key, task: asyncio.Task[None]) -> None:
        self._loads.pop(key, None)
        if not task.cancelled():
            task.exception()  # told to whoever still waits; nobody else need see it

    async def _is_only_begun(self, task: asyncio.Task[None]) -> bool:
        """Waits a moment for it: most of what goes wrong does so at once. Raises `Failed`."""
        await asyncio.wait({task}, timeout=self._policy.begun_seconds)
        if not task.done():
            return True
        if task.cancelled():
            raise Failed(409, "it was cancelled")
        await task
        return False

    async def _generate(self, worker: Worker, model: str, keep_alive: int | str, seconds: float) -> None:
        """Nothing is generated without a prompt, but the model is loaded, or with 0 unloaded."""
        asked: dict[str, object] = {"model": model, "keep_alive": keep_alive, "stream": False}
        path = "/api/generate"
        if self._stock.embeds_only(worker.id, model):
            path, asked = "/api/embed", {"model": model, "keep_alive": keep_alive, "input": []}
        status, body = await self._http.ask(worker, "POST", path, orjson.dumps(asked), seconds=seconds)
        if status != 200:
            raise _refused(status, body)

    async def _delete(self, worker: Worker, order: ModelOrder) -> None:
        loaded = any(
            one.worker == worker.id and one.name == order.name and one.state is ModelState.LOADED
            for one in self._stock.holdings()
        )
        if loaded and not order.force:
            raise Failed(409, 'it is loaded: unload it first, or send "force": true')
        asked = orjson.dumps({"model": order.name, "name": order.name})  # older versions know `name` only
        status, body = await self._http.ask(worker, "DELETE", "/api/delete", asked)
        if status != 200:
            raise _refused(status, body)

    async def _pull(self, worker: Worker, order: ModelOrder) -> bool:
        repo = order.repo or order.name
        if order.file or order.revision or (order.repo and order.name not in (repo, order.repo)):
            raise Failed(
                409, "Ollama chooses name, file and revision by the model's own name: hf.co/ORG/MODEL:Q4_K_M"
            )
        key = worker.id, repo
        known = self._pulls.get(key)
        if known is None or known[1].done():
            self._make_way()
            pull = _Pull(worker, repo, asyncio.get_running_loop().time())
            # Kept in _pulls; aclose awaits it.
            task = asyncio.create_task(self._pulled(worker, pull), name=f"pull {repo}")  # noqa: TID251
            self._pulls.pop(key, None)
            self._pulls[key] = known = pull, task
        pull, task = known
        begun = await self._is_only_begun(task)
        if pull.state is DownloadState.FAILED:
            raise Failed(502, pull.detail)
        return begun

    def _make_way(self) -> None:
        for key in [key for key, (_, task) in self._pulls.items() if task.done()]:
            if len(self._pulls) < MAX_PULLS:
                return
            del self._pulls[key]
        if len(self._pulls) >= MAX_PULLS:
            raise Failed(429, f"{MAX_PULLS} downloads are under way: wait for one of them, or cancel one")

    async def _pulled(self, worker: Worker, pull: _Pull) -> None:
        """Until it is there; what goes wrong is told by the pull."""
        asked = {"model": pull.repo, "name": pull.repo, "stream": True}
        stalled = self._policy.stalled_seconds
        try:
            async with self._http.session.post(
                worker.url + "/api/pull",
                data=orjson.dumps(asked),
                headers={**self._http.headers(worker), "Content-Type": "application/json"},
                ssl=_tls(worker),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=stalled),
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    pull.failed(str(_refused(response.status, await _bounded(response.content))))
                    return
                while line := await response.content.readline(max_line_length=MAX_ANSWER_BYTES):
                    pull.take(_object(line))
        except TimeoutError:
            pull.failed(f"nothing came for {stalled:g} s; ask again to go on where it stopped")
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            pull.failed(str(_unreached(error)))
        except asyncio.CancelledError:
            pull.failed("cancelled; what has come is kept by Ollama for a later try")
            raise
        if pull.state in (DownloadState.DOWNLOADING, DownloadState.VERIFYING):
            pull.failed("it broke off; ask again to go on where it stopped")

    async def _cancel(self, worker: Worker, model: str) -> None:
        known = self._pulls.get((worker.id, model))
        if known is None or known[1].done():
            raise Failed(409, "no download of that name is under way")
        known[1].cancel()
        await asyncio.gather(known[1], return_exceptions=True)


def _object(line: bytes) -> Mapping[str, Any]:
    """Raises `ValueError` for what is no object of JSON."""
    found = orjson.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
