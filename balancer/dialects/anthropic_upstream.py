"""A chat of OpenAI's API, asked of Anthropic's Messages API, and its answer back. Pure.

The way there is a body (`body`), the way back a stream of events (`Events`) or an answer in one piece
(`Whole`); both give what an OpenAI-compatible server would have sent, so that nothing after them knows of
another API. What is passed over changes nothing of what was asked for, or only how it is sampled; what
would, is refused with a sentence (`BadRequest`).

| OpenAI | Anthropic |
|---|---|
| messages of the roles system and developer, wherever they stand | `system`, in their order |
| `tool_calls`; messages of the role tool | blocks `tool_use`; blocks `tool_result` of the user |
| `image_url`: a data URL, or one of the web | a block `image` with a source `base64` or `url` |
| `max_completion_tokens`, `max_tokens`, else 4096 | `max_tokens`, which it insists on |
| `temperature` up to 2 | at most 1 |
| `tool_choice`: auto, none, required, a function | auto, none, any, tool |
| `parallel_tool_calls: false` | `disable_parallel_tool_use` of the choice |
| penalties, `seed`, `min_p`, `reasoning_effort`, thinking | passed over |
| `n` above 1, `logprobs`, `logit_bias`, `response_format`, audio, files | refused |

A stream is whole by its `message_stop` and nothing else: what says to OpenAI's clients that an answer is
whole (`finish_reason`) is held back until then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from balancer.core.errors import BadRequest
from balancer.core.model import Endpoint
from balancer.dialects.framing import EventFrames, FramingError, event
from balancer.dialects.openai import DONE, AnswerError, Request

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 4096
"""Where the client names no limit. Anthropic's oldest models can give no more."""
MAX_WHOLE_BYTES = 16 * 1024 * 1024
MAX_BLOCKS = 1024
"""Of one answer: a text or a call of a tool each."""

_IMAGE = re.compile(r"data:(image/(?:jpeg|png|gif|webp));base64,([A-Za-z0-9+/=\s]+)", re.ASCII)


# The way there


def body(request: Request, model: str, *, stream: bool) -> bytes:
    """The body for `POST /v1/messages`. Raises `BadRequest` for what has no counterpart there."""
    if request.endpoint is not Endpoint.CHAT:
        raise BadRequest("Anthropic's API has chats only.", param="model")
    asked: Json = orjson.loads(request.body)
    _insist_on_counterparts(asked)
    system, messages = _messages(asked["messages"])
    if not messages:
        raise BadRequest(
            "Anthropic's API needs a message of the user beside those of the system.", param="messages"
        )
    given: Json = {"model": model, "max_tokens": request.max_output or DEFAULT_MAX_TOKENS}
    if stream:
        given["stream"] = True
    if system:
        given["system"] = system
    given["messages"] = messages
    given |= _sampling(asked)
    if asked.get("tools"):
        given["tools"] = [_tool(tool, index) for index, tool in enumerate(asked["tools"])]
        given |= _choice(asked)
    return orjson.dumps(given)


def _refused(name: str, why: str) -> BadRequest:
    return BadRequest(
        f"'{name}' cannot be asked of Anthropic's API, which is all that is left to answer: {why}.",
        param=name,
        code="not_translated",
    )


def _insist_on_counterparts(asked: Json) -> None:
    """Raises `BadRequest` for what an answer would have to do without."""
    if asked.get("n", 1) > 1:
        raise _refused("n", "it gives one answer at a time")
    for name in ("logprobs", "top_logprobs"):
        if asked.get(name):
            raise _refused(name, "it does not tell probabilities")
    if asked.get("logit_bias"):
        raise _refused("logit_bias", "its tokens are others")
    form = asked.get("response_format", {}).get("type", "text")
    if form != "text":
        raise _refused("response_format", "describe the form in the prompt, or as the parameters of a tool")


def _sampling(asked: Json) -> Json:
    given: Json = {}
    if "temperature" in asked:
        given["temperature"] = min(asked["temperature"], 1)
    elif "top_p" in asked:  # newer models take one of the two only
        given["top_p"] = asked["top_p"]
    if asked.get("top_k", 0) > 0:
        given["top_k"] = asked["top_k"]
    stops = asked.get("stop") or []
    if stops:
        stops = [stops] if isinstance(stops, str) else stops
        if not all(stop.strip() for stop in stops):
            raise _refused("stop", "it takes no stop sequence of blanks and line breaks alone")
        given["stop_sequences"] = stops
    return given


def _messages(messages: list[Json]) -> tuple[str, list[Json]]:
    """What the system says, and the conversation: turns of the user and of the assistant, each of one or
    more messages."""
    system: list[str] = []
    turns: list[Json] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message["role"]
        if role in ("system", "developer"):
            system += _texts(message.get("content"), where)
            continue
        match role:
            case "user":
                blocks = _blocks(message.get("content"), where)
            case "assistant":
                blocks = _said(message, where)
                role = "assistant"
            case "tool":
                blocks = [_result(message, where)]
                role = "user"
            case _:
                raise _refused(f"{where}.role", "use the roles system, user, assistant and tool")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    turns = [turn for turn in turns if turn["content"]]
    if turns and turns[-1]["role"] == "assistant":
        _without_last_blanks(turns[-1]["content"])
    return "\n\n".join(text for text in system if text), turns


def _without_last_blanks(blocks: list[Json]) -> None:
    """An answer that is to be gone on with may not end with a blank there."""
    if blocks[-1]["type"] == "text" and blocks[-1]["text"].rstrip():
        blocks[-1] = {"type": "text", "text": blocks[-1]["text"].rstrip()}


def _parts(content: Any) -> list[Json]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(content: Any, where: str) -> list[str]:
    return [_text(part, where) for part in _parts(content)]


def _text(part: Json, where: str) -> str:
    kind = part.get("type")
    text = part.get("text" if kind == "text" else "refusal")
    if kind not in ("text", "refusal") or not isinstance(text, str):
        raise _refused(f"{where}.content", "only text can stand there")
    return text


def _blocks(content: Any, where: str) -> list[Json]:
    """Of the user: texts and images. Empty texts are left out, it takes none."""
    blocks: list[Json] = []
    for part in _parts(content):
        if part.get("type") == "image_url":
            blocks.append(_image(part, where))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            if part["text"].strip():
                blocks.append({"type": "text", "text": part["text"]})
        else:
            raise _refused(f"{where}.content", "texts and images can be translated, and nothing else")
    return blocks


def _image(part: Json, where: str) -> Json:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str):
        if found := _IMAGE.fullmatch(url):
            data = "".join(found[2].split())
            return {"type": "image", "source": {"type": "base64", "media_type": found[1], "data": data}}
        if url.startswith("https://"):
            return {"type": "image", "source": {"type": "url", "url": url}}
    raise _refused(
        f"{where}.content", "an image is a data URL (jpeg, png, gif or webp, in base64) or an https one"
    )


def _said(message: Json, where: str) -> list[Json]:
    """Of the assistant: texts, and calls of tools."""
    texts = _texts(message.get("content"), where)
    blocks: list[Json] = [{"type": "text", "text": text} for text in texts if text.strip()]
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _refused(f"{where}.tool_calls", "they must be an array")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str):
            raise _refused(f"{where}.tool_calls", "each must be a function with an id")
        if not isinstance(function.get("name"), str):
            raise _refused(f"{where}.tool_calls", "each function must have a name")
        arguments = _arguments(function.get("arguments"), where)
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


def _arguments(text: Any, where: str) -> Json:
    try:
        arguments = orjson.loads(text) if text else {}
    except (orjson.JSONDecodeError, TypeError):
        arguments = None
    if not isinstance(arguments, dict):
        raise _refused(f"{where}.tool_calls", "the arguments of a call must be an object, written as JSON")
    return arguments


def _result(message: Json, where: str) -> Json:
    of = message.get("tool_call_id")
    if not isinstance(of, str):
        raise _refused(f"{where}.tool_call_id", "it must say which call the result is of")
    blocks = _blocks(message.get("content"), where)
    return {"type": "tool_result", "tool_use_id": of} | ({"content": blocks} if blocks else {})


def _tool(tool: Json, index: int) -> Json:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise _refused(f"tools[{index}]", "only functions can be translated")
    name, about = function.get("name"), function.get("description")
    parameters = function.get("parameters") or {}
    if not isinstance(name, str) or not isinstance(parameters, dict):
        raise _refused(f"tools[{index}]", "a function needs a name, and its parameters are an object")
    given: Json = {"name": name, "input_schema": {"type": "object", "properties": {}} | parameters}
    return given | ({"description": about} if isinstance(about, str) and about else {})


def _choice(asked: Json) -> Json:
    wanted = asked.get("tool_choice", "auto")
    match wanted:
        case "none":
            return {"tool_choice": {"type": "none"}}
        case "auto":
            choice: Json = {"type": "auto"}
        case "required":
            choice = {"type": "any"}
        case {"type": "function", "function": {"name": str(name)}}:
            choice = {"type": "tool", "name": name}
        case _:
            raise _refused("tool_choice", "it is auto, none, required or one function")
    if asked.get("parallel_tool_calls") is False:
        choice["disable_parallel_tool_use"] = True
    return {"tool_choice": choice} if choice != {"type": "auto"} else {}


# The way back

_FINISHED: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
"""Why an answer ended. What is not listed is new, and an end all the same."""


@dataclass(slots=True)
class _Block:
    """One part of an answer that is coming."""

    call: int | None = None
    """Of a call of a tool: the how manieth."""
    arguments: bool = False
    """Some of its arguments have come."""


@dataclass(slots=True)
class Events:
    """Anthropic's stream of events into OpenAI's, cut anywhere."""

    created: int = 0
    """What the answer says of its time, in seconds since 1970."""
    fault: AnswerError | FramingError | None = None
    """What was wrong after the events that were given; no more are."""
    _frames: EventFrames = field(default_factory=EventFrames)
    _head: Json = field(default_factory=dict)
    _usage: Json = field(default_factory=dict)
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _calls: int = 0
    _stop_reason: str = ""
    _over: bool = False

    def feed(self, data: bytes) -> bytes:
        """The events that are complete now, as OpenAI's. An error that is reported in the answer's place
        comes as OpenAI's error event. Never raises, see `fault`."""
        try:
            events = self._frames.feed(data)
        except FramingError as error:
            self.fault = error
            return b""
        return b"".join(self._translated(events))

    def end(self) -> bytes:
        """The stream is over; what its last bytes were. Never raises, see `fault`."""
        return b"".join(self._translated(self._frames.end()))

    def _translated(self, events: list[bytes]) -> Iterator[bytes]:
        for data in events:
            if self._over or self.fault is not None:
                return
            try:
                yield from self._one(_object(data))
            except AnswerError as error:
                self.fault = error

    def _one(self, told: Json) -> Iterator[bytes]:
        match told.get("type"):
            case "message_start":
                yield from self._begun(told.get("message"))
            case "content_block_start":
                yield from self._block_begun(told.get("index"), told.get("content_block"))
            case "content_block_delta":
                yield from self._grown(told.get("index"), told.get("delta"))
            case "content_block_stop":
                yield from self._block_ended(told.get("index"))
            case "message_delta":
                self._note_usage(told.get("usage"))
                delta = told.get("delta")
                if isinstance(delta, dict) and isinstance(reason := delta.get("stop_reason"), str):
                    self._stop_reason = reason
            case "message_stop":
                yield from self._ended()
            case "error":
                self._over = True
                yield event(orjson.dumps({"error": _error(told.get("error"))}))
        # `ping`, and whatever comes to be said beside these, says nothing of the answer.

    def _begun(self, message: Any) -> Iterator[bytes]:
        if self._head or not isinstance(message, dict):
            raise AnswerError("its answer begins twice, or with nothing")
        self._head = _head(message, "chat.completion.chunk", self.created)
        self._note_usage(message.get("usage"))
        yield self._chunk({"role": "assistant", "content": ""})

    def _block_begun(self, index: Any, told: Any) -> Iterator[bytes]:
        if not isinstance(index, int) or not isinstance(told, dict) or len(self._blocks) >= MAX_BLOCKS:
            raise AnswerError("a part of its answer makes no sense")
        block = self._blocks[index] = _Block()
        if told.get("type") == "tool_use":
            block.call = self._calls
            self._calls += 1
            call = {"index": block.call, **_call(told, "")}
            yield self._chunk({"tool_calls": [call]})
            if told.get("input"):  # here it is empty, as a rule, and comes piece by piece
                yield from self._argued(block, _written(told["input"]))
        elif told.get("type") == "text" and isinstance(text := told.get("text"), str) and text:
            yield self._chunk({"content": text})

    def _grown(self, index: Any, delta: Any) -> Iterator[bytes]:
        block = self._blocks.get(index) if isinstance(index, int) else None
        if block is None or not isinstance(delta, dict):
            raise AnswerError("a piece of its answer belongs to no part of it")
        match delta:
            case {"type": "text_delta", "text": str(text)} if text:
                yield self._chunk({"content": text})
            case {"type": "thinking_delta", "thinking": str(text)} if text:
                yield self._chunk({"reasoning_content": text})
            case {"type": "input_json_delta", "partial_json": str(text)} if text and block.call is not None:
                yield from self._argued(block, text)

    def _argued(self, block: _Block, text: str) -> Iterator[bytes]:
        block.arguments = True
        yield self._chunk({"tool_calls": [{"index": block.call, "function": {"arguments": text}}]})

    def _block_ended(self, index: Any) -> Iterator[bytes]:
        block = self._blocks.get(index) if isinstance(index, int) else None
        if block is not None and block.call is not None and not block.arguments:
            yield from self._argued(block, "{}")  # a call without arguments; OpenAI's clients parse them

    def _ended(self) -> Iterator[bytes]:
        if not self._head:
            raise AnswerError("its answer ends before it begins")
        self._over = True
        yield self._chunk({}, _FINISHED.get(self._stop_reason, "stop"))
        yield event(orjson.dumps({**self._head, "choices": [], "usage": _usage(self._usage)}))
        yield event(DONE)

    def _note_usage(self, told: Any) -> None:
        """Counts are of the answer as a whole each time; those that are told later count."""
        self._usage |= _counted(told)

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> bytes:
        if not self._head:
            raise AnswerError("its answer goes on before it begins")
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event(orjson.dumps({**self._head, "choices": [choice]}))


@dataclass(slots=True)
class Whole:
    """An answer in one piece."""

    created: int = 0
    fault: AnswerError | FramingError | None = None
    """None: what is wrong shows at the end only."""
    _body: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> bytes:
        """Nothing, before the end. Raises `AnswerError` for more than anybody answers."""
        self._body += data
        if len(self._body) > MAX_WHOLE_BYTES:
            raise AnswerError(f"an answer of more than {MAX_WHOLE_BYTES} bytes")
        return b""

    def end(self) -> bytes:
        """The answer as OpenAI's. Raises `AnswerError` for what is none."""
        message = _object(bytes(self._body))
        blocks = message.get("content")
        if message.get("type") != "message" or not isinstance(blocks, list):
            raise AnswerError("its answer holds nothing")
        blocks = [block for block in blocks if isinstance(block, dict)]
        texts = [block["text"] for block in blocks if isinstance(block.get("text"), str)]
        calls = [
            _call(block, _written(block.get("input") or {}))
            for block in blocks
            if block.get("type") == "tool_use"
        ]
        said: Json = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
        if calls:
            said["tool_calls"] = calls
        reason = message.get("stop_reason")
        choice = {
            "index": 0,
            "message": said,
            "finish_reason": _FINISHED.get(reason, "stop") if isinstance(reason, str) else "stop",
        }
        answer = {
            **_head(message, "chat.completion", self.created),
            "choices": [choice],
            "usage": _usage(_counted(message.get("usage"))),
        }
        return orjson.dumps(answer)


_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


_MOST_TOKENS = 10**9
"""Of a count that is believed."""


def _counted(told: Any) -> Json:
    """Of what it tells, the counts that can be."""
    counts = told if isinstance(told, dict) else {}
    return {
        name: count
        for name in _COUNTS
        if type(count := counts.get(name)) is int and 0 <= count <= _MOST_TOKENS
    }


def _written(arguments: Any) -> str:
    try:
        return orjson.dumps(arguments).decode()
    except orjson.JSONEncodeError:  # it reads deeper than it writes
        raise AnswerError("the arguments of a call are nested too deeply") from None


def _usage(told: Json) -> Json:
    """Its `input_tokens` leave out what came from a cache or went into one, OpenAI's count all."""
    cached = told.get("cache_read_input_tokens", 0)
    prompt = told.get("input_tokens", 0) + told.get("cache_creation_input_tokens", 0) + cached
    output = told.get("output_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _head(message: Json, kind: str, created: int) -> Json:
    its_id, model = message.get("id"), message.get("model")
    return {
        "id": its_id if isinstance(its_id, str) else "",
        "object": kind,
        "created": created,
        "model": model if isinstance(model, str) else "",
    }


def _call(block: Json, arguments: str) -> Json:
    name, its_id = block.get("name"), block.get("id")
    if not isinstance(name, str) or not isinstance(its_id, str):
        raise AnswerError("it calls a tool without a name or an id")
    return {"id": its_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _error(told: Any) -> Json:
    """Its error in OpenAI's form; the kind (`overloaded_error`) stands in for a code."""
    kind = told.get("type") if isinstance(told, dict) else None
    message = told.get("message") if isinstance(told, dict) else None
    return {
        "message": message if isinstance(message, str) else "It gave no reason.",
        "type": "server_error",
        "code": kind if isinstance(kind, str) else "api_error",
    }


def _object(data: bytes) -> Json:
    try:
        told = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise AnswerError("a part of its answer is not JSON") from None
    if not isinstance(told, dict):
        raise AnswerError("a part of its answer is not an object")
    return told
