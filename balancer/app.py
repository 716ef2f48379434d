"""The only place that builds the balancer: what exists, who is given what, in which order it starts."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import random
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_network

import aiohttp

from balancer import keys
from balancer.admin import Admin, AdminPolicy, ConfigFault, Levers, NotReloaded, Reloaded
from balancer.batch.presets import Shelf, own_folder
from balancer.config_file import ConfigFaults, Fault, Tunables
from balancer.connections import ConnectionPolicy
from balancer.core.admission import AdmissionPolicy
from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.dispatcher import Dispatcher, DispatchPolicy, HedgePolicy, Snapshot
from balancer.core.errors import Conflict, ShuttingDown
from balancer.core.model import Draining, Event, Served, Worker, WorkerId
from balancer.core.placement import PlacementPolicy
from balancer.core.retry import RetryPolicy
from balancer.discovery import Browser, Entry, NotAdmitted, Roster, own_interfaces
from balancer.fleet_models import FleetModels, Stock
from balancer.front import Front, FrontPolicy
from balancer.history import History
from balancer.hot_path import HttpServer, ServerPolicy
from balancer.inference import Inference, InferencePolicy
from balancer.journey import Journey, JourneyPolicy, Observer
from balancer.keys import AdminKey
from balancer.leases import TICK_SECONDS, Leases
from balancer.metrics import Metrics
from balancer.origins import OriginPolicy, Origins
from balancer.relay import Relay
from balancer.settings import Settings, SettingsError
from balancer.upstream import TimeoutPolicy, Upstream
from balancer.watch import Watches, WatchPolicy
from worker_agent.sources import Network, Sources
from worker_agent.wire import Join

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2.0
"""To tell the clients of what was cut short."""


LIVE_SETTINGS = frozenset({"log_level"})
"""Beside the workers, what takes effect when the configuration is read again."""


class PortTaken(Exception):
    """Somebody listens on the address already."""


@dataclass(frozen=True, slots=True)
class Stop:
    """How a person or a service manager asks us to end."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    hurried: asyncio.Event = field(default_factory=asyncio.Event)
    """Asked again: nothing is waited for any more."""

    def signal(self) -> None:
        """The first call asks, every further one hurries."""
        (self.hurried if self.asked.is_set() else self.asked).set()


class Running:
    """A balancer that listens."""

    def __init__(
        self,
        port: int,
        leases: Leases,
        journey: Journey,
        inference: Inference,
        server: HttpServer,
        drain_seconds: float,
        *,
        cluster_key: str,
        configuration: LiveConfiguration,
        hands_over: bool,
    ) -> None:
        """`hands_over`: the socket is inherited, and another process will accept from it."""
        self.port = port
        self.cluster_key = cluster_key
        """For an agent of our own."""
        self._configuration = configuration
        self._server = server
        self._hands_over = hands_over
        self._leases = leases
        self._journey = journey
        self._inference = inference
        self._drain_seconds = drain_seconds

    def snapshot(self) -> Snapshot:
        return self._leases.snapshot()

    @property
    def under_way(self) -> int:
        """Requests that have not ended."""
        return self._journey.under_way

    def reload(self) -> None:
        """The configuration is read again, in a while; the log says what came of it."""
        self._configuration.reload_soon("SIGHUP")

    async def drain(self, stop: Stop) -> None:
        """Take nothing new, and let what is under way finish: for `drain_timeout`, or until hurried. What
        is under way then is ended, and its clients are told.

        Where the socket is handed over, new clients reach another process; those that are connected here
        are served until each has had one more answer, which tells it that its connection ends.
        """
        if self._hands_over:
            self._server.retire()
            over = self._server.emptied
        else:
            self._inference.draining = True
            over = self._journey.idle
        waits = [asyncio.ensure_future(event.wait()) for event in (over, stop.hurried)]
        try:
            await asyncio.wait(waits, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._inference.draining = True
        self._journey.end_all(ShuttingDown("The balancer is stopping. Ask again in a moment."))
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._journey.idle.wait()


class LiveConfiguration:
    """The settings that are in force, which the same file, variables and flags may change while all runs."""

    def __init__(self, settings: Settings, put_room: Callable[[Sequence[Entry]], None]) -> None:
        self._settings = settings
        self._room = settings.room
        self._log_level = settings.log_level
        self._put_room = put_room
        self._reading = asyncio.Lock()
        self._soon: set[asyncio.Task[None]] = set()

    def shown(self) -> Mapping[str, object]:
        in_force = self._settings.model_dump(mode="json", exclude={"workers"})
        workers = [dataclasses.asdict(entry.worker) for entry in self._room]  # headers hold secrets
        for worker in workers:
            worker["only"] = sorted(worker["only"])
        file = self._settings.config
        return {
            "file": None if file is None else str(file),
            "settings": {**in_force, "log_level": self._log_level},
            "workers": workers,
        }

    async def reload(self, by: str) -> Reloaded:
        async with self._reading:
            if self._settings.config is None:
                raise NotReloaded(
                    [
                        ConfigFault(
                            "The balancer was started without --config: there is no file to read again."
                        )
                    ]
                )
            try:
                fresh = await asyncio.to_thread(self._settings.read_again)
            except ConfigFaults as error:
                raise NotReloaded([_fault(one) for one in error.faults]) from None
            except SettingsError as error:
                raise NotReloaded([ConfigFault(line) for line in str(error).splitlines()]) from None
            told = self._apply(fresh)
            log.info("%s: the configuration was read again (%s)", by, told)
            return told

    def _apply(self, fresh: Settings) -> Reloaded:
        before = {entry.worker.id: entry for entry in self._room}
        after = {entry.worker.id: entry for entry in fresh.room}
        both = before.keys() & after.keys()
        self._put_room(fresh.room)
        self._room = fresh.room
        applied = []
        if fresh.log_level != self._log_level:
            self._log_level = fresh.log_level
            logging.getLogger().setLevel(fresh.log_level)
            applied.append("log_level")
        return Reloaded(
            added=tuple(sorted(after.keys() - before.keys())),
            removed=tuple(sorted(before.keys() - after.keys())),
            changed=tuple(sorted(name for name in both if before[name] != after[name])),
            applied=tuple(applied),
            needs_restart=_differing(self._settings, fresh),
        )

    def reload_soon(self, by: str) -> None:
        """In a task; nobody waits for its outcome but the log."""

        async def go() -> None:
            try:
                await self.reload(by)
            except NotReloaded as refused:
                log.error("%s: the configuration stays as it is: %s", by, refused)
            except Exception:
                log.exception("a defect of the balancer, in reading the configuration again")

        # Kept in _soon until it ends; aclose awaits it.
        task = asyncio.create_task(go(), name="reload")  # noqa: TID251
        self._soon.add(task)
        task.add_done_callback(self._soon.discard)

    async def aclose(self) -> None:
        for task in self._soon:
            task.cancel()
        await asyncio.gather(*self._soon, return_exceptions=True)


def _fault(fault: Fault) -> ConfigFault:
    place = fault.place
    return ConfigFault(str(fault), place.line if place else None, place.column if place else None)


def _differing(started: Settings, fresh: Settings) -> tuple[str, ...]:
    """Settings that are other than what this process was started with, and hold from its next start on."""
    names = [
        name
        for name in Tunables.model_fields
        if name not in LIVE_SETTINGS and getattr(started, name) != getattr(fresh, name)
    ]
    for name in ("admin_key", "cluster_key"):  # themselves, wherever they come from
        if getattr(started, name) != getattr(fresh, name) and f"{name}_file" not in names:
            names.append(name)
    return tuple(names)


async def _keys(settings: Settings) -> keys.Keys:
    """Raises `KeyFault`."""
    own = await asyncio.to_thread(
        keys.found, settings.data_dir, admin=settings.admin_key, cluster=settings.cluster_key
    )
    if own.made:
        log.info("made new keys, for this machine's user alone: %s", ", ".join(map(str, own.made)))
    return own


@asynccontextmanager
async def running(settings: Settings, sockets: Sequence[socket.socket] = ()) -> AsyncIterator[Running]:
    """A balancer from these settings, listening inside the block: on `sockets`, which listen already, or on
    the host and port of the settings.

    Leaving the block ends what is still under way and closes everything in the reverse order of its start;
    whoever wants requests to finish awaits `Running.drain` first. Raises `PortTaken` and `KeyFault`.
    """
    loop = asyncio.get_running_loop()
    clock = loop.time
    chance = random.Random()
    own_keys = await _keys(settings)
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(
            Upstream(TimeoutPolicy(settings.connect_timeout, settings.read_timeout))
        )
        listed: dict[WorkerId, Entry] = {}
        nothing: Mapping[str, str] = {}

        def headers_for(worker: Worker) -> Mapping[str, str]:
            """Only where they are meant for: a request that was given to a worker before it moved would take
            its new key to its old address."""
            entry = listed.get(worker.id)
            if entry is None or (entry.worker.url, entry.worker.ca_file) != (worker.url, worker.ca_file):
                return nothing
            return entry.headers

        relay = Relay(upstream, clock, headers_for)
        dispatcher = Dispatcher(_dispatch_policy(settings), chance, started=clock())
        leases = await stack.enter_async_context(Leases(dispatcher, clock, relay.probe))
        session = await stack.enter_async_context(_watch_session(settings))

        stock = Stock()

        def told(event: Event) -> None:
            stock.notice(event)
            leases.tell(event)

        def heard(event: Event) -> None:
            told(event)
            roster.notice(event)

        watches = Watches(
            tell=heard,
            session=session,
            policy=WatchPolicy(interval_seconds=settings.health_check_interval),
            is_at_work=leases.is_at_work,
            on_report=stock.heard,
        )
        stack.push_async_callback(watches.aclose)
        roster = Roster(tell=told, watches=watches, clock=clock)

        def put_room(entries: Sequence[Entry]) -> None:
            listed.clear()
            listed.update((entry.worker.id, entry) for entry in entries)
            roster.static(entries)

        put_room(settings.room)
        configuration = LiveConfiguration(settings, put_room)
        stack.push_async_callback(configuration.aclose)

        def join(asking: Join, address: str) -> None:
            try:
                roster.joined(asking, address)
            except NotAdmitted as refused:
                raise Conflict(f"{refused}.") from refused

        metrics = Metrics(leases.snapshot, leases.serves) if settings.enable_metrics else None
        history = History()
        observers: list[Observer] = [log_served, history.observe]
        if metrics is not None:
            observers.append(metrics.observe)
        journey = Journey(
            leases,
            relay,
            JourneyPolicy(
                retry=RetryPolicy(max_retries=settings.max_retries),
                total_seconds=settings.request_timeout,
                total_batch_seconds=settings.request_timeout_batch,
                max_wait_seconds=settings.max_wait,
                max_wait_batch_seconds=settings.max_wait_batch,
                continues=settings.continue_streams,
            ),
            clock=clock,
            chance=chance,
            observers=observers,
        )
        inference = Inference(
            journey,
            InferencePolicy(
                max_body_bytes=settings.max_body_mib * 1024 * 1024,
                sources=Sources((*settings.allow_networks, *own_addresses())),
                comment_seconds=settings.comment_after,
            ),
            secret=secrets.token_bytes(16),
        )

        def drain(worker_id: WorkerId, on: bool) -> bool:
            known = dispatcher.has_worker(worker_id)
            leases.tell(Draining(worker_id, on))
            return known

        models = FleetModels(
            stock, session, own_keys.cluster, headers=headers_for, is_draining=_drainings(leases.snapshot)
        )
        stack.push_async_callback(models.aclose)
        admin = Admin(
            AdminKey(own_keys.admin, clock),
            Levers(
                snapshot=leases.snapshot,
                drain=drain,
                membership=roster,
                models=models,
                find=history.find,
                shelf=Shelf(own_folder()),
                configuration=configuration,
            ),
            AdminPolicy(body_seconds=settings.body_timeout),
        )
        front = Front(
            inference,
            FrontPolicy(body_seconds=settings.body_timeout, slow_reader_seconds=settings.slow_reader_timeout),
            snapshot=leases.snapshot,
            join=join,
            metrics=metrics,
            admin=admin.application(),
        )
        await stack.enter_async_context(_ticking(leases.tick, TICK_SECONDS))
        await stack.enter_async_context(_ticking(roster.tick, 1.0))
        server = await stack.enter_async_context(
            HttpServer(
                inference,
                front.application(),
                Origins(
                    OriginPolicy(own_names() | set(settings.allow_hosts), frozenset(settings.allow_origins))
                ),
                _server_policy(settings),
            )
        )
        port = await _listen(server, settings, sockets)
        if settings.mdns:
            browser = Browser(found=roster.found)
            stack.push_async_callback(browser.aclose)
            await browser.start()
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at by every collection
        log.info("listening on http://%s:%d", settings.host, port)
        yield Running(
            *(port, leases, journey, inference, server, settings.drain_timeout),
            cluster_key=own_keys.cluster,
            configuration=configuration,
            hands_over=bool(sockets),
        )


def _drainings(snapshot: Callable[[], Snapshot]) -> Callable[[WorkerId], bool]:
    def is_draining(worker_id: WorkerId) -> bool:
        return any(view.worker.id == worker_id and view.state == "draining" for view in snapshot().workers)

    return is_draining


@asynccontextmanager
async def _ticking(tick: Callable[[], None], seconds: float) -> AsyncIterator[None]:
    """Calls `tick` again and again while the block runs."""

    async def go_on() -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                tick()
            except Exception:  # without it nobody would be refused or retried again
                log.exception("a defect of the balancer, in what it does every %g s", seconds)

    # Kept here, awaited on leaving. A task group would wrap what is raised in the block.
    task = asyncio.create_task(go_on())  # noqa: TID251
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _listen(server: HttpServer, settings: Settings, sockets: Sequence[socket.socket]) -> int:
    if sockets:
        return await server.listen_on(sockets)
    try:
        return await server.listen(settings.host, settings.port)
    except OSError as error:
        raise PortTaken(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}. "
            "Choose another port with --port."
        ) from error


def _server_policy(settings: Settings) -> ServerPolicy:
    return ServerPolicy(
        hot_path=settings.hot_path,
        connections=ConnectionPolicy(settings.max_connections, settings.max_connections_per_address),
        body_seconds=settings.body_timeout,
        slow_reader_seconds=settings.slow_reader_timeout,
    )


def own_names() -> frozenset[str]:
    """By which others on the network call this machine."""
    name = socket.gethostname().lower()
    return frozenset({name, f"{name.partition('.')[0]}.local"})


def own_addresses() -> tuple[Network, ...]:
    """This machine's own addresses, which may be public ones: it may always ask itself."""
    return tuple(ip_network(interface.ip) for interface in own_interfaces())


def _watch_session(settings: Settings) -> aiohttp.ClientSession:
    """Its own connections: a relay that is busy cannot hold up a report, nor the other way round."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout),
        trust_env=False,
    )


def _dispatch_policy(settings: Settings) -> DispatchPolicy:
    return DispatchPolicy(
        placement=PlacementPolicy(settings.policy, settings.scorer_weights.model_dump()),
        admission=AdmissionPolicy(max_waiting=settings.max_queue, max_waiting_batch=settings.max_queue_batch),
        batch=BatchPolicy(reserve=settings.batch_reserve, floor=settings.batch_floor),
        hedge=HedgePolicy() if settings.hedge else None,
        breaker=BreakerPolicy(
            trip_after=settings.breaker_trip_after,
            rest_seconds=settings.breaker_rest,
            longest_rest_seconds=max(60.0, settings.breaker_rest),
        ),
    )


def log_served(served: Served) -> None:
    """One line per finished request; no text, no key."""
    last = served.attempts[-1] if served.attempts else None
    tokens = last.measures.output_tokens if last else None
    log.info(
        "%s %s %s %d%s worker=%s%s attempts=%d queued=%.3fs took=%.3fs%s id=%s",
        served.client or "-",
        served.endpoint.value,
        served.model if served.model.isprintable() else ascii(served.model),
        served.status,
        f" {served.error}" if served.error else "",
        last.worker_id if last else "-",
        " fallback" if served.fallback else "",
        len(served.attempts),
        served.queue_seconds,
        served.seconds,
        f" tokens={tokens}" if tokens is not None else "",
        served.request_id,
    )
