import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import Candidate, WorkerId
from balancer.core.placement import POLICIES, PlacementPolicy, pick, rate
from balancer.core.scorers import SCORERS, Standing

standings = st.builds(
    Standing,
    running=st.integers(0, 50),
    slots=st.integers(1, 50),
    success_rate=st.floats(0, 1),
    average_seconds=st.none() | st.floats(0, 1e6),
    best_average_seconds=st.none() | st.floats(0, 1e6),
)


@given(standings)
def test_every_score_is_between_0_and_1(standing):
    for scorer in SCORERS.values():
        assert 0 <= scorer(standing) <= 1


def test_the_users_formula_is_04_availability_04_success_02_response_time():
    assert POLICIES["weighted_random"] == {"availability": 0.4, "success_rate": 0.4, "response_time": 0.2}
    standing = Standing(running=1, slots=4, success_rate=0.5, average_seconds=4.0, best_average_seconds=1.0)
    (candidate,) = rate({WorkerId("mini"): standing}, PlacementPolicy())
    assert candidate.weight == 0.4 * 0.75 + 0.4 * 0.5 + 0.2 * 0.25


def candidates(*weights: float) -> list[Candidate]:
    return [Candidate(worker_id=WorkerId(str(n)), scores={}, weight=w) for n, w in enumerate(weights)]


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True),
)
def test_a_worker_of_weight_zero_is_picked_only_where_all_are(weights, chance):
    picked = pick(candidates(*weights), chance)
    assert picked.weight > 0 or not any(weights)


def test_picks_are_spread_as_the_weights_are():
    dice = random.Random(1)
    counts = Counter(pick(candidates(1, 2, 5), dice.random()).worker_id for _ in range(8000))
    assert [round(counts[WorkerId(name)] / 1000) for name in "012"] == [1, 2, 5]
