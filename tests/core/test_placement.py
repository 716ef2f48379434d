import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.fleet import Line
from balancer.core.model import Candidate, WorkerId
from balancer.core.placement import POLICIES, Combine, PlacementPolicy, draw, expected_seconds, pick, rate
from balancer.core.scorers import SCORERS, Standing

standings = st.builds(
    Standing,
    running=st.integers(0, 50),
    slots=st.integers(1, 50),
    success_rate=st.floats(0, 1),
    average_seconds=st.none() | st.floats(0, 1e6),
    best_average_seconds=st.none() | st.floats(0, 1e6),
    reliability=st.floats(0.01, 1),
    expected_seconds=st.floats(1e-6, 1e9),
    least_expected_seconds=st.floats(1e-6, 1e9),
    least_load=st.floats(0, 1),
    rested_seconds=st.floats(0, float("inf")),
    longest_rest_seconds=st.floats(0, float("inf")),
)


@given(standings)
def test_every_score_is_between_0_and_1(standing):
    for scorer in SCORERS.values():
        assert 0 <= scorer(standing) <= 1


@given(standings, st.sampled_from(list(POLICIES)))
def test_every_weight_is_a_share_of_the_policys_own(standing, name):
    policy = POLICIES[name]
    (candidate,) = rate({WorkerId("w"): standing}, policy.weights, policy.combine)
    assert 0 <= candidate.weight <= max(sum(policy.weights.values()), 1)


def test_the_users_formula_is_04_availability_04_success_02_response_time():
    policy = PlacementPolicy("weighted_random")
    assert policy.effective_weights() == {"availability": 0.4, "success_rate": 0.4, "response_time": 0.2}
    standing = Standing(running=1, slots=4, success_rate=0.5, average_seconds=4.0, best_average_seconds=1.0)
    (candidate,) = rate({WorkerId("mini"): standing}, policy.effective_weights(), policy.policy.combine)
    assert candidate.weight == 0.4 * 0.75 + 0.4 * 0.5 + 0.2 * 0.25


def test_expected_latency_is_reliability_squared_times_the_ratio_to_the_best_to_the_power_of_8():
    standing = Standing(
        running=0,
        slots=4,
        success_rate=1.0,
        average_seconds=None,
        best_average_seconds=None,
        reliability=0.8,
        expected_seconds=3.0,
        least_expected_seconds=2.0,
    )
    policy = PlacementPolicy()
    (candidate,) = rate({WorkerId("mini"): standing}, policy.effective_weights(), policy.policy.combine)
    assert candidate.weight == pytest.approx(0.8**2 * (2 / 3) ** 8)


def test_a_weight_that_is_set_replaces_the_policys_own_and_no_other():
    policy = PlacementPolicy("weighted_random", {"availability": 1.0})
    assert policy.effective_weights() == {"availability": 1.0, "success_rate": 0.4, "response_time": 0.2}


def test_a_bad_score_can_be_made_good_in_a_sum_and_not_in_a_product():
    standing = Standing(running=4, slots=4, success_rate=1.0, average_seconds=None, best_average_seconds=None)
    weights = {"availability": 1.0, "success_rate": 1.0}
    for combine, weight in ((Combine.SUM, 1.0), (Combine.PRODUCT, 0.0)):
        assert rate({WorkerId("w"): standing}, weights, combine)[0].weight == weight


def line(**more) -> Line:
    nothing = {"fixed": 0, "per_uncached": 0, "per_output": 0, "backlog_ends": -1e9, "backlog_least": 0}
    rest = {"free_at": -1e9, "token_seconds": 0.0, "full": False, "explored": True}
    return Line(**{**nothing, **rest, **more})


def test_an_ask_costs_its_own_prompt_and_answer_and_what_is_before_it():
    busy = line(fixed=1, per_uncached=0.01, per_output=0.1, backlog_ends=107.0, backlog_least=0.5)
    assert expected_seconds(busy, 300, 20, 100.0, full=False) == 1 + 3 + 2 + 7
    assert expected_seconds(busy, 300, 20, 200.0, full=False) == 1 + 3 + 2 + 0.5


def test_where_there_is_no_room_the_wait_for_it_counts():
    full = line(fixed=1, free_at=107.0, token_seconds=0.1)
    assert expected_seconds(full, 300, 20, 100.0, full=True) == 1 + 7
    assert expected_seconds(full, 300, 20, 100.0, full=False) == 1


def candidates(*weights: float) -> list[Candidate]:
    return [Candidate(worker_id=WorkerId(str(n)), scores={}, weight=w) for n, w in enumerate(weights)]


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
)
def test_a_worker_of_weight_zero_is_picked_only_where_all_are(weights, chance):
    picked = pick(candidates(*weights), chance)
    assert picked.weight > 0 or not any(weights)


@given(st.lists(st.floats(0), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_there_is_always_somebody_to_draw(weights, chance):
    assert 0 <= draw(weights, chance) < len(weights)


def test_picks_are_spread_as_the_weights_are():
    dice = random.Random(1)
    counts = Counter(pick(candidates(1, 2, 5), dice.random()).worker_id for _ in range(8000))
    assert [round(counts[WorkerId(name)] / 1000) for name in "012"] == [1, 2, 5]
