from __future__ import annotations

import os
from pathlib import PurePath

from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.names import readable, report_names

LONGEST_NAME_BYTES = 255


def test_a_name_that_is_not_utf_8_can_be_printed():
    assert readable(PurePath(os.fsdecode(b"in/caf\xe9.txt"))) == "in/caf\ufffd.txt"
    assert readable(PurePath("in/café.txt")) == "in/café.txt"


@given(st.lists(st.binary(min_size=1, max_size=255), max_size=4))
def test_any_name_on_a_disk_gets_a_report_whose_name_can_be_written(stems: list[bytes]):
    names = report_names([PurePath("in", os.fsdecode(b"p" + stem + b".pdf")) for stem in stems])
    assert all(len(name.encode()) <= LONGEST_NAME_BYTES for name in names)
    assert len({name.casefold() for name in names}) == len(names)


def test_long_names_that_begin_alike_get_reports_of_their_own():
    first, second = report_names([PurePath("論" * 82 + end + ".txt") for end in "甲乙"])
    assert first == "論" * 66 + ".md"
    assert second == "論" * 66 + "-2.md"


def test_papers_with_the_same_name_get_reports_of_their_own():
    files = [PurePath(name) for name in ("x/a.pdf", "y/A.txt", "z/a.md", "a-2.md", "b.pdf")]
    assert report_names(files) == ("a.md", "A-3.md", "a-4.md", "a-2.md", "b.md")


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-2-2", "b"])))
def test_report_names_never_collide(stems: list[str]):
    names = report_names([PurePath(f"{stem}.pdf") for stem in stems])
    assert len(names) == len(stems)
    assert len({name.casefold() for name in names}) == len(names)
