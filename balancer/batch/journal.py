"""What has been answered so far, in one append-only file: the reason why a run can be broken off at any time.

Each answer is a JSON line that is on disk (fsync) before it counts. A run that was killed leaves at most
a torn last line, which is passed over when the journal is opened again. `replay` is pure; `Journal` is
the file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class JournalError(Exception):
    """The journal cannot be used; the message says what to do."""


class Subject(BaseModel):
    """What an answer is about. If any of it changes, the answer is void."""

    model_config = ConfigDict(frozen=True)

    document: str
    """SHA-256 of the file."""
    preset: str
    """`Preset.fingerprint`."""
    model: str


class Answer(BaseModel):
    """A text that the model gave, with its price."""

    model_config = ConfigDict(frozen=True)

    text: str
    prompt_tokens: int = Field(default=0, ge=0)
    """Of all the requests that led to this answer; 0 where the endpoint did not count."""
    output_tokens: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    """Of all the requests that led to this answer, each counted in full."""
    sections: int = Field(default=1, ge=1)
    """Into how many the paper was cut for it."""
    cut_short: bool = False
    """The model was stopped at `max_tokens`, in this answer or in one that it was merged from."""


class Answered(BaseModel):
    """One line: an answer to a prompt, about the whole paper or (`part` is not empty) a step towards it."""

    kind: Literal["answered"] = "answered"
    subject: Subject
    prompt: str
    part: str = ""
    """Identifies the text that a partial answer is about."""
    answer: Answer


class Cut(BaseModel):
    """One line: the paper is read in sections of at most so many characters."""

    kind: Literal["cut"] = "cut"
    subject: Subject
    section_chars: int = Field(ge=1)


Entry = Answered | Cut
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


@dataclass(slots=True)
class Memory:
    """What a journal says."""

    answers: dict[tuple[Subject, str, str], Answer] = field(default_factory=dict)
    cuts: dict[Subject, int] = field(default_factory=dict)

    def take(self, entry: Entry) -> None:
        match entry:
            case Answered():
                self.answers[entry.subject, entry.prompt, entry.part] = entry.answer
            case Cut():
                self.cuts[entry.subject] = entry.section_chars


def replay(lines: Iterable[bytes]) -> Memory:
    """The memory after these lines; a line that is no entry is passed over, what it said is asked again."""
    memory = Memory()
    for line in lines:
        try:
            memory.take(_ENTRY.validate_json(line))
        except ValidationError:
            continue
    return memory


@dataclass(slots=True)
class Journal:
    """An open journal. Made by `opened`."""

    _file: int
    _memory: Memory
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, subject: Subject, prompt: str, part: str = "") -> Answer | None:
        return self._memory.answers.get((subject, prompt, part))

    def section_chars(self, subject: Subject) -> int | None:
        """How this paper was cut before; None: it was not."""
        return self._memory.cuts.get(subject)

    async def keep(self, entry: Entry) -> None:
        """Returns when the entry is on disk. Raises `OSError` (disk full)."""
        await asyncio.to_thread(self._append, entry.model_dump_json().encode() + b"\n")
        self._memory.take(entry)

    def _append(self, line: bytes) -> None:
        # The lock belongs to the thread: a caller that is cancelled leaves, the write it began does not.
        with self._writing:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)

    def close(self) -> None:
        """Waits for a write under way; one that a cancelled caller left behind fails, and is not missed."""
        with self._writing:
            file, self._file = self._file, -1
            os.close(file)


@contextmanager
def opened(path: Path) -> Iterator[Journal]:
    """The journal at a path, for one process at a time.

    Raises `JournalError` where another run writes it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise JournalError(
            f"another run is writing {path.parent}; wait for it, or choose another --out"
        ) from None
    try:
        with open(file, "rb", closefd=False) as lines:
            memory = replay(lines)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")  # ends the torn line, so that the next entry does not hang on to it
    except BaseException:
        os.close(file)
        raise
    journal = Journal(file, memory)
    try:
        yield journal
    finally:
        journal.close()
