"""What a GGUF file says of its model, from the first bytes of it. Pure.

Only what tells how much memory a token takes in the cache. The header is a list of keys and values in which
those stand before the tokenizer's long lists, so that its beginning is enough.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress

HEAD_BYTES = 64 * 1024
_F16_BYTES = 2  # llama.cpp keeps keys and values as f16 unless told otherwise, and we do not tell it
_STRING, _LIST = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def cache_bytes_per_token(head: bytes) -> int | None:
    """Bytes of keys and values for one token over all layers; None: the beginning of the file does not tell.

    `head`: the first HEAD_BYTES of the file, or all of it.
    """
    facts = _facts(head)
    kind = facts.get("general.architecture")

    def count(key: str) -> int | None:
        value = facts.get(f"{kind}.{key}")
        return value if isinstance(value, int) and 0 < value < 2**24 else None

    layers, heads, width = count("block_count"), count("attention.head_count"), count("embedding_length")
    # Where each layer has its own number of heads it is a list, and no count.
    kv_heads = count("attention.head_count_kv") if f"{kind}.attention.head_count_kv" in facts else heads
    if layers is None or heads is None or kv_heads is None or width is None:
        return None
    key, value = (count(f"attention.{part}_length") or width // heads for part in ("key", "value"))
    return layers * kv_heads * (key + value) * _F16_BYTES


def _facts(head: bytes) -> dict[str, object]:
    """Keys with their values, as far as the bytes go; a list's value is None."""
    if head[:4] != b"GGUF":
        return {}
    facts: dict[str, object] = {}
    with suppress(_Unreadable):
        for key, value in _Reader(head).pairs():
            facts[key] = value
    return facts


class _Unreadable(Exception):
    """The bytes end within a value, or are none of GGUF's."""


class _Reader:
    def __init__(self, head: bytes) -> None:
        self._head = head
        self._at = 4

    def pairs(self) -> Iterator[tuple[str, object]]:
        _version, _tensors, count = self._number("<I"), self._number("<Q"), self._number("<Q")
        for _ in range(int(count)):
            yield self._string(), self._value(int(self._number("<I")))

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _LIST:
            item, count = int(self._number("<I")), int(self._number("<Q"))
            self._skip(item, count)
            return None
        if kind not in _SCALARS:
            raise _Unreadable
        return self._number(_SCALARS[kind])

    def _skip(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self._take(struct.calcsize(_SCALARS[kind]) * count)
        elif kind == _STRING:
            for _ in range(count):
                self._string()
        else:
            raise _Unreadable  # lists of lists are not used

    def _string(self) -> str:
        return self._take(int(self._number("<Q"))).decode(errors="replace")

    def _number(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._head):
            raise _Unreadable
        piece, self._at = self._head[self._at : end], end
        return piece
