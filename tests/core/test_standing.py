"""What somebody who waits can be told of it."""

import pytest

from balancer.core.model import Condition, ModelName, ModelOffer, Standing, Ticket, Verdict
from balancer.core.placement import POLICIES
from tests.core.rooms import Room, condition

every_policy = pytest.mark.parametrize("policy", POLICIES)
both_classes = pytest.mark.parametrize("batch", [False, True])


def standing(room: Room, number: int) -> Standing | None:
    return room.dispatcher.standing(Ticket(number), room.now)


def busy(policy: str, seconds: float | None = None) -> Room:
    """One slot, and somebody on it; an answer takes so many seconds, if that is known."""
    room = Room(policy)
    room.add("a", condition(slots=1))
    room.ask(1)
    if seconds is not None:
        room.end(1, seconds=seconds)
        room.ask(2)
    return room


@every_policy
@both_classes
def test_those_who_wait_stand_in_the_order_of_their_arrival(policy, batch):
    room = busy(policy)
    for number in (10, 11, 12):
        room.now += 1
        room.ask(number, batch=batch)
    assert [standing(room, number).position for number in (10, 11, 12)] == [1, 2, 3]
    room.end(11, Verdict.UNKNOWN)
    assert [standing(room, number).position for number in (10, 12)] == [1, 2]


@every_policy
def test_of_those_who_came_at_the_same_moment_each_has_a_place(policy):
    room = busy(policy)
    for number in (10, 11, 12):
        room.ask(number)
    assert sorted(standing(room, number).position for number in (10, 11, 12)) == [1, 2, 3]


@every_policy
def test_a_retry_stands_where_its_first_arrival_puts_it(policy):
    room = busy(policy)
    room.now += 5
    room.ask(10)
    room.ask(11, since=1.0, avoid=["a"], admitted=True)
    assert standing(room, 11).position == 1
    assert standing(room, 10).position == 2


@every_policy
def test_how_long_it_will_take_is_said_as_soon_as_something_was_measured(policy):
    room = busy(policy, seconds=4.0)
    for number in (10, 11):
        room.now += 0.1
        room.ask(number)
    assert [standing(room, number).eta_seconds for number in (10, 11)] == [4.0, 8.0]


@every_policy
def test_of_what_nobody_has_measured_no_time_is_told(policy):
    room = busy(policy)
    room.ask(10)
    assert standing(room, 10) == Standing(1, None)


@every_policy
def test_who_waits_for_another_model_is_in_nobodys_way(policy):
    room = Room(policy)
    offers = tuple(ModelOffer(name=ModelName(name)) for name in ("m", "n"))
    room.add("a", Condition(models=offers, slots=1))
    room.ask(1)
    room.ask(10)
    room.ask(11, model="n")
    assert standing(room, 11).position == 1


@every_policy
@both_classes
def test_each_class_has_its_own_line(policy, batch):
    room = busy(policy)
    room.ask(10, batch=not batch)
    room.ask(11, batch=batch)
    assert standing(room, 11).position == 1


@every_policy
def test_who_runs_or_is_unknown_does_not_wait(policy):
    room = busy(policy)
    assert standing(room, 1) is None
    assert standing(room, 99) is None
