"""The life of one engine as a table: what happened in, what to do out. Pure.

`process` and `supervised` perform the commands; nobody else decides about an engine. What is not in the table
changes nothing, visibly: `Life.after` answers None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from worker_agent.wire import EngineState


class State(Enum):
    """Where an engine is in its life."""

    STOPPED = "stopped"
    """No process, and none wanted."""
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    """On its way to STOPPED."""
    ENDING = "ending"
    """It runs but serves nobody any more: it is stopped, to be started again after a rest."""
    RESTING = "resting"
    FAILED = "failed"

    @property
    def reported(self) -> EngineState:
        """The word for it on the wire, where a process that goes down is STOPPING whatever comes after."""
        if self in (State.STOPPED, State.ENDING):
            return EngineState.STOPPING
        return EngineState(self.value)


class Event(Enum):
    """What can happen to it."""

    WANTED = "wanted"
    UNWANTED = "unwanted"
    HURRIED = "hurried"
    """Whoever waits for it to stop does not wait any longer."""
    ANSWERED = "answered"
    """It has generated a token."""
    DEAF = "deaf"
    """Its process lives but does not serve, or somebody else answers on its port."""
    EXITED = "exited"
    """Its process is gone, or never came to be."""
    WOKE = "woke"
    """The time of the last reaction's `Wait` is over."""


class Do(Enum):
    """What the shell is told to do."""

    SPAWN = "spawn"
    TERMINATE = "terminate"
    KILL = "kill"
    ANNOUNCE = "announce"
    """Requests may be sent to it."""
    WITHDRAW = "withdraw"
    """No more requests; those that run may still end well."""


class Wait(Enum):
    """How long until WOKE, unless something else happens first."""

    FOR_EVER = "for ever"
    START_LIMIT = "start limit"
    STOP_GRACE = "stop grace"
    REST = "rest"


@dataclass(frozen=True, slots=True)
class Step:
    """One cell of the table."""

    state: State
    do: tuple[Do, ...] = ()
    wait: Wait = Wait.FOR_EVER
    fault: bool = False
    """The engine's own doing: counted, and answered by a longer rest."""


_S, _E, _D, _W = State, Event, Do, Wait

TABLE: Mapping[tuple[State, Event], Step] = {
    (_S.STOPPED, _E.WANTED): Step(_S.STARTING, (_D.SPAWN,), _W.START_LIMIT),
    # Starting ...
    (_S.STARTING, _E.ANSWERED): Step(_S.READY, (_D.ANNOUNCE,)),
    (_S.STARTING, _E.EXITED): Step(_S.RESTING, (), _W.REST, fault=True),
    (_S.STARTING, _E.DEAF): Step(_S.ENDING, (_D.TERMINATE,), _W.STOP_GRACE, fault=True),
    (_S.STARTING, _E.WOKE): Step(_S.ENDING, (_D.TERMINATE,), _W.STOP_GRACE, fault=True),  # too slow
    (_S.STARTING, _E.UNWANTED): Step(_S.STOPPING, (_D.TERMINATE,), _W.STOP_GRACE),
    # Ready ...
    (_S.READY, _E.EXITED): Step(_S.RESTING, (_D.WITHDRAW,), _W.REST, fault=True),
    (_S.READY, _E.DEAF): Step(_S.ENDING, (_D.WITHDRAW, _D.TERMINATE), _W.STOP_GRACE, fault=True),
    (_S.READY, _E.UNWANTED): Step(_S.STOPPING, (_D.WITHDRAW, _D.TERMINATE), _W.STOP_GRACE),
    # Going down: to stay down, or to come back. KILL is repeated: a process deep in a driver may need it.
    (_S.STOPPING, _E.EXITED): Step(_S.STOPPED),
    (_S.STOPPING, _E.WOKE): Step(_S.STOPPING, (_D.KILL,), _W.STOP_GRACE),
    (_S.STOPPING, _E.HURRIED): Step(_S.STOPPING, (_D.KILL,), _W.STOP_GRACE),
    (_S.STOPPING, _E.WANTED): Step(_S.ENDING, (), _W.STOP_GRACE),
    (_S.ENDING, _E.EXITED): Step(_S.RESTING, (), _W.REST),
    (_S.ENDING, _E.WOKE): Step(_S.ENDING, (_D.KILL,), _W.STOP_GRACE),
    (_S.ENDING, _E.HURRIED): Step(_S.ENDING, (_D.KILL,), _W.STOP_GRACE),
    (_S.ENDING, _E.UNWANTED): Step(_S.STOPPING, (), _W.STOP_GRACE),
    # Down ...
    (_S.RESTING, _E.WOKE): Step(_S.STARTING, (_D.SPAWN,), _W.START_LIMIT),
    (_S.RESTING, _E.UNWANTED): Step(_S.STOPPED),
    (_S.FAILED, _E.WANTED): Step(_S.STARTING, (_D.SPAWN,), _W.START_LIMIT),
    (_S.FAILED, _E.UNWANTED): Step(_S.STOPPED),
}

_FAULTS_KEPT = 16
"""Enough for the longest rest (1 s doubled 15 times), and a bound."""

ALIVE = frozenset({State.STARTING, State.READY, State.STOPPING, State.ENDING})
"""States in which there is a process, or one is being made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionPolicy:
    """How patient the table is, in seconds."""

    start_limit_seconds: float = 300.0
    """From spawn to the first token."""
    stop_grace_seconds: float = 10.0
    """From TERMINATE to KILL; vLLM was seen to need 2.6."""
    first_rest_seconds: float = 1.0
    longest_rest_seconds: float = 60.0
    faults_to_fail: int = 5
    fault_window_seconds: float = 600.0
    stable_seconds: float = 300.0
    """READY for so long: what went wrong before is forgotten."""


@dataclass(frozen=True, slots=True)
class Reaction:
    """What follows from one event."""

    do: tuple[Do, ...]
    alarm_seconds: float | None
    """Tell it WOKE after so long; it replaces the alarm before. None: no alarm."""


@dataclass(frozen=True, slots=True)
class Life:
    """One engine's life so far."""

    state: State = State.STOPPED
    faults: tuple[float, ...] = ()
    """When it went wrong lately, on the caller's clock, oldest first."""
    ready_since: float | None = None

    def after(self, event: Event, now: float, policy: SupervisionPolicy) -> tuple[Life, Reaction | None]:
        """The life after this event, and what to do. (self, None): the event means nothing in this state."""
        step = TABLE.get((self.state, event))
        if step is None:
            return self, None
        faults = self.faults
        was_stable = self.ready_since is not None and now - self.ready_since >= policy.stable_seconds
        if was_stable or self.state is State.FAILED:  # FAILED is left only when somebody has looked
            faults = ()
        if step.fault:
            faults = (*faults, now)[-max(policy.faults_to_fail, _FAULTS_KEPT) :]
        life = replace(
            self, state=step.state, faults=faults, ready_since=now if step.state is State.READY else None
        )
        if step.state is State.RESTING and life._gives_up(now, policy):
            life, step = replace(life, state=State.FAILED), replace(step, wait=Wait.FOR_EVER)
        return life, Reaction(step.do, life._seconds(step.wait, policy))

    def _gives_up(self, now: float, policy: SupervisionPolicy) -> bool:
        lately = [fault for fault in self.faults if now - fault <= policy.fault_window_seconds]
        return len(lately) >= policy.faults_to_fail

    def _seconds(self, wait: Wait, policy: SupervisionPolicy) -> float | None:
        match wait:
            case Wait.FOR_EVER:
                return None
            case Wait.START_LIMIT:
                return policy.start_limit_seconds
            case Wait.STOP_GRACE:
                return policy.stop_grace_seconds
            case Wait.REST:
                doubled = policy.first_rest_seconds * 2.0 ** max(0, len(self.faults) - 1)
                return min(policy.longest_rest_seconds, doubled)
