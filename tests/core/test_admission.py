from hypothesis import given
from hypothesis import strategies as st

from balancer.core.admission import AdmissionPolicy, WaitingLine
from balancer.core.model import Ask, Endpoint, ModelName, Needs, Ticket


def ask(arrived: float, model: str = "m", deadline: float = 100.0) -> Ask:
    needs = Needs(model=ModelName(model), endpoint=Endpoint.CHAT)
    return Ask(needs=needs, arrived=arrived, deadline=deadline)


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from("ab"))))
def test_each_group_stands_by_first_arrival(arrivals):
    line = WaitingLine(AdmissionPolicy())
    for number, (arrived, model) in enumerate(arrivals):
        line.join(Ticket(number), ask(arrived, model))
    served = []
    while heads := line.heads():
        ticket, _ = heads[0]
        served.append(arrivals[ticket][0])
        line.leave(ticket)
    assert served == sorted(served)
    assert len(line) == 0


def test_a_retry_goes_before_those_that_came_after_it():
    line = WaitingLine(AdmissionPolicy())
    line.join(Ticket(1), ask(5))
    line.join(Ticket(2), ask(6))
    line.join(Ticket(3), ask(1))
    assert line.heads()[0][0] == 3


def test_who_left_is_forgotten_and_leaving_twice_is_nothing():
    line = WaitingLine(AdmissionPolicy())
    line.join(Ticket(1), ask(5))
    assert line.leave(Ticket(1)) is not None
    assert line.leave(Ticket(1)) is None
    assert line.heads() == []


def test_those_past_their_deadline_are_named():
    line = WaitingLine(AdmissionPolicy())
    line.join(Ticket(1), ask(0, deadline=10))
    line.join(Ticket(2), ask(0, deadline=20))
    assert [ticket for ticket, _ in line.overdue(10)] == [1]
