from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from balancer.batch import journal
from balancer.batch.client import OfferedModel, Patience, connected
from balancer.batch.presets import Preset, Prompt
from balancer.batch.report import Row
from balancer.batch.run import JOURNAL, RESULTS, Job, Run

from .conftest import FakeEndpoint, MakePdf

PRESET = Preset(
    name="mine",
    system="Be kind.",
    prompts=tuple(
        Prompt(name=name, text=f"What of {name}?", max_tokens=60) for name in ("one", "two", "three")
    ),
)
QUICK = Patience(first_pause_seconds=0.01, longest_pause_seconds=0.02, busy_seconds=5)


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.asked: list[int] = []

    def advanced(self, index: int, share: float) -> None:
        self.shares.append(share)

    def finished(self, index: int, row: Row, asked: int) -> None:
        self.asked.append(asked)


async def run(
    endpoint: FakeEndpoint,
    papers: Sequence[Path],
    out: Path,
    *,
    preset: Preset = PRESET,
    context_tokens: int | None = None,
    papers_at_once: int = 4,
    seen: Seen | None = None,
) -> tuple[Row, ...]:
    await asyncio.to_thread(out.mkdir, exist_ok=True)
    model = OfferedModel("tiny", context_tokens)
    job = Job(papers=tuple(papers), preset=preset, model=model, out=out, papers_at_once=papers_at_once)
    async with connected(endpoint.url, patience=QUICK) as to:
        with journal.opened(out / JOURNAL) as kept:
            return await Run(job, to, kept, seen or Seen()).all()


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text("utf-8").splitlines()]


def text_papers(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"paper{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


async def test_papers_of_each_kind_get_a_row_in_their_order_and_a_report(
    endpoint: FakeEndpoint, make_pdf: MakePdf, tmp_path: Path
):
    papers = [
        make_pdf("z.pdf", "Foxes are quick and brown animals."),
        *text_papers(tmp_path, "Bears.", "Owls."),
    ]
    rows = await run(endpoint, papers, tmp_path / "out")
    assert [row.file for row in rows] == papers
    assert all(row.completed for row in rows)
    written = rows_in(tmp_path / "out")
    assert [row["file"] for row in written] == [str(path) for path in papers]
    assert all(list(row["answers"]) == ["one", "two", "three"] for row in written)
    assert all(row["usage"]["total_tokens"] > 0 and row["sections"] == 1 for row in written)
    report = (tmp_path / "out" / "z.md").read_text()
    assert all(f"## {name}" in report for name in ("One", "Two", "Three"))


async def test_the_questions_about_a_paper_are_sent_back_to_back(endpoint: FakeEndpoint, tmp_path: Path):
    (paper,) = text_papers(tmp_path, "Bears.")
    async with asyncio.TaskGroup() as group:
        endpoint.held = "Bears."
        group.create_task(run(endpoint, [paper], tmp_path / "out"))
        await endpoint.until(lambda: endpoint.answering == 3)
        assert not endpoint.answered
        endpoint.release.set()
    assert {headers["X-Priority"] for headers in endpoint.headers} == {"batch"}
    assert len({text.rsplit("What of", 1)[0] for text in endpoint.questions()}) == 1


async def test_a_paper_that_fails_is_a_row_with_its_reason(endpoint: FakeEndpoint, tmp_path: Path):
    papers = text_papers(tmp_path, "Bears.", "Owls.", "Foxes.")
    (tmp_path / "broken.pdf").write_bytes(b"no pdf")
    endpoint.breaks_on = "Owls."
    rows = await run(endpoint, [papers[0], tmp_path / "broken.pdf", *papers[1:]], tmp_path / "out")
    assert [row.completed for row in rows] == [True, False, False, True]
    assert "damaged" in str(rows[1].error)
    assert "the engine died" in str(rows[2].error)
    assert [row["status"] for row in rows_in(tmp_path / "out")] == [
        "completed",
        "failed",
        "failed",
        "completed",
    ]
    assert "failed" in (tmp_path / "out" / "paper1.md").read_text()


async def test_a_second_run_asks_only_what_is_not_answered(endpoint: FakeEndpoint, tmp_path: Path):
    papers = text_papers(tmp_path, "Bears.", "Owls.")
    endpoint.breaks_on = "What of two?"
    first = await run(endpoint, papers, tmp_path / "out")
    assert not any(row.completed for row in first)
    endpoint.breaks_on = None
    endpoint.answered.clear()
    second = await run(endpoint, papers, tmp_path / "out")
    assert all(row.completed for row in second)
    assert sorted(text.split()[-1] for text in endpoint.questions()) == ["two?", "two?"]
    seen = Seen()
    third = await run(endpoint, papers, tmp_path / "out", seen=seen)
    assert third == second
    assert seen.asked == [0, 0]
    assert len(endpoint.answered) == 2


async def test_a_changed_paper_and_a_changed_preset_are_asked_again(endpoint: FakeEndpoint, tmp_path: Path):
    papers = text_papers(tmp_path, "Bears.", "Owls.")
    await run(endpoint, papers, tmp_path / "out")
    papers[0].write_text("Bears and foxes.")
    endpoint.answered.clear()
    await run(endpoint, papers, tmp_path / "out")
    assert len(endpoint.answered) == 3
    assert all("foxes" in text for text in endpoint.questions())
    changed = PRESET.model_copy(update={"system": "Be strict."})
    await run(endpoint, papers, tmp_path / "out", preset=changed)
    assert len(endpoint.answered) == 9


LONG = "\n\n".join(
    f"Paragraph {number} tells of foxes. " + "They run and they sleep. " * 12 + "So." for number in range(40)
)


async def test_a_paper_longer_than_the_context_is_read_in_sections_and_merged(
    endpoint: FakeEndpoint, tmp_path: Path
):
    endpoint.context_tokens = 2048
    (paper,) = text_papers(tmp_path, LONG)
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=2048)
    assert row.completed
    assert row.sections == 3
    assert len(endpoint.asked) == len(endpoint.answered) == 3 * 3 + 3
    assert f"read in {row.sections} sections" in (tmp_path / "out" / "paper0.md").read_text()
    partial = [text for text in endpoint.questions() if "What of one?" in text][:-1]
    read = "".join(text.split("<paper>\n")[1].split("\n</paper>")[0] for text in partial)
    assert read == LONG
    assert (await run(endpoint, [paper], tmp_path / "out", context_tokens=2048)) == (row,)
    assert len(endpoint.asked) == 12


async def test_a_context_that_is_smaller_than_told_halves_the_sections_until_they_fit(
    endpoint: FakeEndpoint, tmp_path: Path
):
    endpoint.context_tokens = 1024
    (paper,) = text_papers(tmp_path, LONG)
    seen = Seen()
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=8192, seen=seen)
    assert row.completed
    assert row.sections in (4, 5)
    refused = len(endpoint.asked) - len(endpoint.answered)
    assert refused == 2 * len(PRESET.prompts)
    assert seen.shares[-1] == 1


async def test_sections_that_were_read_before_a_failure_are_not_read_again(
    endpoint: FakeEndpoint, tmp_path: Path
):
    endpoint.context_tokens = 2048
    endpoint.breaks_on = "Paragraph 39 "
    (paper,) = text_papers(tmp_path, LONG)
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=2048)
    assert not row.completed
    before = len(endpoint.answered)
    endpoint.breaks_on = None
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=2048)
    assert row.completed
    assert before == 6
    assert len(endpoint.answered) == 12
    assert len(set(endpoint.questions())) == 12


@pytest.mark.parametrize(("at_most", "fewest_merges"), [(10**9, 1), (5, 5), (2, 20)])
async def test_many_sections_are_merged_in_as_many_steps_as_it_takes(
    endpoint: FakeEndpoint, tmp_path: Path, at_most: int, fewest_merges: int
):
    endpoint.context_tokens = 512
    endpoint.merges_at_most = at_most
    (paper,) = text_papers(tmp_path, LONG)
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=512)
    assert row.completed
    assert row.sections > 10
    merges = [text for text in endpoint.questions() if "[Answer" in text and text.endswith("What of one?")]
    assert len(merges) >= min(fewest_merges, row.sections // 2)


async def test_answers_that_cannot_be_merged_even_by_two_are_told(endpoint: FakeEndpoint, tmp_path: Path):
    endpoint.merges_at_most = 1
    (paper,) = text_papers(tmp_path, LONG)
    (row,) = await run(endpoint, [paper], tmp_path / "out", context_tokens=512)
    assert "too small to merge two answers" in str(row.error)


async def test_a_context_too_small_for_the_question_is_told(endpoint: FakeEndpoint, tmp_path: Path):
    endpoint.context_tokens = 40
    (row,) = await run(endpoint, text_papers(tmp_path, LONG), tmp_path / "out", context_tokens=40)
    assert "the context of tiny is too small" in str(row.error)


async def test_no_more_requests_are_in_flight_than_allowed(endpoint: FakeEndpoint, tmp_path: Path):
    papers = text_papers(tmp_path, *(f"Bears {number}." for number in range(6)))
    job = Job(
        papers=tuple(papers),
        preset=PRESET,
        model=OfferedModel("tiny", None),
        out=tmp_path,
        papers_at_once=6,
        requests_at_once=1,
    )
    async with connected(endpoint.url) as to:
        with journal.opened(tmp_path / JOURNAL) as kept:
            await Run(job, to, kept, Seen()).all()
    assert len(endpoint.alone) == 18
    assert all(endpoint.alone)


async def test_results_that_cannot_be_written_end_the_run(endpoint: FakeEndpoint, tmp_path: Path):
    papers = text_papers(tmp_path, "Bears.")
    (tmp_path / "out" / "paper0.md").mkdir(parents=True)
    with pytest.raises(OSError):
        await run(endpoint, papers, tmp_path / "out")


async def test_a_paper_with_a_name_as_long_as_the_disk_allows_is_a_row_and_a_report(
    endpoint: FakeEndpoint, tmp_path: Path
):
    paper = tmp_path / ("論" * 83 + ".txt")
    paper.write_text("Bears.")
    (row,) = await run(endpoint, [paper], tmp_path / "out")
    assert row.completed
    (report,) = (tmp_path / "out").glob("論*.md")
    assert "## One" in report.read_text()
    assert len(rows_in(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").glob("*.new"))


async def test_an_interrupted_second_run_keeps_the_rows_of_the_papers_that_it_did_not_reach(
    endpoint: FakeEndpoint, tmp_path: Path
):
    out = tmp_path / "out"
    papers = text_papers(tmp_path, "Bears.", "Owls.", "Foxes.")
    await run(endpoint, papers, out)
    before = rows_in(out)
    papers[0].write_text("Badgers.")
    papers[1].write_text("Eagles.")
    endpoint.held = "Eagles."
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            second = group.create_task(run(endpoint, papers, out, papers_at_once=1))
            await endpoint.until(lambda: endpoint.answering == 3 and len(endpoint.answered) == 12)
            second.cancel()
        await second
    after = rows_in(out)
    assert [row["file"] for row in after] == [str(paper) for paper in papers]
    assert after[0]["sha256"] != before[0]["sha256"]
    assert after[1:] == before[1:]


async def test_merges_that_were_made_before_a_failure_are_not_made_again(
    endpoint: FakeEndpoint, tmp_path: Path
):
    one = PRESET.model_copy(update={"prompts": PRESET.prompts[:1]})
    endpoint.context_tokens = 512
    (paper,) = text_papers(tmp_path, "\n\n".join(f"Part {part}. {LONG}" for part in range(5)))
    (row,) = await run(endpoint, [paper], tmp_path / "whole", preset=one, context_tokens=512)
    assert row.completed
    asked = endpoint.questions()
    last = asked[-1]
    assert sum("[Answer" in text for text in asked) > 2
    endpoint.answered.clear()
    endpoint.breaks_on = last
    (row,) = await run(endpoint, [paper], tmp_path / "out", preset=one, context_tokens=512)
    assert not row.completed
    endpoint.breaks_on = None
    (row,) = await run(endpoint, [paper], tmp_path / "out", preset=one, context_tokens=512)
    assert row.completed
    assert sorted(endpoint.questions()) == sorted(asked)


async def test_sections_with_the_same_text_keep_the_answers_that_each_of_them_got(
    endpoint: FakeEndpoint, tmp_path: Path
):
    one = PRESET.model_copy(update={"prompts": PRESET.prompts[:1]})
    (paper,) = text_papers(tmp_path, "a" * 2400)
    endpoint.breaks_on = "[Answer"
    (row,) = await run(endpoint, [paper], tmp_path / "out", preset=one, context_tokens=512)
    assert not row.completed
    endpoint.breaks_on = None
    (row,) = await run(endpoint, [paper], tmp_path / "out", preset=one, context_tokens=512)
    *sections, merge = endpoint.questions()
    assert len(sections) == len(set(sections)) == row.sections
    assert merge.count("[Answer") == row.sections
    assert len(set(re.findall(r"^answer \w+$", merge, re.MULTILINE))) == row.sections


async def test_two_copies_of_a_paper_are_asked_once_and_both_get_a_row(
    endpoint: FakeEndpoint, tmp_path: Path
):
    papers = text_papers(tmp_path, "Bears.", "Owls.", "Bears.")
    rows = await run(endpoint, papers, tmp_path / "out")
    assert [row.file for row in rows] == papers
    assert all(row.completed for row in rows)
    assert rows[0].answers == rows[2].answers
    assert len(endpoint.asked) == 6
    assert "## Three" in (tmp_path / "out" / "paper2.md").read_text()


async def test_what_was_refused_to_one_copy_of_a_paper_is_not_asked_for_the_other(
    endpoint: FakeEndpoint, tmp_path: Path
):
    endpoint.breaks_on = "Bears."
    rows = await run(endpoint, text_papers(tmp_path, "Bears.", "Bears."), tmp_path / "out")
    assert [row.completed for row in rows] == [False, False]
    assert rows[0].error == rows[1].error
    assert len(endpoint.asked) == QUICK.broken_tries * len(PRESET.prompts)
    endpoint.breaks_on = None
    rows = await run(endpoint, text_papers(tmp_path, "Bears.", "Bears."), tmp_path / "out")
    assert all(row.completed for row in rows)
