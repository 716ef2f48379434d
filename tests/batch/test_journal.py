from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.journal import Answer, Answered, Cut, Entry, JournalError, Memory, Subject, opened, replay

SUBJECT = Subject(document="d", preset="p", model="m")


def answered(prompt: str, text: str = "yes", *, subject: Subject = SUBJECT, part: str = "") -> Answered:
    return Answered(subject=subject, prompt=prompt, part=part, answer=Answer(text=text))


ENTRIES: st.SearchStrategy[list[Entry]] = st.lists(
    st.builds(answered, st.sampled_from("ab"), st.text(max_size=8), part=st.sampled_from(["", "1"]))
    | st.builds(Cut, subject=st.just(SUBJECT), section_chars=st.integers(1, 99))
)


def lines(entries: list[Entry]) -> bytes:
    return b"".join(entry.model_dump_json().encode() + b"\n" for entry in entries)


@given(ENTRIES, st.integers(0))
def test_a_journal_torn_anywhere_still_tells_all_its_whole_lines(entries: list[Entry], cut: int):
    data = lines(entries)
    torn = data[: cut % (len(data) + 1)]
    expected = Memory()
    for index, entry in enumerate(entries):
        if len(lines(entries[: index + 1])) - 1 <= len(torn):  # a line that lacks only its newline is whole
            expected.take(entry)
    assert replay(torn.splitlines(keepends=True)) == expected


async def test_what_was_kept_is_there_when_the_journal_is_opened_again(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    with opened(path) as journal:
        assert journal.answer(SUBJECT, "a") is None
        await journal.keep(answered("a"))
        await journal.keep(Cut(subject=SUBJECT, section_chars=7))
    with opened(path) as journal:
        answer = journal.answer(SUBJECT, "a")
        assert answer is not None
        assert answer.text == "yes"
        assert journal.section_chars(SUBJECT) == 7


@pytest.mark.parametrize("change", [{"document": "d2"}, {"preset": "p2"}, {"model": "m2"}])
async def test_a_changed_paper_preset_or_model_has_no_answers(tmp_path: Path, change: dict[str, str]):
    with opened(tmp_path / "j") as journal:
        await journal.keep(answered("a"))
        assert journal.answer(SUBJECT.model_copy(update=change), "a") is None


async def test_a_torn_last_line_costs_that_answer_and_no_other(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(lines([answered("a"), answered("b")])[:-20])
    with opened(path) as journal:
        assert journal.answer(SUBJECT, "a")
        assert journal.answer(SUBJECT, "b") is None
        await journal.keep(answered("c"))
    with opened(path) as journal:
        assert journal.answer(SUBJECT, "a")
        assert journal.answer(SUBJECT, "c")


def test_two_runs_cannot_write_one_journal(tmp_path: Path):
    with opened(tmp_path / "j"), pytest.raises(JournalError, match="another run"), opened(tmp_path / "j"):
        pass
    with opened(tmp_path / "j"):
        pass
