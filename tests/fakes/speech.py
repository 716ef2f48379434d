"""What the fake engine says: a text that follows from the prompt alone. Pure.

Token i is a function of (hash of the prompt, i) and not of the model, the time or the worker. So any
number of workers must together have given `reference_text`, and one missing or doubled character shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Any, NewType

Prompt = str | Sequence[Mapping[str, Any]]
"""The text of a completion, or the messages of a chat."""

EMBEDDING_SIZE = 8

# Some take several bytes in UTF-8, so that a cut can fall inside a character.
_VOCABULARY = (
    "amber birch cedar delta ember fjord glade heron inlet jetty kelp larch maple north ochre plume "
    'quartz river slate tundra umber vale willow xenon yarrow zephyr café naïve Straße übrig 漢字 мир 🦊 \\ "'
)
_WORDS = _VOCABULARY.split()

_Digest = NewType("_Digest", bytes)


def _digest(text: str) -> _Digest:
    return _Digest(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def _word(digest: _Digest, index: int) -> str:
    chosen = hashlib.blake2b(digest + index.to_bytes(8, "big"), digest_size=4).digest()
    return _WORDS[int.from_bytes(chosen, "big") % len(_WORDS)]


class Spelling(Enum):
    """Which token the space between two words belongs to; the text is the same."""

    SPACE_BEFORE = "before"
    """The second one's, as in most tokenisers."""
    SPACE_AFTER = "after"
    """The first one's: an answer that was cut between two tokens ends with a space."""


def _spoken(content: object) -> str:
    """The text of a message, whichever of OpenAI's two forms it has."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def flat(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_spoken(message.get('content'))}" for message in prompt)


def reference_text(prompt: Prompt, tokens: int) -> str:
    """The first `tokens` tokens of the one right answer to this prompt, from any model."""
    digest = _digest(flat(prompt))
    return " ".join(_word(digest, index) for index in range(tokens))


def reference_embedding(text: str) -> list[float]:
    """The one right vector of this text: `EMBEDDING_SIZE` numbers from -1 to 1, exact in 32 bits."""
    return [byte / 128 - 1 for byte in _digest(text)[:EMBEDDING_SIZE]]


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is still to be said to a prompt, of which a part may have been said already."""

    digest: _Digest
    said: int = 0
    """Tokens of the whole answer that are through, one that was cut in half included."""
    rest: str = ""
    """The other half of that one."""
    spelling: Spelling = Spelling.SPACE_BEFORE

    @classmethod
    def of_chat(
        cls,
        messages: Sequence[Mapping[str, Any]],
        continues: bool,
        spelling: Spelling = Spelling.SPACE_BEFORE,
        trims: bool = False,
    ) -> Utterance:
        """`continues`: a trailing assistant message is a beginning of the answer, if it is one; else it is a
        message like another. `trims`: without the space at its end, as many chat templates take it."""
        if continues and messages[-1]["role"] == "assistant":
            begun = _spoken(messages[-1].get("content"))
            digest = _digest(flat(messages[:-1]))
            speech = cls(digest, spelling=spelling)._after(begun.rstrip() if trims else begun)
            if speech is not None:
                return speech
        return cls(_digest(flat(messages)), spelling=spelling)

    @classmethod
    def of_completion(cls, prompt: str, spelling: Spelling = Spelling.SPACE_BEFORE) -> Utterance:
        """A prompt that is to be continued ends with a line break, so that any engine, in any process, knows
        what was said already: what follows the last line break, if it is a beginning of the answer."""
        asked, line_break, begun = prompt.rpartition("\n")
        if line_break and begun:
            speech = cls(_digest(asked + line_break), spelling=spelling)._after(begun)
            if speech is not None:
                return speech
        return cls(_digest(prompt), spelling=spelling)

    def _after(self, prefix: str) -> Utterance | None:
        """None: the prefix is not a beginning of this answer, but something that somebody else said."""
        for index in count():
            if not prefix:
                return replace(self, said=index)
            token = self._token(index)
            if token.startswith(prefix):
                return replace(self, said=index + 1, rest=token[len(prefix) :])
            if not prefix.startswith(token):
                return None
            prefix = prefix[len(token) :]
        raise AssertionError("count() does not end")

    def tokens(self, whole: int | None = None) -> Iterator[str]:
        """Those that are still to come where the whole answer has `whole`; None: without end."""
        rest = self.rest
        if rest and not rest.isspace():
            yield rest.rstrip(" ") if self.said == whole else rest
            rest = ""
        for index in count(self.said) if whole is None else range(self.said, whole):
            token = self._token(index)
            yield rest + (token.rstrip(" ") if index + 1 == whole else token)
            rest = ""

    def left(self, whole: int) -> int:
        """How many tokens those are."""
        return max(0, whole - self.said) + bool(self.rest and not self.rest.isspace())

    def _token(self, index: int) -> str:
        word = _word(self.digest, index)
        if self.spelling is Spelling.SPACE_AFTER:
            return f"{word} "
        return f" {word}" if index else word
