"""Who asks: a batch client that keeps a window of requests open, and people in conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from balancer.batch.client import Broke, Patience, pause_after
from benchmarks.sim.room import Call, Room
from benchmarks.sim.workloads import Paper, Request, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended for its client, whatever it took. Moments in seconds."""

    request: Request
    asked: float
    first: float | None
    """The first token that the client saw."""
    ended: float
    answered: bool


class BatchClient:
    """Sends prompts in the order of the papers, so many at once; who fails is sent again as `balancer batch`
    does it."""

    def __init__(
        self, room: Room, batch: Sequence[Paper], *, at_once: int, limit_seconds: float | None, dice: Random
    ) -> None:
        self.outcomes: list[Outcome] = []
        """Each request once, in the order of their ends."""
        self._room = room
        self._limit_seconds = limit_seconds
        self._dice = dice
        self._asked: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._waiting = iter([request for paper in batch for request in paper.requests])
        self._count = sum(len(paper.requests) for paper in batch)
        for _ in range(at_once):
            self._next()

    @property
    def is_through(self) -> bool:
        return len(self.outcomes) == self._count

    def _next(self) -> None:
        request = next(self._waiting, None)
        if request is not None:
            self._asked[request.name] = self._room.time.now
            self._ask(request)

    def _ask(self, request: Request) -> None:
        self._tries[request.name] = self._tries.get(request.name, 0) + 1
        call = Call(
            request=request,
            arrived=self._room.time.now,
            patience_seconds=None,
            limit_seconds=self._limit_seconds,
            over=self._over,
        )
        self._room.ask(call)

    def _over(self, call: Call) -> None:
        now, request = self._room.time.now, call.request
        if not call.answered:
            failure = Broke("the room gave up")
            tries = self._tries[request.name]
            pause = pause_after(Patience(), failure, tries=tries, seconds=0.0, dice=self._dice.random)
            if pause is not None:
                self._room.time.after(pause, partial(self._ask, request))
                return
        asked = self._asked[request.name]
        outcome = Outcome(request=request, asked=asked, first=call.first, ended=now, answered=call.answered)
        self.outcomes.append(outcome)
        self._next()


class ChatClients:
    """People. Who gets no answer in time leaves, and does not go on."""

    def __init__(self, room: Room, people: Sequence[Session], *, patience_seconds: float) -> None:
        self.outcomes: list[Outcome] = []
        self.asked = 0
        self._room = room
        self._patience_seconds = patience_seconds
        for session in people:
            room.time.at(session.start, partial(self._ask, session, 0))

    def _ask(self, session: Session, number: int) -> None:
        self.asked += 1
        call = Call(
            request=session.request(number),
            arrived=self._room.time.now,
            patience_seconds=self._patience_seconds,
            limit_seconds=None,
            over=partial(self._over, session, number),
        )
        self._room.ask(call)

    def _over(self, session: Session, number: int, call: Call) -> None:
        now = self._room.time.now
        self.outcomes.append(
            Outcome(
                request=call.request, asked=call.arrived, first=call.first, ended=now, answered=call.answered
            )
        )
        following = number + 1
        if call.answered and following < len(session.turns):
            self._room.time.after(
                session.turns[following].think_seconds, partial(self._ask, session, following)
            )
