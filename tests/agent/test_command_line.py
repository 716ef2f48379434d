"""The command line as a process: what people and programs read from it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from worker_agent import installed


def worker_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker_agent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_doctor_tells_programs_what_would_run_and_why() -> None:
    answer = worker_agent("doctor", "--json", "--engine", "llama.cpp")
    findings = json.loads(answer.stdout)
    assert answer.returncode == 0
    assert findings["engine"] == "llama.cpp"
    assert findings["name"] == "smollm2-135m-instruct"
    assert findings["model"].endswith(".gguf")
    assert findings["why"]


def test_doctor_prints_plain_lines_where_nobody_looks_at_a_terminal() -> None:
    answer = worker_agent("doctor", "--engine", "llama.cpp")
    assert "engine: llama.cpp\n" in answer.stdout
    assert "\x1b" not in answer.stdout


def test_it_runs_without_any_standard_input() -> None:
    command = [sys.executable, "-m", "worker_agent", "doctor", "--engine", "llama.cpp"]
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    answer = subprocess.run(shell, capture_output=True, text=True, timeout=30, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_doctor_says_how_to_install_what_is_missing_and_fails() -> None:
    answer = worker_agent("doctor", "--engine", "mlx")
    assert answer.returncode == 1
    assert "uv run --extra mlx worker-agent run --engine mlx --model mlx-community/" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--engine", "mlx"], "mlx is not installed"),
        (["run", "--model", "/no/such/model.gguf"], "there is no file /no/such/model.gguf"),
        (["run", "--slots", "0"], "slots: Input should be greater than or equal to 1"),
        (["join", "192.168.1.10"], "must begin with http://"),
        (["join", "http://a..b:4000"], "must name a host and a port"),
        (["run", "--engine", "llama.cpp", "--dial-out"], "to dial out, give the balancer's address"),
    ],
)
def test_what_cannot_run_ends_at_once_with_a_sentence(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    answer = worker_agent(*arguments, "--data-dir", str(tmp_path), "--port", "0", "--host", "127.0.0.1")
    assert answer.returncode == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_doctor_is_told_what_is_no_address(tmp_path: Path) -> None:
    words = ("doctor", "--network", "--balancer", "::rubbish", "--data-dir", str(tmp_path))
    answer = worker_agent(*words)
    said = "'::rubbish' is no address of a balancer: name it like http://192.168.1.10:4000\n"
    assert (answer.returncode, answer.stdout, answer.stderr) == (2, "", said)


def test_a_taken_port_is_told_before_any_engine_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        answer = worker_agent("run", "--data-dir", str(tmp_path), "--host", "127.0.0.1", "--port", port)
    assert answer.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in answer.stderr
    assert "stopped -> starting" not in answer.stderr


@pytest.mark.parametrize("stdin", ["/dev/null", "a file", "closed"])
def test_a_parent_that_holds_no_pipe_is_told_so_before_anything_runs(stdin: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    command = [sys.executable, "-m", "worker_agent", "run", "--exit-with-parent", "--no-mdns"]
    command += ["--data-dir", str(tmp_path), "--port", "0", "--host", "127.0.0.1"]
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    with open(plain if stdin == "a file" else os.devnull, "rb") as given:
        answer = subprocess.run(command, stdin=given, capture_output=True, text=True, timeout=30, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("--exit-with-parent needs a standard input that is a pipe or a socket")
    assert "Traceback" not in answer.stderr


def test_doctor_finds_a_downloaded_model_by_its_name(tmp_path: Path) -> None:
    place = downloaded(tmp_path, "tiny")
    words = ("doctor", "--json", "--engine", "llama.cpp", "--model", "tiny", "--data-dir", str(tmp_path))
    findings = json.loads(worker_agent(*words).stdout)
    assert (findings["engine"], findings["name"], findings["model"]) == ("llama.cpp", "tiny", str(place))
    assert [model["name"] for model in findings["models"]] == ["tiny"]


def test_a_downloaded_model_that_is_damaged_is_not_taken_for_something_else(tmp_path: Path) -> None:
    downloaded(tmp_path, "tiny").unlink()
    answer = worker_agent("run", "--model", "tiny", "--data-dir", str(tmp_path), "--port", "0")
    assert answer.returncode == 2
    assert answer.stderr.endswith("tiny is damaged: tiny.gguf is missing; download it again\n")


def downloaded(data_dir: Path, name: str) -> Path:
    """The file of a model as a download leaves it."""
    file = data_dir / "models" / name / f"{name}.gguf"
    file.parent.mkdir(parents=True)
    embedded = installed.detect().embedded_model
    assert embedded is not None
    content = Path(embedded).read_bytes()
    file.write_bytes(content)
    told = {"name": file.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"name": name, "repo": "org/tiny", "commit": "c" * 40, "format": "gguf", "main": file.name}
    (file.parent / "model.json").write_text(json.dumps({**manifest, "files": [told]}))
    return file


def test_doctor_fails_where_the_model_is_not_there() -> None:
    answer = worker_agent("doctor", "--model", "nothing.gguf")
    assert answer.returncode == 1
    assert "nothing.gguf" in answer.stdout
