"""The OpenAI API: requests to asks, workers' answers to what the client expects. Pure.

A request's body is never passed on as it came: engines take parameters that can load other models, run
templates or crash them (RELIABILITY D9), so it is rebuilt from what the tables below list.

| table | what becomes of a parameter | why |
|---|---|---|
| `FIELDS` | checked, passed on to workers of every type | engines know it, or pass over it without harm |
| `SYNONYMS` | passed on under each of its names | engines call one thing by several names |
| `FOR_US` | checked, and left out | OpenAI's words for what a room decides by itself |
| `UNSUPPORTED` | 400 | an answer that passes over it would not be what was asked for |
| any other | left out | clients send much that concerns nobody: `user`, `store`, `metadata` ... |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from balancer.core.errors import BadRequest, RequestError
from balancer.core.model import Endpoint, ModelName, ModelOffer, Prompt, ServiceClass
from balancer.dialects import prompts

Json = dict[str, Any]

DONE = b"[DONE]"
MAX_MESSAGES = 2000
MAX_PARTS = 2000
"""Of the content of one message."""
MAX_INPUTS = 2048
"""Texts in one request for embeddings or completions: OpenAI's own limit."""
MAX_INPUT_TOKENS = 100_000
"""Of a prompt that comes as tokens: walking through more would hold up the loop (about 1 ms for so many)."""
MAX_CHOICES = 8
MAX_DEPTH = 64
"""Of arrays and objects within each other."""
MAX_MEMBERS = 50_000
"""Of all objects together, and as many arrays and objects: a million would hold up the loop for a second."""


# Requests


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a field may hold: the words for an error message, and the test."""

    words: str
    holds: Callable[[Any], bool]


def _number(low: float, high: float) -> Expectation:
    return Expectation(
        f"a number from {low:g} to {high:g}",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
    )


def _integer(low: int, high: int) -> Expectation:
    return Expectation(
        f"an integer from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_INPUT_TOKENS
        and all(type(item) is int for item in value)
    )


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    if _is_tokens(value):
        return True
    if not 0 < len(value) <= MAX_INPUTS:
        return False
    return _is_texts(value) or (
        all(isinstance(item, list) for item in value)
        and sum(map(len, value)) <= MAX_INPUT_TOKENS
        and all(_is_tokens(item) for item in value)
    )


BOOLEAN = Expectation("true or false", lambda value: isinstance(value, bool))
TEXT = Expectation("a string", lambda value: isinstance(value, str))
OBJECT = Expectation("an object", lambda value: isinstance(value, dict))
OBJECTS = Expectation(
    "an array of objects",
    lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
)
TEXT_OR_OBJECT = Expectation("a string or an object", lambda value: isinstance(value, str | dict))
STOPS = Expectation(
    "a string or an array of at most 16 strings",
    lambda value: isinstance(value, str) or (_is_texts(value) and len(value) <= 16),
)
PROMPT = Expectation(
    f"a string, an array of at most {MAX_INPUTS} strings, or arrays of {MAX_INPUT_TOKENS} tokens in all",
    _is_prompt,
)
TOKEN_LIMIT = _integer(1, 10_000_000)
THINKING = Expectation(
    'an object with nothing but "enable_thinking" or "thinking", true or false',
    lambda value: (
        isinstance(value, dict)
        and value.keys() <= {"enable_thinking", "thinking"}
        and all(isinstance(one, bool) for one in value.values())
    ),
)
"""What Qwen's and others' templates are asked for. A template's further variables can break an engine."""

_SAMPLING: Mapping[str, Expectation] = {
    "frequency_penalty": _number(-2, 2),
    "logit_bias": OBJECT,
    "max_tokens": TOKEN_LIMIT,
    "n": _integer(1, MAX_CHOICES),
    "presence_penalty": _number(-2, 2),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": STOPS,
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    # Not OpenAI's, but all three engines and Ollama's and LM Studio's users know them:
    "min_p": _number(0, 1),
    "top_k": _integer(-1, 1_000_000),
    "repeat_penalty": _number(0, 100),
    "repetition_penalty": _number(0, 100),
}

FIELDS: Mapping[Endpoint, Mapping[str, Expectation]] = {
    Endpoint.CHAT: {
        **_SAMPLING,
        "chat_template_kwargs": THINKING,
        "logprobs": BOOLEAN,
        "max_completion_tokens": TOKEN_LIMIT,
        "messages": OBJECTS,
        "parallel_tool_calls": BOOLEAN,
        "reasoning_effort": TEXT,
        "response_format": OBJECT,
        "tool_choice": TEXT_OR_OBJECT,
        "tools": OBJECTS,
        "top_logprobs": _integer(0, 20),
    },
    Endpoint.COMPLETIONS: {
        **_SAMPLING,
        "best_of": _integer(1, MAX_CHOICES),
        "echo": BOOLEAN,
        "logprobs": _integer(0, 20),
        "max_tokens": _integer(0, 10_000_000),
        "prompt": PROMPT,
        "suffix": TEXT,
    },
    Endpoint.EMBEDDINGS: {
        "dimensions": _integer(1, 1_000_000),
        "encoding_format": Expectation('"float" or "base64"', lambda value: value in ("float", "base64")),
        "input": PROMPT,
    },
}
SYNONYMS: Mapping[str, str] = {
    "repeat_penalty": "repetition_penalty",  # llama.cpp, Ollama, LM Studio; vLLM, mlx_lm
    "repetition_penalty": "repeat_penalty",
}
FOR_US: Mapping[str, Expectation] = {
    "prompt_cache_key": TEXT,
    "service_tier": Expectation(
        '"auto", "default", "flex", "priority" or "scale"',
        lambda value: value in ("auto", "default", "flex", "priority", "scale"),
    ),
}
"""Fields of any request that are checked and not passed on: OpenAI's own words for what a room decides by
itself. Who shares a prompt's beginning is seen in the prompt."""
_INSTEAD_OF_FUNCTIONS = "use 'tools' and 'tool_choice' in its place"
_INSTEAD_OF_GRAMMARS = "use 'response_format' with a JSON schema in its place"
_AS_STARTED = "a model is served as it was started"
UNSUPPORTED: Mapping[str, str] = {
    "adapters": _AS_STARTED,
    "audio": "answers are text",
    "chat_template": _AS_STARTED,
    "function_call": _INSTEAD_OF_FUNCTIONS,
    "functions": _INSTEAD_OF_FUNCTIONS,
    "grammar": _INSTEAD_OF_GRAMMARS,
    "guided_choice": _INSTEAD_OF_GRAMMARS,
    "guided_grammar": _INSTEAD_OF_GRAMMARS,
    "guided_json": _INSTEAD_OF_GRAMMARS,
    "guided_regex": _INSTEAD_OF_GRAMMARS,
    "json_schema": _INSTEAD_OF_GRAMMARS,
    "lora": _AS_STARTED,
    "prompt_embeds": "send the prompt as text or tokens",
    "structured_outputs": _INSTEAD_OF_GRAMMARS,
    "use_beam_search": "answers are sampled",
    "web_search_options": "no worker searches the web",
}
"""What no worker is asked for, with the reason or the way to go. Empty values ask for nothing."""
REQUIRED: Mapping[Endpoint, str] = {
    Endpoint.CHAT: "messages",
    Endpoint.COMPLETIONS: "prompt",
    Endpoint.EMBEDDINGS: "input",
}
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that was found to be right."""

    endpoint: Endpoint
    model: ModelName
    body: bytes
    """What of it goes to a worker, written; without model, stream and its options. Large (a whole paper),
    and the same for every attempt: so only this is held while the request waits and runs."""
    choices: int
    """How many answers are asked for."""
    stream: bool
    stream_options: Json
    usage_wanted: bool
    """The client asked for the usage event at the end of a stream."""
    service_class: ServiceClass
    """As the body says it: OpenAI's `"service_tier": "flex"` is what waits until there is room."""
    prompt: Prompt
    max_output: int | None
    """Tokens that the answer may have at most; None: the client names no limit."""
    local_only: bool = False
    """It must not leave the room: `"metadata": {"local_only": true}`."""

    def to_worker(self, model: str, *, stream: bool) -> bytes:
        """The body for a worker that calls the model so. Streams always end with their usage."""
        head: Json = {"model": model}
        if stream:
            head |= {"stream": True, "stream_options": {**self.stream_options, "include_usage": True}}
        return orjson.dumps(head)[:-1] + b"," + self.body[1:]

    def with_fields(self, fields: Mapping[str, Any]) -> Request:
        """The same with fields of our own, for workers that know them."""
        if not fields:
            return self
        return replace(self, body=orjson.dumps(fields)[:-1] + b"," + self.body[1:])

    def beginning(self, chars: int) -> Request | None:
        """A request that makes an engine read so much of the prompt, and remember it; None: no such request
        can be made of this one. Takes milliseconds where the body has megabytes."""
        body = prompts.beginning(self.endpoint, self.body, chars)
        if body is None:
            return None
        return replace(self, body=body, choices=1, stream=False, stream_options={}, usage_wanted=False)


def trial(endpoint: Endpoint, model: ModelName, text: str, max_output: int) -> Request:
    """A request of our own, to see whether a worker generates and how fast."""
    fields: Json = {REQUIRED[endpoint]: text}
    if endpoint is Endpoint.CHAT:
        fields = {"messages": [{"role": "user", "content": text}]}
    if endpoint is not Endpoint.EMBEDDINGS:
        fields["max_tokens"] = max_output
    return parse(endpoint, orjson.dumps({"model": model} | fields))


def parse(endpoint: Endpoint, body: bytes, key: bytes = b"") -> Request:
    """Raises `BadRequest` that names the field and what was expected of it.

    `key`: for the hashes in the prompt's description (see `prompts`); secret, where others see them.
    """
    fields = _read(body)
    model = fields.get("model")
    if model is None:
        raise BadRequest("'model' is missing: name one that GET /v1/models lists.", param="model")
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        raise BadRequest("'model' must be a string of 1 to 256 characters.", param="model")
    _insist_on_supported(fields)
    kept = _checked(fields, FIELDS[endpoint])
    for name, other in SYNONYMS.items():
        if name in kept:
            kept.setdefault(other, kept[name])
    for_us = _checked(fields, FOR_US)
    required = REQUIRED[endpoint]
    if not kept.get(required):
        raise BadRequest(f"'{required}' is missing or empty.", param=required)
    if endpoint is Endpoint.CHAT:
        _check_messages(kept["messages"])
    stream = bool(kept.pop("stream", False))
    if "stream_options" in kept and not stream:
        raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    options = kept.pop("stream_options", {})
    try:
        written = orjson.dumps(kept)
        orjson.dumps(options)
    except orjson.JSONEncodeError:  # it reads deeper than it writes
        raise BadRequest("The request is nested too deeply.") from None
    return Request(
        endpoint=endpoint,
        model=ModelName(model),
        body=written,
        choices=kept.get("n", 1) * _count_prompts(kept.get("prompt")),
        stream=stream,
        stream_options=options,
        usage_wanted=bool(options.get("include_usage")),
        service_class=ServiceClass.BATCH
        if for_us.get("service_tier") == "flex"
        else ServiceClass.INTERACTIVE,
        prompt=prompts.describe(endpoint, kept, key),
        max_output=kept.get("max_completion_tokens", kept.get("max_tokens")),
        local_only=_is_local_only(fields.get("metadata")),
    )


def _is_local_only(metadata: Any) -> bool:
    """Raises `BadRequest` for what might mean it: who misspells it must not find their prompts elsewhere."""
    if metadata is None:
        return False
    if not isinstance(metadata, dict):
        raise BadRequest("'metadata' must be an object.", param="metadata")
    told = [value for key, value in metadata.items() if key.strip().lower().replace("-", "_") == "local_only"]
    flags = [read_flag(value) if isinstance(value, str) else value for value in told if value is not None]
    if not all(isinstance(flag, bool) for flag in flags) or len(set(flags)) > 1:
        raise BadRequest("'metadata.local_only' must be true or false.", param="metadata.local_only")
    return True in flags


def read_flag(text: str) -> bool | None:
    """Of a word in any case; None: it is neither `true` or `1` nor `false` or `0`."""
    return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())


_BUT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}":')

_ALL_BRACKETS_ALIKE = bytes.maketrans(b"{}", b"[]")


def _read(body: bytes) -> Json:
    """The body as an object, within bounds. Raises `BadRequest`."""
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH or body.count(b":") > MAX_MEMBERS:
        _insist_on_bounds(body)
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # `orjson` says what it expected, never what it found.
        raise BadRequest(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    if not isinstance(fields, dict):
        raise BadRequest("The body must be a JSON object.")
    # Of a key that comes twice the last counts, here and therefore for the worker, which is sent what was
    # read here. Two models are a mistake, or a try to be judged by one and served by the other.
    if body.count(b'"model"') > 1 and _comes_twice("model", body):
        raise BadRequest("'model' stands in the body twice.", param="model")
    return fields


def _insist_on_bounds(body: bytes) -> None:
    """Raises `BadRequest` for what is nested too deeply or has too many members; before it is parsed, since
    that is what takes the time. Works on the body without its strings, at the speed of memory."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _BUT_STRUCTURE)
    structure = b"".join(plain.split(b'"')[::2])
    colons = structure.count(b":")
    if max(colons, structure.count(b"[") + structure.count(b"{")) > MAX_MEMBERS:
        raise BadRequest(f"The body has more than {MAX_MEMBERS} members, arrays or objects.")
    levels = structure.translate(_ALL_BRACKETS_ALIKE, b":")
    for _ in range(MAX_DEPTH):
        levels = levels.replace(b"[]", b"")  # the innermost level of all that is left
        if not levels:
            return
    if b"[]" in levels:  # else something is not closed, and the parser says where
        raise BadRequest(f"The body is nested too deeply: {MAX_DEPTH} levels at most.")


def _comes_twice(name: str, body: bytes) -> bool:
    """Whether the outermost object has the key twice; it is JSON."""
    outermost = json.loads(body, object_pairs_hook=list)
    return [key for key, _ in outermost].count(name) > 1


def _insist_on_supported(fields: Json) -> None:
    for name in fields.keys() & UNSUPPORTED.keys():
        if fields[name]:
            raise BadRequest(f"'{name}' is not supported here: {UNSUPPORTED[name]}.", param=name)
    modalities = fields.get("modalities")
    if modalities and modalities != ["text"]:
        raise BadRequest("'modalities' must be [\"text\"]: answers are text.", param="modalities")


def _checked(fields: Json, expected: Mapping[str, Expectation]) -> Json:
    """Those of the fields that are expected; null is left out."""
    kept: Json = {}
    for name, value in fields.items():
        expectation = expected.get(name)
        if expectation is None or value is None:
            continue
        if not expectation.holds(value):
            raise BadRequest(f"'{name}' must be {expectation.words}.", param=name)
        kept[name] = value
    return kept


def _count_prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _check_messages(messages: list[Json]) -> None:
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"'messages' has {len(messages)} entries, at most {MAX_MESSAGES}.", param="messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            roles = ", ".join(sorted(ROLES))
            raise BadRequest(f"'{where}.role' must be one of {roles}.", param=f"{where}.role")
        content = message.get("content")
        if content is None:
            if role != "assistant":
                raise BadRequest(f"'{where}.content' is missing.", param=f"{where}.content")
        elif isinstance(content, list) and len(content) > MAX_PARTS:
            raise BadRequest(
                f"'{where}.content' has {len(content)} parts, at most {MAX_PARTS}.", param=f"{where}.content"
            )
        elif not isinstance(content, str) and not OBJECTS.holds(content):
            raise BadRequest(
                f"'{where}.content' must be a string or an array of content parts.", param=f"{where}.content"
            )


# Answers

REPORTS_ERROR = "it reports an error where an answer should be"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt's."""


class AnswerError(Exception):
    """What came is not an answer: the worker reports an error in its place, or it makes no sense."""

    def __init__(self, detail: str, words: str = "", code: str | None = None) -> None:
        """`words`: the worker's own. They may quote the request, so they are for its client alone. `code`:
        the error's, where it has one."""
        super().__init__(detail)
        self.detail = detail
        self.words = words
        self.code = code


def reported_error(body: bytes) -> AnswerError:
    """What stands in the place of an answer, or of the rest of one."""
    complaint = read_complaint(body)
    return AnswerError(REPORTS_ERROR, complaint.message, complaint.code)


@dataclass(slots=True)
class StreamReader:
    """Reads the events of one streamed answer as they pass, parsing no more of them than it must.

    `read` gives each event as the client shall have it, or None for one that is not for the client.
    """

    model: str
    """The public name: what the worker calls the model does not reach the client."""
    usage_wanted: bool
    choices: int = 1
    """How many answers are asked for."""
    begun: bool = False
    """Something of the answer itself has come. What comes before (a role, nothing yet) can be had again."""
    done: bool = False
    """`[DONE]` was seen: nothing follows."""
    usage: Usage = field(default_factory=Usage)
    pieces: int = 0
    """Events that held a part of the answer: a token each, as a rule."""
    _their_model: bytes = b""
    _our_model: bytes = b""
    _looked: bool = False
    _finished: set[int] = field(default_factory=set)
    """The choices that are whole."""

    @property
    def tokens(self) -> int:
        """Of the answer until now: counted by its pieces until the worker tells."""
        told = self.usage.output_tokens
        return self.pieces if told is None else told

    @property
    def is_whole(self) -> bool:
        """The answer is all there. Neither a closed connection nor a bare `[DONE]` shows that, only a
        `finish_reason`; `[DONE]` stands in for those of further choices, which some engines do not give."""
        return len(self._finished) >= (1 if self.done else self.choices)

    @property
    def finishing(self) -> bool:
        """A choice is whole: what follows is no mere piece of the answer."""
        return bool(self._finished)

    def pass_on(self, events: bytes, count: int) -> bytes:
        """So many whole events, framing included, that say nothing but pieces of the answer."""
        self.pieces += count
        return events.replace(self._their_model, self._our_model) if self._their_model else events

    def read(self, event: bytes) -> bytes | None:
        """Raises `AnswerError`."""
        chunk = self.read_chunk(event)
        if chunk is None:
            return None
        if not self._looked:
            self._learn_name(event, chunk)
        return event.replace(self._their_model, self._our_model, 1) if self._their_model else event

    def read_chunk(self, event: bytes) -> Json | None:
        """The same, taken apart; under the worker's own name for the model. Raises `AnswerError`."""
        if event == DONE:
            self.done = True
            return None
        chunk = parse_chunk(event)
        choices = chunk["choices"]
        says = any(_says_something(choice) for choice in choices)
        if chunk.get("usage"):
            self.usage = read_usage(chunk)
            if not choices and not self.usage_wanted:
                return None
        if says and all(choice.get("index", 0) in self._finished for choice in choices):
            return None  # it goes on after its own end
        if says:
            self.begun = True
            self.pieces += 1
        for choice in choices:
            if choice.get("finish_reason"):
                self._finished.add(choice.get("index", 0))
        return chunk

    def _learn_name(self, event: bytes, chunk: Json) -> None:
        theirs = chunk.get("model")
        if theirs == "":
            return  # Azure's first event, about the prompt
        self._looked = True
        if isinstance(theirs, str) and theirs != self.model:
            # Inside a JSON string each quote is escaped, so this cannot match a part of the answer's text.
            written = re.search(rb'"model"\s*:\s*' + re.escape(orjson.dumps(theirs)), event)
            if written is not None:
                self._their_model = written.group()
                self._our_model = b'"model":' + orjson.dumps(self.model)


_PLAIN = frozenset({"index", "delta", "finish_reason", "logprobs"})


@dataclass(slots=True)
class Assembly:
    """Puts a streamed answer together again, for a client that did not ask for a stream.

    Deltas are merged by shape, not by a list of known fields, so that what an engine adds
    (`reasoning_content`, say) arrives too: strings are joined, objects merged, arrays whose items carry an
    `index` merged by it, others extended.
    """

    endpoint: Endpoint
    model: str
    _head: Json = field(default_factory=dict)
    _choices: dict[int, Json] = field(default_factory=dict)
    _tail: Json = field(default_factory=dict)
    _words: dict[int, list[str]] = field(default_factory=dict)
    """Pieces of text, by choice, that are yet to be put where they belong."""

    def add(self, chunk: Json) -> None:
        """One event of the stream (`parse_chunk`), not `[DONE]`."""
        for key, value in chunk.items():
            if key in ("choices", "object", "model") or value is None:
                continue
            if key in ("usage", "timings"):
                self._tail[key] = value
            else:
                self._head.setdefault(key, value)
        for choice in chunk["choices"]:
            index = choice.get("index", 0)
            if self._add_words(index, choice):
                continue
            if self._words:
                self._put_words_in()
            part = {key: value for key, value in choice.items() if key != "index"}
            merge(self._choices.setdefault(index, {}), part)

    def _add_words(self, index: int, choice: Json) -> bool:
        """The common case, in a fifth of the time: a further piece of a chat's text and nothing else."""
        delta = choice.get("delta")
        if not delta or len(delta) != 1 or choice.get("finish_reason") or choice.get("logprobs"):
            return False
        words, whole = delta.get("content"), self._choices.get(index)
        if not isinstance(words, str) or whole is None or not choice.keys() <= _PLAIN:
            return False
        self._words.setdefault(index, []).append(words)
        return True

    def _put_words_in(self) -> None:
        for index, words in self._words.items():
            merge(self._choices[index], {"delta": {"content": "".join(words)}})
        self._words.clear()

    def result(self) -> Json:
        """The answer as it would have come in one piece."""
        self._put_words_in()
        is_chat = self.endpoint is Endpoint.CHAT
        finished = [
            (_chat_choice if is_chat else _text_choice)(index, choice)
            for index, choice in sorted(self._choices.items())
        ]
        kind = "chat.completion" if is_chat else "text_completion"
        return {**self._head, "object": kind, "model": self.model, "choices": finished, **self._tail}


def _chat_choice(index: int, choice: Json) -> Json:
    message = {"role": "assistant", "content": None, **choice.get("delta", {})}
    calls = message.get("tool_calls")
    if calls and OBJECTS.holds(calls):
        message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
    elif message["content"] is None:
        message["content"] = ""
    rest = {key: value for key, value in choice.items() if key not in ("delta", "finish_reason")}
    return {"index": index, "message": message, "finish_reason": choice.get("finish_reason")} | rest


def _text_choice(index: int, choice: Json) -> Json:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": None} | choice


_SAID_ONCE = frozenset({"role", "id", "type", "finish_reason"})


def merge(whole: Json, part: Json) -> None:
    """Adds a delta to what has come so far; None says nothing."""
    for key, value in part.items():
        if value is None:
            continue
        match whole.get(key), value:
            case str(before), str() if key not in _SAID_ONCE:
                whole[key] = before + value
            case dict(before), dict():
                merge(before, value)
            case list(before), list():
                _merge_items(before, value)
            case None, list():
                _merge_items(whole.setdefault(key, []), value)
            case None, dict():
                merge(whole.setdefault(key, {}), value)
            case _:  # numbers, what is said once, and pieces that do not fit together: the last one counts
                whole[key] = value


def _merge_items(whole: list[Any], part: Iterable[Any]) -> None:
    for item in part:
        index = item.get("index") if isinstance(item, dict) else None
        same = next((old for old in whole if isinstance(old, dict) and old.get("index") == index), None)
        if index is None or same is None:
            whole.append(item)
        else:
            merge(same, item)


def parse_chunk(event: bytes) -> Json:
    """One event of a stream as an object whose `choices` are objects. Raises `AnswerError`."""
    try:
        chunk = orjson.loads(event)
    except orjson.JSONDecodeError:
        raise AnswerError("an event of its stream is not JSON") from None
    if not isinstance(chunk, dict):
        raise AnswerError("an event of its stream is not an object")
    if chunk.get("error"):
        raise reported_error(event)
    choices = chunk.setdefault("choices", [])
    if not OBJECTS.holds(choices) or not all(map(_is_choice, choices)):
        raise AnswerError("an event of its stream has no proper choices")
    return chunk


def _is_choice(choice: Json) -> bool:
    delta, index = choice.get("delta"), choice.get("index", 0)
    if type(index) is not int or not 0 <= index < MAX_CHOICES * MAX_INPUTS:
        return False
    if delta is None:
        return isinstance(choice.get("text", ""), str)
    return isinstance(delta, dict) and OBJECTS.holds(delta.get("tool_calls") or [])


def parse_whole(body: bytes, model: str) -> tuple[Json, Usage]:
    """An answer that came in one piece, under its public model name. Raises `AnswerError`."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise AnswerError("its answer is not JSON") from None
    if not isinstance(answer, dict) or not ("choices" in answer or "data" in answer):
        raise reported_error(body)
    parts = answer.get("choices", answer.get("data"))
    if not OBJECTS.holds(parts) or not parts:
        raise AnswerError("its answer holds nothing")
    return answer | {"model": model}, read_usage(answer)


def read_usage(answer: Json) -> Usage:
    """Counts as the worker gives them; absurd ones are not believed."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return Usage()
    return Usage(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _cached(usage, answer.get("timings")),
    )


def _cached(usage: Json, timings: Any) -> int | None:
    """In OpenAI's form (vLLM, mlx_lm, new llama.cpp), else in llama.cpp's own."""
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    if cached is None and isinstance(timings, dict):
        cached = _count(timings.get("cache_n"))
    return cached


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**8 else None


def _says_something(choice: Json) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")


# Errors


@dataclass(frozen=True, slots=True)
class WorkerComplaint:
    """What a worker's error body says."""

    message: str
    code: str | None
    param: str | None
    progress: float | None = None
    """Of the model that is being loaded, the share that is done."""
    eta_seconds: float | None = None
    """Until it is."""


def read_complaint(body: bytes) -> WorkerComplaint:
    """Any of the forms that OpenAI-compatible servers use: `{"error": {...}}`, `{"error": "..."}`, text."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        fields = None
    error = fields.get("error", fields) if isinstance(fields, dict) else None
    if isinstance(error, str):
        return WorkerComplaint(_sentence(error), None, None)
    if not isinstance(error, dict):
        return WorkerComplaint("It gave no reason.", None, None)
    message = error.get("message") or error.get("detail")
    code = error.get("code")
    if error.get("type") == "exceed_context_size_error":  # llama.cpp; OpenAI's clients know it by this code
        code = "context_length_exceeded"
    param = error.get("param")
    return WorkerComplaint(
        _sentence(message) if isinstance(message, str) else "It gave no reason.",
        code if isinstance(code, str) else None,
        param if isinstance(param, str) else None,
        *_loading(error.get("loading")),
    )


def _loading(told: Any) -> tuple[float | None, float | None]:
    """Progress and seconds left, as an agent (and another balancer) tells them."""
    if not isinstance(told, dict):
        return None, None
    return _within(told.get("progress"), 1.0), _within(told.get("eta_seconds"), 1_000_000.0)


def _within(value: Any, most: float) -> float | None:
    """A number from 0 to that; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= most else None


def _sentence(text: str) -> str:
    """A worker's words, cut to a length and rid of control characters, since they may reach a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:500]).strip() or "It gave no reason."


def error_body(error: RequestError) -> bytes:
    """The error as OpenAI's SDKs expect it."""
    return orjson.dumps(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
                **error.more,
            }
        }
    )


# Models


def models_body(models: Mapping[ModelName, tuple[ModelOffer, ...]]) -> Json:
    """`GET /v1/models` over the whole room."""
    return {"object": "list", "data": [model_entry(name, offers) for name, offers in models.items()]}


def model_entry(name: ModelName, offers: tuple[ModelOffer, ...]) -> Json:
    """One model; `context_length` is the least of its workers', since any of them may be asked."""
    lengths = [offer.context_tokens for offer in offers if offer.context_tokens]
    entry: Json = {"id": name, "object": "model", "created": 0, "owned_by": "room", "workers": len(offers)}
    return entry | ({"context_length": min(lengths)} if lengths else {})
