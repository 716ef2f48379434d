"""The commands about the configuration file: is it right, what holds and from where, what may stand in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balancer import admin_cli
from balancer.admin_cli import JsonOption, KeyOption, asked, fail, key_for
from balancer.client_tls import TlsFault, from_files
from balancer.config_file import Placed, WorkerEntry, published_schema, read_placed
from balancer.settings import NAMES, Settings, SettingsError, load, variable
from worker_agent.forgiving_json import ConfigFaults, Fault

MASKED = "******"

config = typer.Typer(help="The JSON configuration file.", no_args_is_help=True)
config.command()(admin_cli.reload)


@config.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Say what is wrong with a configuration file, each fault with line and column."""
    try:
        placed = read_placed(file)
        _insist_on_tls_files(file, placed)
    except ConfigFaults as faults:
        fail(str(faults))
    count = len(placed.content.workers)
    print(f"{file}: fine, {count} worker{'' if count == 1 else 's'}")  # noqa: T201


def _insist_on_tls_files(file: Path, placed: Placed) -> None:
    """A variable may name what the file does not. Raises `ConfigFaults`."""
    content = placed.content
    if content.tls != "files":
        return
    certificate = os.environ.get(variable("tls_cert_file")) or content.tls_cert_file
    key = os.environ.get(variable("tls_key_file")) or content.tls_key_file
    try:
        from_files(certificate, key)
    except TlsFault as fault:
        raise ConfigFaults([Fault(str(file), placed.keys["tls"], str(fault))]) from fault


@config.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors and other programs."""
    print(published_schema(), end="")  # noqa: T201


@config.command()
def show(
    file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The JSON file; without: none.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="As for `serve`, as the next.")] = None,
    port: Annotated[int | None, typer.Option()] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIR")] = None,
    mdns: Annotated[bool | None, typer.Option("--mdns/--no-mdns")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level")] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Compare with the balancer that runs there.")
    ] = None,
    admin_key_file: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Show each setting with its value and where that comes from: a default, a line of the file, a variable
    or a flag. Needs no running balancer."""
    flags = {"host": host, "port": port, "data_dir": data_dir, "mdns": mdns, "log_level": log_level}
    try:
        settings = load(file, flags)
    except (ConfigFaults, SettingsError) as faults:
        fail(str(faults))
    told = found(settings)
    running = None
    if url is not None:
        running = asked(url, "GET", "/admin/config", key=key_for(url, admin_key_file, data_dir))
        for name, one in told["settings"].items():
            if name in running["settings"] and running["settings"][name] != one["value"]:
                one["running"] = running["settings"][name]
    if json:
        told["running"] = running and {key: running[key] for key in ("file", "status", "needs_restart")}
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
    else:
        _print_settings(told, running)


def found(settings: Settings) -> dict[str, Any]:
    """Every setting with `value` and `source`, and every worker that is listed; without secrets."""
    values = settings.model_dump(mode="json", exclude={"workers"})
    shown = {name: {"value": values[name], "source": settings.source_of(name)} for name in NAMES}
    for name in ("admin_key", "cluster_key"):
        if getattr(settings, name) is not None:
            source = settings.source_of(name)
            from_file = f"the file of {name}_file"
            shown[name] = {"value": MASKED, "source": from_file if source == "default" else source}
    workers = [
        _worker(entry, source)
        for entry, source in zip(settings.workers, settings.worker_sources, strict=True)
    ]
    file = settings.config
    return {"file": None if file is None else str(file), "settings": shown, "workers": workers}


def _worker(entry: WorkerEntry, source: str) -> dict[str, Any]:
    worker = entry.worker()
    key = entry.api_key
    return {
        "id": worker.id,
        "type": worker.type,
        "url": worker.url,
        "api_key": None if key is None else MASKED,
        "source": source,
    }


def _print_settings(told: Mapping[str, Any], running: Mapping[str, Any] | None) -> None:
    console = Console()
    if told["file"] is not None:
        console.print(Text(f"The file is {told['file']}."), soft_wrap=True)
    table = Table("setting")
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    if running is not None:
        table.add_column("running with", overflow="fold", style="yellow")
    for name, one in told["settings"].items():
        cells = [name, _shown(one["value"]), one["source"]]
        if running is not None:
            cells.append(_shown(one["running"]) if "running" in one else "")
        # Text: a value is no markup.
        table.add_row(*map(Text, cells), style="dim" if one["source"] == "default" else None)
    console.print(table)
    if told["workers"]:
        workers = Table("worker", "type", "url", "key", "from")
        for one in told["workers"]:
            cells = [one["id"], one["type"], one["url"], one["api_key"] or "", one["source"]]
            workers.add_row(*map(Text, cells))
        console.print(workers)
    for line in [] if running is None else _state_of(running):
        console.print(Text(line), soft_wrap=True)  # a fault is one line, and its place is to be copied


def _state_of(running: Mapping[str, Any]) -> list[str]:
    status = running["status"]
    lines = [
        f"The running balancer reads {running['file'] or 'no file'}: "
        f"{status['state']} since {status['since']}"
    ]
    lines += [fault["message"] for fault in status["faults"]]
    if running["needs_restart"]:
        lines.append(f"These hold from its next start on: {', '.join(running['needs_restart'])}")
    return lines


def _shown(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
