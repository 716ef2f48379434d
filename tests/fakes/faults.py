"""What can be wrong with one answer of the fake engine, as values that read well in a test. Pure.

Three kinds of place: `at_token=k` is when k tokens were generated (streamed: and sent), `at_byte=k` is
when k bytes of the body were sent (HTTP's chunk framing not counted), neither is before the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import Any

import orjson


class Part(Enum):
    """The events that end a stream, which an engine can forget."""

    FINISH = auto()
    USAGE = auto()
    DONE = auto()


class How(Enum):
    """How an answer breaks off."""

    CLOSE = auto()
    """The connection is closed as politely as TCP can (FIN)."""
    RESET = auto()
    """The connection is reset (RST)."""
    END = auto()
    """The HTTP answer ends as it should; only what it says is not all."""
    DIE = auto()
    """The whole engine goes: its port and every connection."""


@dataclass(frozen=True, slots=True)
class Place:
    """A point in an answer; without a number: before its head."""

    token: int | None = None
    byte: int | None = None

    def __post_init__(self) -> None:
        if self.token is not None and self.byte is not None:
            raise ValueError("a place is at a token or at a byte")


@dataclass(frozen=True, slots=True)
class Break:
    how: How
    place: Place


@dataclass(frozen=True, slots=True)
class Stall:
    place: Place
    seconds: float | None
    """None: until `FakeEngine.resume`."""
    comment_seconds: float | None
    """How often a stalled stream sends an SSE comment; None: it is silent."""


@dataclass(frozen=True, slots=True)
class Flood:
    """The same bytes again and again between two events."""

    at_token: int
    data: bytes
    times: int | None
    """None: for as long as the client stays."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent instead of an answer."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with one answer. Faults of different kinds join with `&`.

    Those that speak of events (`truncate`, `no_end`, `no_done`, `error_event`, `insert`, `garbage`,
    `invalid_utf8`, `comments`, `flood`, `long_line`, `doubled`) leave an answer that is not streamed as it
    is. A place that an answer never reaches does nothing: `Request.outcome` says how it really went.
    """

    reply: Reply | None = None
    breaks: Break | None = None
    stalls: tuple[Stall, ...] = ()
    inserts: tuple[tuple[int, bytes], ...] = ()
    omits: tuple[Part, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    floods: tuple[Flood, ...] = ()
    claims: tuple[tuple[str, Any], ...] = ()
    comments_between: bool = False
    doubles: bool = False
    never_stops: bool = False
    slice_bytes: int | None = None
    length_off_by: int = 0

    def __and__(self, other: Fault) -> Fault:
        """Both at once. Raises ValueError where that has no meaning (an answer breaks off once)."""
        both: dict[str, Any] = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, tuple):
                both[each.name] = mine + theirs
            elif mine != each.default and theirs != each.default and mine != theirs:
                raise ValueError(f"two faults disagree on {each.name}")
            else:
                both[each.name] = theirs if mine == each.default else mine
        return Fault(**both)

    @classmethod
    def status(
        cls,
        code: int,
        message: str = "scripted",
        *,
        retry_after: str | None = None,
        word: str | None = None,
    ) -> Fault:
        """An error answer in OpenAI's form; `retry_after` is the header, as it is sent; `word` is the code in
        the body, the status if it is left out."""
        headers = () if retry_after is None else (("Retry-After", retry_after),)
        return cls(reply=Reply(code, error_body(word or code, message)), headers=headers)

    @classmethod
    def error_in_body(cls, message: str = "scripted") -> Fault:
        """Status 200, and an error in the body."""
        return cls(reply=Reply(200, error_body(500, message)))

    @classmethod
    def reply_with(cls, body: bytes, *, status: int = 200) -> Fault:
        """Exactly these bytes as the body, whatever was asked."""
        return cls(reply=Reply(status, body))

    @classmethod
    def close(cls, *, at_token: int | None = None, at_byte: int | None = None) -> Fault:
        """The connection is closed there (`at_byte=0`: just after the head)."""
        return cls(breaks=Break(How.CLOSE, Place(at_token, at_byte)))

    @classmethod
    def reset(cls, *, at_token: int | None = None, at_byte: int | None = None) -> Fault:
        """The connection is reset there (RST)."""
        return cls(breaks=Break(How.RESET, Place(at_token, at_byte)))

    @classmethod
    def die(cls, *, at_token: int | None = None, at_byte: int | None = None) -> Fault:
        """The engine goes there, with all that it runs: see `FakeEngine.die`; a process exits with 1."""
        return cls(breaks=Break(How.DIE, Place(at_token, at_byte)))

    @classmethod
    def truncate(cls, *, at_token: int | None = None, at_byte: int | None = None) -> Fault:
        """The stream ends there by HTTP's rules: no error, no finish_reason, no `[DONE]`."""
        return cls(breaks=Break(How.END, Place(at_token, at_byte)))

    @classmethod
    def stall(
        cls,
        *,
        at_token: int | None = None,
        at_byte: int | None = None,
        seconds: float | None = None,
        comment_seconds: float | None = None,
    ) -> Fault:
        """Nothing more comes for `seconds` (None: until `FakeEngine.resume`), then it goes on.

        With `comment_seconds`, a stalled stream sends an SSE comment so often, as mlx_lm does in prefill.
        """
        return cls(stalls=(Stall(Place(at_token, at_byte), seconds, comment_seconds),))

    @classmethod
    def no_end(cls) -> Fault:
        """All tokens, then neither finish_reason nor usage nor `[DONE]`."""
        return cls(omits=(Part.FINISH, Part.USAGE, Part.DONE))

    @classmethod
    def no_done(cls) -> Fault:
        """A finish_reason, but no `[DONE]`."""
        return cls(omits=(Part.DONE,))

    @classmethod
    def error_event(
        cls, *, at_token: int, message: str = "scripted", code: int | str = 500, then_done: bool = False
    ) -> Fault:
        """An error as an event of the stream, which ends there (with `[DONE]`, as vLLM does, or not). An
        agent whose engine died says code `engine_died`."""
        event = b"data: " + error_body(code, message) + b"\n\n" + (DONE_EVENT if then_done else b"")
        return cls.insert(event, at_token=at_token) & cls.truncate(at_token=at_token)

    @classmethod
    def insert(cls, data: bytes, *, at_token: int) -> Fault:
        """These bytes between two events of the stream."""
        return cls(inserts=((at_token, data),))

    @classmethod
    def garbage(cls, *, at_token: int) -> Fault:
        """A line that no SSE parser knows, and an event that is not JSON."""
        return cls.insert(b"}{ no field of SSE\n\ndata: {not json\n\n", at_token=at_token)

    @classmethod
    def invalid_utf8(cls, *, at_token: int) -> Fault:
        """An event whose content is not UTF-8."""
        event = b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xc3\x28"}}]}\n\n'
        return cls.insert(event, at_token=at_token)

    @classmethod
    def flood(cls, data: bytes, *, at_token: int, times: int | None = None) -> Fault:
        """These bytes so many times between two events; None: until the client has had enough."""
        return cls(floods=(Flood(at_token, data, times),))

    @classmethod
    def long_line(cls, *, at_token: int, megabytes: int) -> Fault:
        """An event so long, of which no line break comes before its end."""
        piece = b"x" * 65536
        opening = cls.insert(b'data: {"choices":[{"index":0,"delta":{"content":"', at_token=at_token)
        return opening & cls.flood(piece, at_token=at_token, times=megabytes * 16)

    @classmethod
    def doubled(cls) -> Fault:
        """Each event comes twice."""
        return cls(doubles=True)

    @classmethod
    def claim(cls, **members: Any) -> Fault:
        """An answer that says this of itself (`model=`, `id=`, `usage=`), true or not."""
        return cls(claims=tuple(members.items()))

    @classmethod
    def comments(cls) -> Fault:
        """An SSE comment before each event."""
        return cls(comments_between=True)

    @classmethod
    def sliced(cls, *, size: int = 1) -> Fault:
        """Each `size` bytes of the body come in an HTTP chunk and a write of their own."""
        return cls(slice_bytes=size)

    @classmethod
    def endless(cls) -> Fault:
        """It never stops, whatever max_tokens says. Not streamed, it never answers."""
        return cls(never_stops=True)

    @classmethod
    def wrong_length(cls, *, by: int) -> Fault:
        """Content-Length says `by` bytes more (or fewer) than are sent; not for streams."""
        return cls(length_off_by=by)

    @classmethod
    def with_headers(cls, headers: Mapping[str, str]) -> Fault:
        """These headers too, sent as they are."""
        return cls(headers=tuple(headers.items()))

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from a command line: `ok`, `stall:at_token=3,seconds=0.5`, `comments & close:at_byte=9`.

        Names and arguments are those of the constructors above. Raises ValueError.
        """
        fault = OK
        for one in text.split("&"):
            name, _, rest = one.strip().partition(":")
            if name not in _SPOKEN_FAULTS:
                raise ValueError(f"no fault {name!r}; there are {', '.join(sorted(_SPOKEN_FAULTS))}")
            named = dict(pair.split("=", 1) for pair in rest.split(",") if rest)
            try:
                fault &= _SPOKEN_FAULTS[name](**{key: orjson.loads(value) for key, value in named.items()})
            except TypeError as error:
                raise ValueError(f"{one.strip()}: {error}") from None
        return fault


OK = Fault()
"""Nothing goes wrong."""

DONE_EVENT = b"data: [DONE]\n\n"

_SPOKEN_FAULTS: dict[str, Callable[..., Fault]] = {
    "ok": Fault,
    "status": Fault.status,
    "error_in_body": Fault.error_in_body,
    "close": Fault.close,
    "reset": Fault.reset,
    "die": Fault.die,
    "truncate": Fault.truncate,
    "stall": Fault.stall,
    "no_end": Fault.no_end,
    "no_done": Fault.no_done,
    "error_event": Fault.error_event,
    "garbage": Fault.garbage,
    "invalid_utf8": Fault.invalid_utf8,
    "comments": Fault.comments,
    "sliced": Fault.sliced,
    "doubled": Fault.doubled,
    "long_line": Fault.long_line,
    "claim": Fault.claim,
    "endless": Fault.endless,
    "wrong_length": Fault.wrong_length,
}

_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(code: int | str, message: str) -> bytes:
    kind = _ERROR_TYPES.get(code, "server_error") if isinstance(code, int) else "server_error"
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
