"""`worker-agent models`, against the fake hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.hub import FakeHub, Faults
from typer.testing import CliRunner, Result

from agent.models.scenes import FOLDER_REPO, GGUF_REPO, files_in, gguf, transformers_folder
from worker_agent.models.cli import commands
from worker_agent.models.downloads import DownloadPolicy
from worker_agent.models.local import Format

FILE = "tiny-Q4_K_M.gguf"


class Shell:
    def __init__(self, hub: FakeHub, folder: Path) -> None:
        self.policy = DownloadPolicy(
            endpoint=hub.endpoint,
            formats=(Format.SAFETENSORS, Format.GGUF),
            margin_bytes=0,
            retry_seconds=0.0,
        )
        self._folder = folder
        self.app = commands(self.folder, lambda _config, _data_dir: self.policy)

    def folder(self, _config: Path | None, data_dir: Path | None) -> Path:
        return self._folder if data_dir is None else data_dir / "models"

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(self.app, list(words))


@pytest.fixture
def shell(hub: FakeHub, tmp_path: Path) -> Shell:
    return Shell(hub, tmp_path)


def test_from_an_empty_disk_to_an_empty_disk(shell: Shell, hub: FakeHub, tmp_path: Path) -> None:
    content = gguf()
    repo = hub.add(GGUF_REPO, {FILE: content, "tiny-Q8_0.gguf": gguf(seed=2)})
    assert "worker-agent models download" in shell("list").output
    fetched = shell("download", GGUF_REPO, "--file", "Q8_0", "--name", "eight", "--revision", "main")
    assert (fetched.exit_code, fetched.output) == (0, "eight is here, verified\n")
    assert shell("download", GGUF_REPO).exit_code == 0
    assert shell("list").output.splitlines() == [
        f"Tiny-GGUF\tgguf\t0.0 GiB\t{GGUF_REPO}@{repo.commit[:8]}",
        f"eight\tgguf\t0.0 GiB\t{GGUF_REPO}@{repo.commit[:8]}",
    ]
    rows = json.loads(shell("list", "--json").output)
    assert rows[0] == {
        "name": "Tiny-GGUF",
        "format": "gguf",
        "size_bytes": len(content),
        "path": str(tmp_path / "Tiny-GGUF" / FILE),
        "repo": GGUF_REPO,
        "commit": repo.commit,
        "fault": None,
    }
    assert shell("verify").exit_code == 0
    for name in ("eight", "Tiny-GGUF"):
        assert shell("delete", name).output == f"{name} is deleted\n"
    assert files_in(tmp_path) == set()


def test_a_download_that_failed_says_why_and_the_next_goes_on(shell: Shell, hub: FakeHub) -> None:
    repo = hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(cuts=[100_000] + [0] * 50)})
    failed = shell("download", GGUF_REPO)
    assert failed.exit_code == 1
    assert "what has come is kept: start it again to go on" in failed.output
    listed = shell("list").output
    assert "Tiny-GGUF is not complete" in listed
    assert "worker-agent models delete Tiny-GGUF" in listed
    assert json.loads(shell("list", "--json").output) == []
    repo.faults.clear()
    assert shell("download", GGUF_REPO).exit_code == 0
    assert hub.sent[FILE] == len(gguf())
    assert "not complete" not in shell("list").output


def test_what_cannot_be_is_refused_in_a_sentence(shell: Shell, hub: FakeHub) -> None:
    for words, code, why in (
        (("download", "Qwen"), 2, "it looks like"),
        (("download", "\x1b[31m"), 2, "it looks like"),
        (("download", GGUF_REPO, "--name", "../x"), 2, "cannot be a model's name here"),
        (("download", "org/None"), 1, "has no org/None, or it is private"),
        (("delete", "none"), 1, "there is no downloaded model 'none'"),
        (("verify", "none"), 1, "none is damaged"),
    ):
        result = shell(*words)
        assert (result.exit_code, why in result.output) == (code, True), result.output
        assert result.output.count("\n") == 1


def test_what_is_here_already_is_no_failure_and_another_model_of_its_name_is(
    shell: Shell, hub: FakeHub
) -> None:
    hub.add(GGUF_REPO, {FILE: gguf(), "tiny-Q8_0.gguf": gguf(seed=2)})
    hub.add("other/Tiny-GGUF", {FILE: gguf(seed=3)})
    shell("download", GGUF_REPO, "--file", "Q4_K_M")
    for words in ((), ("--file", "Q4_K_M"), ("--file", FILE), ("--name", "Tiny-GGUF")):
        again = shell("download", GGUF_REPO, *words)
        assert (again.exit_code, "Tiny-GGUF is here already" in again.output) == (0, True), words
    for words in ((GGUF_REPO, "--file", "Q8_0"), (GGUF_REPO, "--revision", "v2"), ("other/Tiny-GGUF",)):
        another = shell("download", *words)
        assert (another.exit_code, "give another name" in another.output) == (2, True), words


def test_the_data_folder_of_an_agent_is_told_like_to_the_agent_itself(
    shell: Shell, hub: FakeHub, tmp_path: Path
) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    elsewhere = ("--data-dir", str(tmp_path / "elsewhere"))
    assert shell("download", GGUF_REPO, *elsewhere).exit_code == 0
    assert "no models in" in shell("list").output
    assert shell("list", *elsewhere).output.startswith("Tiny-GGUF\t")
    assert shell("verify", *elsewhere).output == "Tiny-GGUF is as it was when it came\n"
    assert shell("delete", "Tiny-GGUF", *elsewhere).exit_code == 0


def test_a_damaged_model_is_shown_and_mended_by_a_download(
    shell: Shell, hub: FakeHub, tmp_path: Path
) -> None:
    hub.add(FOLDER_REPO, transformers_folder())
    assert shell("download", FOLDER_REPO).exit_code == 0
    weights = tmp_path / "Tiny" / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    verified = shell("verify", "Tiny")
    assert verified.exit_code == 1
    assert "model-00001-of-00002.safetensors changed and lies in the quarantine now" in verified.output
    assert "damaged: model-00001-of-00002.safetensors is missing; download it again" in shell("list").output
    assert shell("download", FOLDER_REPO).exit_code == 0
    assert shell("verify", "Tiny").exit_code == 0


def test_the_disk_is_asked_first(shell: Shell, hub: FakeHub) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()})
    shell.policy = replace(shell.policy, margin_bytes=2**60)
    result = shell("download", GGUF_REPO)
    assert (result.exit_code, "make room there" in result.output) == (1, True)
