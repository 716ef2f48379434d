"""One inference engine on virtual time: prefill, batched decoding, its own queue, and its faults.

The model of the routing study (`engine.py`), with one difference: the growth of contexts between two
events is integrated, not held, so that the fluid bound holds exactly. In words:

- a step gives every running stream one token, in `step + stream * n + context * (tokens of context)` seconds;
- while a prompt is read, each step also reads a chunk of it, of at most `CHUNK_TOKENS`;
- prompts are read one at a time, in the order of arrival; the end of a prompt is the first token;
- whatever is sent beyond its slots or its memory waits in the engine's own queue.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, with_config

from benchmarks.sim.prefixes import EngineKind, Prefixes, Work, prefixes_of
from benchmarks.sim.virtual_time import Timer, VirtualTime

CHUNK_TOKENS = 2048
"""Of a prompt per step: vLLM's default of max_num_batched_tokens; llama.cpp and MLX do alike."""
ATTENTION = 3.3e-5
"""Share by which a prompt token costs more for each token before it (8B model; the study's K_ATT)."""

_LEAST_STEPS = 1e-6
"""Below so much of a step something is done: what is left is rounding."""
_LEAST_SECONDS = 1e-7
"""Time always moves, whatever rounds to nothing."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """The rates of one engine with one model on one machine."""

    kind: EngineKind
    prefill_tokens_per_second: PositiveFloat
    step_seconds: PositiveFloat
    """Of a decode step, whatever runs in it (`a` of the study)."""
    stream_seconds: NonNegativeFloat
    """Of a step, for each stream in it (`b`)."""
    context_seconds: NonNegativeFloat = 0.0
    """Of a step, for each token of context in it (`c`)."""
    attention: NonNegativeFloat = ATTENTION
    slots: PositiveInt
    cache_tokens: NonNegativeInt
    """vLLM: the pool for all that runs and is remembered. MLX, llama.cpp: remembered beside what runs."""

    def prefill_seconds(self, start: int, tokens: int) -> float:
        """To read so many tokens of a prompt after its first `start`."""
        return tokens / self.prefill_tokens_per_second * (1 + self.attention * (start + tokens / 2))

    @property
    def pool_tokens(self) -> float:
        """Memory that limits how many can run at once."""
        return self.cache_tokens if self.kind == "vllm" else math.inf


class Watcher(Protocol):
    """Is told how its request goes: `began`, then `finished`; or `broke` at any time instead."""

    def began(self) -> None:
        """The first token is there."""

    def finished(self) -> None: ...

    def broke(self) -> None:
        """The engine died."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request on one engine."""

    work: Work
    watcher: Watcher
    prefill_left: float = 0.0
    """Steps until its prompt is read."""
    chunk_seconds: float = 0.0
    """What each of these steps costs beside the decoding."""
    generated: float = 0.0
    cached: int = 0
    """Tokens of its prompt that need not be computed."""

    @property
    def left(self) -> float:
        return self.work.output - self.generated


class EngineDown(Exception):
    """Nobody listens: the engine has crashed."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Steps and seconds: `seconds(g) = first * g + growth * g**2 / 2`, since contexts grow with each step."""

    first: float
    growth: float

    def seconds(self, steps: float) -> float:
        return self.first * steps + self.growth * steps**2 / 2

    def steps(self, seconds: float) -> float:
        # The usual root, in the form that does not cancel where growth is small or zero.
        return 2 * seconds / (self.first + math.sqrt(self.first**2 + 2 * self.growth * seconds))


class Engine:
    def __init__(self, time: VirtualTime, spec: EngineSpec) -> None:
        self.spec = spec
        self.is_up = True
        self.is_hung = False
        self.prefilled_tokens = 0
        """Read by it so far, or being read, the cached ones not counted."""
        self._time = time
        self._slowness = 1.0
        self._queue: deque[Generation] = deque()
        self._reading: Generation | None = None
        self._running: list[Generation] = []
        self._prefixes = self._empty()
        self._since = 0.0
        self._pace = Pace(1.0, 0.0)
        self._next: Timer | None = None

    def submit(self, work: Work, watcher: Watcher) -> Generation:
        """Raises `EngineDown`."""
        if not self.is_up:
            raise EngineDown
        generation = Generation(work, watcher)
        self._advance()
        self._queue.append(generation)
        self._plan()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Nobody wants it any more. Does nothing to one that is over."""
        self._advance()
        if generation in self._queue:
            self._queue.remove(generation)
        elif generation is self._reading:
            self._reading = None
            self._prefixes.ended(generation.work, whole=False)
        elif generation in self._running:
            self._running.remove(generation)
            self._prefixes.ended(generation.work, whole=False)
        self._plan()

    def generated(self, generation: Generation) -> int:
        """Tokens that have come of it."""
        self._advance()
        return int(generation.generated)

    # Faults

    def crash(self) -> None:
        """All that it had is lost, and nobody listens until it `returns`."""
        self._advance()
        lost = [*self._queue, *([self._reading] if self._reading else []), *self._running]
        self.is_up = False
        self._queue.clear()
        self._reading = None
        self._running.clear()
        self._prefixes = self._empty()
        self._plan()
        for generation in lost:
            generation.watcher.broke()

    def hang(self) -> None:
        """It takes requests and never says a word."""
        self._advance()
        self.is_hung = True
        self._plan()

    def slow(self, factor: float) -> None:
        """Everything takes so many times as long from now on."""
        self._advance()
        self._slowness = factor
        self._plan()

    def returns(self) -> None:
        """Whatever was wrong with it is over. What hung goes on; what crashed has forgotten all."""
        self._advance()
        self.is_up, self.is_hung, self._slowness = True, False, 1.0
        self._plan()

    # What goes on

    def _empty(self) -> Prefixes:
        return prefixes_of(self.spec.kind, slots=self.spec.slots, cache_tokens=self.spec.cache_tokens)

    def _advance(self) -> None:
        """Bring what runs up to now."""
        seconds = self._time.now - self._since
        self._since = self._time.now
        if self._next is None or seconds <= 0:
            return
        steps = self._pace.steps(seconds)
        if self._reading:
            self._reading.prefill_left -= steps
        for generation in self._running:
            generation.generated += steps

    def _plan(self) -> None:
        """Take in what fits, and wake when the next thing will be done."""
        if self._next:
            self._next.cancel()
            self._next = None
        if not self.is_up or self.is_hung:
            return
        self._take_in()
        steps = min((generation.left for generation in self._running), default=math.inf)
        if self._reading:
            steps = min(steps, self._reading.prefill_left)
        if math.isfinite(steps):
            self._pace = self._present_pace()
            self._next = self._time.after(max(self._pace.seconds(steps), _LEAST_SECONDS), self._on)

    def _take_in(self) -> None:
        if self._reading or not self._queue or len(self._running) >= self.spec.slots:
            return
        generation = self._queue[0]
        work = generation.work
        if not self._prefixes.admits(work, alone=not self._running):
            return
        self._queue.popleft()
        cached = self._prefixes.taken_in(work)
        generation.cached = cached
        uncached = max(work.prompt - cached, 1)
        # A prompt that is cached as a whole still takes a step.
        seconds = max(self.spec.prefill_seconds(cached, uncached), self.spec.step_seconds)
        generation.prefill_left = math.ceil(uncached / CHUNK_TOKENS)
        generation.chunk_seconds = seconds / generation.prefill_left
        self._reading = generation
        self.prefilled_tokens += uncached

    def _present_pace(self) -> Pace:
        spec, streams = self.spec, len(self._running)
        first, growth = 0.0, 0.0
        if streams:
            context = sum(one.work.prompt + one.generated for one in self._running)
            first = spec.step_seconds + spec.stream_seconds * streams + spec.context_seconds * context
            growth = spec.context_seconds * streams
        if self._reading:
            first += self._reading.chunk_seconds
        return Pace(first * self._slowness, growth * self._slowness)

    def _on(self) -> None:
        """Something is done: a prompt, some answers, or both."""
        self._advance()
        began: list[Generation] = []
        if self._reading and self._reading.prefill_left <= _LEAST_STEPS:
            generation, self._reading = self._reading, None
            generation.generated = 1.0
            self._prefixes.prefilled(generation.work)
            self._running.append(generation)
            began.append(generation)
        finished = [generation for generation in self._running if generation.left <= _LEAST_STEPS]
        for generation in finished:
            self._running.remove(generation)
            self._prefixes.ended(generation.work, whole=True)
        self._plan()
        for generation in began:
            generation.watcher.began()
        for generation in finished:
            generation.watcher.finished()
