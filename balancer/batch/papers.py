"""From files to texts: which papers are meant, and what one of them says.

Nothing here blocks the event loop: files are read in a thread, PDFs by a child process (see `pdf_text`).
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
import os
import signal
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from balancer.batch import cleaning, pdf_text
from balancer.batch.names import readable

SUFFIXES = (".pdf", ".txt", ".md")
MAX_FILE_BYTES = 128 * 1024 * 1024
PDF_SECONDS = 180.0
"""The child limits its own processor time; this covers a machine that is too busy to give it any."""

_MIN_LETTERS_PER_PAGE = 20
"""Below this on average a PDF holds pictures of pages; a stamp or a page number is all its text."""


class PaperFault(Exception):
    """This paper cannot be read; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of a paper, identified."""

    path: Path
    data: bytes
    sha256: str


def expand(paths: Sequence[Path], *, out: Path) -> list[Path]:
    """The papers that are meant, in the order in which they were named, each once.

    A folder stands for the papers in it and below, by name; hidden files, a README and what lies in the
    folder of the results are left out. Raises `PaperFault` for a path that does not exist or is of another
    kind, and where reports could overwrite papers.
    """
    results = out.resolve()
    meant: dict[Path, Path] = {}
    for path in paths:
        if results in (path.resolve(), path.parent.resolve()) and path.exists():
            # A report is called as its paper: it could take the place of a file that is the user's.
            raise PaperFault(
                "the reports would lie among the papers: "
                f"choose a folder other than {readable(out)} for --out"
            )
        if path.is_dir():
            for found in _in_folder(path):
                if not found.resolve().is_relative_to(results):
                    meant.setdefault(found.resolve(), found)
        elif not path.exists():
            raise PaperFault(f"there is no file or folder {readable(path)}")
        elif path.suffix.lower() not in SUFFIXES:
            raise PaperFault(f"{readable(path)} is none of {', '.join(SUFFIXES)}: convert it first")
        elif not path.is_file():
            raise PaperFault(f"{readable(path)} is no file: a pipe or a device is no paper")
        else:
            meant.setdefault(path.resolve(), path)
    return list(meant.values())


def _in_folder(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if (
            path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not hidden
            and path.stem.lower() != "readme"
        ):
            yield path


def load(path: Path) -> Document:
    """Blocks; raises `PaperFault`."""
    try:
        # Without O_NONBLOCK a pipe that nobody writes to would keep this thread for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PaperFault("it is no file: a pipe or a device is no paper")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PaperFault(f"the file cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise PaperFault(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
    return Document(path, data, hashlib.sha256(data).hexdigest())


async def text_of(document: Document) -> str:
    """The cleaned text; raises `PaperFault`: damaged, protected, a scan, empty."""
    if document.path.suffix.lower() == ".pdf":
        pages = await _pdf_pages(document.data)
        text = await asyncio.to_thread(cleaning.pages, pages)
        if not text or sum(map(str.isalpha, text)) < _MIN_LETTERS_PER_PAGE * len(pages):
            raise PaperFault(
                f"the PDF has {len(pages)} pages and no text: it is a scan. Make it searchable first "
                "(for example: ocrmypdf in.pdf out.pdf) and run again with the new file"
            )
        return text
    return await asyncio.to_thread(_plain_text, document.data)


def _plain_text(data: bytes) -> str:
    text = decode(data)
    if len(text) > pdf_text.MAX_CHARS:
        raise PaperFault(f"the file holds more than {pdf_text.MAX_CHARS} characters: it is no paper")
    text = cleaning.plain(text)
    if not text:
        raise PaperFault("the file is empty")
    return text


def decode(data: bytes) -> str:
    """A text file's characters: by its byte-order mark, else UTF-8, else Windows' or ISO's Latin letters.

    Raises `PaperFault` for what is not text. Pure.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    if b"\0" in data:
        raise PaperFault("the file is not text, whatever its name says")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")  # every byte is a letter of it


async def _pdf_pages(data: bytes) -> list[str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",  # the folder of the papers may hold a json.py
        pdf_text.__file__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which then ends its children itself
    )
    try:
        async with asyncio.timeout(PDF_SECONDS):
            output, _ = await child.communicate(data)
    except TimeoutError:
        raise PaperFault(f"reading the PDF did not end within {PDF_SECONDS:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise PaperFault(f"the PDF reader gave up on this file ({_ending(child.returncode)})")
    answer = json.loads(output)
    if "fault" in answer:
        raise PaperFault(str(answer["fault"]))
    return [str(page) for page in answer["pages"]]


def _ending(returncode: int) -> str:
    if returncode == -signal.SIGXCPU:
        return f"more than {pdf_text.CPU_SECONDS} s of processor time"
    return f"exit status {returncode}"
