"""Workers that fail, in a room that goes on: who is asked all the same, who is left out, who comes back."""

import pytest

from balancer.core.admission import AdmissionPolicy
from balancer.core.breaker import BreakerPolicy, Phase
from balancer.core.model import Lost, Reported, Verdict, WorkerId
from balancer.core.placement import POLICIES
from balancer.core.retry import Cause
from tests.core.played import GOOD, Played, answers_in
from tests.core.rooms import Room, abandoned, condition, granted, probes

ONE_FAILURE = BreakerPolicy(trip_after=1, rest_seconds=10)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def every(seconds: float, until: float, start: float = 0.0) -> list[float]:
    return [start + seconds * step for step in range(round((until - start) / seconds))]


def fails_at_once(now, chance):
    return 0.001, Cause.ERRED


# Fail open: the last ones that could do it are never taken away for their errors


@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_a_single_worker_that_fails_three_times_in_ten_stays_available(policy, seed):
    """RELIABILITY W20."""
    played = Played(policy, seed)
    played.add("only", condition(), lambda now, chance: (0.2, Cause.ERRED if chance.random() < 0.3 else GOOD))
    played.clients(every(0.5, until=300))
    played.until(400)
    assert played.answered + played.failed == 600
    assert played.answered >= 600 * (1 - 0.3**3)


@every_policy
def test_where_all_have_failed_all_are_asked(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    for name in ("a", "b"):
        room.add(name, condition())
    for number, other in ((1, "a"), (2, "b")):
        room.ask(number, avoid=[other])
        room.end(number, Verdict.BAD)
    assert {room.view(name).breaker for name in ("a", "b")} == {Phase.OPEN}
    assert granted(room.ask(3, avoid=["a"])) == [(3, "b")]
    assert granted(room.ask(4, avoid=["b"])) == [(4, "a")]


@every_policy
def test_a_well_one_that_is_busy_is_waited_for(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("bad", condition())
    room.ask(1)
    room.end(1, Verdict.BAD)
    room.add("well", condition(slots=1))
    assert granted(room.ask(2)) == [(2, "well")]
    assert room.ask(3) == []
    assert granted(room.end(2)) == [(3, "well")]


@every_policy
def test_who_said_nothing_is_not_asked_though_it_is_the_only_one(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("only", condition())
    room.ask(1)
    room.end(1, Verdict.BAD, silent=True)
    assert room.view("only").stuck
    assert granted(room.ask(2) + room.ticks(9)) == []
    (probe,) = probes(room.tick(2))
    assert granted(room.end(probe.ticket)) == [(2, "only")]
    assert not room.view("only").stuck


@every_policy
def test_a_probe_that_fails_with_an_error_does_not_make_it_less_stuck(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("only", condition())
    room.ask(1)
    room.end(1, Verdict.BAD, silent=True)
    room.ask(2)
    (probe,) = probes(room.tick(11))
    assert granted(room.end(probe.ticket, Verdict.BAD)) == []
    assert granted(room.ticks(19)) == []


@every_policy
def test_beside_one_that_says_nothing_the_one_that_fails_is_asked(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("stuck", condition())
    room.add("fails", condition())
    room.ask(1, avoid=["fails"])
    room.end(1, Verdict.BAD, silent=True)
    room.ask(2, avoid=["stuck"])
    room.end(2, Verdict.BAD)
    for number in range(3, 7):
        assert granted(room.ask(number)) == [(number, "fails")]
        room.end(number, Verdict.BAD)


@every_policy
def test_a_probe_that_nothing_comes_of_shows_that_it_is_stuck(policy):
    """Until then it was asked, for want of one that did not fail."""
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("only", condition(slots=2))
    room.ask(1)
    room.end(1, Verdict.BAD)
    (probe,) = probes(room.tick(11))
    assert room.ask(2) == [], "its one slot is taken by the probe"
    assert granted(room.end(probe.ticket, Verdict.BAD, silent=True)) == []


def test_an_engine_that_falls_silent_in_the_midst_of_answers_is_stuck():
    room = Room()
    room.add("only", condition())
    room.teach("only", prefill=1000, token=0.02)
    room.ask(1)
    room.begin(1, after=1.0)
    room.ticks(8)
    assert room.view("only").stuck
    assert "says nothing" in room.view("only").detail


def test_a_worker_that_is_asked_for_want_of_a_better_one_and_says_nothing_is_asked_no_more():
    room = Room(breaker=ONE_FAILURE)
    room.add("only", condition())
    room.ask(1)
    room.end(1, Verdict.BAD)
    assert granted(room.ask(2)) == [(2, "only")]
    room.begin(2, after=1.0)
    assert abandoned(room.ticks(7)) != []
    assert room.view("only").stuck
    room.end(2, Verdict.BAD)
    assert granted(room.ask(3)) == []


@every_policy
def test_an_engine_that_was_started_anew_is_tried_at_once(policy):
    """Its agent says that it loads, and then that it is ready: what was stuck was the one before."""
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("only", condition())
    room.ask(1)
    room.end(1, Verdict.BAD, silent=True)
    room.report("only", condition(ready=False, state="starting"))
    assert probes(room.tick(1)) == []
    room.report("only", condition())
    assert len(probes(room.tick(1))) == 1


# Failing fast is not being idle


@every_policy
@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_fails_in_a_millisecond_gets_hardly_anything(policy, seed):
    """RELIABILITY W18: it always looks idle, and others take 2 s."""
    played = Played(policy, seed)
    for name in ("a", "b"):
        played.add(name, condition(), answers_in(2.0))
    played.add("hole", condition(), fails_at_once)
    played.clients(every(0.3, until=40))
    played.until(60)
    assert len(played.attempts["hole"]) <= 5 + len(every(10, until=60))
    for start in played.attempts["hole"]:
        assert sum(start <= at < start + 10 for at in played.attempts["hole"]) <= 5
    assert played.failed == 0


@every_policy
def test_a_worker_that_begins_to_fail_at_once_under_load_gets_hardly_anything_more(policy):
    played = Played(policy)
    for name in ("a", "b"):
        played.add(name, condition(), answers_in(2.0))
    played.add(
        "hole", condition(), lambda now, chance: (2.0, GOOD) if now < 20 else fails_at_once(now, chance)
    )
    played.clients(every(0.25, until=60))
    played.until(80)
    assert len(played.attempts["hole"]) > 20, "it was well"
    later = [at for at in played.attempts["hole"] if at >= 20]
    assert len(later) <= 5 + 4, "the four that it still answered well come between its failures"
    assert max(later, default=0) < 25, "and then nothing more"
    assert played.failed == 0


# Coming and going


def most_in_a_minute(trips: list[float]) -> int:
    return max((sum(start <= at < start + 60 for at in trips) for start in trips), default=0)


@every_policy
def test_a_worker_whose_agent_comes_and_goes_costs_nobody_an_answer(policy):
    """RELIABILITY W22: up for 2 s, down for 2 s."""
    played = Played(policy)
    played.add("well", condition(slots=8), answers_in(1.0))
    played.add("flaps", condition(slots=8), answers_in(1.5))
    for start in every(4.0, until=150):
        played.lost("flaps", start + 2)
        played.back("flaps", start + 4, condition(slots=8))
    played.clients(every(0.1, until=150))
    played.until(180)
    assert 1 <= most_in_a_minute(played.trips["flaps"]) <= 6
    assert played.failed == 0


@every_policy
def test_a_worker_that_errs_for_two_seconds_out_of_four_is_held_down(policy):
    played = Played(policy)
    played.add("well", condition(slots=8), answers_in(1.0))
    flaps = lambda now, chance: (0.1, Cause.ERRED if now % 4 > 2 else GOOD)  # noqa: E731
    played.add("flaps", condition(slots=8), flaps)
    played.clients(every(0.1, until=150))
    played.until(180)
    assert 2 <= most_in_a_minute(played.trips["flaps"]) <= 6
    assert played.failed == 0


def test_the_first_return_ends_a_rest_and_the_next_ones_do_not():
    room = Room(breaker=ONE_FAILURE)
    room.add("well", condition(slots=1))
    room.add("flaps", condition())
    for number, is_tried in ((1, True), (2, False)):
        assert granted(room.ask(number, avoid=["well"])) == [(number, "flaps")]
        room.end(number, Verdict.BAD)
        room.tell(Lost(WorkerId("flaps"), "no report"))
        room.now += 1
        room.report("flaps", condition())
        tried = probes(room.tick(0.25))
        assert bool(tried) is is_tried
        for probe in tried:
            room.end(probe.ticket)


# Coming back


@every_policy
def test_a_worker_that_returns_to_a_long_line_ramps_up(policy):
    """RELIABILITY W21: 500 wait."""
    played = Played(policy)
    slots = []
    played.add("only", condition(slots=16), answers_in(0.5))
    played.lost("only", 1.0)
    played.clients([2.0] * 500)
    played.back("only", 5.0, condition(slots=16))
    for step in range(12):
        played.until(5.01 + 0.5 * step)
        slots.append(played.room.view("only").slots)
    assert slots[0] == 2, "an eighth"
    assert slots == sorted(slots)
    assert slots[-1] == 16
    assert len(set(slots)) >= 3, "step by step"
    played.until(60)
    assert (played.answered, played.failed) == (500, 0)
    assert played.trips["only"] == []


@every_policy
def test_it_ramps_up_too_when_it_took_what_ran_with_it(policy):
    played = Played(policy)
    played.add("only", condition(slots=16), answers_in(3.0))
    played.clients([1.0] * 40)
    played.lost("only", 2.0)
    played.back("only", 5.0, condition(slots=16))
    played.until(4.9)
    assert played.most_at_once["only"] == 16
    played.most_at_once.clear()
    played.until(5.1)
    assert played.most_at_once["only"] == 2
    played.until(200)
    assert (played.answered, played.failed) == (40, 0)
    assert len(played.trips["only"]) <= 1


@every_policy
def test_when_all_were_away_the_first_that_returns_takes_who_waits(policy):
    """RELIABILITY W19: in the event of its return, not at some later look."""
    room = Room(policy, admission=AdmissionPolicy(max_waiting=3))
    for name in ("a", "b"):
        room.add(name, condition(slots=8))
        room.tell(Lost(WorkerId(name), "no report", abandon=True))
    waits = [room.ask(number) for number in (1, 2, 3)]
    assert waits == [[], [], []]
    (refuse,) = room.ask(4)
    assert refuse.refusal.value == "queue_full"
    room.now += 5
    assert granted(room.tell(Reported(WorkerId("b"), condition(slots=16)))) == [(1, "b"), (2, "b")]


@every_policy
def test_who_returns_after_it_had_failed_too_takes_who_waits(policy):
    room = Room(policy, breaker=ONE_FAILURE)
    room.add("only", condition(slots=1))
    room.ask(1)
    room.ask(2)
    room.tell(Lost(WorkerId("only"), "no report", abandon=True))
    room.end(1, Verdict.BAD)
    assert room.view("only").breaker is Phase.OPEN
    assert granted(room.report("only", condition(slots=1))) == [(2, "only")]
