from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.batch.asks import (
    Place,
    about_text,
    longest_question_chars,
    merged_chars,
    merged_material,
    merging,
    rounds,
)
from balancer.batch.presets import Preset, Prompt, Shelf
from balancer.core.model import BLOCK_CHARS, Endpoint
from balancer.dialects.openai import parse

PRESET = Preset(
    name="mine",
    system="Be kind.",
    prompts=(Prompt(name="a", text="What?"), Prompt(name="b", text="Why, and for whom?", max_tokens=50)),
)
NAMES = ("a", "b", "c", "d")


@given(
    st.integers(0, 6),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.frozensets(st.builds(Place, st.integers(0, 6), st.sampled_from(NAMES))),
)
def test_each_open_question_is_asked_once_in_order_and_all_about_a_section_together(
    sections: int, prompts: list[str], answered: frozenset[Place]
):
    planned = rounds(sections, prompts, answered)
    asked = [place for together in planned for place in together]
    every = [Place(section, name) for section in range(sections) for name in prompts]
    assert asked == [place for place in every if place not in answered]
    of_rounds = [{place.section for place in together} for together in planned]
    assert all(len(of_one) == 1 for of_one in of_rounds)
    assert len({section for of_one in of_rounds for section in of_one}) == len(planned)


def test_the_document_comes_first_and_the_question_last():
    first, second = (
        about_text(PRESET, prompt, "The text.", section=0, sections=1, model="m", max_tokens=9)
        for prompt in PRESET.prompts
    )
    assert first.user.endswith("What?")
    assert second.user.endswith("Why, and for whom?")
    prefix = first.user.removesuffix("What?")
    assert "The text." in prefix
    assert second.user.startswith(prefix)


@pytest.mark.parametrize("name", ["analysis", "research", "summary"])
def test_a_balancer_sees_that_all_questions_of_a_preset_are_about_one_paper(name: str):
    """They share every block of the prompt but those that the question itself is in."""
    paper = "".join(f"{number}. A sentence of the paper. " for number in range(1000))
    preset = Shelf(Path("nowhere")).get(name)
    described = []
    for prompt in preset.prompts:
        request = about_text(preset, prompt, paper, section=0, sections=1, model="m", max_tokens=9)
        described.append(parse(Endpoint.CHAT, orjson.dumps(request.body())).prompt.blocks)
    whole = len(paper) // BLOCK_CHARS
    assert len(described) > 1
    assert len({blocks[:whole] for blocks in described}) == 1
    assert len(described[0]) >= whole


def test_a_question_about_a_section_says_which():
    request = about_text(PRESET, PRESET.prompts[0], "x", section=1, sections=3, model="m", max_tokens=9)
    assert "section 2 of 3" in request.user


def test_a_request_is_a_chat_completion_with_the_prompts_own_settings():
    body = about_text(PRESET, PRESET.prompts[1], "x", section=0, sections=1, model="m", max_tokens=50).body()
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 50, 0.2, False)
    messages = body["messages"]
    assert isinstance(messages, list)
    assert [message["role"] for message in messages] == ["system", "user"]


@given(st.text(max_size=50), st.integers(0, 900), st.integers(1, 999))
def test_the_room_kept_for_a_question_is_enough(text: str, section: int, sections: int):
    for prompt in PRESET.prompts:
        request = about_text(
            PRESET, prompt, text, section=section, sections=sections, model="m", max_tokens=1
        )
        assert request.chars <= longest_question_chars(PRESET) + len(text)


def test_a_merge_holds_every_answer_in_order_and_the_question():
    request = merging(PRESET, PRESET.prompts[0], ["one", "two"], model="m", max_tokens=9)
    assert request.user.index("one") < request.user.index("two") < request.user.index("What?")


@given(st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=9), st.sampled_from(PRESET.prompts))
def test_a_merge_of_what_may_go_into_it_is_no_longer_than_a_question_about_a_section(
    partial: list[str], prompt: Prompt
):
    longest_section = 2000
    room = merged_chars(PRESET, prompt, section_chars=longest_section)
    request = merging(PRESET, prompt, partial, model="m", max_tokens=9)
    assert (len(merged_material(partial)) <= room) == (
        request.chars <= longest_section + longest_question_chars(PRESET)
    )
