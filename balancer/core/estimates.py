"""What is learned of workers and models from the attempts that pass: success and time in a rolling window,
speeds, sizes, limits, and what an engine remembers. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from balancer.core.model import BLOCK_CHARS, Ask, Endpoint, Prompt, ServiceClass

WINDOW_SECONDS = 300.0
WINDOW_LENGTH = 100
"""The window holds what is younger than the first and no more than the second: old news fades on a quiet
worker, and a busy one costs no more memory than this."""


@dataclass(slots=True)
class Window:
    """The last attempts on one worker. Sums are kept, so that a read costs no walk."""

    _outcomes: deque[tuple[float, bool, float]] = field(default_factory=deque)
    _good: int = 0
    _good_seconds: float = 0.0

    def add(self, now: float, *, good: bool, seconds: float) -> None:
        self._outcomes.append((now, good, seconds))
        if good:
            self._good += 1
            self._good_seconds += seconds
        if len(self._outcomes) > WINDOW_LENGTH:
            self._forget_oldest()
        self.fade(now)

    def fade(self, now: float) -> None:
        """Forget what is older than the window; call it before reading."""
        while self._outcomes and now - self._outcomes[0][0] > WINDOW_SECONDS:
            self._forget_oldest()

    @property
    def success_rate(self) -> float:
        """0 to 1; 1 where nothing is known, so that a new worker gets its chance."""
        return self._good / len(self._outcomes) if self._outcomes else 1.0

    @property
    def average_seconds(self) -> float | None:
        """Mean time of the good answers; None where there are none."""
        return max(self._good_seconds, 0.0) / self._good if self._good else None

    def _forget_oldest(self) -> None:
        _, good, seconds = self._outcomes.popleft()
        if good:
            self._good -= 1
            # The running sum gathers rounding errors; it starts afresh whenever it can.
            self._good_seconds = self._good_seconds - seconds if self._good else 0.0


# How fast a worker reads and writes with one model.

OVERHEAD_GROWTH, OVERHEAD_STEP = 1.01, 0.001
"""With each first token; so that a service that has become slower is believed in the end."""
PREFILL_SAMPLE_TOKENS, PREFILL_SAMPLE_SECONDS, LEAST_SAMPLE_TOKENS = 256, 0.1, 64
"""A shorter prompt says little of the reading speed, since the fixed costs of a request hide it; unless it
was alone, took so long, and had so many tokens, at the least."""
NEW_AFTER_ANSWERS = 3
"""A worker with fewer answers to its name is new: what is known of it is a prior."""


@dataclass(slots=True)
class TokenPace:
    """Seconds per token over the number of streams: a line, by decayed least squares."""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Of 1, n, t, n * n and n * t."""

    def at(self, streams: float) -> float:
        """Of each stream, when so many are written at once."""
        weight, sum_n, sum_t, sum_nn, sum_nt = self._sums
        mean_t, mean_n = sum_t / weight, sum_n / weight
        variance = sum_nn / weight - mean_n * mean_n
        # Where it was always seen with about as many: a slope such as batching engines have.
        known = variance > 0.05
        slope = (sum_nt / weight - mean_n * mean_t) / variance if known else mean_t / (mean_n + 4)
        slope = min(max(slope, 0.0), mean_t / max(mean_n, 1.0))
        return max(mean_t + slope * (streams - mean_n), 0.25 * mean_t)

    def learn(self, streams: float, seconds: float, weight: float, keep: float) -> None:
        """`keep`: the share of what was known that stays."""
        seconds = max(seconds, 1e-6)
        for index, value in enumerate((1.0, streams, seconds, streams * streams, streams * seconds)):
            self._sums[index] = keep * self._sums[index] + weight * value


@dataclass(slots=True)
class Speeds:
    """What was learned of one model on one worker (ROUTING 2, "Learning"). Everything decays, by being
    outweighed: a machine that throttles is noticed within a few answers."""

    prefill_tokens_per_second: float
    writing: TokenPace
    """While nobody's prompt is read."""
    answering: TokenPace
    """From the first token of answers to their last, with whatever came between."""
    overhead_seconds: float | None = None
    """Of a first token, what neither prompts nor load explain: a proxy, a distant service, thinking. The
    least seen, slowly forgotten; None: nothing was seen."""
    prefill_samples: int = 0
    answers: int = 0
    """Good ones, however short."""
    _stood_out: int = 0
    """On which side of what was known the last prompt's speed stood out; 0: on none."""

    @classmethod
    def prior(cls, prefill_tokens_per_second: float, seconds_per_token: float) -> Speeds:
        """Alone it writes a token in so many seconds; eight at once are taken to need 2.5 times as long."""
        speeds = cls(prefill_tokens_per_second, TokenPace(), TokenPace())
        for pace in (speeds.writing, speeds.answering):
            pace.learn(1, seconds_per_token, 0.5, 1.0)
            pace.learn(8, 2.5 * seconds_per_token, 0.5, 1.0)
        return speeds

    def began(self, seconds: float, explained: float) -> None:
        """A first token came after so many seconds, of which so many were expected."""
        unexplained = max(seconds - explained, 0.0)
        known = self.overhead_seconds
        self.overhead_seconds = (
            unexplained if known is None else min(unexplained, OVERHEAD_GROWTH * known + OVERHEAD_STEP)
        )

    def read(self, tokens: float, seconds: float, *, alone: bool = False) -> None:
        """So many tokens of a prompt, none of them cached, were read in that time. `alone`: the worker had
        nothing else to do."""
        seconds -= self.overhead_seconds or 0.0
        telling = alone and tokens >= LEAST_SAMPLE_TOKENS and seconds >= PREFILL_SAMPLE_SECONDS
        if tokens < PREFILL_SAMPLE_TOKENS and not telling:
            return
        ratio = tokens / max(seconds, 1e-3) / self.prefill_tokens_per_second
        self.prefill_samples += 1
        if self.prefill_samples <= NEW_AFTER_ANSWERS:
            self.prefill_tokens_per_second *= ratio ** (1 / self.prefill_samples)
            return
        # One that stands out may be chance; a second one on the same side is a machine that has changed.
        side = (ratio > 1.6) - (ratio < 0.6)
        if side and side == self._stood_out:
            self.prefill_tokens_per_second *= ratio**0.7
        else:
            self.prefill_tokens_per_second *= min(max(ratio, 0.6), 1.6) ** 0.3
        self._stood_out = side

    def wrote(self, streams: float, seconds_per_token: float, share: float) -> None:
        """A stream got tokens at that pace, beside others, and no prompt was read. `share`: of an answer."""
        keep = 1 - 0.1 * share
        if self.answers < NEW_AFTER_ANSWERS:
            keep = 1 - 0.7 * share  # of the prior: what is seen soon outweighs it
        self.writing.learn(streams, seconds_per_token, share, keep)

    def answered(self, streams: float, seconds_per_token: float) -> None:
        """A whole answer came at that pace."""
        keep = 0.9 if self.answers >= NEW_AFTER_ANSWERS else 0.3
        self.answering.learn(streams, seconds_per_token, 1.0, keep)


PRIORS: tuple[tuple[str, str, float, float], ...] = (
    ("vllm", "", 4000.0, 0.015),
    ("mlx", "ultra", 900.0, 0.012),
    ("mlx", "max", 600.0, 0.018),
    ("mlx", "", 300.0, 0.035),
    ("llama.cpp", "nvidia", 2500.0, 0.015),
    ("llama.cpp", "apple", 300.0, 0.04),
    ("llama.cpp", "", 60.0, 0.1),
)
"""Engine, a word of the hardware, prefill tokens/s and seconds per token of an 8B-class model at 4 bit: the
published measurements that the routing study rests on, rounded. Only the first answers depend on them."""
UNKNOWN_PRIOR = (400.0, 0.04)


def prior(engine: str, hardware: str) -> Speeds:
    """What to expect of a worker that has answered nothing yet."""
    engine, hardware = engine.lower(), hardware.lower()
    for its_engine, word, prefill, seconds in PRIORS:
        if its_engine == engine and word in hardware:
            return Speeds.prior(prefill, seconds)
    return Speeds.prior(*UNKNOWN_PRIOR)


# How long prompts and answers are.

TOKENS_PER_CHAR = 0.25
"""Of English text with today's tokenizers, until a model's own ratio was seen."""
EXPECTED_ANSWER_TOKENS = 256.0
LENGTHS_KEPT = 100


@dataclass(slots=True)
class Sizes:
    """What was learned of one model's token counts, whoever serves it."""

    tokens_per_char: float = TOKENS_PER_CHAR
    _answers: dict[ServiceClass, float] = field(default_factory=dict)
    _lengths: dict[ServiceClass, deque[int]] = field(default_factory=dict)
    """Of the last answers."""

    def prompt_tokens(self, prompt: Prompt) -> float:
        tokens = prompt.tokens if prompt.tokens is not None else prompt.chars * self.tokens_per_char
        return max(float(tokens), 1.0)

    def answer_tokens(self, ask: Ask) -> float:
        """As many as answers of its class have had of late, and never more than it allows."""
        if ask.needs.endpoint is Endpoint.EMBEDDINGS:
            return 1.0
        expected = self._answers.get(ask.service_class, EXPECTED_ANSWER_TOKENS)
        return min(expected, float(ask.max_output)) if ask.max_output is not None else expected

    def remaining_tokens(self, ask: Ask, written: int) -> float:
        """Of an answer of which so much is written: the mean of what recent ones that were longer than that
        had left."""
        most = float("inf") if ask.max_output is None else float(ask.max_output - written)
        longer = [one - written for one in self._lengths.get(ask.service_class, ()) if one > written]
        if longer:
            expected = sum(longer) / len(longer)
        else:
            expected = max(self.answer_tokens(ask) - written, 0.2 * written)
        return max(min(expected, most), 1.0)

    def block_tokens(self) -> float:
        return BLOCK_CHARS * self.tokens_per_char

    def counted(self, ask: Ask, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """An answer came with its token counts."""
        if prompt_tokens and ask.prompt.tokens is None and ask.prompt.chars > BLOCK_CHARS:
            ratio = min(max(prompt_tokens / ask.prompt.chars, 0.02), 2.0)
            self.tokens_per_char += 0.1 * (ratio - self.tokens_per_char)
        if output_tokens:
            known = self._answers.get(ask.service_class, EXPECTED_ANSWER_TOKENS)
            self._answers[ask.service_class] = known + 0.05 * (output_tokens - known)
            lengths = self._lengths.setdefault(ask.service_class, deque(maxlen=LENGTHS_KEPT))
            lengths.append(output_tokens)


# What a worker remembers.


class Remembered:
    """The blocks of prompts that a worker's engine is thought to hold, the least recently used forgotten
    first, and of one prompt the last ones first: so what is held of a prompt is always its beginning."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def depth(self, blocks: Sequence[int]) -> int:
        """How many of these blocks, from the first on, it holds."""
        held = self._blocks
        if not blocks or blocks[0] not in held:
            return 0
        low, high = 1, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def hold(self, blocks: Sequence[int], at_most: int) -> None:
        """These were computed just now; `at_most` so many blocks fit in all."""
        held = self._blocks
        for block in reversed(blocks[:at_most]):
            held[block] = None
            held.move_to_end(block)
        while len(held) > at_most:
            held.popitem(last=False)


# How much a worker takes at once, where neither it nor its configuration says so.

FIRST_LIMIT = 4.0
HIGHEST_LIMIT = 256.0


@dataclass(slots=True)
class LearnedLimit:
    """Additive increase, multiplicative decrease on lateness (ROUTING 2, "Limits")."""

    value: float = FIRST_LIMIT
    _doubling: bool = True
    _settling: int = 0
    """So many more first tokens come from what was sent before the last decrease."""

    def began(self, *, seconds: float, expected: float, running: int) -> None:
        """A first token came after so many seconds, `running` requests being on the worker."""
        if seconds > 2 * expected + 1 and running > 1:
            self.value, self._doubling, self._settling = max(1.0, 0.9 * self.value), False, running
        elif self._settling:
            self._settling -= 1
        elif running >= int(self.value) - 1:
            step = max(1.0, self.value / 4) if self._doubling else 0.5
            self.value = min(self.value + step, HIGHEST_LIMIT)
