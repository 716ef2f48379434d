"""Workers that get nothing new since somebody wants it so."""

import pytest

from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy
from balancer.core.dispatcher import HedgePolicy
from balancer.core.model import Draining, Gone, Lost, Seen, Verdict, WorkerId
from balancer.core.placement import POLICIES
from tests.core.rooms import Room, condition, granted, grants, paper, probes, worker

every_policy = pytest.mark.parametrize("policy", POLICIES)
A = WorkerId("a")


def two_workers(policy: str) -> Room:
    room = Room(policy)
    for name in "ab":
        room.add(name, condition(slots=30))
    return room


@every_policy
def test_a_worker_that_drains_gets_nothing_new(policy):
    room = two_workers(policy)
    room.tell(Draining(A))
    assert {name for number in range(20) for _, name in granted(room.ask(number))} == {"b"}


@every_policy
def test_what_runs_on_it_goes_on(policy):
    room = Room(policy)
    room.add("a", condition())
    room.ask(1)
    room.begin(1)
    assert room.tell(Draining(A)) == []
    assert room.view("a").running == 1
    assert room.view("a").state == "draining"
    assert room.view("a").detail == "gets nothing new; 1 of its requests still run"
    room.end(1)
    assert room.view("a").running == 0


@every_policy
def test_who_waits_for_it_gets_it_when_it_is_taken_back(policy):
    room = Room(policy)
    room.add("a", condition())
    room.tell(Draining(A))
    assert room.ask(1) == []
    assert granted(room.tell(Draining(A, on=False))) == [(1, "a")]
    assert room.view("a").state == "ready"


@every_policy
def test_it_holds_whatever_the_worker_says_of_itself(policy):
    room = Room(policy)
    room.add("a", condition())
    room.tell(Draining(A))
    room.ask(1)
    assert granted(room.report("a", condition(slots=8))) == []
    assert granted(room.tell(Seen(worker("a", cap=7)))) == []
    assert granted(room.tell(Seen(worker("a", port=2))) + room.report("a", condition())) == [], "it moved"
    room.tell(Lost(A, "no report"))
    assert room.view("a").state == "lost"
    assert granted(room.report("a", condition())) == []
    assert room.view("a").state == "draining"


@every_policy
def test_who_leaves_the_room_and_comes_again_is_as_any_other(policy):
    room = Room(policy)
    room.add("a", condition())
    room.tell(Draining(A))
    room.tell(Gone(A))
    room.add("a", condition())
    assert granted(room.ask(1)) == [(1, "a")]


@every_policy
def test_of_a_worker_that_nobody_knows_it_is_ignored(policy):
    room = Room(policy)
    assert room.tell(Draining(A)) == []
    assert not room.dispatcher.has_worker(A)
    room.add("a", condition())
    assert room.dispatcher.has_worker(A)
    assert granted(room.ask(1)) == [(1, "a")]


@every_policy
def test_a_retry_goes_to_the_one_that_failed_it_rather_than_to_one_that_drains(policy):
    room = two_workers(policy)
    room.tell(Draining(A))
    assert granted(room.ask(1, avoid=["b"])) == [(1, "b")]


@every_policy
def test_it_is_not_asked_for_want_of_others_that_are_well(policy):
    """Fail open is for those that somebody wants to be asked."""
    room = Room(policy, breaker=BreakerPolicy(trip_after=1))
    for name in "ab":
        room.add(name, condition())
    room.tell(Draining(A))
    room.ask(1)
    room.end(1, Verdict.BAD)
    assert granted(room.ask(2)) == [(2, "b")]


@every_policy
def test_it_is_not_probed(policy):
    room = Room(policy, breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("a", condition())
    room.ask(1)
    room.end(1, Verdict.BAD)
    room.tell(Draining(A))
    assert probes(room.ticks(20)) == []
    room.tell(Draining(A, on=False))
    assert len(probes(room.tick(1))) == 1


def test_it_is_not_calibrated():
    room = Room()
    room.tell(Seen(worker("a")))
    room.tell(Draining(A))
    assert probes(room.report("a", condition(calibrates=True))) == []
    room.tell(Draining(A, on=False))
    assert len(probes(room.report("a", condition(calibrates=True)))) == 1


def test_the_other_prompts_of_a_paper_that_it_has_go_elsewhere():
    room = Room(batch=BatchPolicy(slice_seconds=0))
    for name in "ab":
        room.add(name, condition(slots=1))
    ((_, home),) = granted(room.ask(1, blocks=paper(1, 20), batch=True))
    other = {"a": "b", "b": "a"}[home]
    assert granted(room.ask(2, blocks=paper(1, 20), batch=True)) == [], "it waits for its paper's home"
    told = room.tell(Draining(WorkerId(home)))
    assert granted(told) == [(2, other)]
    room.end(2)
    room.tell(Draining(WorkerId(home), on=False))
    room.tell(Draining(WorkerId(home)))
    assert granted(room.ask(3, blocks=paper(1, 20), batch=True)) == [(3, other)]


def test_no_copies_are_made_on_it():
    room = Room(hedge=HedgePolicy(share=1.0))
    for name in "ab":
        room.add(name, condition())
    ((_, home),) = granted(room.ask(1))
    room.tell(Draining(WorkerId({"a": "b", "b": "a"}[home])))
    assert grants(room.ticks(5)) == []
