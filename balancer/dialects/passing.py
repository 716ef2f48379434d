"""One streamed answer on its way to a client that streams: bytes in, bytes out. Pure.

Bytes pass as they are as long as they plainly are whole events that say nothing but a piece of the answer;
then nothing is parsed (DATA_PLANE, "Watching costs almost nothing"). Whatever looks different is taken apart.
Only whole events pass: an event that was torn when its worker died never reaches the client.
"""

from __future__ import annotations

from collections.abc import Callable

from balancer.dialects.framing import EventFrames, FramingError, event
from balancer.dialects.openai import AnswerError, StreamReader

MAX_UNBEGUN_BYTES = 1024 * 1024
"""So much of a stream may pass without a word of the answer before the worker is taken to be broken."""

_CONTROL = bytes(range(32))
_NO_USAGE = b'"usage":null'
_TELLING = (b'"error"', b'"finish_reason":"', b'"finish_reason": "')
"""What an event may hold that says more than a piece of the answer."""


class Passage:
    """What a client shall have of a worker's stream, as it comes."""

    def __init__(self, reader: StreamReader, seam: Callable[[bytes], bytes | None] | None = None) -> None:
        """`seam`: what an event is to the client that has the beginning of the answer from another stream
        (`continuation.Seam.read`); None: this stream is the answer from its beginning."""
        self.reader = reader
        self._seam = seam
        self._frames = EventFrames()
        self.fault: AnswerError | FramingError | None = None
        """What was wrong after the events that passed; nothing more passes."""
        self._unbegun = b""
        """Held back until the answer itself begins, so that until then another worker can take over."""

    def feed(self, data: bytes) -> bytes:
        """What the client shall have now; whole events, without `[DONE]`. Never raises, see `fault`."""
        reader = self.reader
        if reader.begun and not self._frames.holds and not reader.finishing and self._seam is None:
            count = _plain_events(data)
            if count:
                return reader.pass_on(data, count)
        try:
            events = self._frames.feed(data)
        except FramingError as error:
            self.fault = error
            return b""
        return self._taken_apart(events)

    def end(self) -> bytes:
        """The stream is over; what the client shall have of its last bytes. Never raises, see `fault`."""
        return self._taken_apart(self._frames.end())

    def _taken_apart(self, events: list[bytes]) -> bytes:
        reader = self.reader
        passed = self._unbegun
        for data in events:
            if reader.done or self.fault is not None:
                break
            try:
                mine = reader.read(data)
                if mine is not None and self._seam is not None:
                    mine = self._seam(mine)
            except AnswerError as error:
                self.fault = error
                break
            if mine is not None:
                passed += event(mine)
        if reader.begun:
            self._unbegun = b""
            return passed
        if len(passed) > MAX_UNBEGUN_BYTES:
            self.fault = AnswerError("its stream goes on without an answer")
        self._unbegun = passed
        return b""


def _plain_events(data: bytes) -> int:
    """How many events these bytes are, if they are nothing but whole events of one line, each an object in
    UTF-8 that says nothing of usage, end or error; else 0."""
    if not data.startswith(b"data: {") or not data.endswith(b"}\n\n"):
        return 0
    events = data.count(b"}\n\n")
    if data.count(b"\n\ndata: {") != events - 1:
        return 0
    if len(data.translate(None, _CONTROL)) != len(data) - 2 * events:  # a line break in an event, or worse
        return 0
    for word in _TELLING:
        if word in data:
            return 0
    if b'"usage"' in data and data.count(b'"usage"') != data.count(_NO_USAGE):
        return 0
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError:
            return 0
    return events
