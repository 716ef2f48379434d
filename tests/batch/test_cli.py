from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from balancer.batch.cli import presets

from .conftest import FakeEndpoint, MakePdf

DEADLINE = 90.0


async def start(tmp_path: Path, *arguments: str | Path) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from balancer.batch.cli import batch; batch()",
        "run",
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment
        | {
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "COLUMNS": "200",
            "PYTHONIOENCODING": "utf-8:strict",  # as on a desktop; a bare C locale forgives what is not UTF-8
        },
    )


async def one_is_through(process: asyncio.subprocess.Process) -> None:
    """Returns when it has said so of its first paper."""
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        while b"[1/" not in await process.stdout.readline():
            pass


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    try:
        async with asyncio.timeout(DEADLINE):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), err.decode()


async def batch(tmp_path: Path, *arguments: str | Path) -> tuple[int | None, str, str]:
    return await ended(await start(tmp_path, *arguments))


def papers_in(folder: Path, *words: str) -> Path:
    folder.mkdir()
    for word in words:
        (folder / f"{word}.txt").write_text(f"This paper is about {word}.")
    return folder


async def test_a_folder_of_papers_becomes_reports_and_results(
    endpoint: FakeEndpoint, make_pdf: MakePdf, tmp_path: Path
):
    papers = papers_in(tmp_path / "papers", "bears", "foxes")
    pdf = make_pdf("owls.pdf", "Owls are birds of the night, and quiet ones.")
    out = tmp_path / "results"
    code, said, wrong = await batch(tmp_path, pdf, papers, "--out", out, "--url", endpoint.url)
    assert (code, wrong) == (0, "")
    assert "[3/3] done" in said
    assert "3 completed, 0 failed" in said
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["owls.pdf", "bears.txt", "foxes.txt"]
    assert {path.name for path in out.glob("*.md")} == {"owls.md", "bears.md", "foxes.md"}
    assert len(endpoint.answered) == 9


async def test_a_failed_paper_is_told_and_the_others_are_done(endpoint: FakeEndpoint, tmp_path: Path):
    papers = papers_in(tmp_path / "papers", "bears")
    (papers / "scan.pdf").write_bytes(b"%PDF-1.4 torn")
    code, said, _ = await batch(tmp_path, papers, "--out", tmp_path / "out", "--url", endpoint.url)
    assert code == 1
    assert "1 completed, 1 failed" in said
    assert "scan.pdf: the PDF is damaged" in said


async def test_a_paper_whose_name_is_not_utf_8_is_done_as_the_others_are(
    endpoint: FakeEndpoint, tmp_path: Path
):
    papers = papers_in(tmp_path / "papers", "bears")
    try:
        (papers / os.fsdecode(b"caf\xe9.txt")).write_text("This paper is about coffee.")
        (papers / os.fsdecode(b"th\xe9.pdf")).write_bytes(b"%PDF-1.4 torn")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    out = tmp_path / os.fsdecode(b"r\xe9sultats")
    code, said, wrong = await batch(tmp_path, papers, "--out", out, "--url", endpoint.url)
    assert (code, wrong) == (1, "")
    assert "th\ufffd.pdf: the PDF is damaged" in said
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["bears.txt", "caf\ufffd.txt", "th\ufffd.pdf"]
    assert {path.name for path in out.glob("*.md")} == {"bears.md", "caf\ufffd.md", "th\ufffd.md"}


async def test_an_interrupted_run_says_how_to_resume_and_a_second_one_asks_nothing_twice(
    endpoint: FakeEndpoint, tmp_path: Path
):
    papers = papers_in(tmp_path / "papers", "bears", "foxes")
    endpoint.held = "about foxes"
    # Two at once: both papers are read in threads, and the one that is held may be asked about first.
    arguments = (papers, "--out", tmp_path / "out", "--url", endpoint.url, "--concurrency", "2")
    process = await start(tmp_path, *arguments)
    await endpoint.until(lambda: len(endpoint.answered) == 3 and endpoint.answering >= 1)
    await one_is_through(process)
    process.send_signal(signal.SIGINT)
    code, _, wrong = await ended(process)
    assert code == 130
    assert "run the same command again" in wrong
    assert "Traceback" not in wrong
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [Path(json.loads(row)["file"]).name for row in rows] == ["bears.txt"]
    endpoint.held = None
    endpoint.answered.clear()
    code, said, _ = await batch(tmp_path, *arguments)
    assert code == 0
    assert "answered earlier" in said
    assert len(endpoint.answered) == 3
    assert all("about foxes" in text for text in endpoint.questions())


async def test_an_endpoint_that_is_not_there_is_told_with_what_to_do(tmp_path: Path):
    papers = papers_in(tmp_path / "papers", "bears")
    code, _, wrong = await batch(tmp_path, papers, "--out", tmp_path / "out", "--url", "http://127.0.0.1:9")
    assert code == 2
    assert "balancer up" in wrong


async def test_several_models_are_listed_to_choose_from(endpoint: FakeEndpoint, tmp_path: Path):
    endpoint.models = [{"id": "small"}, {"id": "large"}]
    papers = papers_in(tmp_path / "papers", "bears")
    arguments = (papers, "--out", tmp_path / "out", "--url", endpoint.url)
    code, _, wrong = await batch(tmp_path, *arguments)
    assert code == 2
    assert "--model: large, small" in wrong
    code, _, _ = await batch(tmp_path, *arguments, "--model", "large")
    assert code == 0
    assert {body["model"] for body in endpoint.answered} == {"large"}
    code, _, wrong = await batch(tmp_path, *arguments, "--model", "huge")
    assert code == 2
    assert "does not serve 'huge'" in wrong


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("missing.pdf",), "there is no file or folder"),
        ((".", "--preset", "sumary"), "There is no preset 'sumary'"),
        ((".", "--presets", "nowhere"), "there is no folder nowhere"),
    ],
)
async def test_a_wrong_command_is_told_and_has_status_2(
    arguments: tuple[str, ...], reason: str, tmp_path: Path
):
    code, _, wrong = await batch(tmp_path, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert reason in wrong


def test_presets_are_listed_shown_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "llm-room-balancer" / "presets"
    own.mkdir(parents=True)
    good, bad = own / "mine.json", own / "bad.json"
    good.write_text(json.dumps({"name": "mine", "prompts": [{"name": "a", "text": "Why foxes?"}]}))
    bad.write_text(json.dumps({"name": "bad", "prompt": []}))
    cli = CliRunner()
    listed = cli.invoke(presets, ["list"]).output
    assert "research: 5 questions." in listed
    assert "mine (yours): 1 questions." in listed
    assert "bad (yours): cannot be used" in listed
    assert "Why foxes?" in cli.invoke(presets, ["show", "mine"]).output
    assert cli.invoke(presets, ["check", str(good)]).exit_code == 0
    checked = cli.invoke(presets, ["check", str(bad)])
    assert checked.exit_code == 1
    assert "`prompts` is missing." in checked.output
    assert "`prompt` is not a key of a preset" in checked.output
    assert cli.invoke(presets, ["show", "bad"]).exit_code == 2


async def test_the_reports_of_another_preset_are_not_written_over(endpoint: FakeEndpoint, tmp_path: Path):
    papers = papers_in(tmp_path / "papers", "bears")
    arguments = (papers, "--out", tmp_path / "out", "--url", endpoint.url)
    assert (await batch(tmp_path, *arguments, "--preset", "summary"))[0] == 0
    before = (tmp_path / "out" / "results.jsonl").read_text()
    code, _, wrong = await batch(tmp_path, *arguments, "--preset", "analysis")
    assert code == 2
    assert "holds the reports of preset 'summary'" in wrong
    assert "--out" in wrong
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


async def test_what_will_be_done_is_said_before_it_is_waited_for(endpoint: FakeEndpoint, tmp_path: Path):
    papers = papers_in(tmp_path / "papers", "bears", "foxes")
    _, said, _ = await batch(tmp_path, papers, "--out", tmp_path / "out", "--url", endpoint.url)
    assert said.startswith("2 papers, 3 questions each (summary), for ")
