from __future__ import annotations

import pytest

from worker_agent.continuation import begun_body, cut, is_begun, is_clean, question_body, text_of

PIECES = ["One", ",", " two", ",", " three", ",", " four", ", ", "five", ",", " six", " and so on"]


def test_the_beginning_ends_with_a_word_and_nothing_is_lost() -> None:
    halves = cut(PIECES)
    assert halves == ("One, two, three, four,", " five, six and so on")


@pytest.mark.parametrize("pieces", [[], ["Yes"], ["a"] * 10, [" "] * 40])
def test_of_a_short_answer_nothing_can_be_told(pieces: list[str]) -> None:
    assert cut(pieces) is None


@pytest.mark.parametrize(
    ("continued", "clean"),
    [
        (" five, six and so on", True),
        (" five, seven", True),  # two runs may differ further on
        (" five, ", False),  # too little to tell
        ("five, six and so on", False),
        ("One, two, three, four, five", False),
        (" four, five, six", False),
        ("", False),
        ("Here is how it goes on: five", False),
    ],
)
def test_what_comes_behind_the_seam_must_be_what_came_there_at_first(continued: str, clean: bool) -> None:
    assert is_clean(" five, six and so on", continued) is clean


def test_the_same_question_is_asked_with_the_beginning_of_its_answer() -> None:
    body = question_body("m", "Why?")
    begun = begun_body(body, "Because")
    assert begun["messages"] == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because"},
    ]
    assert (begun["temperature"], begun["stream"]) == (0, True)
    assert is_begun(begun)
    assert not is_begun(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "text"},
        {"messages": ["text"]},
        {"messages": [{"role": "assistant", "content": ""}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": []}]},
    ],
)
def test_only_words_of_the_assistants_are_a_beginning(body: dict[str, object]) -> None:
    assert not is_begun(body)


@pytest.mark.parametrize("event", [None, {}, {"choices": []}, {"choices": [{"delta": {"content": None}}]}])
def test_an_event_without_words_has_none(event: object) -> None:
    assert text_of(event) == ""
