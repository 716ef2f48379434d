"""How a log line looks, for people and for programs, and what it can never hold.

What came over the network cannot begin a line of its own, colour a terminal or turn the reading direction:
whatever is no printable character is escaped. Of an exception its way through our code is told; what it says
only where that cannot quote a request.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TypeAlias

import orjson

LogFormat = Literal["text", "json"]
MAX_FIELD_BYTES = 4096
"""Of a message, a traceback, or a field of a JSON line."""

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The id of the request that the running task works for; empty: none."""

Fields: TypeAlias = Callable[[], Mapping[str, object]]
"""What `extra={"fields": ...}` of a log call may give: further fields of a JSON line, made only for one."""

_SAYS_NOTHING_OF_REQUESTS = (
    AttributeError,
    ImportError,
    MemoryError,
    NameError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
)
"""They speak of our code or of the system. A KeyError or ValueError may quote what somebody sent."""
_BEGINNING = re.compile(r"[\w .,':-]*")


def harmless(text: str, limit_bytes: int = MAX_FIELD_BYTES) -> str:
    """In one line of printable characters, no longer than the limit."""
    if len(text) > limit_bytes:
        text = text[:limit_bytes]
    if not text.isprintable():
        text = "".join(map(_printable, text))
    if len(text) * 4 <= limit_bytes:
        return text
    data = text.encode()
    return text if len(data) <= limit_bytes else data[: limit_bytes - 3].decode(errors="ignore") + "..."


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def exception_lines(error: BaseException) -> list[str]:
    """Where it was raised and by which way it came, the root cause first; without anything of a request."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen and len(seen) < 8:
        seen.add(id(error))
        frames = traceback.extract_tb(error.__traceback__, limit=-20)
        own = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        lines = [*own, _named(error), *(["which led to", *lines] if lines else [])]
        following = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if following is None:
            break
        error = following
    return lines


def _named(error: BaseException) -> str:
    name = type(error).__qualname__
    if not isinstance(error, _SAYS_NOTHING_OF_REQUESTS):
        return name
    try:
        return f"{name}: {harmless(str(error), 500)}"
    except Exception:  # its own __str__ is at fault
        return name


class Ids(logging.Filter):
    """Notes on each record for which request it was made. Passes all; of a handler, since its formatter may
    run in another thread. What asyncio says of a callback or task is cut where it begins to quote them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = current_request.get()
        if record.name == "asyncio":
            found = _BEGINNING.match(record.getMessage())
            record.msg, record.args = found[0].strip() if found else "", None
        return True


class TextFormat(logging.Formatter):
    """`12:00:00 INFO    what happened id=...`; a traceback follows in lines that are indented."""

    def __init__(self, *, names: bool = False, date: bool = False) -> None:
        """`names`: of loggers. `date`: beside the time."""
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S")
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        name = f"{harmless(record.name)}: " if self._names else ""
        line = (
            f"{self.formatTime(record, self.datefmt)} {record.levelname:<7} "
            f"{name}{harmless(record.getMessage())}"
        )
        request_id = getattr(record, "request_id", "")
        if request_id:
            line += f" id={harmless(request_id, 200)}"
        error = _error_of(record)
        if error is None:
            return line
        return "\n    ".join([line, *map(harmless, exception_lines(error))])


class JsonFormat(logging.Formatter):
    """One JSON object in one line: `ts` (UTC, ISO 8601), `level`, `logger`, `message`, and where there are
    such `request_id`, `exception` and the fields of its `Fields`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        body: dict[str, object] = {
            "ts": moment.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": harmless(record.getMessage()),
        }
        request_id = getattr(record, "request_id", "")
        if request_id:
            body["request_id"] = harmless(request_id, 200)
        fields = getattr(record, "fields", None)
        if fields is not None:
            for key, value in fields().items():
                body[key] = harmless(value) if isinstance(value, str) else value
        error = _error_of(record)
        if error is not None:
            body["exception"] = harmless("; ".join(exception_lines(error)))
        try:
            return orjson.dumps(body).decode()
        except TypeError:  # a number that JSON has no room for, or a type that it does not know
            return orjson.dumps({key: harmless(str(value)) for key, value in body.items()}).decode()


def _error_of(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if isinstance(record.exc_info, tuple) else None


def formatter(kind: LogFormat, *, names: bool = False, date: bool = False) -> logging.Formatter:
    """For a handler that also has an `Ids` filter. The flags are of the text, as `TextFormat` has them."""
    return JsonFormat() if kind == "json" else TextFormat(names=names, date=date)


def log_what_nobody_caught() -> None:
    """What Python would print of an exception that ends the process or a thread, or comes out of a finalizer,
    becomes a log line like any other."""
    log = logging.getLogger("uncaught")

    def raised(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, _trace)
        else:
            log.critical("a defect ends the program", exc_info=error)

    def ignored(what: sys.UnraisableHookArgs) -> None:
        log.error("a defect in a finalizer", exc_info=what.exc_value or False)

    sys.excepthook = raised
    sys.unraisablehook = ignored
