"""What an engine still holds of earlier prompts: the three ways of the three engine families. Pure.

Facts of the routing study (`engine.py`, "Prefix cache modes"): vLLM shares blocks between requests that
run; MLX's server stores a prompt when its request has finished; in llama.cpp a prompt lives in one slot,
and what a slot forgets goes to a cache in RAM.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, Protocol

EngineKind = Literal["vllm", "mlx", "llama.cpp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request as an engine sees it, in tokens."""

    key: str
    """Whose prefix it shares: the paper or the conversation."""
    prefix: int
    """How many of its first tokens it has in common with others of the same key."""
    prompt: int
    output: int
    kept: int
    """How much a later request of the same key could use of this one's whole context."""

    @property
    def own(self) -> int:
        """The prompt's tokens that nobody else has."""
        return self.prompt - self.prefix


class Prefixes(Protocol):
    """The prefix cache of one engine. Whoever was taken in is `ended` once."""

    def admits(self, work: Work, *, alone: bool) -> bool:
        """There is memory for it now. What is `alone` gets in whatever its size."""

    def taken_in(self, work: Work) -> int:
        """It begins: how many tokens of its prefix need not be computed."""

    def prefilled(self, work: Work) -> None:
        """Its whole prompt is computed."""

    def ended(self, work: Work, *, whole: bool) -> None:
        """It is over. `whole`: it was answered, else it was cancelled."""


class Recent:
    """Tokens by key, the least recently used forgotten first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._total = 0

    def get(self, key: str) -> int:
        return self._tokens.get(key, 0)

    def touch(self, key: str) -> None:
        if key in self._tokens:
            self._tokens.move_to_end(key)

    def pop(self, key: str) -> int:
        tokens = self._tokens.pop(key, 0)
        self._total -= tokens
        return tokens

    def put(self, key: str, tokens: int) -> None:
        self.pop(key)
        if tokens > 0:
            self._tokens[key] = tokens
            self._total += tokens
        self.trim(self.limit)

    def trim(self, limit: int) -> None:
        while self._total > limit:
            self._total -= self._tokens.popitem(last=False)[1]


@dataclass(slots=True)
class _Pinned:
    users: int = 0
    reserved: int = 0
    computed: int = 0


class SharedBlocks:
    """vLLM: one pool for all that runs and all that is remembered; a prefix in use is held once."""

    def __init__(self, pool_tokens: int) -> None:
        self._pool = pool_tokens
        self._pinned: dict[str, _Pinned] = {}
        self._idle = Recent(pool_tokens)
        self._private = 0

    @property
    def _in_use(self) -> int:
        return sum(pinned.reserved for pinned in self._pinned.values()) + self._private

    def admits(self, work: Work, *, alone: bool) -> bool:
        shared = 0 if work.key in self._pinned else work.prefix
        return alone or self._in_use + shared + work.own + work.output <= self._pool

    def taken_in(self, work: Work) -> int:
        pinned = self._pinned.setdefault(work.key, _Pinned())
        pinned.users += 1
        pinned.reserved = max(pinned.reserved, work.prefix)
        pinned.computed = max(pinned.computed, self._idle.pop(work.key))
        self._private += work.own + work.output
        self._idle.trim(max(0, self._pool - self._in_use))
        return min(pinned.computed, work.prefix)

    def prefilled(self, work: Work) -> None:
        pinned = self._pinned[work.key]
        pinned.computed = max(pinned.computed, min(work.kept, work.prompt))

    def ended(self, work: Work, *, whole: bool) -> None:
        pinned = self._pinned[work.key]
        pinned.users -= 1
        if whole:
            pinned.computed = max(pinned.computed, work.kept)
        self._private -= work.own + work.output
        if not pinned.users:
            del self._pinned[work.key]
            self._idle.put(work.key, pinned.computed)
        self._idle.trim(max(0, self._pool - self._in_use))


class StoredWhenFinished:
    """MLX's server: the context is stored when its request has finished, and copied for whoever uses it."""

    def __init__(self, cache_tokens: int) -> None:
        self._stored = Recent(cache_tokens)

    def admits(self, work: Work, *, alone: bool) -> bool:
        return True

    def taken_in(self, work: Work) -> int:
        self._stored.touch(work.key)
        return min(self._stored.get(work.key), work.prefix)

    def prefilled(self, work: Work) -> None:
        pass

    def ended(self, work: Work, *, whole: bool) -> None:
        if whole:
            self._stored.put(work.key, work.kept)


@dataclass(slots=True, eq=False)
class _Slot:
    key: str = ""
    tokens: int = 0
    holder: Work | None = None


class SlotPrompts:
    """llama.cpp: each slot remembers its last prompt; one that is in use can't be shared."""

    def __init__(self, slots: int, cache_tokens: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        """Least recently used first."""
        self._ram = Recent(cache_tokens)

    def admits(self, work: Work, *, alone: bool) -> bool:
        return True

    def taken_in(self, work: Work) -> int:
        idle = [slot for slot in self._slots if slot.holder is None]
        same = [slot for slot in idle if slot.key == work.key]
        slot = max(same, key=lambda one: one.tokens, default=idle[0])
        if slot.key != work.key:
            self._ram.put(slot.key, slot.tokens)
            slot.key, slot.tokens = work.key, 0
        slot.tokens = min(max(slot.tokens, self._ram.pop(work.key)), work.prefix)
        slot.holder = work
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot.tokens

    def prefilled(self, work: Work) -> None:
        self._held_by(work).tokens = min(work.kept, work.prompt)

    def ended(self, work: Work, *, whole: bool) -> None:
        slot = self._held_by(work)
        slot.holder = None
        if whole:
            slot.tokens = work.kept

    def _held_by(self, work: Work) -> _Slot:
        return next(slot for slot in self._slots if slot.holder is work)


def prefixes_of(kind: EngineKind, *, slots: int, cache_tokens: int) -> Prefixes:
    """An empty cache. `cache_tokens`: of vLLM the whole pool, of the others what they keep beside it."""
    match kind:
        case "vllm":
            return SharedBlocks(cache_tokens)
        case "mlx":
            return StoredWhenFinished(cache_tokens)
        case "llama.cpp":
            return SlotPrompts(slots, cache_tokens)
