"""The command line: parses, calls, prints."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import aiohttp
import orjson
import typer
import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balancer import up as up_
from balancer.app import PortTaken, Running, running
from balancer.batch.cli import batch, presets
from balancer.config_file import ConfigFaults, read
from balancer.settings import Settings, SettingsError, load

CANNOT_RUN = 2

app = typer.Typer(
    help="One OpenAI endpoint in front of a room of Macs and GPU boxes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(help="The JSON configuration file.", no_args_is_help=True)
app.add_typer(config, name="config")
app.add_typer(batch, name="batch")
app.add_typer(presets, name="presets")

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
    _run(settings, lambda stop: _up(settings, agent, stop))


async def _up(settings: Settings, agent: up_.LocalAgent, stop: asyncio.Event) -> None:
    console = Console()
    async with (
        running(settings) as balancer,
        agent.running(balancer.port, settings.data_dir / "agent") as keeping,
    ):
        with console.status("starting") as status:
            last = ""

            def show(text: str) -> None:
                nonlocal last
                if text != last:
                    last = text
                    if console.is_terminal:
                        status.update(text)
                    else:
                        console.print(f"{text} ...")

            ready = await _first(up_.until_ready(balancer, keeping, show), stop)
        if ready is None:
            return
        _print_welcome(
            console,
            up_.welcome(
                ready,
                port=balancer.port,
                addresses=() if up_.is_loopback(settings.host) else up_.lan_addresses(),
                loopback_only=up_.is_loopback(settings.host),
            ),
        )
        await _first(_forever(keeping), stop)
        _say_stopping(console, balancer)


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
) -> None:
    """Start the balancer alone: workers come from the config file, by mDNS, and by joining."""
    settings = _settings(config, host=host, port=port, data_dir=data_dir, mdns=mdns, log_level=log_level)
    _run(settings, lambda stop: _serve(settings, stop))


async def _serve(settings: Settings, stop: asyncio.Event) -> None:
    async with running(settings) as balancer:
        await stop.wait()
        _say_stopping(Console(stderr=True), balancer)


@app.command()
def workers(
    url: Annotated[
        str, typer.Option(envvar="BALANCER_URL", help="The running balancer.")
    ] = "http://127.0.0.1:4000",
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show the workers of a running balancer and how they are."""
    try:
        room = asyncio.run(_get(f"{url.rstrip('/')}/health"))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        _fail(
            f"no balancer answers at {url} ({type(error).__name__}): is it running? `balancer up` starts one"
        )
    if json:
        print(orjson.dumps(room, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
        return
    table = Table("worker", "state", "breaker", "running", "models", "engine", "detail")
    for view in room["workers"]:
        table.add_row(
            *(str(view[key]) for key in ("id", "state", "breaker")),
            f"{view['running']}/{view['slots']}",
            "\n".join(view["models"]),
            view["engine"],
            Text(view["detail"]),
        )
    console = Console()
    console.print(table)
    console.print(f"{room['waiting']} waiting, {room['running']} running")


async def _get(url: str) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.get(url) as response,
    ):
        response.raise_for_status()
        answer: dict[str, Any] = orjson.loads(await response.read())
        return answer


@config.callback()
def _config() -> None:
    # With a callback typer keeps `check` a word of its own even while it is the only command.
    pass


@config.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Say what is wrong with a configuration file, each fault with line and column."""
    try:
        content = read(file)
    except ConfigFaults as faults:
        _fail(str(faults))
    count = len(content.workers)
    print(f"{file}: fine, {count} worker{'' if count == 1 else 's'}")  # noqa: T201


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version("llm-room-balancer"))  # noqa: T201


# Running


def _settings(config: Path | None, **flags: object) -> Settings:
    try:
        settings = load(config, flags)
    except (ConfigFaults, SettingsError) as faults:
        _fail(str(faults))
    logging.basicConfig(
        level=settings.log_level,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    return settings


def _run(settings: Settings, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_signalled(main))
    except PortTaken as error:
        _fail(str(error), status=1)
    except up_.AgentFailed as error:
        _fail(f"the worker agent on this machine cannot run:\n{error}", status=1)


async def _until_signalled(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """The first signal asks `main` to stop; the second one ends it where it stands."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def signalled() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    try:
        await main(stop)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


async def _first(work: Coroutine[Any, Any, Any], stop: asyncio.Event) -> Any:
    """What the work gives; None if it is to stop before."""
    # Both are kept here and awaited here; a task group would wrap what the work raises.
    working = asyncio.create_task(work)  # noqa: TID251
    stopping = asyncio.create_task(stop.wait())  # noqa: TID251
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def _forever(keeping: asyncio.Task[None]) -> None:
    await keeping


def _say_stopping(console: Console, balancer: Running) -> None:
    under_way = balancer.snapshot().running
    if under_way:
        console.print(f"finishing {under_way} running; Ctrl-C again to stop at once")


def _fail(message: str, status: int = CANNOT_RUN) -> NoReturn:
    print(message, file=sys.stderr)  # noqa: T201
    raise typer.Exit(status)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
