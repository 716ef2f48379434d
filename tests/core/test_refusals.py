"""Who is turned away, and when they are told to come again."""

import pytest

from balancer.core.admission import AdmissionPolicy
from balancer.core.batches import BatchPolicy
from balancer.core.model import Refusal, Refuse
from balancer.core.placement import POLICIES
from tests.core.rooms import Room, condition, granted, paper, refused


def busy_room(policy: str, seconds: float, **limits) -> Room:
    """One worker with one slot, taken; an answer takes so many seconds there."""
    room = Room(policy, admission=AdmissionPolicy(**limits))
    room.add("a", condition(slots=1))
    room.ask(1)
    room.end(1, seconds=seconds)
    room.ask(2)
    return room


@pytest.mark.parametrize("policy", POLICIES)
def test_who_could_not_be_served_before_their_deadline_is_told_so_at_once(policy):
    room = busy_room(policy, 10.0)
    assert room.ask(3, patience=25) == []
    (refuse,) = room.ask(4, patience=15)
    assert isinstance(refuse, Refuse)
    assert refuse.refusal is Refusal.WOULD_WAIT_TOO_LONG
    assert refuse.retry_after == 5.0, "two answers of 10 s are before it; 15 s is its patience"


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_refused_on_a_guess(policy):
    room = Room(policy)
    room.add("a", condition(slots=1))
    room.ask(1)
    assert room.ask(2, patience=0.1) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_each_class_has_a_line_of_its_own(policy):
    room = busy_room(policy, 1.0, max_waiting=1, max_waiting_batch=2)
    batch = [refused(room.ask(number, batch=True, blocks=paper(number, 2))) for number in (10, 11, 12)]
    people = [refused(room.ask(number)) for number in (20, 21)]
    assert batch == [[], [], [Refusal.QUEUE_FULL]]
    assert people == [[], [Refusal.QUEUE_FULL]]


@pytest.mark.parametrize("policy", POLICIES)
def test_who_was_let_in_before_is_let_in_again(policy):
    room = busy_room(policy, 1.0, max_waiting=0, max_waiting_batch=0)
    assert room.ask(10, admitted=True) == []
    assert room.ask(11, batch=True, admitted=True) == []
    assert room.waiting == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_people_are_served_before_batch(policy):
    """Its share of all apart, which batch gets even so."""
    room = Room(policy, batch=BatchPolicy(floor=0.0))
    room.add("a", condition(slots=1))
    room.ask(1)
    room.ask(10, batch=True)
    room.ask(11)
    assert granted(room.end(1)) == [(11, "a")]
