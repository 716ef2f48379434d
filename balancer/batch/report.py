"""What a run leaves behind: a row and a Markdown report for each paper. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from balancer.batch.journal import Answer
from balancer.batch.names import readable


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one paper went."""

    file: PurePath
    """As it was named on the command line, or found in a folder that was."""
    sha256: str
    """Of the file; empty where it could not be read."""
    preset: str
    model: str
    error: str | None
    """Why it failed; None: every prompt has an answer."""
    answers: Mapping[str, Answer]
    """By prompt, in the preset's order; of a failed paper those that it did get."""
    report: str = ""
    """The name of its report, beside `results.jsonl`."""

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def sections(self) -> int:
        """Into how many the paper was cut, since it is longer than the model's context; 1: it was not."""
        return max((answer.sections for answer in self.answers.values()), default=1)

    @property
    def seconds(self) -> float:
        """Spent on its requests, each counted in full although some ran beside each other."""
        return sum(answer.seconds for answer in self.answers.values())

    def to_json(self) -> str:
        """One line of `results.jsonl`."""
        prompt_tokens = sum(answer.prompt_tokens for answer in self.answers.values())
        output_tokens = sum(answer.output_tokens for answer in self.answers.values())
        fields = {
            "file": readable(self.file),
            "report": self.report,
            "sha256": self.sha256,
            "preset": self.preset,
            "model": self.model,
            "status": "completed" if self.completed else "failed",
            "error": self.error,
            "answers": {name: answer.text for name, answer in self.answers.items()},
            "cut_short": [name for name, answer in self.answers.items() if answer.cut_short],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": output_tokens,
                "total_tokens": prompt_tokens + output_tokens,
            },
            "seconds": round(self.seconds, 3),
            "sections": self.sections,
        }
        return json.dumps(fields, ensure_ascii=False)


def kept_rows(lines: Iterable[str], files: Sequence[PurePath], preset: str, model: str) -> dict[int, str]:
    """The rows of an earlier `results.jsonl` on these files, this preset and model; by the file's index."""
    indices = {readable(file): index for index, file in enumerate(files)}
    kept: dict[int, str] = {}
    for line in lines:
        try:
            row = json.loads(line)
            index = indices.get(row["file"])
            ours = (row["preset"], row["model"]) == (preset, model)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # not one of our rows: somebody edited the file
        if index is not None and ours:
            kept[index] = line.rstrip("\n")
    return kept


def found_in(results: str) -> set[tuple[str, str]]:
    """Preset and model of each completed row of a `results.jsonl`."""
    found = set()
    for line in results.splitlines():
        try:
            row = json.loads(line)
            if row["status"] == "completed":
                found.add((str(row["preset"]), str(row["model"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # not one of our rows
    return found


def markdown(row: Row) -> str:
    """The report on one paper, for people."""
    parts = [f"# {_one_line(readable(row.file.name))}", _origin(row)]
    if row.error is not None:
        parts.append(f"**This paper failed:** {_one_line(row.error)}")
    for name, answer in row.answers.items():
        parts += [f"## {name[:1].upper()}{name[1:]}", answer.text.strip()]
        if answer.cut_short:
            parts.append("*(The model was stopped at the prompt's `max_tokens`: this may be incomplete.)*")
    return "\n\n".join(parts) + "\n"


def _origin(row: Row) -> str:
    file = _one_line(readable(row.file))
    sentences = [f"Preset `{row.preset}`, answered by `{_one_line(row.model)}`, of `{file}`."]
    if row.sections > 1:
        sentences.append(
            f"The paper is longer than the model's context: it was read in {row.sections} sections, "
            "and the answers were merged."
        )
    return " ".join(sentences)


def _one_line(text: str) -> str:
    return " ".join(text.split())
