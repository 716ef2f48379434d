"""The only place that builds the balancer: what exists, who is given what, in which order it starts."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_network

import aiohttp

from balancer import client_tls, keys
from balancer.access import Access
from balancer.access_admin import KeyRoutes
from balancer.access_store import KeyStore
from balancer.addresses import cannot_listen, places
from balancer.admin import Admin, AdminPolicy, Levers
from balancer.admin_door import AdminDoor
from balancer.announce import announce
from balancer.audit import Audit
from balancer.batch.presets import Shelf, own_folder
from balancer.client_tls import ClientTls
from balancer.cluster import Cluster
from balancer.cluster_admin import ClusterRoutes
from balancer.config_watch import ConfigWatch
from balancer.connections import ConnectionPolicy
from balancer.core.admission import AdmissionPolicy
from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.dispatcher import Dispatcher, DispatchPolicy, HedgePolicy, Snapshot
from balancer.core.errors import Conflict, ShuttingDown
from balancer.core.model import Draining, Event, Gone, Served, Worker, WorkerId
from balancer.core.placement import POLICIES, PlacementPolicy
from balancer.core.retry import RetryPolicy
from balancer.dashboard.routes import page_routes
from balancer.discovery import Browser, Entry, NotAdmitted, Roster
from balancer.fleet_models import FleetModels, Stock
from balancer.front import Front, FrontPolicy
from balancer.history import History
from balancer.hot_path import HttpServer, ServerPolicy
from balancer.inference import Inference, InferencePolicy
from balancer.journey import Journey, JourneyPolicy, Observer
from balancer.keys import AdminKey
from balancer.leases import TICK_SECONDS, Leases
from balancer.live import LiveConfiguration, LiveSettings
from balancer.meeting import NotMet
from balancer.metrics import Metrics
from balancer.names import Dns, Names, NotThere, merged
from balancer.openapi import openapi_routes
from balancer.origins import OriginPolicy, Origins
from balancer.pins import Memory
from balancer.relay import Relay
from balancer.settings import Settings
from balancer.tunnels import Tunnels
from balancer.upstream import Address, TimeoutPolicy, Unreachable, Upstream, Way
from balancer.watch import Watches, WatchPolicy
from balancer.worker_types import row_of
from worker_agent.reachability import own_interfaces
from worker_agent.sources import Network, Sources
from worker_agent.wire import Announced, Join

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2.0
"""To tell the clients of what was cut short."""


class PortTaken(Exception):
    """Nothing can listen there: somebody does already, or the address is not ours."""


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
        cluster: Cluster,
        places: Callable[[], tuple[str, ...]],
        is_first_start: bool,
        new_admin_key: str,
        configuration: LiveConfiguration,
        hands_over: bool,
        tls: ClientTls | None = None,
    ) -> None:
        """`hands_over`: the socket is inherited, and another process will accept from it. `places`: where
        other machines reach it, `host:port`."""
        self.tls = tls
        """What clients are spoken to with; None: plain HTTP."""
        self.port = port
        self.cluster = cluster
        self.places = places
        self.is_first_start = is_first_start
        """The cluster's key was made by it."""
        self.new_admin_key = new_admin_key
        """The admin key, where it was made at this start; empty: it was there before."""
        self._configuration = configuration
        self._server = server
        self._hands_over = hands_over
        self._leases = leases
        self._journey = journey
        self._inference = inference
        self._drain_seconds = drain_seconds

    def snapshot(self) -> Snapshot:
        return self._leases.snapshot()

    def invitation(self) -> str:
        """What another machine needs to join; it holds the cluster key."""
        return self.cluster.invitation(self.places())

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
    memory = Memory(settings.data_dir)
    balancer_id, pins = await asyncio.to_thread(lambda: (memory.balancer_id(), memory.pins()))
    async with AsyncExitStack() as stack:
        tunnels = Tunnels(arrived=lambda agent_id, tag: dialled(agent_id, tag), clock=clock)
        stack.callback(tunnels.aclose)
        upstream = await stack.enter_async_context(
            Upstream(TimeoutPolicy(settings.connect_timeout, settings.read_timeout), tunnels)
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

        ways: dict[Worker, Way] = {}

        def way_to(worker: Worker) -> Way | None:
            if row_of(worker).is_agent:
                return cluster.way(worker)
            known, headers = ways.get(worker), headers_for(worker)
            if known is None or known.headers != headers:
                if len(ways) > 4096:  # workers come and go
                    ways.clear()
                known = ways[worker] = Way(Address.of(worker.url, worker.ca_file), headers)
            return known

        def met(worker: Worker) -> None:
            roster.met(worker)

        cluster = Cluster(
            *(upstream, memory, own_keys.cluster),
            balancer_id=balancer_id,
            pins=pins,
            clock=clock,
            on_met=met,
        )
        stack.push_async_callback(cluster.aclose)

        async def meet(worker: Worker, refused: Way | None) -> Way:
            try:
                return await cluster.met(worker, refused)
            except NotMet as error:
                raise Unreachable(str(error)) from error

        relay = Relay(upstream, clock, way_to, meet)
        dispatcher = Dispatcher(_dispatch_policy(settings), chance, started=clock())
        leases = await stack.enter_async_context(Leases(dispatcher, clock, relay.probe))
        session = await stack.enter_async_context(_watch_session(settings))

        stock = Stock()

        def told(event: Event) -> None:
            stock.notice(event)
            leases.tell(event)
            if isinstance(event, Gone):
                cluster.gone(event.worker_id)

        def heard(event: Event) -> None:
            told(event)
            roster.notice(event)

        watches = Watches(
            tell=heard,
            session=session,
            agents=cluster,
            policy=WatchPolicy(interval_seconds=settings.health_check_interval),
            is_at_work=leases.is_at_work,
            on_report=stock.heard,
        )
        stack.push_async_callback(watches.aclose)
        roster = Roster(tell=told, watches=watches, clock=clock, tags=lambda: cluster.tags)

        in_config: list[Entry] = []
        in_dns: list[Entry] = []

        def fill_room(*, pardons: bool) -> None:
            entries = merged(in_config, in_dns)
            listed.clear()
            listed.update((entry.worker.id, entry) for entry in entries)
            roster.static(entries, pardons=pardons)

        def put_room(entries: Sequence[Entry]) -> None:
            in_config[:] = entries
            fill_room(pardons=True)

        def put_named(entries: Sequence[Entry]) -> None:
            in_dns[:] = entries
            fill_room(pardons=False)

        put_room(settings.room)
        configuration = LiveConfiguration(settings, put_room)
        stack.push_async_callback(configuration.aclose)

        def join(asking: Join, address: str) -> None:
            try:
                roster.joined(asking, address)
            except NotAdmitted as refused:
                raise Conflict(f"{refused}.") from refused

        def dialled(agent_id: str, tag: str) -> None:
            if tag and tag not in cluster.tags:
                raise Conflict(
                    "This agent holds the key of another cluster. On it, run `worker-agent join` with what "
                    "`balancer cluster invite` shows here."
                )
            try:
                roster.dialled(agent_id)
            except NotAdmitted as refused:
                raise Conflict(f"{refused}.") from refused

        names = _names(put_named, cluster, roster, clock)
        names.put(settings.named_sources())

        metrics = (
            Metrics(leases.snapshot, leases.serves, config_ok=lambda: configuration.is_ok)
            if settings.enable_metrics
            else None
        )
        history = History()
        observers: list[Observer] = [log_served, history.observe]
        if metrics is not None:
            observers.append(metrics.observe)
        journey = Journey(
            leases,
            relay,
            _journey_policy(settings),
            clock=clock,
            chance=chance,
            observers=observers,
        )
        access = Access(clock, wall)
        key_store = KeyStore(settings.data_dir, access, wall)
        await stack.enter_async_context(key_store.running())
        inference = Inference(
            journey,
            _inference_policy(settings),
            secret=secrets.token_bytes(16),
            access=access if settings.auth == "keys" else None,
        )
        audit = Audit(settings.data_dir, clock, wall)
        await stack.enter_async_context(audit.running())
        tls = _client_tls(settings, wall)
        if tls is not None:
            await stack.enter_async_context(tls.running())

        def drain(worker_id: WorkerId, on: bool) -> bool:
            known = dispatcher.has_worker(worker_id)
            leases.tell(Draining(worker_id, on))
            return known

        models = FleetModels(
            stock, session, cluster, headers=headers_for, is_draining=_drainings(leases.snapshot)
        )
        stack.push_async_callback(models.aclose)
        listens_on: list[int] = []

        def reached_at() -> tuple[str, ...]:
            port = listens_on[0] if listens_on else settings.port
            return places(settings.host, port, tls=settings.tls != "off")

        admin = Admin(
            AdminDoor(AdminKey(own_keys.admin, clock), clock),
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
            further=[
                *KeyRoutes(key_store, access).routes(),
                *ClusterRoutes(cluster, reached_at, clock, watches.wake).routes(),
            ],
            audit=audit,
        )
        front = Front(
            inference,
            FrontPolicy(body_seconds=settings.body_timeout, slow_reader_seconds=settings.slow_reader_timeout),
            snapshot=leases.snapshot,
            join=join,
            metrics=metrics,
            admin=admin.application(),
            further=[*page_routes(), *openapi_routes(), tunnels.route()],
        )
        await stack.enter_async_context(_ticking(leases.tick, TICK_SECONDS))
        await stack.enter_async_context(_ticking(roster.tick, 1.0))
        await stack.enter_async_context(_ticking(tunnels.tick, 1.0))
        await stack.enter_async_context(_meanwhile(names.run()))
        origins = Origins(_origin_policy(settings))
        configuration.govern(
            *_live_settings(dispatcher, journey, inference, origins, access),
            LiveSettings(frozenset({"discover"}), lambda settings: names.put(settings.named_sources())),
        )
        server = await stack.enter_async_context(
            HttpServer(
                inference,
                front.application(),
                origins,
                _server_policy(settings),
                tls.context if tls is not None else None,
            )
        )
        port = await _listen(server, settings, sockets)
        listens_on.append(port)
        if settings.mdns:
            browser = Browser(found=roster.found)
            stack.push_async_callback(browser.aclose)
            await browser.start()

            def announced() -> Announced:
                return Announced(balancer_id, cluster.tag, "" if tls is None else tls.fingerprint)

            await stack.enter_async_context(_meanwhile(announce(settings.host, port, announced)))
        if settings.watch_config and settings.config is not None and settings.config.is_file():
            await stack.enter_async_context(
                _meanwhile(ConfigWatch(configuration.files, configuration.was_saved).run())
            )
        gc.collect()
        gc.freeze()  # what lives as long as the process need not be looked at by every collection
        log.info("listening on %s://%s:%d", "http" if tls is None else "https", settings.host, port)
        if tls is not None:
            log.info("SHA-256 of the certificate for clients: %s", tls.fingerprint)
        yield Running(
            *(port, leases, journey, inference, server, settings.drain_timeout),
            cluster=cluster,
            places=reached_at,
            is_first_start=any(path.name == keys.CLUSTER_KEY for path in own_keys.made),
            new_admin_key=own_keys.admin if keys.ADMIN_KEY in {path.name for path in own_keys.made} else "",
            configuration=configuration,
            hands_over=bool(sockets),
            tls=tls,
        )


def wall() -> datetime:
    """The time of day: for what expires, and for records that people read."""
    return datetime.now(UTC)


def _client_tls(settings: Settings, wall: Callable[[], datetime]) -> ClientTls | None:
    """Raises `TlsFault`."""
    match settings.tls:
        case "off":
            return None
        case "files":
            return client_tls.from_files(settings.tls_cert_file, settings.tls_key_file)
        case "self-signed":

            def names() -> client_tls.Names:
                hosts = (*own_names(), *settings.allow_hosts)
                return client_tls.covering(hosts, (str(one.ip) for one in own_interfaces()))

            return client_tls.self_signed(settings.data_dir, names, wall)


def _names(
    listed: Callable[[Sequence[Entry]], None], cluster: Cluster, roster: Roster, clock: Callable[[], float]
) -> Names:
    async def hello(url: str) -> str:
        try:
            return await cluster.hello(url)
        except NotMet as error:
            raise NotThere(str(error)) from error

    def joined(agent_id: str, address: str, port: int) -> None:
        try:
            roster.joined(Join(id=agent_id, port=port), address)
        except NotAdmitted as refused:
            raise NotThere(str(refused)) from refused

    return Names(look_up=Dns(), listed=listed, hello=hello, joined=joined, clock=clock)


def _drainings(snapshot: Callable[[], Snapshot]) -> Callable[[WorkerId], bool]:
    def is_draining(worker_id: WorkerId) -> bool:
        return any(view.worker.id == worker_id and view.state == "draining" for view in snapshot().workers)

    return is_draining


def _ticking(tick: Callable[[], None], seconds: float) -> AbstractAsyncContextManager[None]:
    """Calls `tick` again and again while the block runs."""

    async def go_on() -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                tick()
            except Exception:  # without it nobody would be refused or retried again
                log.exception("a defect of the balancer, in what it does every %g s", seconds)

    return _meanwhile(go_on())


@asynccontextmanager
async def _meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Does this while the block runs."""
    # Kept here, awaited on leaving. A task group would wrap what is raised in the block.
    task = asyncio.create_task(work)  # noqa: TID251
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
    except (OSError, UnicodeError) as error:
        raise PortTaken(cannot_listen(settings.host, settings.port, error)) from error


def _journey_policy(settings: Settings) -> JourneyPolicy:
    return JourneyPolicy(
        retry=RetryPolicy(max_retries=settings.max_retries),
        total_seconds=settings.request_timeout,
        total_batch_seconds=settings.request_timeout_batch,
        max_wait_seconds=settings.max_wait,
        max_wait_batch_seconds=settings.max_wait_batch,
        continues=settings.continue_streams,
    )


def _inference_policy(settings: Settings) -> InferencePolicy:
    return InferencePolicy(
        max_body_bytes=settings.max_body_mib * 1024 * 1024,
        sources=Sources((*settings.allow_networks, *own_addresses())),
        comment_seconds=settings.comment_after,
    )


def _origin_policy(settings: Settings) -> OriginPolicy:
    return OriginPolicy(own_names() | set(settings.allow_hosts), frozenset(settings.cors_origins))


def _live_settings(
    dispatcher: Dispatcher, journey: Journey, inference: Inference, origins: Origins, access: Access
) -> tuple[LiveSettings, ...]:
    """What takes effect, beside workers, when the configuration is read again."""
    return (
        LiveSettings(
            frozenset(
                {
                    *("max_retries", "request_timeout", "request_timeout_batch"),
                    *("max_wait", "max_wait_batch", "continue_streams"),
                }
            ),
            lambda settings: journey.adopt(_journey_policy(settings)),
        ),
        LiveSettings(
            frozenset({"allow_networks", "comment_after"}),
            lambda settings: inference.adopt(_inference_policy(settings)),
        ),
        LiveSettings(
            frozenset({"auth"}),
            lambda settings: inference.ask_for_keys(access if settings.auth == "keys" else None),
        ),
        LiveSettings(
            frozenset({"allow_hosts", "cors_origins"}),
            lambda settings: origins.adopt(_origin_policy(settings)),
        ),
        LiveSettings(
            frozenset({"max_queue", "max_queue_batch", "batch_reserve", "batch_floor", "hedge"}),
            lambda settings: dispatcher.adopt(_dispatch_policy(settings)),
        ),
        LiveSettings(
            frozenset({"policy", "scorer_weights"}),
            lambda settings: dispatcher.adopt(_dispatch_policy(settings)),
            fits=lambda before, after: POLICIES[before.policy].estimates == POLICIES[after.policy].estimates,
        ),
    )


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
        "%s %s %s %d%s worker=%s%s attempts=%d queued=%.3fs took=%.3fs%s",
        served.client or "-",
        served.endpoint.value,
        served.model,
        served.status,
        f" {served.error}" if served.error else "",
        last.worker_id if last else "-",
        " fallback" if served.fallback else "",
        len(served.attempts),
        served.queue_seconds,
        served.seconds,
        f" tokens={tokens}" if tokens is not None else "",
        extra={"request_id": served.request_id, "fields": partial(_served_fields, served)},
    )


def _served_fields(served: Served) -> Mapping[str, object]:
    """The same for programs."""
    last = served.attempts[-1] if served.attempts else None
    return {
        "client": served.client,
        "endpoint": served.endpoint.value,
        "model": served.model,
        "status": served.status,
        "error": served.error,
        "class": served.service_class.value,
        "worker": last.worker_id if last else None,
        "fallback": served.fallback,
        "attempts": len(served.attempts),
        "queue_seconds": round(served.queue_seconds, 6),
        "seconds": round(served.seconds, 6),
        "prompt_tokens": last.measures.prompt_tokens if last else None,
        "output_tokens": last.measures.output_tokens if last else None,
    }
