from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import Breaker, BreakerPolicy, Phase
from balancer.core.model import Ticket, Verdict

POLICY = BreakerPolicy(trip_after=3, rest_seconds=10, longest_rest_seconds=60)


def tripped(now: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    for number in range(POLICY.trip_after):
        breaker = breaker.settled(Ticket(number), Verdict.BAD, now)
    return breaker


def test_three_failures_in_a_row_trip_it():
    assert tripped().phase is Phase.OPEN
    assert not tripped().admits(9.9)


def test_a_good_answer_between_failures_keeps_it_closed():
    breaker = Breaker(POLICY)
    for verdict in (Verdict.BAD, Verdict.BAD, Verdict.GOOD, Verdict.BAD, Verdict.BAD):
        breaker = breaker.settled(Ticket(1), verdict, 0)
    assert breaker.phase is Phase.CLOSED


def test_after_its_rest_it_admits_one_probe_and_no_more():
    assert tripped().admits(10)
    probing = tripped().sent(Ticket(7), 10)
    assert probing.phase is Phase.HALF_OPEN
    assert not probing.admits(11)


def test_a_good_probe_closes_it():
    breaker = tripped().sent(Ticket(7), 10).settled(Ticket(7), Verdict.GOOD, 12)
    assert breaker.phase is Phase.CLOSED
    assert breaker.admits(12)


def test_a_bad_probe_doubles_the_rest_up_to_a_limit():
    breaker, now = tripped(), 0.0
    rests = []
    for _ in range(5):
        rests.append(breaker.retry_at - now)
        now = breaker.retry_at
        breaker = breaker.sent(Ticket(7), now).settled(Ticket(7), Verdict.BAD, now)
    assert rests == [10, 20, 40, 60, 60]


def test_an_abandoned_probe_gives_its_place_to_the_next_request():
    breaker = tripped().sent(Ticket(7), 10).settled(Ticket(7), Verdict.UNKNOWN, 11)
    assert breaker.phase is Phase.HALF_OPEN
    assert breaker.admits(11)


def test_what_began_before_the_trip_says_nothing_about_the_probe():
    probing = tripped().sent(Ticket(7), 10)
    assert probing.settled(Ticket(3), Verdict.GOOD, 11) == probing
    assert probing.settled(Ticket(3), Verdict.BAD, 11) == probing


def test_a_worker_that_was_away_and_is_back_may_be_probed_at_once():
    assert tripped().returned(1).admits(1)


def test_but_not_once_more_in_short_order():
    """One that comes and goes is held down ever longer."""
    back = tripped().returned(1).sent(Ticket(7), 1).settled(Ticket(7), Verdict.GOOD, 1)
    for number in range(POLICY.trip_after):
        back = back.settled(Ticket(number), Verdict.BAD, 2)
    assert back.retry_at == 22
    assert not back.returned(3).admits(21)


def test_a_return_counts_again_after_a_long_good_time():
    breaker = tripped().returned(1).sent(Ticket(7), 1).settled(Ticket(7), Verdict.GOOD, 1)
    breaker = breaker.settled(Ticket(8), Verdict.GOOD, 61)
    for number in range(POLICY.trip_after):
        breaker = breaker.settled(Ticket(number), Verdict.BAD, 70)
    assert breaker.returned(71).admits(71)


def test_it_is_stuck_if_it_tripped_for_saying_nothing():
    assert Breaker(POLICY).tripped(0).stuck
    assert not tripped().stuck
    breaker = Breaker(POLICY)
    for number in range(POLICY.trip_after):
        breaker = breaker.settled(Ticket(number), Verdict.BAD, 0, silent=True)
    assert breaker.stuck


def test_only_a_good_probe_shows_that_it_is_not_stuck_any_more():
    probing = Breaker(POLICY).tripped(0).sent(Ticket(7), 10)
    assert probing.stuck
    assert probing.settled(Ticket(7), Verdict.BAD, 11).stuck
    assert probing.settled(Ticket(7), Verdict.UNKNOWN, 11).stuck
    assert probing.returned(11).stuck
    assert not probing.settled(Ticket(7), Verdict.GOOD, 11).stuck


def test_earlier_trips_are_forgotten_after_a_long_good_time():
    breaker = tripped().sent(Ticket(7), 10).settled(Ticket(7), Verdict.GOOD, 10)
    assert breaker.settled(Ticket(8), Verdict.GOOD, 11).trips == 1
    assert breaker.settled(Ticket(8), Verdict.GOOD, 70).trips == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "bad", "good", "unknown"]), st.integers(0, 3), st.floats(0, 30))
    )
)
def test_it_always_admits_somebody_again(history):
    """Whatever happened: once a rest is over and no probe is out, a request may pass."""
    breaker, now = Breaker(POLICY), 0.0
    for what, ticket, pause in history:
        now += pause
        if what == "sent":
            breaker = breaker.sent(Ticket(ticket), now)
        else:
            breaker = breaker.settled(Ticket(ticket), Verdict(what), now)
    if breaker.probe is not None:
        breaker = breaker.settled(breaker.probe, Verdict.UNKNOWN, now)
    assert breaker.admits(max(now, breaker.retry_at))
