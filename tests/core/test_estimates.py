"""What is learned of workers and models."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.estimates import (
    EXPECTED_ANSWER_TOKENS,
    FIRST_LIMIT,
    HIGHEST_LIMIT,
    LearnedLimit,
    Remembered,
    Sizes,
    Speeds,
    Window,
    prior,
)
from balancer.core.model import Ask, Endpoint, ModelName, Needs, Prompt

ASK = Ask(needs=Needs(model=ModelName("m"), endpoint=Endpoint.CHAT), arrived=0, deadline=1)


def known_speeds(prefill: float = 1000.0, token: float = 0.02, answers: int = 10) -> Speeds:
    speeds = Speeds.prior(400, 0.04)
    for _ in range(answers):
        speeds.read(1000, 1000 / prefill)
        speeds.wrote(1, token, 1.0)
        speeds.answered(1, token)
    return speeds


@pytest.mark.parametrize(
    ("engine", "hardware", "prefill"),
    [
        ("vllm", "NVIDIA GeForce RTX 4090", 4000),
        ("mlx", "Apple M3 Ultra", 900),
        ("mlx", "Apple M4", 300),
        ("llama.cpp", "AMD Ryzen", 60),
        ("", "", 400),
    ],
)
def test_a_new_machine_is_expected_to_be_as_fast_as_its_kind(engine, hardware, prefill):
    assert prior(engine, hardware).prefill_tokens_per_second == prefill


def test_the_first_prompt_that_is_read_outweighs_the_prior():
    speeds = prior("vllm", "")
    speeds.read(1000, 10.0)
    assert speeds.prefill_tokens_per_second == pytest.approx(100)


def test_a_short_prompt_says_nothing_of_the_reading_speed():
    speeds = known_speeds()
    speeds.read(100, 10.0)
    speeds.read(100, 0.05, alone=True)
    speeds.read(40, 10.0, alone=True)
    assert speeds.prefill_tokens_per_second == pytest.approx(1000)


def test_a_machine_that_reads_five_times_slower_is_noticed_within_a_few_answers():
    speeds = known_speeds(prefill=1000)
    for _ in range(5):
        speeds.read(1000, 5.0)
    assert speeds.prefill_tokens_per_second < 500
    for _ in range(7):
        speeds.read(1000, 5.0)
    assert speeds.prefill_tokens_per_second == pytest.approx(200, rel=0.2)


def test_a_machine_that_writes_five_times_slower_is_noticed_within_a_few_answers():
    speeds = known_speeds(token=0.02)
    for _ in range(5):
        speeds.wrote(1, 0.1, 1.0)
        speeds.answered(1, 0.1)
    assert speeds.writing.at(1) > 0.04
    assert speeds.answering.at(1) > 0.04


def test_more_streams_at_once_are_expected_to_be_as_slow_as_they_were():
    speeds = Speeds.prior(400, 0.04)
    for _ in range(30):
        for streams in (1, 4, 8):
            speeds.wrote(streams, 0.010 + 0.005 * streams, 1.0)
    for streams in (1, 2, 6, 12):
        assert speeds.writing.at(streams) == pytest.approx(0.010 + 0.005 * streams, rel=0.02)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.floats(0, 1e6), st.floats(0, 1e6)),
            st.tuples(st.just("answered"), st.integers(1, 300), st.floats(0, 1e6)),
            st.tuples(st.just("wrote"), st.integers(1, 300), st.floats(0, 1e6)),
        ),
        max_size=60,
    )
)
def test_speeds_stay_finite_and_above_zero_whatever_is_measured(history):
    speeds = Speeds.prior(400, 0.04)
    for what, first, seconds in history:
        if what == "read":
            speeds.read(first, seconds)
        elif what == "answered":
            speeds.answered(first, seconds)
        else:
            speeds.wrote(first, seconds, 0.05)
        assert 0 < speeds.prefill_tokens_per_second < math.inf
        for pace in (speeds.writing, speeds.answering):
            times = [pace.at(streams) for streams in (1, 2, 8, 64, 256)]
            assert all(0 < each < math.inf for each in times)
            assert times == sorted(times), "another stream makes none faster"


# Sizes


def test_tokens_of_a_prompt_are_learned_from_answers():
    sizes = Sizes()
    prompt = Prompt(chars=10_000)
    assert sizes.prompt_tokens(prompt) == 2500
    for _ in range(50):
        sizes.counted(Ask(needs=ASK.needs, arrived=0, deadline=1, prompt=prompt), 4000, None)
    assert sizes.prompt_tokens(prompt) == pytest.approx(4000, rel=0.02)


def test_a_prompt_that_came_as_tokens_is_as_long_as_it_is():
    assert Sizes().prompt_tokens(Prompt(chars=10_000, tokens=7)) == 7


def test_an_answer_is_expected_to_be_as_long_as_others_were_and_never_longer_than_allowed():
    sizes = Sizes()
    assert sizes.answer_tokens(ASK) == EXPECTED_ANSWER_TOKENS
    for _ in range(100):
        sizes.counted(ASK, None, 50)
    assert sizes.answer_tokens(ASK) == pytest.approx(50, rel=0.1)
    short = Ask(needs=ASK.needs, arrived=0, deadline=1, max_output=10)
    assert sizes.answer_tokens(short) == 10


# What a worker remembers


trees = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=20)


@given(trees, st.lists(st.integers(1, 12), min_size=20, max_size=20))
def test_what_is_held_of_a_prompt_is_always_its_beginning(prompts, room):
    """A block's hash stands for all before it: two are equal only if they begin alike."""
    remembered = Remembered()
    chains = [tuple(tuple(prompt[: end + 1]) for end in range(len(prompt))) for prompt in prompts]
    hashes = {block: number for number, block in enumerate({block for each in chains for block in each})}
    for chain, at_most in zip(chains, room, strict=False):
        remembered.hold([hashes[block] for block in chain], at_most)
        assert len(remembered) <= at_most
        assert remembered.depth([hashes[block] for block in chain]) == min(len(chain), at_most)
        for other in chains:
            depth = remembered.depth([hashes[block] for block in other])
            held = [remembered.depth([hashes[block] for block in other[: end + 1]]) for end in range(depth)]
            assert held == list(range(1, depth + 1))


def test_the_least_recently_used_prompt_is_forgotten_first():
    remembered = Remembered()
    for blocks in ([1, 2], [3, 4], [1, 2], [5, 6]):
        remembered.hold(blocks, 4)
    assert [remembered.depth(blocks) for blocks in ([1, 2], [3, 4], [5, 6])] == [2, 0, 2]


# Limits


def test_a_limit_doubles_while_answers_come_in_time_and_shrinks_when_they_are_late():
    limit = LearnedLimit()
    assert limit.value == FIRST_LIMIT
    for _ in range(20):
        limit.began(seconds=1.0, expected=1.0, running=int(limit.value))
    high = limit.value
    assert high > 4 * FIRST_LIMIT
    limit.began(seconds=4.0, expected=1.0, running=int(high))
    assert limit.value == pytest.approx(0.9 * high)


def test_one_burst_of_late_answers_is_one_reason_to_shrink_then_growth_is_slow():
    limit = LearnedLimit(20.0)
    limit.began(seconds=9.0, expected=1.0, running=20)
    for _ in range(20):
        limit.began(seconds=1.0, expected=1.0, running=18)
    assert limit.value == pytest.approx(18)
    limit.began(seconds=1.0, expected=1.0, running=18)
    assert limit.value == pytest.approx(18.5)


def test_a_limit_that_is_not_reached_does_not_grow():
    limit = LearnedLimit(20.0)
    for _ in range(100):
        limit.began(seconds=1.0, expected=1.0, running=3)
    assert limit.value == 20


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 300))))
def test_a_limit_is_at_least_one_and_bounded(history):
    limit = LearnedLimit()
    for seconds, expected, running in history:
        limit.began(seconds=seconds, expected=expected, running=running)
        assert 1 <= limit.value <= HIGHEST_LIMIT


# The window


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans(), st.floats(0, 1e6)), max_size=300))
def test_the_window_is_what_its_outcomes_say(history):
    window, now = Window(), 0.0
    for pause, good, seconds in history:
        now += pause
        window.add(now, good=good, seconds=seconds)
        assert 0 <= window.success_rate <= 1
        assert window.average_seconds is None or 0 <= window.average_seconds <= 1e6 * 1.001


def test_old_news_fades():
    window = Window()
    window.add(0.0, good=False, seconds=1)
    window.fade(1000.0)
    assert (window.success_rate, window.average_seconds) == (1.0, None)
