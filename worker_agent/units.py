"""The files that have systemd or launchd keep an agent running. Pure: values in, text out."""

from __future__ import annotations

import itertools
import math
import plistlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

SYSTEMD_NAME = "worker-agent.service"
LAUNCHD_LABEL = "org.llm-room-balancer.worker-agent"

_MARK = "Written by `worker-agent service install`"
"""In a comment at the beginning of each file: what has it may be replaced and removed."""
_MARK_LINES = 6
_DATA = "# Its data: "
_FILE_OPTIONS = ("--config", "--data-dir", "--model")
_ENGINES_SECONDS = 50
"""After the drain: engines get 10 s from SIGTERM to SIGKILL, and KILL is repeated."""

_CARRIED = frozenset(
    (
        *("PATH", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "LOG_LEVEL"),
        *("XDG_CACHE_HOME", "XDG_DATA_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    )
)
_OURS = "WORKER_AGENT_"
_SECRETS = frozenset({"WORKER_AGENT_CLUSTER_KEY", "HF_TOKEN"})
"""Files of services are read by others: `systemctl show` tells anybody."""


class Unwritable(ValueError):
    """A word that no service's file can hold; the sentence names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One agent as a service."""

    argv: tuple[str, ...]
    """The program by its absolute path, and its words."""
    data_dir: str
    home: str
    """Of whom it runs as."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_seconds: int = 60
    """How long it may take to end by itself."""
    user: str | None = None
    """Whom a service of the whole machine runs as; None: it is a service of the user's own."""
    groups: tuple[str, ...] = ()
    """Of a service of the whole machine: groups that may use the graphics card, as far as there are any."""
    before: tuple[str, ...] = ()
    """Of a service of the whole machine: a command that root runs before each start; it may fail."""


def stop_seconds(drain_seconds: float) -> int:
    """How long an agent may take that lets answers run for so long when it is stopped."""
    return math.ceil(drain_seconds) + _ENGINES_SECONDS


def is_ours(text: str) -> bool:
    """Whether this file was written by us."""
    return any(_MARK in line for line in text.splitlines()[:_MARK_LINES])


def absolute(options: Sequence[str], folder: PurePath, is_there: Callable[[str], bool]) -> list[str]:
    """The options of `run` with every file by its absolute path, as a service starts in another folder.

    `folder`: where they were written. `is_there` tells of a path whether there is something: a model may be
    the hub's name too.
    """

    def whole(option: str, value: str) -> str:
        found = str(folder / value)
        return found if option != "--model" or value.endswith(".gguf") or is_there(found) else value

    made, option = list[str](), ""
    for word in options:
        name, equals, value = word.partition("=")
        if option:
            made.append(whole(option, word))
            option = ""
        elif equals and name in _FILE_OPTIONS:
            made.append(f"{name}={whole(name, value)}")
        else:
            made.append(word)
            option = word if word in _FILE_OPTIONS else ""
    return made


def carried(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What of a shell's environment an agent's service gets too, and the names of what stays out: secrets."""
    kept, secret = {}, []
    for name, value in sorted(environment.items()):
        if name in _SECRETS or (name.lower().endswith("_proxy") and "@" in value and name in _CARRIED):
            secret.append(name)
        elif value and (name in _CARRIED or name.startswith(_OURS)):
            kept[name] = value
    return kept, tuple(secret)


# systemd ...


def systemd_unit(unit: Unit) -> str:
    """The text of `worker-agent.service`. Raises `Unwritable`."""
    system = unit.user is not None
    lines = [
        f"# {_MARK}, which replaces it; `worker-agent service uninstall` removes it.",
        f"{_DATA}{_printable(unit.data_dir)}",
        "[Unit]",
        "Description=LLM worker agent",
        *(("After=network-online.target", "Wants=network-online.target") if system else ()),
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        *((f"ExecStartPre=-+{_command(unit.before)}",) if unit.before and system else ()),
        f"ExecStart={_command(unit.argv)}",
        f"WorkingDirectory={_setting(unit.home)}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in unit.environment.items()),
        "Restart=always",
        "RestartSec=5",
        "# Ever longer rests need systemd 254; an older one rests 5 s each time.",
        "RestartSteps=4",
        "RestartMaxDelaySec=60",
        "# The agent ends its engines itself; what is left of them goes with the unit. An engine that the",
        "# kernel kills for its memory is the agent's to start again.",
        "KillMode=mixed",
        "OOMPolicy=continue",
        f"TimeoutStopSec={unit.stop_seconds}",
        "LimitNOFILE=65536",
        "UMask=0077",
        *(_of_the_machine(unit) if system else ()),
        "",
        "[Install]",
        f"WantedBy={'multi-user.target' if system else 'default.target'}",
        "",
    ]
    return "\n".join(lines)


def _of_the_machine(unit: Unit) -> list[str]:
    # A service of a user has none of these: without root's rights they imply NoNewPrivileges, and CUDA could
    # not start the set-uid nvidia-modprobe any more that makes its devices on machines without a screen.
    writable = dict.fromkeys((unit.home, unit.data_dir))
    return [
        "",
        f"User={_setting(unit.user or '')}",
        *((f"SupplementaryGroups={' '.join(unit.groups)}",) if unit.groups else ()),
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "PrivateTmp=yes",
        "# Engines keep caches of their own below the home.",
        "ProtectSystem=strict",
        *(f"ReadWritePaths={_quoted('-' + folder)}" for folder in writable),
    ]


def systemd_data_dir(text: str) -> str | None:
    """Where the agent of this unit keeps its data; None: the file does not say."""
    found = [line.removeprefix(_DATA) for line in text.splitlines()[:_MARK_LINES] if line.startswith(_DATA)]
    return found[0] if found else None


def _command(argv: Sequence[str]) -> str:
    # Variables are replaced in every word but the first.
    program, *words = argv
    return " ".join((_word(program), *(_word(word.replace("$", "$$")) for word in words)))


def _word(text: str) -> str:
    plain = text and all(character.isalnum() or character in "/._-+:=,@%$" for character in text)
    return _setting(text) if plain else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + _setting(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _setting(text: str) -> str:
    """`%` begins a specifier everywhere."""
    return _printable(text).replace("%", "%%")


# ... and launchd.


def launchd_plist(unit: Unit, log: str) -> str:
    """The text of `org.llm-room-balancer.worker-agent.plist`, for an agent that logs to this file. Raises
    `Unwritable`."""
    for text in (*unit.argv, *unit.environment, *unit.environment.values(), unit.home, log, unit.user or ""):
        _printable(text)
    job: dict[str, Any] = {
        "Label": LAUNCHD_LABEL,
        "ProgramArguments": list(unit.argv),
        "WorkingDirectory": unit.home,
        "EnvironmentVariables": dict(unit.environment),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": unit.stop_seconds,
        # Any other type has its processor and disk held back.
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 32768},
        "Umask": 0o077,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    if unit.user is not None:
        job["UserName"] = unit.user
    head, plist, body = plistlib.dumps(job, sort_keys=False).decode().partition("<plist")
    comment = f"<!-- {_MARK}, which replaces it; `worker-agent service uninstall` removes it. -->\n"
    return f"{head}{comment}{plist}{body}"


def launchd_data_dir(text: str) -> str | None:
    """Where the agent of this plist keeps its data; None: the file does not say."""
    try:
        words = plistlib.loads(text.encode()).get("ProgramArguments", [])
    except (ValueError, AttributeError, plistlib.InvalidFileException):
        return None
    for option, value in itertools.pairwise(words):
        if option == "--data-dir":
            return str(value)
    return None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise Unwritable(
            f"{text[:60]!a} cannot stand in a service's file: it has characters that do not print"
        )
    return text
