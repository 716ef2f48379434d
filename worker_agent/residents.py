"""The models of this machine: loads, unloads and counts as `residency` decides, and keeps the line of those
who wait for one.

The one owner of the engines. Others enter (`entered`), give orders (`load`, `unload`) and read what is true
now. What fits is measured anew before each load.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from worker_agent.changes import Changes
from worker_agent.engines.choice import DoesNotFit, NoChoice
from worker_agent.exchange import Fault, Refused
from worker_agent.memory import MemoryNow, Pool
from worker_agent.offers import Offer
from worker_agent.plans import Plan
from worker_agent.residency import Command, Load, Phase, Refuse, Residency, ResidencyPolicy, Terms, Unload
from worker_agent.resident import CONNECT_SECONDS, Resident
from worker_agent.supervised import SupervisedEngine
from worker_agent.supervision import State, SupervisionPolicy
from worker_agent.watch import WatchPolicy
from worker_agent.wire import EngineState

_LOG = logging.getLogger(__name__)
_GIB = 2**30
STOPPING = Fault("stopping", "this machine is about to stop: ask again")
_UNLOADED = Fault("model_unloaded", "the model was unloaded by order: ask again")
_MOST_PROGRESS = 0.99  # until it has generated a token
_ENGINE_SECONDS: Mapping[str, float] = {"vllm": 60.0}  # from spawn to ready beside reading weights
_OTHER_ENGINE_SECONDS = 3.0
_BYTES_PER_SECOND = 1e9  # of weights read from disk
_UNKNOWN_LOAD_SECONDS = 60.0  # of a model whose size nobody knows
_MOST_GUESSED_PROGRESS = 2 / 3  # where the time that a load takes was never measured
_NUMBER = re.compile(r"\d+(\.\d+)?")

Measure: TypeAlias = Callable[[Collection[int], Mapping[Pool, int]], Mapping[Pool, MemoryNow]]
"""What models may take of each pool now (`available_bytes`), those included that run below these process ids;
second what those of them that serve were given, in bytes. Blocks: for a thread."""


def _supervision(plan: Plan) -> SupervisionPolicy:
    limit = plan.spec.start_limit_seconds
    usual = SupervisionPolicy(start_limit_seconds=limit)
    # A load that hangs to its limit each time must come to an end, too.
    window = usual.fault_window_seconds + usual.faults_to_fail * limit
    return replace(usual, fault_window_seconds=window)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentsPolicy:
    """Bounds, in seconds where they are times."""

    most_models: int = 64
    """A report of so many stays well below its limit."""
    most_waiting: int = 64
    """Requests that wait for models, all together."""
    slots: int | None = None
    """Requests at once on the whole machine; None: as many as the model with the most slots has."""
    told_failed_seconds: float = 30.0
    """So long a model that did not fit is told as one that cannot be loaded; memory changes."""
    failed_rest_seconds: float = 600.0
    """Until one whose engine died too often is tried again for somebody who asks; never, where it was loaded
    at the agent's start."""
    preload_again_seconds: float = 15.0
    """For one that did not fit at the agent's start."""
    plan_again_seconds: float = 60.0
    """For a model for which nothing could be found to run."""
    same_memory_seconds: float = 2.0
    same_plan_seconds: float = 10.0
    look_seconds: float = 0.25
    """How often is looked for slots that engines have freed, while somebody waits for one."""
    connect_seconds: float = CONNECT_SECONDS
    residency: ResidencyPolicy = field(default_factory=ResidencyPolicy)
    watch: WatchPolicy = field(default_factory=WatchPolicy)
    supervision: Callable[[Plan], SupervisionPolicy] = _supervision


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a model is at this moment."""

    offer: Offer
    phase: Phase
    plan: Plan | None
    """None: not known yet, or there is none."""
    resident: Resident | None
    engine: EngineState | None
    """Of its engine, where there is one."""
    progress: float | None
    eta_seconds: float | None
    """Until it answers, where it does not."""
    load_seconds: float
    detail: str
    fault: bool
    """It cannot be loaded as things are."""
    at_start: bool
    """It is loaded because the agent starts, and has not been ready yet."""


@dataclass(slots=True, eq=False)
class _Model:
    offer: Offer
    plan: Plan | None = None
    planned_at: float = -math.inf
    fault: str = ""
    fault_code: str = ""
    fault_ends: float = -math.inf
    logged: set[str] = field(default_factory=set)
    """Why it could not be loaded, numbers apart, since it was last loaded or ordered."""
    engine: SupervisedEngine | None = None
    resident: Resident | None = None
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    line: dict[int, asyncio.Future[Resident]] = field(default_factory=dict)
    starting_since: float | None = None
    load_seconds: float | None = None
    at_start: bool = False
    """It is loaded because the agent starts, and has not been ready yet, or has lost its memory since."""
    again_at: float | None = None
    """When it is to be wished for again."""
    given_up: str = ""
    """It leaves since it could not be loaded and another model is wanted: what went wrong."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    retired: bool = False
    """It was offered once, and is no longer."""

    @property
    def name(self) -> str:
        return self.offer.name


class Residents:
    """All models of one agent."""

    def __init__(self, agent_id: str, measure: Measure, changes: Changes, policy: ResidentsPolicy) -> None:
        self._agent_id = agent_id
        self._measure = measure
        self._changes = changes
        self._policy = policy
        self._residency = Residency(policy.residency)
        self._models: dict[str, _Model] = {}
        self._room: Mapping[Pool, MemoryNow] = {}
        self._measured_at = -math.inf
        self._keys = itertools.count()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._tasks: asyncio.TaskGroup | None = None
        self._living: set[asyncio.Task[None]] = set()

    # What there is

    def offer(self, offers: Sequence[Offer]) -> None:
        """These can be loaded, and no others; what is loaded stays until it is unloaded."""
        wanted: dict[str, Offer] = {}
        for offer in offers:
            if len(wanted) == self._policy.most_models and offer.name not in wanted:
                _LOG.warning(
                    "%s is left out: an agent tells of %d models at most",
                    offer.name,
                    self._policy.most_models,
                )
                continue
            wanted.setdefault(offer.name, offer)
        for name, offer in wanted.items():
            known = self._models.get(name)
            if known is None:
                self._add(offer)
                continue
            known.retired = False
            if known.offer is not offer:
                known.offer, known.planned_at = offer, -math.inf
        for name in [name for name in self._models if name not in wanted]:
            self._retire(self._models[name])
        ordered = [*wanted, *(name for name in self._models if name not in wanted)]
        self._models = {name: self._models[name] for name in ordered}
        self._look_again()

    def _add(self, offer: Offer) -> None:
        model = self._models[offer.name] = _Model(offer, offer.expected)
        self._residency.offer(offer.name, self._terms(model))
        if offer.preload:
            model.at_start = True
            self._residency.wish(offer.name, _now(), lasting=True)

    def _retire(self, model: _Model) -> None:
        """Nobody may ask for it any more; it is forgotten once it works for nobody."""
        model.retired = True
        self._turn_away(model, lambda: _no_longer_here(model.name))
        if not self._residency.is_idle(model.name):
            return
        if model.resident is not None:
            self._residency.dismiss(model.name)
            model.leave.set()
        else:
            del self._models[model.name]
            self._residency.withdraw(model.name)

    def knows(self, name: str) -> bool:
        """Whether it can be asked for."""
        model = self._models.get(name)
        return model is not None and not model.retired

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for."""
        return tuple(name for name, model in self._models.items() if not model.retired)

    def plan(self, name: str) -> Plan | None:
        """What runs for it, or would; None: not known yet, or nothing does."""
        model = self._models[name]
        return model.plan if model.resident is None else model.resident.plan

    def resident(self, name: str) -> Resident | None:
        """Its engine, if there is one."""
        return self._models[name].resident

    @property
    def slots(self) -> int:
        """How many requests run here at once."""
        plans = (model.plan.slots for model in self._models.values() if model.plan is not None)
        return self._policy.slots or max(plans, default=1)

    @property
    def running(self) -> int:
        """Requests held open towards engines now."""
        return sum(resident.watch.open for resident in self._residents())

    @property
    def taken(self) -> int:
        """Slots that are taken: by those, and by what engines still do for clients that have left."""
        return sum(resident.watch.taken for resident in self._residents())

    @property
    def waiting(self) -> int:
        """Requests that wait for a model."""
        return self._waiting

    @property
    def memory(self) -> tuple[int, int] | None:
        """What models may take here and what the loaded ones have been given, in bytes: of the GPU's memory,
        where it has its own. As last measured; None: not yet."""
        pool = next((pool for pool in (Pool.VRAM, Pool.RAM) if pool in self._room), None)
        if pool is None:
            return None
        return self._room[pool].available_bytes, self._residency.held_bytes().get(pool, 0)

    def standings(self) -> tuple[Standing, ...]:
        """Of every model."""
        now = _now()
        return tuple(self._standing(model, now) for model in self._models.values())

    # A request for one ...

    @contextlib.asynccontextmanager
    async def entered(self, name: str, wait_seconds: float) -> AsyncIterator[Resident]:
        """The model is loaded and has a free slot, and is not unloaded while the block lasts; the slot is
        to be taken before anything is awaited.

        Waits for its load no longer than that. Raises `Refused`. `name` is one that it `knows`.
        """
        model = self._models[name]
        resident = self._at_once(model)
        if resident is None:
            resident = await self._in_line(model, wait_seconds)
        else:
            self._residency.begins(name, _now())
        try:
            yield resident
        finally:
            self._residency.ends(name, _now())
            timed = model.offer.ttl_seconds is not None and self._residency.is_idle(name)
            if timed or model.retired or self._waiting or self._residency.wanted():
                self._look_again()

    def _at_once(self, model: _Model) -> Resident | None:
        """Where it can go now; None: it has to wait. Raises `Refused`."""
        phase = self._residency.phase(model.name)
        if phase is Phase.FAILED:
            if _now() < model.fault_ends:
                raise _not_ready(EngineState.FAILED, model.fault)
            self._residency.forgive(model.name)
            return None
        if model.engine is not None and model.engine.state in (State.RESTING, State.ENDING, State.FAILED):
            raise self._down(model)
        resident = model.resident
        if phase is not Phase.READY or resident is None or resident.serving is None:
            return None
        slots = resident.plan.slots
        if resident.taken + len(model.line) >= slots:
            raise Refused(429, "no_free_slot", f"all {slots} slots are taken", retry_after=1)
        # Those who wait for a slot of a model that serves come first.
        waiting = sum(
            len(each.line)
            for each in self._models.values()
            if each.resident is not None and each.resident.serving is not None
        )
        if self._taken + waiting >= self.slots:
            message = f"all {self.slots} slots of this machine are taken"
            raise Refused(429, "no_free_slot", message, retry_after=1)
        return resident

    async def _in_line(self, model: _Model, wait_seconds: float) -> Resident:
        """Its requests count from here on. Raises `Refused`."""
        if self._waiting >= self._policy.most_waiting:
            message = f"{self._waiting} requests wait for models here already"
            raise Refused(429, "too_many_waiting", message, retry_after=5)
        eta = self._eta(model, _now())
        if eta is not None and eta > wait_seconds:
            self._residency.promise(model.name, _now())
            self._look_again()
            raise self._loading(model)
        key = next(self._keys)
        waiter: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        model.line[key] = waiter
        self._waiting += 1
        self._residency.waits(model.name, key, _now())
        self._look_again()
        entered = False
        try:
            async with asyncio.timeout(wait_seconds):
                resident = await waiter
            if resident.serving is None:
                raise self._down(model)  # since the very moment in which it was let in
            entered = True
            return resident
        except TimeoutError:
            if self._models.get(model.name) is not model:
                raise _no_longer_here(model.name) from None
            self._residency.promise(model.name, _now())
            raise self._loading(model) from None
        finally:
            self._waiting -= 1
            if model.line.pop(key, None) is not None:
                self._residency.waits_no_more(model.name, key)
                self._look_again()
            elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().coming -= 1
                if not entered:  # its client left, or its time was over, in the very moment
                    self._residency.ends(model.name, _now())
                    self._look_again()

    def _admit(self, model: _Model) -> None:
        """Lets in who waits, as far as there are slots."""
        resident = model.resident
        if (
            resident is None
            or resident.serving is None
            or self._residency.phase(model.name) is not Phase.READY
        ):
            return
        while model.line and resident.taken < resident.plan.slots and self._taken < self.slots:
            key = next(iter(model.line))
            waiter = model.line.pop(key)
            self._residency.waits_no_more(model.name, key)
            if not waiter.done():
                self._residency.begins(model.name, _now())
                resident.coming += 1
                waiter.set_result(resident)

    def _turn_away(self, model: _Model, refused: Callable[[], Refused]) -> None:
        """Refuses all who wait for it."""
        for key, waiter in model.line.items():
            self._residency.waits_no_more(model.name, key)
            if not waiter.done():
                waiter.set_exception(refused())
        model.line.clear()

    def _down(self, model: _Model) -> Refused:
        if model.engine is None:
            return _not_ready(EngineState.STOPPING, "")
        return _not_ready(model.engine.state.reported, model.engine.detail)

    @property
    def _taken(self) -> int:
        return sum(resident.taken for resident in self._residents())

    def _loading(self, model: _Model) -> Refused:
        standing = self._standing(model, _now())
        eta = standing.eta_seconds
        told = "" if eta is None else f": about {eta:.0f} s to go"
        return Refused(
            503,
            "model_loading",
            f"{model.name} is being loaded{told}",
            retry_after=max(1, math.ceil(eta or 1.0)),
            more={
                "loading": {
                    "worker": self._agent_id,
                    "progress": standing.progress or 0.0,
                    "eta_seconds": eta,
                }
            },
        )

    # ... and orders

    def load(self, name: str) -> None:
        """Loads it as soon as there is room, also one that failed. How that goes is told by its standing."""
        model = self._models[name]
        self._residency.forgive(name)
        model.fault, model.fault_ends, model.planned_at = "", -math.inf, -math.inf
        model.logged.clear()
        if self._residency.phase(name) not in (Phase.LOADING, Phase.READY):
            self._residency.wish(name, _now(), lasting=True)
        self._look_again()

    async def unload(self, name: str, *, force: bool = False) -> None:
        """Returns when its engine is gone. Raises `Refused` where it is at work, unless by force."""
        model = self._models[name]
        model.again_at, model.at_start = None, False
        if not force and not self._residency.is_idle(name):
            raise Refused(
                409,
                "model_busy",
                f"{name} answers requests: unload it when they have ended, or end them with force",
            )
        self._residency.dismiss(name)
        self._turn_away(model, lambda: _refused_by(_UNLOADED))
        if model.resident is None:
            return
        model.resident.watch.stop_all(_UNLOADED)
        model.leave.set()
        await model.gone.wait()

    # The agent's life

    @contextlib.asynccontextmanager
    async def running_engines(self) -> AsyncIterator[None]:
        """Models are loaded and unloaded while the block lasts; no engine is left afterwards."""
        async with asyncio.TaskGroup() as self._tasks:
            control = self._tasks.create_task(self._control())
            try:
                yield
            finally:
                control.cancel()
                for task in tuple(self._living):
                    task.cancel()

    def drain(self) -> None:
        """Loads nothing more, and turns away who waits; those that run go on."""
        self._stopping = True
        for model in self._models.values():
            self._turn_away(model, lambda: _refused_by(STOPPING))

    def stop_all(self, fault: Fault) -> None:
        """Ends every request, and tells the other sides why."""
        for resident in self._residents():
            resident.watch.stop_all(fault)

    def cut_all(self) -> None:
        """Ends every connection that has one."""
        for resident in self._residents():
            resident.watch.cut_all()

    def unwant(self) -> None:
        """Stops every engine; `stopped` tells when that is done."""
        self._stopping = True
        for model in self._models.values():
            model.leave.set()
            if model.engine is not None:
                model.engine.unwant()

    async def stopped(self) -> None:
        """Waits until no engine is left after an `unwant`."""
        while self._living:
            await asyncio.wait(tuple(self._living))

    def hurry(self) -> None:
        """Stops that are under way: at once, please."""
        for model in self._models.values():
            if model.engine is not None:
                model.engine.hurry()

    # What is done

    def _look_again(self) -> None:
        self._wake.set()

    async def _control(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_look()):
                    await self._wake.wait()

    async def _step(self) -> None:
        self._wish_again()
        prepared: set[str] = set()
        while new := [name for name in self._residency.wanted() if name not in prepared]:
            await self._prepare(new)
            prepared.update(new)
        if self._stopping:
            return
        commands = self._residency.decide(_now(), self._budget())
        for command in commands:
            self._perform(command)
        for model in tuple(self._models.values()):
            self._admit(model)
            if model.retired:
                self._retire(model)
        if (unplanned := self._unplanned()) is not None:
            await self._prepare([unplanned])
        if commands or unplanned is not None:
            self._changes.announce()

    def _next_look(self) -> float | None:
        if self._unplanned() is not None:
            return _now()
        models = self._models.values()
        at = [self._residency.wake_at, *(model.again_at for model in models)]
        at += [self._plan_again_at(model) for model in models if model.plan is None]
        if any(model.line and model.resident is not None for model in models):
            at.append(_now() + self._policy.look_seconds)
        return min((each for each in at if each is not None), default=None)

    def _wish_again(self) -> None:
        now = _now()
        for model in self._models.values():
            if model.again_at is not None and model.again_at <= now:
                model.again_at = None
                self._residency.forgive(model.name)
                self._residency.wish(model.name, now, lasting=True)

    def _unplanned(self) -> str | None:
        """One that nobody has asked for, and whose numbers are not known yet, or may be other ones by now."""
        now = _now()
        return next(
            (model.name for model in self._models.values() if self._plan_again_at(model) <= now), None
        )

    def _plan_again_at(self, model: _Model) -> float:
        if model.planned_at == -math.inf:
            return model.planned_at
        return math.inf if model.plan is not None else model.planned_at + self._policy.plan_again_seconds

    async def _prepare(self, names: Sequence[str]) -> None:
        """Measures memory, and plans these for it."""
        if _now() - self._measured_at > self._policy.same_memory_seconds:
            await self._look_at_memory()
        for name in names:
            if (model := self._models.get(name)) is not None:
                await self._plan(model)

    async def _look_at_memory(self) -> None:
        pids = [engine.pid for engine in self._engines() if engine.pid is not None]
        self._room = await asyncio.to_thread(self._measure, pids, self._residency.serving_bytes())
        self._measured_at = _now()

    async def _plan(self, model: _Model) -> None:
        plan, fault, code = model.plan, model.fault, model.fault_code
        if _now() - model.planned_at > self._policy.same_plan_seconds:
            offer = model.offer
            try:
                plan = await asyncio.to_thread(offer.plan, self._room_for(model.name))
            except NoChoice as error:
                code = "model_does_not_fit" if isinstance(error, DoesNotFit) else "model_failed"
                plan, fault = None, str(error)
            except OSError as error:  # its file has gone, or its disk
                reason = error.strerror or type(error).__name__
                plan, fault, code = None, f"{model.name} cannot be read: {reason}", "model_failed"
            if self._models.get(model.name) is not model or model.offer is not offer:
                return  # it is another one by now, whose turn comes
            model.planned_at = _now()
        if model.resident is not None:
            return  # it runs as it was planned then
        if plan is None:
            model.plan = None
            self._cannot(model, fault, code, math.inf)  # until there is a plan
        elif model.plan is None and model.fault_ends == math.inf and model.fault:
            model.fault, model.fault_ends = "", -math.inf
        model.plan = plan
        self._residency.offer(model.name, self._terms(model))

    def _budget(self) -> Mapping[Pool, int]:
        return {pool: now.available_bytes for pool, now in self._room.items()}

    def _room_for(self, name: str) -> Mapping[Pool, MemoryNow]:
        """What it may take at most: everything that is not pinned can leave."""
        pinned = self._residency.pinned_bytes(but=name)
        return {
            pool: replace(now, available_bytes=max(0, now.available_bytes - pinned.get(pool, 0)))
            for pool, now in self._room.items()
        }

    def _terms(self, model: _Model) -> Terms:
        return Terms(
            need=None if model.plan is None else model.plan.need,
            pinned=model.offer.pinned,
            ttl_seconds=model.offer.ttl_seconds,
            load_seconds=self._load_seconds(model),
        )

    def _perform(self, command: Command) -> None:
        model = self._models[command.name]
        match command:
            case Load():
                self._load(model)
            case Unload(_, given_up):
                _LOG.info("unloading %s", model.name)
                if given_up and model.engine is not None:
                    model.given_up = f"{model.engine.reason}; others are wanted, so it rests for a while"
                model.leave.set()
            case Refuse(_, why):
                self._cannot(model, why, "model_does_not_fit", _now() + self._policy.told_failed_seconds)

    def _cannot(self, model: _Model, why: str, code: str, told_until: float) -> None:
        """It cannot be loaded as things are: those who wait are told so, and the reports."""
        reason = _NUMBER.sub("", why)  # what is free changes all the time
        if reason not in model.logged:
            model.logged.add(reason)
            _LOG.warning("%s cannot be loaded: %s", model.name, why)
        self._residency.refused(model.name)
        model.fault, model.fault_code, model.fault_ends = why, code, told_until
        if model.at_start:
            model.again_at = _now() + self._policy.preload_again_seconds
        retry_after = math.ceil(self._policy.told_failed_seconds)
        self._turn_away(model, lambda: Refused(503, code, why, retry_after=retry_after))

    def _load(self, model: _Model) -> None:
        plan = model.plan
        assert plan is not None, "it is planned before it is loaded"
        assert self._tasks is not None, "models are loaded only within `running_engines`"
        need = "not known" if plan.need is None else f"{plan.need.total_bytes / _GIB:.1f} GiB"
        _LOG.info("loading %s with %s; it needs %s", model.name, plan.spec.name, need)
        model.fault, model.fault_ends, model.given_up = "", -math.inf, ""
        model.logged.clear()
        model.leave, model.gone = asyncio.Event(), asyncio.Event()
        engine = model.engine = SupervisedEngine(
            plan,
            self._policy.supervision(plan),
            lambda: self._engine_changed(model, engine),
            lambda: self._insist_on_memory(model, engine),
        )
        model.resident = Resident(engine, self._changes, self._policy.watch, self._policy.connect_seconds)
        task = self._tasks.create_task(self._live(model, engine, model.resident, model.leave, model.gone))
        self._living.add(task)
        task.add_done_callback(self._living.discard)

    async def _live(
        self,
        model: _Model,
        engine: SupervisedEngine,
        resident: Resident,
        leave: asyncio.Event,
        gone: asyncio.Event,
    ) -> None:
        """One stay of a model in memory."""
        try:
            async with engine.supervised(), resident.attended():
                engine.want()
                await leave.wait()
                engine.unwant()
                await engine.stopped()
        finally:
            if model.engine is engine:  # else it failed, and is being loaded again already
                model.engine = model.resident = model.starting_since = None
                if model.given_up:
                    self._rest(model, model.given_up, self._policy.failed_rest_seconds)
                self._residency.gone(model.name)
            gone.set()
            self._changes.announce()
            self._look_again()

    def _rest(self, model: _Model, why: str, seconds: float) -> None:
        """It is not loaded for so long; no process is left of it, so that it holds no memory."""
        model.fault, model.fault_ends = why, _now() + seconds
        self._residency.failed(model.name)
        if model.at_start and seconds < math.inf:
            model.again_at = model.fault_ends

    async def _insist_on_memory(self, model: _Model, engine: SupervisedEngine) -> None:
        """Before an engine that died is started again: somebody else may have taken what it had."""
        await self._look_at_memory()
        if model.engine is not engine or model.leave.is_set():
            return
        why = self._residency.why_not_again(model.name, self._budget())
        if why is None:
            return
        self._residency.dismiss(model.name)
        model.at_start = model.at_start or model.offer.preload
        self._cannot(model, why, "model_does_not_fit", _now() + self._policy.told_failed_seconds)
        model.leave.set()
        engine.unwant()

    def _engine_changed(self, model: _Model, engine: SupervisedEngine) -> None:
        if model.engine is not engine:
            return
        match engine.state:
            case State.STARTING:
                model.starting_since = _now()
            case State.READY:
                if model.starting_since is not None:
                    model.load_seconds = _now() - model.starting_since
                    self._residency.offer(model.name, self._terms(model))
                model.starting_since, model.at_start = None, False
                self._residency.loaded(model.name, _now())
            case State.RESTING | State.ENDING:
                model.starting_since = None
                self._residency.stumbled(model.name)
                self._turn_away(model, lambda: self._down(model))
            case State.FAILED:
                rest = math.inf if model.at_start or model.offer.preload else self._policy.failed_rest_seconds
                self._rest(model, engine.detail, rest)
                self._turn_away(model, lambda: _not_ready(EngineState.FAILED, model.fault))
                model.leave.set()
            case _:
                pass
        self._changes.announce()
        self._look_again()

    # What is said

    def _standing(self, model: _Model, now: float) -> Standing:
        phase = self._residency.phase(model.name)
        if phase is Phase.FAILED and now >= model.fault_ends:
            phase = Phase.UNLOADED
        fault = now < model.fault_ends and model.resident is None
        detail = model.fault if fault else ""
        if model.engine is not None and not detail:
            detail = model.engine.detail
        if not detail and model.plan is not None:
            detail = "; ".join(model.plan.advice)
        return Standing(
            offer=model.offer,
            phase=phase,
            plan=self.plan(model.name),
            resident=model.resident,
            engine=self._engine_state(model, fault=fault),
            progress=self._progress(model, now),
            eta_seconds=None if fault else self._eta(model, now),
            load_seconds=self._expected_seconds(model, now),
            detail=detail,
            fault=fault,
            at_start=model.at_start,
        )

    def _engine_state(self, model: _Model, *, fault: bool) -> EngineState | None:
        if model.engine is not None and model.engine.state is not State.STOPPED:
            return model.engine.state.reported
        if fault:
            return EngineState.FAILED
        return EngineState.STARTING if model.at_start else None

    def _load_seconds(self, model: _Model) -> float:
        """What loading it takes: as measured last, else guessed."""
        if model.load_seconds is not None:
            return model.load_seconds
        size = model.offer.model.size_bytes
        if model.plan is None or size is None:
            return _UNKNOWN_LOAD_SECONDS
        engine = _ENGINE_SECONDS.get(model.plan.spec.name, _OTHER_ENGINE_SECONDS)
        return engine + size / _BYTES_PER_SECOND

    def _expected_seconds(self, model: _Model, now: float) -> float:
        """Of the load that is under way, else of the next one. A guess grows with the time that has gone, so
        that nobody is told of an end that does not come."""
        load = self._load_seconds(model)
        if model.starting_since is None or model.load_seconds is not None:
            return load
        return max(load, (now - model.starting_since) / _MOST_GUESSED_PROGRESS)

    def _progress(self, model: _Model, now: float) -> float | None:
        if model.starting_since is None:
            return None
        return min(_MOST_PROGRESS, (now - model.starting_since) / self._expected_seconds(model, now))

    def _eta(self, model: _Model, now: float) -> float | None:
        """Until it can answer; None: it can, or nobody knows."""
        phase = self._residency.phase(model.name)
        load = self._expected_seconds(model, now)
        if model.starting_since is not None:
            gone = now - model.starting_since
            return max(load - gone, 0.2 * gone)  # one that is late is told to be late in proportion
        if phase is Phase.LOADING:
            return load
        if phase is Phase.READY:
            serves = model.resident is not None and model.resident.serving is not None
            return None if serves else load
        room = self._residency.seconds_until_room(model.name, now, self._budget()) if self._room else 0.0
        return None if room is None else room + load

    def _residents(self) -> Iterator[Resident]:
        return (model.resident for model in self._models.values() if model.resident is not None)

    def _engines(self) -> Iterator[SupervisedEngine]:
        return (model.engine for model in self._models.values() if model.engine is not None)


def _not_ready(state: EngineState, detail: str) -> Refused:
    return Refused(503, "engine_not_ready", f"the engine is {state}. {detail}".strip(), retry_after=2)


def _no_longer_here(name: str) -> Refused:
    return Refused(404, "model_not_found", f"{name} is no longer here")


def _refused_by(fault: Fault) -> Refused:
    return Refused(503, fault.code, fault.message, retry_after=5)


def _now() -> float:
    return asyncio.get_running_loop().time()
