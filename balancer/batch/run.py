"""One batch run: papers in, reports out. Ties the pure parts to files and to the endpoint.

`Run.all` is the story of a run, `_paper` of a paper, `_questions` of its questions. Whatever is answered
goes to the journal first, so that the run may end at any moment, and a second one goes on from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from balancer.batch import asks, papers, sections
from balancer.batch.asks import Place, Request
from balancer.batch.client import Asker, AskFault, ContextExceeded, OfferedModel, Reply
from balancer.batch.journal import Answer, Answered, Cut, Journal, Subject
from balancer.batch.names import report_names
from balancer.batch.papers import PaperFault
from balancer.batch.presets import Preset, Prompt
from balancer.batch.report import Row, kept_rows, markdown

RESULTS = "results.jsonl"
JOURNAL = "journal.jsonl"

_READ_AT_ONCE = 2
"""Files in memory, PDFs being opened: enough to keep the models busy, little beside them."""

_T = TypeVar("_T")


class Observer(Protocol):
    """Is told how the run goes on."""

    def advanced(self, index: int, share: float) -> None:
        """This much of a paper (counted from 0) is done, from 0 to 1."""

    def finished(self, index: int, row: Row, asked: int) -> None:
        """A paper is through, after so many requests of this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done."""

    papers: tuple[Path, ...]
    preset: Preset
    model: OfferedModel
    out: Path
    papers_at_once: int = 4
    requests_at_once: int = 50


@dataclass(slots=True)
class _Steps:
    """How far one paper is."""

    index: int
    planned: int = 1
    done: int = 0
    asked: int = 0


@dataclass(slots=True)
class Run:
    """One run of a job. Make a new one for each."""

    job: Job
    asker: Asker
    journal: Journal
    observer: Observer
    _density: sections.Density = field(default_factory=sections.Density, init=False)
    _room: asyncio.Semaphore = field(init=False)
    _reading: asyncio.Semaphore = field(init=False)
    _turns: dict[Subject, asyncio.Lock] = field(default_factory=dict, init=False)
    """Copies of one paper go one after the other: what the first has asked, the next finds answered ..."""
    _refused: dict[Subject, str] = field(default_factory=dict, init=False)
    """... and what it got no answer to in this run is not asked again either."""

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.job.requests_at_once)
        self._reading = asyncio.Semaphore(_READ_AT_ONCE)

    async def all(self) -> tuple[Row, ...]:
        """A row for each paper, in the order of the papers; reports and `results.jsonl` are written.

        A run that is cancelled still leaves the rows of the papers that were through, and those that an
        earlier run had left of the others. Raises `OSError` where the results cannot be written.
        """
        rows: dict[int, Row] = {}
        names = report_names(self.job.papers)
        turns = iter(enumerate(self.job.papers))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.job.papers_at_once, len(self.job.papers))):
                    group.create_task(self._papers(turns, names, rows))
        except BaseExceptionGroup as errors:
            # Not `except*`: some releases of Python 3.11 wrap what is raised from inside of it once more.
            full, others = errors.split(OSError)
            if full is None or others is not None:
                raise
            raise _first(full) from None
        finally:
            self._write_results(rows)
        return tuple(rows[index] for index in range(len(self.job.papers)))

    def _write_results(self, rows: Mapping[int, Row]) -> None:
        path = self.job.out / RESULTS
        lines = {index: row.to_json() for index, row in rows.items()}
        if len(rows) < len(self.job.papers) and path.exists():
            with path.open(encoding="utf-8", errors="replace") as old:
                lines = kept_rows(old, self.job.papers, self.job.preset.name, self.job.model.name) | lines
        _write(path, "".join(lines[index] + "\n" for index in sorted(lines)))

    async def _papers(
        self, turns: Iterator[tuple[int, Path]], names: Sequence[str], rows: dict[int, Row]
    ) -> None:
        for index, path in turns:
            steps = _Steps(index)
            row = replace(await self._paper(path, steps), report=names[index])
            await asyncio.to_thread(_write, self.job.out / names[index], markdown(row))
            rows[index] = row
            self.observer.finished(index, row, steps.asked)

    async def _paper(self, path: Path, steps: _Steps) -> Row:
        subject: Subject | None = None
        error: str | None = None
        try:
            async with self._reading:
                document = await asyncio.to_thread(papers.load, path)
                subject = self._subject(document.sha256)
                text = await papers.text_of(document) if self._open_prompts(subject) else None
                del document
            if text is not None:
                await self._asked_once(subject, text, steps)
        except (PaperFault, AskFault) as fault:
            error = str(fault)
        return Row(
            file=path,
            sha256=subject.document if subject else "",
            preset=self.job.preset.name,
            model=self.job.model.name,
            error=error,
            answers=self._answers(subject) if subject else {},
        )

    async def _asked_once(self, subject: Subject, text: str, steps: _Steps) -> None:
        async with self._turns.setdefault(subject, asyncio.Lock()):
            if subject in self._refused:
                raise AskFault(self._refused[subject])
            if not self._open_prompts(subject):
                return
            try:
                await self._questions(subject, text, steps)
            except AskFault as fault:
                self._refused[subject] = str(fault)
                raise

    def _subject(self, sha256: str) -> Subject:
        return Subject(document=sha256, preset=self.job.preset.fingerprint, model=self.job.model.name)

    def _answers(self, subject: Subject) -> dict[str, Answer]:
        found = (
            (prompt.name, self.journal.answer(subject, prompt.name)) for prompt in self.job.preset.prompts
        )
        return {name: answer for name, answer in found if answer is not None}

    def _open_prompts(self, subject: Subject) -> tuple[Prompt, ...]:
        answered = self._answers(subject)
        return tuple(prompt for prompt in self.job.preset.prompts if prompt.name not in answered)

    # How much of a paper goes into one request ...

    @property
    def _context_tokens(self) -> int:
        return self.job.model.context_tokens or sections.DEFAULT_CONTEXT_TOKENS

    def _answer_tokens(self, prompt: Prompt) -> int:
        return sections.answer_tokens(prompt.max_tokens, self._context_tokens)

    def _section_chars(self) -> int:
        """One size for all prompts of the preset, so that they share their prefix."""
        chars = sections.text_chars(
            context_tokens=self._context_tokens,
            answer_tokens=max(map(self._answer_tokens, self.job.preset.prompts)),
            other_chars=asks.longest_question_chars(self.job.preset),
            density=self._density,
        )
        return max(chars, sections.MIN_SECTION_CHARS)

    async def _questions(self, subject: Subject, text: str, steps: _Steps) -> None:
        """Ask what is open, in smaller sections each time that the context turns out too small."""
        chars = self.journal.section_chars(subject)
        if chars is None:
            chars = self._section_chars()
            await self.journal.keep(Cut(subject=subject, section_chars=chars))
        while True:
            pieces = await asyncio.to_thread(sections.split, text, chars)
            try:
                partial = await self._ask_pieces(subject, pieces, steps)
                break
            except ContextExceeded as fault:
                self._density = self._density.exceeded()
                chars = max(map(len, pieces)) // 2
                if chars < sections.MIN_SECTION_CHARS:
                    raise AskFault(
                        f"the context of {self.job.model.name} is too small for this preset: {fault}"
                    ) from None
                await self.journal.keep(Cut(subject=subject, section_chars=chars))
        if len(pieces) > 1:
            await _together(
                [
                    self._merge(
                        subject,
                        prompt,
                        [partial[Place(i, prompt.name)] for i in range(len(pieces))],
                        asks.merged_chars(self.job.preset, prompt, section_chars=chars),
                        steps,
                    )
                    for prompt in self._open_prompts(subject)
                ]
            )

    async def _ask_pieces(
        self, subject: Subject, pieces: Sequence[str], steps: _Steps
    ) -> dict[Place, Answer]:
        """The answer to each open prompt about each piece."""
        prompts = {prompt.name: prompt for prompt in self._open_prompts(subject)}
        count = len(pieces)
        # With its number, which the question names: two sections may hold the same text.
        parts = [
            _fingerprint(f"{i} of {count}", piece) if count > 1 else "" for i, piece in enumerate(pieces)
        ]
        given = {
            Place(i, name): answer
            for i, part in enumerate(parts)
            for name in prompts
            if (answer := self.journal.answer(subject, name, part)) is not None
        }
        steps.planned = len(prompts) * (len(pieces) + (len(pieces) > 1))
        steps.done = len(given)

        async def ask(place: Place) -> None:
            prompt = prompts[place.prompt]
            request = asks.about_text(
                self.job.preset,
                prompt,
                pieces[place.section],
                section=place.section,
                sections=len(pieces),
                model=self.job.model.name,
                max_tokens=self._answer_tokens(prompt),
            )
            answer = _answer(await self._send(request, steps))
            given[place] = answer
            await self._keep(subject, prompt, parts[place.section], answer)
            self._step(steps)

        for places in asks.rounds(len(pieces), tuple(prompts), given.keys()):
            await _together([ask(place) for place in places])
        return given

    # ... and how the answers about sections become one.

    async def _merge(
        self, subject: Subject, prompt: Prompt, partial: Sequence[Answer], max_chars: int, steps: _Steps
    ) -> None:
        """Neighbours first, and what comes of them again, until one answer is left.

        How many at once follows from what the journal says alone, and not from what this run has learned
        of the model: a run that is resumed makes the same groups, and finds their answers.
        """
        count = len(partial)
        level = list(partial)
        while len(level) > 1:
            lengths = [len(asks.merged_material([answer.text])) for answer in level]
            groups = sections.groups(lengths, max_chars)
            try:
                level = await _together(
                    [self._merged(subject, prompt, [level[i] for i in group], steps) for group in groups]
                )
            except ContextExceeded as fault:
                if max(map(len, groups)) == 2:
                    raise AskFault(
                        f"the context of {self.job.model.name} is too small to merge two answers: {fault}"
                    ) from None
                self._density = self._density.exceeded()
                max_chars = max(sum(lengths[i] for i in group) for group in groups) // 2
        await self._keep(subject, prompt, "", level[0].model_copy(update={"sections": count}))
        self._step(steps)

    async def _merged(
        self, subject: Subject, prompt: Prompt, group: Sequence[Answer], steps: _Steps
    ) -> Answer:
        if len(group) == 1:
            return group[0]
        part = _fingerprint("merged", *(answer.text for answer in group))
        if known := self.journal.answer(subject, prompt.name, part):
            return known
        request = asks.merging(
            self.job.preset,
            prompt,
            [answer.text for answer in group],
            model=self.job.model.name,
            max_tokens=self._answer_tokens(prompt),
        )
        reply = await self._send(request, steps)
        answer = _answer(reply, *group)
        await self._keep(subject, prompt, part, answer)
        return answer

    async def _send(self, request: Request, steps: _Steps) -> Reply:
        async with self._room:
            steps.asked += 1
            reply = await self.asker.ask(request)
        self._density = self._density.learned(request.chars, reply.prompt_tokens)
        return reply

    async def _keep(self, subject: Subject, prompt: Prompt, part: str, answer: Answer) -> None:
        await self.journal.keep(Answered(subject=subject, prompt=prompt.name, part=part, answer=answer))

    def _step(self, steps: _Steps) -> None:
        steps.done += 1
        self.observer.advanced(steps.index, min(1.0, steps.done / steps.planned))


def _answer(reply: Reply, *of: Answer) -> Answer:
    """A reply as an answer, with the price of the partial answers that it was made of."""
    return Answer(
        text=reply.text,
        prompt_tokens=reply.prompt_tokens + sum(answer.prompt_tokens for answer in of),
        output_tokens=reply.output_tokens + sum(answer.output_tokens for answer in of),
        seconds=reply.seconds + sum(answer.seconds for answer in of),
        cut_short=reply.cut_short or any(answer.cut_short for answer in of),
    )


def _fingerprint(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


async def _together(awaitables: Sequence[Awaitable[_T]]) -> list[_T]:
    """All results, or the first failure once all have ended: what was under way may still be kept."""
    outcomes = await asyncio.gather(*awaitables, return_exceptions=True)
    results: list[_T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a report."""
    # A name of its own, and short: the path's may be as long as the disk allows.
    draft = path.with_name(f".{_fingerprint(path.name)[:32]}.new")
    draft.write_text(text, encoding="utf-8", errors="replace")
    os.replace(draft, path)


def _first(errors: BaseExceptionGroup[OSError]) -> OSError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
