"""Where log lines go: to stderr, by way of a bounded buffer and a thread of its own.

A terminal that is held with Ctrl-S, or a pipe that nobody empties, would otherwise stop the event loop
with the first full buffer. What does not fit is dropped, and counted. Lines are written many at a time: to
wake a thread for each would cost more than the line.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from collections import deque
from typing import TextIO

from worker_agent.log_format import Ids, LogFormat, formatter, log_what_nobody_caught

MAX_WAITING = 10_000
"""Lines; some 2 MB of them."""
GATHER_SECONDS = 0.05
"""For which the first line of several waits for the others."""
END_SECONDS = 2.0
"""At exit, for what is still to be written; a terminal that is held gets no more."""


class Lines(logging.Handler):
    """Takes records from any thread, and writes them from its own until `close`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._records: deque[logging.LogRecord] = deque()
        self._dropped = 0
        self._news = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._write_on, name="log lines", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        if len(self._records) >= MAX_WAITING:
            self._dropped += 1
            return
        # What a record refers to may change before it is written.
        record.msg, record.args = record.getMessage(), None
        self._records.append(record)
        if not self._news.is_set():
            self._news.set()

    def close(self) -> None:
        """Writes what is left."""
        self._closing = True
        self._news.set()
        self._thread.join(END_SECONDS)
        super().close()

    def _write_on(self) -> None:
        while True:
            self._news.wait()
            if not self._closing:
                time.sleep(GATHER_SECONDS)
            self._news.clear()
            closing = self._closing
            self._write()
            if closing:
                return

    def _write(self) -> None:
        lines = [self.format(self._records.popleft()) for _ in range(len(self._records))]
        if self._dropped:
            lines.append(self.format(self._dropped_record()))
            self._dropped = 0
        if lines:
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more
                self._records.clear()

    def _dropped_record(self) -> logging.LogRecord:
        told = f"{self._dropped} log lines were dropped"
        return logging.LogRecord(__name__, logging.WARNING, "", 0, told, None, None)


def set_up(level: str, kind: LogFormat = "text") -> None:
    """All log lines of the process from this level on, written off the loop; the rest at exit."""
    lines = Lines(sys.stderr)
    lines.addFilter(Ids())
    lines.setFormatter(formatter(kind))
    atexit.register(lines.close)
    # It warns, with a traceback, of each interface on which it cannot listen; whether it can listen at all
    # is said by `discovery`.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    # Of each line's origin nothing is shown, so nothing of it is looked up (logging's own way to say so).
    logging._srcfile = ""
    for looked_up in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, looked_up, False)
    logging.basicConfig(level=level, handlers=[lines], force=True)
    log_what_nobody_caught()
