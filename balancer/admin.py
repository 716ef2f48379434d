"""What is answered under `/admin`: the room and its models seen and moved, presets, configuration.

The routes are an application of their own, whose middleware asks for the admin key before anything else is
looked at: a route that is added here cannot be forgotten. Every change leaves one line in the log. See
docs/ADMIN.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Protocol

import orjson
from aiohttp import web
from pydantic import Field

from balancer.admin_door import NOBODY_YET, SAFE_METHODS, WHO, AdminDoor
from balancer.audit import MAX_LISTED, Audit
from balancer.batch.presets import MAX_PRESET_BYTES, Found, Preset, PresetError, Shelf
from balancer.core.dispatcher import Snapshot
from balancer.core.errors import BadRequest, Conflict, NotFound, RequestError
from balancer.core.model import Served, WorkerId
from balancer.discovery import TooManyBanned
from balancer.fleet_models import EVERYBODY, Action, FleetModels, Holding, Outcome
from balancer.front import room_body, worker_body
from balancer.history import why
from balancer.keys import KeyWrong, TooManyGuesses
from balancer.orders import TARGETS, Nothing, Order, read_body, read_order
from worker_agent.wire import ModelOrder, ModelState, Word

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_WORKERS_NAMED = 1024

RECORDED: web.RequestKey[Mapping[str, object]] = web.RequestKey("recorded", Mapping)
"""What an order's record in the audit log says besides; no secrets."""


@dataclass(frozen=True, slots=True)
class AdminPolicy:
    body_seconds: float = 30.0
    """For the whole body to arrive, once the head has."""


class Membership(Protocol):
    """The part of `discovery.Roster` that decides who belongs to the room."""

    @property
    def sources(self) -> Mapping[WorkerId, str]: ...
    @property
    def banned(self) -> tuple[WorkerId, ...]: ...
    def remove(self, worker_id: WorkerId) -> bool: ...
    def admit(self, worker_id: WorkerId) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What reading the configuration again has changed."""

    added: tuple[WorkerId, ...] = ()
    removed: tuple[WorkerId, ...] = ()
    changed: tuple[WorkerId, ...] = ()
    applied: tuple[str, ...] = ()
    """Settings that have another value from now on."""
    needs_restart: tuple[str, ...] = ()
    """Settings whose new value holds from the next start on."""

    def __str__(self) -> str:
        parts = {
            "workers added": self.added,
            "workers removed": self.removed,
            "workers changed": self.changed,
            "settings changed": self.applied,
            "for the next start": self.needs_restart,
        }
        return (
            "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names) or "as before"
        )


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """One thing that is wrong with the configuration; line and column where it is one of the file."""

    message: str
    line: int | None = None
    column: int | None = None


class NotReloaded(Exception):
    """The configuration cannot be used as it is; nothing has changed."""

    def __init__(self, faults: Sequence[ConfigFault]) -> None:
        super().__init__("\n".join(fault.message for fault in faults))
        self.faults = tuple(faults)


class Configuration(Protocol):
    """The settings that are in force, and the way to read them again."""

    def shown(self) -> Mapping[str, object]:
        """As JSON, without secrets."""
        ...

    async def reload(self, by: str) -> Reloaded:
        """Raises `NotReloaded`. `by`: who wants it, for the log."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What can be seen and moved."""

    snapshot: Callable[[], Snapshot]
    drain: Callable[[WorkerId, bool], bool]
    """Lets a worker get nothing new, or takes that back; False: there is no such worker."""
    membership: Membership
    models: FleetModels
    find: Callable[[str], Served | None]
    """A finished request by its id."""
    shelf: Shelf
    configuration: Configuration


# Orders as they come ...


class _Load(Order):
    model: Word
    worker: Word | None = None


class _Unload(_Load):
    force: bool = False


class _Delete(Order):
    model: Word
    worker: Word
    force: bool = False


class _Download(Order):
    repo: Word
    worker: Word | None = None
    workers: Annotated[tuple[Word, ...], Field(strict=False, max_length=MAX_WORKERS_NAMED)] | Word | None = (
        None
    )
    name: Word | None = None
    file: Word | None = None
    revision: Word | None = None


class Admin:
    """The routes under `/admin`."""

    def __init__(
        self,
        door: AdminDoor,
        levers: Levers,
        policy: AdminPolicy | None = None,
        further: Sequence[web.AbstractRouteDef] = (),
        audit: Audit | None = None,
    ) -> None:
        """`further`: routes of other parts, kept by the same key; their paths without `/admin`. `audit`: None
        where nothing is kept."""
        self._door = door
        self._audit = audit
        self._levers = levers
        self._further = tuple(further)
        self._policy = policy or AdminPolicy()
        self._writing = asyncio.Lock()
        """Of files in the user's folder: one at a time."""

    def application(self) -> web.Application:
        """To be put under `/admin`, within an application that gives a `RequestError` its form."""
        app = web.Application(middlewares=[self._keyed])
        add = app.router
        add.add_get("/requests/{id}/why", self._why)
        add.add_get("/workers", self._workers)
        add.add_post("/workers/{id}/drain", self._draining(on=True))
        for action in ("undrain", "resume"):
            add.add_post(f"/workers/{{id}}/{action}", self._draining(on=False))
        add.add_post("/workers/{id}/admit", self._admit)
        add.add_delete("/workers/{id}", self._remove)
        add.add_get("/models", self._models)
        add.add_post("/models/load", self._load)
        add.add_post("/models/unload", self._unload)
        add.add_post("/models/download", self._download)
        add.add_post("/models/delete", self._delete)
        add.add_post("/models/cancel", self._cancel)
        add.add_get("/presets", self._presets)
        add.add_get("/presets/{name}", self._preset)
        add.add_put("/presets/{name}", self._put_preset)
        add.add_delete("/presets/{name}", self._delete_preset)
        add.add_get("/config", self._config)
        add.add_post("/config/reload", self._reload)
        add.add_get("/audit", self._audited)
        app.add_routes(self._door.routes())
        app.add_routes(self._further)
        return app

    @web.middleware
    async def _keyed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Nothing is told to who has no key: not even whether a path exists. Every change that is asked for
        leaves a record."""
        try:
            request[WHO] = self._door.let_in(request)
        except RequestError as refusal:
            is_guess = isinstance(refusal, (KeyWrong, TooManyGuesses))
            if is_guess or request.method not in SAFE_METHODS:
                self._refused(request, refusal.status, refusal.code or refusal.type)
            raise
        status, refused = 499, None  # as they stay for who leaves before there is an answer
        try:
            response = await handler(request)
            status = response.status
            return response
        except RequestError as refusal:
            status, refused = refusal.status, refusal.code or refusal.type
            raise
        except web.HTTPNotFound:
            status = 404
            raise NotFound(f"There is no {request.path} here: docs/ADMIN.md lists what there is.") from None
        except web.HTTPException as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            if request[WHO] == NOBODY_YET:  # nor now: the key was not right, or did not come
                self._refused(request, status, refused)
            elif request.method not in SAFE_METHODS:
                self._recorded(request, status)

    def _recorded(self, request: web.Request, status: int) -> None:
        if self._audit is not None:
            self._audit.record(
                **_circumstances(request),
                targets={**request.match_info, **request.get(TARGETS, {})},
                status=status,
                **request.get(RECORDED, {}),
            )

    def _refused(self, request: web.Request, status: int, refused: str | None) -> None:
        """Who comes with a wrong key, and who tries to change something without any."""
        if self._audit is not None:
            self._audit.refused(**_circumstances(request), status=status, refused=refused)

    # Workers

    async def _why(self, request: web.Request) -> web.Response:
        """Why a finished request went where it went. Holds no text of it."""
        served = self._levers.find(request.match_info["id"])
        if served is None:
            raise NotFound(
                "No finished request of that id is remembered: it may be too long ago, or still under way."
            )
        return _json(why(served))

    async def _workers(self, _request: web.Request) -> web.Response:
        levers, room = self._levers, self._levers.snapshot()
        sources, models = levers.membership.sources, _by_worker(levers.models.holdings())
        workers = []
        for view in room.workers:
            report = levers.models.stock.report(view.worker.id)
            workers.append(
                {
                    **worker_body(view),
                    "source": sources.get(view.worker.id, ""),
                    "draining": view.state == "draining",
                    "stuck": view.stuck,
                    "max_concurrent_requests": view.worker.cap,
                    "fallback": view.worker.fallback,
                    "aliases": dict(view.worker.aliases),
                    "models": [_holding_body(one) for one in models.get(view.worker.id, ())],
                    "memory_total_bytes": report.memory_total_bytes if report else None,
                    "memory_held_bytes": report.memory_held_bytes if report else None,
                }
            )
        return _json({**room_body(room), "workers": workers, "removed": levers.membership.banned})

    def _draining(self, *, on: bool) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            await read_order(request, Nothing, self._policy.body_seconds)
            worker_id = WorkerId(request.match_info["id"])
            if not self._levers.drain(worker_id, on):
                raise _no_worker(worker_id)
            _note(request, f"worker {worker_id} {'gets nothing new' if on else 'gets requests again'}")
            return _json({"worker": worker_id, "draining": on})

        return handle

    async def _remove(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing, self._policy.body_seconds)
        membership, worker_id = self._levers.membership, WorkerId(request.match_info["id"])
        source = membership.sources.get(worker_id)
        try:
            if not membership.remove(worker_id):
                raise _no_worker(worker_id)
        except TooManyBanned as error:
            raise Conflict(f"{error}: let some in again, or restart the balancer.") from None
        _note(request, f"worker {worker_id} is removed from the room")
        until = (
            "the configuration is read again, the balancer restarts"
            if source == "config"
            else "the balancer restarts, however often it announces itself"
        )
        undo = f"`balancer remove {worker_id} --undo` (POST /admin/workers/{worker_id}/admit)"
        note = f"It stays out until {until}, or {undo}. What runs may finish."
        return _json({"worker": worker_id, "removed": True, "source": source, "note": note})

    async def _admit(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing, self._policy.body_seconds)
        membership, worker_id = self._levers.membership, WorkerId(request.match_info["id"])
        if not membership.admit(worker_id):
            raise NotFound(f"No worker {worker_id!r} was removed: GET /admin/workers lists those that were.")
        _note(request, f"worker {worker_id} may belong to the room again")
        back = worker_id in membership.sources
        note = "It is in the room." if back else "It is in the room as soon as it announces itself again."
        return _json({"worker": worker_id, "removed": False, "note": note})

    # Models

    async def _models(self, _request: web.Request) -> web.Response:
        models = self._levers.models
        by_name: dict[str, list[Holding]] = {}
        for holding in models.holdings():
            for name in holding.names:
                by_name.setdefault(name, []).append(holding)
        return _json(
            {
                "models": [
                    {
                        "name": name,
                        **_together(there),
                        "workers": [_holding_body(one, of=name) for one in there],
                    }
                    for name, there in sorted(by_name.items())
                ],
                "downloads": [
                    {"worker": worker_id, **one.model_dump(mode="json")}
                    for worker_id, one in models.downloads()
                ],
            }
        )

    async def _load(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Load, self._policy.body_seconds)
        work = self._levers.models.load(order.model, order.worker)
        return await self._ordered(request, Action.LOAD, order.model, work)

    async def _unload(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Unload, self._policy.body_seconds)
        work = self._levers.models.unload(order.model, order.worker, force=order.force)
        return await self._ordered(request, Action.UNLOAD, order.model, work)

    async def _delete(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Delete, self._policy.body_seconds)
        work = self._levers.models.delete(order.model, order.worker, force=order.force)
        return await self._ordered(request, Action.DELETE, order.model, work)

    async def _download(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Download, self._policy.body_seconds)
        named = order.worker if order.workers is None else order.workers
        workers = (named,) if isinstance(named, str) else named
        if not workers or (order.worker is not None and order.workers is not None):
            raise BadRequest(
                f'Say where to: "worker": "ID", "workers": ["ID", ...] or "workers": "{EVERYBODY}".',
                param="workers",
            )
        told = ModelOrder(
            name=order.name or order.repo,
            repo=order.repo,
            file=order.file,
            revision=order.revision,
        )
        work = self._levers.models.download(told, workers)
        return await self._ordered(request, Action.DOWNLOAD, order.repo, work)

    async def _cancel(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Load, self._policy.body_seconds)
        work = self._levers.models.cancel(order.model, order.worker)
        return await self._ordered(request, Action.CANCEL, order.model, work)

    async def _ordered(
        self, request: web.Request, action: Action, model: str, work: Awaitable[Sequence[Outcome]]
    ) -> web.Response:
        try:
            outcomes = await work
        except asyncio.CancelledError:
            _note(request, f"{action} {model}: left before it was known how that went")
            raise
        said = "; ".join(f"{one.worker}: {one.status} {one.detail}" for one in outcomes)
        _note(request, f"{action} {model}: {said}")
        return _outcome(action, model, outcomes)

    # Presets

    async def _presets(self, _request: web.Request) -> web.Response:
        shelf = self._levers.shelf
        found = await asyncio.to_thread(shelf.all)
        return _json({"folder": str(shelf.own), "presets": [_preset_line(one) for one in found]})

    async def _preset(self, request: web.Request) -> web.Response:
        try:
            preset: Preset = await asyncio.to_thread(self._levers.shelf.get, request.match_info["name"])
        except PresetError as error:
            raise NotFound(str(error)) from None
        return _json(preset.model_dump(mode="json"))

    async def _put_preset(self, request: web.Request) -> web.Response:
        data = await read_body(request, MAX_PRESET_BYTES, self._policy.body_seconds)
        name, shelf = request.match_info["name"], self._levers.shelf
        async with self._writing:
            await self._insist_on_own(name)
            try:
                is_new = await asyncio.to_thread(shelf.keep, name, data)
            except PresetError as error:
                raise BadRequest(f"This preset cannot be kept: {error}") from None
            except OSError as error:
                raise _unwritable(shelf, error) from error
        _note(request, f"preset {name} is {'added' if is_new else 'replaced'}")
        return _json({"preset": name, "created": is_new}, status=201 if is_new else 200)

    async def _delete_preset(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing, self._policy.body_seconds)
        name, shelf = request.match_info["name"], self._levers.shelf
        async with self._writing:
            await self._insist_on_own(name)
            try:
                was_there = await asyncio.to_thread(shelf.discard, name)
            except PresetError as error:
                raise BadRequest(str(error)) from None
            except OSError as error:
                raise _unwritable(shelf, error) from error
        if not was_there:
            raise NotFound(f"{shelf.own} holds no preset {name!r}: GET /admin/presets lists what there is.")
        _note(request, f"preset {name} is removed")
        return _json({"preset": name, "deleted": True})

    async def _insist_on_own(self, name: str) -> None:
        if await asyncio.to_thread(self._levers.shelf.is_built_in, name):
            raise Conflict(
                f"The preset {name!r} came with the program and stays as it is: take another name."
            )

    # Configuration

    async def _config(self, _request: web.Request) -> web.Response:
        return _json(self._levers.configuration.shown())

    async def _reload(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing, self._policy.body_seconds)
        configuration = self._levers.configuration
        before = _digest(configuration.shown())
        try:
            told = await configuration.reload(f"admin {request.remote}")
        except NotReloaded as refused:
            request[RECORDED] = {"before": before, "after": before}
            log.info(
                "admin %s: the configuration stays as it is: %d faults", request.remote, len(refused.faults)
            )
            return _faulty(refused)
        request[RECORDED] = {"before": before, "after": _digest(configuration.shown()), "what": str(told)}
        return _json(dataclasses.asdict(told))

    # Audit

    async def _audited(self, request: web.Request) -> web.Response:
        """The newest records, newest first."""
        asked = request.query.get("limit", "100")
        if not re.fullmatch(r"[0-9]{1,6}", asked) or not 1 <= int(asked) <= MAX_LISTED:
            raise BadRequest(f"'limit' must be a number from 1 to {MAX_LISTED}.", param="limit")
        try:
            records = await self._audit.last(int(asked)) if self._audit is not None else ()
        except OSError as error:
            raise Conflict(f"The audit log cannot be read: {error.strerror or error}.") from error
        return _json({"records": records})


def _circumstances(request: web.Request) -> dict[str, object]:
    """As a record begins. The route is told as it is written here: what somebody has put into a path may be
    anything."""
    resource = request.match_info.route.resource
    return {
        "who": request.get(WHO, "nobody"),
        "from": request.remote or "",
        "method": request.method,
        "route": resource.canonical if resource is not None else "none",
    }


def _note(request: web.Request, what: str) -> None:
    """Who changed what; names that come from elsewhere begin no line of their own."""
    said = what if what.isprintable() else ascii(what)
    request[RECORDED] = {**request.get(RECORDED, {}), "what": said}
    log.info("admin %s: %s", request.remote, said)


def _digest(shown: Mapping[str, object]) -> str:
    """By which two configurations are told apart."""
    return sha256(orjson.dumps(shown, default=str, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _no_worker(worker_id: WorkerId) -> NotFound:
    return NotFound(f"There is no worker {worker_id!r}: `balancer workers` lists them.")


def _unwritable(shelf: Shelf, error: OSError) -> Conflict:
    return Conflict(
        f"{shelf.own} cannot be written to: {error.strerror or error}. See to the folder's rights."
    )


# What is answered ...


def _by_worker(holdings: Sequence[Holding]) -> dict[WorkerId, list[Holding]]:
    found: dict[WorkerId, list[Holding]] = {}
    for holding in holdings:
        found.setdefault(holding.worker, []).append(holding)
    return found


def _holding_body(holding: Holding, of: str | None = None) -> dict[str, object]:
    """`of`: the public name under which it is listed; None: it is listed under its worker."""
    body: dict[str, object] = {"worker": holding.worker, "own_name": holding.name}
    if of is None:
        body = {"name": holding.name, "names": holding.names}
    return body | {
        "state": holding.state.value,
        "progress": holding.progress,
        "eta_seconds": holding.eta_seconds,
        "load_seconds": holding.load_seconds,
        "size_bytes": holding.size_bytes,
        "memory_bytes": holding.memory_bytes,
        "engine": holding.engine,
        "detail": holding.detail,
    }


_BEST_FIRST = (ModelState.LOADED, ModelState.LOADING, ModelState.UNLOADED, ModelState.FAILED)


def _together(holdings: Sequence[Holding]) -> dict[str, object]:
    """How a model is over the whole room: as where it is best."""
    best = min(holdings, key=lambda one: (_BEST_FIRST.index(one.state), -(one.progress or 0.0)))
    return {"state": best.state.value, "progress": best.progress, "eta_seconds": best.eta_seconds}


def _outcome(action: Action, model: str, outcomes: Sequence[Outcome]) -> web.Response:
    """200 where all that worked is done, 202 where some is only begun; 409 or 502 where nothing worked."""
    results = [
        {"worker": one.worker, "ok": one.ok, "status": one.status, "detail": one.detail} for one in outcomes
    ]
    body: dict[str, Any] = {"action": action.value, "model": model, "results": results}
    worked = [one.status for one in outcomes if one.ok]
    if worked:
        return _json(body, status=max(worked))
    status = 502 if any(one.status >= 500 for one in outcomes) else 409
    said = "; ".join(f"{one.worker}: {one.detail}" for one in outcomes)
    error = {
        "message": f"The order could not be carried out. {said}.",
        "type": "server_error" if status == 502 else "invalid_request_error",
        "param": None,
        "code": "no_worker_did_it",
    }
    return _json({"error": error, **body}, status=status)


def _faulty(refused: NotReloaded) -> web.Response:
    """In the form of every error, and each fault by itself."""
    error = {
        "message": f"The configuration stays as it is; mend this, and reload again:\n{refused}",
        "type": "invalid_request_error",
        "param": None,
        "code": "config_faults",
        "faults": [dataclasses.asdict(fault) for fault in refused.faults],
    }
    return _json({"error": error}, status=422)


def _preset_line(found: Found) -> dict[str, object]:
    preset = found.preset
    return {
        "name": found.name,
        "own": found.own,
        "description": preset.description if preset else "",
        "prompts": len(preset.prompts) if preset else 0,
        "faults": found.faults,
    }


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
