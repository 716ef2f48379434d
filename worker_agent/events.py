"""What of an engine's event stream may be handed on, and whether it came to its end. Pure.

Only complete events pass: an engine that dies in the middle of one must not leave its half before the error
that tells of it. A closed connection is no end (an engine that speaks HTTP/1.0 ends its answers by dying,
too); the protocol's own end mark is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

MAX_EVENT_BYTES = 1024 * 1024
"""A longer event is an engine's fault, and nothing to keep (RELIABILITY E6)."""

DONE = b"data: [DONE]\n\n"

_BLANK_LINES = (b"\n\n", b"\n\r\n")
# At the beginning of a line only: inside of an event's JSON a line break is written `\n`, a quote `\"`.
_DONE_EVENT = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)
_ERROR_EVENT = re.compile(rb'^data: ?\{"error"', re.MULTILINE)
_FINISHED = (b'"finish_reason":"', b'"finish_reason": "')
_BLANK_LINE = re.compile(rb"\n\r?\n")


class EventTooLong(Exception):
    """An event of more than `MAX_EVENT_BYTES`."""


class EventGate:
    """Lets the complete events of one answer through. Feed it what comes."""

    def __init__(self, choices: int = 1) -> None:
        """`choices`: how many answers in one were asked for."""
        self._choices = choices
        self._rest = bytearray()
        self._finished = 0
        self.events = 0
        """How many have passed; comments are none."""
        self.over = False
        """The end mark has passed, or an error of the engine's own: nothing follows."""

    def feed(self, chunk: bytes) -> bytes:
        """What may be handed on now. Raises `EventTooLong`."""
        if self.over:
            return b""
        rest = self._rest
        if not rest and chunk.endswith(b"\n\n"):  # whole events, as engines write them
            return self._read(chunk)
        begin = max(0, len(rest) - 2)  # a blank line may be torn, too
        rest += chunk
        end = max(
            (found + len(blank) for blank in _BLANK_LINES if (found := rest.rfind(blank, begin)) >= 0),
            default=0,
        )
        passed = bytes(rest[:end])
        del rest[:end]
        if len(rest) > MAX_EVENT_BYTES:
            raise EventTooLong
        return self._read(passed) if passed else passed

    def end(self) -> bytes | None:
        """The engine's answer is over: what completes it for the client. None: it was not whole."""
        if self.over:
            return b""
        # The last blank line is forgotten by some; some forget the end mark (RELIABILITY E2).
        if _DONE_EVENT.fullmatch(self._rest.strip()) or self._finished >= self._choices:
            self.over = True
            return DONE
        return None

    def _read(self, passed: bytes) -> bytes:
        last = None
        if b"[DONE]" in passed:
            last = _DONE_EVENT.search(passed)
        if b'{"error"' in passed:
            error = _ERROR_EVENT.search(passed)
            last = error if last is None or (error is not None and error.start() < last.start()) else last
        if last is not None:
            self.over = True
            blank = _BLANK_LINE.search(passed, last.end())
            passed = passed[: blank.end()] if blank is not None else passed
        self._finished += sum(map(passed.count, _FINISHED))
        self.events += passed.count(b"data:")
        return passed


def error_event(code: str, message: str) -> bytes:
    """How a stream that has begun ends instead of its end mark: SDKs raise it as an exception."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return b"data: " + orjson.dumps({"error": error}) + b"\n\n"


def choices_of(body: Mapping[str, Any]) -> int:
    """How many answers a request asks for: `n` to each of its prompts."""
    n, prompt = body.get("n"), body.get("prompt")
    choices = n if isinstance(n, int) and n > 0 else 1
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return choices * len(prompt) if many and isinstance(prompt, list) else choices
