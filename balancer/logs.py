"""Where log lines go: to stderr, by way of a bounded queue and a thread of its own.

A terminal that is held with Ctrl-S, or a pipe that nobody empties, would otherwise stop the event loop
with the first full buffer. What does not fit into the queue is dropped, and counted.
"""

from __future__ import annotations

import atexit
import logging
import sys
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue

MAX_WAITING = 10_000
"""Lines; some 2 MB of them."""


class _Dropping(QueueHandler):
    def __init__(self, queue: Queue[logging.LogRecord]) -> None:
        super().__init__(queue)
        self._lines = queue
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                note = logging.LogRecord(
                    __name__, logging.WARNING, "", 0, f"{self._dropped} log lines were dropped", None, None
                )
                self._lines.put_nowait(self.prepare(note))
                self._dropped = 0
            self._lines.put_nowait(record)
        except Full:
            self._dropped += 1


def set_up(level: str) -> None:
    """All log lines of the process from this level on, written off the loop; the rest at exit."""
    queue: Queue[logging.LogRecord] = Queue(MAX_WAITING)
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    listener = QueueListener(queue, stderr)
    listener.start()
    atexit.register(listener.stop)
    # It warns, with a traceback, of each interface on which it cannot listen; whether it can listen at all
    # is said by `discovery`.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    onto_the_queue = _Dropping(queue)
    onto_the_queue.setFormatter(logging.Formatter("%(message)s"))  # the line's form is given at the other end
    logging.basicConfig(level=level, handlers=[onto_the_queue], force=True)
