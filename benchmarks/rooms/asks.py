"""What a crowded room is asked: conversations of several clients, and papers of five prompts. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

from balancer.core.model import (
    BLOCK_CHARS,
    Ask,
    Endpoint,
    ModelName,
    Needs,
    Prompt,
    ServiceClass,
    WorkerId,
)

Kind = Literal["interactive", "batch", "mixed"]

MODEL = ModelName("model")
CHARS_PER_TOKEN = 4
PATIENCE_SECONDS = 86_400.0
"""Nobody is turned away for the length of the line: its cost is what is measured."""

CHAT_CLIENTS, BATCH_CLIENTS = 32, 3
PAPER_BLOCKS, PROMPTS_PER_PAPER = 40, 5
MOST_TURNS = 8
THINK_SECONDS = 20.0


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One request of a client until it is answered, over all its attempts."""

    service_class: ServiceClass
    client: str
    prompt: Prompt
    prefix: int
    """Names what it shares with others: its paper, or its conversation."""
    shared_tokens: int
    """Of its prompt, those that an engine may remember from an earlier request with the same prefix."""
    output_tokens: int
    conversation: Conversation | None = None
    arrived: float = 0.0
    avoid: frozenset[WorkerId] = frozenset()
    admitted: bool = False

    @property
    def prompt_tokens(self) -> int:
        return self.prompt.chars // CHARS_PER_TOKEN

    def ask(self) -> Ask:
        """As the shell would describe it now."""
        return Ask(
            needs=Needs(model=MODEL, endpoint=Endpoint.CHAT, avoid=self.avoid),
            arrived=self.arrived,
            deadline=self.arrived + PATIENCE_SECONDS,
            admitted=self.admitted,
            service_class=self.service_class,
            client=self.client,
            prompt=self.prompt,
            max_output=512,
            replayable=self.service_class is ServiceClass.BATCH,
        )


@dataclass(slots=True, eq=False)
class Conversation:
    client: str
    prefix: int
    turns_left: int
    chars: int = 0
    """Of all that was said, the last answer included."""
    blocks: tuple[int, ...] = ()
    last: int | None = None
    """The hash of the turn before."""


class Source(Protocol):
    """One class of requests; there is always one more."""

    def next(self, now: float) -> Request: ...

    def answered(self, request: Request, now: float) -> None: ...


@dataclass(slots=True)
class Papers:
    """Five prompts of one paper, then those of the next one."""

    dice: Random
    _prompts: Iterator[Request] = field(init=False)

    def __post_init__(self) -> None:
        self._prompts = self._endless()

    def next(self, now: float) -> Request:
        return next(self._prompts)

    def answered(self, request: Request, now: float) -> None:
        """A paper's prompts do not follow from its answers."""

    def _endless(self) -> Iterator[Request]:
        while True:
            prefix, blocks = self.dice.getrandbits(64), _hashes(self.dice, PAPER_BLOCKS)
            client = f"batch{self.dice.randrange(BATCH_CLIENTS)}"
            for _ in range(PROMPTS_PER_PAPER):
                question = self.dice.randint(120, 480)
                yield Request(
                    service_class=ServiceClass.BATCH,
                    client=client,
                    prompt=Prompt(
                        chars=PAPER_BLOCKS * BLOCK_CHARS + question,
                        blocks=blocks,
                        conversation=self.dice.getrandbits(64),
                    ),
                    prefix=prefix,
                    shared_tokens=PAPER_BLOCKS * BLOCK_CHARS // CHARS_PER_TOKEN,
                    output_tokens=self.dice.randint(150, 500),
                )


@dataclass(slots=True)
class Chats:
    """The next turn of whoever has thought long enough, else the first turn of somebody new."""

    dice: Random
    _thinking: deque[tuple[float, Conversation]] = field(default_factory=deque)

    def next(self, now: float) -> Request:
        if self._thinking and self._thinking[0][0] <= now:
            return self._turn(self._thinking.popleft()[1])
        client = f"chat{self.dice.randrange(CHAT_CLIENTS)}"
        turns = self.dice.randint(1, MOST_TURNS)
        return self._turn(Conversation(client, self.dice.getrandbits(64), turns))

    def answered(self, request: Request, now: float) -> None:
        conversation = request.conversation
        if conversation is not None and conversation.turns_left:
            conversation.chars += request.output_tokens * CHARS_PER_TOKEN
            self._thinking.append((now + THINK_SECONDS, conversation))

    def _turn(self, conversation: Conversation) -> Request:
        said = conversation.chars
        conversation.chars += self.dice.randint(120, 1200) if said else self.dice.randint(1200, 10_000)
        missing = conversation.chars // BLOCK_CHARS - len(conversation.blocks)
        conversation.blocks += _hashes(self.dice, missing)
        conversation.turns_left -= 1
        before, conversation.last = conversation.last, self.dice.getrandbits(64)
        return Request(
            service_class=ServiceClass.INTERACTIVE,
            client=conversation.client,
            prompt=Prompt(
                chars=conversation.chars,
                blocks=conversation.blocks,
                conversation=conversation.last,
                continues=before,
            ),
            prefix=conversation.prefix,
            shared_tokens=said // CHARS_PER_TOKEN,
            output_tokens=self.dice.randint(50, 450),
            conversation=conversation,
        )


def _hashes(dice: Random, count: int) -> tuple[int, ...]:
    return tuple(dice.getrandbits(64) for _ in range(count))
