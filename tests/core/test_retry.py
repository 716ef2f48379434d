import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import WorkerId
from balancer.core.retry import CAUSES, Again, Cause, RetryPolicy, Tried, after

POLICY = RetryPolicy(max_retries=3, base_seconds=0.5)


def tried(*causes: Cause) -> list[Tried]:
    return [Tried(WorkerId(f"w{number}"), cause) for number, cause in enumerate(causes)]


def test_a_broken_attempt_is_followed_by_another_elsewhere():
    assert after(POLICY, tried(Cause.BROKE), chance=0.5) == Again(0.25, frozenset({WorkerId("w0")}))


def test_pauses_grow_by_half_a_second_times_two_to_the_attempt():
    pauses = [after(POLICY, tried(*[Cause.BROKE] * n), chance=0.999999) for n in (1, 2, 3)]
    assert [round(pause.delay, 3) for pause in pauses if pause] == [0.5, 1.0, 2.0]


def test_after_three_retries_it_is_enough():
    assert after(POLICY, tried(*[Cause.BROKE] * 4), chance=0.5) is None


def test_no_retries_where_they_are_switched_off():
    assert after(RetryPolicy(max_retries=0), tried(Cause.BROKE), chance=0.5) is None


@pytest.mark.parametrize("cause", [Cause.CUT, Cause.REJECTED, Cause.OVERDUE, Cause.LEFT])
def test_there_is_no_second_try_for(cause):
    assert after(POLICY, tried(cause), chance=0.5) is None


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
        assert again.avoid == {attempt.worker_id for attempt in history}
