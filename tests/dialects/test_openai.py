import itertools
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.errors import BadRequest, ModelLoading, ModelNotFound, RequestError
from balancer.core.model import Endpoint, ModelName, ModelOffer
from balancer.dialects.openai import (
    UNSUPPORTED,
    AnswerError,
    Assembly,
    StreamReader,
    error_body,
    merge,
    models_body,
    parse,
    parse_chunk,
    parse_whole,
    read_complaint,
)

CHAT = Endpoint.CHAT
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def parsed(**more):
    return parse(CHAT, json.dumps(HELLO | more).encode())


# Requests


def test_what_routing_needs_is_read_off_a_request():
    request = parsed(stream=True, stream_options={"include_usage": True})
    assert (request.model, request.stream, request.usage_wanted) == ("m", True, True)


def test_a_worker_is_always_asked_for_the_usage_of_a_stream():
    body = orjson.loads(parsed(temperature=0.5).to_worker("their-name", stream=True))
    assert body == {
        "model": "their-name",
        "messages": HELLO["messages"],
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    "field",
    [
        *("draft_model", "n_discard", "user", "store", "service_tier", "keep_alive", "options"),
        *("safety_identifier", "verbosity", "prediction", "prompt_cache_key", "chat_parser", "invented"),
    ],
)
def test_what_is_not_listed_does_not_reach_an_engine(field):
    value = "auto"
    assert field not in orjson.loads(parsed(**{field: value}).to_worker("m", stream=False))


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_an_answer_cannot_pass_over_is_refused_by_name(field):
    with pytest.raises(BadRequest, match="not supported") as caught:
        parsed(**{field: {"a": 1}})
    assert caught.value.param == field
    parsed(**{field: None})
    parsed(**{field: []})


def test_answers_are_text():
    parsed(modalities=["text"])
    with pytest.raises(BadRequest, match="modalities"):
        parsed(modalities=["text", "audio"])


@pytest.mark.parametrize("name", ["repeat_penalty", "repetition_penalty"])
def test_each_engine_finds_a_repetition_penalty_under_its_own_name(name):
    body = orjson.loads(parsed(**{name: 1.1}).to_worker("m", stream=False))
    assert body["repeat_penalty"] == body["repetition_penalty"] == 1.1
    both = orjson.loads(parsed(repeat_penalty=1.2, repetition_penalty=1.3).to_worker("m", stream=False))
    assert (both["repeat_penalty"], both["repetition_penalty"]) == (1.2, 1.3)


def test_of_a_templates_variables_only_thinking_is_passed_on():
    body = orjson.loads(parsed(chat_template_kwargs={"enable_thinking": False}).to_worker("m", stream=False))
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    for harmful in ({"tokenize": True}, {"enable_thinking": "{{ x }}"}, {"chat_template": "x"}, []):
        with pytest.raises(BadRequest, match="chat_template_kwargs"):
            parsed(chat_template_kwargs=harmful)


def nested(depth: int) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"[[[{{{"}],"response_format":%b{}%b}' % (
        b'{"a\\"[":' * (depth - 2),
        b"}" * (depth - 2),
    )


def test_a_body_is_nested_to_a_bound():
    assert parse(CHAT, nested(64))
    with pytest.raises(BadRequest, match="nested too deeply: 64"):
        parse(CHAT, nested(65))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join(b'"%d":1' % number for number in range(200_000)) + b"}",
        b'{"a":[' + b"[]," * 200_000 + b"[]]}",
        b'{"a":' + b"1" * 1_000_000 + b"}",
    ],
    ids=["open", "deep", "members", "arrays", "digits"],
)
def test_what_would_take_long_to_read_is_refused_unread(body):
    with pytest.raises(BadRequest):
        parse(CHAT, body)


def test_brackets_and_colons_in_a_text_are_no_structure():
    text = 'a "quoted" \\ [{: ' * 20_000
    assert parsed(messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"model": "m",\n "messages": NaN}', "line 2, column 14"),
        (b'{"model": "m",\n "a": -Infinity}', "line 2, column 8"),
        (b'\xef\xbb\xbf{"model": "m"}', "line 1, column 1"),
        ('{"model": "m"}'.encode("utf-16"), "line 1, column 1"),
        (b'{"model": "m", "messages": [', "line 1, column 29"),
        (b'{"model": "m", "a": "\xff"}', "line 1, column 1"),
        (b'{"a": [' + b"{}," * 100 + b"}", "line 1, column 308"),
    ],
)
def test_what_is_no_json_is_told_with_its_place(body, place):
    with pytest.raises(BadRequest, match=place) as caught:
        parse(CHAT, body)
    assert "\ufffd" not in caught.value.message


def test_two_models_are_one_too_many():
    twice = b'{"model": "a", "messages": [{"role": "user", "content": ""}], "model": "b"}'
    with pytest.raises(BadRequest, match="twice") as caught:
        parse(CHAT, twice)
    assert caught.value.param == "model"
    inside = {"type": "object", "properties": {"model": {"model": "model"}}}
    assert parsed(tools=[{"type": "function", "function": {"name": "f", "parameters": inside}}])


def test_null_means_left_out():
    assert "temperature" not in orjson.loads(parsed(temperature=None).body)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"model": "x" * 300}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [HELLO["messages"][0]] * 2001}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": {}}, "tools"),
    ],
)
def test_a_wrong_field_is_named(more, param):
    with pytest.raises(BadRequest) as caught:
        parsed(**more)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000])
def test_what_is_no_json_object_is_the_clients_fault(body):
    with pytest.raises(BadRequest):
        parse(CHAT, body)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["model", "messages", "prompt", "input", "role", "content", "stream", "n", "stop"]
                ),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(list(Endpoint)),
)
def test_any_body_is_either_a_request_or_the_clients_fault(body, endpoint):
    try:
        request = parse(endpoint, body)
    except BadRequest as error:
        assert orjson.loads(error_body(error))["error"]["message"]
    else:
        assert orjson.loads(request.to_worker("m", stream=True))["stream"] is True


def test_a_request_that_is_nested_deeper_than_can_be_written_is_the_clients_fault():
    schema: dict = {}
    for _ in range(300):
        schema = {"a": schema}
    with pytest.raises(BadRequest, match="nested"):
        parsed(response_format=schema)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [""] * 3000, [[1]] * 3000, [[1] * 90_000] * 2, [1] * 100_001, [1, "a"], [None], {}]
)
def test_a_prompt_beyond_all_bounds_is_the_clients_fault(prompt):
    with pytest.raises(BadRequest) as caught:
        parse(Endpoint.EMBEDDINGS, json.dumps({"model": "m", "input": prompt}).encode())
    assert caught.value.param == "input"


def test_it_is_known_how_many_answers_are_asked_for():
    def choices(**more) -> int:
        return parse(Endpoint.COMPLETIONS, json.dumps({"model": "m"} | more).encode()).choices

    assert choices(prompt="a") == choices(prompt=[1, 2]) == 1
    assert choices(prompt=["a", "b"], n=3) == 6
    assert parsed(n=2).choices == 2


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner))


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "index": st.integers(0, 2),
                "delta": st.dictionaries(
                    st.sampled_from(["content", "role", "tool_calls", "x"]), anything, max_size=3
                ),
                "finish_reason": anything,
                "logprobs": anything,
            },
        ),
        max_size=6,
    )
)
def test_any_pieces_are_put_together_or_are_an_error_of_the_worker(choices):
    assembly = Assembly(CHAT, "m")
    try:
        for choice in choices:
            assembly.add(parse_chunk(json.dumps({"choices": [choice]}).encode()))
    except AnswerError:
        return
    orjson.dumps(assembly.result())


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2]]])
def test_every_form_of_prompt_is_taken(prompt):
    body = json.dumps({"model": "m", "prompt": prompt, "input": prompt}).encode()
    assert orjson.loads(parse(Endpoint.COMPLETIONS, body).body)["prompt"] == prompt
    assert orjson.loads(parse(Endpoint.EMBEDDINGS, body).body)["input"] == prompt


# Answers


def chunk(delta: dict | None = None, finish: str | None = None, **more) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return json.dumps(
        {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [choice]}
        | more
    ).encode()


USAGE = chunk(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
STREAM = [
    chunk({"role": "assistant", "content": None}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk(finish="stop"),
    USAGE,
    b"[DONE]",
]


def test_an_answer_begins_with_its_first_word_and_ends_with_its_mark():
    reader = StreamReader("m", usage_wanted=True)
    states = []
    for data in STREAM:
        reader.read(data)
        states.append((reader.begun, reader.is_whole, reader.done))
    assert states == [
        (False, False, False),
        (True, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, False),
        (True, True, True),
    ]
    assert (reader.usage.prompt_tokens, reader.usage.output_tokens) == (3, 2)


def test_a_bare_end_mark_is_no_end():
    reader = StreamReader("m", usage_wanted=True)
    for data in (STREAM[0], STREAM[1], b"[DONE]"):
        reader.read(data)
    assert reader.done
    assert not reader.is_whole


def test_several_choices_are_whole_when_each_has_finished():
    reader = StreamReader("m", usage_wanted=True, choices=2)
    whole = []
    second = {"index": 1, "delta": {}, "finish_reason": "stop"}
    for data in (chunk({"content": "a"}), chunk(finish="stop"), chunk(choices=[second])):
        reader.read(data)
        whole.append(reader.is_whole)
    assert whole == [False, False, True]


def test_a_client_that_did_not_ask_for_usage_does_not_get_its_event():
    reader = StreamReader("m", usage_wanted=False)
    passed = [reader.read(data) for data in STREAM]
    assert passed == [*STREAM[:4], None, None]
    assert reader.usage.output_tokens == 2


def test_a_workers_own_name_for_the_model_does_not_reach_the_client():
    reader = StreamReader("public", usage_wanted=True)
    passed = [reader.read(chunk({"content": '"model": "m"'}, model="/somewhere/m")) for _ in range(2)]
    for data in passed:
        assert orjson.loads(data)["model"] == "public"
        assert orjson.loads(data)["choices"][0]["delta"]["content"] == '"model": "m"'


@pytest.mark.parametrize(
    "event",
    [
        b'{"error": {"message": "out of memory"}}',
        b'{"choices": [], "error": "out of memory"}',
        b'{"error":"out of memory"}',
    ],
)
def test_an_error_in_a_stream_is_an_error(event):
    with pytest.raises(AnswerError) as caught:
        StreamReader("m", usage_wanted=True).read(event)
    assert caught.value.words == "out of memory"
    assert "out of memory" not in str(caught.value)


@pytest.mark.parametrize(
    "event",
    [
        *(b"garbage", b"[]", b'{"choices": 5}', b'{"choices": [5]}', b"\xff"),
        b'{"choices": [{"delta": "hi"}]}',
        b'{"choices": [{"index": [0], "delta": {}}]}',
        b'{"choices": [{"index": -1, "delta": {}}]}',
        b'{"choices": [{"delta": {"tool_calls": ["x"]}}]}',
        b'{"choices": [{"text": {}}]}',
    ],
)
def test_garbage_where_an_answer_should_begin_is_an_error(event):
    with pytest.raises(AnswerError):
        StreamReader("m", usage_wanted=True).read(event)


def assembled(*events: bytes, endpoint: Endpoint = CHAT) -> dict:
    assembly = Assembly(endpoint, "public")
    for data in events:
        assembly.add(parse_chunk(data))
    return assembly.result()


def test_a_stream_is_put_together_as_it_would_have_come_in_one_piece():
    assert assembled(*STREAM[:-1]) == {
        "id": "c1",
        "object": "chat.completion",
        "created": 5,
        "model": "public",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_tool_calls_are_put_together_by_their_index():
    def call(index: int, **more) -> dict:
        return {"tool_calls": [{"index": index, **more}]}

    answer = assembled(
        chunk({"role": "assistant"}),
        chunk(call(0, id="a", type="function", function={"name": "f", "arguments": ""})),
        chunk(call(0, function={"arguments": '{"x"'})),
        chunk(call(1, id="b", type="function", function={"name": "g", "arguments": "{}"})),
        chunk(call(0, function={"arguments": ": 1}"})),
        chunk(finish="tool_calls"),
    )
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_what_an_engine_adds_of_its_own_arrives_too():
    answer = assembled(
        chunk({"reasoning_content": "hm"}), chunk({"reasoning_content": "m"}), chunk(finish="stop")
    )
    assert answer["choices"][0]["message"]["reasoning_content"] == "hmm"


def test_several_choices_are_kept_apart():
    def of(index: int, text: str) -> bytes:
        return json.dumps({"choices": [{"index": index, "text": text, "finish_reason": None}]}).encode()

    answer = assembled(of(1, "b"), of(0, "a"), of(1, "c"), endpoint=Endpoint.COMPLETIONS)
    assert [choice["text"] for choice in answer["choices"]] == ["a", "bc"]


def test_logprobs_are_joined():
    def piece(token: str) -> bytes:
        return chunk(
            choices=[{"index": 0, "delta": {"content": token}, "logprobs": {"content": [{"token": token}]}}]
        )

    answer = assembled(piece("a"), piece("b"))
    assert answer["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}


@given(st.text(), st.lists(st.integers(0, 50)))
def test_a_text_is_the_same_however_it_was_cut(text, places):
    bounds = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    whole: dict = {}
    for start, end in itertools.pairwise(bounds):
        merge(whole, {"content": text[start:end]})
    assert whole["content"] == text


def test_an_answer_in_one_piece_gets_its_public_name():
    answer, usage = parse_whole(b'{"model": "/x", "data": [{}], "usage": {"prompt_tokens": 7}}', "public")
    assert (answer["model"], usage.prompt_tokens) == ("public", 7)


@pytest.mark.parametrize("count", [-1, 10**12, "5", True, None])
def test_absurd_counts_are_not_believed(count):
    body = json.dumps({"choices": [{}], "usage": {"completion_tokens": count}}).encode()
    assert parse_whole(body, "m")[1].output_tokens is None


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"error": "x"}', b"[]", b'{"choices": []}'])
def test_what_is_no_answer_is_an_error(body):
    with pytest.raises(AnswerError):
        parse_whole(body, "m")


# Errors and models


def test_an_error_has_the_form_that_sdks_read():
    error = ModelNotFound("x", ["a", "b"])
    assert orjson.loads(error_body(error))["error"] == {
        "message": "The model 'x' is not served here. Models that are: a, b.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@given(
    st.binary(max_size=100) | st.sampled_from([b'{"error": {"message": 5, "code": {}}}', b'{"error": []}'])
)
def test_any_complaint_of_a_worker_can_be_read(body):
    assert read_complaint(body).message


def test_llama_cpps_word_for_a_long_prompt_becomes_openais():
    body = b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}'
    complaint = read_complaint(body)
    assert (complaint.code, complaint.message) == ("context_length_exceeded", "too long")


def test_how_far_a_model_is_loaded_is_said_beside_the_error():
    error = ModelLoading("m", "studio", 0.43, 12.0, 12.0)
    told = orjson.loads(error_body(error))["error"]
    assert (told["type"], told["param"], told["code"]) == ("server_error", None, "model_loading")
    assert told["loading"] == {"worker": "studio", "progress": 0.43, "eta_seconds": 12.0}
    complaint = read_complaint(error_body(error))
    assert (complaint.code, complaint.progress, complaint.eta_seconds) == ("model_loading", 0.43, 12.0)


@pytest.mark.parametrize("told", [None, [], {"progress": "x", "eta_seconds": -1}, {"progress": 2}, {}])
def test_what_makes_no_sense_of_a_load_is_not_believed(told):
    complaint = read_complaint(orjson.dumps({"error": {"code": "model_loading", "loading": told}}))
    assert (complaint.progress, complaint.eta_seconds) == (None, None)


@pytest.mark.parametrize(
    ("metadata", "meant"),
    [
        ({"local_only": True}, True),
        ({"local_only": "true"}, True),
        ({"local_only": "TRUE"}, True),
        ({"local_only": "1"}, True),
        ({"local_only": False}, False),
        ({"local_only": "false"}, False),
        ({"local_only": None}, False),
        ({"Local-Only": True}, True),
        ({"project": "x"}, False),
        (None, False),
    ],
)
def test_a_request_may_say_that_it_stays_in_the_room(metadata, meant):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "metadata": metadata}
    request = parse(Endpoint.CHAT, orjson.dumps(body))
    assert request.local_only is meant
    assert b"metadata" not in request.body


@pytest.mark.parametrize(
    "metadata", ["local_only", ["local_only"], {"local_only": True, "Local_Only": False}]
)
def test_who_may_mean_it_and_does_not_say_so_is_not_sent_elsewhere(metadata):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "metadata": metadata}
    with pytest.raises(BadRequest, match="metadata"):
        parse(Endpoint.CHAT, orjson.dumps(body))


@pytest.mark.parametrize("told", ["yes", 1, [True], {}])
def test_who_says_that_in_words_of_their_own_is_told_how(told):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "metadata": {"local_only": told}}
    with pytest.raises(BadRequest, match="local_only"):
        parse(Endpoint.CHAT, orjson.dumps(body))


def test_a_workers_words_cannot_draw_on_a_terminal():
    assert "\x1b" not in read_complaint(b'{"error": "\\u001b[31mred"}').message


def test_models_of_the_room_show_the_context_that_any_worker_can_hold():
    offers = tuple(ModelOffer(name=ModelName("m"), context_tokens=n) for n in (8192, 4096, None))
    (entry,) = models_body({ModelName("m"): offers})["data"]
    assert (entry["id"], entry["object"], entry["context_length"], entry["workers"]) == (
        "m",
        "model",
        4096,
        3,
    )


def test_every_error_has_a_status_and_a_type():
    for kind in RequestError.__subclasses__():
        assert 400 <= kind.status < 600
        assert kind.type.endswith("_error")
