"""Whether a streamed answer that broke may go on elsewhere, with which request, and as one stream. Pure.

A worker is given what its predecessor has said as the beginning of its own answer, and the two streams are
joined so that no character is missing or doubled (RELIABILITY 5.2). What is not plain text is not joined.
Where the answer is sampled, the rest is one that could have followed, not the one that would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from balancer.core.model import Endpoint
from balancer.dialects import openai
from balancer.dialects.framing import EventFrames, FramingError

Json = dict[str, Any]

MAX_TEXT_BYTES = 256 * 1024
MAX_CONTINUATIONS = 2
MAX_STOP_CHARS = 256
"""Of one stop string. Every beginning of it is compared with the end of the text, so this bounds the work."""

_FOLD_BYTES = 16 * 1024
"""Raw events are held until there are so many: most answers never break, and theirs are never read."""
_MAX_PIECES = 512
"""A short string takes ten times its length in memory; so many are made into one."""

_OF_THE_ANSWER = ("id", "object", "created", "model", "system_fingerprint")
"""What every event of one answer has the same."""
_JOINABLE = frozenset(
    {
        "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "messages", "min_p",
        "parallel_tool_calls", "presence_penalty", "prompt", "reasoning_effort", "repeat_penalty",
        "repetition_penalty", "seed", "stop", "temperature", "tool_choice", "top_k", "top_p", "user",
    }
)  # fmt: skip
"""Fields under which an answer can go on. Others have an obstacle, one that is new as well: a grammar, for
one, would begin from its start within the rest."""
_OBSTACLES: Mapping[str, str] = {
    "best_of": "the best of several answers was asked for",
    "echo": "the prompt was asked for with the answer",
    "logprobs": "probabilities of its tokens were asked for",
    "response_format": "its form is prescribed",
    "suffix": "it is to fit before a given text",
    "tools": "it may call tools",
    "top_logprobs": "probabilities of its tokens were asked for",
}
_BEYOND_TEXT: Mapping[str, str] = {
    "function_call": "it calls a tool",
    "reasoning": "it has a reasoning apart from its text",
    "reasoning_content": "it has a reasoning apart from its text",
    "refusal": "it is a refusal",
    "tool_calls": "it calls a tool",
}
_UNREADABLE = "a part of it cannot be read"


# The request


def obstacle(request: openai.Request) -> str | None:
    """Why an answer to this request could not go on elsewhere, for people; None: it could.

    Reads the whole body, 0.3 ms a megabyte and more: to be asked once an answer broke, not of each request.
    """
    if request.endpoint not in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        return "it is no text"
    if request.choices != 1:
        return "several answers were asked for"
    fields: Json = orjson.loads(request.body)
    for name, value in fields.items():
        if name not in _JOINABLE and not _asks_nothing(name, value):
            return _OBSTACLES.get(name, f"'{name}' was asked for")
    if any(len(stop) > MAX_STOP_CHARS for stop in _stops(fields)):
        return f"a stop string has more than {MAX_STOP_CHARS} characters"
    if request.endpoint is Endpoint.COMPLETIONS:
        return None if isinstance(fields["prompt"], str) else "its prompt is not one text"
    return _prefill_obstacle(fields["messages"][-1])


def _asks_nothing(name: str, value: Any) -> bool:
    match name:
        case "best_of" | "n":
            return bool(value == 1)
        case "logprobs":  # a completion's 0 asks for that of each token
            return value is False
        case "response_format":
            return bool(value.get("type") == "text")
        case _:
            return not value


def _prefill_obstacle(message: Json) -> str | None:
    """An assistant's message at the end is the beginning of the answer, by the client's own hand."""
    if message["role"] != "assistant":
        return None
    if message.get("tool_calls") or message.get("function_call"):
        return "its last message calls a tool"
    return None if isinstance(message.get("content"), str) else "its last message is not one text"


def _stops(fields: Json) -> list[str]:
    stop = fields.get("stop", [])
    return [stop] if isinstance(stop, str) else stop


# The first stream


class Kept:
    """What has come of one streamed answer, kept so that it could go on elsewhere. Bounded.

    Memory: `_FOLD_BYTES` of raw events and at most `MAX_TEXT_BYTES` of text.
    """

    __slots__ = (
        "_begun",
        "_done",
        "_finish_reason",
        "_head",
        "_obstacle",
        "_pieces",
        "_raw",
        "_raw_bytes",
        "_text_bytes",
        "_tokens",
        "_usage",
        "_usage_came",
        "endpoint",
    )

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._raw: list[bytes] = []
        self._raw_bytes = 0
        self._pieces: list[str] = []
        self._text_bytes = 0
        self._tokens = 0
        self._head: Json = {}
        self._begun = False
        self._done = False
        self._finish_reason: str | None = None
        self._usage = openai.Usage()
        self._usage_came = False
        self._obstacle: str | None = None

    def add(self, events: bytes) -> None:
        """Whole SSE events, one or more, exactly as they went to the client. Never raises: what it cannot
        read makes an obstacle. Costs an append, and every 16 KiB some 2 us an event for reading them."""
        self._raw.append(events)
        self._raw_bytes += len(events)
        if self._raw_bytes > _FOLD_BYTES:
            self._fold()

    @property
    def obstacle(self) -> str | None:
        """Why what has come could not go on elsewhere, for people; None: it could."""
        self._fold()
        if self._obstacle:
            return self._obstacle
        if self._done and not self.finished:
            return "its end mark was sent"
        text = self.text
        if text.endswith("\ufffd"):  # engines send it for a character whose other bytes are yet to come
            return "it ends within a character"
        if text.rfind("<think>") > text.rfind("</think>"):  # templates drop or close it
            return "it ends within its reasoning"
        return None

    @property
    def worth(self) -> bool:
        """There are words to go on from. False: the request itself, from its beginning, is right."""
        return bool(self.stem)

    @property
    def text(self) -> str:
        """All of it; empty where there is an obstacle in what has come."""
        self._fold()
        self._compact()
        return self._pieces[0] if self._pieces else ""

    @property
    def stem(self) -> str:
        """The text without the whitespace at its end. Templates often trim it, and tokenizers put it at the
        beginning of the next word: so an engine is left to say it itself."""
        return self.text.rstrip()

    @property
    def tokens(self) -> int:
        """Of the text: as the worker told with the last event, else events that held text."""
        self._fold()
        return self._tokens

    @property
    def head(self) -> Mapping[str, Any]:
        """What every event of this answer has the same (`id`, `created`, ...), as the client saw it."""
        self._fold()
        return self._head

    @property
    def begun(self) -> bool:
        """The client was told whose words these are, or has some."""
        self._fold()
        return self._begun

    @property
    def finish_reason(self) -> str | None:
        self._fold()
        return self._finish_reason

    @property
    def finished(self) -> bool:
        """Its `finish_reason` came: the text is whole, and at most usage and `[DONE]` are missing."""
        return self.finish_reason is not None

    @property
    def usage(self) -> openai.Usage:
        """As far as the client was told."""
        self._fold()
        return self._usage

    @property
    def usage_came(self) -> bool:
        """The client was told the usage of the whole answer."""
        self._fold()
        return self._usage_came

    def take(self, chunk: Json, tokens: int = 1) -> None:
        """One event that was read already (`openai.parse_chunk`), as it goes to the client. `tokens`: that
        its text is, if the event does not tell."""
        if not self._head:
            self._head = {key: chunk[key] for key in _OF_THE_ANSWER if key in chunk}
        texts = [self._take_choice(choice) for choice in chunk["choices"]]
        counted = self._tokens + (tokens if any(texts) else 0)
        usage = openai.read_usage(chunk)
        self._tokens = usage.output_tokens or counted
        if chunk.get("usage"):
            self._usage = usage
            self._usage_came = self._finish_reason is not None
        for text in filter(None, texts):
            self._take_text(text)

    def _take_choice(self, choice: Json) -> str:
        if self._obstacle is None and (why := _choice_obstacle(choice, self.endpoint)):
            self._hinder(why)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._finish_reason = reason
        text = _text(choice, self.endpoint)
        self._begun = self._begun or bool(text) or "role" in (choice.get("delta") or {})
        return text

    def _take_text(self, text: str) -> None:
        if self._obstacle is not None:
            return
        self._pieces.append(text)
        self._text_bytes += len(text.encode())
        if self._text_bytes > MAX_TEXT_BYTES:
            self._hinder(f"it has more than {MAX_TEXT_BYTES // 1024} KiB")
        elif len(self._pieces) >= _MAX_PIECES:
            self._compact()

    def _compact(self) -> None:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]

    def _fold(self) -> None:
        if not self._raw:
            return
        raw = b"".join(self._raw)
        self._raw.clear()
        self._raw_bytes = 0
        chunks = _parsed_at_once(raw)
        if chunks is None:
            self._read_each(raw)
            return
        for chunk in chunks:
            text = _plain_text(chunk, self.endpoint) if self._head else None
            if text is None:
                self._read_again(chunk)
            else:
                self._tokens += 1
                self._begun = True
                self._take_text(text)

    def _read_again(self, chunk: Any) -> None:
        try:
            event = orjson.dumps(chunk)
        except orjson.JSONEncodeError:  # it reads deeper than it writes
            self._hinder(_UNREADABLE)
            return
        self._read(event)

    def _read_each(self, raw: bytes) -> None:
        if not raw.endswith((b"\n\n", b"\n\r\n")):
            self._hinder(_UNREADABLE)
        try:
            events = EventFrames().feed(raw)
        except FramingError:
            self._hinder(_UNREADABLE)
            return
        for event in events:
            self._read(event)

    def _read(self, event: bytes) -> None:
        if event == openai.DONE:
            self._done = True
            return
        try:
            chunk = openai.parse_chunk(event)
        except openai.AnswerError:
            self._hinder(_UNREADABLE)
            return
        self.take(chunk)

    def _hinder(self, why: str) -> None:
        self._obstacle = self._obstacle or why
        self._pieces.clear()


def _parsed_at_once(raw: bytes) -> list[Any] | None:
    """What is in the events, if they are of one line each and all of JSON: for a fifth of what it costs to
    take them one by one. None: they are not."""
    if not raw.startswith(b"data: ") or not raw.endswith(b"\n\n"):
        return None
    try:
        chunks: list[Any] = orjson.loads(b"[" + raw[6:-2].replace(b"\n\ndata: ", b",") + b"]")
    except orjson.JSONDecodeError:
        return None
    return chunks if raw.count(b"\n") == 2 * len(chunks) else None


def _plain_text(chunk: Any, endpoint: Endpoint) -> str | None:
    """The text of an event that plainly is one token and nothing else, as nearly all are. None: it has to be
    read with care."""
    try:
        (choice,) = chunk["choices"]
        if choice["index"] != 0 or choice["finish_reason"] or chunk.get("usage") or "error" in chunk:
            return None
        if endpoint is Endpoint.CHAT:
            delta = choice["delta"]
            text = delta["content"] if len(delta) == 1 and "text" not in choice else None
        else:
            text = choice["text"] if "delta" not in choice else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) and text else None


def _choice_obstacle(choice: Json, endpoint: Endpoint) -> str | None:
    if choice.get("index", 0) != 0:
        return "it has several choices"
    delta: Json = choice.get("delta") or {}
    for key, value in delta.items():
        if value and key not in ("role", "content"):
            return _BEYOND_TEXT.get(key, "it holds more than text")
    of_the_other_form = choice.get("text" if endpoint is Endpoint.CHAT else "delta")
    return _UNREADABLE if of_the_other_form or not isinstance(delta.get("content"), str | None) else None


def _text(choice: Json, endpoint: Endpoint) -> str:
    said = (choice.get("delta") or {}).get("content") if endpoint is Endpoint.CHAT else choice.get("text")
    return said if isinstance(said, str) else ""


# The request for the rest


def tokens_left(request: openai.Request, kept: Kept) -> int | None:
    """That the answer may still have; None: the client named no limit. With 0 the answer is whole: end it
    with `ending(kept, "length", ...)`."""
    return None if request.max_output is None else max(0, request.max_output - kept.tokens)


def continuation(request: openai.Request, kept: Kept) -> openai.Request:
    """The request for the rest of an answer, to be asked for where neither the request nor what has come has
    an `obstacle` and `tokens_left` is not 0. Without words to go on from (`Kept.worth`) it is the request
    itself, for fewer tokens. Reads and writes the whole body."""
    fields: Json = orjson.loads(request.body)
    stem = kept.stem
    if stem:
        _append(fields, request.endpoint, stem)
    for limit in ("max_tokens", "max_completion_tokens"):
        if limit in fields:
            fields[limit] = max(1, fields[limit] - kept.tokens)
    return replace(
        request,
        body=orjson.dumps(fields),
        prompt=replace(request.prompt, chars=request.prompt.chars + len(stem)),
        max_output=tokens_left(request, kept),
    )


def _append(fields: Json, endpoint: Endpoint, stem: str) -> None:
    if endpoint is Endpoint.COMPLETIONS:
        fields["prompt"] += stem
    elif (last := fields["messages"][-1])["role"] == "assistant":
        last["content"] += stem
    else:
        fields["messages"].append({"role": "assistant", "content": stem})


# The second stream


class Seam:
    """Reads the stream that goes on with an answer, and gives what the client shall have of it.

    Each event is parsed and written anew: some 9 us. Workers' `timings` pass as they are, since they tell
    of that worker's part alone.
    """

    __slots__ = (
        "_before",
        "_carried",
        "_held",
        "_held_tokens",
        "_prompt_tokens",
        "_request",
        "_run",
        "_tails",
        "ended",
        "kept",
    )

    def __init__(self, request: openai.Request, kept: Kept) -> None:
        """`kept`: what the client has, of all streams before; it has no `obstacle`."""
        self._request = request
        text = kept.text
        self._before = kept.tokens
        self._carried = kept.tokens if kept.worth else 0
        self._prompt_tokens = kept.usage.prompt_tokens
        self._run: str | None = text[len(kept.stem) :]
        """Whitespace that was sent and not carried over: if the engine says it again, it is dropped. None:
        it did or did not."""
        self._tails: list[str] | None = _tails(request, text)
        """The rests of stop strings that the text until the seam may have begun. None: it had not."""
        self._held = ""
        self._held_tokens = 0
        self.ended = False
        """A stop string across the seam ended the answer; `read` gives no more text, only its usage."""
        self.kept = kept
        """Grows with what `read` gives, so that a second break can go on from there. Do not add to it."""

    def read(self, event: bytes) -> bytes | None:
        """What the client shall have of one event's data (not `[DONE]`); None: nothing. Raises
        `openai.AnswerError` for what is no event of such an answer."""
        chunk = openai.parse_chunk(event)
        closes = not chunk["choices"] or any(choice.get("finish_reason") for choice in chunk["choices"])
        if isinstance(chunk.get("usage"), dict):
            chunk["usage"] = self._of_both(chunk)
        choices = [joined for choice in chunk["choices"] if (joined := self._join(choice))]
        if not choices and not (closes and chunk.get("usage") and self._request.usage_wanted):
            return None
        sent = self._head() | {key: value for key, value in chunk.items() if key not in self._owned()}
        sent["choices"] = choices
        try:
            data = orjson.dumps(sent)
        except orjson.JSONEncodeError:  # it reads deeper than it writes
            raise openai.AnswerError("an event of its stream is nested too deeply") from None
        self.kept.take(sent, self._held_tokens)
        if choices:
            self._held_tokens = 0
        return data

    def _head(self) -> Json:
        return {**self.kept.head} or {"model": str(self._request.model)}

    def _owned(self) -> tuple[str, ...]:
        """Keys that are the first stream's to say."""
        return _OF_THE_ANSWER if self.kept.head else ("model",)

    def _join(self, choice: Json) -> Json | None:
        """The choice as it goes on; None: it says nothing that the client has not."""
        why = _choice_obstacle(choice, self._request.endpoint)
        if why is not None:
            raise openai.AnswerError(f"the rest cannot be joined: {why}")
        if self.ended:
            return None
        finishes = bool(choice.get("finish_reason"))
        said = _text(choice, self._request.endpoint)
        self._held_tokens += bool(said)
        text = self._release(said, finishes)
        if self.ended:
            return _closing(self._request.endpoint, "stop")
        return self._with_text(choice, text) if text or finishes or self._introduces(choice) else None

    def _introduces(self, choice: Json) -> bool:
        return not self.kept.begun and "role" in (choice.get("delta") or {})

    def _with_text(self, choice: Json, text: str) -> Json:
        if self._request.endpoint is Endpoint.COMPLETIONS:
            return choice | {"text": text}
        delta = dict(choice.get("delta") or {})
        if self.kept.begun:
            delta.pop("role", None)
        if text:
            delta["content"] = text
        elif delta.get("content"):
            del delta["content"]
        return choice | {"delta": delta}

    def _release(self, text: str, last: bool) -> str:
        """What is certain now to be new to the client. At the seam that may take some events; all that is
        held is handed out with the `last`."""
        if self._tails is None:
            return text
        self._held += text
        if self._run is not None:
            if self._held != self._run and self._run.startswith(self._held):
                return ""  # and if this was the last: all that it said, the client has
            if self._held.startswith(self._run):
                self._held = self._held[len(self._run) :]
                self._held_tokens = min(self._held_tokens, 1) if self._held else 0
            self._run = None
        if any(self._held.startswith(tail) for tail in self._tails):
            self._held = ""
            self.ended = True
            return ""
        if not last and any(tail.startswith(self._held) for tail in self._tails):
            return ""
        self._tails = None
        released, self._held = self._held, ""
        return released

    def _of_both(self, chunk: Json) -> Json:
        """The usage of the whole answer: what was carried over is no part of the client's prompt."""
        usage: Json = dict(chunk["usage"])
        told = openai.read_usage(chunk)
        if told.output_tokens is not None:
            usage["completion_tokens"] = self._before + told.output_tokens
        if told.prompt_tokens is not None:
            without = max(0, told.prompt_tokens - self._carried)
            usage["prompt_tokens"] = without if self._prompt_tokens is None else self._prompt_tokens
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict) and told.cached_tokens is not None:
                cached = min(told.cached_tokens, usage["prompt_tokens"])
                usage["prompt_tokens_details"] = details | {"cached_tokens": cached}
        if told.output_tokens is not None and told.prompt_tokens is not None:
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return usage


def _tails(request: openai.Request, text: str) -> list[str]:
    """What would have to follow the text for a stop string to be whole that begins within it.

    An engine looks for stop strings in what it says itself, so those across the seam are ours to find.
    """
    if b'"stop"' not in request.body:
        return []
    stops = _stops(orjson.loads(request.body))
    return [stop[n:] for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]


# The end


def ending(kept: Kept, reason: str, usage_wanted: bool) -> list[bytes]:
    """The events (data only) that end an answer whose text is whole: its `finish_reason`, unless the client
    has one, and its usage, if it is wanted, has not come, and is known. `[DONE]` is not among them."""
    head: Json = {"object": _OBJECT[kept.endpoint], **kept.head}
    events = [] if kept.finished else [head | {"choices": [_closing(kept.endpoint, reason)]}]
    prompt = kept.usage.prompt_tokens
    if usage_wanted and not kept.usage_came and prompt is not None:
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": kept.tokens,
            "total_tokens": prompt + kept.tokens,
        }
        events.append(head | {"choices": [], "usage": usage})
    return [orjson.dumps(event) for event in events]


_OBJECT = {Endpoint.CHAT: "chat.completion.chunk", Endpoint.COMPLETIONS: "text_completion"}


def _closing(endpoint: Endpoint, reason: str) -> Json:
    said: Json = {"delta": {}} if endpoint is Endpoint.CHAT else {"text": ""}
    return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def marker() -> bytes:
    """An SSE comment, for whoever reads the stream by eye: here another worker went on."""
    return b": continued\n\n"
