"""Server-sent events out of a byte stream, cut anywhere. Pure; knows nothing of sockets.

Follows the WHATWG "event stream" grammar as far as LLM servers use it: only `data` fields matter, lines
end in LF or CRLF, comment lines (`: keepalive`, sent by MLX during prefill) carry nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_EVENT_BYTES = 1024 * 1024
"""An event longer than this is an error of the worker (RELIABILITY E6), not something to buffer."""


class FramingError(Exception):
    """The bytes are not a stream of events that we are willing to hold."""


@dataclass(slots=True)
class EventFrames:
    """Feed it what arrives; it gives the `data` of each event that is complete, in order."""

    _rest: bytes = b""
    _data: list[bytes] = field(default_factory=list)
    _held: int = 0

    @property
    def holds(self) -> bool:
        """A part of an event has come, and not yet its end."""
        return bool(self._rest or self._data)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that this chunk completes. Raises `FramingError`."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data.clear()
                    self._held = 0
            elif line.startswith(b"data:"):
                value = line[5:].removeprefix(b" ")
                self._data.append(value)
                self._held += len(value) + 1  # its line break; also of lines without anything
        if len(self._rest) + self._held > MAX_EVENT_BYTES:
            raise FramingError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def end(self) -> list[bytes]:
        """The stream is over. A last event counts if its line did: some servers leave out the blank one."""
        events = self.feed(b"\n") if self._rest.startswith(b"data:") and _is_whole(self._rest) else []
        self._rest = b""
        if self._data:
            events.append(b"\n".join(self._data))
            self._data.clear()
        return events


def _is_whole(line: bytes) -> bool:
    """A line without its end is trusted only if nothing can be missing: a closed object, or the end mark."""
    value = line[5:].strip()
    return value == b"[DONE]" or (value.startswith(b"{") and value.endswith(b"}"))


def event(data: bytes) -> bytes:
    """One event as it goes over the wire."""
    if b"\n" in data:
        data = data.replace(b"\n", b"\ndata: ")
    return b"data: " + data + b"\n\n"
