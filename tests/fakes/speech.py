"""What the fake engine says: a text that follows from the prompt alone. Pure.

Token i is a function of (hash of the prompt, i) and not of the model, the time or the worker. So any
number of workers must together have given `reference_text`, and one missing or doubled character shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


def _token(digest: _Digest, index: int) -> str:
    chosen = hashlib.blake2b(digest + index.to_bytes(8, "big"), digest_size=4).digest()
    word = _WORDS[int.from_bytes(chosen, "big") % len(_WORDS)]
    return f" {word}" if index else word


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
    return "".join(_token(digest, index) for index in range(tokens))


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

    @classmethod
    def of(cls, prompt: Prompt, continues: bool) -> Utterance:
        if continues and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            begun = cls._after(_digest(flat(prompt[:-1])), _spoken(prompt[-1].get("content")))
            if begun is not None:
                return begun
        return cls(_digest(flat(prompt)))

    @classmethod
    def _after(cls, digest: _Digest, prefix: str) -> Utterance | None:
        """None: the prefix is not a beginning of this answer, but something that somebody else said."""
        for index in count():
            if not prefix:
                return cls(digest, index)
            token = _token(digest, index)
            if token.startswith(prefix):
                return cls(digest, index + 1, token[len(prefix) :])
            if not prefix.startswith(token):
                return None
            prefix = prefix[len(token) :]
        raise AssertionError("count() does not end")

    def tokens(self) -> Iterator[str]:
        """Without end: how much of it is said, the engine and the request decide."""
        if self.rest:
            yield self.rest
        for index in count(self.said):
            yield _token(self.digest, index)

    def left(self, whole: int) -> int:
        """How many tokens are still to come where the whole answer has `whole`."""
        return max(0, whole - self.said) + bool(self.rest)
