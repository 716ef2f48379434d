"""Does an engine go on exactly where an answer broke off? Found out, not believed. Pure.

One and the same question twice, without chance: once to be answered, once with the first words of that answer
as given. What comes then must begin as the first answer went on. It may differ further on, as two runs of one
engine do; it may not begin anew, repeat, or answer the words as if somebody else had said them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

QUESTIONS = (
    "Tell a short story about a fox and a river.",
    "Name the months of the year in order.",
    "Explain in one long sentence why the sky is blue.",
)
"""Asked one after the other until an engine has shown it; two runs may differ by chance."""

TOKENS = 24
CUT_AFTER_PIECES = 8
SEAM_CHARACTERS = 8
"""So much after the seam must be alike."""

Body = Mapping[str, Any]


def question_body(model: str, question: str) -> dict[str, Any]:
    """Asks without chance, for a few tokens, streamed."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }


def begun_body(body: Body, given: str) -> dict[str, Any]:
    """The same question with the beginning of its answer."""
    return {**body, "messages": [*body["messages"], {"role": "assistant", "content": given}]}


def is_begun(body: Body) -> bool:
    """Whether the request's last message is the beginning of an answer, in words."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return False
    return isinstance(last.get("content"), str) and bool(last["content"])


def cut(pieces: Sequence[str]) -> tuple[str, str] | None:
    """An answer's beginning and how it went on; None: it is too short to tell.

    Templates drop spaces at the end of a message, so the beginning ends with a word.
    """
    given = "".join(pieces[:CUT_AFTER_PIECES]).rstrip()
    rest = "".join(pieces)[len(given) :]
    return (given, rest) if given and len(rest) >= SEAM_CHARACTERS else None


def is_clean(rest: str, continued: str) -> bool:
    """Whether `continued` begins as the answer went on."""
    return continued[:SEAM_CHARACTERS] == rest[:SEAM_CHARACTERS]


def text_of(event: Any) -> str:
    """The words in one event of a chat stream; empty: none."""
    try:
        content = event["choices"][0]["delta"]["content"]
    except (LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
