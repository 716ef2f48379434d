"""What one ask will take on one worker: tokens to compute, tokens to write, which conversation lives where.
Pure.

Holds what is learned across workers: the token counts of each model, and where each conversation was
answered last.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from balancer.core.estimates import Sizes
from balancer.core.fleet import Flight, Member
from balancer.core.model import Ask, ModelName, ModelOffer, ServiceClass, WorkerId

MAX_CONVERSATIONS = 10_000
MAX_MODELS = 1000
"""Whose token counts are kept; clients can ask for models under any name."""


class Home(NamedTuple):
    """Where a conversation was answered last, and the tokens that its next turn begins with."""

    worker_id: WorkerId
    tokens: float


@dataclass(slots=True)
class Forecast:
    _sizes: dict[ModelName, Sizes] = field(default_factory=dict)
    _homes: OrderedDict[tuple[ModelName, int], Home] = field(default_factory=OrderedDict)

    def sizes(self, model: ModelName) -> Sizes:
        sizes = self._sizes.get(model)
        if sizes is None:
            sizes = self._sizes[model] = Sizes()
            if len(self._sizes) > MAX_MODELS:
                del self._sizes[next(iter(self._sizes))]
        return sizes

    def home(self, ask: Ask) -> Home | None:
        """Of the conversation that this ask continues."""
        turn = ask.prompt.continues
        return None if turn is None else self._homes.get((ask.needs.model, turn))

    def settle(self, ask: Ask, worker_id: WorkerId, tokens: float) -> None:
        """The next turn after this one will find it there, with so many tokens known."""
        if ask.prompt.conversation is not None and ask.service_class is ServiceClass.INTERACTIVE:
            key = ask.needs.model, ask.prompt.conversation
            self._homes[key] = Home(worker_id, tokens)
            self._homes.move_to_end(key)
            if len(self._homes) > MAX_CONVERSATIONS:
                self._homes.popitem(last=False)

    def prompt_tokens(self, ask: Ask) -> float:
        return self.sizes(ask.needs.model).prompt_tokens(ask.prompt)

    def answer_tokens(self, ask: Ask) -> float:
        return self.sizes(ask.needs.model).answer_tokens(ask)

    def remaining_tokens(self, flight: Flight) -> float:
        """Of an answer that has come this far."""
        return self.sizes(flight.ask.needs.model).remaining_tokens(flight.ask, flight.tokens)

    def cached(self, ask: Ask, member: Member, offer: ModelOffer, home: Home | None) -> float:
        """Tokens of the prompt that this worker need not compute."""
        blocks = ask.prompt.blocks
        remembered = member.remembers.get(offer.own_name)
        depth = remembered.depth(blocks) if remembered is not None and blocks else 0
        at_home = home is not None and home.worker_id == member.worker.id
        if not depth and (blocks or not at_home):
            return 0.0
        if depth and member.running and not member.shares_prefixes and _in_use(member, blocks[:depth]):
            return 0.0  # llama.cpp and MLX: a prefix that a request is using can't serve another one
        sizes = self.sizes(ask.needs.model)
        tokens = depth * sizes.block_tokens()
        if home is not None and at_home:
            tokens = max(tokens, home.tokens)
        return min(tokens, sizes.prompt_tokens(ask.prompt) - 1)

    def remember(self, flight: Flight, *, tokens: float | None = None) -> None:
        """Its engine has computed its prompt (of a warm-up, so many tokens of it)."""
        member, offer, blocks = flight.member, flight.offer, flight.ask.prompt.blocks
        block_tokens = self.sizes(flight.ask.needs.model).block_tokens()
        if tokens is not None:
            blocks = blocks[: int(tokens / block_tokens)]
        at_most = max(int(member.cache_tokens(offer) / block_tokens), len(blocks))
        if blocks:
            member.remembered(offer).hold(blocks, at_most)


def _in_use(member: Member, beginning: tuple[int, ...]) -> bool:
    depth = len(beginning)
    for flight in member.running.values():
        blocks = flight.ask.prompt.blocks
        if len(blocks) >= depth and blocks[depth - 1] == beginning[-1]:
            return True
    return False
