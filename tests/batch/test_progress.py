from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import PurePath

import pytest
from rich.console import Console

from balancer.batch.journal import Answer
from balancer.batch.progress import Forecast, Lines, in_words, shown
from balancer.batch.report import Row


def row(error: str | None = None) -> Row:
    answers = {"a": Answer(text="yes", sections=2)}
    return Row(file=PurePath("p[1].md"), sha256="0", preset="p", model="m", error=error, answers=answers)


def test_the_forecast_goes_by_what_this_run_worked_on():
    forecast = Forecast(papers=4)
    assert forecast.left_seconds(10) is None
    forecast.finished(0, asked=False)
    forecast.finished(1, asked=True)
    assert forecast.left_seconds(10) == 20
    forecast.advanced(2, 0.5)
    assert forecast.left_seconds(15) == 15


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (45, "about 45 s left"), (600, "about 10 min left"), (9000, "about 2.5 h left")],
)
def test_durations_are_said_in_the_unit_that_people_would_use(seconds: float | None, words: str):
    assert in_words(seconds) == words


def test_without_a_terminal_each_paper_is_a_line():
    said: list[str] = []
    now = [0.0]
    lines = Lines(2, said.append, clock=lambda: now[0])
    now[0] = 30.0
    lines.finished(0, row(), asked=3)
    now[0] = 60.0
    lines.finished(1, row(error="broken"), asked=1)
    assert said == [
        "[1/2] done: p[1].md (1 answers, read in 2 sections), about 30 s left",
        "[2/2] failed: p[1].md (broken)",
    ]


def test_a_paper_whose_name_is_not_utf_8_has_a_line_that_can_be_printed():
    said: list[str] = []
    lines = Lines(2, said.append, clock=lambda: 0.0)
    odd = PurePath(os.fsdecode(b"caf\xe9.txt"))
    lines.finished(0, replace(row(), file=odd), asked=0)
    lines.finished(1, replace(row(error="broken"), file=odd), asked=0)
    assert [line.encode().decode().split(" (")[0] for line in said] == [
        "[1/2] done: caf\ufffd.txt",
        "[2/2] failed: caf\ufffd.txt",
    ]


def test_a_terminal_gets_a_bar_and_the_failures():
    output = io.StringIO()
    with shown(2, Console(file=output, force_terminal=True, width=100)) as observer:
        observer.advanced(0, 0.5)
        observer.finished(0, row(error="broken"), asked=1)
    assert "failed: p[1].md (broken)" in output.getvalue()
    assert "1/2" in output.getvalue()


def test_a_long_silence_is_broken_by_a_line_and_no_more_often():
    now, said = [0.0], []
    lines = Lines(3, said.append, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        lines.waits("no worker is ready")
    assert len(said) == 3
    assert all("no worker is ready" in line and "Ctrl-C" in line for line in said)
    now[0] = 200.0
    lines.advanced(0, 0.5)
    assert said[-1].startswith("[0/3] at work, about ")
