from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.liveness import Liveness, LivenessPolicy

POLICY = LivenessPolicy()


class Engine:
    """A life told second by second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.liveness = Liveness(POLICY, self.now)

    def quiet(self, seconds: float) -> float | None:
        """Nothing comes for so long. When that was said to be too long, if it was."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            if (silence := self.liveness.tick(self.now, 0.5)) is not None:
                return silence
        return None

    def pieces(self, key: int, count: int = 20, gap: float = 0.5) -> None:
        for _ in range(count):
            assert self.quiet(gap) is None
            self.liveness.heard(key, self.now, piece=True)


def test_one_with_nothing_to_do_may_be_silent_for_ever() -> None:
    assert Engine().quiet(10_000) is None


def test_one_whose_tokens_stop_is_stuck_after_many_usual_pauses() -> None:
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    engine.pieces(1, gap=0.5)
    silence = engine.quiet(60)
    assert silence is not None
    assert POLICY.gaps * 0.5 <= silence <= POLICY.gaps * 0.5 + 1


@pytest.mark.parametrize(
    ("gap", "limit"), [(0.001, POLICY.gap_floor_seconds), (9.0, POLICY.gap_ceiling_seconds)]
)
def test_the_patience_between_pieces_has_a_floor_and_a_ceiling(gap: float, limit: float) -> None:
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    for _ in range(50):
        engine.now += gap
        engine.liveness.heard(1, engine.now, piece=True)
    assert engine.liveness.limit_seconds == limit


def test_as_long_as_anybody_gets_anything_it_is_busy() -> None:
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    engine.liveness.began(2, 100, engine.now)
    engine.pieces(1, count=2000)


def test_a_first_prompt_may_take_minutes_where_no_pace_is_known() -> None:
    engine = Engine()
    engine.liveness.began(1, 20_000, engine.now)
    assert engine.quiet(900) is None
    assert engine.quiet(200) is not None


def test_a_short_prompt_is_waited_for_a_minute_at_least() -> None:
    engine = Engine()
    engine.liveness.began(1, 10, engine.now)
    assert engine.quiet(POLICY.reading_floor_seconds - 1) is None
    assert engine.quiet(3) is not None


def test_the_slowest_reading_counts_not_what_was_remembered() -> None:
    engine = Engine()
    engine.liveness.began(1, 10_000, engine.now)
    engine.quiet(100)  # 10 ms a byte
    engine.liveness.heard(1, engine.now, piece=True)
    engine.liveness.ended(1)
    for key in range(2, 12):  # the same prompt again
        engine.liveness.began(key, 10_000, engine.now)
        engine.liveness.heard(key, engine.now + 0.01, piece=True)
        engine.liveness.ended(key)
    engine.liveness.began(20, 10_000, engine.now)
    assert engine.liveness.limit_seconds == pytest.approx(POLICY.readings * 100, rel=0.02)


def test_the_prompt_of_one_is_patience_for_all() -> None:
    """Between two tokens of an answer an engine may read a batch of another's prompt."""
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    engine.pieces(1, gap=0.5)
    engine.liveness.began(2, 10_000, engine.now)
    assert engine.quiet(400) is None


def test_a_request_that_comes_is_no_sign_of_life() -> None:
    engine = Engine()
    engine.liveness.began(1, 10, engine.now)
    engine.quiet(50)
    engine.liveness.began(2, 10, engine.now)
    assert engine.quiet(15) is not None


def test_a_comment_is_a_sign_of_life_and_no_piece() -> None:
    engine = Engine()
    engine.liveness.began(1, 10, engine.now)
    for _ in range(20):
        assert engine.quiet(50) is None
        engine.liveness.heard(1, engine.now, piece=False)
    assert engine.liveness.limit_seconds == POLICY.reading_floor_seconds


def test_a_client_that_does_not_read_says_nothing_about_the_engine() -> None:
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    engine.pieces(1)
    engine.liveness.held(1)
    assert engine.quiet(1000) is None
    before = engine.liveness.limit_seconds
    engine.liveness.resumed(1, engine.now)
    engine.liveness.heard(1, engine.now + 0.5, piece=True)
    assert engine.liveness.limit_seconds == pytest.approx(before)  # not learned as a pause of the engine's
    assert engine.quiet(before + 2) is not None


def test_our_own_sleep_is_not_the_engines_silence() -> None:
    engine = Engine()
    engine.liveness.began(1, 100, engine.now)
    engine.pieces(1)
    engine.now += 3600
    assert engine.liveness.tick(engine.now, 0.5) is None
    assert engine.quiet(20) is None
    assert engine.quiet(60) is not None


@given(st.lists(st.tuples(st.sampled_from("behrt"), st.integers(0, 3), st.floats(0.01, 20)), max_size=60))
def test_whatever_happens_silence_is_borne_for_seconds_at_least_and_half_an_hour_at_most(
    story: list[tuple[str, int, float]],
) -> None:
    liveness, now, heard = Liveness(POLICY, 0.0), 0.0, 0.0
    for what, key, seconds in story:
        now += seconds
        match what:
            case "b":
                liveness.began(key, 1000 * key, now)
            case "e":
                liveness.ended(key)
            case "h":
                liveness.heard(key, now, piece=True)
                heard = now
            case "r":
                liveness.held(key)
                liveness.resumed(key, now)
            case "t":
                silence = liveness.tick(now, 10.0)
                assert silence is None or POLICY.gap_floor_seconds < silence <= now - heard
        assert POLICY.gap_floor_seconds <= liveness.limit_seconds <= POLICY.reading_ceiling_seconds
