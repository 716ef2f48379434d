"""The command line: parses, calls, prints."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import orjson
import typer
import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balancer import access_cli, admin_cli, cluster_cli, config_cli, keeping, logs, ui_cli
from balancer import up as up_
from balancer.addresses import cannot_listen, is_loopback, join_line, own_url
from balancer.admin_cli import (
    DEFAULT_URL,
    Asking,
    JsonOption,
    KeyOption,
    NoAnswer,
    UrlOption,
    asked,
    fail,
    key_for,
    key_if_known,
)
from balancer.app import PortTaken, Running, Stop, running
from balancer.batch.cli import batch, presets
from balancer.client_tls import TlsFault, own_certificate
from balancer.core.dispatcher import WorkerView
from balancer.doctor import DoctorPolicy, examine
from balancer.inherited import NotASocket, listening_sockets, notify
from balancer.keys import KeyFault
from balancer.reached import noted_ca_file, noted_data_dir
from balancer.settings import Settings, SettingsError, load
from worker_agent import findings_table
from worker_agent.contacts import NoAddress
from worker_agent.findings import as_json, has_fault
from worker_agent.forgiving_json import ConfigFaults

_T = TypeVar("_T")

CANNOT_RUN = 2


def _main(
    ca_file: Annotated[
        Path | None,
        typer.Option(
            "--ca-file",
            metavar="FILE",
            help="A certificate to trust (PEM), for a balancer on another machine that made its own; also by "
            "the variable BALANCER_CA_FILE.",
            callback=noted_ca_file,
        ),
    ] = None,
) -> None:
    pass


app = typer.Typer(
    help="One OpenAI endpoint in front of a room of Macs and GPU boxes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    callback=_main,
)
app.add_typer(config_cli.config, name="config")
app.add_typer(batch, name="batch")
app.add_typer(presets, name="presets")
app.add_typer(admin_cli.models, name="models")
app.add_typer(access_cli.keys, name="keys")
app.command()(access_cli.audit)
app.add_typer(cluster_cli.cluster, name="cluster")
workers_ = typer.Typer(invoke_without_command=True)
app.add_typer(workers_, name="workers")
workers_.command()(cluster_cli.approve)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The JSON file with workers and settings.")
]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on; default 0.0.0.0, all.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on; default 4000.")]
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Where logs and state are kept.")
]
MdnsOption = Annotated[
    bool | None, typer.Option("--mdns/--no-mdns", help="Find worker agents on the local network.")
]
LogOption = Annotated[str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")]


@app.command()
def up(
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    mdns: MdnsOption = None,
    log_level: LogOption = None,
    model: Annotated[
        str | None, typer.Option(help="A model of this machine's own; default: a small one that is included.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="llama.cpp, mlx or vllm; default: the best.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests that the engine works on at once.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
) -> None:
    """Start a balancer and a worker on this machine; Ctrl-C stops both."""
    settings = _settings(config, host=host, port=port, data_dir=data_dir, mdns=mdns, log_level=log_level)
    options = {"--model": model, "--engine": engine, "--slots": slots, "--threads": threads}
    agent = up_.LocalAgent(
        settings.data_dir / up_.AGENT_LOG,
        tuple(word for name, value in options.items() if value is not None for word in (name, str(value))),
    )
    _run(lambda stop: _up(settings, agent, stop))


async def _up(settings: Settings, agent: up_.LocalAgent, stop: Stop) -> None:
    console = Console()
    agent.hurried = stop.hurried
    async with running(settings) as balancer:
        local = own_url(settings.host, balancer.port, tls=balancer.tls is not None)
        agent_dir = settings.data_dir / "agent"
        with _reloading_on_hangup(balancer, stop):
            async with agent.running(local, agent_dir, lambda: balancer.cluster.key) as keeping:
                ready = await _first(_shown(console, balancer, keeping), stop)
                if ready is not None:
                    loopback_only = is_loopback(settings.host)
                    _print_welcome(
                        console,
                        up_.welcome(
                            ready,
                            local=local,
                            places=() if loopback_only else balancer.places(),
                            invitation=balancer.invitation(),
                            loopback_only=loopback_only,
                            certificate=own_certificate(settings.data_dir.absolute())
                            if settings.tls == "self-signed"
                            else None,
                            needs_key=settings.auth == "keys",
                        ),
                    )
                    _print_way_to_the_page(balancer, settings)
                    await _first(_ended(keeping), stop)
                # The agent goes last: what is under way needs it.
                await _finish(console, balancer, stop)


async def _shown(console: Console, balancer: Running, keeping: asyncio.Task[None]) -> WorkerView:
    """Until a worker is ready, what happens is shown: in one line on a terminal, else in a line each."""
    last = ""
    with console.status("starting") as status:

        def show(text: str) -> None:
            nonlocal last
            if text != last:
                last = text
                if console.is_terminal:
                    # One line: what is longer cannot be drawn over by the next one.
                    line = Text(text)
                    line.truncate(max(console.width - 4, 10), overflow="ellipsis")
                    status.update(line)
                else:
                    console.print(Text(f"{text} ..."))

        return await up_.until_ready(balancer, keeping, show)


def _print_welcome(console: Console, texts: dict[str, str]) -> None:
    for heading, text in texts.items():
        console.print(Text(heading, style="bold"))
        # Commands are copied by hand: no wrapping, no markup, nothing but themselves on their lines.
        console.print(Text(text), soft_wrap=True)
        console.print()
    console.print(Text("Ctrl-C stops everything.", style="dim"))


@app.command()
def serve(
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    mdns: MdnsOption = None,
    log_level: LogOption = None,
    listen_fd: Annotated[
        int | None,
        typer.Option(min=0, help="Listen on this inherited socket; systemd's LISTEN_FDS is understood too."),
    ] = None,
    until_stdin_ends: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Start the balancer alone: workers come from the config file, by mDNS, and by joining."""
    settings = _settings(config, host=host, port=port, data_dir=data_dir, mdns=mdns, log_level=log_level)
    try:
        sockets = listening_sockets(os.environ, os.getpid(), listen_fd)
    except NotASocket as error:
        fail(str(error))
    _run(lambda stop: _serve(settings, sockets, stop, until_stdin_ends=until_stdin_ends))


async def _serve(
    settings: Settings, sockets: list[socket.socket], stop: Stop, *, until_stdin_ends: bool
) -> None:
    async with running(settings, sockets) as balancer:
        if until_stdin_ends:
            # Whoever keeps us holds the other end, and writes nothing: it ends with its holder.
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_with_keeper, stop)
        notify("READY=1", os.environ)
        if balancer.is_first_start:
            _print_invitation(balancer)
        _print_way_to_the_page(balancer, settings)
        with _reloading_on_hangup(balancer, stop):
            await stop.asked.wait()
            notify("STOPPING=1", os.environ)
            await _finish(Console(stderr=True), balancer, stop)


def _print_invitation(balancer: Running) -> None:
    """Once, and to a person only: what a service writes is kept, and read by others."""
    if sys.stdout.isatty():
        print("To make another machine a worker, on it, in a checkout of this project:")  # noqa: T201
        print(join_line(balancer.invitation()))  # noqa: T201


def _print_way_to_the_page(balancer: Running, settings: Settings) -> None:
    """The same: when the admin key was made, and to a person only."""
    if balancer.new_admin_key and sys.stdout.isatty():
        base = own_url(settings.host, balancer.port, tls=balancer.tls is not None)
        print(ui_cli.first_words(base, balancer.new_admin_key))  # noqa: T201


def _end_with_keeper(stop: Stop) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.asked.set()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def keep(
    context: typer.Context,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
) -> None:
    """Keep a balancer running, and renew it without refusing anybody: kill -HUP starts a new one on the same
    port, which takes over once it is ready. Takes the options of `serve`."""
    settings = _settings(config, host=host, port=port)
    given = {"--host": host, "--port": port, "--config": config}
    options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    command = [sys.executable, "-m", "balancer", "serve", *options, *context.args]
    try:
        listening = keeping.listen(settings.host, settings.port)
    except (OSError, UnicodeError) as error:
        fail(cannot_listen(settings.host, settings.port, error), status=1)
    try:
        status = asyncio.run(keeping.keep(command, listening))
    except keeping.CannotStart as error:
        fail(str(error), status=error.status if error.status > 0 else 1)
    raise typer.Exit(status)


@workers_.callback()
def workers(
    context: typer.Context,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show the workers of a running balancer and how they are, and who waits to be let in."""
    if context.invoked_subcommand is not None:
        return
    room = asked(url, "GET", "/health")
    key = key_if_known(url, admin_key_file, data_dir)
    cluster = {} if key is None else asked(url, "GET", "/admin/cluster", key=key)
    if json:
        told = {**room, "pending": cluster["pending"]} if cluster else room
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
        return
    table = Table("worker", "state", "running", "tokens/s read, written")
    table.add_column("models", overflow="fold")  # to be copied whole
    table.add_column("engine")
    table.add_column("detail", overflow="fold")
    for view in room["workers"]:
        breaker = "" if view["breaker"] == "closed" else f", breaker {view['breaker']}"
        table.add_row(
            *(Text(view["id"]), Text(view["state"] + breaker), f"{view['running']}/{view['slots']}"),
            _speeds(view["prefill_tokens_per_second"], view["tokens_per_second"]),
            # Text: a worker's words are no markup.
            *(Text(text) for text in ("\n".join(view["models"]), view["engine"], view["detail"])),
        )
    console = Console()
    console.print(table)
    batch = f" ({room['waiting_batch']} of class batch)" if room["waiting_batch"] else ""
    console.print(f"{room['waiting']} waiting{batch}, {room['running']} running")
    for warning in room["warnings"]:
        console.print(Text(warning, "yellow"))
    if cluster:
        cluster_cli.print_waiting(console, cluster)
        cluster_cli.print_turned_away(console, [*cluster["mismatches"], *cluster["turned_away"]])


def _speeds(reading: float | None, writing: float | None) -> str:
    """As learned; nothing where nothing was measured yet."""
    return "" if reading is None or writing is None else f"{reading:.0f}, {writing:.0f}"


@app.command()
def why(
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="The X-Request-ID of an answer, or from the balancer's log.")
    ],
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Say why a finished request went to the worker that it went to."""
    key = key_for(url, admin_key_file, data_dir)
    told = asked(url, "GET", f"/admin/requests/{quote(request_id, safe='')}/why", key=key)
    if json:
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
        return
    console = Console()
    error = f" {told['error']}" if told["error"] else ""
    console.print(
        Text(
            f"{told['endpoint']} {told['model']}: {told['status']}{error}, {told['seconds']:.3f} s, "
            f"of which {told['queue_seconds']:.3f} s in line"
        )
    )
    if told["warm_ups"]:
        console.print(f"{told['warm_ups']} slices of its prompt were read ahead")
    for number, attempt in enumerate(told["attempts"], 1):
        detail = f" ({attempt['detail']})" if attempt["detail"] else ""
        console.print(
            Text(f"\nattempt {number}: {attempt['worker']}, {attempt['ended']}{detail}", style="bold")
        )
        if attempt["because"]:
            console.print(Text(attempt["because"]))
        table = Table("worker", "chance", "weight", "expected", "because")
        for candidate in attempt["candidates"]:
            scores = ", ".join(f"{name} {score:g}" for name, score in candidate["scores"].items())
            expected = candidate["expected_seconds"]
            table.add_row(
                *(Text(candidate["worker"]), f"{candidate['share']:.0%}", f"{candidate['weight']:g}"),
                *("" if expected is None else f"{expected:.2f} s", scores),
            )
        for name, reason in attempt["excluded"].items():
            table.add_row(Text(name), "0%", "-", "", Text(reason))
        console.print(table)


app.command()(ui_cli.ui)
app.command()(admin_cli.drain)
app.command()(admin_cli.undrain)
app.command()(admin_cli.remove)


@app.command()
def doctor(
    worker: Annotated[
        list[str] | None, typer.Option(help="An agent's address to look for besides; may be repeated.")
    ] = None,
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Say why other machines and this balancer do not see each other, and how to mend it.

    To be run where the balancer runs. Ends with code 1 where there is a fault.
    """
    settings = _settings(config, host=host, port=port, data_dir=data_dir)
    policy = DoctorPolicy(
        host=settings.host,
        port=settings.port,
        tls=settings.tls != "off",
        mdns=settings.mdns,
        data_dir=settings.data_dir,
        workers=tuple(entry.worker for entry in settings.room),
        cluster_key=settings.cluster_key,
    )
    noted_data_dir(settings.data_dir)  # whose certificate is trusted with the admin key
    try:
        found = asyncio.run(examine(policy, partial(_cluster_at, settings), worker or ()))
    except NoAddress as error:
        fail(str(error))
    if json:
        print(orjson.dumps(as_json(found), option=orjson.OPT_INDENT_2).decode())  # noqa: T201
    else:
        findings_table.show(found)
    if has_fault(found):
        raise typer.Exit(1)


async def _cluster_at(settings: Settings, url: str) -> Mapping[str, object]:
    """Who waits, and who is turned away, as far as the admin key is at hand."""
    key = settings.admin_key or key_if_known(url, None, settings.data_dir)
    if key is None:
        return {}
    try:
        asking = await asyncio.to_thread(Asking, url, key)
        return (await asking.ask("GET", "/admin/cluster")).body
    except NoAnswer:
        return {}


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version("llm-room-balancer"))  # noqa: T201


# Running


def _settings(config: Path | None, **flags: object) -> Settings:
    try:
        settings = load(config, flags)
    except (ConfigFaults, SettingsError) as faults:
        fail(str(faults))
    logs.set_up(settings.log_level, settings.log_format)
    return settings


def _run(main: Callable[[Stop], Coroutine[Any, Any, None]]) -> None:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_signalled(main))
    except (PortTaken, KeyFault, TlsFault) as error:
        fail(str(error), status=1)
    except up_.AgentFailed as error:
        fail(f"the worker agent on this machine cannot run:\n{error}", status=1)


@contextmanager
def _reloading_on_hangup(balancer: Running, stop: Stop) -> Iterator[None]:
    """SIGHUP has the configuration read again. But from a terminal it comes when that is closed, and `nohup`
    wants nothing to happen then."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, stop.signal if sys.stdin.isatty() else balancer.reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _until_signalled(main: Callable[[Stop], Coroutine[Any, Any, None]]) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.signal)
    await main(stop)


async def _finish(console: Console, balancer: Running, stop: Stop) -> None:
    if balancer.under_way:
        count = balancer.under_way
        console.print(f"finishing {count} request{'s' if count > 1 else ''}; Ctrl-C again stops at once")
    await balancer.drain(stop)


async def _first(work: Coroutine[Any, Any, _T], stop: Stop) -> _T | None:
    """What the work gives; None if it is to stop before."""
    # Both are kept here and awaited here; a task group would wrap what the work raises.
    working = asyncio.create_task(work)  # noqa: TID251
    stopping = asyncio.create_task(stop.asked.wait())  # noqa: TID251
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def _ended(keeping: asyncio.Task[None]) -> None:
    await asyncio.wait((keeping,))  # not awaited itself: to stop waiting is not to stop the agent
    keeping.result()


if __name__ == "__main__":
    app()
