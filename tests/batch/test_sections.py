from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.sections import Density, answer_tokens, groups, split, text_chars

from .conftest import LINEAR, MONOTONOUS, SQUARE, growth

TEXT = st.text(alphabet="ab .\n#1A", max_size=400) | st.text(max_size=200)


@given(TEXT, st.integers(1, 120))
def test_splitting_loses_nothing_and_every_piece_fits(text: str, max_chars: int):
    pieces = split(text, max_chars)
    assert "".join(pieces) == text
    assert all(len(piece) <= max_chars for piece in pieces)
    assert all(pieces) or pieces == ("",)


@given(st.text(alphabet="ab \n", min_size=1, max_size=400), st.integers(1, 120))
def test_pieces_are_few(text: str, max_chars: int):
    # A border may lie at half of the even length, so at most about twice the fewest possible.
    assert len(split(text, max_chars)) <= 2 * -(-len(text) // max_chars) + 1


def test_a_text_that_fits_is_one_piece():
    assert split("short", 5) == ("short",)


def test_a_cut_prefers_a_heading_then_a_paragraph_then_a_sentence():
    filler = "word " * 10
    assert split(f"{filler}\n\nmore\n\n# Heading\n{filler}", 80)[1].startswith("# Heading")
    assert split(f"{filler}.\n\n{filler}\n{filler}", 90)[0].endswith("\n\n")
    assert split("One two. Three four. Five six seven.", 24)[0] == "One two. Three four. "


@pytest.mark.parametrize("unit", MONOTONOUS)
def test_cutting_takes_a_time_that_grows_as_the_text_does(unit: str):
    assert growth(lambda text: split(text, len(text) // 3), unit) < (LINEAR + SQUARE) / 2


@pytest.mark.parametrize("unit", MONOTONOUS)
def test_a_long_text_of_nothing_much_is_cut(unit: str):
    text = unit * (300_000 // len(unit))
    assert "".join(split(text, 100_000)) == text


def test_a_cut_in_many_blank_lines_falls_after_the_last():
    text = "word " * 10 + "\n \n\n\n" + "word " * 10
    assert split(text, 90)[1].startswith("word")


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError):
        split("text", 0)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_groups_keep_all_in_order_and_merging_comes_to_an_end(lengths: list[int], max_chars: int):
    made = groups(lengths, max_chars)
    assert [index for group in made for index in group] == list(range(len(lengths)))
    assert all(len(group) >= 2 for group in made[:-1])
    assert len(lengths) < 2 or len(made) < len(lengths)
    assert all(
        len(group) == 2 or sum(lengths[i] for i in group) <= max_chars for group in made if len(group) > 1
    )


@given(st.integers(1, 10_000), st.integers(1, 50_000))
def test_two_answers_and_their_merged_one_fit_into_any_context(wanted: int, context: int):
    tokens = answer_tokens(wanted, context)
    assert 1 <= tokens <= wanted
    assert tokens == 1 or 3 * tokens <= context


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20))
def test_the_density_stays_within_what_languages_have(counted: list[tuple[int, int]]):
    density = Density()
    for chars, tokens in counted:
        density = density.learned(chars, tokens)
        assert 0.5 <= density.chars_per_token <= 8


def test_the_density_falls_at_once_and_rises_in_steps():
    assert Density().learned(1000, 500).chars_per_token == pytest.approx(1.8)
    assert Density().learned(4000, 1000).chars_per_token == pytest.approx(3.15)
    assert Density().learned(10, 100) == Density()
    assert Density().exceeded().chars_per_token < 3


def test_what_fits_shrinks_by_the_answer_and_the_question():
    room = text_chars(context_tokens=4096, answer_tokens=600, other_chars=500, density=Density())
    assert room == (4096 - 600 - 64) * 3 - 500
