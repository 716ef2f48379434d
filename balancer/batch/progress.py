"""How a run shows that it goes on: a bar on a terminal, plain lines elsewhere (a log, a pipe)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from balancer.batch.names import readable
from balancer.batch.report import Row


@dataclass(slots=True)
class Forecast:
    """How long the rest will take, from the papers on which this run worked itself. Pure.

    A paper that an earlier run had answered costs nothing and says nothing about the others.
    """

    papers: int
    _shares: dict[int, float] = field(default_factory=dict)
    _resumed: int = 0

    def advanced(self, index: int, share: float) -> None:
        self._shares[index] = share

    def finished(self, index: int, *, asked: bool) -> None:
        if asked:
            self._shares[index] = 1.0
        else:
            self._shares.pop(index, None)
            self._resumed += 1

    def left_seconds(self, elapsed: float) -> float | None:
        """None: nothing is known yet."""
        worked = sum(self._shares.values())
        if worked == 0:
            return None
        return elapsed / worked * max(0.0, self.papers - self._resumed - worked)


def in_words(seconds: float | None) -> str:
    """`about 4 min left`."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


def _told(row: Row, asked: int) -> str:
    if row.error is not None:
        return f"failed: {readable(row.file)} ({row.error})"
    notes = [f"{len(row.answers)} answers"]
    if row.sections > 1:
        notes.append(f"read in {row.sections} sections")
    if not asked:
        notes.append("answered earlier")
    return f"done: {readable(row.file)} ({', '.join(notes)})"


QUIET_SECONDS = 30.0
"""Between two lines that say no more than that it goes on, or waits."""


def _waits(reason: str) -> str:
    return f"waiting: {reason}. It goes on by itself; Ctrl-C keeps every answer so far."


@dataclass(slots=True)
class Lines:
    """One line for each paper that is through, and one now and then in between."""

    papers: int
    say: Callable[[str], None]
    clock: Callable[[], float] = monotonic
    _started: float = field(init=False)
    _said: float = field(init=False)
    _forecast: Forecast = field(init=False)
    _through: int = 0

    def __post_init__(self) -> None:
        self._started = self._said = self.clock()
        self._forecast = Forecast(self.papers)

    def advanced(self, index: int, share: float) -> None:
        self._forecast.advanced(index, share)
        if self.clock() - self._said >= QUIET_SECONDS:
            left = in_words(self._forecast.left_seconds(self.clock() - self._started))
            self._say(f"[{self._through}/{self.papers}] at work{', ' if left else ''}{left}")

    def waits(self, reason: str) -> None:
        if self.clock() - self._said >= QUIET_SECONDS:
            self._say(_waits(reason))

    def _say(self, line: str) -> None:
        self._said = self.clock()
        self.say(line)

    def finished(self, index: int, row: Row, asked: int) -> None:
        self._forecast.finished(index, asked=asked > 0)
        self._through += 1
        left = in_words(self._forecast.left_seconds(self.clock() - self._started))
        ending = f", {left}" if left and self._through < self.papers else ""
        self._say(f"[{self._through}/{self.papers}] {_told(row, asked)}{ending}")


@dataclass(slots=True)
class Bar:
    """A bar with the time left; above it a line for each paper that failed."""

    papers: int
    progress: Progress
    clock: Callable[[], float] = monotonic
    _started: float = field(init=False)
    _waited: float = field(init=False)
    _forecast: Forecast = field(init=False)

    def __post_init__(self) -> None:
        self._started = self._waited = self.clock()
        self._forecast = Forecast(self.papers)
        self.progress.add_task("papers", total=self.papers, left="")

    def advanced(self, index: int, share: float) -> None:
        self._forecast.advanced(index, share)
        self._show()

    def finished(self, index: int, row: Row, asked: int) -> None:
        self._forecast.finished(index, asked=asked > 0)
        self.progress.advance(self.progress.task_ids[0])
        if row.error is not None:
            self.progress.console.print(f"[red]{escape(_told(row, asked))}[/red]", highlight=False)
        self._show()

    def waits(self, reason: str) -> None:
        if self.clock() - self._waited >= QUIET_SECONDS:
            self._waited = self.clock()
            self.progress.console.print(escape(_waits(reason)), highlight=False)

    def _show(self) -> None:
        left = in_words(self._forecast.left_seconds(self.clock() - self._started))
        self.progress.update(self.progress.task_ids[0], left=left)


@contextmanager
def shown(papers: int, console: Console) -> Iterator[Lines | Bar]:
    """An observer that shows a run on this console, for as long as the block lasts. Its `waits(reason)` is
    for whoever talks to the endpoint."""
    if not console.is_terminal:
        yield Lines(papers, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("Papers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(papers, progress)
