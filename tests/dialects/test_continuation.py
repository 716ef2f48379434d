"""Two streams of one answer, of which the client must see one."""

import json
from dataclasses import dataclass, field, replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.continuation import (
    MAX_STOP_CHARS,
    MAX_TEXT_BYTES,
    Kept,
    Seam,
    continuation,
    ending,
    marker,
    obstacle,
    tokens_left,
)
from balancer.core.model import Endpoint
from balancer.dialects.framing import EventFrames, event
from balancer.dialects.openai import AnswerError, parse

CHAT, COMPLETIONS = Endpoint.CHAT, Endpoint.COMPLETIONS
QUESTION = {"role": "user", "content": "Tell me."}
ASKED = {
    CHAT: {"messages": [QUESTION]},
    COMPLETIONS: {"prompt": "Once"},
    Endpoint.EMBEDDINGS: {"input": "Once"},
}
FIRST = {
    "id": "first",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "system_fingerprint": "a",
}
SECOND = {
    "id": "second",
    "object": "chat.completion.chunk",
    "created": 2,
    "model": "their-m",
    "system_fingerprint": "b",
}
PLAIN = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
ROLE = {"role": "assistant", "content": ""}


def asked(endpoint=CHAT, usage=True, **more):
    stream = {"stream": True, "stream_options": {"include_usage": usage}}
    without_stream = endpoint is Endpoint.EMBEDDINGS
    return parse(
        endpoint,
        json.dumps({"model": "m"} | ({} if without_stream else stream) | ASKED[endpoint] | more).encode(),
    )


def chunk(delta, finish=None, head=SECOND, **more):
    return orjson.dumps(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more)


def text_chunk(text, finish=None, head=SECOND, **more):
    return orjson.dumps(head | {"choices": [{"index": 0, "text": text, "finish_reason": finish}]} | more)


def piece(endpoint, text, head=SECOND):
    return chunk({"content": text}, head=head) if endpoint is CHAT else text_chunk(text, head=head)


def usage_chunk(prompt, completion, head=SECOND, **more):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return orjson.dumps(head | {"choices": [], "usage": usage | more})


def kept(*texts, endpoint=CHAT, role=True):
    """What a first stream has said until it broke."""
    had = Kept(endpoint)
    if role and endpoint is CHAT:
        had.add(event(chunk(ROLE, head=FIRST)))
    for text in texts:
        had.add(event(piece(endpoint, text, FIRST)))
    return had


def of(*events):
    had = Kept(CHAT)
    had.add(b"".join(map(event, events)))
    return had


@dataclass
class Client:
    """What a client makes of the events that it is given."""

    text: str = ""
    roles: list = field(default_factory=list)
    ids: set = field(default_factory=set)
    finishes: list = field(default_factory=list)
    usages: list = field(default_factory=list)

    def hear(self, data):
        if data is None:
            return
        heard = orjson.loads(data)
        self.ids.add(heard.get("id"))
        if heard.get("usage"):
            self.usages.append(heard["usage"])
        for choice in heard["choices"]:
            delta = choice.get("delta", {})
            self.text += (choice.get("text") or "") + (delta.get("content") or "")
            self.roles += [delta["role"]] if "role" in delta else []
            self.finishes += [choice["finish_reason"]] if choice["finish_reason"] else []


def joined(request, had, *events):
    """The client of both streams, and the seam."""
    client = Client(had.text)
    seam = Seam(request, had)
    for data in events:
        client.hear(seam.read(data))
    return client, seam


def said(*texts, finish="stop"):
    return [chunk({"content": text}) for text in texts] + [chunk({}, finish)]


# Which requests


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_a_plain_text_may_go_on_elsewhere(endpoint):
    assert obstacle(asked(endpoint, temperature=0.5, stop=["\n"], seed=1, n=1, max_tokens=5)) is None


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"logprobs": True},
        {"top_logprobs": 3, "logprobs": True},
        {"stop": "x" * (MAX_STOP_CHARS + 1)},
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "I"}]}]},
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        {"messages": [QUESTION, {"role": "assistant", "content": None}]},
    ],
)
def test_a_chat_that_is_more_than_one_text_may_not(more):
    assert obstacle(asked(**more))


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": ["Once", "Twice"]},
        {"prompt": ["Once"]},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2], [3]]},
        {"best_of": 2},
        {"echo": True},
        {"suffix": "the end"},
        {"logprobs": 0},
    ],
)
def test_a_completion_that_is_more_than_one_text_may_not(more):
    assert obstacle(asked(COMPLETIONS, **more))


@pytest.mark.parametrize(
    "more",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"messages": [QUESTION, {"role": "assistant", "content": "I"}]},
    ],
)
def test_what_asks_for_nothing_is_in_nobodys_way(more):
    assert obstacle(asked(**more)) is None


def test_a_field_that_nobody_thought_of_is_an_obstacle():
    request = asked()
    grammar = replace(request, body=request.body[:-1] + b',"grammar":"root ::= [a-z]"}')
    assert obstacle(grammar)


def test_embeddings_are_no_text():
    assert obstacle(asked(Endpoint.EMBEDDINGS))


# What has come


def test_what_has_come_is_known():
    had = kept("Hello", ", wor")
    assert (had.text, had.tokens, had.head, had.obstacle) == ("Hello, wor", 2, FIRST, None)
    assert had.worth
    assert not had.finished


def test_a_completion_is_kept_by_its_own_form():
    assert kept(" upon", " a", endpoint=COMPLETIONS).text == " upon a"


@pytest.mark.parametrize("texts", [(), ("",), (" \n",)])
def test_without_words_the_request_itself_is_right(texts):
    had = kept(*texts)
    assert not had.worth
    assert had.obstacle is None
    assert orjson.loads(continuation(asked(), had).body) == orjson.loads(asked().body)


def test_comments_line_ends_and_nulls_do_no_harm():
    had = Kept(CHAT)
    had.add(
        b": continued\n\ndata: " + chunk({"role": "assistant", "content": None}, head=FIRST) + b"\r\n\r\n"
    )
    had.add(
        b"data:" + chunk({"content": "Hello", "tool_calls": [], "refusal": None}, head=FIRST) + b"\r\n\r\n"
    )
    assert (had.text, had.tokens, had.obstacle) == ("Hello", 1, None)


@pytest.mark.parametrize(
    "data",
    [
        chunk({"tool_calls": [{"index": 0, "id": "1"}]}),
        chunk({"function_call": {"name": "f"}}),
        chunk({"refusal": "No."}),
        chunk({"reasoning_content": "Hm"}),
        chunk({"reasoning": "Hm"}),
        chunk({"audio": {"id": "1"}}),
        chunk({"content": ["x"]}),
        text_chunk("the other form"),
        orjson.dumps(FIRST | {"choices": [{**PLAIN, "text": "the other form too"}]}),
        orjson.dumps(FIRST | {"choices": [{**PLAIN, "index": 1}]}),
        orjson.dumps(FIRST | {"choices": [PLAIN, {**PLAIN, "index": 1}]}),
        orjson.dumps({"error": {"message": "no"}}),
        b'{"choices":[{"x":' + b"[" * 500 + b"]" * 500 + b"}]}",
        b"{",
        b"[1]",
        b"[DONE]",
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_is_no_plain_text_cannot_go_on(data, later):
    hello = chunk({"content": "Hello"}, head=FIRST)
    had = of(hello, data, *([chunk({"content": "more"})] if later else []))
    assert had.obstacle
    assert had.text == "" or data == b"[DONE]"


def test_a_torn_event_cannot_go_on():
    had = kept("Hello")
    had.add(b'data: {"id": "first", "choi')
    assert had.obstacle


def test_a_character_of_which_only_a_part_came_cannot_go_on():
    assert kept("Hello \ufffd").obstacle
    assert kept("Hello \ufffd", "?").obstacle is None


def test_a_thought_that_is_not_at_its_end_cannot_go_on():
    assert kept("<think>", "Hm").obstacle
    assert kept("<think>", "Hm", "</think>", "Hello").obstacle is None


def test_a_text_is_kept_up_to_a_limit_and_no_byte_more():
    assert kept("ä" * (MAX_TEXT_BYTES // 2)).obstacle is None
    over = kept("ä" * (MAX_TEXT_BYTES // 2), "x")
    assert over.obstacle
    assert over.text == ""


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"data: {}\n\n", b"data: null\n\n", b"\n\n"])))
def test_keeping_never_raises(pieces):
    had = Kept(CHAT)
    for data in pieces:
        had.add(data)
        had.add(b"x" * 20_000)
    assert had.tokens == 0


ANY_EVENT = st.one_of(
    st.text(max_size=300).map(lambda text: piece(CHAT, text, FIRST)),
    st.sampled_from(
        [
            chunk(ROLE, head=FIRST),
            chunk({"content": None}),
            chunk({"role": "assistant", "content": "x"}),
            chunk({"content": "x", "refusal": None}),
            chunk({"content": "x"}, usage={"prompt_tokens": 3, "completion_tokens": 7}),
            chunk({"content": "x", "reasoning": "y"}),
            chunk({"content": "x"}, "stop"),
            text_chunk("x"),
            usage_chunk(3, 7),
            orjson.dumps(FIRST | {"choices": [{"index": 1, "delta": {"content": "x"}}]}),
            orjson.dumps(FIRST | {"choices": [{**PLAIN, "index": 1}]}),
            orjson.dumps(FIRST | {"choices": [{**PLAIN, "text": "y"}]}),
            b'{"choices":[]},{"choices":[]}',
            b'{"choices":[{}]}',
            b'{"error":"no"}',
            b"null",
            b"{",
        ]
    ),
)


@given(st.lists(ANY_EVENT, max_size=20), st.integers(1, 5))
def test_the_quick_way_to_read_events_finds_what_the_careful_one_does(events, bundle):
    quick, careful = Kept(CHAT), Kept(CHAT)
    for start in range(0, len(events), bundle):
        quick.add(b"".join(map(event, events[start : start + bundle])))
        assert quick.tokens >= 0  # reads
    for data in events:
        careful.add(b": careful\n\n" + event(data))
    assert facts(quick) == facts(careful)


def facts(had):
    return (
        had.obstacle,
        had.text,
        had.tokens,
        had.head,
        had.begun,
        had.finish_reason,
        had.usage,
        had.usage_came,
    )


@given(st.lists(st.text(max_size=300), max_size=300), st.integers(1, 50))
def test_how_events_are_bundled_does_not_matter(texts, bundle):
    events = [event(piece(CHAT, text, FIRST)) for text in texts]
    had = Kept(CHAT)
    for start in range(0, len(events), bundle):
        had.add(b"".join(events[start : start + bundle]))
    assert had.tokens == sum(map(bool, texts))
    assert had.obstacle or had.text == "".join(texts)


def test_the_finish_is_seen_whatever_stands_in_the_way_of_going_on():
    had = of(chunk({"tool_calls": [{"index": 0, "id": "1"}]}), chunk({}, "tool_calls"))
    assert (had.finished, had.finish_reason) == (True, "tool_calls")


def test_a_worker_that_tells_the_tokens_is_believed():
    usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    had = of(chunk({"content": "Hello"}, usage=usage), chunk({"content": " you"}))
    assert had.tokens == 8


# The request for the rest


def test_what_has_come_is_the_beginning_of_the_assistants_message():
    body = orjson.loads(continuation(asked(), kept("Hello", ", wor")).body)
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "Hello, wor"}]


def test_what_has_come_is_added_to_the_clients_own_beginning():
    request = asked(messages=[QUESTION, {"role": "assistant", "content": "I say: "}])
    body = orjson.loads(continuation(request, kept("Hello")).body)
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "I say: Hello"}]


def test_what_has_come_is_a_part_of_a_completions_prompt():
    body = orjson.loads(continuation(asked(COMPLETIONS), kept(" upon", " a ", endpoint=COMPLETIONS)).body)
    assert body["prompt"] == "Once upon a"


def test_whitespace_at_the_end_is_left_to_the_engine():
    body = orjson.loads(continuation(asked(), kept("Hello:", "\n", "\n  ")).body)
    assert body["messages"][-1]["content"] == "Hello:"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_limit_is_less_by_what_has_come(limit):
    request, had = asked(**{limit: 10}), kept("Hello", ",", " wor")
    rest = continuation(request, had)
    assert orjson.loads(rest.body)[limit] == rest.max_output == tokens_left(request, had) == 7


@pytest.mark.parametrize(("limit", "left"), [({}, None), ({"max_tokens": 2}, 0), ({"max_tokens": 1}, 0)])
def test_the_limit_may_be_none_or_reached(limit, left):
    assert tokens_left(asked(**limit), kept("Hello", ", wor")) == left


def test_the_longer_prompt_counts_for_routing():
    request = asked()
    rest = continuation(request, kept("Hello "))
    assert rest.prompt.chars == request.prompt.chars + 5
    assert rest.prompt.blocks == request.prompt.blocks


def test_all_else_stays_as_it_was():
    request = asked(temperature=0.5, stop=["x"])
    rest = continuation(request, kept("Hello"))
    assert orjson.loads(rest.body) | {"messages": [QUESTION]} == orjson.loads(request.body)
    assert (rest.stream_options, rest.usage_wanted) == (request.stream_options, True)


def test_a_limit_that_is_reached_stays_one_that_an_engine_takes():
    assert orjson.loads(continuation(asked(max_tokens=1), kept("Hello")).body)["max_tokens"] == 1


# The joined stream


def test_the_client_sees_one_answer():
    client, _ = joined(asked(), kept("Hello,"), chunk(ROLE), *said(" world"))
    assert client == Client("Hello, world", [], {"first"}, ["stop"])


def test_each_event_is_of_the_first_answer():
    seam = Seam(asked(), kept("Hello"))
    event = orjson.loads(seam.read(chunk({"content": "!"}, timings={"predicted_n": 1})))
    assert event == FIRST | {
        "choices": [{"index": 0, "delta": {"content": "!"}, "finish_reason": None}],
        "timings": {"predicted_n": 1},
    }


def test_what_the_first_stream_did_not_say_of_itself_the_second_does_not_say_either():
    had = Kept(CHAT)
    had.add(event(chunk({"content": "Hello"}, head={"id": "first"})))
    assert set(orjson.loads(Seam(asked(), had).read(chunk({"content": "!"})))) == {"id", "choices"}


@pytest.mark.parametrize("opening", [ROLE, {"role": "assistant", "content": None}, {"role": "assistant"}])
def test_a_second_opening_is_dropped(opening):
    assert Seam(asked(), kept("Hello")).read(chunk(opening)) is None


def test_a_role_beside_each_word_is_dropped_from_all():
    client, _ = joined(asked(), kept("Hello"), chunk({"role": "assistant", "content": " you"}))
    assert (client.text, client.roles) == ("Hello you", [])


def test_an_answer_that_had_not_begun_gets_its_opening():
    client, seam = joined(asked(), Kept(CHAT), chunk(ROLE), *said("Hello"))
    assert client == Client("Hello", ["assistant"], {"second"}, ["stop"])
    assert seam.kept.head == SECOND | {"model": "m"}


@pytest.mark.parametrize(
    ("first", "rest", "whole"),
    [
        ("Hello ", [" ", "world"], "Hello world"),
        ("Hello ", [" world"], "Hello world"),
        ("Hello ", ["world"], "Hello world"),
        ("a:\n\n", ["\n", "\n", "b"], "a:\n\nb"),
        ("a:\n\n", ["\n\n\n", "b"], "a:\n\n\nb"),
        ("a:\n", ["\n\nb"], "a:\n\nb"),
        ("a:\n\n", ["b"], "a:\n\nb"),
        ("a:\u00a0\u2003", ["\u00a0", "\u2003b"], "a:\u00a0\u2003b"),
        # Not the run that was sent: then it is new.
        ("a:\n  ", ["\n", "\tb"], "a:\n  \n\tb"),
        (" \n", [" \n", "Hello"], " \nHello"),
        # Cut off (by a limit, say) while it said again what was sent.
        ("a:\n\n", ["\n"], "a:\n\n"),
        ("a:\n\n", ["\n\n"], "a:\n\n"),
        ("a:\n\n", [], "a:\n\n"),
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_whitespace_at_the_seam_is_there_once(first, rest, whole, endpoint):
    had = kept(first, endpoint=endpoint)
    finish = chunk({}, "stop") if endpoint is CHAT else text_chunk("", "stop")
    client, _ = joined(asked(endpoint), had, *[piece(endpoint, text) for text in rest], finish)
    assert (client.text, had.text, client.finishes) == (whole, whole, ["stop"])


def test_whitespace_that_was_said_again_is_dropped_from_the_last_event_too():
    client, _ = joined(asked(), kept("a:\n\n"), chunk({"content": "\n"}, "length"))
    assert (client.text, client.finishes) == ("a:\n\n", ["length"])


@pytest.mark.parametrize(
    ("again", "tokens"), [(["\n\n", "b"], 2), (["\n", "\nb"], 2), (["b"], 2), (["\n", "b"], 3)]
)
def test_tokens_are_those_that_the_client_has(again, tokens):
    had = kept("a:\n\n")
    joined(asked(), had, *said(*again))
    assert had.tokens == tokens


def test_what_is_held_at_the_seam_comes_with_the_end():
    client, _ = joined(asked(stop="###"), kept("Hello #"), chunk({"content": "#"}), chunk({}, "length"))
    assert (client.text, client.finishes) == ("Hello ##", ["length"])


def test_the_end_may_come_with_the_last_word():
    client, _ = joined(asked(), kept("Hello "), chunk({"content": " you"}, "length"))
    assert (client.text, client.finishes) == ("Hello you", ["length"])


def test_a_stop_string_across_the_seam_ends_the_answer():
    had = kept("Hello\nUs")
    client, seam = joined(asked(stop=["\nUser:", "x"]), had, *said("er", ": more", " and more"))
    assert (client.text, client.finishes, seam.ended) == ("Hello\nUs", ["stop"], True)
    assert (had.text, had.finish_reason) == ("Hello\nUs", "stop")


def test_a_stop_string_that_was_only_begun_ends_nothing():
    had = kept("Hello\nUs")
    client, seam = joined(asked(stop="\nUser:"), had, *said("er", "s", " agree"))
    assert (client.text, seam.ended, had.tokens) == ("Hello\nUsers agree", False, 4)


def test_after_a_stop_string_only_the_usage_comes():
    seam = Seam(asked(stop="##"), kept("Hello #"))
    assert seam.read(chunk({"content": "# more"})) is not None
    assert seam.read(chunk({"content": "more"}, usage={"prompt_tokens": 5, "completion_tokens": 2})) is None
    assert seam.read(chunk({}, "length")) is None
    last = orjson.loads(seam.read(usage_chunk(5, 3)))
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)


def test_the_usage_is_that_of_the_whole_answer():
    client, seam = joined(
        asked(),
        kept("Hello", ",", " wor"),
        *said("ld"),
        usage_chunk(13, 2, prompt_tokens_details={"cached_tokens": 8, "audio_tokens": 0}),
    )
    assert client.usages == [
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
        }
    ]
    assert ending(seam.kept, "stop", usage_wanted=True) == []


def test_no_more_of_a_prompt_was_remembered_than_it_has():
    details = {"cached_tokens": 13}
    client, _ = joined(asked(), kept("a", "b", "c"), usage_chunk(13, 2, prompt_tokens_details=details))
    assert client.usages[0]["prompt_tokens_details"] == {"cached_tokens": 10}


def test_a_prompt_is_never_less_than_nothing():
    client, _ = joined(asked(), kept("a", "b", "c"), usage_chunk(1, 2))
    assert client.usages == [{"prompt_tokens": 0, "completion_tokens": 5, "total_tokens": 5}]


def test_what_was_not_carried_over_is_no_part_of_the_other_prompt():
    client, _ = joined(asked(), kept(" "), usage_chunk(10, 2))
    assert client.usages == [{"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}]


def test_a_prompt_whose_tokens_the_first_worker_told_has_so_many():
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    client, _ = joined(asked(), of(chunk({"content": "Hello"}, usage=usage)), usage_chunk(13, 2))
    assert client.usages == [{"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}]


def test_the_usage_may_come_with_the_end():
    usage = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}
    client, seam = joined(asked(), kept("Hello"), chunk({"content": "!"}), chunk({}, "stop", usage=usage))
    assert client.usages == [{"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}]
    assert ending(seam.kept, "stop", usage_wanted=True) == []


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": "x"}])
def test_a_usage_that_tells_nothing_does_no_harm(usage):
    client, _ = joined(asked(), kept("Hello"), chunk({"content": "!"}, usage=usage), *said())
    assert client.text == "Hello!"


def test_a_usage_that_nobody_wants_is_not_sent():
    assert Seam(asked(usage=False), kept("Hello")).read(usage_chunk(10, 2)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        orjson.dumps({"error": {"message": "no"}}),
        chunk({"reasoning_content": "Hm"}),
        chunk({"tool_calls": [{"index": 0, "id": "1"}]}),
        chunk({"content": 5}),
        orjson.dumps(SECOND | {"choices": [{"index": 1, "delta": {"content": "x"}}]}),
        b'{"choices":[],"x":' + b"[" * 500 + b"]" * 500 + b',"usage":{"prompt_tokens":1}}',
    ],
)
def test_what_cannot_follow_is_an_error_of_the_worker(data):
    had = kept("Hello")
    with pytest.raises(AnswerError):
        Seam(asked(), had).read(data)
    assert (had.text, had.obstacle) == ("Hello", None)


def test_a_second_break_goes_on_from_there():
    had = kept("One")
    joined(asked(), had, chunk(ROLE), chunk({"content": " two "}))
    rest = continuation(asked(max_tokens=5), had)
    assert orjson.loads(rest.body)["messages"][-1]["content"] == "One two"
    assert rest.max_output == 3
    client, _ = joined(asked(), had, chunk(ROLE), *said(" three"), usage_chunk(12, 1))
    assert (client.text, client.ids) == ("One two three", {"first"})
    assert client.usages == [{"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}]


def test_what_was_held_when_a_second_break_came_was_never_said():
    had = kept("a:\n\n")
    joined(asked(), had, chunk({"content": "\n"}))
    assert (had.text, had.tokens) == ("a:\n\n", 1)


# The end


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_an_answer_that_is_whole_gets_its_end(endpoint):
    had = kept("Hello", "!", endpoint=endpoint)
    (finish,) = map(orjson.loads, ending(had, "length", usage_wanted=True))
    assert finish["id"] == "first"
    assert finish["choices"][0]["finish_reason"] == "length"
    assert ("delta" in finish["choices"][0]) == (endpoint is CHAT)


def test_an_end_that_has_come_is_not_said_again():
    had = of(chunk({"content": "Hello"}), chunk({}, "stop"))
    assert ending(had, "stop", usage_wanted=False) == []


def test_a_usage_that_nobody_told_is_not_made_up():
    """Clients read three numbers from it, and the prompt's is not known."""
    assert ending(of(chunk({"content": "Hello"}), chunk({}, "stop")), "stop", usage_wanted=True) == []


def test_a_usage_is_told_where_the_prompts_tokens_are_known():
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    had = of(chunk({"content": "Hello"}, usage=usage), chunk({"content": "!"}))
    told = orjson.loads(ending(had, "length", usage_wanted=True)[-1])
    assert told["usage"] == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}


def test_the_marker_is_no_event():
    assert EventFrames().feed(marker()) == []


# Whatever the text, and wherever it breaks

# Much whitespace, some of it beyond ASCII, and little else: runs of it meet the cuts.
LETTERS = st.sampled_from('ab \n\t\u00a0\u2003é漢🦊"\\')


def cuts(draw, text):
    """The text in tokens."""
    borders = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    starts = [0, *borders]
    return [part for a, b in zip(starts, [*borders, len(text)], strict=True) if (part := text[a:b])]


@st.composite
def broken_answers(draw):
    """A text, and each worker's tokens of it. Each but the last breaks off, after any of its tokens; the next
    says the whitespace before the seam again, or does not."""
    text = draw(st.text(LETTERS, max_size=30))
    workers, known = [], ""
    for breaks in [True] * draw(st.integers(1, 2)) + [False]:
        stem = known.rstrip()
        says_again = draw(st.booleans()) or text[len(known) : len(known) + 1].isspace()
        start = stem if workers and says_again else known
        tokens = cuts(draw, text[len(start) :])
        if breaks:
            tokens = tokens[: draw(st.integers(0, len(tokens)))]
        workers.append(tokens)
        reached = start + "".join(tokens)
        known = reached if len(reached) > len(known) else known
    return text, workers


@given(broken_answers(), st.sampled_from([CHAT, COMPLETIONS]))
def test_no_character_is_missing_or_doubled(answer, endpoint):
    text, (first, *others) = answer
    request, had, client = asked(endpoint), kept(*first, endpoint=endpoint), Client("".join(first))
    for number, tokens in enumerate(others):
        before, carried = had.tokens, had.tokens if had.worth else 0
        assert obstacle(request) is had.obstacle is None
        body = orjson.loads(continuation(request, had).body)
        prefix = body["prompt"][len("Once") :] if endpoint is COMPLETIONS else body["messages"][-1]["content"]
        assert prefix == client.text.rstrip() or not had.worth
        seam = Seam(request, had)
        if endpoint is CHAT:
            client.hear(seam.read(chunk(ROLE)))
        for token in tokens:
            client.hear(seam.read(piece(endpoint, token)))
        if number == len(others) - 1:
            client.hear(seam.read(chunk({}, "stop") if endpoint is CHAT else text_chunk("", "stop")))
            client.hear(seam.read(usage_chunk(10 + carried, len(tokens))))
        assert had.text == client.text
    assert client == Client(
        text,
        [],
        {"first" if first or endpoint is CHAT else "second"},
        ["stop"],
        [
            {
                "prompt_tokens": 10,
                "completion_tokens": before + len(tokens),
                "total_tokens": 10 + before + len(tokens),
            }
        ],
    )


@given(
    st.text("ab ", max_size=8).map(lambda text: "x" + text),
    st.data(),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_across_the_seam_is_always_found(first, data, stops):
    rest = data.draw(st.text("ab ", max_size=8))
    run = first[len(first.rstrip()) :]
    had = kept(first)
    client, seam = joined(asked(stop=stops), had, *said(*cuts(data.draw, run + rest)))
    whole, border = first + rest, len(first)
    across = any(
        whole.startswith(stop, start)
        for stop in stops
        for start in range(max(0, border - len(stop) + 1), border)
        if start + len(stop) <= len(whole)
    )
    assert seam.ended == across
    assert client.text == (first if across else whole)
    assert client.finishes == ["stop"]
