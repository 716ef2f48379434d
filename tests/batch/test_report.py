from __future__ import annotations

import json
from pathlib import PurePath

from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.journal import Answer
from balancer.batch.report import Row, markdown, report_names


def row(error: str | None = None, **answers: Answer) -> Row:
    return Row(file=PurePath("in/a.pdf"), sha256="0f", preset="p", model="m", error=error, answers=answers)


def test_a_row_tells_status_answers_usage_and_sections():
    answer = Answer(text="yes", prompt_tokens=10, output_tokens=2, seconds=1.5, sections=3)
    assert json.loads(row(a=answer, b=answer.model_copy(update={"cut_short": True})).to_json()) == {
        "file": "in/a.pdf",
        "sha256": "0f",
        "preset": "p",
        "model": "m",
        "status": "completed",
        "error": None,
        "answers": {"a": "yes", "b": "yes"},
        "cut_short": ["b"],
        "usage": {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24},
        "seconds": 3.0,
        "sections": 3,
    }


def test_a_report_says_in_how_many_sections_the_paper_was_read():
    assert "read in 3 sections" in markdown(row(a=Answer(text="yes", sections=3)))
    assert "sections" not in markdown(row(a=Answer(text="yes")))


def test_a_report_has_the_answers_in_order_under_their_names():
    text = markdown(row(methods=Answer(text="We looked."), results=Answer(text="Foxes.", cut_short=True)))
    assert text.index("## Methods\n\nWe looked.") < text.index("## Results\n\nFoxes.")
    assert text.index("Foxes.") < text.index("may be incomplete")


def test_a_failed_paper_has_its_reason_in_row_and_report():
    failed = row(error="the PDF is damaged")
    assert json.loads(failed.to_json())["status"] == "failed"
    assert "**This paper failed:** the PDF is damaged" in markdown(failed)


def test_papers_with_the_same_name_get_reports_of_their_own():
    files = [PurePath(name) for name in ("x/a.pdf", "y/A.txt", "z/a.md", "a-2.md", "b.pdf")]
    assert report_names(files) == ("a.md", "A-3.md", "a-4.md", "a-2.md", "b.md")


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-2-2", "b"])))
def test_report_names_never_collide(stems: list[str]):
    names = report_names([PurePath(f"{stem}.pdf") for stem in stems])
    assert len(names) == len(stems)
    assert len({name.casefold() for name in names}) == len(names)
