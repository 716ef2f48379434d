import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import Verdict, WorkerId
from balancer.core.retry import (
    CAUSES,
    MAX_BUSY,
    MAX_CRASHES,
    NO_FAILURES,
    Again,
    Cause,
    RetryPolicy,
    Tried,
    after,
    is_poison,
)

POLICY = RetryPolicy(max_retries=3, base_seconds=0.5)


def tried(*causes: Cause) -> list[Tried]:
    return [Tried(WorkerId(f"w{number}"), cause) for number, cause in enumerate(causes)]


def test_a_broken_attempt_is_followed_by_another_elsewhere_without_a_pause():
    assert after(POLICY, tried(Cause.BROKE), chance=0.5) == Again(0.0, frozenset({WorkerId("w0")}), True)


def test_pauses_before_further_ones_are_drawn_from_half_a_second_and_twice_that():
    pauses = [after(POLICY, tried(*[Cause.BROKE] * n), chance=0.999999) for n in (1, 2, 3)]
    assert [round(pause.delay, 3) for pause in pauses if pause] == [0.0, 0.5, 1.0]


def test_no_pause_is_longer_than_the_longest():
    policy = RetryPolicy(max_retries=20, base_seconds=0.5, longest_seconds=8.0)
    again = after(policy, tried(*[Cause.BROKE] * 15), chance=0.5)
    assert again is not None
    assert again.delay == 4.0


def test_after_three_retries_it_is_enough():
    assert after(POLICY, tried(*[Cause.BROKE] * 4), chance=0.5) is None


def test_a_worker_that_loads_the_model_first_costs_no_try_and_is_not_avoided():
    again = after(POLICY, tried(*[Cause.LOADING] * 3, *[Cause.BROKE] * 3), chance=0.5)
    assert again is not None
    assert again.avoid == {"w3", "w4", "w5"}
    assert not again.failed_here
    assert after(POLICY, tried(*[Cause.LOADING] * 5), chance=0.5) is not None
    assert after(POLICY, tried(*[Cause.LOADING] * 6), chance=0.5) is None


def test_who_was_only_busy_has_not_failed_at_it():
    for causes, failed_here in [([Cause.BROKE] * 2, True), ([Cause.BROKE, Cause.BUSY], False)]:
        again = after(POLICY, tried(*causes), chance=0.5)
        assert again is not None
        assert again.failed_here is failed_here


def test_no_retries_where_they_are_switched_off():
    assert after(RetryPolicy(max_retries=0), tried(Cause.BROKE), chance=0.5) is None


def test_engines_that_end_in_the_middle_of_an_answer_were_rather_restarted():
    begun = Tried(WorkerId("a"), Cause.CRASHED, tokens=40)
    assert not is_poison([begun, Tried(WorkerId("b"), Cause.CRASHED, tokens=3, continues=True)])
    assert not is_poison([begun, Tried(WorkerId("b"), Cause.CRASHED, tokens=80)])


def test_what_kills_where_it_did_before_is_poison():
    begun = Tried(WorkerId("a"), Cause.CRASHED, tokens=40)
    assert is_poison([begun, Tried(WorkerId("b"), Cause.CRASHED, tokens=42)])
    assert is_poison([begun, Tried(WorkerId("b"), Cause.CRASHED, tokens=0, continues=True)])


def test_who_is_told_that_there_is_no_room_comes_back_more_often():
    assert after(POLICY, tried(*[Cause.BUSY] * MAX_BUSY), chance=0.5) is not None
    assert after(POLICY, tried(*[Cause.BUSY] * (MAX_BUSY + 1)), chance=0.5) is None
    assert after(POLICY, tried(*[Cause.BUSY] * 9, *[Cause.BROKE] * 3), chance=0.5) is not None
    assert after(POLICY, tried(*[Cause.BUSY] * 9, *[Cause.BROKE] * 4), chance=0.5) is None


@pytest.mark.parametrize("cause", [Cause.REJECTED, Cause.OVERDUE, Cause.LEFT, Cause.OUTRUN])
def test_there_is_no_second_try_for(cause):
    assert after(POLICY, tried(cause), chance=0.5) is None


def test_one_engine_that_died_over_it_may_have_died_of_something_else():
    assert not is_poison(tried(Cause.CRASHED))
    assert after(POLICY, tried(Cause.CRASHED), chance=0.5) is not None


def test_a_second_engine_that_died_over_it_was_the_last_one():
    history = tried(Cause.CRASHED, Cause.BROKE, Cause.CRASHED)
    assert is_poison(history)
    assert after(POLICY, history, chance=0.5) is None


def test_who_cannot_go_on_with_an_answer_is_not_the_worse_for_it():
    assert CAUSES[Cause.CANNOT_CONTINUE].verdict is Verdict.UNKNOWN
    assert after(POLICY, tried(Cause.CANNOT_CONTINUE), chance=0.5) == Again(0.0, frozenset({WorkerId("w0")}))


def test_every_cause_has_its_consequence():
    assert set(CAUSES) == set(Cause)


@given(
    st.lists(st.sampled_from(sorted(Cause, key=lambda c: c.value)), min_size=1, max_size=10),
    st.floats(0, 1, exclude_max=True),
)
def test_a_retry_never_waits_long_and_avoids_all_who_failed(causes, chance):
    history = tried(*causes)
    again = after(POLICY, history, chance)
    if again is not None:
        assert 0 <= again.delay <= POLICY.longest_seconds
        failed = [attempt for attempt in history if attempt.cause is not Cause.LOADING]
        assert again.avoid == {attempt.worker_id for attempt in failed}


@given(
    st.lists(st.sampled_from(sorted(Cause, key=lambda c: c.value)), max_size=20),
    st.integers(0, 10),
)
def test_no_request_is_the_last_of_more_engines_than_may_be(causes, max_retries):
    """Whatever its attempts come to, as long as `after` is asked before each next one."""
    history: list[Tried] = []
    for one in tried(*causes):
        history.append(one)
        if after(RetryPolicy(max_retries=max_retries), history, chance=0.5) is None:
            break
    assert sum(one.cause is Cause.CRASHED for one in history) <= MAX_CRASHES
    assert sum(one.cause not in NO_FAILURES for one in history) <= max_retries + 1
    assert len(history) <= max_retries + 1 + MAX_BUSY
