"""The dispatcher as a whole, under every policy: who is served, who waits, who is refused."""

import random
from functools import partial

import pytest

from balancer.core.admission import AdmissionPolicy
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.dispatcher import Dispatcher, DispatchPolicy
from balancer.core.model import (
    Abandon,
    Arrived,
    Ask,
    Condition,
    Ended,
    Endpoint,
    Grant,
    Lost,
    Measures,
    ModelName,
    ModelOffer,
    Needs,
    Refusal,
    Refuse,
    Reported,
    Seen,
    Tick,
    Ticket,
    Verdict,
    Worker,
    WorkerId,
)
from balancer.core.placement import POLICIES, PlacementPolicy

CHAT = Endpoint.CHAT


def worker(name: str, cap: int | None = 2, only: str = "", port: int = 1) -> Worker:
    models = frozenset({ModelName(only)}) if only else frozenset()
    return Worker(id=WorkerId(name), type="openai", url=f"http://{name}:{port}", cap=cap, only=models)


def condition(*models: str, slots: int | None = None, ready: bool = True) -> Condition:
    offers = tuple(ModelOffer(name=ModelName(model)) for model in models)
    return Condition(models=offers, slots=slots, ready=ready, state="ready" if ready else "loading")


def ask(
    model: str = "m", *, now: float = 0.0, avoid: frozenset[str] = frozenset(), endpoint: Endpoint = CHAT
) -> Ask:
    needs = Needs(
        model=ModelName(model), endpoint=endpoint, avoid=frozenset(WorkerId(name) for name in avoid)
    )
    return Ask(needs=needs, arrived=now, deadline=now + 30)


class Room:
    """A dispatcher in a test: each call is an event, its answer the commands that follow."""

    def __init__(self, policy: str, **more):
        self.dispatcher = Dispatcher(
            DispatchPolicy(placement=PlacementPolicy(policy), settle_seconds=0, **more),
            random.Random(1),
            started=0.0,
        )
        self.now = 0.0

    def tell(self, event):
        return self.dispatcher.handle(event, self.now)

    def with_worker(self, name: str, *models: str, cap: int | None = 2):
        self.tell(Seen(worker(name, cap)))
        self.tell(Reported(WorkerId(name), condition(*models)))
        return self

    def arrive(self, number: int, model: str = "m", **more):
        return self.tell(Arrived(Ticket(number), ask(model, now=self.now, **more)))

    def end(self, number: int, verdict: Verdict = Verdict.GOOD, seconds: float = 1.0, **more):
        return self.tell(Ended(Ticket(number), verdict, Measures(seconds=seconds), **more))

    def view(self, name: str):
        return next(v for v in self.dispatcher.snapshot(self.now).workers if v.worker.id == name)


@pytest.fixture(params=POLICIES)
def open_room(request):
    """These scenes hold whatever the policy."""
    return partial(Room, request.param)


def granted(commands) -> list[tuple[int, str]]:
    return [(c.ticket, c.worker.id) for c in commands if isinstance(c, Grant)]


def refused(commands) -> list[Refusal]:
    return [c.refusal for c in commands if isinstance(c, Refuse)]


def test_an_ask_is_granted_at_once_where_there_is_room(open_room):
    room = open_room().with_worker("mini", "m")
    assert granted(room.arrive(1)) == [(1, "mini")]


def test_an_ask_waits_in_the_balancer_until_a_worker_has_room(open_room):
    room = open_room().with_worker("mini", "m", cap=1)
    room.arrive(1)
    assert room.arrive(2) == []
    assert granted(room.end(1)) == [(2, "mini")]


def test_work_is_bound_late_to_whoever_is_free_first(open_room):
    room = open_room().with_worker("slow", "m", cap=1).with_worker("fast", "m", cap=1)
    first = dict(granted(room.arrive(1) + room.arrive(2)))
    assert set(first.values()) == {"slow", "fast"}
    room.arrive(3)
    free = next(number for number, name in first.items() if name == "fast")
    assert granted(room.end(free)) == [(3, "fast")]


def test_nobody_is_asked_for_a_model_that_it_does_not_serve(open_room):
    room = open_room().with_worker("a", "m", cap=9).with_worker("b", "other", cap=9)
    grants = [room.arrive(n) for n in range(9)]
    assert {name for commands in grants for _, name in granted(commands)} == {"a"}


def test_an_unknown_model_is_refused_with_what_exists(open_room):
    room = open_room().with_worker("a", "m", "n")
    (refuse,) = room.arrive(1, "nothing")
    assert refuse.refusal is Refusal.MODEL_NOT_FOUND
    assert refuse.models == ("m", "n")


def test_a_model_is_waited_for_while_the_room_is_still_being_heard(open_room):
    room = open_room()
    room.tell(Seen(worker("a")))
    assert room.arrive(1) == []
    assert granted(room.tell(Reported(WorkerId("a"), condition("m")))) == [(1, "a")]


def test_a_worker_that_was_never_reached_does_not_keep_askers_of_unknown_models_waiting(open_room):
    """But it may have the model: so they are told to come again, not that there is no such model."""
    room = open_room().with_worker("a", "m")
    room.tell(Seen(worker("dead")))
    assert room.arrive(1, "nothing") == []
    (refuse,) = room.tell(Lost(WorkerId("dead"), "connection refused"))
    assert (refuse.refusal, refuse.detail) == (Refusal.MODEL_AWAY, "dead: connection refused")


def test_a_worker_that_moves_is_waited_for_with_what_it_served(open_room):
    room = open_room().with_worker("a", "m")
    room.tell(Lost(WorkerId("a"), "connection refused"))
    assert room.arrive(1) == []
    assert room.tell(Seen(worker("a", port=2))) == []
    assert room.tell(Lost(WorkerId("a"), "connection refused")) == []
    assert granted(room.tell(Reported(WorkerId("a"), condition("m")))) == [(1, "a")]


def test_a_retry_does_not_wait_for_a_rival_that_is_dead(open_room):
    room = open_room().with_worker("a", "m").with_worker("dead", "m")
    room.tell(Lost(WorkerId("dead"), "connection refused"))
    assert granted(room.arrive(1, avoid=frozenset({"a"}))) == [(1, "a")]


def test_a_retry_does_not_prefer_a_broken_rival_to_one_failure(open_room):
    room = open_room(breaker=BreakerPolicy(trip_after=1)).with_worker("broken", "m")
    room.arrive(1)
    room.end(1, Verdict.BAD)
    room.with_worker("a", "m")
    assert granted(room.arrive(2, avoid=frozenset({"a"}))) == [(2, "a")]


def test_a_retry_is_not_turned_away_by_a_line_that_filled_meanwhile(open_room):
    room = open_room(admission=AdmissionPolicy(max_waiting=1)).with_worker("a", "m", cap=1)
    room.arrive(1)
    room.arrive(2)
    again = Ask(needs=ask().needs, arrived=0, deadline=30, admitted=True)
    assert room.tell(Arrived(Ticket(3), again)) == []


def test_room_goes_to_the_oldest_first_whatever_the_model(open_room):
    room = open_room().with_worker("a", "m", "n", cap=2)
    room.arrive(1)
    room.arrive(2)
    for number, model in ((3, "m"), (4, "n"), (5, "m")):
        room.now += 1
        room.arrive(number, model)
    room.tell(Seen(worker("a", cap=3)))
    assert [ticket for ticket, _ in granted(room.end(1))] == [4]


def test_an_empty_room_says_so(open_room):
    assert refused(open_room().arrive(1)) == [Refusal.ROOM_EMPTY]


def test_an_endpoint_that_no_worker_of_the_model_has_is_refused(open_room):
    room = open_room()
    room.tell(Seen(worker("a")))
    offer = ModelOffer(name=ModelName("m"), endpoints=frozenset({CHAT}))
    room.tell(Reported(WorkerId("a"), Condition(models=(offer,))))
    assert refused(room.arrive(1, endpoint=Endpoint.EMBEDDINGS)) == [Refusal.ENDPOINT_NOT_SERVED]


def test_a_configured_model_is_known_while_its_worker_is_down(open_room):
    room = open_room()
    room.tell(Seen(worker("a", only="m")))
    room.tell(Lost(WorkerId("a"), "connection refused"))
    assert room.arrive(1) == []
    assert granted(room.tell(Reported(WorkerId("a"), condition()))) == [(1, "a")]


def test_a_configured_model_hides_what_else_a_worker_reports(open_room):
    room = open_room()
    room.tell(Seen(worker("a", only="m")))
    room.tell(Reported(WorkerId("a"), condition("m", "other")))
    assert list(room.dispatcher.snapshot(0).models) == ["m"]


def test_a_full_line_refuses_at_once_with_an_honest_pause(open_room):
    room = open_room(admission=AdmissionPolicy(max_waiting=2)).with_worker("a", "m", cap=1)
    room.arrive(1)
    room.end(1, seconds=4.0)
    room.arrive(2)
    assert room.arrive(3) == room.arrive(4) == []
    (refuse,) = room.arrive(5)
    assert refuse.refusal is Refusal.QUEUE_FULL
    assert refuse.retry_after == 3 * 4.0  # two before it and itself, 4 s each, one at a time


def test_who_waited_too_long_is_told_why(open_room):
    room = open_room().with_worker("a", "m", cap=1)
    room.arrive(1)
    room.arrive(2)
    room.now = 30
    (refuse,) = room.tell(Tick())
    assert (refuse.ticket, refuse.refusal, refuse.detail) == (2, Refusal.WAITED_TOO_LONG, "a: busy")


def test_a_client_that_leaves_the_line_is_forgotten(open_room):
    room = open_room().with_worker("a", "m", cap=1)
    room.arrive(1)
    room.arrive(2)
    room.end(2, Verdict.UNKNOWN)
    assert granted(room.end(1)) == []
    assert room.dispatcher.snapshot(0).waiting == 0


def test_a_failed_request_goes_elsewhere_and_waits_for_elsewhere(open_room):
    room = open_room().with_worker("bad", "m").with_worker("good", "m", cap=1)
    room.arrive(1, avoid=frozenset({"bad"}))
    assert room.arrive(2, avoid=frozenset({"bad"})) == []
    assert granted(room.end(1)) == [(2, "good")]


def test_where_there_is_nobody_else_a_failed_request_goes_back_to_the_same_worker(open_room):
    room = open_room().with_worker("only", "m")
    assert granted(room.arrive(1, avoid=frozenset({"only"}))) == [(1, "only")]


def test_three_failures_in_a_row_take_a_worker_out_while_another_goes_on(open_room):
    room = open_room().with_worker("bad", "m", cap=9).with_worker("good", "m", cap=9)
    number = 0
    while room.view("bad").breaker is Phase.CLOSED:
        number += 1
        ((ticket, name),) = granted(room.arrive(number))
        room.end(ticket, Verdict.BAD if name == "bad" else Verdict.GOOD)
        assert number < 200
    for number in range(300, 330):
        ((ticket, name),) = granted(room.arrive(number))
        assert name == "good"
        room.end(ticket)


def test_the_last_worker_is_never_shut_out(open_room):
    room = open_room(breaker=BreakerPolicy(trip_after=1)).with_worker("only", "m")
    room.arrive(1)
    room.end(1, Verdict.BAD)
    assert room.view("only").breaker is Phase.OPEN
    assert granted(room.arrive(2)) == [(2, "only")]


def test_a_worker_that_cannot_be_connected_to_gets_nothing_until_it_is_heard_of(open_room):
    room = open_room().with_worker("a", "m")
    room.arrive(1)
    room.end(1, Verdict.BAD, unreachable=True)
    assert room.arrive(2) == []
    assert granted(room.tell(Reported(WorkerId("a"), condition("m")))) == [(2, "a")]


def test_a_worker_that_asks_to_be_left_alone_is(open_room):
    room = open_room().with_worker("a", "m")
    room.arrive(1)
    room.end(1, Verdict.UNKNOWN, hold_seconds=5)
    assert room.arrive(2) == []
    room.now = 5
    assert granted(room.tell(Tick())) == [(2, "a")]


def test_a_silent_agent_loses_what_runs_on_it_and_a_failed_poll_does_not(open_room):
    room = open_room().with_worker("a", "m").with_worker("b", "m")
    running = {room.arrive(n)[0].worker.id: n for n in (1, 2)} | {}
    while set(running) != {"a", "b"}:
        number = max(running.values()) + 1
        running[room.arrive(number)[0].worker.id] = number
    assert room.tell(Lost(WorkerId("a"), "poll failed")) == []
    abandoned = room.tell(Lost(WorkerId("b"), "no report", abandon=True))
    assert running["b"] in {c.ticket for c in abandoned if isinstance(c, Abandon)}


def test_a_loading_worker_gets_nothing(open_room):
    room = open_room()
    room.tell(Seen(worker("a", only="m")))
    room.tell(Reported(WorkerId("a"), condition("m", ready=False)))
    assert room.arrive(1) == []


def test_a_worker_that_loads_again_is_waited_for(open_room):
    room = open_room().with_worker("a", "m")
    room.tell(Reported(WorkerId("a"), condition(ready=False)))
    assert room.arrive(1) == []
    assert granted(room.tell(Reported(WorkerId("a"), condition("m")))) == [(1, "a")]


def test_a_slower_worker_with_equal_room_is_picked_less_by_the_users_formula():
    room = Room("weighted_random").with_worker("fast", "m", cap=99).with_worker("slow", "m", cap=99)
    counts = {"fast": 0, "slow": 0}
    for number in range(2000):
        ((ticket, name),) = granted(room.arrive(number))
        counts[name] += 1
        room.end(ticket, seconds=1.0 if name == "fast" else 10.0)
    expected = (0.4 + 0.4 + 0.2 * 0.1) / (1.0 + 0.82)  # of the formula's two weights, the slow one's share
    assert abs(counts["slow"] / 2000 - expected) < 0.04


@pytest.mark.parametrize("policy", ["weighted_random", "least_loaded", "round_robin"])
def test_another_policy_is_adopted_with_all_who_wait_and_run(policy):
    room = Room("least_loaded", admission=AdmissionPolicy(max_waiting=2)).with_worker("a", "m", cap=1)
    room.arrive(1)
    assert room.arrive(2) == room.arrive(3) == []
    room.dispatcher.adopt(
        DispatchPolicy(placement=PlacementPolicy(policy), admission=AdmissionPolicy(max_waiting=1))
    )
    assert refused(room.arrive(4)) == [Refusal.QUEUE_FULL]
    assert granted(room.end(1)) == [(2, "a")]
    assert granted(room.end(2)) == [(3, "a")]
    room.dispatcher.adopt(
        DispatchPolicy(placement=PlacementPolicy(policy), admission=AdmissionPolicy(max_waiting=2))
    )
    assert room.arrive(5) == room.arrive(6) == []
    assert room.view("a").running == 1


def test_what_is_learned_stays_when_a_policy_is_adopted():
    room = Room("expected_latency").with_worker("a", "m", cap=1)
    room.arrive(1)
    room.end(1, verdict=Verdict.BAD)
    before = room.view("a").success_rate
    weights = {"reliability": 1.0, "expected_latency": 2.0}
    room.dispatcher.adopt(DispatchPolicy(placement=PlacementPolicy("expected_latency", weights)))
    assert room.view("a").success_rate == before < 1
    assert granted(room.arrive(2)) == [(2, "a")]


def test_a_policy_that_estimates_and_one_that_does_not_cannot_take_over_from_each_other():
    room = Room("least_loaded").with_worker("a", "m")
    with pytest.raises(ValueError):
        room.dispatcher.adopt(DispatchPolicy(placement=PlacementPolicy("expected_latency")))
    assert granted(room.arrive(1)) == [(1, "a")]
