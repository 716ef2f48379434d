"""Prompts as routing sees them: how long, which beginnings they share, which conversation goes on. Pure.

Of a chat the *canonical text* is what counts: its tools, then each message's role, texts and tool calls, in
order, which is the order in which chat templates write them. Hashes are keyed, so that they tell nothing to
whoever does not hold the key; an equal text has an equal hash only under the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import orjson

from balancer.core.model import BLOCK_CHARS, Endpoint, Prompt

Json = dict[str, Any]

MAX_BLOCKS = 512
"""Half a million characters: a longer beginning that is shared is shared enough."""
CHARS_PER_TOKEN = 4
"""What a token counts for in a prompt that comes as tokens."""
ATTACHMENT_CHARS = 3 * BLOCK_CHARS
"""What a picture counts for, however long its data: encoders make 256 to 1500 tokens of one."""

_DIGEST_BYTES = 8
_NOT_FOR_A_WARM_UP = frozenset(
    {"best_of", "echo", "logprobs", "max_completion_tokens", "n", "suffix", "top_logprobs"}
)


def describe(endpoint: Endpoint, fields: Json, key: bytes) -> Prompt:
    """What routing needs to know of a checked request. `key`: at most 64 bytes, the same for all requests
    whose prompts are to be compared."""
    if endpoint is Endpoint.CHAT:
        return _chat(fields["messages"], _tools(fields), key)
    if endpoint is Endpoint.COMPLETIONS:
        return _completion(fields["prompt"], key)
    texts = fields["input"]
    return Prompt(chars=_chars(texts), tokens=_tokens(texts))


def beginning(endpoint: Endpoint, body: bytes, chars: int) -> bytes | None:
    """The body of a request that makes an engine read so many characters of the canonical text and answer
    with one token. None: such a request cannot be shortened.

    Messages are kept whole, then one is cut, the rest is left out. What is left ends as a question of the
    user where the whole had one: templates refuse a chat without.
    """
    fields = {name: value for name, value in orjson.loads(body).items() if name not in _NOT_FOR_A_WARM_UP}
    match endpoint:
        case Endpoint.CHAT:
            fields["messages"] = _first_messages(fields["messages"], chars - len(_tools(fields)))
        case Endpoint.COMPLETIONS:
            fields["prompt"] = _first_of(fields["prompt"], chars)
        case _:
            return None
    return orjson.dumps(fields | {"max_tokens": 1})


# Chats


def _chat(messages: Sequence[Json], tools: str, key: bytes) -> Prompt:
    chars, held = len(tools), [tools]
    said = blake2b(digest_size=_DIGEST_BYTES, key=key)
    continues: int | None = None
    for message in messages:
        if message["role"] == "assistant":
            continues = _number(said.digest())
        for piece in _pieces(message, key):
            if chars < MAX_BLOCKS * BLOCK_CHARS:
                held.append(piece)
            chars += len(piece)
            said.update(_bytes(piece))
    return Prompt(
        chars=chars,
        blocks=_chained(_text_blocks("".join(held)), key),
        conversation=_number(said.digest()),
        continues=continues,
    )


def _pieces(message: Json, key: bytes) -> Iterator[str]:
    """A message's share of the canonical text. A role is set apart by characters that texts do not hold."""
    yield f"\0{message['role']}\0"
    yield from _contents(message.get("content"), key)
    if calls := message.get("tool_calls"):
        yield _written(calls)


def _contents(content: Any, key: bytes) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            text = part.get("text")
            yield text if isinstance(text, str) else _attachment(part, key)


def _attachment(part: Json, key: bytes) -> str:
    """A picture or a sound as a text of fixed length that follows from its data."""
    digest = blake2b(orjson.dumps(part), digest_size=32, key=key).hexdigest()
    return digest * (ATTACHMENT_CHARS // len(digest))


def _tools(fields: Json) -> str:
    tools = fields.get("tools")
    return _written(tools) if tools else ""


def _written(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _first_messages(messages: Sequence[Json], chars: int) -> list[Json]:
    kept: list[Json] = []
    for message in messages:
        if chars <= 0 and kept:
            break
        cut, chars = _cut(message, max(chars, 1))
        kept.append(cut)
    if not any(message["role"] == "user" for message in kept):
        # One of its characters: what was read before is the same as in the whole.
        kept += [_cut(message, 1)[0] for message in messages if message["role"] == "user"][:1]
    return kept


def _cut(message: Json, chars: int) -> tuple[Json, int]:
    """The message's beginning, at least a character of its text; and how many characters are left over."""
    left = max(chars - len(message["role"]) - 2, 1)
    content = message.get("content")
    kept = dict(message)
    if isinstance(content, str):
        kept["content"], left = content[:left], left - len(content)
    elif isinstance(content, list):
        kept["content"], left = _first_parts(content, left)
    if calls := message.get("tool_calls"):
        if left <= 0 and content:
            del kept["tool_calls"]
        left -= len(_written(calls))
    return kept, left


def _first_parts(content: Sequence[Json], chars: int) -> tuple[list[Json], int]:
    kept: list[Json] = []
    for part in content:
        if chars <= 0:
            break
        text = part.get("text")
        if isinstance(text, str):
            kept.append(part | {"text": text[:chars]})
            chars -= len(text)
        else:
            kept.append(part)
            chars -= ATTACHMENT_CHARS
    return kept, chars


# Prompts without messages


def _completion(prompt: Any, key: bytes) -> Prompt:
    """Several prompts in one request begin in different ways: they have no blocks."""
    blocks: tuple[int, ...] = ()
    if isinstance(prompt, str):
        blocks = _chained(_text_blocks(prompt), key)
    elif isinstance(prompt[0], int):
        blocks = _chained(_token_blocks(prompt), key)
    return Prompt(chars=_chars(prompt), tokens=_tokens(prompt), blocks=blocks)


def _first_of(prompt: Any, chars: int) -> Any:
    """Of several prompts the first."""
    if isinstance(prompt, str):
        return prompt[: max(chars, 1)]
    if isinstance(prompt[0], int):
        return prompt[: max(chars // CHARS_PER_TOKEN, 1)]
    return _first_of(prompt[0], chars)


def _chars(prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt[0], int):
        return len(prompt) * CHARS_PER_TOKEN
    return sum(map(_chars, prompt))


def _tokens(prompt: Any) -> int | None:
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        return None
    return len(prompt) if isinstance(prompt[0], int) else sum(map(len, prompt))


# Hashes


def _text_blocks(text: str) -> Iterator[str]:
    for end in range(BLOCK_CHARS, min(len(text), MAX_BLOCKS * BLOCK_CHARS) + 1, BLOCK_CHARS):
        yield text[end - BLOCK_CHARS : end]


def _token_blocks(tokens: Sequence[int]) -> Iterator[str]:
    size = BLOCK_CHARS // CHARS_PER_TOKEN
    for end in range(size, min(len(tokens), MAX_BLOCKS * size) + 1, size):
        yield ",".join(map(str, tokens[end - size : end]))


def _chained(blocks: Iterable[str], key: bytes) -> tuple[int, ...]:
    hashes: list[int] = []
    before = b""
    for block in blocks:
        before = blake2b(before + _bytes(block), digest_size=_DIGEST_BYTES, key=key).digest()
        hashes.append(_number(before))
    return tuple(hashes)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
