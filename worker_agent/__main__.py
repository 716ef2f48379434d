"""The command line of an agent: run, join, doctor, models, service, uninstall. Parses, calls, prints."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
import uvloop

from worker_agent import app as agent
from worker_agent import cluster_key, findings_table, log_format, service, uninstall, where_balancers_are
from worker_agent.contacts import NoAddress
from worker_agent.doctor import show
from worker_agent.engines.choice import NoChoice
from worker_agent.findings import as_json, has_fault
from worker_agent.handshake import is_invitation, parse_invitation
from worker_agent.identity import NoIdentity
from worker_agent.models import cli as models
from worker_agent.models.downloads import DownloadPolicy, DownloadRefused
from worker_agent.network import NetworkPolicy, examine
from worker_agent.private_files import FileFault
from worker_agent.server import CannotListen
from worker_agent.settings import Settings, SettingsError, default_data_dir, is_http_url, load

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
_DialOut = Annotated[
    bool | None,
    typer.Option("--dial-out", help="Open the connections from here, if balancers cannot reach us."),
]
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
    dial_out: _DialOut = None,
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
        "dial_out": dial_out,
        "log_level": log_level,
    }
    settings = _with_kept_balancers(_settings(config, flags))
    if settings.dial_out and not settings.balancers:
        _give_up("to dial out, give the balancer's address: --balancer http://192.168.1.10:4000")
    _set_up_log(settings)
    try:
        _perform(agent.run(settings, exit_with_parent=exit_with_parent))
    except (NoChoice, NoIdentity, FileFault, agent.NoParent, CannotListen) as error:
        _give_up(str(error))


@cli.command()
def join(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="What `balancer cluster invite` shows; - reads it from standard input. Or a balancer's"
            " address, like http://192.168.1.10:4000.",
        ),
    ],
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
    dial_out: _DialOut = None,
    exit_with_parent: _WithParent = False,
    log_level: _LogLevel = None,
    config: _Config = None,
) -> None:
    """Runs, and joins the balancer that WHAT names; an invitation lets this machine into its room."""
    if what == "-" or is_invitation(what):
        _accept(what if what != "-" else sys.stdin.readline() if sys.stdin else "", config, data_dir)
        _become(["run", *_options(context)])
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
        balancer=[what, *(balancer or [])],
        no_mdns=no_mdns,
        dial_out=dial_out,
        exit_with_parent=exit_with_parent,
        log_level=log_level,
        config=config,
    )


def _accept(text: str, config: Path | None, data_dir: Path | None) -> None:
    """Keeps an invitation for good: the key, and where the balancers are."""
    try:
        invitation = parse_invitation(text)
    except ValueError as error:
        _give_up(str(error))
    urls = tuple(place if "://" in place else f"http://{place}" for place in invitation.balancers)
    settings = _settings(config, {"data_dir": data_dir, "balancers": urls or None})
    folder = settings.data_dir or default_data_dir()
    if settings.cluster_key is None:
        file = folder / cluster_key.FILE
        try:
            cluster_key.kept(file, invitation.key)
        except FileFault as error:
            _give_up(str(error))
        typer.echo(f"the cluster key is kept in {file}", err=True)
    elif settings.cluster_key.get_secret_value() != invitation.key:
        _give_up(
            "WORKER_AGENT_CLUSTER_KEY or cluster_key_file gives another cluster key than the invitation: take"
            " that away"
        )
    try:
        where_balancers_are.keep(folder, urls)
    except FileFault as error:
        _give_up(str(error))


def _with_kept_balancers(settings: Settings) -> Settings:
    """With those that an invitation has named, after those of the settings."""
    folder = settings.data_dir or default_data_dir()
    try:
        kept = where_balancers_are.kept(folder, is_http_url)
    except FileFault as error:
        _give_up(str(error))
    new = (url for url in kept if url not in settings.balancers)
    return settings.model_copy(update={"balancers": (*settings.balancers, *new)})


def _options(context: typer.Context) -> list[str]:
    """Those that were given, as they are typed."""
    words: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.param_type_name != "option" or value is None or value is False:
            continue
        for each in value if isinstance(value, list | tuple) else (value,):
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return words


def _become(words: list[str]) -> NoReturn:
    """Goes on as the same program with these words: those that it has now hold a secret, which every other
    user of this machine could read for as long as it runs."""
    sys.stdout.flush()
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    os.execv(sys.executable, [*program, *words])


@cli.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    network: Annotated[
        bool, typer.Option("--network", help="Why this machine and a balancer do not see each other.")
    ] = False,
    balancer: Annotated[
        list[str] | None,
        typer.Option(help="With --network: a balancer's address to look for; may be repeated."),
    ] = None,
    port: _Port = None,
    engine: _Engine = None,
    model: _Model = None,
    data_dir: _DataDir = None,
    config: _Config = None,
) -> None:
    """Shows this machine, its engines, which would run and why, what fits and how fast it would be. With
    --network: what keeps balancers and this machine apart, and how to mend it.

    Ends with code 1 where none can run, or the network has a fault.
    """
    flags = {"engine": engine, "model": model, "port": port, "data_dir": data_dir}
    settings = _settings(config, flags)
    if network:
        _show_network(_with_kept_balancers(settings), balancer or (), json=json)
        return
    inspection = _perform(agent.inspect(settings))
    findings = agent.findings(settings, inspection)
    if json:
        sys.stdout.buffer.write(orjson.dumps(findings, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        show(findings)
    if findings["engine"] is None:
        raise typer.Exit(1)


def _show_network(settings: Settings, balancers: Sequence[str], *, json: bool) -> None:
    policy = NetworkPolicy(
        host=settings.host,
        port=settings.port,
        tls=settings.tls,
        mdns=settings.mdns,
        balancers=settings.balancers,
        data_dir=settings.data_dir or default_data_dir(),
        cluster_key=None if settings.cluster_key is None else settings.cluster_key.get_secret_value(),
    )
    try:
        found = _perform(examine(policy, balancers))
    except NoAddress as error:
        _give_up(str(error))
    if json:
        sys.stdout.buffer.write(orjson.dumps(as_json(found), option=orjson.OPT_INDENT_2) + b"\n")
    else:
        findings_table.show(found)
    if has_fault(found):
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
    lines = logging.StreamHandler()
    lines.addFilter(log_format.Ids())
    lines.setFormatter(log_format.formatter(settings.log_format, names=True, date=True))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[lines], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # It warns, with a traceback, of each interface on which it cannot send; whether it can at all is said by
    # `advertise`.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    log_format.log_what_nobody_caught()


def _give_up(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def main() -> None:
    """The entry point `worker-agent`."""
    cli()


if __name__ == "__main__":
    main()
