"""Everything of an agent is taken away, and nothing of anybody else."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from worker_agent import certificate, cluster_key, uninstall, units, where_balancers_are
from worker_agent.identity import identity
from worker_agent.settings import default_data_dir
from worker_agent.uninstall import Refused, examine, held, remove
from worker_agent.units import Unit

UID = os.getuid()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with something dear in it."""
    for name in [name for name in os.environ if name.startswith(("WORKER_AGENT_", "XDG_", "SUDO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    return tmp_path / "home"


@pytest.fixture
def folder(home: Path) -> Path:
    """An agent's data folder, as one leaves it."""
    folder = default_data_dir()
    with identity(folder) as who:
        certificate.kept(who.certificate)
    cluster_key.kept(folder / cluster_key.FILE, "a-key-of-the-whole-room")
    where_balancers_are.keep(folder, ["http://192.168.1.10:4000"])
    (folder / ".cluster_key.0123456789abcdef").touch()  # left by a crash
    model = folder / "models" / "qwen"
    model.mkdir(parents=True)
    (model / "model.json").write_text("{}")
    (model / "weights.gguf").write_bytes(b"x" * 3 * 2**20)
    (folder / "models" / ".staging" / "other").mkdir(parents=True)
    (folder / "models" / "quarantine").mkdir()
    (folder / "logs").mkdir()
    (folder / "logs" / "worker-agent.log").write_text("hello\n")
    return folder


# What is found ...


def test_it_is_shown_what_would_go(folder: Path) -> None:
    (folder / "models" / "mine.gguf").touch()
    contents = examine(folder, uid=UID)
    assert (contents.files, contents.models, contents.strange) == (9, ("qwen",), ("mine.gguf",))
    assert str(contents).splitlines() == [
        f"{folder}: 9 files, 3.0 MiB",
        "  models: qwen",
        "  not fetched by the agent, and removed too: mine.gguf",
    ]


def test_a_folder_with_anything_else_in_it_is_left_alone(folder: Path) -> None:
    (folder / "holiday.jpg").touch()
    with pytest.raises(Refused, match=r"holds what no agent has put there \(holiday.jpg\)"):
        examine(folder, uid=UID)


def test_a_folder_of_models_without_an_agents_id_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "ai" / "models").mkdir(parents=True)
    with pytest.raises(Refused, match="does not look like an agent's"):
        examine(tmp_path / "ai", uid=UID)


def test_models_that_were_fetched_before_any_agent_ran_can_go(tmp_path: Path) -> None:
    model = tmp_path / "ai" / "models" / "qwen"
    model.mkdir(parents=True)
    (model / "model.json").write_text("{}")
    assert examine(tmp_path / "ai", uid=UID).models == ("qwen",)


@pytest.mark.parametrize("path", ["/", "/usr", "~"])
def test_no_folder_of_the_system_and_no_home_is_taken_for_it(path: str) -> None:
    with pytest.raises(Refused):
        examine(Path(path).expanduser(), uid=UID)


def test_a_link_is_not_taken_for_the_folder_that_it_leads_to(folder: Path, home: Path) -> None:
    (home / "link").symlink_to(folder)
    with pytest.raises(Refused, match="is a link"):
        examine(home / "link", uid=UID)


def test_a_file_and_another_persons_folder_are_refused(folder: Path, home: Path) -> None:
    with pytest.raises(Refused, match="is no folder"):
        examine(home / "thesis.tex", uid=UID)
    with pytest.raises(Refused, match="belongs to somebody else"):
        examine(folder, uid=UID + 1)
    assert examine(folder, uid=0).files == 8


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="needs root, to mount a disk")
def test_a_disk_that_is_mounted_inside_is_not_emptied(folder: Path) -> None:
    mounted = folder / "models" / "big"
    mounted.mkdir()
    shell = """
    mount -t tmpfs none "$1" && touch "$1/precious" && exec "$2" -c '
    import os, sys
    from pathlib import Path
    from worker_agent.uninstall import Refused, examine
    try:
        examine(Path(sys.argv[1]), uid=os.getuid())
    except Refused as error:
        print(error)
    ' "$3"
    """.replace("\n    ", "\n")
    command = ["unshare", "--mount", "sh", "-c", shell, "sh", str(mounted), sys.executable, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert "is another disk, mounted there: unmount it first" in done.stdout


# ... and removed.


def test_all_of_it_goes_and_nothing_else(folder: Path, home: Path) -> None:
    remove(examine(folder, uid=UID))
    left = sorted(path.name for path in home.rglob("*") if path.is_file())
    assert left == ["thesis.tex"]
    assert not folder.parent.exists()


def test_the_folder_around_it_stays_while_something_lies_in_it(folder: Path) -> None:
    (folder.parent / "balancer").mkdir()
    remove(examine(folder, uid=UID))
    assert [path.name for path in folder.parent.iterdir()] == ["balancer"]


def test_links_inside_are_removed_and_never_followed(folder: Path, home: Path) -> None:
    (home / "photos").mkdir()
    (home / "photos" / "one.jpg").touch()
    (folder / "models" / "photos").symlink_to(home / "photos")
    (folder / "models" / "qwen" / "thesis.tex").symlink_to(home / "thesis.tex")
    (folder / "logs" / "up").symlink_to("../../../../..")
    remove(examine(folder, uid=UID))
    assert not folder.exists()
    assert (home / "photos" / "one.jpg").exists()
    assert (home / "thesis.tex").read_text() == "years of work"


def test_an_agent_that_runs_with_it_is_not_robbed(folder: Path) -> None:
    with identity(folder):
        with pytest.raises(Refused, match=r"agent-1.id, or a download does: stop it first"):
            with held(folder):
                pass
    with held(folder):
        pass


def test_of_several_agents_any_one_is_enough(folder: Path) -> None:
    with identity(folder):
        with identity(folder):
            pass
    descriptor = os.open(folder / "agent-2.id", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Refused, match=r"agent-2.id"), held(folder):
        pass
    os.close(descriptor)


def test_a_download_without_an_agent_is_waited_for(folder: Path) -> None:
    staging = os.open(folder / "models" / ".staging" / "other", os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(staging, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="or a download does"), held(folder):
        pass
    os.close(staging)


def test_an_agent_that_starts_meanwhile_does_not_get_the_old_id(folder: Path) -> None:
    with held(folder), identity(folder) as other:
        assert (folder / "agent-1.id").read_text().strip() != other


# As a person types it.

app = typer.Typer()
app.command("uninstall")(uninstall.command)


@app.command()
def nothing() -> None:
    """So that the other one has a name."""


def typed(*words: str, answer: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["uninstall", *words], input=answer)
    return done.exit_code, done.stdout, done.stderr


def test_without_data_everything_stays_and_it_is_said_where(folder: Path) -> None:
    code, out, _ = typed()
    assert code == 0
    assert f"stay in {folder}: --data removes them too" in out
    assert examine(folder, uid=UID).files == 8


def test_who_is_asked_may_say_no(folder: Path) -> None:
    code, out, _ = typed("--data", answer="n\n")
    assert (code, folder.exists()) == (1, True)
    assert "Remove all of it?" in out


def test_who_says_yes_is_believed(folder: Path) -> None:
    code, out, _ = typed("--data", answer="y\n")
    assert (code, folder.exists()) == (0, False)
    assert f"removed {folder}" in out


def test_nobody_is_asked_with_yes(folder: Path) -> None:
    code, out, _ = typed("--data", "--yes")
    assert (code, folder.exists(), "?" in out) == (0, False, False)


def test_a_refusal_is_a_sentence(folder: Path, home: Path) -> None:
    with identity(folder):
        code, _, err = typed("--data", "--yes")
    assert (code, "stop it first" in err) == (2, True)
    assert typed("--data", "--yes", "--data-dir", str(home))[0] == 2
    assert (
        typed("--data", "--yes", "--data-dir", str(home / "gone"))[2] == f"there is no folder {home}/gone\n"
    )
    assert examine(folder, uid=UID).files == 8
    assert (home / "thesis.tex").exists()


def test_nothing_there_is_no_fault(home: Path) -> None:
    code, out, _ = typed("--data", "--yes")
    assert code == 0
    assert "no service was installed" in out


@pytest.mark.skipif(
    sys.platform != "linux" or Path("/run/systemd/system").is_dir(), reason="systemd runs here"
)
def test_the_service_goes_too_and_says_where_its_data_is(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "elsewhere"
    with identity(data):
        pass
    file = home / ".config/systemd/user/worker-agent.service"
    file.parent.mkdir(parents=True)
    file.write_text(units.systemd_unit(Unit(argv=("/bin/a", "run"), data_dir=str(data), home=str(home))))
    code, out, _ = typed("--data", "--yes")
    assert code == 0
    assert f"removed {file}\n" in out
    assert not file.exists()
    assert not data.exists()


def test_what_an_agent_keeps_is_all_in_its_data_folder() -> None:
    """Whoever makes a file or a folder is known here, with where it lies; a new one has to say."""
    known = {
        "identity.py": "the data folder itself",
        "private_files.py": "cluster key, certificate and balancers' addresses, in the data folder",
        "service.py": "the service's file, which `service uninstall` removes, and the data folder",
        "uninstall.py": "opens to lock",
        "models": "models, below the data folder or where the settings say",
    }
    makes = ("mkdir(", "O_CREAT", ".write_text(", ".write_bytes(", "mkstemp", "mkdtemp", '"wb")', '"w")')
    root = Path(uninstall.__file__).parent
    found = {
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if any(word in path.read_text() for word in makes)
    }
    assert found <= set(known)
