"""How much text fits into a model's context, and where a longer paper is cut. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_CONTEXT_TOKENS = 4096
"""Taken where the endpoint does not say; the smallest context that today's chat models are served with."""

MIN_SECTION_CHARS = 200
"""A section shorter than this says nothing by itself: the context is too small for the question."""

_SLACK_TOKENS = 64
"""What a chat template adds around two messages: 10 to 40 tokens in the templates of common models."""
_FEW_TOKENS = 200
"""Below this the template's own tokens blur what an answer says about the text."""
_CAUTION = 0.9
"""Of a measured ratio, since a table or a list of references has more tokens than the text before it."""


@dataclass(frozen=True, slots=True)
class Density:
    """Characters per token of one model on the texts of this run: an estimate that learns.

    It starts at 3.0, below the 3.5 to 4.5 that English papers have with today's vocabularies: too small a
    section costs a little time, too large a one costs a refused request.
    """

    chars_per_token: float = 3.0

    def learned(self, chars: int, tokens: int) -> Density:
        """After a request of so many characters was counted: down at once, up in steps of a quarter."""
        if tokens < _FEW_TOKENS:
            return self
        seen = min(8.0, max(0.5, _CAUTION * chars / tokens))
        if seen > self.chars_per_token:
            seen = self.chars_per_token + (seen - self.chars_per_token) / 4
        return Density(seen)

    def exceeded(self) -> Density:
        """After a request turned out too large for the context."""
        return Density(max(0.5, 0.7 * self.chars_per_token))


def answer_tokens(wanted: int, context_tokens: int) -> int:
    """How long an answer may be: as the prompt says, but at most a quarter of the context.

    The quarter leaves most of a small context to the paper, and makes sure that two partial
    answers and their merged one always fit together.
    """
    return max(1, min(wanted, context_tokens // 4))


def text_chars(*, context_tokens: int, answer_tokens: int, other_chars: int, density: Density) -> int:
    """How many characters of a document fit beside an answer and the other text of a request.

    Zero or less: not even the question fits.
    """
    tokens = context_tokens - answer_tokens - _SLACK_TOKENS
    return int(tokens * density.chars_per_token) - other_chars


# Where a text may be cut, best first; a cut falls at the end of the match. Before a heading only the last of
# many blank lines is looked at: to look from each of them to the last takes the square of their number.
_BORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n[^\S\n]*\n(?=\#{1,6}\s|\d{1,2}(?:\.\d{1,2}){0,3}\.?\s+[A-Z]|(?i:abstract|introduction|methods?|results|discussion|conclusions?|references|appendix)\b)",
        r"\n(?:[^\S\n]*\n)+",
        r"\n",
        r"(?<=[.!?;])\s",
        r"\s",
    )
)


def split(text: str, max_chars: int) -> tuple[str, ...]:
    """The text in pieces of at most so many characters, of similar length, cut where a reader would cut.

    Nothing is lost and nothing added: the pieces joined are the text. Raises `ValueError` for a
    limit below 1.
    """
    if max_chars < 1:
        raise ValueError("a piece holds at least one character")
    pieces: list[str] = []
    start = 0
    while len(text) - start > max_chars:
        rest = len(text) - start
        # Even pieces read better than full ones with a crumb at the end.
        even = -(-rest // -(-rest // max_chars))
        end = _border(text, earliest=start + (even + 1) // 2, wanted=start + even, latest=start + max_chars)
        pieces.append(text[start:end])
        start = end
    return (*pieces, text[start:])


def _border(text: str, *, earliest: int, wanted: int, latest: int) -> int:
    for border in _BORDERS:
        # Looking a little before `earliest` finds a blank line that ends after it.
        ends = [
            match.end()
            for match in border.finditer(text, max(0, earliest - 2), latest)
            if earliest <= match.end() <= latest
        ]
        if ends:
            return min(ends, key=lambda end: abs(end - wanted))
    return wanted


def groups(lengths: Sequence[int], max_chars: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours that are merged together: indices in order, as many as fit, but two at least.

    Two partial answers always fit (see `answer_tokens`), whatever an estimate says; and with groups of
    two the number of answers shrinks, so that merging ends. Only a last one may be alone.
    """
    made: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if made and (len(made[-1]) < 2 or filled + length <= max_chars):
            made[-1].append(index)
            filled += length
        else:
            made.append([index])
            filled = length
    return tuple(map(tuple, made))
