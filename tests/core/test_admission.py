from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from balancer.core.admission import WaitingLine
from balancer.core.model import Ask, Endpoint, ModelName, Needs, Ticket


def needs(model: str = "m") -> Needs:
    return Needs(model=ModelName(model), endpoint=Endpoint.CHAT)


def ask(arrived: float, model: str = "m", deadline: float = 100.0, client: str = "c") -> Ask:
    return Ask(needs=needs(model), arrived=arrived, deadline=deadline, client=client)


def in_turn(line: WaitingLine, model: str = "m", tokens: float = 100.0) -> list[int]:
    return [ticket for ticket, _ in line.in_turn(needs(model), lambda _: tokens)]


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from("ab"))))
def test_a_clients_asks_stand_by_first_arrival(arrivals):
    line = WaitingLine(1000)
    for number, (arrived, model) in enumerate(arrivals):
        line.join(Ticket(number), ask(arrived, model))
    for model in "ab":
        moments = [arrivals[ticket][0] for ticket in in_turn(line, model)]
        assert moments == sorted(arrived for arrived, its in arrivals if its == model)


def test_a_retry_goes_before_those_that_came_after_it():
    line = WaitingLine(1000)
    line.join(Ticket(1), ask(5))
    line.join(Ticket(2), ask(6))
    line.join(Ticket(3), ask(1))
    assert in_turn(line) == [3, 1, 2]


def test_what_somebody_waits_for_longest_comes_first():
    line = WaitingLine(1000)
    line.join(Ticket(1), ask(5, "a"))
    line.join(Ticket(2), ask(3, "b", client="x"))
    line.join(Ticket(3), ask(1, "b", client="y"))
    line.join(Ticket(4), ask(2, "c"))
    assert [each.model for each in line.needs()] == ["b", "c", "a"]


def test_clients_take_turns_by_the_tokens_that_each_was_served():
    line = WaitingLine(1000)
    for number in range(6):
        line.join(Ticket(number), ask(number, client="many"))
    line.join(Ticket(10), ask(10, client="few"))
    line.join(Ticket(11), ask(11, client="few"))
    assert in_turn(line) == [0, 10, 1, 11, 2, 3, 4, 5]
    line.turns.served("many", 250)
    assert in_turn(line)[:3] == [10, 11, 0]


def test_who_left_is_forgotten_and_leaving_twice_is_nothing():
    line = WaitingLine(1000)
    line.join(Ticket(1), ask(5))
    assert line.leave(Ticket(1)) is not None
    assert line.leave(Ticket(1)) is None
    assert (line.needs(), in_turn(line), len(line)) == ([], [], 0)


def test_those_past_their_deadline_are_named():
    line = WaitingLine(1000)
    line.join(Ticket(1), ask(0, deadline=10))
    line.join(Ticket(2), ask(0, deadline=20))
    assert line.overdue(10) == [1]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 9))))
def test_everybody_who_waits_is_in_turn_exactly_once(history):
    line, numbers, waiting = WaitingLine(1000), count(), []
    for joins, model, client, arrived in history:
        if joins or not waiting:
            ticket = next(numbers)
            line.join(Ticket(ticket), ask(arrived, model, client=client))
            waiting.append((ticket, model))
        else:
            ticket, _ = waiting.pop(arrived % len(waiting))
            assert line.leave(Ticket(ticket)) is not None
        assert len(line) == len(waiting)
        for each in "ab":
            its = sorted(ticket for ticket, model in waiting if model == each)
            assert sorted(in_turn(line, each)) == sorted(line.group(needs(each))) == its
            assert line.count(needs(each)) == len(its)
            assert line.has(needs(each)) == bool(its)
