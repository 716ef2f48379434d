from hypothesis import given
from hypothesis import strategies as st

from balancer.core.budget import SLICES, BudgetPolicy, RetryBudget

POLICY = BudgetPolicy(share=0.2, per_second=10.0, ttl_seconds=10.0)
NOTHING_BESIDE = BudgetPolicy(share=0.2, per_second=0.0, ttl_seconds=10.0)


def taken(budget: RetryBudget, now: float, wanted: int = 10_000) -> int:
    """Retries that are granted, of so many."""
    return sum(budget.take(now) for _ in range(wanted))


def test_five_requests_bring_one_retry():
    budget = RetryBudget(NOTHING_BESIDE)
    for _ in range(4):
        budget.arrived(0.0)
    assert not budget.take(0.0)
    budget.arrived(0.0)
    assert budget.take(0.0)
    assert not budget.take(0.0)


def test_without_any_requests_there_are_ten_a_second_and_no_more_than_ten_seconds_worth_at_once():
    budget = RetryBudget(POLICY)
    assert taken(budget, 0.0) == 100
    assert taken(budget, 1.0) == 10
    assert taken(budget, 1000.0) == 100


def test_a_machine_that_dies_with_many_streams_does_not_use_it_up_by_itself():
    """64 streams broke at once in a room with a request a second."""
    budget = RetryBudget(POLICY)
    for second in range(20):
        budget.arrived(float(second))
    assert taken(budget, 20.0, wanted=64) == 64


def test_what_requests_have_brought_is_lost_after_its_time():
    budget = RetryBudget(NOTHING_BESIDE)
    for _ in range(100):
        budget.arrived(0.0)
    assert taken(budget, 8.9, wanted=5) == 5
    assert taken(budget, 10.0) == 0


def test_the_oldest_is_used_first():
    budget = RetryBudget(NOTHING_BESIDE)
    for now in (0.0, 5.0):
        for _ in range(5):
            budget.arrived(now)
    assert budget.take(5.0)
    assert budget.take(12.0), "the five of second 5 still count"


def test_a_storm_of_failures_is_answered_with_a_fifth_more_attempts_and_ten_a_second():
    """RELIABILITY O2: every worker fails everything for 60 s, at 100 requests a second."""
    budget = RetryBudget(POLICY)
    retries = 0
    for step in range(6000):
        now = step / 100
        budget.arrived(now)
        retries += taken(budget, now, wanted=3)
    assert retries <= 0.2 * 6000 + 10 * (60 + 10)
    assert retries >= 0.2 * 6000 + 10 * 59


def test_memory_is_bounded_whatever_arrives():
    budget = RetryBudget(POLICY)
    for step in range(100_000):
        budget.arrived(step / 100)
        assert len(budget._slices) <= SLICES


HISTORIES = st.lists(
    st.tuples(
        st.sampled_from(["arrived", "take", "storm"]), st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0, 11.0])
    ),
    max_size=200,
)


@given(
    HISTORIES,
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 10.0]),
    st.sampled_from([1.0, 10.0]),
)
def test_in_any_window_there_are_no_more_retries_than_is_said(history, share, per_second, ttl):
    budget = RetryBudget(BudgetPolicy(share, per_second, ttl))
    now, arrivals, retries = 0.0, [], []
    for what, pause in history:
        now += pause
        if what == "arrived":
            budget.arrived(now)
            arrivals.append(now)
        else:
            retries += [now] * taken(budget, now, wanted=1 if what == "take" else 30)
    for first in sorted(set(retries)):
        for last in sorted({at for at in retries if at >= first}):
            of_them = sum(first <= at <= last for at in retries)
            brought = share * sum(first - ttl <= at <= last for at in arrivals)
            assert of_them <= brought + per_second * (last - first + ttl) + 1e-6
    assert len(retries) <= share * len(arrivals) + per_second * (now + ttl) + 1e-6


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.5, 2.0]), max_size=200))
def test_ten_a_second_are_never_refused(pauses):
    """Who takes no more than one in a tenth of a second gets it, whatever else."""
    budget = RetryBudget(POLICY)
    now = last = 0.0
    for pause in pauses:
        now += pause
        if now - last >= 0.1:
            last = now
            assert budget.take(now)
