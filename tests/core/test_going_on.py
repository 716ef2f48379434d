"""An answer that a worker began and another one is to go on with."""

from dataclasses import replace

import pytest

from balancer.core.model import (
    Endpoint,
    Gone,
    Lost,
    ModelName,
    ModelOffer,
    Refusal,
    Tick,
    Verdict,
    WorkerId,
)
from balancer.core.placement import POLICIES
from tests.core.rooms import M, Room, condition, granted, refused

every_policy = pytest.mark.parametrize("policy", POLICIES)


def serving(identity: str = "", continues: bool | None = None, known_as: str = "", **more):
    offer = ModelOffer(
        name=M,
        identity=identity,
        continues=continues,
        known_as=ModelName(known_as) if known_as else None,
    )
    return replace(condition(**more), models=(offer,))


@every_policy
def test_it_goes_on_only_where_the_model_is_of_its_kin(policy):
    room = Room(policy)
    room.add("q8", serving("llama q8", slots=40))
    room.add("q4", serving("llama q4", slots=40))
    to = {
        name for number in range(30) for _, name in granted(room.ask(number, kin="llama q4", admitted=True))
    }
    assert to == {"q4"}
    assert "q8" in {name for number in range(30, 60) for _, name in granted(room.ask(number))}


@every_policy
def test_where_nobody_tells_an_identity_what_the_worker_calls_the_model_is_its_kin(policy):
    room = Room(policy)
    room.add("a", serving(known_as="llama:8b"))
    room.add("b", serving(known_as="qwen:7b"))
    assert granted(room.ask(1, kin="qwen:7b", admitted=True)) == [(1, "b")]


@every_policy
def test_who_is_known_not_to_go_on_with_chats_is_not_asked_to(policy):
    room = Room(policy)
    room.add("cannot", serving("q4", continues=False))
    room.add("perhaps", serving("q4"))
    for number in range(20):
        assert granted(room.ask(number, kin="q4", admitted=True)) == [(number, "perhaps")]
        room.end(number)


@every_policy
def test_a_plain_completion_goes_on_anywhere(policy):
    room = Room(policy)
    room.add("cannot", serving("q4", continues=False))
    asked = room.ask(1, kin="q4", admitted=True, endpoint=Endpoint.COMPLETIONS)
    assert granted(asked) == [(1, "cannot")]
    assert refused(room.ask(2, kin="q4", admitted=True)) == [Refusal.MODEL_AWAY]


@every_policy
def test_asks_with_and_without_kin_do_not_see_each_others_choice_of_workers(policy):
    """What is found once for many is kept apart."""
    room = Room(policy)
    room.add("q8", serving("q8", slots=40))
    room.add("q4", serving("q4", slots=40))
    for number in range(0, 30, 3):
        assert {name for _, name in granted(room.ask(number, kin="q4", admitted=True))} == {"q4"}
        assert {name for _, name in granted(room.ask(number + 1, kin="q8", admitted=True))} == {"q8"}
        assert granted(room.ask(number + 2))


def test_in_a_large_room_too_it_goes_on_only_with_its_kin():
    """Of many workers only the best are looked at."""
    room = Room()
    for number in range(150):
        room.add(f"w{number}", serving("q8" if number % 2 else "q4"))
    kin = {f"w{number}" for number in range(0, 150, 2)}
    for number in range(30):
        assert granted(room.ask(2 * number))
        ((_, name),) = granted(room.ask(2 * number + 1, kin="q4", admitted=True))
        assert name in kin


@every_policy
def test_who_could_only_go_on_with_nobody_is_refused_at_once(policy):
    """Even while the room assembles: its client has a part of the answer and waits for the rest."""
    room = Room(policy, settle_seconds=60)
    room.add("other", serving("q8"))
    assert refused(room.ask(1, kin="q4", admitted=True)) == [Refusal.MODEL_AWAY]
    assert room.ask(2, model="n") == [], "while for others somebody may still come"


@every_policy
def test_it_waits_for_its_kin_that_is_busy_or_lost(policy):
    room = Room(policy)
    room.add("kin", serving("q4", slots=1))
    room.add("other", serving("q8", slots=9))
    room.ask(1, kin="q4", admitted=True)
    assert room.ask(2, kin="q4", admitted=True) == []
    assert room.tell(Lost(WorkerId("kin"), "no report", abandon=True))
    room.end(1, Verdict.BAD)
    assert granted(room.report("kin", serving("q4", slots=1))) == [(2, "kin")]


@every_policy
def test_it_waits_no_longer_than_its_deadline(policy):
    room = Room(policy)
    room.add("kin", serving("q4"))
    room.tell(Lost(WorkerId("kin"), "no report"))
    assert room.ask(1, kin="q4", admitted=True, patience=10) == []
    room.now += 11
    assert refused(room.tell(Tick())) == [Refusal.WAITED_TOO_LONG]


@every_policy
def test_when_the_last_of_its_kin_leaves_it_is_told(policy):
    room = Room(policy)
    room.add("kin", serving("q4"))
    room.add("other", serving("q8"))
    room.tell(Lost(WorkerId("kin"), "no report"))
    assert room.ask(1, kin="q4", admitted=True) == []
    assert refused(room.tell(Gone(WorkerId("kin")))) == [Refusal.MODEL_AWAY]


@every_policy
def test_when_the_last_of_its_kin_loads_another_model_it_is_told(policy):
    room = Room(policy)
    room.add("kin", serving("q4", slots=1))
    room.ask(1)
    assert room.ask(2, kin="q4", admitted=True) == []
    assert refused(room.report("kin", serving("q8", slots=1))) == [Refusal.MODEL_AWAY]


@every_policy
@pytest.mark.parametrize("batch", [False, True])
def test_it_goes_before_newcomers_whatever_its_class(policy, batch):
    """It keeps the place in line of the request's first arrival, and its client reads already."""
    room = Room(policy)
    room.add("only", serving("q4", slots=1))
    room.ask(1)
    room.now += 5
    for number in (2, 3):
        room.ask(number)
    room.now += 1
    assert room.ask(4, kin="q4", admitted=True, since=0.0, batch=batch) == []
    assert granted(room.end(1)) == [(4, "only")]
