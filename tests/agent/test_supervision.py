from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.supervision import ALIVE, TABLE, Do, Event, Life, Reaction, State, SupervisionPolicy
from worker_agent.wire import EngineState

POLICY = SupervisionPolicy()
DOWN = frozenset(State) - ALIVE


class Story:
    """A life told event by event, on a clock of its own."""

    def __init__(self) -> None:
        self.life, self.now, self.last = Life(), 0.0, Reaction((), None)

    def then(self, *events: Event, seconds: float = 0.1) -> Story:
        for event in events:
            self.now += seconds
            self.life, reaction = self.life.after(event, self.now, POLICY)
            self.last = reaction or Reaction((), None)
        return self


def test_an_engine_that_is_wanted_is_spawned_and_announced_once_it_answers() -> None:
    story = Story().then(Event.WANTED)
    assert (story.life.state, story.last) == (
        State.STARTING,
        Reaction((Do.SPAWN,), POLICY.start_limit_seconds),
    )
    story.then(Event.ANSWERED)
    assert (story.life.state, story.last) == (State.READY, Reaction((Do.ANNOUNCE,), None))


def test_one_that_is_too_slow_is_terminated_then_killed_then_rests() -> None:
    story = Story().then(Event.WANTED, Event.WOKE)
    assert (story.life.state, story.last.do) == (State.ENDING, (Do.TERMINATE,))
    assert story.then(Event.WOKE).last == Reaction((Do.KILL,), POLICY.stop_grace_seconds)
    assert story.then(Event.EXITED).life.state is State.RESTING
    assert story.then(Event.WOKE).last.do == (Do.SPAWN,)


def test_rests_double_and_the_fifth_crash_in_ten_minutes_is_the_last() -> None:
    story, rests = Story().then(Event.WANTED), []
    while story.then(Event.EXITED).life.state is State.RESTING:
        rests.append(story.last.alarm_seconds)
        story.then(Event.WOKE)
    assert rests == [1, 2, 4, 8]
    assert (story.life.state, story.last.alarm_seconds) == (State.FAILED, None)


def test_rests_end_at_a_minute_for_one_that_crashes_seldom() -> None:
    story, rests = Story().then(Event.WANTED), []
    for _ in range(9):
        rests.append(story.then(Event.EXITED, seconds=200).last.alarm_seconds)
        story.then(Event.WOKE)
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_long_good_time_is_a_new_beginning() -> None:
    story = Story().then(Event.WANTED, *[Event.EXITED, Event.WOKE] * 4, Event.ANSWERED)
    assert story.then(Event.EXITED, seconds=POLICY.stable_seconds).last.alarm_seconds == 1


def test_somebody_who_looks_at_a_failed_engine_gives_it_another_five_tries() -> None:
    story = Story().then(Event.WANTED, *[Event.EXITED, Event.WOKE] * 4, Event.EXITED)
    assert story.life.state is State.FAILED
    assert story.then(Event.WANTED).last.do == (Do.SPAWN,)
    assert story.then(Event.EXITED).life.state is State.RESTING


def test_a_stop_is_no_fault_of_the_engine() -> None:
    story = Story().then(Event.WANTED, Event.ANSWERED, Event.UNWANTED)
    assert story.last == Reaction((Do.WITHDRAW, Do.TERMINATE), POLICY.stop_grace_seconds)
    assert story.then(Event.EXITED).life == Life(State.STOPPED)


def test_whoever_is_in_a_hurry_has_it_killed() -> None:
    assert Story().then(Event.WANTED, Event.UNWANTED, Event.HURRIED).last.do == (Do.KILL,)


def test_a_deaf_engine_is_replaced() -> None:
    story = Story().then(Event.WANTED, Event.ANSWERED, Event.DEAF)
    assert story.last.do == (Do.WITHDRAW, Do.TERMINATE)
    assert story.then(Event.EXITED, Event.WOKE).life.state is State.STARTING


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_pair_is_in_the_table_or_changes_nothing(state: State, event: Event) -> None:
    life, reaction = Life(state, (1.0,)).after(event, 2.0, POLICY)
    if (state, event) in TABLE:
        assert reaction is not None
    else:
        assert (life, reaction) == (Life(state, (1.0,)), None)


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_left_for_stopped_and_has_a_word_on_the_wire(state: State) -> None:
    life = Life(state)
    for event in (Event.UNWANTED, Event.EXITED):
        life, _ = life.after(event, 1.0, POLICY)
    assert life.state is State.STOPPED
    assert state.reported in EngineState


@given(st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 700)), max_size=200))
def test_after_any_history_the_process_is_there_exactly_when_the_table_thinks_so(
    history: list[tuple[Event, float]],
) -> None:
    life, now, alive, announced, alarm = Life(), 0.0, False, False, False
    for event, seconds in history:
        # The world's side: a process that is not there cannot exit or answer; no alarm, no waking.
        if (event in (Event.EXITED, Event.ANSWERED, Event.DEAF) and not alive) or (
            event is Event.WOKE and not alarm
        ):
            continue
        now += seconds
        alive = alive and event is not Event.EXITED
        before = life
        life, reaction = life.after(event, now, POLICY)
        if reaction is None:
            assert life == before
            continue
        for do in reaction.do:
            if do is Do.SPAWN:
                assert not alive
                alive = True
            if do in (Do.TERMINATE, Do.KILL):
                assert alive
            if do in (Do.ANNOUNCE, Do.WITHDRAW):
                assert announced is (do is Do.WITHDRAW)
                announced = do is Do.ANNOUNCE
        alarm = reaction.alarm_seconds is not None
        assert alive is (life.state in ALIVE)
        assert announced is (life.state is State.READY)
        assert alarm or life.state in (State.STOPPED, State.READY, State.FAILED)  # nothing waits for ever
        assert reaction.alarm_seconds is None or 0 < reaction.alarm_seconds <= POLICY.start_limit_seconds
        assert len(life.faults) <= 16
