"""Clients of a class take turns by tokens."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from balancer.core.fairness import Turns

LARGEST = 1000


def test_whoever_was_served_least_is_next():
    turns = Turns()
    for client in "ab":
        for _ in range(3):
            turns.joined(client)
    turns.served("a", 10)
    turns.served("b", 5)
    assert turns.order("ab") == ["b", "a"]


def test_nobody_saves_up_turns_while_away():
    turns = Turns()
    for _ in range(100):
        turns.joined("busy")
    for _ in range(50):
        turns.served("busy", 100)
    turns.joined("late")
    assert turns.counter("late") == turns.counter("busy") == 5000


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, LARGEST)), min_size=1, max_size=300),
    st.randoms(use_true_random=False),
)
def test_between_two_who_both_wait_all_the_time_the_difference_is_at_most_one_request_each(sizes, dice):
    """Whatever the sizes: the bound does not grow with the length of the history."""
    turns = Turns()
    queues: dict[str, list[int]] = {client: [LARGEST // 2] for client in "abc"}
    for client, tokens in sizes:
        queues[client].append(tokens)
    for client, queue in queues.items():
        for _ in queue:
            turns.joined(client)
    served: dict[str, int] = defaultdict(int)
    while all(queues.values()):
        client = turns.order(queues)[0]
        tokens = queues[client].pop(dice.randrange(len(queues[client])))
        turns.served(client, tokens)
        turns.left(client)
        served[client] += tokens
        for one in "abc":
            for other in "abc":
                assert abs(served[one] - served[other]) <= 2 * LARGEST


@given(
    st.lists(
        st.tuples(st.sampled_from(["joined", "served", "left"]), st.sampled_from("abc"), st.floats(0, 1e6))
    )
)
def test_who_waits_is_known_and_who_left_is_forgotten(history):
    turns, waiting = Turns(), defaultdict(int)
    for what, client, tokens in history:
        if what == "joined":
            turns.joined(client)
            waiting[client] += 1
        elif waiting[client] and what == "served":
            before = turns.counter(client)
            turns.served(client, tokens)
            assert turns.counter(client) == before + tokens
        elif waiting[client]:
            turns.left(client)
            waiting[client] -= 1
        assert sorted(turns.order(client for client, count in waiting.items() if count)) == sorted(
            client for client, count in waiting.items() if count
        )
        assert all(turns.counter(client) >= 0 for client in "abc")
