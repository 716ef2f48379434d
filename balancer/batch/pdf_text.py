"""A program of its own: a PDF on stdin, the text of its pages as JSON on stdout.

Run by `papers` as a child, since PDFium is not safe in threads and a hostile or broken file may crash it
or keep it busy for ever: then only this process ends. Imports nothing of ours, so that it can be run by its
path. Answers `{"pages": [...]}`, or `{"fault": "..."}` with a sentence for the user.
"""

from __future__ import annotations

import json
import resource
import sys

import pypdfium2 as pdfium

CPU_SECONDS = 120
"""A 50-page paper takes well under 1 s."""
MAX_CHARS = 20_000_000
"""About 10 000 pages."""


def read(data: bytes) -> dict[str, object]:
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            return {"fault": "the PDF is protected by a password; save it without one and run again"}
        return {"fault": f"the PDF is damaged and cannot be opened ({error})"}
    pages: list[str] = []
    chars = 0
    for index in range(len(document)):
        try:
            page = document[index]
            text = page.get_textpage().get_text_bounded()
            page.close()
        except pdfium.PdfiumError as error:
            return {"fault": f"page {index + 1} of the PDF is damaged and cannot be read ({error})"}
        chars += len(text)
        if chars > MAX_CHARS:
            return {"fault": f"the PDF holds more than {MAX_CHARS} characters: it is no paper"}
        pages.append(text)
    return {"pages": pages}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    json.dump(read(sys.stdin.buffer.read()), sys.stdout)
