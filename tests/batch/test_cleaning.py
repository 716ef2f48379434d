from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.cleaning import pages, plain

from .conftest import LINEAR, MONOTONOUS, SQUARE, growth

BODY = "The quick brown fox jumps over the lazy dog number"


def paper(*bodies: str, head: str = "A. Author: On foxes", foot: str = "{}") -> list[str]:
    return [f"{head}\n{body}\n{foot.format(n)}" for n, body in enumerate(bodies, start=1)]


def test_running_heads_and_page_numbers_are_gone_and_the_text_stays():
    text = pages(paper("First page.", "Second page.", "Third page."))
    assert text == "First page.\nSecond page.\nThird page."


def test_heads_that_differ_on_left_and_right_pages_are_gone_too():
    left, right = paper("One.", "Three."), paper("Two.", "Four.", head="Journal of Foxes 12")
    assert pages([left[0], right[0], left[1], right[1]]) == "One.\nTwo.\nThree.\nFour."


def test_page_numbers_in_words_are_page_numbers():
    assert pages(paper("One.", "Two.", foot="Page {} of 2", head="Foxes")) == "One.\nTwo."


def test_rows_of_numbers_at_the_edge_of_a_page_are_a_table():
    text = pages(["1 2.5 3\nText here.\n4 5.5 6", "7 8.5 9\nMore text.\n1 2.5 3"])
    assert "7 8.5 9" in text
    assert "4 5.5 6" in text


def test_a_line_in_the_middle_of_pages_is_text_however_often_it_stands_there():
    refrain = "\n".join(["One a.", "Two b.", "We note that foxes sleep.", "Three c.", "Four d."])
    text = pages([refrain.replace("One", word) for word in ("Alpha", "Beta", "Gamma")])
    assert text.count("We note that foxes sleep.") == 3


def test_words_cut_at_the_end_of_a_line_are_whole_again():
    assert pages(["an exam-\nple of hyphen\ufffe\nation"]) == "an example of hyphenation"


def test_hyphens_that_belong_to_a_word_stay():
    assert pages(["the state-of-\nthe-art"]) == "the state-of-the-art"
    assert pages(["by Hewlett-\nPackard on COVID-\n19"]) == "by Hewlett-Packard on COVID-19"


def test_ligatures_become_letters_and_superscripts_stay():
    assert plain("e\ufb03cient \ufb01t of x\u00b2 and \u00bd") == "efficient fit of x\u00b2 and \u00bd"


def test_invisible_characters_are_gone_but_joiners_of_letters_stay():
    assert plain("a\u00adb\x00c\ufeffd") == "abcd"
    assert plain("\u0645\u06cc\u200c\u062e") == "\u0645\u06cc\u200c\u062e"


def test_headings_stand_apart_so_that_a_paper_can_be_cut_there():
    text = pages(
        ["1 Introduction\nFoxes are quick.\n2.1 Data and Methods\nWe looked.\nReferences\nA. Author."]
    )
    assert "\n\n2.1 Data and Methods\n" in text
    assert "\n\nReferences\n" in text


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.text(alphabet="abc", min_size=1, max_size=9))
def test_no_body_line_is_lost_whatever_the_head(lengths: list[int], head: str):
    bodies = [
        [f"{BODY} {chr(97 + page)}{chr(97 + line)}." for line in range(length)]
        for page, length in enumerate(lengths)
    ]
    text = pages([f"{head}\n" + "\n".join(lines) for lines in bodies])
    assert [line for lines in bodies for line in lines] == [
        line for line in text.split("\n") if line.startswith(BODY)
    ]


@pytest.mark.parametrize("unit", MONOTONOUS)
def test_cleaning_takes_a_time_that_grows_as_the_text_does(unit: str):
    assert growth(plain, unit) < (LINEAR + SQUARE) / 2
    assert growth(lambda text: pages([f"a{text}a", text]), unit) < (LINEAR + SQUARE) / 2


@pytest.mark.parametrize("unit", MONOTONOUS)
def test_a_long_text_of_nothing_much_is_cleaned(unit: str):
    text = plain(f"a{unit * (300_000 // len(unit))}a")
    assert text.startswith("a")
    assert text.endswith("a")
    assert plain(text) == text


def test_a_heap_of_accents_is_left_as_it_is():
    heap = "e" + "\u0301\u0323" * 20
    assert plain(heap) == heap
    assert plain("e\u0301") == "\u00e9"


def test_an_accent_after_an_invisible_character_joins_its_letter():
    assert plain("e\u00ad\u0301") == "\u00e9"


@given(st.text())
def test_cleaning_again_changes_nothing(text: str):
    assert plain(plain(text)) == plain(text)


@given(st.lists(st.text(), max_size=5))
def test_any_pages_can_be_cleaned(texts: list[str]):
    pages(texts)
