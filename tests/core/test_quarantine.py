from hypothesis import given
from hypothesis import strategies as st

from balancer.core.errors import Quarantined, StreamBroken
from balancer.core.quarantine import Quarantine, QuarantinePolicy


def test_what_killed_engines_is_left_alone_for_ten_minutes():
    quarantine = Quarantine()
    assert quarantine.seconds_left(7, 100.0) == 0.0
    quarantine.block(7, 100.0)
    assert quarantine.seconds_left(7, 100.0) == 600.0
    assert quarantine.seconds_left(7, 650.0) == 50.0
    assert quarantine.seconds_left(7, 700.0) == 0.0


def test_another_request_is_not_concerned():
    quarantine = Quarantine()
    quarantine.block(7, 0.0)
    assert quarantine.seconds_left(8, 1.0) == 0.0


def test_blocked_again_its_time_begins_anew():
    quarantine = Quarantine(QuarantinePolicy(seconds=60, most=2))
    quarantine.block(1, 0.0)
    quarantine.block(2, 10.0)
    quarantine.block(1, 20.0)
    quarantine.block(3, 30.0)
    assert quarantine.seconds_left(1, 30.0) == 50.0
    assert quarantine.seconds_left(2, 30.0) == 0.0, "the oldest was let go"


def test_of_too_many_the_oldest_is_let_go():
    quarantine = Quarantine()
    for fingerprint in range(1025):
        quarantine.block(fingerprint, 0.0)
    assert len(quarantine) == 1024
    assert quarantine.seconds_left(0, 1.0) == 0.0
    assert quarantine.seconds_left(1, 1.0) == 599.0


def test_what_is_over_is_forgotten():
    quarantine = Quarantine()
    quarantine.block(1, 0.0)
    quarantine.block(2, 600.0)
    assert len(quarantine) == 1


def test_a_quarantined_request_is_told_why_for_how_long_and_what_to_do():
    error = Quarantined(2, 599.2)
    assert (error.status, error.code, error.retry_after) == (502, "request_quarantined", None)
    assert error.message.startswith("2 engines ended while they worked on this request")
    for told in ("600 s", "shorter", "log of the worker"):
        assert told in error.message


def test_a_stream_that_broke_is_told_why_it_did_not_go_on():
    error = StreamBroken("no other worker has the model")
    assert (error.status, error.code, error.retry_after) == (502, "stream_broken", None)
    assert "could not be continued: no other worker has the model." in error.message


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 50)), max_size=60),
    st.integers(1, 4),
)
def test_who_was_blocked_last_is_blocked(history, most):
    """The last `most` different ones, for as long as each has left."""
    quarantine, now = Quarantine(QuarantinePolicy(seconds=100, most=most)), 0.0
    blocked: dict[int, float] = {}
    for fingerprint, pause in history:
        now += pause
        quarantine.block(fingerprint, now)
        blocked.pop(fingerprint, None)
        blocked[fingerprint] = now + 100
        kept = list(blocked)[-most:]
        for one in range(6):
            expected = max(blocked[one] - now, 0.0) if one in kept else 0.0
            assert quarantine.seconds_left(one, now) == expected
    assert len(quarantine) <= most
