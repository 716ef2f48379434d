"""`balancer batch run` and `balancer presets ...`: parses, calls, prints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from balancer import config_file
from balancer.batch import client, journal, papers, progress
from balancer.batch.client import EndpointError, OfferedModel
from balancer.batch.journal import JournalError
from balancer.batch.names import readable
from balancer.batch.papers import PaperFault
from balancer.batch.presets import Preset, PresetError, Shelf, own_folder, read
from balancer.batch.report import Row, found_in
from balancer.batch.run import JOURNAL, RESULTS, Job, Run
from balancer.config_file import ConfigFile
from balancer.reached import NotTrusted, reach
from worker_agent.forgiving_json import ConfigFaults

SOME_FAILED, CANNOT_RUN, INTERRUPTED = 1, 2, 130

batch = typer.Typer(help="Ask the same questions of many papers.", no_args_is_help=True)
presets = typer.Typer(help="The sets of questions that can be asked.", no_args_is_help=True)

_PresetsFolder = Annotated[
    Path | None,
    typer.Option("--presets", metavar="DIR", help="Your own presets; default: see `presets list`."),
]


@batch.callback()
def _batch() -> None:
    # With a callback typer keeps `run` a word of its own even while it is the only command.
    pass


@batch.command()
def run(
    files: Annotated[
        list[Path], typer.Argument(metavar="PAPERS...", help="PDF, .txt and .md files, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the reports; a second run resumes there.")],
    preset: Annotated[str, typer.Option(help="Which questions: see `presets list`.")] = "summary",
    url: Annotated[
        str, typer.Option(envvar="BALANCER_URL", help="The OpenAI-compatible endpoint.")
    ] = "http://127.0.0.1:4000",
    model: Annotated[str | None, typer.Option(help="Needed where several models are served.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Papers at the same time.")] = 4,
    max_requests: Annotated[
        int | None,
        typer.Option(
            min=1, envvar="MAX_CONCURRENT_BATCH", help="Requests in flight at most; default 50.", metavar="N"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The balancer's JSON file, for its max_concurrent_batch."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="BALANCER_API_KEY", show_envvar=True)] = None,
    presets_folder: _PresetsFolder = None,
) -> None:
    """Ask a preset's questions of each paper; leaves a Markdown report for each, and results.jsonl.

    Exit status: 0 all papers completed, 1 some failed, 2 nothing could be done, 130 interrupted.
    """
    console = Console()
    try:
        if max_requests is None:
            max_requests = (ConfigFile() if config is None else config_file.read(config)).max_concurrent_batch
        chosen = _shelf(presets_folder).get(preset)
        meant = papers.expand(files, out=out)
        if not meant:
            raise PaperFault("there is no PDF, .txt or .md file in what was named")
        out.mkdir(parents=True, exist_ok=True)
        rows = asyncio.run(
            _run(
                tuple(meant),
                chosen,
                out,
                console,
                url=url,
                model=model,
                api_key=api_key,
                papers_at_once=min(concurrency, max_requests),
                requests_at_once=max_requests,
            )
        )
    except KeyboardInterrupt:
        typer.echo(
            f"Interrupted. Every answer so far is kept in {readable(out / JOURNAL)}. To go on, "
            "run the same command again: it asks only what is not answered yet.",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    except (ConfigFaults, PresetError, PaperFault, EndpointError, JournalError, NotTrusted) as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"{error}. Every answer so far is kept; run again when this is put right.")
    _summarise(rows, out)


async def _run(
    meant: tuple[Path, ...],
    preset: Preset,
    out: Path,
    console: Console,
    *,
    url: str,
    model: str | None,
    api_key: str | None,
    papers_at_once: int,
    requests_at_once: int,
) -> tuple[Row, ...]:
    reached = await asyncio.to_thread(reach, client.root_of(url))
    async with client.connected(reached.root, api_key=api_key, tls=reached.tls) as endpoint:
        job = Job(
            papers=meant,
            preset=preset,
            model=choose(await endpoint.models(), model, url=endpoint.url),
            out=out,
            papers_at_once=papers_at_once,
            requests_at_once=requests_at_once,
        )
        _refuse_a_foreign_folder(out / RESULTS, job)
        console.print(
            f"{_count(meant, 'paper')}, {_count(preset.prompts, 'question')} each ({preset.name}), "
            f"for {job.model.name} at {endpoint.url}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if reason := await endpoint.idle_reason():
            console.print(
                f"Waiting: {reason}. Ctrl-C is safe.", markup=False, highlight=False, soft_wrap=True
            )
        with journal.opened(out / JOURNAL) as kept, progress.shown(len(meant), console) as observer:
            endpoint.waiting = observer.waits
            return await Run(job, endpoint, kept, observer).all()


def _refuse_a_foreign_folder(results: Path, job: Job) -> None:
    """The reports of another preset, or by another model, are not written over."""
    for preset, model in found_in(results.read_text(errors="replace") if results.exists() else ""):
        if (preset, model) != (job.preset.name, job.model.name):
            raise PaperFault(
                f"{readable(results.parent)} holds the reports of preset {preset!r} by {model!r}: choose "
                "another folder with --out, or remove them"
            )


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def choose(models: Sequence[OfferedModel], wanted: str | None, *, url: str) -> OfferedModel:
    """The model to ask; raises `EndpointError` with what there is to choose from. Pure."""
    names = ", ".join(model.name for model in models)
    if not models:
        raise EndpointError(f"{url} serves no model yet: see `balancer workers`.")
    if wanted is None:
        if len(models) > 1:
            raise EndpointError(f"{url} serves several models; choose one with --model: {names}.")
        return models[0]
    for model in models:
        if model.name == wanted:
            return model
    raise EndpointError(f"{url} does not serve {wanted!r}. It serves: {names}.")


def _summarise(rows: Sequence[Row], out: Path) -> None:
    failed = [row for row in rows if not row.completed]
    typer.echo(
        f"{len(rows) - len(failed)} completed, {len(failed)} failed. "
        f"Reports and {RESULTS} are in {readable(out)}."
    )
    for row in failed:
        typer.echo(f"  {readable(row.file)}: {row.error}")
    if failed:
        typer.echo("Run the same command again to try the failed ones again; the others are kept.")
        raise typer.Exit(SOME_FAILED)


def _stop(reason: str) -> NoReturn:
    typer.echo(f"Error: {reason}", err=True)
    raise typer.Exit(CANNOT_RUN)


def _shelf(folder: Path | None) -> Shelf:
    if folder is not None and not folder.is_dir():
        raise PresetError(f"there is no folder {readable(folder)}")
    return Shelf(folder or own_folder())


@presets.command("list")
def list_presets(presets_folder: _PresetsFolder = None) -> None:
    """All presets, with their number of questions."""
    try:
        shelf = _shelf(presets_folder)
    except PresetError as error:
        _stop(str(error))
    for found in shelf.all():
        owner = " (yours)" if found.own else ""
        if found.preset is None:
            typer.echo(f"{readable(found.name)}{owner}: cannot be used: {' '.join(found.faults)}")
        else:
            count = len(found.preset.prompts)
            typer.echo(f"{found.name}{owner}: {count} questions. {found.preset.description}")
    typer.echo(f"Your own are read from {readable(shelf.own)}.")


@presets.command("show")
def show_preset(
    name: Annotated[str, typer.Argument(help="As `presets list` gives it.")],
    presets_folder: _PresetsFolder = None,
) -> None:
    """What a preset asks."""
    try:
        preset = _shelf(presets_folder).get(name)
    except PresetError as error:
        _stop(str(error))
    typer.echo(f"{preset.name}: {preset.description}")
    if preset.system:
        typer.echo(f"\n[system]\n{preset.system}")
    for prompt in preset.prompts:
        typer.echo(f"\n[{prompt.name}] at most {prompt.max_tokens} tokens, temperature {prompt.temperature}")
        typer.echo(prompt.text)


@presets.command("check")
def check_preset(file: Annotated[Path, typer.Argument(help="A preset as JSON.")]) -> None:
    """Say what is wrong with a preset file, in sentences."""
    try:
        preset = read(file)
    except PresetError as error:
        for fault in error.faults:
            typer.echo(f"{readable(file)}: {fault}", err=True)
        raise typer.Exit(SOME_FAILED) from None
    typer.echo(f"{readable(file)} is fine: {len(preset.prompts)} questions.")
