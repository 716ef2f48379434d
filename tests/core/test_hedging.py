"""A second worker for a chat whose first token is late; off unless somebody wants it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import Phase
from balancer.core.dispatcher import HedgePolicy
from balancer.core.model import Draining, Ended, ModelOffer, Ticket, Verdict, WorkerId
from balancer.core.placement import POLICIES
from tests.core.rooms import M, Room, condition, granted, grants, old_cpu

every_policy = pytest.mark.parametrize("policy", POLICIES)
ALWAYS = HedgePolicy(share=1.0)


def room_of(policy: str = "expected_latency", hedge: HedgePolicy | None = ALWAYS, names: str = "ab", **more):
    room = Room(policy, hedge=hedge)
    for name in names:
        room.add(name, condition(**more))
    return room


def only(commands):
    (grant,) = grants(commands)
    return grant


@every_policy
def test_a_chat_whose_first_token_is_late_gets_a_second_worker_that_is_idle(policy):
    room = room_of(policy)
    ((_, first),) = granted(room.ask(1, tokens=10))
    copy = only(room.ticks(4))
    assert copy.copy_of == Ticket(1)
    assert {first, copy.worker.id} == {"a", "b"}
    assert copy.choice.because == f"{first} is late with its first token"
    assert grants(room.ticks(4)) == [], "one is enough"


@every_policy
def test_it_is_off_unless_somebody_wants_it(policy):
    room = room_of(policy, hedge=None)
    room.ask(1, tokens=10)
    assert grants(room.ticks(7)) == []


@every_policy
def test_in_time_is_what_was_expected_twice_over(policy):
    room = room_of(policy, hedge=HedgePolicy(share=1.0, factor=2.0, least_seconds=1.0))
    room.ask(1, tokens=10)
    assert grants(room.tick(1.0)) == []
    assert len(grants(room.tick(0.1))) == 1


def test_a_long_prompt_takes_its_time():
    room = Room(hedge=ALWAYS)
    for name in "ab":
        room.add(name, condition(slots=4))
        room.teach(name, prefill=1000, token=0.02)
    room.ask(1, tokens=3000)
    assert grants(room.ticks(5)) == [], "3 s were expected"
    assert len(grants(room.ticks(3))) == 1


@every_policy
def test_an_answer_that_has_begun_is_let_be(policy):
    room = room_of(policy)
    room.ask(1, tokens=10)
    room.begin(1, after=0.5)
    assert grants(room.ticks(4)) == []


@every_policy
def test_class_batch_is_not_in_such_a_hurry(policy):
    room = room_of(policy)
    room.ask(1, tokens=10, batch=True)
    assert grants(room.ticks(4)) == []


@every_policy
def test_a_worker_that_has_something_to_do_is_left_alone(policy):
    room = room_of(policy)
    for number in (1, 2):
        room.ask(number, tokens=10, avoid=["a" if number == 1 else "b"])
    assert {room.view(name).running for name in "ab"} == {1}
    assert grants(room.ticks(4)) == []


@every_policy
def test_a_worker_that_is_asked_by_others_is_left_alone(policy):
    room = room_of(policy)
    ((_, first),) = granted(room.ask(1, tokens=10))
    other = {"a": "b", "b": "a"}[first]
    for _ in range(3):
        room.report(other, condition(running=1))
    assert grants(room.ticks(4)) == []


@every_policy
def test_a_worker_that_failed_of_late_is_left_alone(policy):
    """Were it that nobody is well, so that it may be asked at all."""
    room = room_of(policy)
    for other in "ab":
        for number in range(3):
            room.ask(ord(other) + 10 * number, avoid=[other])
            room.end(ord(other) + 10 * number, Verdict.BAD)
    assert {room.view(name).breaker for name in "ab"} == {Phase.OPEN}
    assert granted(room.ask(1, tokens=10))
    assert grants(room.ticks(4)) == []


@every_policy
def test_a_worker_that_failed_this_request_before_is_left_alone(policy):
    room = room_of(policy)
    assert granted(room.ask(1, tokens=10, avoid=["a"]))
    assert grants(room.ticks(4)) == []


@every_policy
def test_so_it_is_though_everybody_has_failed_it(policy):
    room = room_of(policy)
    assert granted(room.ask(1, tokens=10, avoid=["a", "b"]))
    assert grants(room.ticks(4)) == []


@every_policy
def test_a_worker_that_would_have_to_load_the_model_first_is_left_alone(policy):
    room = room_of(policy, names="a")
    room.add("b", replace(condition(), models=(ModelOffer(name=M, loaded=False, load_seconds=60),)))
    assert granted(room.ask(1, tokens=10, avoid=["b"])) == [(1, "a")]
    room.end(1)
    for number in (2, 3, 4, 5):
        for _, name in granted(room.ask(number, tokens=10)):
            copies = grants(room.ticks(4))
            assert [copy.worker.id for copy in copies] == ([] if name == "a" else ["a"])
            for copy in copies:
                room.tell(Ended(copy.ticket))
            room.end(number)


def test_what_a_copy_writes_is_a_chat_as_any_other():
    """Half of its worker's slots are kept from class batch."""
    room = room_of(slots=4)
    ((_, first),) = granted(room.ask(1, tokens=10))
    copy = only(room.ticks(4))
    room.begin(copy.ticket)
    room.tell(Ended(Ticket(1)))
    room.tell(Draining(WorkerId(first)))
    for number in range(10, 16):
        for ticket, _ in granted(room.ask(number, tokens=10, batch=True) + room.tick(0.5)):
            room.begin(ticket, after=0.1)
    assert room.view(copy.worker.id).running == 2


def test_a_worker_whose_context_is_too_short_is_left_alone():
    room = Room(hedge=ALWAYS)
    room.add("long", condition())
    room.add("short", replace(condition(), models=(ModelOffer(name=M, context_tokens=50),)))
    ((_, first),) = granted(room.ask(1, tokens=200))
    assert first == "long"
    assert grants(room.ticks(8)) == []


def test_a_worker_that_would_take_longer_than_is_left_to_be_expected_is_left_alone():
    room = Room(hedge=ALWAYS)
    room.add("fast", condition(slots=4))
    room.teach("fast", prefill=4000, token=0.02)
    room.add("slow", old_cpu())
    assert granted(room.ask(1, tokens=2500)) == [(1, "fast")]
    assert grants(room.ticks(6)) == [], "40 s on the other"


@every_policy
def test_of_several_the_one_that_would_begin_first_is_taken(policy):
    prefills = {"slow": 500, "faster": 1000, "fastest": 4000}
    room = Room(policy, hedge=ALWAYS)
    for name, prefill in prefills.items():
        room.add(name, condition())
        room.teach(name, prefill=prefill, token=0.02)
    ((_, first),) = granted(room.ask(1, tokens=600))
    copy = only(room.ticks(6))
    assert copy.worker.id == max(prefills.keys() - {first}, key=lambda name: prefills[name])


@every_policy
@pytest.mark.parametrize("winner", ["first", "copy"])
def test_who_was_slower_is_not_thought_worse_of(policy, winner):
    room = room_of(policy)
    ((_, first),) = granted(room.ask(1, tokens=10))
    copy = only(room.ticks(4))
    began, other = (1, copy.ticket) if winner == "first" else (copy.ticket, 1)
    slower = room.view(first if winner == "copy" else copy.worker.id)
    room.begin(began)
    room.tell(Ended(Ticket(other)))
    room.end(began, after=1.0, output=20)
    assert room.dispatcher.snapshot(room.now).running == 0
    after = room.view(slower.worker.id)
    assert (after.breaker, after.success_rate) == (Phase.CLOSED, 1.0)
    assert after.average_seconds is None
    assert after.prefill_tokens_per_second == slower.prefill_tokens_per_second


@every_policy
def test_what_the_copy_comes_to_is_learned(policy):
    room = room_of(policy)
    room.ask(1, tokens=10)
    copy = only(room.ticks(4))
    room.tell(Ended(Ticket(1)))
    room.begin(copy.ticket, after=0.5)
    room.end(copy.ticket, after=1.0, seconds=1.5, output=20)
    assert room.view(copy.worker.id).average_seconds == 1.5
    for number in range(2, 5):
        room.ask(number, tokens=10, avoid=[room.view("a").worker.id if copy.worker.id == "b" else "b"])
        room.end(number, Verdict.BAD)
    assert room.view(copy.worker.id).breaker is Phase.OPEN


@every_policy
def test_a_copy_that_nobody_wants_is_not_offered_again(policy):
    room = room_of(policy)
    room.ask(1, tokens=10)
    copy = only(room.ticks(4))
    room.tell(Ended(copy.ticket))
    assert grants(room.ticks(4)) == []


@given(
    st.lists(st.sampled_from(["late", "in time", "late", "retried"]), max_size=120),
    st.sampled_from([0.0, 0.03, 0.05, 0.3, 0.5, 1.0]),
)
def test_copies_are_never_more_than_their_share_of_the_chats(history, share):
    room = room_of(hedge=HedgePolicy(share=share), slots=2)
    copies = 0
    for number, what in enumerate(history, start=1):
        assert granted(room.ask(number, tokens=10, admitted=what == "retried"))
        started = grants(room.ticks(2 if what == "late" else 0.5))
        copies += len(started)
        assert copies <= share * number
        for copy in started:
            room.tell(Ended(copy.ticket))
        room.end(number)
    if share == 1.0:
        assert copies == history.count("late")


def test_of_many_that_were_in_time_no_more_are_saved_up_than_are_of_use():
    room = Room(hedge=HedgePolicy(share=0.5))
    names = [f"w{number}" for number in range(60)]
    for name in names:
        room.add(name, condition(slots=1))
    for number in range(1, 200):
        room.ask(number, tokens=10)
        room.end(number)
    for number in range(1000, 1030):
        room.ask(number, tokens=10)
    assert len(grants(room.tick(3))) == 10
