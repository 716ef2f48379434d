"""`worker-agent models`: what is on this disk, fetching, deleting, verifying. No running agent is needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from worker_agent.models.catalog import Catalog, Entry, NotAModel
from worker_agent.models.downloads import DownloadPolicy, DownloadRefused, Downloads
from worker_agent.models.names import name_for
from worker_agent.models.selection import is_wanted
from worker_agent.wire import Download, DownloadState, ModelOrder

_LOOK_SECONDS = 0.2
_FAILED, _WRONG_USE, _INTERRUPTED = 1, 2, 130

_Config = Annotated[Path | None, typer.Option(help="The agent's JSON file with settings.")]
_DataDir = Annotated[
    Path | None,
    typer.Option(help="The agent's --data-dir, where models lie.", show_default="user's data folder"),
]
_Name = Annotated[str, typer.Argument(help="The model's name, as `models list` shows it.")]


def commands(
    folder: Callable[[Path | None, Path | None], Path],
    policy: Callable[[Path | None, Path | None], DownloadPolicy],
) -> typer.Typer:
    """The sub-commands. Both arguments are called with the settings file and the data folder that the user
    gave: `folder` tells where models lie, `policy` how they are fetched. What they raise ends the command."""
    app = typer.Typer(no_args_is_help=True, help="The models on this machine's disk.")

    @app.command("list")
    def list_(
        json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
        config: _Config = None,
        data_dir: _DataDir = None,
    ) -> None:
        """Shows what was downloaded, and what of it is damaged."""
        catalog = Catalog(folder(config, data_dir))
        entries = _entries(catalog)
        if json:
            rows = [_row(entry) for entry in entries]
            sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2) + b"\n")
            return
        if entries:
            _show(entries)
        begun = catalog.begun()
        for name, count in begun:
            typer.echo(
                f"{name} is not complete, {count / 2**30:.1f} GiB have come:"
                f" download it again to go on, or: worker-agent models delete {name}"
            )
        if not entries and not begun:
            typer.echo(
                f"no models in {catalog.folder} yet; fetch one:"
                " worker-agent models download Qwen/Qwen2.5-3B-Instruct-GGUF"
            )

    @app.command()
    def download(
        repo: Annotated[str, typer.Argument(metavar="ORG/MODEL", help="As the hub calls it.")],
        file: Annotated[
            str | None, typer.Option(help="Of several GGUF files: its name, or a quantisation like Q4_K_M.")
        ] = None,
        name: Annotated[str | None, typer.Option(help="What clients ask for.", show_default="MODEL")] = None,
        revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
        config: _Config = None,
        data_dir: _DataDir = None,
    ) -> None:
        """Fetches a model and verifies it; run again after an interruption, it goes on where it was."""
        try:
            order = ModelOrder(name=name or repo, repo=repo, revision=revision, file=file)
        except ValueError:
            _give_up(f"{repo[:100]!a} is not a repository's name; it looks like org/model", _WRONG_USE)
        catalog = Catalog(folder(config, data_dir))
        try:
            ended = asyncio.run(_downloaded(catalog, policy(config, data_dir), order))
        except DownloadRefused as error:
            if error.code == "model_exists" and (there := _the_same(catalog, order)) is not None:
                typer.echo(f"{there} is here already, verified when it came")
                return
            _give_up(str(error), _WRONG_USE)
        except KeyboardInterrupt:
            _give_up("stopped; what has come is kept: run the same command again to go on", _INTERRUPTED)
        if ended.state is not DownloadState.DONE:
            _give_up(ended.detail, _FAILED)
        typer.echo(f"{ended.name} is here, verified")

    @app.command()
    def delete(name: _Name, config: _Config = None, data_dir: _DataDir = None) -> None:
        """Removes a model, or what has come of one."""
        try:
            Catalog(folder(config, data_dir)).delete(name)
        except NotAModel as error:
            _give_up(str(error), _FAILED)
        typer.echo(f"{name} is deleted")

    @app.command()
    def verify(
        name: Annotated[str | None, typer.Argument(help="Which model.", show_default="all")] = None,
        config: _Config = None,
        data_dir: _DataDir = None,
    ) -> None:
        """Reads models again and compares them with what was verified when they came.

        A file that differs goes to the quarantine; download the model again to mend it.
        """
        catalog = Catalog(folder(config, data_dir))
        names = [name] if name is not None else [entry.name for entry in _entries(catalog)]
        faults = [fault for model in names if (fault := _verified(catalog, model)) is not None]
        if faults:
            _give_up("\n".join(faults), _FAILED)

    return app


def _entries(catalog: Catalog) -> tuple[Entry, ...]:
    try:
        return catalog.entries()
    except OSError as error:
        _give_up(f"{catalog.folder} cannot be read: {error.strerror}", _FAILED)


def _verified(catalog: Catalog, name: str) -> str | None:
    """What is wrong with a model; None: nothing, which is said."""
    try:
        with _bar() as progress:
            task = progress.add_task(name, total=None)
            wrong = catalog.verify(name, lambda count: progress.advance(task, count))
    except NotAModel as error:
        return str(error)
    if wrong:
        return f"{name}: {', '.join(wrong)} changed and lies in the quarantine now; download it again"
    typer.echo(f"{name} is as it was when it came")
    return None


def _the_same(catalog: Catalog, order: ModelOrder) -> str | None:
    """The name of the model that is here and is what this order asks for; None: it is another one."""
    repo = order.repo or order.name
    name = name_for(repo) if order.name == repo else order.name
    entry = next((entry for entry in _entries(catalog) if entry.name == name), None)
    manifest = None if entry is None else entry.manifest
    if manifest is None or manifest.repo != repo:
        return None
    if order.revision is not None and order.revision not in (manifest.revision, manifest.commit):
        return None
    if order.file is not None and (manifest.main is None or not is_wanted(manifest.main, order.file)):
        return None
    return name


async def _downloaded(catalog: Catalog, policy: DownloadPolicy, order: ModelOrder) -> Download:
    """The download when it has ended. Raises `DownloadRefused`."""
    logging.getLogger("worker_agent").addHandler(logging.NullHandler())  # the command says it all itself
    changed = asyncio.Event()
    downloads = Downloads(catalog, policy, changed.set)
    async with downloads.running():
        told = downloads.start(order)
        with _bar() as progress:
            task = progress.add_task(told.name, total=None)
            noted = ""
            while told.state in (DownloadState.DOWNLOADING, DownloadState.VERIFYING):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_SECONDS)
                changed.clear()
                told = downloads.told()[-1]
                label = f"verifying {told.name}" if told.state is DownloadState.VERIFYING else told.name
                progress.update(task, description=label, total=told.total_bytes, completed=told.done_bytes)
                if told.detail != noted and told.state is DownloadState.DOWNLOADING and told.detail:
                    progress.console.print(told.detail, style="dim", highlight=False, markup=False)
                noted = told.detail
    return told


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """On a terminal; elsewhere nothing is drawn."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress


def _row(entry: Entry) -> dict[str, object]:
    model, manifest = entry.model, entry.manifest
    return {
        "name": entry.name,
        "format": None if manifest is None else manifest.format,
        "size_bytes": None if model is None else model.size_bytes,
        "path": None if model is None else model.path,
        "repo": None if manifest is None else manifest.repo,
        "commit": None if manifest is None else manifest.commit,
        "fault": entry.fault or None,
    }


def _show(entries: tuple[Entry, ...]) -> None:
    rows = [
        (
            entry.name,
            "" if entry.manifest is None else str(entry.manifest.format),
            "" if entry.model is None else f"{(entry.model.size_bytes or 0) / 2**30:.1f} GiB",
            "" if entry.manifest is None else f"{entry.manifest.repo}@{entry.manifest.commit[:8]}",
            f"damaged: {entry.fault}; download it again" if entry.fault else "",
        )
        for entry in entries
    ]
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row).rstrip())
        return
    table = Table("name", "format", "size", "from", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _give_up(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
