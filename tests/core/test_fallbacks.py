"""Workers outside of the room: asked where the room cannot, never for what must stay here or nobody wants."""

from dataclasses import replace

import pytest

from balancer.core.admission import AdmissionPolicy
from balancer.core.batches import BatchPolicy
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.dispatcher import HedgePolicy
from balancer.core.model import (
    Condition,
    Draining,
    Ended,
    Gone,
    Loading,
    Lost,
    ModelName,
    ModelOffer,
    Refusal,
    Refuse,
    Seen,
    Ticket,
    Verdict,
    WorkerId,
)
from balancer.core.placement import POLICIES
from tests.core.rooms import M, Room, condition, granted, grants, llama_cpp, paper, probes, refused, worker

every_policy = pytest.mark.parametrize("policy", POLICIES)
PAID = Condition(models=(ModelOffer(name=M, known_as=ModelName("gpt"), context_tokens=128_000),), slots=8)


def room_with(policy: str = "expected_latency", local: Condition | None = None, **more) -> Room:
    """A worker of the room with one slot, and a paid one with eight."""
    room = Room(policy, **more)
    room.add("local", local or condition(slots=1))
    room.add("paid", PAID, fallback=True)
    return room


# When


@every_policy
def test_a_fallback_gets_nothing_while_the_room_is_well_were_it_only_busy(policy):
    room = room_with(policy)
    (grant,) = grants(room.ask(1))
    assert grant.worker.id == "local"
    assert grant.choice.excluded == {"paid": "a fallback, and workers of the room are well"}
    assert room.ask(2) == []
    assert grants(room.ticks(5)) == []
    assert granted(room.end(1)) == [(2, "local")]


def lost(room: Room) -> None:
    room.tell(Lost(WorkerId("local"), "no report"))


def failed(room: Room) -> None:
    room.report("local", condition(ready=False, state="failed"))


def cannot_load(room: Room) -> None:
    room.report("local", Condition(models=(ModelOffer(name=M, loaded=False, failed="too large"),), slots=1))


def tripped(room: Room) -> None:
    room.ask(100)
    room.end(100, Verdict.BAD)


def drains(room: Room) -> None:
    room.tell(Draining(WorkerId("local")))


def gone(room: Room) -> None:
    room.tell(Gone(WorkerId("local")))


@every_policy
@pytest.mark.parametrize("trouble", [lost, failed, cannot_load, tripped, drains, gone])
def test_where_the_room_has_nobody_who_is_well_it_is_asked(policy, trouble):
    room = room_with(policy, breaker=BreakerPolicy(trip_after=1))
    trouble(room)
    (grant,) = grants(room.ask(1))
    assert (grant.worker.id, grant.model) == ("paid", "gpt")
    assert grant.choice.because == "no worker of the room is well"


@every_policy
def test_who_waits_goes_there_when_the_last_worker_of_the_room_is_lost(policy):
    room = room_with(policy)
    room.ask(1)
    room.ask(2)
    assert granted(room.tell(Lost(WorkerId("local"), "no report"))) == [(2, "paid")]


@every_policy
@pytest.mark.parametrize("state", ["starting", "loading"])
def test_who_will_be_there_shortly_is_waited_for(policy, state):
    room = room_with(policy, condition(slots=1, ready=False, state=state))
    assert room.ask(1) == []
    assert granted(room.report("local", condition(slots=1))) == [(1, "local")]


@every_policy
def test_who_asked_for_a_moments_rest_is_waited_for(policy):
    room = room_with(policy)
    room.ask(1)
    room.end(1, Verdict.UNKNOWN, hold_seconds=3.0)
    assert room.ask(2) == []
    assert granted(room.tick(3.5)) == [(2, "local")]


@every_policy
def test_a_model_that_is_being_loaded_in_the_room_is_waited_for(policy):
    cold = ModelOffer(name=M, loaded=False, load_seconds=20)
    room = room_with(policy, Condition(models=(cold,), slots=2, tells_loads=True))
    assert granted(room.ask(1, patience=60)) == [(1, "local")]


@every_policy
def test_it_answers_in_place_of_the_refusal_to_a_full_line(policy):
    room = room_with(policy, admission=AdmissionPolicy(max_waiting=1))
    room.ask(1)
    room.ask(2)
    (grant,) = grants(room.ask(3))
    assert (grant.worker.id, grant.choice.because) == ("paid", "the waiting line is full")


@every_policy
def test_it_answers_whose_turn_would_come_too_late(policy):
    room = room_with(policy)
    room.ask(1)
    room.end(1, seconds=10.0)
    room.ask(2)
    (grant,) = grants(room.ask(3, patience=5))
    assert (grant.worker.id, grant.choice.because) == ("paid", "its turn in the room would come too late")


@every_policy
def test_it_answers_who_has_waited_too_long(policy):
    room = room_with(policy)
    room.ask(1)
    room.ask(2, patience=4)
    (grant,) = grants(room.ticks(5))
    assert (grant.worker.id, grant.choice.because) == ("paid", "it has waited too long")


@every_policy
def test_it_answers_for_whom_the_model_would_be_loaded_too_late(policy):
    cold = ModelOffer(name=M, loaded=False, loading=True, load_seconds=200)
    room = room_with(policy, Condition(models=(cold,), slots=2, tells_loads=True))
    (grant,) = grants(room.ask(1, patience=60))
    assert grant.choice.because == "the room will not have loaded the model in time"


@every_policy
def test_without_room_there_the_refusal_stands(policy):
    room = room_with(policy, admission=AdmissionPolicy(max_waiting=0))
    room.report("paid", replace(PAID, slots=1))
    room.ask(1)
    assert granted(room.ask(2)) == [(2, "paid")]
    assert refused(room.ask(3)) == [Refusal.QUEUE_FULL]


@every_policy
def test_what_all_of_the_room_have_failed_goes_there(policy):
    room = room_with(policy)
    assert granted(room.ask(1, avoid=["local"])) == [(1, "local")], "they may only have been busy"
    room.end(1)
    assert granted(room.ask(2, avoid=["local"], failed_here=True)) == [(2, "paid")]
    room.end(2, Verdict.BAD)
    assert granted(room.ask(3, avoid=["local", "paid"], failed_here=True)) == [(3, "local")]


@every_policy
def test_an_answer_that_the_room_began_is_not_gone_on_with_there(policy):
    room = Room(policy)
    room.add("local", condition())
    room.add("paid", condition(), fallback=True)
    lost(room)
    assert room.ask(1, kin="m", admitted=True) == []
    room.tell(Gone(WorkerId("local")))
    assert room.waiting == 0


# What must stay here


@every_policy
def test_what_must_not_leave_the_room_waits_for_it(policy):
    room = room_with(policy)
    lost(room)
    assert room.ask(1, local_only=True, patience=4) == []
    (refuse,) = room.ticks(5)
    assert isinstance(refuse, Refuse)
    assert (refuse.refusal, refuse.detail) == (Refusal.WAITED_TOO_LONG, "local: no report")


@every_policy
def test_it_is_refused_like_any_other_where_the_line_is_full(policy):
    room = room_with(policy, admission=AdmissionPolicy(max_waiting=0))
    room.ask(1)
    assert refused(room.ask(2, local_only=True)) == [Refusal.QUEUE_FULL]


@every_policy
@pytest.mark.parametrize("batch", [False, True])
def test_where_only_a_fallback_has_the_model_that_is_said(policy, batch):
    room = Room(policy)
    room.add("paid", PAID, fallback=True)
    assert refused(room.ask(1, local_only=True, batch=batch)) == [Refusal.LOCAL_ONLY]
    assert granted(room.ask(2, batch=batch)) == [(2, "paid")]


@every_policy
@pytest.mark.parametrize("batch", [False, True])
def test_who_waits_is_told_so_when_the_room_loses_the_model(policy, batch):
    room = room_with(policy)
    room.ask(1)
    room.ask(2, local_only=True, batch=batch)
    assert refused(room.tell(Gone(WorkerId("local")))) == [Refusal.LOCAL_ONLY]


@every_policy
def test_who_waits_is_told_so_when_a_worker_turns_out_to_be_no_part_of_the_room(policy):
    room = Room(policy)
    room.add("a", condition(slots=1))
    room.ask(1)
    room.ask(2, local_only=True)
    assert refused(room.tell(Seen(worker("a", fallback=True)))) == [Refusal.LOCAL_ONLY]


# The batch class


@every_policy
def test_a_batch_never_goes_there_while_a_worker_of_the_room_has_the_model(policy):
    room = room_with(policy, admission=AdmissionPolicy(max_waiting_batch=1))
    lost(room)
    assert room.ask(1, batch=True, patience=5) == []
    assert refused(room.ask(2, batch=True)) == [Refusal.QUEUE_FULL]
    assert refused(room.ticks(6)) == [Refusal.WAITED_TOO_LONG]


@every_policy
def test_a_batch_goes_there_where_the_room_has_not_the_model_at_all(policy):
    room = Room(policy)
    room.add("local", Condition(models=(ModelOffer(name=ModelName("n")),), slots=1))
    room.add("paid", PAID, fallback=True)
    (grant,) = grants(room.ask(1, batch=True, blocks=paper(1, 40)))
    assert (grant.worker.id, grant.warm_chars) == ("paid", None)


# Nothing that nobody asked for


def test_a_fallback_is_not_measured():
    room = Room()
    assert probes(room.add("paid", replace(PAID, calibrates=True), fallback=True)) == []
    assert probes(room.ticks(5)) == []


def test_a_tripped_fallback_is_tried_with_what_somebody_wants_of_it():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("paid", PAID, fallback=True)
    room.ask(1)
    room.end(1, Verdict.BAD)
    assert room.ask(2) == []
    assert probes(room.ticks(9)) == []
    commands = room.ticks(2)
    assert (granted(commands), probes(commands)) == ([(2, "paid")], [])
    assert room.view("paid").breaker is Phase.HALF_OPEN
    assert room.ask(3) == [], "one at a time, until it has shown that it is well"
    assert granted(room.end(2)) == [(3, "paid")]
    assert room.view("paid").breaker is Phase.CLOSED


def test_a_tripped_fallback_whose_trial_was_given_up_is_tried_with_the_next():
    room = Room(breaker=BreakerPolicy(trip_after=1, rest_seconds=10))
    room.add("paid", PAID, fallback=True)
    room.ask(1)
    room.end(1, Verdict.BAD)
    room.ask(2)
    room.ticks(11)
    room.ask(3)
    assert granted(room.end(2, Verdict.UNKNOWN)) == [(3, "paid")]


def test_a_late_chat_gets_no_second_worker_there():
    room = Room(hedge=HedgePolicy(share=1.0))
    room.add("a", condition())
    room.add("paid", PAID, fallback=True)
    for number in range(1, 6):
        room.ask(number, tokens=10)
    assert [one.worker.id for one in grants(room.ticks(4))] == []


def test_a_late_chat_that_is_there_gets_a_worker_of_the_room_that_is_back():
    room = room_with(hedge=HedgePolicy(share=1.0))
    lost(room)
    assert granted(room.ask(1, tokens=10)) == [(1, "paid")]
    room.report("local", condition(slots=1))
    assert [one.worker.id for one in grants(room.ticks(4))] == ["local"]


def test_the_straggler_of_a_batch_is_not_copied_there():
    room = Room()
    for name in ("paid", "dear"):
        room.add(name, PAID, fallback=True)
    room.ask(1, batch=True, blocks=paper(1, 4), replayable=True)
    room.begin(1)
    assert grants(room.ticks(60)) == []


def test_a_long_prompt_is_not_read_there_in_slices():
    room = Room(batch=BatchPolicy(slice_seconds=0.1))
    room.add("paid", PAID, fallback=True)
    room.ask(1)
    room.begin(1)
    (grant,) = grants(room.ask(2, batch=True, blocks=paper(1, 60)) + room.ticks(2))
    assert grant.warm_chars is None


def test_a_conversation_that_was_answered_there_is_at_home_in_the_room():
    room = room_with()
    lost(room)
    room.ask(1, conversation=1)
    room.begin(1)
    room.end(1, prompt=50, output=10)
    room.report("local", condition(slots=1))
    (grant,) = grants(room.ask(2, continues=1, conversation=2))
    (candidate,) = grant.choice.candidates
    room.end(2, Verdict.UNKNOWN)
    (other,) = grants(room.ask(3))
    assert candidate.expected_seconds == pytest.approx(other.choice.candidates[0].expected_seconds, rel=0.2)


# What is known of it


def test_its_models_are_listed():
    room = Room()
    room.add("paid", PAID, fallback=True)
    assert list(room.dispatcher.snapshot(room.now).models) == ["m"]
    assert room.dispatcher.serves(M)


@every_policy
def test_a_model_that_nobody_has_is_not_found_all_the_same(policy):
    room = room_with(policy)
    assert refused(room.ask(1, model="x")) == [Refusal.MODEL_NOT_FOUND]
    assert refused(room.ask(2, model="x", local_only=True)) == [Refusal.MODEL_NOT_FOUND]


def test_when_to_come_again_is_said_of_the_room():
    """A fast service outside says nothing of how long the line here is."""
    room = room_with(admission=AdmissionPolicy(max_waiting=0))
    room.ask(1)
    room.end(1, seconds=10.0)
    room.ask(2)
    (refuse,) = room.ask(3, local_only=True)
    assert refuse.retry_after == 10.0


def test_a_loading_answer_of_a_worker_counts_for_that_model_alone():
    offers = ModelOffer(name=M, loaded=False, load_seconds=90), ModelOffer(name=ModelName("n"))
    room = Room()
    room.add("a", Condition(models=offers, slots=4, tells_loads=True))
    room.add("b", llama_cpp(ready=False, state="starting"))
    room.ask(1, patience=60)
    told = Loading(WorkerId("a"), None, 90.0)
    room.tell(Ended(Ticket(1), Verdict.UNKNOWN, loading=told))
    assert granted(room.ask(2, model="n")) == [(2, "a")]
