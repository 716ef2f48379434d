"""Inputs that are nearly right: a case of the corpus, and edits of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

MOST_BYTES = 64 * 1024
"""Of a mutation; size alone is not what is looked for here."""

COMMON: tuple[bytes, ...] = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x7f", b"\x80", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf"),
    *(b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\xc0\x80", b"\xe2\x80\xae", b"\x1b[31m", b"%00", b"%0d%0a"),
    *(b"0", b"1", b"-1", b"9" * 20, b"9" * 400, b"1e999", b"-0.0", b"NaN", b"Infinity", b"0x1"),
    *(b"null", b"true", b"[]", b"{}", b'""', b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u0000"),
    *(b"\\ud800", b"[" * 200, b'{"a":' * 200, b"a" * 300, b"../", b"'", b";", b"//", b"/*", b"*/", b"#"),
)
"""What parsers have tripped over before."""


class Kind(Enum):
    INSERT = 0
    """A word of the target's, or one that is trouble everywhere."""
    CUT = 1
    FLIP = 2
    """One byte becomes another."""
    REPEAT = 3
    """A stretch stands there again."""
    GRAFT = 4
    """A stretch of another case."""
    ALTER = 5
    """A stretch is overwritten by a word."""


@dataclass(frozen=True, slots=True)
class Edit:
    kind: Kind
    at: int
    """Where, as a share of the whole in 65536ths."""
    size: int
    """In bytes, of what is cut, repeated or grafted."""
    pick: int
    """Which word, which byte, which other case."""


def mutated(case: bytes, edits: Sequence[Edit], words: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """At most `MOST_BYTES` of what the edits, one after the other, make of a case."""
    known = (*words, *COMMON)
    data = bytearray(case[:MOST_BYTES])
    for edit in edits:
        at = edit.at * (len(data) + 1) >> 16
        word = known[edit.pick % len(known)]
        match edit.kind:
            case Kind.INSERT:
                data[at:at] = word
            case Kind.CUT:
                del data[at : at + edit.size]
            case Kind.FLIP:
                data[at : at + 1] = bytes([edit.pick & 255])
            case Kind.REPEAT:
                data[at:at] = data[at : at + edit.size]
            case Kind.GRAFT:
                other = others[edit.pick % len(others)]
                begin = edit.pick % (len(other) + 1)
                data[at:at] = other[begin : begin + edit.size]
            case Kind.ALTER:
                data[at : at + len(word)] = word
    return bytes(data[:MOST_BYTES])


def any_edits(dice: Random) -> list[Edit]:
    """As many as find something: mostly few."""
    return [
        Edit(Kind(dice.randrange(6)), dice.randrange(1 << 16), dice.choice(SIZES), dice.randrange(1 << 16))
        for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5, 9)))
    ]


SIZES = (1, 1, 2, 4, 8, 16, 64, 300)


def cuts(data: bytes) -> list[bytes]:
    """The data in pieces, as a network may bring them; the same data always in the same ones."""
    dice = Random(len(data) * 31 + sum(data[:64]))
    pieces, at = [], 0
    while at < len(data):
        size = dice.choice((1, 2, 7, 40, 400, len(data)))
        pieces.append(data[at : at + size])
        at += size
    return pieces
