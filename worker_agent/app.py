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
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from worker_agent import hardware as machine
from worker_agent import installed as environment
from worker_agent import wire
from worker_agent.advertise import Presence, advertise
from worker_agent.changes import Changes
from worker_agent.engines.choice import Choice, Installed, NoChoice, Wish, choose
from worker_agent.engines.spec import Capacity
from worker_agent.gateway import Gateway, GatewayPolicy
from worker_agent.gguf import HEAD_BYTES, cache_bytes_per_token
from worker_agent.hardware import Hardware
from worker_agent.identity import identity
from worker_agent.joining import join_all
from worker_agent.plans import Plan
from worker_agent.server import ServerPolicy, listening
from worker_agent.settings import Settings, default_data_dir
from worker_agent.sources import Sources, parse_networks
from worker_agent.supervised import SupervisedEngine
from worker_agent.supervision import SupervisionPolicy
from worker_agent.wire import EngineState, Report, ServedModel

_LOG = logging.getLogger("worker_agent")
_LINE_CHARACTERS = 400  # of a `wire.Line`


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


async def inspect(settings: Settings) -> Inspection:
    """Looks at the machine and chooses. Does not raise for want of an engine: `choice` says so."""
    hardware, found = await asyncio.gather(
        asyncio.to_thread(machine.detect), asyncio.to_thread(environment.detect)
    )
    choice: Choice | NoChoice
    try:
        choice = choose(
            hardware, found, Wish(engine=settings.engine, model=settings.model, name=settings.name)
        )
    except NoChoice as error:
        choice = error
    return Inspection(hardware, found, choice)


async def run(settings: Settings, *, exit_with_parent: bool = False) -> None:
    """Runs an agent until it is told to stop.

    Raises `NoParent`, `NoChoice`, `NoIdentity` or `CannotListen` before anything runs.
    """
    if exit_with_parent:
        _insist_on_parent()
    stop = Stop()
    with _signals(stop):
        inspection = await inspect(settings)
        if isinstance(inspection.choice, NoChoice):
            raise inspection.choice
        folder = settings.data_dir or default_data_dir()
        with identity(folder, settings.id) as agent_id:
            async with contextlib.AsyncExitStack() as stack:
                if exit_with_parent:
                    await stack.enter_async_context(_parent(stop))
                await _serve(settings, agent_id, inspection.hardware, inspection.choice, stop)


def plan_of(settings: Settings, choice: Choice, cores: int) -> Plan:
    """What shall run, with every default filled in. Raises `NoChoice` for a model file that is not there."""
    model, per_token = choice.model, None
    if model.lower().endswith(".gguf"):
        path = Path(model).expanduser()
        if not path.is_file():
            raise NoChoice(f"there is no file {path}")
        model = str(path.resolve())
        per_token = _cache_bytes_per_token(path)
    return Plan(
        spec=choice.engine,
        model=model,
        name=choice.name,
        slots=settings.slots or choice.engine.default_slots,
        context_tokens=settings.context_tokens
        or choice.context_tokens
        or choice.engine.default_context_tokens,
        threads=settings.threads or cores,
        program=choice.program,
        cache_bytes_per_token=per_token,
    )


def _cache_bytes_per_token(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return cache_bytes_per_token(file.read(HEAD_BYTES))
    except OSError:  # the engine says it better
        return None


async def _serve(settings: Settings, agent_id: str, hardware: Hardware, choice: Choice, stop: Stop) -> None:
    plan = plan_of(settings, choice, hardware.cores)
    _LOG.info("%s: %s; %s, because %s", agent_id, hardware, plan.spec.name, choice.why)
    for line in choice.advice:
        _LOG.info("advice: %s", line)
    changes = Changes()
    policy = SupervisionPolicy(start_limit_seconds=plan.spec.start_limit_seconds)
    engine = SupervisedEngine(plan, policy, changes.announce)

    def report() -> Report:
        return report_of(agent_id, engine, gateway, str(hardware), choice.advice)

    gateway = Gateway(engine, report, changes, GatewayPolicy(sources=_sources(settings)))
    server = ServerPolicy.for_slots(plan.slots)
    async with (
        listening(gateway.application(), settings.host, settings.port, server) as port,
        engine.supervised(),
        gateway.looking_after_the_engine(),
    ):
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        _LOG.info("listening on http://%s:%d", shown, port)
        engine.want()
        presence = [join_all(settings.balancers, wire.Join(id=agent_id, port=port))]
        if settings.mdns:
            presence.append(advertise(Presence(agent_id, settings.host, port)))
        async with _meanwhile(presence):
            await stop.asked.wait()
            _LOG.info("stopping; %d requests run", gateway.running)
            gateway.drain()
        await _first(gateway.drained(), stop.hurried.wait(), limit_seconds=settings.drain_seconds)
        if gateway.running:
            _LOG.warning("ending %d requests that still run", gateway.running)
        await gateway.close()
        engine.unwant()
        await _first(engine.stopped(), stop.hurried.wait())
        engine.hurry()
        await engine.stopped()
    _LOG.info("stopped")


def _sources(settings: Settings) -> Sources:
    """Private networks, those that were named, and this machine itself, which may have public addresses."""
    own = (
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    )
    return Sources((*settings.allow_networks, *parse_networks(list(own))))


def report_of(
    agent_id: str, engine: SupervisedEngine, gateway: Gateway, hardware: str, advice: tuple[str, ...]
) -> Report:
    """What the agent says of itself now."""
    state = EngineState.STOPPING if gateway.draining else engine.state.reported
    plan, serving = engine.plan, engine.serving
    capacity = serving.capacity if serving is not None else Capacity()
    model = ServedModel(
        name=plan.name,
        context_tokens=serving.context_tokens if serving is not None else None,
        paths=plan.spec.paths,
        identity=_line(file_or_hub_name(plan.model)),
        memory_tokens=_held(capacity.memory_tokens),
        cache_tokens=_held(capacity.cache_tokens),
        continues=gateway.continues,
    )
    return Report(
        id=agent_id,
        state=state,
        engine=plan.spec.name,
        models=(model,),
        slots=plan.slots,
        running=gateway.taken,
        hardware=_line(hardware),
        detail=_line(engine.detail),
        advice=tuple(map(_line, advice)),
    )


def _held(tokens: int | None) -> int | None:
    return None if tokens is None else min(tokens, wire.MAX_TOKENS_HELD)


def file_or_hub_name(model: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct-AWQ` as it is, of a path its end: which folders a machine has is its own."""
    parts = model.rstrip("/").split("/")
    return model if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") else parts[-1]


def _line(text: str) -> str:
    """A `wire.Line`: what other programs told us is made printable and short."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LINE_CHARACTERS]


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
