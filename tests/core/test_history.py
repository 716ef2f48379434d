from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import Candidate, Choice, Endpoint, ModelName, Served, WorkerId
from balancer.history import History, share_of


def served(request_id: str) -> Served:
    return Served(
        request_id=request_id,
        model=ModelName("m"),
        endpoint=Endpoint.CHAT,
        stream=False,
        client="",
        attempts=(),
        queue_seconds=0,
        seconds=0,
        status=200,
    )


@given(st.lists(st.sampled_from("abcdefgh")), st.integers(1, 4))
def test_the_last_ones_are_found_and_no_more_are_kept(ids, kept):
    history = History(kept)
    for name in ids:
        history.observe(served(name))
    latest = list(dict.fromkeys(reversed(ids)))
    assert [name for name in latest if history.find(name)] == latest[:kept]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_shares_add_up_to_one(weights):
    candidates = tuple(
        Candidate(worker_id=WorkerId(str(number)), scores={}, weight=weight)
        for number, weight in enumerate(weights)
    )
    choice = Choice(worker_id=WorkerId("0"), candidates=candidates)
    assert abs(sum(share_of(choice, str(number)) for number in range(len(weights))) - 1) < 1e-9
