"""The commands that ask a running balancer: `balancer drain`, `models`, `config reload` and their like. They
parse, call and print.

Whoever may read the balancer's data folder needs no key on the command line: it is found there. It is sent to
a balancer on this very machine only; for any other it has to be given.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from balancer import keys
from balancer.batch.client import root_of
from balancer.reached import NotTrusted, is_here, noted_data_dir, reach
from balancer.settings import Settings, SettingsError, load, variable

REFUSED, CANNOT_RUN = 1, 2
ANSWER_SECONDS = 30.0
LOOK_SECONDS = 1.0
NEVER_SEEN_LOOKS = 30
"""After which a download that no worker tells of is not waited for."""
GIB = 1024**3

models = typer.Typer(help="The models of all workers: what there is, load, unload, download, delete.")

UrlOption = Annotated[str, typer.Option(envvar="BALANCER_URL", help="The running balancer.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--admin-key-file", metavar="FILE", help="Holds its admin key; default: found by itself."),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="The one that the balancer was started with.",
        callback=noted_data_dir,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Show how far it is, until it is done.")]
WorkerArgument = Annotated[
    str, typer.Argument(metavar="WORKER", help="Its id, as `balancer workers` shows it.")
]
WorkerOption = Annotated[
    str | None, typer.Option("--worker", metavar="ID", help="The one; default: see above.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="As `balancer models` shows it.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Even if it answers requests, which are ended.")]

DEFAULT_URL = "http://127.0.0.1:4000"


# Asking ...


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Mapping[str, Any]


class NoAnswer(Exception):
    """No balancer is there, or it does not do what was asked; a sentence for the terminal."""

    def __init__(self, sentence: str, status: int = REFUSED) -> None:
        super().__init__(sentence)
        self.status = status


class Asking:
    """A running balancer, asked one thing after the other."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url`: with or without scheme, and with or without the `/v1` of its endpoint. `key`: its admin
        key; None: for what needs none. Blocking; raises `NoAnswer`."""
        self._named = url
        try:
            reached = reach(root_of(url.strip()))
        except NotTrusted as error:
            raise NoAnswer(f"{error}", CANNOT_RUN) from None
        self._root, self._tls = reached.root, reached.tls
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Answer:
        """Raises `NoAnswer`, also for an error whose sentence the balancer gives itself."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session,
                session.request(
                    method,
                    self._root + path,
                    json=body,
                    headers=self._headers,
                    allow_redirects=False,
                    ssl=self._tls,
                ) as response,
            ):
                told = orjson.loads(await response.read())
                status = response.status
        except aiohttp.ClientConnectorCertificateError:
            raise NoAnswer(
                f"the certificate at {self._named} is none that this machine trusts: copy it from there "
                "(tls/certificate.pem in the balancer's data folder), and name it with "
                "`balancer --ca-file FILE ...`",
                CANNOT_RUN,
            ) from None
        except aiohttp.ServerDisconnectedError:
            raise NoAnswer(
                f"what answers at {self._named} closes the connection without a word: "
                "a balancer that speaks TLS? Then give --url https://...",
                CANNOT_RUN,
            ) from None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise NoAnswer(
                f"no balancer answers at {self._named} ({type(error).__name__}): is it running? "
                "`balancer up` starts one",
                CANNOT_RUN,
            ) from None
        if not isinstance(told, dict) or (status >= 300 and not isinstance(told.get("error"), dict)):
            raise NoAnswer(f"what answers at {self._named} is no balancer (status {status})", CANNOT_RUN)
        if status >= 300:
            raise NoAnswer(str(told["error"].get("message", f"status {status}")))
        return Answer(status, told)


def asked(
    url: str, method: str, path: str, body: Mapping[str, object] | None = None, *, key: str | None = None
) -> Mapping[str, Any]:
    """What a running balancer answers; ends the command with a sentence where it does not."""
    try:
        return asyncio.run(Asking(url, key).ask(method, path, body)).body
    except NoAnswer as error:
        fail(str(error), error.status)


def fail(message: str, status: int = CANNOT_RUN) -> NoReturn:
    print(message, file=sys.stderr)  # noqa: T201
    raise typer.Exit(status)


# The key ...


def key_for(url: str, key_file: Path | None, data_dir: Path | None) -> str:
    """The admin key of the balancer at this address; ends the command with a sentence if there is none.

    From the file that was named, else from the variable BALANCER_ADMIN_KEY or the file that
    BALANCER_ADMIN_KEY_FILE names, else, for a balancer on this machine, from its data folder.
    """
    if key_file is not None:
        return _in_file(key_file)
    try:
        settings = load(None, {"data_dir": data_dir})
    except SettingsError as error:
        fail(str(error))
    if settings.admin_key is not None:
        return settings.admin_key
    if not _is_here(url):
        fail(
            f"the balancer at {url} is on another machine. Its admin key is there, in the file "
            f"{keys.ADMIN_KEY} in its data folder: copy that, and give it with --admin-key-file FILE or by "
            f"the variable {variable('admin_key')}"
        )
    return _kept(settings)


def key_if_known(url: str, key_file: Path | None, data_dir: Path | None) -> str | None:
    """The same where it is at hand; None where it is not."""
    if key_file is not None:
        return _in_file(key_file)
    with suppress(SettingsError, OSError, keys.KeyFault):
        settings = load(None, {"data_dir": data_dir})
        if settings.admin_key is not None:
            return settings.admin_key
        if _is_here(url):
            return keys.read(settings.data_dir / keys.ADMIN_KEY)
    return None


def _in_file(path: Path) -> str:
    try:
        words = path.expanduser().read_text("ascii").split()
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    if len(words) != 1:
        fail(f"{path} does not hold a key: expected one word")
    return words[0]


def _kept(settings: Settings) -> str:
    path = settings.data_dir / keys.ADMIN_KEY
    try:
        return keys.read(path)
    except FileNotFoundError:
        fail(
            f"there is no admin key in {path}. If the balancer was started with another --data-dir, name "
            f"that one; or give the key with --admin-key-file FILE or by the variable {variable('admin_key')}"
        )
    except keys.KeyFault as error:
        fail(f"{error}. Where another user runs the balancer, use this command as that user")


def _is_here(url: str) -> bool:
    """The address is one of this machine's own."""
    root = root_of(url.strip())
    return is_here(urlsplit(root if "://" in root else f"http://{root}").hostname or "")


# Workers and configuration ...


def drain(
    worker: WorkerArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let it get requests again.")] = False,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
) -> None:
    """Let a worker finish what it has and get nothing new, before it is stopped or updated."""
    action = "undrain" if undo else "drain"
    asked(url, "POST", _worker_path(worker, action), key=key_for(url, admin_key_file, data_dir))
    _say(
        f"{worker} gets requests again."
        if undo
        else f"{worker} gets nothing new; `balancer workers` shows what it still runs."
    )


def undrain(
    worker: WorkerArgument,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
) -> None:
    """Let a worker that was drained get requests again."""
    drain(worker, undo=True, url=url, admin_key_file=admin_key_file, data_dir=data_dir)


def remove(
    worker: WorkerArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
) -> None:
    """Take a worker out of the room, and keep it out however often it announces itself."""
    key = key_for(url, admin_key_file, data_dir)
    if undo:
        told = asked(url, "POST", _worker_path(worker, "admit"), key=key)
    else:
        told = asked(url, "DELETE", _worker_path(worker), key=key)
    _say(f"{worker} is {'let in again' if undo else 'out'}. {told['note']}")


def reload(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Have a running balancer read its configuration file again; what runs goes on."""
    told = asked(url, "POST", "/admin/config/reload", key=key_for(url, admin_key_file, data_dir))
    if json:
        _print_json(told)
        return
    words = {
        "added": "workers added",
        "removed": "workers removed",
        "changed": "workers changed",
        "applied": "settings that hold from now on",
        "needs_restart": "settings that hold from the next start on",
    }
    lines = [f"{said}: {', '.join(told[name])}" for name, said in words.items() if told[name]]
    _say("\n".join(lines) or "Nothing has changed.")


def _worker_path(worker: str, action: str = "") -> str:
    path = f"/admin/workers/{quote(worker, safe='')}"
    return f"{path}/{action}" if action else path


# Models ...


@models.callback(invoke_without_command=True)
def _models(
    context: typer.Context,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
    watch: WatchOption = False,
) -> None:
    if context.invoked_subcommand is None:
        list_models(url, admin_key_file, data_dir, json, watch)


@models.command("list")
def list_models(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
    watch: WatchOption = False,
) -> None:
    """Show every model on every worker, and the downloads. With --watch, until nothing is under way."""
    key = key_for(url, admin_key_file, data_dir)
    if watch:
        _run(_watch_all(Asking(url, key)))
        return
    told = asked(url, "GET", "/admin/models", key=key)
    if json:
        _print_json(told)
        return
    console = Console()
    console.print(models_table(told))
    for line in download_lines(told):
        console.print(Text(line))


@models.command("load")
def load_model(
    model: ModelArgument,
    worker: WorkerOption = None,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
    watch: WatchOption = False,
) -> None:
    """Load a model: on the worker that is named, else where most memory is free of those that have it."""
    body = _given(model=model, worker=worker)
    _order(url, key_for(url, admin_key_file, data_dir), "load", body, json=json, watch=watch)


@models.command("unload")
def unload_model(
    model: ModelArgument,
    worker: WorkerOption = None,
    force: ForceOption = False,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Unload a model: on the worker that is named, else wherever it is loaded."""
    body = _given(model=model, worker=worker, force=force)
    _order(url, key_for(url, admin_key_file, data_dir), "unload", body, json=json)


@models.command("download")
def download_model(
    repo: Annotated[
        str,
        typer.Argument(help="ORG/MODEL of the hub, for agents; for Ollama its own name, like llama3.2:1b."),
    ],
    worker: Annotated[
        list[str] | None, typer.Option("--worker", metavar="ID", help="Where to; may be given several times.")
    ] = None,
    everywhere: Annotated[bool, typer.Option("--all", help="To all workers that can fetch it.")] = False,
    name: Annotated[str | None, typer.Option(help="By which clients shall ask for it.")] = None,
    file: Annotated[
        str | None,
        typer.Option(help="Of several GGUF files: one by its name, or a quantisation like Q4_K_M."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
    watch: WatchOption = False,
) -> None:
    """Have workers download a model; each verifies it before it can be loaded."""
    if bool(worker) == everywhere:
        fail("say where to: with --worker ID, once or several times, or with --all")
    where: object = "all" if everywhere else worker
    body = _given(repo=repo, workers=where, name=name, file=file, revision=revision)
    _order(url, key_for(url, admin_key_file, data_dir), "download", body, json=json, watch=watch)


@models.command("delete")
def delete_model(
    model: ModelArgument,
    worker: Annotated[str, typer.Option("--worker", metavar="ID", help="From which worker's disk.")],
    force: ForceOption = False,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a downloaded model from a worker's disk."""
    body = _given(model=model, worker=worker, force=force)
    _order(url, key_for(url, admin_key_file, data_dir), "delete", body, json=json)


@models.command("cancel")
def cancel_download(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The name or the repository of a download.")],
    worker: WorkerOption = None,
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Stop a download: on the worker that is named, else wherever it is under way."""
    body = _given(model=model, worker=worker)
    _order(url, key_for(url, admin_key_file, data_dir), "cancel", body, json=json)


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None and value is not False}


def _order(
    url: str, key: str, action: str, body: Mapping[str, object], *, json: bool, watch: bool = False
) -> None:
    told = asked(url, "POST", f"/admin/models/{action}", body, key=key)
    if json:
        _print_json(told)
    else:
        _say("\n".join(f"{one['worker']}: {one['detail']}" for one in told["results"]))
    begun = [one["worker"] for one in told["results"] if one["status"] == 202]
    if watch and begun:
        name = str(body.get("model") or body["repo"])
        _run(_watch_order(Asking(url, key), action, name, begun))
    if not all(one["ok"] for one in told["results"]):
        raise typer.Exit(REFUSED)


# Watching; what is shown is made by pure functions of what the balancer tells ...


def _run(work: Any) -> None:
    try:
        asyncio.run(work)
    except NoAnswer as error:
        fail(str(error), error.status)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _watch_all(asking: Asking) -> None:
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            told = (await asking.ask("GET", "/admin/models")).body
            if console.is_terminal:
                shown = Table.grid()
                shown.add_row(models_table(told))
                for line in download_lines(told):
                    shown.add_row(Text(line))
                live.update(shown, refresh=True)
            if not under_way(told):
                if not console.is_terminal:
                    live.update(models_table(told), refresh=True)
                return
            await asyncio.sleep(LOOK_SECONDS)


async def _watch_order(asking: Asking, action: str, name: str, workers: Sequence[str]) -> None:
    """Until each of them is through; ends the command with status 1 if one has failed."""
    console = Console()
    waits = {worker: Wait(worker, name) for worker in workers}
    last: list[str] = []
    with Live(console=console, auto_refresh=False) as live:
        while True:
            told = (await asking.ask("GET", "/admin/models")).body
            look = see_load if action == "load" else see_download
            waits = {worker: look(wait, told) for worker, wait in waits.items()}
            lines = [wait.line for wait in waits.values()]
            if console.is_terminal:
                live.update(Text("\n".join(lines)), refresh=True)
            else:
                for line in lines:
                    if line not in last:
                        console.print(Text(line))
            last = lines
            if all(wait.over for wait in waits.values()):
                break
            await asyncio.sleep(LOOK_SECONDS)
    if any(wait.failed for wait in waits.values()):
        raise NoAnswer(f"not everywhere: see `balancer models` for what {name} is now")


@dataclass(frozen=True, slots=True)
class Wait:
    """One worker that is at something with one model."""

    worker: str
    name: str
    seen: bool = False
    """It was told of before."""
    looks: int = 0
    over: bool = False
    failed: bool = False
    line: str = ""


def see_load(wait: Wait, told: Mapping[str, Any]) -> Wait:
    """How far it is by what the balancer tells now."""
    there = next(
        (
            one
            for model in told["models"]
            if model["name"] == wait.name
            for one in model["workers"]
            if one["worker"] == wait.worker
        ),
        None,
    )
    state = there["state"] if there else "away"
    over = state in ("loaded", "failed") or (wait.seen and state == "unloaded")
    words = f": {there['detail']}" if there and there["detail"] else ""
    return Wait(
        wait.worker,
        wait.name,
        seen=wait.seen or state == "loading",
        looks=wait.looks + 1,
        over=over,
        failed=over and state != "loaded",
        line=f"{wait.worker}: {wait.name} is {state}{_how_far(there or {})}{words}",
    )


def see_download(wait: Wait, told: Mapping[str, Any]) -> Wait:
    there = next(
        (
            one
            for one in told["downloads"]
            if one["worker"] == wait.worker and wait.name in (one["repo"], one["name"])
        ),
        None,
    )
    if there is None:
        over = wait.seen or wait.looks >= NEVER_SEEN_LOOKS
        line = f"{wait.worker}: nothing is told of {wait.name}"
        return Wait(wait.worker, wait.name, wait.seen, wait.looks + 1, over, over and not wait.seen, line)
    state = there["state"]
    return Wait(
        wait.worker,
        wait.name,
        seen=True,
        looks=wait.looks + 1,
        over=state in ("done", "failed"),
        failed=state == "failed",
        line=_download_line(there),
    )


def under_way(told: Mapping[str, Any]) -> bool:
    """Something is being loaded or fetched."""
    loads = any(one["state"] == "loading" for model in told["models"] for one in model["workers"])
    return loads or any(one["state"] in ("downloading", "verifying") for one in told["downloads"])


def models_table(told: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("model", overflow="fold")  # to be copied whole
    for heading in ("worker", "state", "memory", "on disk"):
        table.add_column(heading)
    table.add_column("detail", overflow="fold")
    for model in told["models"]:
        for number, one in enumerate(model["workers"]):
            # Text: a worker's words are no markup.
            table.add_row(
                Text("" if number else model["name"]),
                Text(one["worker"]),
                Text(one["state"] + _how_far(one)),
                _gib(one["memory_bytes"]),
                _gib(one["size_bytes"]),
                Text(one["detail"]),
            )
    return table


def download_lines(told: Mapping[str, Any]) -> Iterable[str]:
    return (_download_line(one) for one in told["downloads"])


def _download_line(one: Mapping[str, Any]) -> str:
    total = one["total_bytes"]
    done = f" {_gib(one['done_bytes'])}" + (f" of {_gib(total)}" if total else "")
    left = f", {_seconds(one['eta_seconds'])} left" if one["eta_seconds"] is not None else ""
    detail = f": {one['detail']}" if one["detail"] else ""
    return f"{one['worker']}: {one['repo']} {one['state']}{done}{left}{detail}"


def _how_far(one: Mapping[str, Any]) -> str:
    if one.get("state") != "loading":
        return ""
    share = f" {one['progress']:.0%}" if one["progress"] is not None else ""
    left = f", {_seconds(one['eta_seconds'])} left" if one["eta_seconds"] is not None else ""
    return share + left


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _gib(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 1024**2:.0f} MiB"


def _say(text: str) -> None:
    Console().print(Text(text), soft_wrap=True)


def _print_json(told: Mapping[str, Any]) -> None:
    print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())  # noqa: T201
