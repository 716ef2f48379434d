"""`worker-agent service`: has systemd or launchd keep an agent running on this machine, and ends that again.

What it does is printed. A file that somebody else wrote is left alone.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, NoReturn

import typer

from worker_agent import units
from worker_agent.keepers import (
    Keeper,
    Machine,
    Scope,
    ServiceError,
    Status,
    keeper,
    this_machine,
)
from worker_agent.settings import Settings, SettingsError, default_data_dir, load
from worker_agent.units import Unit

_GRAPHICS = ("video", "render")


# What is done ...


def install(machine: Machine, scope: Scope, unit: Unit, *, force: bool = False) -> None:
    """Writes the file where it is not so already, and has the service run. Raises `ServiceError`."""
    keeps = keeper(machine, scope)
    if reason := keeps.unusable():
        raise ServiceError(f"nothing was installed: {reason}")
    _insist_on_rights(machine, scope, "install")
    text = _text(keeps, unit)
    changed = _found(keeps.file) != text
    if changed:
        _insist_on_ours(keeps.file, force)
        _make_folder(keeps.folder(unit), unit.user)
        _write(keeps.file, text, 0o644 if scope is Scope.SYSTEM else 0o600)
        machine.say(f"wrote {keeps.file}")
    else:
        machine.say(f"{keeps.file} is as it should be")
    keeps.start(changed=changed, stop_seconds=unit.stop_seconds)
    for line in keeps.advice(unit):
        machine.say(line)


def uninstall(machine: Machine, scope: Scope, *, force: bool = False) -> bool:
    """Ends the service and removes its file; False: there was none. Raises `ServiceError`."""
    keeps = keeper(machine, scope)
    if _found(keeps.file) is None:
        return False
    _insist_on_rights(machine, scope, "uninstall")
    _insist_on_ours(keeps.file, force)
    usable = keeps.unusable() is None
    if usable:
        keeps.stop()
    keeps.file.unlink()
    machine.say(f"removed {keeps.file}")
    if usable:
        keeps.forget()
    return True


def installed(machine: Machine) -> Iterator[tuple[Scope, Keeper, str]]:
    """The services that we have installed here, with the text of their files."""
    for scope in Scope:
        with contextlib.suppress(ServiceError):
            keeps = keeper(machine, scope)
            text = _found(keeps.file)
            if text is not None and units.is_ours(text):
                yield scope, keeps, text


# ... and its parts.


def _text(keeps: Keeper, unit: Unit) -> str:
    try:
        return keeps.text(unit)
    except units.Unwritable as error:
        raise ServiceError(str(error)) from None


def _insist_on_rights(machine: Machine, scope: Scope, verb: str) -> None:
    if scope is Scope.SYSTEM and machine.uid != 0:
        again = shlex.join(["sudo", *machine.program, "service", verb, "--system"])
        raise ServiceError(f"a service of the whole machine needs root: {again}, with the same options")
    if scope is Scope.USER and machine.uid == 0 and machine.environment.get("SUDO_USER"):
        raise ServiceError(
            "this would be a service of root's own: leave sudo out, or give --system for one of the machine"
        )


def _found(file: Path) -> str | None:
    """What the file holds; None: there is none. A link, or what is no text, is somebody else's."""
    if file.is_symlink():
        return ""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServiceError(f"{file} cannot be read: {error.strerror}") from None


def _insist_on_ours(file: Path, force: bool) -> None:
    text = _found(file)
    if text is not None and not units.is_ours(text) and not force:
        raise ServiceError(f"{file} was not written by this command: look at it, then give --force")


def _write(file: Path, text: str, mode: int) -> None:
    """Whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            os.fchmod(descriptor, mode)
            out.write(text)
        beside.replace(file)
    except OSError as error:
        raise ServiceError(f"{file} cannot be written: {error.strerror}") from None


def _make_folder(folder: Path, owner: str | None) -> None:
    """With all above it that is missing; what root makes for somebody is theirs."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        for each in reversed(missing):
            each.mkdir(mode=0o700)
            if owner is not None:
                account = pwd.getpwnam(owner)
                os.chown(each, account.pw_uid, account.pw_gid)
    except OSError as error:
        raise ServiceError(f"{folder} cannot be made: {error.strerror}; give another --data-dir") from None


# The command line.

commands = typer.Typer(
    no_args_is_help=True, help="Have this machine keep an agent running, from its start on, and after faults."
)

_User = Annotated[bool, typer.Option("--user", help="A service of your own; the default.")]
_System = Annotated[bool, typer.Option("--system", help="A service of the whole machine; needs root.")]
_Force = Annotated[bool, typer.Option("--force", help="Also where somebody else wrote its file.")]


@commands.command("install")
def install_command(
    context: typer.Context,
    options: Annotated[
        list[str] | None, typer.Argument(help="After `--`: options as for `worker-agent run`.")
    ] = None,
    user: _User = False,
    system: _System = False,
    run_as: Annotated[
        str | None, typer.Option("--as", metavar="USER", help="With --system: who it runs as.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file, and change nothing.")] = False,
    force: _Force = False,
) -> None:
    """Writes a unit of systemd or an agent of launchd, and starts it. Again: brings it up to date."""
    machine = this_machine(typer.echo)
    try:
        scope = _scope(user, system) or Scope.USER
        unit = _unit(context, machine, scope, options or [], run_as)
        if dry_run:
            typer.echo(_text(keeper(machine, scope), unit), nl=False)
            return
        install(machine, scope, unit, force=force)
    except ServiceError as error:
        _give_up(error)


@commands.command("uninstall")
def uninstall_command(user: _User = False, system: _System = False, force: _Force = False) -> None:
    """Ends the service and removes its file. Models and the id stay: `worker-agent uninstall --data`."""
    machine = this_machine(typer.echo)
    try:
        wanted = _scope(user, system)
        scopes = [wanted] if wanted else [scope for scope, _, _ in installed(machine)]
        removed = [uninstall(machine, scope, force=force) for scope in scopes]
        if not any(removed):
            typer.echo("no service is installed")
    except ServiceError as error:
        _give_up(error)


@commands.command("status")
def status_command(user: _User = False, system: _System = False) -> None:
    """Shows whether a service is installed and runs. Ends with code 3 where it does not run, 4 where there is
    none."""
    machine = this_machine(typer.echo)
    try:
        wanted = _scope(user, system)
        found = [each for each in installed(machine) if wanted in (None, each[0])]
        if not found:
            typer.echo("no service is installed: worker-agent service install")
            raise typer.Exit(4)
        runs = [_show(scope, keeps, text) for scope, keeps, text in found]
    except ServiceError as error:
        _give_up(error)
    if not any(runs):
        raise typer.Exit(3)


def _show(scope: Scope, keeps: Keeper, text: str) -> bool:
    status = keeps.status() if keeps.unusable() is None else Status(False, "systemd does not run here")
    typer.echo(f"{scope.value} service: {status.words}")
    typer.echo(f"file: {keeps.file}")
    typer.echo(f"data: {keeps.data_dir(text)}")
    return status.runs


def _scope(user: bool, system: bool) -> Scope | None:
    if user and system:
        raise ServiceError("give --user or --system, not both")
    if system:
        return Scope.SYSTEM
    return Scope.USER if user else None


def _unit(
    context: typer.Context, machine: Machine, scope: Scope, options: list[str], run_as: str | None
) -> Unit:
    owner, home = _owner(machine, scope, run_as)
    folder = Path.cwd()
    options = units.absolute(options, PurePath(folder), lambda path: Path(path).exists())
    settings = _settings(context, options)
    _insist_on_absolute(settings)
    data_dir = folder / (settings.data_dir or _default_data_dir(home))
    if not any(word == "--data-dir" or word.startswith("--data-dir=") for word in options):
        options = [*options, "--data-dir", str(data_dir)]
    environment, secret = units.carried(machine.environment)
    for name in secret:
        typer.echo(
            f"{name} is not written into the service's file, which others may read: keep it in a file of its "
            "own, and name that in the agent's JSON file (--config)",
            err=True,
        )
    if "/uv/archive-v" in machine.program[0] or "/uv/environments-v" in machine.program[0]:
        typer.echo(
            f"{machine.program[0]} lies in uv's cache and goes with it: use `uv tool install`, or a checkout",
            err=True,
        )
    return Unit(
        argv=(*machine.program, "run", *options),
        data_dir=str(data_dir),
        home=str(home),
        environment=environment,
        stop_seconds=units.stop_seconds(settings.drain_seconds),
        user=owner,
        groups=_graphics_groups() if owner and machine.system == "Linux" else (),
        before=_modprobe() if owner and machine.system == "Linux" else (),
    )


def _owner(machine: Machine, scope: Scope, run_as: str | None) -> tuple[str | None, Path]:
    """Whom a service of the machine runs as, None for one of the user's own; and the home."""
    if scope is Scope.USER:
        if run_as is not None:
            raise ServiceError("--as goes with --system: a service of your own runs as you")
        return None, machine.home
    name = run_as or machine.environment.get("SUDO_USER") or (machine.user if machine.uid else None)
    if name is None:
        raise ServiceError("say who it runs as: --as USER; an agent needs no root")
    try:
        return name, Path(pwd.getpwnam(name).pw_dir)
    except KeyError:
        raise ServiceError(f"there is no user {name}") from None


def _default_data_dir(home: Path) -> Path:
    """That of who has this home, where root installs for them."""
    default, ours = default_data_dir(), Path.home()
    return home / default.relative_to(ours) if default.is_relative_to(ours) else default


def _graphics_groups() -> tuple[str, ...]:
    there = {group.gr_name for group in grp.getgrall()}
    return tuple(name for name in _GRAPHICS if name in there)


def _modprobe() -> tuple[str, ...]:
    """Makes the devices that CUDA needs, which without root's rights nobody could."""
    program = shutil.which("nvidia-modprobe", path="/usr/sbin:/usr/bin:/sbin:/bin")
    return (program, "-u", "-c=0") if program else ()


def _settings(context: typer.Context, options: list[str]) -> Settings:
    """Those that a run with these options would have: a mistake is told now, not in a log."""
    known: Mapping[str, Any] = getattr(context.find_root().command, "commands", {})
    parameters: dict[str, Any] = {}
    if "run" in known:
        with known["run"].make_context("run", list(options), parent=context.find_root()) as parsed:
            parameters = dict(parsed.params)
    if parameters.get("exit_with_parent"):
        raise ServiceError("--exit-with-parent is for programs that start an agent: leave it out")
    flags = {name: value for name, value in parameters.items() if name in Settings.model_fields}
    if parameters.get("balancer"):
        flags["balancers"] = tuple(parameters["balancer"])
    try:
        return load(parameters.get("config"), flags)
    except SettingsError as error:
        raise ServiceError(str(error)) from None


def _insist_on_absolute(settings: Settings) -> None:
    """A service starts in its owner's home: what was meant from here would be looked for there."""
    named = {
        "model": settings.model,
        **{f"models.{name}.path": options.path for name, options in settings.models.items()},
        **{name: getattr(settings, name) for name in ("models_dir", "cluster_key_file", "hub_token_file")},
    }
    for setting, value in named.items():
        if value is None or str(value).startswith(("/", "~")):
            continue
        if isinstance(value, Path) or value.endswith(".gguf") or Path(value).exists():
            raise ServiceError(
                f"{setting}: a service starts in another folder, so write {Path(value).absolute()}"
            )


def _give_up(error: ServiceError) -> NoReturn:
    typer.echo(str(error), err=True)
    raise typer.Exit(2)
