"""An agent as a service: its files word by word, what is run for it, and what is left alone."""

from __future__ import annotations

import os
import plistlib
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from worker_agent import service, units
from worker_agent.keepers import Machine, Scope, ServiceError, launchd_status, systemd_status
from worker_agent.units import Unit

CONFIGS = Path(__file__).parents[2] / "configs"
PROGRAM = "/opt/balancer/bin/worker-agent"
UNIT = Unit(
    argv=(PROGRAM, "run", "--data-dir", "/srv/agent data"),
    data_dir="/srv/agent data",
    home="/srv/alice",
    environment={"PATH": "/usr/bin:/bin", "WORKER_AGENT_ALLOW_NETWORKS": "131.1.0.0/16"},
)
ALICE = Unit(
    argv=UNIT.argv,
    data_dir=UNIT.data_dir,
    home=UNIT.home,
    environment=UNIT.environment,
    user="alice",
    groups=("video", "render"),
    before=("/usr/bin/nvidia-modprobe", "-u", "-c=0"),
)

# What is written ...

OF_THE_USER = """\
# Written by `worker-agent service install`, which replaces it; `worker-agent service uninstall` removes it.
# Its data: /srv/agent data
[Unit]
Description=LLM worker agent
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/opt/balancer/bin/worker-agent run --data-dir "/srv/agent data"
WorkingDirectory=/srv/alice
Environment="PATH=/usr/bin:/bin"
Environment="WORKER_AGENT_ALLOW_NETWORKS=131.1.0.0/16"
Restart=always
RestartSec=5
# Ever longer rests need systemd 254; an older one rests 5 s each time.
RestartSteps=4
RestartMaxDelaySec=60
# The agent ends its engines itself; what is left of them goes with the unit. An engine that the
# kernel kills for its memory is the agent's to start again.
KillMode=mixed
OOMPolicy=continue
TimeoutStopSec=60
LimitNOFILE=65536
UMask=0077

[Install]
WantedBy=default.target
"""


def test_a_users_unit_is_word_by_word() -> None:
    assert units.systemd_unit(UNIT) == OF_THE_USER


def test_a_machines_unit_runs_as_somebody_and_may_write_little() -> None:
    text = units.systemd_unit(ALICE)
    added = [line for line in text.splitlines() if line not in OF_THE_USER.splitlines()]
    assert added == [
        "After=network-online.target",
        "Wants=network-online.target",
        "ExecStartPre=-+/usr/bin/nvidia-modprobe -u -c=0",
        "User=alice",
        "SupplementaryGroups=video render",
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "PrivateTmp=yes",
        "# Engines keep caches of their own below the home.",
        "ProtectSystem=strict",
        'ReadWritePaths="-/srv/alice"',
        'ReadWritePaths="-/srv/agent data"',
        "WantedBy=multi-user.target",
    ]


def test_the_example_for_launchd_is_what_is_written() -> None:
    unit = Unit(
        argv=(PROGRAM, "run", "--data-dir", "/Users/Shared/worker-agent"),
        data_dir="/Users/Shared/worker-agent",
        home="/Users/Shared",
        environment={"PATH": "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
    )
    text = units.launchd_plist(unit, "/Users/Shared/worker-agent/logs/worker-agent.log")
    assert (CONFIGS / "launchd" / f"{units.LAUNCHD_LABEL}.plist").read_text() == text


def test_launchd_keeps_it_running_and_lets_it_drain() -> None:
    text = units.launchd_plist(UNIT, "/srv/log")
    job = plistlib.loads(text.encode())
    assert units.is_ours(text)
    assert job["ProgramArguments"] == [*UNIT.argv]
    assert (job["KeepAlive"], job["RunAtLoad"], job["ExitTimeOut"]) == (True, True, 60)
    assert "UserName" not in job
    assert plistlib.loads(units.launchd_plist(ALICE, "/srv/log").encode())["UserName"] == "alice"


def test_a_service_may_take_longer_to_stop_than_its_answers_may() -> None:
    assert units.stop_seconds(600.5) == 651


def test_where_the_data_is_can_be_read_again() -> None:
    assert units.systemd_data_dir(units.systemd_unit(UNIT)) == "/srv/agent data"
    assert units.launchd_data_dir(units.launchd_plist(UNIT, "/srv/log")) == "/srv/agent data"
    assert units.systemd_data_dir("[Unit]\n") is None
    assert units.launchd_data_dir("no plist") is None
    assert units.launchd_data_dir("<plist version='1.0'><array/></plist>") is None


def test_what_cannot_stand_in_such_a_file_is_named() -> None:
    for write in (units.systemd_unit, lambda unit: units.launchd_plist(unit, "/srv/log")):
        with pytest.raises(units.Unwritable, match="do not print"):
            write(Unit(argv=(PROGRAM, "run", "--name", "a\nExecStart=/bin/evil"), data_dir="/d", home="/h"))


def verified(tmp_path: Path, text: str) -> list[str]:
    """What systemd has to say against a unit."""
    file = tmp_path / units.SYSTEMD_NAME
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if units.SYSTEMD_NAME in line]
    return [line for line in lines if "RestartSteps" not in line and "RestartMaxDelaySec" not in line]


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there"
)


@needs_systemd
@pytest.mark.parametrize("user", [None, pwd.getpwuid(os.getuid()).pw_name])
def test_systemd_finds_no_fault_with_it(tmp_path: Path, user: str | None) -> None:
    odd = ["a b", 'say "hi"', "back\\slash", "100%", "$HOME", "it's", ";", "", "größe", "--x={'a': 1}"]
    unit = Unit(
        argv=(sys.executable, "run", *odd),
        data_dir=str(tmp_path / "da ta"),
        home=str(tmp_path),
        environment={"PATH": "/bin", "WORKER_AGENT_NAME": 'odd "name" 100% \\ $x'},
        user=user,
    )
    assert verified(tmp_path, units.systemd_unit(unit)) == []


@needs_systemd
def test_systemd_does_find_faults(tmp_path: Path) -> None:
    assert verified(tmp_path, OF_THE_USER.replace("Type=exec", "Type=nonsense"))


@needs_systemd
def test_systemd_reads_a_programs_path_as_it_was_meant(tmp_path: Path) -> None:
    """It tells of one that is missing."""
    unit = Unit(argv=('/no such/"pro gram" 100%', "run"), data_dir="/d", home="/")
    assert any('/no such/"pro gram" 100%' in line for line in verified(tmp_path, units.systemd_unit(unit)))


# ... out of what was said.

HERE = PurePath("/here")


@pytest.mark.parametrize(
    ("options", "made"),
    [
        (["--config", "a.json", "--port", "1"], ["--config", "/here/a.json", "--port", "1"]),
        (["--config=a.json"], ["--config=/here/a.json"]),
        (["--data-dir", "/abs", "--model", "x.gguf"], ["--data-dir", "/abs", "--model", "/here/x.gguf"]),
        (["--model", "org/model"], ["--model", "org/model"]),
        (["--model", "there"], ["--model", "/here/there"]),
        (["--name", "--model"], ["--name", "--model"]),
        ([], []),
    ],
)
def test_files_are_named_so_that_they_are_found_from_anywhere(options: list[str], made: list[str]) -> None:
    assert units.absolute(options, HERE, lambda path: path == "/here/there") == made


def test_a_shells_environment_is_carried_as_far_as_an_agent_reads_it() -> None:
    kept, secret = units.carried(
        {
            "PATH": "/bin",
            "WORKER_AGENT_PORT": "4200",
            "HF_ENDPOINT": "",
            "HF_TOKEN": "canary",
            "WORKER_AGENT_CLUSTER_KEY": "canary",
            "HTTPS_PROXY": "http://me:canary@proxy",
            "HTTP_PROXY": "http://proxy:8080",
            "AWS_SECRET_ACCESS_KEY": "canary",
        }
    )
    assert kept == {"HTTP_PROXY": "http://proxy:8080", "PATH": "/bin", "WORKER_AGENT_PORT": "4200"}
    assert secret == ("HF_TOKEN", "HTTPS_PROXY", "WORKER_AGENT_CLUSTER_KEY")


@given(st.text(max_size=300))
def test_only_files_of_ours_are_taken_for_ours(text: str) -> None:
    assert not units.is_ours(text)
    assert units.is_ours(units.systemd_unit(UNIT) + text)


# What is shown of it.


def test_what_systemd_shows_is_told_in_a_line() -> None:
    shown = "ActiveState=active\nSubState=running\nMainPID=12\nNRestarts=3\nUnitFileState=enabled\n"
    assert systemd_status(shown).runs
    assert systemd_status(shown).words == "active (running), pid 12, started again 3 times"
    down = systemd_status("ActiveState=failed\nSubState=failed\nMainPID=0\nUnitFileState=disabled\n")
    assert (down.runs, down.words) == (False, "failed (failed), not started with the machine")
    assert not systemd_status("").runs


def test_what_launchd_shows_is_told_in_a_line() -> None:
    shown = "gui/501/x = {\n\tactive count = 1\n\tstate = running\n\n\tpid = 77\n\tlast exit code = 1\n}\n"
    assert launchd_status(shown).runs
    assert launchd_status(shown).words == "running, pid 77, ended with code 1 before"
    waiting = launchd_status("x = {\n\tstate = spawn scheduled\n\tlast exit code = 2\n}\n")
    assert (waiting.runs, waiting.words) == (False, "spawn scheduled, ended with code 2 before")
    assert launchd_status("").words == "not loaded"


# What is done, with commands that only note what they were told ...

FAKE_SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >> "{folder}/ran"
case "$*" in
  *" show "*) printf 'ActiveState=active\\nSubState=running\\nMainPID=12\\n';;
  *enable*) [ ! -e "{folder}/broken" ] || {{ echo "Failed to connect to bus: No medium" >&2; exit 1; }};;
esac
"""
FAKE_LAUNCHCTL = """#!/bin/sh
echo "launchctl $*" >> "{folder}/ran"
job=org.llm-room-balancer.worker-agent
case "$1 $2" in
  "print "*/$job) [ -e "{folder}/loaded" ] && printf '\\tstate = running\\n\\tpid = 7\\n' || exit 113;;
  "print gui/"*) [ ! -e "{folder}/headless" ] || exit 125;;
  "bootstrap "*) touch "{folder}/loaded";;
  "bootout "*) rm "{folder}/loaded";;
esac
"""


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def machine(tmp_path: Path, lines: list[str]) -> Callable[..., Machine]:
    """Makes machines whose commands are fakes, and whose folders are the test's."""

    def make(system: str = "Linux", *, systemd_runs: bool = True, uid: int = 1000) -> Machine:
        for name, script in (("systemctl", FAKE_SYSTEMCTL), ("launchctl", FAKE_LAUNCHCTL)):
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(script.format(folder=tmp_path))
            path.chmod(0o755)
        return Machine(
            system=system,
            uid=uid,
            user="alice",
            home=tmp_path / "home",
            program=(PROGRAM,),
            environment={"PATH": f"{path.parent}:/usr/bin:/bin"},
            systemd_runs=systemd_runs,
            root=tmp_path / "root",
            say=lines.append,
            command_limit_seconds=20,
        )

    return make


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    data = str(tmp_path / "home" / "data")
    return Unit(argv=(PROGRAM, "run", "--data-dir", data), data_dir=data, home=str(tmp_path / "home"))


def ran(tmp_path: Path) -> list[str]:
    """The commands so far, those left out that only look."""
    noted = tmp_path / "ran"
    every = noted.read_text().splitlines() if noted.exists() else []
    noted.unlink(missing_ok=True)
    return [line for line in every if " print " not in line and " show " not in line]


MakeMachine = Callable[..., Machine]


def test_a_service_of_the_user_is_written_enabled_and_started(
    tmp_path: Path, machine: MakeMachine, unit: Unit, lines: list[str]
) -> None:
    service.install(machine(), Scope.USER, unit)
    file = tmp_path / "home/.config/systemd/user/worker-agent.service"
    assert file.read_text() == units.systemd_unit(unit)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ran(tmp_path) == [
        "systemctl --user daemon-reload",
        "systemctl --user enable worker-agent.service",
        "systemctl --user restart worker-agent.service",
    ]
    assert lines[0] == f"wrote {file}"
    assert [line for line in lines if line.startswith("$")] == [
        "$ systemctl --user daemon-reload",
        "$ systemctl --user enable worker-agent.service",
        "$ systemctl --user restart worker-agent.service",
    ]
    assert any("journalctl --user -u worker-agent.service -f" in line for line in lines)
    assert any("loginctl enable-linger alice" in line for line in lines)


def test_where_it_runs_without_a_login_already_nobody_is_told_how(
    tmp_path: Path, machine: MakeMachine, unit: Unit, lines: list[str]
) -> None:
    (tmp_path / "root/var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "root/var/lib/systemd/linger/alice").touch()
    service.install(machine(), Scope.USER, unit)
    assert not any("linger" in line for line in lines)


def test_to_install_again_changes_nothing_and_restarts_nothing(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    service.install(machine(), Scope.USER, unit)
    ran(tmp_path)
    service.install(machine(), Scope.USER, unit)
    assert ran(tmp_path)[-1] == "systemctl --user start worker-agent.service"


def test_other_options_replace_what_we_wrote_before(tmp_path: Path, machine: MakeMachine, unit: Unit) -> None:
    service.install(machine(), Scope.USER, unit)
    ran(tmp_path)
    other = Unit(argv=(*unit.argv, "--port", "4200"), data_dir=unit.data_dir, home=unit.home)
    service.install(machine(), Scope.USER, other)
    assert ran(tmp_path)[-1] == "systemctl --user restart worker-agent.service"
    file = tmp_path / "home/.config/systemd/user/worker-agent.service"
    assert "--port 4200" in file.read_text()


@pytest.mark.parametrize("foreign", ["file", "link"])
def test_a_file_that_somebody_else_wrote_is_left_alone(
    tmp_path: Path, machine: MakeMachine, unit: Unit, foreign: str
) -> None:
    file = tmp_path / "home/.config/systemd/user/worker-agent.service"
    file.parent.mkdir(parents=True)
    theirs = tmp_path / "theirs"
    theirs.write_text("[Unit]\nDescription=mine\n")
    if foreign == "link":
        file.symlink_to(theirs)
    else:
        file.write_text(theirs.read_text())
    for act in (lambda: service.install(machine(), Scope.USER, unit), lambda: _uninstall(machine())):
        with pytest.raises(ServiceError, match="was not written by this command"):
            act()
    assert file.read_text() == "[Unit]\nDescription=mine\n"
    assert list(service.installed(machine())) == []
    assert ran(tmp_path) == []
    service.install(machine(), Scope.USER, unit, force=True)
    assert units.is_ours(file.read_text())
    assert theirs.read_text() == "[Unit]\nDescription=mine\n"


def _uninstall(on: Machine) -> bool:
    return service.uninstall(on, Scope.USER)


def test_what_was_installed_is_found_and_taken_away_again(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    assert not _uninstall(machine())
    service.install(machine(), Scope.USER, unit)
    (found,) = service.installed(machine())
    scope, keeps, text = found
    assert (scope, keeps.data_dir(text), keeps.status().runs) == (Scope.USER, unit.data_dir, True)
    ran(tmp_path)
    assert _uninstall(machine())
    assert ran(tmp_path) == [
        "systemctl --user disable --now worker-agent.service",
        "systemctl --user daemon-reload",
        "systemctl --user reset-failed worker-agent.service",
    ]
    assert list(service.installed(machine())) == []
    assert Path(unit.data_dir).is_dir()


def test_where_systemd_does_not_run_nothing_is_written_and_it_is_said_what_to_do(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    with pytest.raises(ServiceError, match="systemd does not run here") as caught:
        service.install(machine(systemd_runs=False), Scope.USER, unit)
    assert f"{PROGRAM} run" in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_a_file_that_is_left_where_systemd_does_not_run_can_be_removed(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    service.install(machine(), Scope.USER, unit)
    ran(tmp_path)
    assert _uninstall(machine(systemd_runs=False))
    assert ran(tmp_path) == []


def test_a_command_that_fails_is_told_with_its_words_and_a_way_out(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(ServiceError, match=r"enable worker-agent.service failed with code 1") as caught:
        service.install(machine(), Scope.USER, unit)
    assert "log in as this user, or give --system" in str(caught.value)


def test_a_service_of_the_machine_is_roots_to_install(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    with pytest.raises(ServiceError, match=f"needs root: sudo {PROGRAM} service install --system"):
        service.install(machine(), Scope.SYSTEM, unit)
    (tmp_path / "root/etc/systemd/system").mkdir(parents=True)
    service.install(machine(uid=0), Scope.SYSTEM, unit)
    file = tmp_path / "root/etc/systemd/system/worker-agent.service"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert ran(tmp_path)[-1] == "systemctl restart worker-agent.service"


def test_a_mac_starts_it_for_who_is_logged_in(
    tmp_path: Path, machine: MakeMachine, unit: Unit, lines: list[str]
) -> None:
    service.install(machine("Darwin"), Scope.USER, unit)
    file = tmp_path / "home/Library/LaunchAgents/org.llm-room-balancer.worker-agent.plist"
    job = plistlib.loads(file.read_bytes())
    log = Path(job["StandardErrorPath"])
    assert log.parent == Path(unit.data_dir) / "logs"
    assert log.parent.is_dir()
    name = f"gui/1000/{units.LAUNCHD_LABEL}"
    assert ran(tmp_path) == [f"launchctl enable {name}", f"launchctl bootstrap gui/1000 {file}"]
    assert any(f"tail -f {log}" in line for line in lines)
    service.install(machine("Darwin"), Scope.USER, unit)
    assert ran(tmp_path) == []


def test_a_mac_ends_the_old_one_before_it_starts_the_new_one(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    service.install(machine("Darwin"), Scope.USER, unit)
    ran(tmp_path)
    other = Unit(argv=(*unit.argv, "--port", "4200"), data_dir=unit.data_dir, home=unit.home)
    service.install(machine("Darwin"), Scope.USER, other)
    assert [line.split()[1] for line in ran(tmp_path)] == ["bootout", "enable", "bootstrap"]
    assert _uninstall(machine("Darwin"))
    assert [line.split()[1] for line in ran(tmp_path)] == ["bootout"]


def test_a_mac_without_anybody_at_its_screen_starts_it_in_the_users_background(
    tmp_path: Path, machine: MakeMachine, unit: Unit
) -> None:
    (tmp_path / "headless").touch()
    service.install(machine("Darwin"), Scope.USER, unit)
    assert ran(tmp_path)[-1].startswith("launchctl bootstrap user/1000 ")


def test_another_system_is_told_what_to_start(machine: MakeMachine, unit: Unit) -> None:
    with pytest.raises(ServiceError, match=f"have it start {PROGRAM} run"):
        service.install(machine("FreeBSD"), Scope.USER, unit)


# ... and as a person types it.

app = typer.Typer()
app.add_typer(service.commands, name="service")


@app.command()
def run(
    model: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    data_dir: Annotated[Path | None, typer.Option()] = None,
    config: Annotated[Path | None, typer.Option()] = None,
    balancer: Annotated[list[str] | None, typer.Option()] = None,
    exit_with_parent: Annotated[bool, typer.Option()] = False,
) -> None:
    """Stands for the agent's own."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, where commands are typed."""
    for name in [name for name in os.environ if name.startswith(("WORKER_AGENT_", "XDG_", "SUDO_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["service", *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_dry_run_prints_the_file_and_writes_nothing(home: Path) -> None:
    (home / "m.gguf").touch()
    code, out, _ = typed(
        "install", "--dry-run", "--", "--model", "m.gguf", "--balancer", "http://10.0.0.1:4000"
    )
    assert code == 0
    assert units.is_ours(out)
    assert f"run --model {home}/m.gguf --balancer http://10.0.0.1:4000 --data-dir {home}/" in out
    assert Path(sys.executable).parent.as_posix() in out
    assert [path.name for path in home.iterdir()] == ["m.gguf"]


def test_a_dry_run_for_the_machine_needs_no_root(home: Path) -> None:
    name = pwd.getpwuid(os.getuid()).pw_name
    code, out, _ = typed("install", "--dry-run", "--system", "--as", name)
    assert (code, f"User={name}" in out or f"<string>{name}</string>" in out) == (0, True)


def test_a_config_file_says_where_the_data_is_and_how_long_stopping_may_take(home: Path) -> None:
    (home / "a.json").write_text(f'{{"data_dir": "{home}/data", "drain_seconds": 100}}')
    _, out, _ = typed("install", "--dry-run", "--", "--config", "a.json")
    assert f"run --config {home}/a.json --data-dir {home}/data" in out.replace("</string>\n\t\t<string>", " ")
    assert "150" in out


def test_secrets_stay_out_of_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("WORKER_AGENT_CLUSTER_KEY", "canary-of-16-letters")
    monkeypatch.setenv("WORKER_AGENT_PORT", "4242")
    _, out, err = typed("install", "--dry-run")
    assert "WORKER_AGENT_PORT" in out
    assert "canary" not in out + err
    assert "HF_TOKEN is not written" in err
    assert "WORKER_AGENT_CLUSTER_KEY is not written" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--", "--prot", "1"], "No such option"),
        (["--", "--port", "99999"], "port: Input should be less than or equal to 65535"),
        (["--", "--balancer", "10.0.0.1"], "must begin with http://"),
        (["--", "--config", "gone.json"], "there is no file"),
        (["--", "--config", "relative.json"], "a service starts in another folder, so write /"),
        (["--", "--exit-with-parent"], "leave it out"),
        (["--", "--model", "a\nb"], "do not print"),
        (["--user", "--system"], "not both"),
        (["--as", "alice"], "--as goes with --system"),
        (["--system", "--as", "no-such-user"], "there is no user no-such-user"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(home: Path, words: list[str], says: str) -> None:
    (home / "relative.json").write_text('{"model": "m.gguf"}')
    code, _, err = typed("install", "--dry-run", *words)
    assert code == 2
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert [path.name for path in home.iterdir()] == ["relative.json"]


@pytest.mark.skipif(
    Path("/run/systemd/system").is_dir() or sys.platform != "linux", reason="systemd runs here"
)
def test_in_a_container_it_is_said_what_to_do(home: Path) -> None:
    code, _, err = typed("install")
    assert code == 2
    assert err.startswith("nothing was installed: systemd does not run here")
    assert list(home.iterdir()) == []


def test_where_nothing_is_installed_that_is_said(home: Path) -> None:
    assert typed("status", "--user") == (4, "no service is installed: worker-agent service install\n", "")
    assert typed("uninstall", "--user")[:2] == (0, "no service is installed\n")
