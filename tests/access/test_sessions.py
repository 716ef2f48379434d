"""Sessions of the page."""

from __future__ import annotations

from balancer.sessions import SessionPolicy, Sessions


def test_a_session_lasts_while_it_is_used_and_a_week_at_most():
    sessions = Sessions(SessionPolicy(idle_seconds=10, longest_seconds=35))
    sessions.begin("cookie", 0)
    for now in (9, 18, 27, 34):
        assert sessions.find("cookie", now) is not None
    assert sessions.find("cookie", 35) is None
    assert len(sessions) == 0


def test_a_session_that_is_not_used_ends():
    sessions = Sessions(SessionPolicy(idle_seconds=10))
    sessions.begin("cookie", 0)
    assert sessions.find("cookie", 10) is None


def test_there_are_only_so_many_and_the_one_used_longest_ago_goes_first():
    sessions = Sessions(SessionPolicy(max_sessions=3))
    for number in range(3):
        sessions.begin(f"cookie {number}", 0)
    assert sessions.find("cookie 0", 1)
    sessions.begin("one more", 2)
    assert len(sessions) == 3
    assert [sessions.find(f"cookie {number}", 3) is not None for number in range(3)] == [True, False, True]


def test_who_ends_one_has_ended_it():
    sessions = Sessions()
    sessions.begin("cookie", 0)
    sessions.end("cookie")
    sessions.end("another")
    assert sessions.find("cookie", 1) is None
