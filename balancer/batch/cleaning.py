"""From the text as it lies in a file to the text that a model should read. Pure.

Everything here removes only what the paper does not say: running heads, page numbers, the hyphens of
line ends, ligatures, invisible characters. Superscripts and fractions stay (full NFKC would turn x² into
x2).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

_LIGATURES = str.maketrans(
    # U+FB05 is a long s and t; "st" is what a reader means by it.
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
)
_BREAK_MARK = "\ufffe"
"""What PDFium writes for a hyphen that is there only because a line ended."""
_EDGE_LINES = 2
"""A running head or foot stands on the first or last two lines of its page."""
_MIN_SHARE = 0.4
"""Left and right pages have heads of their own, so a head may stand on less than half of the pages."""
_MAX_HEAD_CHARS = 150

_PAGE_NUMBER = re.compile(r"[\W_]*(?:page\s*)?0(?:\s*(?:of|/)\s*0)?[\W_]*", re.IGNORECASE)
_NUMBERED_HEADING = re.compile(r"\d{1,2}(?:\.\d{1,2}){0,3}\.?\s+[A-Z][^\n]{1,70}[^\s.,;:]")
_NAMED_HEADING = re.compile(
    r"(?:abstract|summary|introduction|background|related work|methods?|materials and methods|results|"
    r"discussion|conclusions?|limitations|acknowledge?ments?|references|bibliography|appendix(?: [A-Z])?)",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """A text file made uniform: newlines, ligatures and composed letters; control characters are gone."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = text.translate(_LIGATURES)
    text = "".join(char for char in text if char in _KEPT or unicodedata.category(char) not in _INVISIBLE)
    # From the first blank of a run only: from each of them, a long run takes the square of its length.
    text = re.sub(r"(?<![ \t])[ \t]+\n", "\n", _composed(text))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co"})
"""Controls, soft hyphens and byte-order marks, lone surrogates, private use (glyphs without a meaning)."""
_KEPT = frozenset("\n\t\u200c\u200d")
"""The joiners are letters' business in Persian and in the scripts of India."""
_MAX_MARKS = 30
"""On one letter; no script has as many (Unicode Standard Annex 15, Stream-Safe Text Format)."""


def _composed(text: str) -> str:
    """Letters and their accents as one character each, where a text is one that people write.

    Accents are sorted for it, in a time that grows with the square of their number on one letter.
    """
    if text.isascii():
        return text
    runs = groupby(text, lambda char: unicodedata.combining(char) > 0)
    if any(mark and sum(1 for _ in run) > _MAX_MARKS for mark, run in runs):
        return text
    return unicodedata.normalize("NFC", text)


def pages(texts: Sequence[str]) -> str:
    """The running text of a PDF, given the text of each page."""
    heads = _running_lines([_lines(text) for text in texts])
    body = "\n".join("\n".join(_without(_lines(text), heads)) for text in texts)
    return plain(_with_headings_apart(_joined(body)))


def _lines(page: str) -> list[str]:
    page = page.replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in page.split("\n") if line.strip()]


def _edges(lines: Sequence[str]) -> set[int]:
    """Indices of the lines on which a running head or foot can stand."""
    count = len(lines)
    return {*range(min(_EDGE_LINES, count)), *range(max(0, count - _EDGE_LINES), count)}


def _masked(line: str) -> str:
    """The line with every number the same, since a page's number is what differs between its heads."""
    return re.sub(r"\d+", "0", line)


def _running_lines(lined: Iterable[Sequence[str]]) -> frozenset[str]:
    """Masked lines that stand at the edge of so many pages that they are not part of the text.

    A line of bare numbers counts only if it looks like one page number: rows of a table that
    goes over several pages look alike too.
    """
    counts: Counter[str] = Counter()
    page_count = 0
    for lines in lined:
        page_count += 1
        counts.update({_masked(lines[index]) for index in _edges(lines)})
    enough = max(2, math.ceil(page_count * _MIN_SHARE))
    return frozenset(
        line
        for line, count in counts.items()
        if count >= enough
        and len(line) <= _MAX_HEAD_CHARS
        and (_PAGE_NUMBER.fullmatch(line) or any(map(str.isalpha, line)))
    )


def _without(lines: Sequence[str], heads: frozenset[str]) -> list[str]:
    edges = _edges(lines)
    return [line for index, line in enumerate(lines) if index not in edges or _masked(line) not in heads]


def _joined(text: str) -> str:
    """Words that were cut by the end of a line are whole again.

    A word with another hyphen before the cut keeps this one too (`state-of-` / `the-art`), and so does a
    cut before a capital or a digit (`Hewlett-` / `Packard`, `COVID-` / `19`).
    """
    text = re.sub(_BREAK_MARK + r"[ \t]*\n?", "", text.replace("\u00ad\n", _BREAK_MARK))
    return re.sub(r"(?<!\S)(\S*\w)-\n(?=(\w))", _rejoin, text)


def _rejoin(cut: re.Match[str]) -> str:
    head, follower = cut[1], cut[2]
    softened = follower.islower() and "-" not in head and head[-1].isalpha()
    return head if softened else f"{head}-"


def _with_headings_apart(text: str) -> str:
    """An empty line before each line that looks like a heading, so that sections can be told apart."""
    lines = text.split("\n")
    return "\n".join(f"\n{line}" if _looks_like_heading(line) else line for line in lines)


def _looks_like_heading(line: str) -> bool:
    return bool(_NUMBERED_HEADING.fullmatch(line) or _NAMED_HEADING.fullmatch(line))
