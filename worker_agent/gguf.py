"""What a GGUF file says of its model, from the first bytes of it. Pure.

The header is a list of keys and values in which what we ask for stands before the tokenizer's long lists, so
that its beginning is enough.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress

from worker_agent.models.local import Facts

HEAD_BYTES = 64 * 1024
_F16_BYTES = 2  # llama.cpp keeps keys and values as f16 unless told otherwise, and we do not tell it
_STRING, _LIST = 8, 9
_SHORT_LIST = 1024  # more layers than any model has
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
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
}
"""`general.file_type`: llama.cpp's `llama_ftype`."""
_SIZE = re.compile(r"(?:(\d{1,3})x)?(\d{1,5}(?:\.\d{1,3})?)([KMBT])(?:-.*)?")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def facts(head: bytes) -> Facts:
    """What it says of itself; what it does not say, or says in a way that is not understood, is None.

    `head`: the first HEAD_BYTES of the file, or all of it; of a split file, of its first part.
    """
    found = _facts(head)
    return Facts(
        cache_bytes_per_token=_cache_bytes_per_token(found),
        context_tokens=_count(found, f"{found.get('general.architecture')}.context_length"),
        parameters=_parameters(found),
        quantization=_quantization(found.get("general.file_type")),
    )


def _cache_bytes_per_token(facts: Mapping[str, object]) -> int | None:
    """As if every layer kept every token: where some look at a window only, less is taken."""
    kind = facts.get("general.architecture")
    layers, width = _count(facts, f"{kind}.block_count"), _count(facts, f"{kind}.embedding_length")
    heads = _count(facts, f"{kind}.attention.head_count")
    if layers is None or width is None:
        return None
    all_heads = _heads_of_all_layers(facts.get(f"{kind}.attention.head_count_kv"), layers, heads)
    key, value = (
        _count(facts, f"{kind}.attention.{part}_length") or (None if heads is None else width // heads)
        for part in ("key", "value")
    )
    if not all_heads or key is None or value is None:
        return None
    return all_heads * (key + value) * _F16_BYTES


def _heads_of_all_layers(told: object, layers: int, heads: int | None) -> int | None:
    """Of keys and values. A list has each layer's own number, 0 for one that keeps no tokens."""
    if isinstance(told, list):
        whole = len(told) == layers and all(isinstance(each, int) and 0 <= each < 2**16 for each in told)
        return sum(told) if whole else None
    each = told if isinstance(told, int) and 0 < told < 2**24 else heads if told is None else None
    return None if each is None else layers * each


def _count(facts: Mapping[str, object], key: str) -> int | None:
    value = facts.get(key)
    return value if isinstance(value, int) and 0 < value < 2**30 else None


def _parameters(facts: Mapping[str, object]) -> int | None:
    """`7B`, `135M`, `8x7B`: as whoever made the file called its size."""
    told = facts.get("general.parameter_count")
    if isinstance(told, int) and 0 < told < 2**50:
        return told
    label = facts.get("general.size_label")
    found = _SIZE.fullmatch(label) if isinstance(label, str) else None
    if found is None:
        return None
    return int(int(found[1] or 1) * float(found[2]) * _UNITS[found[3]])


def _quantization(kind: object) -> str:
    return _FILE_TYPES.get(kind, "") if isinstance(kind, int) else ""


def _facts(head: bytes) -> dict[str, object]:
    """Keys with their values, as far as the bytes go; a list's value is None unless it is a short one of
    numbers."""
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
            if item in _SCALARS and count <= _SHORT_LIST:
                return [self._number(_SCALARS[item]) for _ in range(count)]
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
