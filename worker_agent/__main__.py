"""The command line of an agent: run, join, doctor, models, service, uninstall. Parses, calls, prints."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
import uvloop

from worker_agent import app as agent
from worker_agent import service, uninstall
from worker_agent.doctor import show
from worker_agent.engines.choice import NoChoice
from worker_agent.identity import NoIdentity
from worker_agent.models import cli as models
from worker_agent.models.downloads import DownloadPolicy, DownloadRefused
from worker_agent.server import CannotListen
from worker_agent.settings import Settings, SettingsError, load

_T = TypeVar("_T")

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One machine of the room: runs an LLM engine and lets a balancer use it.",
)

_Engine = Annotated[
    str | None, typer.Option(help="auto, llama.cpp, llama-cpp-python, mlx or vllm.", show_default="auto")
]
_Model = Annotated[
    str | None,
    typer.Option(
        help="A downloaded model's name, a GGUF file, a folder or a hub name.", show_default="embedded"
    ),
]
_Name = Annotated[str | None, typer.Option(help="What clients ask for.", show_default="the model's")]
_Id = Annotated[
    str | None, typer.Option(help="Unique in the room.", show_default="made once from the host's")
]
_Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="0.0.0.0")]
_Port = Annotated[int | None, typer.Option(help="0: any free one.", show_default="4100")]
_Slots = Annotated[int | None, typer.Option(help="Requests at once.", show_default="by engine")]
_Context = Annotated[
    int | None, typer.Option(help="Tokens per slot, prompt and answer.", show_default="by model")
]
_Threads = Annotated[int | None, typer.Option(help="Of the engine.", show_default="all processors")]
_DataDir = Annotated[
    Path | None,
    typer.Option(help="Where the id, models and logs are kept.", show_default="user's data folder"),
]
_Balancer = Annotated[list[str] | None, typer.Option(help="A balancer's URL to join; may be repeated.")]
_NoMdns = Annotated[bool, typer.Option("--no-mdns", help="Do not advertise on the local network.")]
_WithParent = Annotated[bool, typer.Option(help="Stop at the end of standard input.")]
_LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")]
_Config = Annotated[Path | None, typer.Option(help="A JSON file with settings.")]


@cli.command()
def run(
    engine: _Engine = None,
    model: _Model = None,
    name: _Name = None,
    id: _Id = None,
    host: _Host = None,
    port: _Port = None,
    slots: _Slots = None,
    context_tokens: _Context = None,
    threads: _Threads = None,
    data_dir: _DataDir = None,
    balancer: _Balancer = None,
    no_mdns: _NoMdns = False,
    exit_with_parent: _WithParent = False,
    log_level: _LogLevel = None,
    config: _Config = None,
) -> None:
    """Runs an engine and serves it to balancers, which find this machine by themselves."""
    flags = {
        "engine": engine,
        "model": model,
        "name": name,
        "id": id,
        "host": host,
        "port": port,
        "slots": slots,
        "context_tokens": context_tokens,
        "threads": threads,
        "data_dir": data_dir,
        "balancers": tuple(balancer) if balancer else None,
        "mdns": False if no_mdns else None,
        "log_level": log_level,
    }
    settings = _settings(config, flags)
    _set_up_log(settings)
    try:
        _perform(agent.run(settings, exit_with_parent=exit_with_parent))
    except (NoChoice, NoIdentity, agent.NoParent, CannotListen) as error:
        _give_up(str(error))


@cli.command()
def join(
    url: Annotated[str, typer.Argument(help="The balancer's address, like http://192.168.1.10:4000.")],
    engine: _Engine = None,
    model: _Model = None,
    name: _Name = None,
    id: _Id = None,
    host: _Host = None,
    port: _Port = None,
    slots: _Slots = None,
    context_tokens: _Context = None,
    threads: _Threads = None,
    data_dir: _DataDir = None,
    balancer: _Balancer = None,
    no_mdns: _NoMdns = False,
    exit_with_parent: _WithParent = False,
    log_level: _LogLevel = None,
    config: _Config = None,
) -> None:
    """Runs, and tells the balancer at URL: for networks where multicast does not reach."""
    run(
        engine=engine,
        model=model,
        name=name,
        id=id,
        host=host,
        port=port,
        slots=slots,
        context_tokens=context_tokens,
        threads=threads,
        data_dir=data_dir,
        balancer=[url, *(balancer or [])],
        no_mdns=no_mdns,
        exit_with_parent=exit_with_parent,
        log_level=log_level,
        config=config,
    )


@cli.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    engine: _Engine = None,
    model: _Model = None,
    data_dir: _DataDir = None,
    config: _Config = None,
) -> None:
    """Shows this machine, its engines, which would run and why, what fits and how fast it would be.

    Ends with code 1 where none can run.
    """
    settings = _settings(config, {"engine": engine, "model": model, "data_dir": data_dir})
    inspection = _perform(agent.inspect(settings))
    findings = agent.findings(settings, inspection)
    if json:
        sys.stdout.buffer.write(orjson.dumps(findings, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        show(findings)
    if findings["engine"] is None:
        raise typer.Exit(1)


def _models_dir(config: Path | None, data_dir: Path | None) -> Path:
    return agent.catalog_of(_settings(config, {"data_dir": data_dir})).folder


def _download_policy(config: Path | None, data_dir: Path | None) -> DownloadPolicy:
    settings = _settings(config, {"data_dir": data_dir})
    inspection = _perform(agent.inspect(settings))
    try:
        return agent.download_policy(settings, inspection)
    except DownloadRefused as error:
        _give_up(str(error))


cli.add_typer(models.commands(_models_dir, _download_policy), name="models")
cli.add_typer(service.commands, name="service")
cli.command("uninstall")(uninstall.command)


def _settings(config: Path | None, flags: Mapping[str, object]) -> Settings:
    try:
        return load(config, flags)
    except SettingsError as error:
        _give_up(str(error))


def _perform(work: Coroutine[Any, Any, _T]) -> _T:
    _fill_standard_descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _fill_standard_descriptors() -> None:
    """Opens those of 0 to 2 that we were started without: libuv aborts where one of them becomes its own."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _set_up_log(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for talkative in ("asyncio", "zeroconf"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


def _give_up(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def main() -> None:
    """The entry point `worker-agent`."""
    cli()


if __name__ == "__main__":
    main()
