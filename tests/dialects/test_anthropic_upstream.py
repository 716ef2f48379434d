"""A chat asked of Anthropic's API: the request there, and its answer back, whole or in any cut."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.errors import BadRequest
from balancer.core.model import Endpoint
from balancer.dialects import openai_upstream
from balancer.dialects.anthropic_upstream import DEFAULT_MAX_TOKENS, MAX_BLOCKS, Events, Whole, body
from balancer.dialects.framing import EventFrames
from balancer.dialects.openai import DONE, AnswerError, Assembly, Request, StreamReader, parse, parse_whole
from balancer.dialects.passing import Passage

USER = {"role": "user", "content": "Hello"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def asked(*messages: object, **fields: object) -> Request:
    content = {"model": "m", "messages": list(messages) or [USER], **fields}
    return parse(Endpoint.CHAT, orjson.dumps(content))


def sent(*messages: object, **fields: object) -> dict[str, object]:
    return orjson.loads(body(asked(*messages, **fields), "claude", stream=True))


def refused(*messages: object, **fields: object) -> str:
    with pytest.raises(BadRequest) as caught:
        sent(*messages, **fields)
    assert caught.value.status == 400
    return caught.value.message


# The way there ...


def test_a_plain_question():
    assert sent() == {
        "model": "claude",
        "max_tokens": DEFAULT_MAX_TOKENS,
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    }


def test_an_answer_in_one_piece_is_asked_for_as_one():
    assert "stream" not in orjson.loads(body(asked(), "claude", stream=False))


def test_what_the_system_says_stands_apart_wherever_it_stood():
    messages = (
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "developer", "content": [{"type": "text", "text": "No lists."}]},
        {"role": "assistant", "content": "Hi"},
        USER,
    )
    given = sent(*messages)
    assert given["system"] == "Be brief.\n\nNo lists."
    assert [turn["role"] for turn in given["messages"]] == ["user", "assistant", "user"]


def test_a_system_that_nobody_speaks_to_is_no_chat():
    assert "needs a message of the user" in refused({"role": "system", "content": "Be brief."})


def test_messages_of_one_role_in_a_row_are_one_turn():
    given = sent(USER, USER, {"role": "assistant", "content": ""}, USER)
    assert [turn["role"] for turn in given["messages"]] == ["user", "user"]
    assert len(given["messages"][0]["content"]) == 2


def test_an_answer_that_is_to_be_gone_on_with_ends_without_a_blank():
    given = sent(USER, {"role": "assistant", "content": "The answer is \n"})
    assert given["messages"][-1]["content"] == [{"type": "text", "text": "The answer is"}]


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 9, "max_tokens": 7}, {"max_tokens": 9}),
        ({"temperature": 0.25}, {"temperature": 0.25}),
        ({"temperature": 2}, {"temperature": 1}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
    ],
)
def test_how_to_sample_is_said_in_its_words(fields, given):
    assert given.items() <= sent(**fields).items()


def test_of_two_ways_to_narrow_the_sampling_it_takes_one():
    assert "top_p" not in sent(temperature=0.5, top_p=0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1, "frequency_penalty": 1, "presence_penalty": 1, "min_p": 0.1, "repeat_penalty": 1.1},
        {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
        {"n": 1, "logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}, "top_k": -1},
        {"stop": [], "tools": [], "tool_choice": "none", "user": "somebody", "metadata": {"a": "b"}},
    ],
)
def test_what_changes_only_the_sampling_is_passed_over(fields):
    assert sent(**fields) == sent()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"n": 2},
            "'n' cannot be asked of Anthropic's API, which is all that is left to answer: it gives one",
        ),
        ({"logprobs": True}, "probabilities"),
        ({"top_logprobs": 3}, "probabilities"),
        ({"logit_bias": {"1": 5}}, "its tokens are others"),
        ({"response_format": {"type": "json_object"}}, "describe the form in the prompt"),
        ({"stop": ["\n"]}, "no stop sequence of blanks"),
        ({"tools": [{"type": "web_search"}]}, "'tools[0]' cannot be asked"),
        ({"tools": [{"type": "function", "function": {}}]}, "a function needs a name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "f"}, "'tool_choice'"),
    ],
)
def test_what_an_answer_would_lack_is_refused_with_a_sentence(fields, words):
    assert words in refused(**fields)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "function", "name": "f", "content": "1"}, "use the roles system, user, assistant and tool"),
        ({"role": "tool", "content": "1"}, "which call the result is of"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "texts and images can be translated"),
        ({"role": "user", "content": [{"type": "text"}]}, "texts and images can be translated"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]},
            "data URL",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, "data URL"),
        ({"role": "system", "content": [{"type": "image_url"}]}, "only text can stand there"),
        ({"role": "assistant", "content": None, "tool_calls": "x"}, "must be an array"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "a function with an id"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}, "must have a name"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
            "written as JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 7}}]},
            "written as JSON",
        ),
    ],
)
def test_a_message_without_counterpart_is_refused_and_named(message, words):
    told = refused(USER, message)
    assert words in told
    assert "messages[1]" in told


def test_images_are_given_as_data_or_by_their_address():
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "text", "text": " "},
        {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "image_url", "image_url": {"url": "https://x.example/y.png"}},
    ]
    assert sent({"role": "user", "content": parts})["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "image", "source": {"type": "url", "url": "https://x.example/y.png"}},
    ]


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"properties": {"city": {}}}},
}


def test_tools_their_calls_and_their_results():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    other = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": ""}}
    given = sent(
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [call, other]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "user", "content": "And now?"},
        tools=[WEATHER],
    )
    assert given["tools"] == [
        {
            "name": "weather",
            "description": "of a city",
            "input_schema": {"type": "object", "properties": {"city": {}}},
        }
    ]
    assert given["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bonn"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "c2"},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "none"}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"type": "tool", "name": "weather"},
        ),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
    ],
)
def test_which_tool_to_use_is_said_in_its_words(fields, choice):
    assert sent(tools=[WEATHER], **fields).get("tool_choice") == choice


@pytest.mark.parametrize("endpoint", [Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS])
def test_it_has_chats_only(endpoint):
    field = {Endpoint.COMPLETIONS: "prompt", Endpoint.EMBEDDINGS: "input"}[endpoint]
    request = parse(endpoint, orjson.dumps({"model": "m", field: "x"}))
    with pytest.raises(BadRequest):
        body(request, "claude", stream=False)


# The way back, as a stream ...


def events(*told: dict[str, object]) -> bytes:
    return b"".join(
        b"event: " + str(one["type"]).encode() + b"\ndata: " + orjson.dumps(one) + b"\n\n" for one in told
    )


def start(**usage: int) -> dict[str, object]:
    usage = {"input_tokens": 25, "output_tokens": 1} | usage
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "claude-x"}
    return {"type": "message_start", "message": {**message, "stop_reason": None, "usage": usage}}


def text(words: str, index: int = 0) -> dict[str, object]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": words}}


def block(index: int = 0, **about: object) -> dict[str, object]:
    about = about or {"type": "text", "text": ""}
    return {"type": "content_block_start", "index": index, "content_block": about}


def argument(part: str, index: int = 0) -> dict[str, object]:
    delta = {"type": "input_json_delta", "partial_json": part}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def block_stop(index: int = 0) -> dict[str, object]:
    return {"type": "content_block_stop", "index": index}


def end(reason: str = "end_turn", tokens: int = 15) -> dict[str, object]:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return {"type": "message_delta", "delta": delta, "usage": {"output_tokens": tokens}}


STOP = {"type": "message_stop"}
PING = {"type": "ping"}
HELLO = events(start(), block(), PING, text("Hello"), text(" wörld\n\n"), block_stop(), end(), STOP)
TOOLS = events(
    *(
        start(cache_read_input_tokens=100, cache_creation_input_tokens=5),
        block(),
        text("I look."),
        block_stop(),
    ),
    *(block(1, type="tool_use", id="toolu_1", name="weather", input={}), argument("", 1)),
    *(argument('{"city"', 1), argument(':"Bonn"}', 1), block_stop(1)),
    *(block(2, type="tool_use", id="toolu_2", name="now", input={}), block_stop(2)),
    *(end("tool_use", 40), STOP),
)


def translated(*cuts: bytes, then_end: bool = True) -> bytes:
    stream = Events(created=7)
    out = b"".join(map(stream.feed, cuts)) + (stream.end() if then_end else b"")
    if stream.fault is not None:
        raise stream.fault
    return out


def chunks(data: bytes) -> list[dict[str, object]]:
    frames = EventFrames()
    found = frames.feed(data) + frames.end()
    assert found.pop() == DONE
    return [orjson.loads(one) for one in found]


def assembled(data: bytes) -> tuple[dict[str, object], StreamReader]:
    """As the balancer puts a stream together, for a client that asked for one piece."""
    reader, assembly = StreamReader("m", usage_wanted=True), Assembly(Endpoint.CHAT, "m")
    for one in EventFrames().feed(translated(data)):
        if (chunk := reader.read_chunk(one)) is not None:
            assembly.add(chunk)
    return assembly.result(), reader


def test_a_text_comes_as_openais_chunks():
    told = chunks(translated(HELLO))
    assert {(one["id"], one["object"], one["created"], one["model"]) for one in told} == {
        ("msg_1", "chat.completion.chunk", 7, "claude-x")
    }
    deltas = [choice["delta"] for one in told for choice in one["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " wörld\n\n"},
        {},
    ]
    assert [choice["finish_reason"] for one in told for choice in one["choices"]] == [
        None,
        None,
        None,
        "stop",
    ]
    assert told[-1]["usage"] == {
        "prompt_tokens": 25,
        "completion_tokens": 15,
        "total_tokens": 40,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_calls_of_tools_come_piece_by_piece_with_arguments_that_can_be_read():
    answer, reader = assembled(TOOLS)
    message = answer["choices"][0]["message"]
    assert message["content"] == "I look."
    assert message["tool_calls"] == [
        {
            "id": "toolu_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Bonn"}'},
        },
        {"id": "toolu_2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert (reader.usage.prompt_tokens, reader.usage.cached_tokens, reader.usage.output_tokens) == (
        130,
        100,
        40,
    )


def test_arguments_that_come_at_once_are_not_lost():
    stream = events(
        start(), block(type="tool_use", id="t", name="f", input={"a": 1}), block_stop(), end("tool_use"), STOP
    )
    answer, _ = assembled(stream)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_why_it_ended(reason, finish):
    answer, _ = assembled(events(start(), block(), text("x"), block_stop(), end(reason), STOP))
    assert answer["choices"][0]["finish_reason"] == finish


def test_only_its_stop_makes_a_stream_whole():
    """Not the reason for its end, which comes before; and not the end of the connection."""
    reader = StreamReader("m", usage_wanted=False)
    passage = Passage(reader)
    passage.feed(translated(HELLO.removesuffix(events(STOP))))
    assert reader.begun
    assert not reader.is_whole
    passage.feed(translated(HELLO)[len(translated(HELLO.removesuffix(events(STOP)))) :])
    assert reader.is_whole


def test_what_comes_after_the_stop_is_not_for_the_client():
    assert translated(HELLO + events(text("more"), start())) == translated(HELLO)


def test_what_is_new_is_passed_over():
    new = events(
        start(),
        {"type": "something_new", "x": 1},
        block(0, type="server_tool_use", id="s", name="web_search", input={}),
        argument("{}", 0),
        block(1, type="thinking", thinking=""),
        {"type": "content_block_delta", "index": 1, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "signature_delta", "signature": "s"}},
        *(block(2, type="text", text="Be"), text("gun", 2), end(), STOP),
    )
    answer, _ = assembled(new)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Begun", "Hm")
    assert "tool_calls" not in message


@pytest.mark.parametrize(("kind", "code"), [("overloaded_error", "overloaded_error"), (7, "api_error")])
def test_an_error_in_the_answers_place_is_openais_error(kind, code):
    told = events({"type": "error", "error": {"type": kind, "message": "Overloaded"}})
    passage = Passage(StreamReader("m", usage_wanted=False))
    passage.feed(translated(told))
    assert isinstance(passage.fault, AnswerError)
    assert passage.fault.code == code
    assert passage.fault.words == "Overloaded"


def test_what_came_before_a_fault_is_given():
    stream = Events()
    out = stream.feed(events(start(), block(), text("Hello")) + b"data: [\n\n" + events(text("more")))
    assert b"Hello" in out
    assert b"more" not in out
    assert isinstance(stream.fault, AnswerError)


@pytest.mark.parametrize(
    "told",
    [
        events(text("before its beginning")),
        events(STOP),
        events(start(), start()),
        events({"type": "message_start"}),
        events(start(), text("of no block")),
        events(start(), block("x")),
        events(start(), {"type": "content_block_start", "index": 0}),
        events(start(), block(type="tool_use", id=1, name="f")),
        events(start(), *(block(index) for index in range(MAX_BLOCKS + 1))),
        b"data: 7\n\n",
    ],
)
def test_what_is_no_such_stream_is_a_fault(told):
    with pytest.raises(AnswerError):
        translated(told)


@pytest.mark.parametrize("count", [2**64 - 1, -1, True, 1.5, "7"])
def test_a_count_that_can_be_none_is_not_believed(count):
    told = {"input_tokens": count, "cache_read_input_tokens": count}
    answer, _ = assembled(events(start(**told), block(), text("Hi"), end(), STOP))
    assert answer["usage"]["prompt_tokens"] == 0
    message = {"type": "message", "content": [{"type": "text", "text": "Hi"}], "usage": told}
    assert whole(message)["usage"]["prompt_tokens"] == 0


def test_arguments_deeper_than_can_be_written_are_a_fault():
    nested = b'{"a":' * 300 + b"1" + b"}" * 300
    call = b'{"type":"tool_use","id":"1","name":"f","input":' + nested + b"}"
    with pytest.raises(AnswerError, match="too deeply"):
        translated(
            events(start()),
            b'data: {"type":"content_block_start","index":0,"content_block":' + call + b"}\n\n",
        )
    answer = Whole()
    answer.feed(b'{"type":"message","content":[' + call + b"]}")
    with pytest.raises(AnswerError, match="too deeply"):
        answer.end()


def test_an_endless_event_is_not_held():
    stream = Events()
    stream.feed(b"data: " + b"x" * 2_000_000)
    assert stream.fault is not None


@given(st.sampled_from([HELLO, TOOLS]), st.lists(st.integers(0, 1500), max_size=12))
def test_the_cut_does_not_matter(stream, at):
    cuts = sorted({0, len(stream), *(place % len(stream) for place in at)})
    assert translated(*(stream[a:b] for a, b in pairwise(cuts))) == translated(stream)


def test_not_even_byte_by_byte():
    for stream in (HELLO, TOOLS):
        assert translated(*(stream[at : at + 1] for at in range(len(stream)))) == translated(stream)


some_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
some_event = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            [
                *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
                *("message_delta", "message_stop", "ping", "error", "x"),
            ]
        )
    },
    optional={
        "index": st.integers(-1, 3) | some_json,
        "message": st.fixed_dictionaries({}, optional={"id": some_json, "usage": some_json}) | some_json,
        "content_block": st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "tool_use", "x"])},
            optional={name: some_json for name in ("id", "name", "input", "text")},
        )
        | some_json,
        "delta": st.fixed_dictionaries(
            {"type": st.sampled_from(["text_delta", "input_json_delta", "thinking_delta"])},
            optional={name: some_json for name in ("text", "partial_json", "stop_reason", "thinking")},
        )
        | some_json,
        "usage": st.dictionaries(st.sampled_from(["input_tokens", "output_tokens"]), some_json) | some_json,
        "error": some_json,
    },
)


@given(st.lists(some_event, max_size=8).map(lambda told: events(*told)) | st.binary(max_size=60))
def test_any_stream_is_openais_or_has_a_fault(data):
    stream = Events()
    out = stream.feed(data) + stream.end()
    reader = StreamReader("m", usage_wanted=True)
    for one in EventFrames().feed(out):
        try:
            reader.read_chunk(one)
        except AnswerError as error:
            assert error.code  # an error event of its own, and nothing else that we made


# ... and in one piece


def whole(message: object) -> dict[str, object]:
    answer = Whole(created=7)
    data = orjson.dumps(message)
    assert answer.feed(data[:5]) + answer.feed(data[5:]) == b""
    return orjson.loads(answer.end())


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [
        {"type": "text", "text": "I "},
        {"type": "text", "text": "look."},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 2},
}


def test_an_answer_in_one_piece_is_openais():
    answer, usage = parse_whole(orjson.dumps(whole(MESSAGE)), "m")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                ],
            },
            "finish_reason": "tool_calls",
        }
    ]
    assert (answer["object"], answer["id"], answer["created"]) == ("chat.completion", "msg_1", 7)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (5, 2, 4)


def test_the_whole_and_the_stream_say_the_same():
    streamed, _ = assembled(HELLO)
    message = MESSAGE | {
        "content": [{"type": "text", "text": "Hello wörld\n\n"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 25, "output_tokens": 15},
    }
    assert whole(message) | {"model": "m"} == streamed | {"created": 7}


@pytest.mark.parametrize(
    "message", [{}, [], {"type": "message"}, {"type": "error"}, MESSAGE | {"content": 1}]
)
def test_what_is_no_message_is_no_answer(message):
    with pytest.raises(AnswerError):
        whole(message)


def test_a_call_without_a_name_is_no_answer():
    with pytest.raises(AnswerError):
        whole(MESSAGE | {"content": [{"type": "tool_use"}]})


# OpenAI's own API, by others ...


def to_openai(names_limit: bool = True, streams: bool = True, **fields: object) -> dict[str, object]:
    request = asked(**fields)
    return orjson.loads(
        openai_upstream.body(request, "gpt", stream=streams, names_completion_limit=names_limit)
    )


def test_what_only_engines_know_is_left_out():
    fields = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "chat_template_kwargs": {"thinking": True}}
    assert to_openai(temperature=0.5, **fields) == {
        "model": "gpt",
        "messages": [USER],
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert to_openai(streams=False) == {"model": "gpt", "messages": [USER]}


def test_the_options_of_a_stream_are_those_of_openai():
    options = {"continuous_usage_stats": True, "include_obfuscation": False}
    assert to_openai(stream=True, stream_options=options)["stream_options"] == {
        "include_usage": True,
        "include_obfuscation": False,
    }


@pytest.mark.parametrize(
    ("names", "fields", "limits"),
    [
        (True, {"max_tokens": 5}, {"max_completion_tokens": 5}),
        (True, {"max_tokens": 5, "max_completion_tokens": 6}, {"max_completion_tokens": 6}),
        (False, {"max_tokens": 5}, {"max_tokens": 5}),
    ],
)
def test_the_limit_is_called_as_the_api_knows_it(names, fields, limits):
    given = to_openai(names, **fields)
    assert {name: value for name, value in given.items() if name.startswith("max")} == limits
