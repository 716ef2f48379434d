"""What a clean request for an answer looks like, up to its body. Pure.

The hot path reads only requests about which no two parsers can disagree: this grammar is narrower than
HTTP's in every place where servers have been tricked (lengths given twice or in two ways, folded lines,
stray bytes, odd line ends). Whatever else comes is left, untouched, to aiohttp's parser and its verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from balancer.core.model import Endpoint


@dataclass(frozen=True, slots=True)
class HeadPolicy:
    """Bounds of a clean head; one beyond them is for aiohttp, which has bounds of its own."""

    max_bytes: int = 16 * 1024
    max_line_bytes: int = 8190
    max_headers: int = 64
    max_pieces: int = 16
    """In which it may come: each is looked at from the head's beginning."""


class CleanHead(NamedTuple):
    endpoint: Endpoint
    headers: Mapping[str, str]
    """By names in lower case."""
    size: int
    """Of the head, in bytes; the body begins there."""
    length: int
    """Of the body, in bytes, as announced."""
    keep_alive: bool


class Incomplete:
    """So far it could become one."""


class Unclean:
    """Something else than a clean request for an answer."""


INCOMPLETE = Incomplete()
UNCLEAN = Unclean()

_ENDPOINTS: Mapping[bytes, Endpoint] = {one.value.encode("ascii"): one for one in Endpoint}
_BEGINNINGS = tuple(b"POST " + path + b" HTTP/1.1\r\n" for path in _ENDPOINTS)
_PATH_AT = len(b"POST ")

# A name, a colon, printable ASCII. Bytes beyond it are legal in values, and a matter of opinion.
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e]*\r\n)+")

_FIELDS_SO_FAR = re.compile(
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e]*\r\n)*"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+(?::[\t\x20-\x7e]*)?\r?|\r)?"
)

_LENGTH = re.compile(r"[0-9]{1,10}")
_HOST = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
_NOT_OURS = ("transfer-encoding", "expect", "upgrade", "trailer", "te")
_KEEP_ALIVE: Mapping[str, bool] = {"": True, "keep-alive": True, "close": False}


def is_host(value: str) -> bool:
    """A name or an address, with or without a port, of the characters that such things have."""
    return _HOST.fullmatch(value) is not None


def read_head(data: bytes, policy: HeadPolicy) -> CleanHead | Incomplete | Unclean:
    """What the connection's next bytes are. They may go on behind the head."""
    end = data.find(b"\r\n\r\n", 0, policy.max_bytes)
    if end < 0:
        if len(data) >= policy.max_bytes:
            return UNCLEAN
        return INCOMPLETE if _may_become_one(data) else UNCLEAN
    line_end = data.find(b"\r\n") + 2
    if line_end > end:
        return UNCLEAN  # no header at all
    beginning = data[:line_end]
    if beginning not in _BEGINNINGS:
        return UNCLEAN
    if _FIELDS.fullmatch(data, line_end, end + 2) is None:
        return UNCLEAN
    headers = _headers(data[line_end:end].decode("ascii").split("\r\n"), policy)
    if headers is None:
        return UNCLEAN
    length = headers.get("content-length", "")
    keep_alive = _KEEP_ALIVE.get(headers.get("connection", "").lower())
    if keep_alive is None or not _LENGTH.fullmatch(length) or not is_host(headers.get("host", "")):
        return UNCLEAN
    endpoint = _ENDPOINTS[beginning[_PATH_AT : -len(b" HTTP/1.1\r\n")]]
    return CleanHead(endpoint, headers, end + 4, int(length), keep_alive)


def _may_become_one(data: bytes) -> bool:
    for one in _BEGINNINGS:
        if data.startswith(one):
            return _FIELDS_SO_FAR.fullmatch(data, len(one)) is not None
    return any(one.startswith(data) for one in _BEGINNINGS)


def _headers(lines: list[str], policy: HeadPolicy) -> dict[str, str] | None:
    if len(lines) > policy.max_headers:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    if len(headers) != len(lines):
        return None  # one came twice
    for name in _NOT_OURS:
        if name in headers:
            return None
    # The bounds together allow few lines as long as that: they are looked for only where one can be.
    if sum(map(len, lines)) > policy.max_line_bytes and max(map(len, lines)) > policy.max_line_bytes:
        return None
    return headers
