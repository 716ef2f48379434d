"""What is asked of a room: batches of papers, conversations, and what goes wrong meanwhile. Pure.

Sizes and habits are those of the routing study (`workloads.py`, `harness.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    with_config,
)

from benchmarks.sim.prefixes import Work

Kind = Literal["chat", "batch"]

MOST_TURNS, TURNS_MEAN = 12, 5
THINK_SECONDS = 20.0
"""On average, between an answer and the next question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    name: str
    """`paper7.2`, `session3.0`."""
    kind: Kind
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One document and its prompts, which share it as their prefix."""

    prefix: int
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    question: int
    """Tokens that are new; all that was said before comes first."""
    answer: int
    think_seconds: float
    """Before it is asked; of the first turn, not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    name: str
    start: float
    turns: tuple[Turn, ...]

    def request(self, number: int) -> Request:
        """The turn with that number as a request: the conversation so far is its prefix."""
        before = sum(turn.question + turn.answer for turn in self.turns[:number])
        turn = self.turns[number]
        prompt = before + turn.question
        work = Work(
            key=self.name, prefix=before, prompt=prompt, output=turn.answer, kept=prompt + turn.answer
        )
        return Request(name=f"{self.name}.{number}", kind="chat", work=work)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something happens to one machine."""

    at: NonNegativeFloat
    """As a share: of the chats' time, or without chats of the batch's bound."""
    machine: NonNegativeInt
    """Counted from 0."""
    what: Literal["hang", "crash", "slow", "return"]
    factor: PositiveFloat = 1.0
    """Of a slow-down: everything takes so many times as long."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    papers: NonNegativeInt = 0
    prompts_per_paper: PositiveInt = 5
    chat_share: NonNegativeFloat = 0.0
    """Of the rate of turns that the fleet sustains."""
    chat_seconds: PositiveFloat = 1200.0
    """Sessions begin for so long."""
    warm_seconds: NonNegativeFloat = 120.0
    """Chats that are asked earlier are not measured (with a batch: 20 s, and until the batch's bound)."""
    drain_seconds: NonNegativeFloat = 300.0
    """Simulated after the last session's begin, at least as long as a person waits."""
    faults: tuple[Fault, ...] = ()
    chat_patience_seconds: PositiveFloat = 120.0
    """A person who has not the whole answer by then has given up."""
    batch_limit_seconds: PositiveFloat | None = None
    """Of one batch request, from its first slot (REQUEST_TIMEOUT); None: as long as the slowest machine
    takes. Without a limit nothing that hangs would ever be noticed."""

    def quick(self) -> Workload:
        """The same, smaller, for a rough answer."""
        return replace(
            self,
            papers=(self.papers + 2) // 3,
            chat_seconds=self.chat_seconds / 2,
            warm_seconds=self.warm_seconds / 2,
        )


# A hang without an end, a crash of an eighth of the time, a slow-down to the end.
_CHAT_FAULTS = (
    Fault(at=0.25, machine=1, what="hang"),
    Fault(at=0.50, machine=0, what="crash"),
    Fault(at=0.60, machine=0, what="return"),
    Fault(at=0.75, machine=2, what="slow", factor=5.0),
)
_BATCH_FAULTS = (
    Fault(at=0.24, machine=1, what="hang"),
    Fault(at=0.36, machine=0, what="crash"),
    Fault(at=0.50, machine=0, what="return"),
    Fault(at=0.60, machine=2, what="slow", factor=5.0),
)

WORKLOADS: Mapping[str, Workload] = {
    "batch": Workload(papers=300),
    "chat60": Workload(chat_share=0.60),
    "chat85": Workload(chat_share=0.85),
    "chat100": Workload(chat_share=1.00),
    "chat120": Workload(chat_share=1.20),
    "chat150": Workload(chat_share=1.50),
    "chat30+batch": Workload(chat_share=0.30, papers=300),
    "chat30+faults": Workload(chat_share=0.30, faults=_CHAT_FAULTS),
    "batch+faults": Workload(papers=300, faults=_BATCH_FAULTS, batch_limit_seconds=3600.0),
}


def workload_named(name: str) -> Workload:
    """A row of WORKLOADS, or a JSON file with the fields of `Workload`.

    Raises `OSError`, and `ValueError` with a sentence where the file is no workload.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    return TypeAdapter(Workload).validate_json(Path(name).read_bytes())


def papers(seed: int, count: int, prompts: int) -> tuple[Paper, ...]:
    """Papers of 6 000 to 12 000 tokens; answers of 150 to 500."""
    dice = random.Random(f"papers {seed}")
    return tuple(_paper(dice, f"paper{number}", prompts) for number in range(count))


def _paper(dice: random.Random, key: str, prompts: int) -> Paper:
    prefix = dice.randint(6000, 12000)
    requests = []
    for number in range(prompts):
        prompt, output = prefix + dice.randint(30, 120), dice.randint(150, 500)
        work = Work(key=key, prefix=prefix, prompt=prompt, output=output, kept=prefix)
        requests.append(Request(name=f"{key}.{number}", kind="batch", work=work))
    return Paper(prefix=prefix, requests=tuple(requests))


def sessions(seed: int, per_second: float, seconds: float) -> tuple[Session, ...]:
    """Conversations that begin as a Poisson process; some five turns each, at most twelve."""
    dice = random.Random(f"sessions {seed}")
    begun: list[Session] = []
    start = dice.expovariate(per_second)
    while start <= seconds:
        count = 1
        while count < MOST_TURNS and dice.random() > 1 / TURNS_MEAN:
            count += 1
        turns = tuple(
            Turn(
                question=dice.randint(30, 300) if number else dice.randint(300, 2500),
                answer=dice.randint(50, 450),
                think_seconds=dice.expovariate(1 / THINK_SECONDS),
            )
            for number in range(count)
        )
        begun.append(Session(name=f"session{len(begun)}", start=start, turns=turns))
        start += dice.expovariate(per_second)
    return tuple(begun)


@dataclass(frozen=True, slots=True)
class MeanTurn:
    """What a turn is on average, in tokens."""

    question: float
    prompt: float
    answer: float
    turns_per_session: float


@cache
def mean_turn() -> MeanTurn:
    """Of some 20 000 turns, always the same ones."""
    sample = sessions(1, 1.0, 4000)
    requests = [one.request(number) for one in sample for number in range(len(one.turns))]
    count = len(requests)
    return MeanTurn(
        question=sum(request.work.own for request in requests) / count,
        prompt=sum(request.work.prompt for request in requests) / count,
        answer=sum(request.work.output for request in requests) / count,
        turns_per_session=count / len(sample),
    )
