"""What is sent for one paper, and in which order. Pure.

The document stands first in every message and the question last, so that all questions about one text
share a prefix, which an engine computes once and keeps. They are sent back to back: the balancer sees what
they have in common, lets one worker compute it, and sends the followers there as soon as it has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from balancer.batch.presets import Preset, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One chat completion."""

    model: str
    system: str
    user: str
    max_tokens: int
    temperature: float

    @property
    def chars(self) -> int:
        return len(self.system) + len(self.user)

    def body(self) -> dict[str, object]:
        """As the OpenAI dialect wants it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": self.user}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": False,
        }


@dataclass(frozen=True, slots=True)
class Place:
    """One question about one section."""

    section: int
    """From 0."""
    prompt: str


def rounds(
    sections: int, prompts: Sequence[str], answered: Collection[Place]
) -> tuple[tuple[Place, ...], ...]:
    """Which questions go together, one round after the other; what is answered is left out.

    All about one section at once, section by section.
    """
    planned = (
        tuple(place for name in prompts if (place := Place(section, name)) not in answered)
        for section in range(sections)
    )
    return tuple(together for together in planned if together)


def _message(material: str, question: str) -> str:
    return f"<paper>\n{material}\n</paper>\n\n{question}"


def about_text(
    preset: Preset, prompt: Prompt, text: str, *, section: int, sections: int, model: str, max_tokens: int
) -> Request:
    """Ask a prompt of a whole paper, or of one of its sections (counted from 0)."""
    question = prompt.text
    if sections > 1:
        question = (
            f"This is section {section + 1} of {sections} of a longer paper. Answer from this section alone; "
            f"where it says nothing about the question, say so in one short sentence.\n\n{question}"
        )
    return Request(
        model=model,
        system=preset.system,
        user=_message(text, question),
        max_tokens=max_tokens,
        temperature=prompt.temperature,
    )


def merged_material(partial: Sequence[str]) -> str:
    """The answers that are merged, as a merge shows them."""
    return "".join(f"[Answer {number:>3}]\n{text}\n\n" for number, text in enumerate(partial, start=1))


def merging(
    preset: Preset, prompt: Prompt, partial: Sequence[str], *, model: str, max_tokens: int
) -> Request:
    """Ask for one answer from the answers that were given about consecutive sections."""
    question = (
        f"A paper was read in sections. Above are {len(partial)} answers to the same question, each about "
        "one part of the paper, in the paper's order. Merge them into one answer to the question: keep every "
        "fact and number, say each thing once, leave out remarks that a section said nothing, and do not "
        f"mention the sections.\n\nThe question:\n{prompt.text}"
    )
    return Request(
        model=model,
        system=preset.system,
        user=_message(merged_material(partial), question),
        max_tokens=max_tokens,
        temperature=prompt.temperature,
    )


def longest_question_chars(preset: Preset) -> int:
    """Characters that a request holds beside its text, at most."""
    return max(
        about_text(preset, prompt, "", section=998, sections=999, model="", max_tokens=1).chars
        for prompt in preset.prompts
    )


def merged_chars(preset: Preset, prompt: Prompt, *, section_chars: int) -> int:
    """Characters of answers, with their numbers, that go into one merge of a paper cut like this.

    The merge is then no longer than a question about a section, which is known to fit.
    """
    beside = merging(preset, prompt, [], model="", max_tokens=1).chars
    return section_chars + longest_question_chars(preset) - beside
