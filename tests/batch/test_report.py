from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import PurePath

from balancer.batch.journal import Answer
from balancer.batch.report import Row, kept_rows, markdown


def row(error: str | None = None, **answers: Answer) -> Row:
    return Row(file=PurePath("in/a.pdf"), sha256="0f", preset="p", model="m", error=error, answers=answers)


def test_a_row_tells_status_answers_usage_and_sections():
    answer = Answer(text="yes", prompt_tokens=10, output_tokens=2, seconds=1.5, sections=3)
    assert json.loads(row(a=answer, b=answer.model_copy(update={"cut_short": True})).to_json()) == {
        "file": "in/a.pdf",
        "report": "",
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


def test_a_name_that_is_not_utf_8_can_be_written_into_row_and_report():
    odd = replace(row(), file=PurePath(os.fsdecode(b"in/caf\xe9.txt")))
    assert json.loads(odd.to_json().encode())["file"] == "in/caf\ufffd.txt"
    assert markdown(odd).encode().startswith("# caf\ufffd.txt".encode())


def test_rows_of_an_earlier_run_are_kept_for_the_same_file_preset_and_model():
    old = row(a=Answer(text="yes"))
    lines = [
        replace(old, preset="other").to_json() + "\n",
        old.to_json() + "\n",
        replace(old, model="other").to_json() + "\n",
        replace(old, file=PurePath("in/gone.pdf")).to_json() + "\n",
        "{}\n",
        "[]\n",
        '{"file": [], "preset": "p", "model": "m"}\n',
        "torn",
    ]
    assert kept_rows(lines, [PurePath("in/new.pdf"), old.file], "p", "m") == {1: old.to_json()}
