"""What keeps an agent running on a machine: systemd or launchd, for its user or for everybody.

Thin: each says where its file belongs, and runs the commands that start, end and show a service. Every
command that changes something is printed.
"""

from __future__ import annotations

import os
import platform
import pwd
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from worker_agent import units
from worker_agent.units import Unit

_COMMAND_LIMIT_SECONDS = 180.0  # a stop waits until the agent has drained
_LOOK_SECONDS = 0.2


class ServiceError(Exception):
    """It cannot be done; the sentence says why, and what to do."""


class Scope(Enum):
    """Whose service it is."""

    USER = "user"
    """Of who is logged in; no root is needed."""
    SYSTEM = "system"
    """Of the machine: from its start on, whoever is logged in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What of this machine its services depend on."""

    system: str
    """`Linux` or `Darwin`."""
    uid: int
    user: str
    home: Path
    program: tuple[str, ...]
    """How this agent is started, by its absolute path."""
    environment: Mapping[str, str]
    systemd_runs: bool
    root: Path = Path("/")
    """Below it lie the folders of the system."""
    say: Callable[[str], None] = print
    command_limit_seconds: float = _COMMAND_LIMIT_SECONDS


def this_machine(say: Callable[[str], None]) -> Machine:
    """The one that we are on."""
    beside = Path(sys.executable).with_name("worker-agent")  # not resolved: an environment's python is a link
    module = (os.path.abspath(sys.executable), "-m", "worker_agent")
    return Machine(
        system=platform.system(),
        uid=os.getuid(),
        user=_name_of(os.getuid()),
        home=Path.home(),
        program=(str(beside.absolute()),) if os.access(beside, os.X_OK) else module,
        environment=os.environ,
        systemd_runs=Path("/run/systemd/system").is_dir(),  # as sd_booted(3) looks
        say=say,
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container's user without a name
        return str(uid)


@dataclass(frozen=True, slots=True)
class Status:
    """How a service is at this moment."""

    runs: bool
    words: str


class Keeper(Protocol):
    """What keeps services running: systemd or launchd, for one scope."""

    file: Path
    """Where the service's file belongs."""

    def unusable(self) -> str | None:
        """Why it cannot be used here, as a sentence with what to do; None: it can."""
        ...

    def text(self, unit: Unit) -> str:
        """The file for this agent."""
        ...

    def data_dir(self, text: str) -> str | None:
        """Where the agent of such a file keeps its data."""
        ...

    def folder(self, unit: Unit) -> Path:
        """What must be there before this agent is started."""
        ...

    def start(self, *, changed: bool, stop_seconds: int) -> None:
        """Has the file's service run, now and after a restart of the machine. `changed`: the file is new."""
        ...

    def stop(self) -> None:
        """Ends it for good; the file is removed afterwards."""
        ...

    def forget(self) -> None:
        """The file is gone."""
        ...

    def status(self) -> Status: ...

    def advice(self, unit: Unit) -> list[str]:
        """What a person should know about a service that was just started."""
        ...


def keeper(machine: Machine, scope: Scope) -> Keeper:
    """The one of this system. Raises `ServiceError` where there is none."""
    if machine.system == "Linux":
        return Systemd(machine, scope)
    if machine.system == "Darwin":
        return Launchd(machine, scope)
    raise ServiceError(
        f"services of {machine.system} are not known: have it start {shlex.join(machine.program)} run"
    )


@dataclass
class Systemd:
    """A unit of the machine's systemd, or of the user's own."""

    machine: Machine
    scope: Scope
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.scope is Scope.SYSTEM:
            folder = self.machine.root / "etc/systemd/system"
        else:
            given = self.machine.environment.get("XDG_CONFIG_HOME")
            folder = (Path(given) if given else self.machine.home / ".config") / "systemd" / "user"
        self.file = folder / units.SYSTEMD_NAME

    def unusable(self) -> str | None:
        if self.machine.systemd_runs:
            return None
        return (
            "systemd does not run here (is this a container?). Have whatever starts this machine run this, "
            f"and start it again when it ends:\n  {shlex.join(self.machine.program)} run\n"
            "With Docker that is its command, `--restart unless-stopped` and `--stop-timeout 60`."
        )

    def text(self, unit: Unit) -> str:
        return units.systemd_unit(unit)

    def data_dir(self, text: str) -> str | None:
        return units.systemd_data_dir(text)

    def folder(self, unit: Unit) -> Path:
        return Path(unit.data_dir)

    def start(self, *, changed: bool, stop_seconds: int) -> None:
        self._systemctl("daemon-reload")  # also where an earlier try wrote the file and came no further
        self._systemctl("enable", units.SYSTEMD_NAME)
        self._systemctl("restart" if changed else "start", units.SYSTEMD_NAME)

    def stop(self) -> None:
        self._systemctl("disable", "--now", units.SYSTEMD_NAME)

    def forget(self) -> None:
        self._systemctl("daemon-reload")
        self._systemctl("reset-failed", units.SYSTEMD_NAME, may_fail=True)

    def status(self) -> Status:
        wanted = "ActiveState,SubState,MainPID,NRestarts,UnitFileState"
        shown = _run(
            self.machine,
            [*self._words(), "show", units.SYSTEMD_NAME, "-p", wanted],
            may_fail=True,
            silent=True,
        )
        return systemd_status(shown or "")

    def advice(self, unit: Unit) -> list[str]:
        own = "" if self.scope is Scope.SYSTEM else "--user "
        lines = [
            "Whether it runs: worker-agent service status",
            f"What it says: journalctl {own}-u {units.SYSTEMD_NAME} -f",
        ]
        if self.scope is Scope.USER and not self._lingers():
            lines.append(
                "It ends when you log out, and begins when you log in. To have it run all the time:"
                f" loginctl enable-linger {self.machine.user}"
            )
        return lines

    def _lingers(self) -> bool:
        return (self.machine.root / "var/lib/systemd/linger" / self.machine.user).exists()

    def _words(self) -> list[str]:
        return ["systemctl"] if self.scope is Scope.SYSTEM else ["systemctl", "--user"]

    def _systemctl(self, *words: str, may_fail: bool = False) -> None:
        _run(self.machine, [*self._words(), *words], may_fail=may_fail)


def systemd_status(shown: str) -> Status:
    """From `systemctl show`'s lines. Pure."""
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    state, sub = values.get("ActiveState", "unknown"), values.get("SubState", "unknown")
    words = [f"{state} ({sub})"]
    if values.get("MainPID", "0") != "0":
        words.append(f"pid {values['MainPID']}")
    if (restarts := values.get("NRestarts", "0")) not in ("", "0"):
        words.append(f"started again {restarts} times")
    if values.get("UnitFileState") == "disabled":
        words.append("not started with the machine")
    return Status(state == "active", ", ".join(words))


@dataclass
class Launchd:
    """A job of a Mac: an agent of the user's own, or a daemon of the machine."""

    machine: Machine
    scope: Scope
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        if self.scope is Scope.SYSTEM:
            folder = self.machine.root / "Library/LaunchDaemons"
        else:
            folder = self.machine.home / "Library" / "LaunchAgents"
        self.file = folder / f"{units.LAUNCHD_LABEL}.plist"

    def unusable(self) -> str | None:
        return None

    def text(self, unit: Unit) -> str:
        return units.launchd_plist(unit, str(log_file(unit)))

    def data_dir(self, text: str) -> str | None:
        return units.launchd_data_dir(text)

    def folder(self, unit: Unit) -> Path:
        return log_file(unit).parent

    def start(self, *, changed: bool, stop_seconds: int) -> None:
        domain = self._domain()
        name = f"{domain}/{units.LAUNCHD_LABEL}"
        if self._shown(name) is not None:
            if not changed:
                return
            self._end(name, stop_seconds)
        _run(self.machine, ["launchctl", "enable", name])
        _run(self.machine, ["launchctl", "bootstrap", domain, str(self.file)])

    def stop(self) -> None:
        for domain in self._domains():
            name = f"{domain}/{units.LAUNCHD_LABEL}"
            if self._shown(name) is not None:
                self._end(name, int(self.machine.command_limit_seconds))

    def forget(self) -> None:
        pass

    def status(self) -> Status:
        shown = (self._shown(f"{domain}/{units.LAUNCHD_LABEL}") for domain in self._domains())
        return launchd_status(next(filter(None, shown), ""))

    def advice(self, unit: Unit) -> list[str]:
        lines = ["Whether it runs: worker-agent service status", f"What it says: tail -f {log_file(unit)}"]
        if self.scope is Scope.USER:
            lines.append(
                "It begins when you log in. For a Mac that nobody logs in to, install it with --system."
            )
        lines.append(
            "Where no balancer finds this Mac: System Settings > Privacy & Security > Local Network has to "
            "allow it."
        )
        return lines

    def _domains(self) -> list[str]:
        if self.scope is Scope.SYSTEM:
            return ["system"]
        return [f"gui/{self.machine.uid}", f"user/{self.machine.uid}"]

    def _domain(self) -> str:
        """Without somebody at the screen (a login by SSH), only the second one is there."""
        *firsts, last = self._domains()
        return next((domain for domain in firsts if self._shown(domain) is not None), last)

    def _shown(self, name: str) -> str | None:
        """What launchd says of a domain or a job; None: there is none."""
        return _run(self.machine, ["launchctl", "print", name], may_fail=True, silent=True)

    def _end(self, name: str, limit_seconds: int) -> None:
        _run(self.machine, ["launchctl", "bootout", name], may_fail=True)
        # It answers before the job has ended; until then the same name cannot be started.
        deadline = time.monotonic() + limit_seconds
        while self._shown(name) is not None:
            if time.monotonic() > deadline:
                raise ServiceError(f"{name} does not end: look at its log, then try again")
            time.sleep(_LOOK_SECONDS)


def launchd_status(shown: str) -> Status:
    """From what `launchctl print` shows of a job. Pure."""
    if not shown:
        return Status(False, "not loaded")
    state = re.search(r"^\s*state = (.+)$", shown, re.MULTILINE)
    pid = re.search(r"^\s*pid = (\d+)$", shown, re.MULTILINE)
    code = re.search(r"^\s*last exit code = (\d+)$", shown, re.MULTILINE)
    words = [state[1].strip() if state else "loaded"]
    if pid:
        words.append(f"pid {pid[1]}")
    if code:
        words.append(f"ended with code {code[1]} before")
    return Status(pid is not None, ", ".join(words))


def log_file(unit: Unit) -> Path:
    """Where launchd writes what the agent says; systemd has its journal."""
    return Path(unit.data_dir) / "logs" / "worker-agent.log"


def _run(
    machine: Machine, argv: Sequence[str], *, may_fail: bool = False, silent: bool = False
) -> str | None:
    """What the command prints. Raises `ServiceError` where it fails and may not; one that may gives None."""
    if not silent:
        machine.say(f"$ {shlex.join(argv)}")
    try:
        done = subprocess.run(
            argv,
            env=dict(machine.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=machine.command_limit_seconds,
            check=False,
        )
    except FileNotFoundError:
        if may_fail:
            return None
        raise ServiceError(f"there is no {argv[0]} on this machine's PATH") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{shlex.join(argv)} did not end well: {type(error).__name__}") from None
    if done.returncode == 0:
        return done.stdout
    if may_fail:
        return None
    said = (done.stderr or done.stdout).strip()
    raise ServiceError(f"{shlex.join(argv)} failed with code {done.returncode}. {said}{_hint(said)}")


def _hint(said: str) -> str:
    if "Failed to connect to bus" in said:
        return "\nYour own systemd does not run, as after `su`: log in as this user, or give --system."
    if "Bootstrap failed" in said:
        return "\nWhere nobody is logged in at this Mac's screen, give --system."
    return ""
