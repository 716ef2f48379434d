"""The only place of the agent that builds objects: wiring, the order of starting, and its reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from worker_agent import doctor, wire
from worker_agent import hardware as machine
from worker_agent import installed as environment
from worker_agent.advertise import Presence, advertise
from worker_agent.awake import Awake
from worker_agent.certificate import Certificate
from worker_agent.certificate import kept as kept_certificate
from worker_agent.changes import Changes
from worker_agent.cluster_key import ClusterKey
from worker_agent.cluster_key import found as found_key
from worker_agent.dialing import dial_all
from worker_agent.engines.choice import (
    Choice,
    DoesNotFit,
    Installed,
    NoChoice,
    Wish,
    choose,
    choose_for,
    preferred_format,
)
from worker_agent.finding import found_balancers
from worker_agent.gate import Gate
from worker_agent.gateway import Gateway, GatewayPolicy
from worker_agent.handshake import PLAIN
from worker_agent.hardware import Hardware
from worker_agent.hosts import Hosts, own_names
from worker_agent.identity import Identity, identity
from worker_agent.joining import Joining
from worker_agent.memory import MemoryNow, Pool, budget, held_bytes
from worker_agent.models.catalog import Catalog, NotAModel, describe
from worker_agent.models.downloads import (
    DownloadPolicy,
    DownloadRefused,
    Downloads,
    hub_endpoint,
    hub_token,
)
from worker_agent.models.local import Format, LocalModel
from worker_agent.offers import Offer, without_model
from worker_agent.orders import Orders
from worker_agent.plans import Options, Plan, plan_for
from worker_agent.pressure import Pressure
from worker_agent.report import detail_of, line, served_model, state_of
from worker_agent.residents import Measure, Residents, ResidentsPolicy
from worker_agent.server import ServerPolicy, listening
from worker_agent.settings import ModelOptions, Settings, default_data_dir
from worker_agent.shelf import Shelf
from worker_agent.sources import Sources, is_loopback, parse_networks
from worker_agent.wire import EngineState, Report

_LOG = logging.getLogger("worker_agent")
_BUSY_LOOK_SECONDS = 0.5
_WEIGHTS_SHARE = 0.8  # of what models may take; the rest is for keys and values


class NoParent(Exception):
    """Standard input is nothing whose other end a parent can hold."""


class Stop:
    """Asked once: stop, and let running answers end. Asked twice: stop now."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """By a signal, or by a parent that is gone."""
        (self.hurried if self.asked.is_set() else self.asked).set()


@dataclass(frozen=True, slots=True)
class Inspection:
    """This machine and what would run on it: what `doctor` shows and `run` starts."""

    hardware: Hardware
    installed: Installed
    choice: Choice | NoChoice
    downloaded: LocalModel | None = None
    """Where `--model` is the name of one that was downloaded: that one."""


async def inspect(settings: Settings) -> Inspection:
    """Looks at the machine and chooses. Does not raise for want of an engine: `choice` says so."""
    hardware, found = await asyncio.gather(
        asyncio.to_thread(machine.detect), asyncio.to_thread(environment.detect)
    )
    wish = Wish(engine=settings.engine, model=settings.model, name=settings.name)
    downloaded: LocalModel | None = None
    choice: Choice | NoChoice
    try:
        downloaded = await asyncio.to_thread(_downloaded, settings)
        if downloaded is None:
            choice = choose(hardware, found, wish)
        else:
            own = settings.models.get(downloaded.name, ModelOptions())
            engine = own.engine if settings.engine == "auto" else settings.engine
            choice = choose_for(downloaded, hardware, found, replace(wish, engine=engine))
    except NoChoice as error:
        choice = error
    return Inspection(hardware, found, choice, downloaded)


def _downloaded(settings: Settings) -> LocalModel | None:
    """The model that was downloaded under the name which `--model` gives; None: it gives no such name.

    Blocking. Raises `NoChoice` where that model is damaged. A folder of that name is meant by `./NAME`.
    """
    name = settings.model
    if name is None or "/" in name:
        return None
    try:
        entries = catalog_of(settings).entries()
    except OSError as error:
        _LOG.warning("downloaded models cannot be read: %s", error.strerror or type(error).__name__)
        return None
    entry = next((entry for entry in entries if entry.name == name), None)
    if entry is not None and entry.model is None:
        raise NoChoice(f"{name} is damaged: {entry.fault}; download it again")
    return None if entry is None else entry.model


async def run(settings: Settings, *, exit_with_parent: bool = False) -> None:
    """Runs an agent until it is told to stop.

    Raises `NoParent`, `NoChoice`, `NoIdentity`, `FileFault` or `CannotListen` before anything runs.
    """
    if exit_with_parent:
        _insist_on_parent()
    stop = Stop()
    with _signals(stop):
        inspection = await inspect(settings)
        folder = settings.data_dir or default_data_dir()
        catalog = catalog_of(settings)
        given = None if settings.cluster_key is None else settings.cluster_key.get_secret_value()
        key = await asyncio.to_thread(found_key, folder, given)
        offers = await _offers(settings, inspection, catalog, key)
        with identity(folder, settings.id) as who:
            certificate = await asyncio.to_thread(kept_certificate, who.certificate) if settings.tls else None
            async with contextlib.AsyncExitStack() as stack:
                if exit_with_parent:
                    await stack.enter_async_context(_parent(stop))
                await _serve(settings, _Credentials(who, key, certificate), inspection, catalog, offers, stop)


@dataclass(frozen=True, slots=True)
class _Credentials:
    """By which balancers know this agent."""

    who: Identity
    key: ClusterKey
    certificate: Certificate | None
    """None: it speaks no TLS."""

    @property
    def fingerprint(self) -> str:
        return PLAIN if self.certificate is None else self.certificate.fingerprint


def findings(settings: Settings, inspection: Inspection) -> dict[str, Any]:
    """What `doctor` tells of this machine, ready for JSON. Blocking."""
    models: list[LocalModel] = []
    with contextlib.suppress(OSError):
        models += catalog_of(settings).scan()
    for name, options in settings.models.items():
        with contextlib.suppress(NotAModel):
            if options.path is not None:
                models.append(describe(options.path, name))
    return doctor.findings(
        inspection.hardware,
        inspection.installed,
        inspection.choice,
        machine.measure_memory(),
        options=_main_options(settings, inspection),
        share=settings.memory_share,
        models=models,
    )


def download_policy(settings: Settings, inspection: Inspection) -> DownloadPolicy:
    """How models are fetched. Blocking. Raises `DownloadRefused` where the file that should hold the hub's
    token cannot be read."""
    return DownloadPolicy(
        endpoint=hub_endpoint(os.environ),
        token=hub_token(settings.hub_token_file, os.environ),
        formats=preferred_format(inspection.hardware, inspection.installed),
        limit_bytes=_most_weights(settings.memory_share),
    )


def _most_weights(share: float) -> int | None:
    """What a model's weights may take, so that there is room for its caches; of the GPU's memory where there
    is any."""
    pools = machine.measure_memory()
    pool = pools.get(Pool.VRAM) or pools.get(Pool.RAM)
    return None if pool is None else int(_WEIGHTS_SHARE * share * pool.total_bytes)


def catalog_of(settings: Settings) -> Catalog:
    """Of what was downloaded."""
    return Catalog(settings.models_dir or (settings.data_dir or default_data_dir()) / "models")


@dataclass(frozen=True, slots=True)
class _Offers:
    """What can be loaded here."""

    main: Offer | None
    """The model of `--model`, or the embedded one."""
    given: tuple[Offer, ...]
    """It, and those that the file names with a path."""
    missing: tuple[Offer, ...]
    """Those that the file names without one, while nobody has downloaded them."""
    downloaded: Callable[[LocalModel], Offer]
    nothing: str
    """What to do where there is none at all."""


async def _offers(settings: Settings, inspection: Inspection, catalog: Catalog, key: ClusterKey) -> _Offers:
    """Raises `NoChoice` where the user's own model cannot run, or there is nothing to run and nobody who may
    order anything."""
    choice = inspection.choice
    main: Offer | None = None
    if settings.model is None and settings.models:
        pass  # who names models does not want the small one besides
    elif not isinstance(choice, NoChoice):
        main = await _main_offer(settings, inspection, choice)
    elif (
        settings.model is not None or settings.engine != "auto" or await _has_no_other(settings, catalog, key)
    ):
        raise choice
    given = [] if main is None else [main]
    missing = []
    for name, options in settings.models.items():
        if options.path is None:
            how = f"type: worker-agent models download ORG/MODEL --name {name}"
            why = f"no model called {name} was downloaded; {how}"
            missing.append(without_model(name, why, preload=options.preload))
            continue
        try:
            model = await asyncio.to_thread(describe, options.path, name)
        except NotAModel as error:
            _LOG.warning("%s cannot be served yet: %s", name, error)
            given.append(_once_it_is_there(settings, inspection, name, options.path, options))
        else:
            given.append(_offer(settings, inspection, model, options))

    def downloaded(model: LocalModel) -> Offer:
        return _offer(settings, inspection, model, settings.models.get(model.name, ModelOptions()))

    return _Offers(main, tuple(given), tuple(missing), downloaded, str(choice) if main is None else "")


async def _has_no_other(settings: Settings, catalog: Catalog, key: ClusterKey) -> bool:
    """Nothing beside the main model can be served here, nor can anybody order anything."""
    if settings.models or key.value is not None:
        return False
    try:
        return not await asyncio.to_thread(catalog.scan)
    except OSError:
        return True


async def _main_offer(settings: Settings, inspection: Inspection, choice: Choice) -> Offer:
    if choice.model.lower().endswith(".gguf") and not await asyncio.to_thread(_is_file, choice.model):
        raise NoChoice(f"there is no file {choice.model}")
    options = _main_options(settings, inspection)
    expected: Plan | None = None
    try:
        if inspection.downloaded is None:
            model = await asyncio.to_thread(describe, choice.model, choice.name)
        else:
            model = replace(inspection.downloaded, name=choice.name)
        expected = await asyncio.to_thread(
            plan_for, model, options, inspection.hardware, inspection.installed
        )
    except NotAModel as error:
        raise NoChoice(str(error)) from None
    except DoesNotFit:
        pass  # that is told as long as it is so
    return Offer(
        model=model,
        plan=_planner(inspection, model, options),
        expected=expected,
        preload=True,
        pinned=_own_options(settings, inspection).pin,
    )


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except OSError as error:
        raise NoChoice(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


def _once_it_is_there(
    settings: Settings, inspection: Inspection, name: str, path: str, wished: ModelOptions
) -> Offer:
    """Of a model whose path led nowhere at the agent's start: its disk may be mounted later."""
    placeholder = LocalModel(name=name, path=path, format=Format.HUB)
    offer = _offer(settings, inspection, placeholder, wished)

    def plan(memory: Mapping[Pool, MemoryNow]) -> Plan:
        try:
            found = describe(path, name)
        except NotAModel as error:
            raise NoChoice(str(error)) from None
        return _offer(settings, inspection, found, wished).plan(memory)

    return replace(offer, plan=plan)


def _own_options(settings: Settings, inspection: Inspection) -> ModelOptions:
    """What the file says of the main model, where that is a downloaded one, which may have an entry there."""
    model = inspection.downloaded
    return ModelOptions() if model is None else settings.models.get(model.name, ModelOptions())


def _main_options(settings: Settings, inspection: Inspection) -> Options:
    chosen = None if isinstance(inspection.choice, NoChoice) else inspection.choice
    own = _own_options(settings, inspection)
    return Options(
        engine=settings.engine if chosen is None else chosen.engine.name,
        slots=own.slots or settings.slots,
        context_tokens=own.context_tokens or settings.context_tokens,
        threads=own.threads or settings.threads,
        args=(*own.args, *settings.args),
        environment=own.environment,
    )


def _offer(settings: Settings, inspection: Inspection, model: LocalModel, wished: ModelOptions) -> Offer:
    """A model with the user's options; what they leave out is as for all."""
    options = Options(
        engine=wished.engine,
        slots=wished.slots or settings.slots,
        context_tokens=wished.context_tokens or settings.context_tokens,
        threads=wished.threads or settings.threads,
        args=wished.args,
        environment=wished.environment,
    )
    ttl = wished.keep_alive_seconds
    if ttl is None:  # what is there from the start was not loaded on demand, and stays
        ttl = 0.0 if wished.preload else settings.keep_alive_seconds
    return Offer(
        model=model,
        plan=_planner(inspection, model, options),
        preload=wished.preload,
        pinned=wished.pin,
        ttl_seconds=ttl or None,
    )


def _planner(
    inspection: Inspection, model: LocalModel, options: Options
) -> Callable[[Mapping[Pool, MemoryNow]], Plan]:
    def plan(memory: Mapping[Pool, MemoryNow]) -> Plan:
        return plan_for(model, options, inspection.hardware, inspection.installed, memory)

    return plan


def measuring(share: float, hardware: Hardware) -> Measure:
    """What models may take: this share of what is free and of what they hold already."""

    def measure(pids: Collection[int], given: Mapping[Pool, int]) -> Mapping[Pool, MemoryNow]:
        # Engines grow and end meanwhile: what is free is looked at before and after what they hold, and the
        # less of it counts, so that nothing is counted as both.
        before = machine.measure_memory()
        told = machine.resident_bytes(pids)
        free = _least(before, machine.measure_memory() if pids else before)
        if hardware.gpus and Pool.VRAM not in free:  # its driver did not answer: nobody knows what is free
            total = sum(gpu.memory_bytes for gpu in hardware.gpus)
            free[Pool.VRAM] = MemoryNow(total_bytes=total, available_bytes=0)
        lives = told.get(Pool.RAM, 0) > 0
        measured = {}
        for pool, now in free.items():
            ours = held_bytes(now, told.get(pool, 0), given.get(pool, 0)) if lives else 0
            measured[pool] = replace(now, available_bytes=budget(now, ours, share))
        return measured

    return measure


def _least(one: Mapping[Pool, MemoryNow], other: Mapping[Pool, MemoryNow]) -> dict[Pool, MemoryNow]:
    return {
        pool: min(one[pool], other[pool], key=lambda now: now.available_bytes)
        for pool in one
        if pool in other
    }


async def _serve(
    settings: Settings,
    credentials: _Credentials,
    inspection: Inspection,
    catalog: Catalog,
    offers: _Offers,
    stop: Stop,
) -> None:
    agent_id, fingerprint = credentials.who.id, credentials.fingerprint
    choice, changes = inspection.choice, Changes()
    advice = () if isinstance(choice, NoChoice) else choice.advice
    if isinstance(choice, NoChoice):
        _LOG.info("%s: %s; models are loaded when somebody asks", agent_id, inspection.hardware)
    else:
        _LOG.info("%s: %s; %s, because %s", agent_id, inspection.hardware, choice.engine.name, choice.why)
    for each in advice:
        _LOG.info("advice: %s", each)
    residents = Residents(
        agent_id,
        measuring(settings.memory_share, inspection.hardware),
        changes,
        ResidentsPolicy(slots=settings.slots),
    )
    shelf = Shelf(offers.given, offers.downloaded, catalog, residents, offers.missing)
    downloads = Downloads(catalog, await _download_policy(settings, inspection), changes.announce)
    shelf.fetched_by(downloads)
    shelf.offer_the_given()
    pressure, awake = Pressure(), Awake()

    def report() -> Report:
        standings = residents.standings()
        engine = next((each.plan.spec.name for each in standings if each.plan is not None), "none")
        memory = residents.memory
        state = state_of(standings)
        detail = detail_of(standings) if standings else offers.nothing
        return Report(
            id=agent_id,
            state=EngineState.STOPPING if gateway.draining else state,
            engine=engine,
            models=tuple(map(served_model, standings)),
            slots=pressure.now.slots(residents.slots),
            running=residents.taken,
            hardware=line(str(inspection.hardware)),
            detail=line(detail or pressure.detail),
            advice=tuple(map(line, advice)),
            downloads=shelf.told(),
            memory_total_bytes=None if memory is None else memory[0],
            memory_held_bytes=None if memory is None else memory[1],
        )

    policy = GatewayPolicy(
        sources=_sources(settings),
        hosts=Hosts([*own_names(socket.gethostname()), *settings.allow_hosts]),
        wait_seconds=settings.load_wait_seconds,
    )
    gate = Gate(agent_id, credentials.key, fingerprint, show=_show_on_terminal)
    gateway = Gateway(residents, report, changes, gate, policy, Orders(shelf).routes())
    bounds = ServerPolicy.for_slots(residents.slots)
    tls = None if credentials.certificate is None else credentials.certificate.server_context()
    async with (
        listening(gateway.application(), settings.host, settings.port, bounds, tls) as server,
        residents.running_engines(),
        downloads.running(),
        awake.running(),
    ):
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        _LOG.info("listening on %s://%s:%d", "http" if tls is None else "https", shown, server.port)
        joining = Joining(wire.Join(id=agent_id, port=server.port))
        beside = [shelf.keep_looking(changes), gate.show_codes()]
        if settings.dial_out:
            beside.append(dial_all(settings.balancers, agent_id, lambda: gate.tag, server))
        else:
            beside.append(joining.run(settings.balancers))
        if settings.mdns and not settings.dial_out:
            # Whoever is bound to this machine alone looks for balancers there only.
            links = [settings.host] if is_loopback(settings.host) else None
            beside.append(found_balancers(lambda: gate.tag, joining.found, links, joining.forget_found))
        if settings.mdns:
            beside.append(
                advertise(
                    lambda: Presence(
                        wire.SERVICE_TYPE,
                        wire.Announced(agent_id, gate.tag, fingerprint),
                        settings.host,
                        server.port,
                    ),
                    "balancers will not find this machine by themselves. Start it with `worker-agent join"
                    " INVITATION`, as `balancer cluster invite` shows it, or name it in the balancer's"
                    " workers file",
                )
            )
        if settings.mdns or settings.balancers:
            beside.append(gate.tell_of_silence())
        if settings.spare:
            beside.append(pressure.run(changes.announce))
        if settings.keep_awake:
            beside.append(_keep_awake(awake, pressure, residents, changes))
        async with _meanwhile(beside):
            await stop.asked.wait()
            _LOG.info("stopping; %d requests run", gateway.running)
            gateway.drain()
        await _first(gateway.drained(), stop.hurried.wait(), limit_seconds=settings.drain_seconds)
        if gateway.running:
            _LOG.warning("ending %d requests that still run", gateway.running)
        await gateway.close()
        residents.unwant()
        await _first(residents.stopped(), stop.hurried.wait())
        residents.hurry()
        await residents.stopped()
    _LOG.info("stopped")


def _show_on_terminal(text: str) -> None:
    """For whoever sits before this machine; elsewhere the log has it."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\n    {text}\n\n")
        sys.stdout.flush()


async def _download_policy(settings: Settings, inspection: Inspection) -> DownloadPolicy:
    """Without the token that a file should hold, public models can be fetched still."""
    try:
        return await asyncio.to_thread(download_policy, settings, inspection)
    except DownloadRefused as refused:
        _LOG.warning("%s: only public models can be downloaded", refused)
        without = settings.model_copy(update={"hub_token_file": None})
        return await asyncio.to_thread(download_policy, without, inspection)


async def _keep_awake(awake: Awake, pressure: Pressure, residents: Residents, changes: Changes) -> None:
    """Tells who holds the machine awake when requests run or wait, until cancelled."""
    told = False
    while True:
        change = changes.next
        busy = bool(residents.running or residents.waiting) and not pressure.now.saving
        if busy != told:
            told = busy
            awake.set(busy)
        await change.wait()
        await asyncio.sleep(_BUSY_LOOK_SECONDS)  # what begins and ends within a moment keeps nothing awake


def _sources(settings: Settings) -> Sources:
    """Private networks, those that were named, and this machine itself, which may have public addresses."""
    own = (
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    )
    return Sources((*settings.allow_networks, *parse_networks(list(own))))


@contextlib.asynccontextmanager
async def _meanwhile(work: list[Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Runs these beside the block, and ends them with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _first(*what: Awaitable[object], limit_seconds: float | None = None) -> None:
    """Waits for the first of these, no longer than the limit, and ends the others."""
    tasks = [asyncio.ensure_future(each) for each in what]
    try:
        await asyncio.wait(tasks, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in wanted:
        loop.add_signal_handler(number, stop.ask)
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


def _insist_on_parent() -> None:
    """Raises `NoParent`. Asked first: uvloop aborts the whole process for an input that it cannot watch."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        mode = 0
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise NoParent(
            "--exit-with-parent needs a standard input that is a pipe or a socket, whose other end the parent"
            " holds open; without one, leave the flag out"
        )


class _ParentWatch(asyncio.Protocol):
    """The end of our standard input: whoever holds its other end is gone."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def connection_lost(self, exc: Exception | None) -> None:
        """Also called after an end of file."""
        if not self._stop.asked.is_set():
            self._stop.ask()


@contextlib.asynccontextmanager
async def _parent(stop: Stop) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: _ParentWatch(stop), sys.stdin)
    try:
        yield
    finally:
        transport.close()
