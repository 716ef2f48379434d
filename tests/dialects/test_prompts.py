"""How prompts are described for routing, and shortened for reading ahead."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import BLOCK_CHARS, Endpoint, Prompt, ServiceClass
from balancer.dialects import openai
from balancer.dialects.prompts import ATTACHMENT_CHARS, CHARS_PER_TOKEN, MAX_BLOCKS, beginning, describe

CHAT, COMPLETIONS, EMBEDDINGS = Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS
KEY = b"a secret"
PAPER = "".join(f"{number}. sentence of a paper. " for number in range(400))


def user(text) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def chat(*messages: dict, key: bytes = KEY, **more) -> Prompt:
    return describe(CHAT, {"messages": list(messages)} | more, key)


def common(one: Prompt, other: Prompt) -> int:
    """How many blocks they begin with alike."""
    pairs = zip(one.blocks, other.blocks, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.blocks), len(other.blocks)))


# Beginnings


def test_prompts_about_one_paper_share_all_but_its_last_blocks():
    one, two = chat(user(PAPER + "Which methods?")), chat(user(PAPER + "Which results? And where?"))
    assert common(one, two) >= len(PAPER) // BLOCK_CHARS
    assert common(one, chat(user("x" + PAPER))) == 0


@given(
    st.lists(st.text(max_size=BLOCK_CHARS * 2), min_size=1, max_size=4),
    st.text(min_size=1, max_size=50),
    st.text(min_size=1, max_size=50),
)
def test_blocks_agree_exactly_as_far_as_the_texts_do(texts, one_end, other_end):
    one, two = (chat(*map(user, texts[:-1]), user(texts[-1] + end)) for end in (one_end, other_end))
    flat = [
        "".join(f"\0user\0{text}" for text in [*texts[:-1], texts[-1] + end]) for end in (one_end, other_end)
    ]
    alike = next((n for n, (a, b) in enumerate(zip(*flat, strict=False)) if a != b), min(map(len, flat)))
    assert common(one, two) == alike // BLOCK_CHARS
    assert [prompt.chars for prompt in (one, two)] == [len(text) for text in flat]
    assert [len(prompt.blocks) for prompt in (one, two)] == [len(text) // BLOCK_CHARS for text in flat]


def test_who_said_it_matters():
    assert common(chat(user(PAPER)), chat({"role": "system", "content": PAPER})) == 0


def test_the_form_of_a_content_does_not_matter():
    parts = [{"type": "text", "text": PAPER[:300]}, {"type": "text", "text": PAPER[300:]}]
    assert chat(user(parts)) == chat(user(PAPER))


def test_tools_come_first_as_templates_write_them():
    tools = [{"type": "function", "function": {"name": "f"}}]
    same = [{"function": {"name": "f"}, "type": "function"}]
    assert chat(user(PAPER), tools=tools) == chat(user(PAPER), tools=same)
    assert common(chat(user(PAPER), tools=tools), chat(user(PAPER))) == 0


def test_hashes_tell_nothing_to_whoever_has_another_key():
    one, two = chat(user(PAPER)), chat(user(PAPER), key=b"another")
    assert not set(one.blocks) & set(two.blocks)
    assert one.conversation != two.conversation
    assert all(0 <= block < 2**64 for block in one.blocks)


def test_only_so_much_of_a_long_prompt_is_told_apart():
    text = "x" * (MAX_BLOCKS + 5) * BLOCK_CHARS
    long = chat(user(text))
    assert len(long.blocks) == MAX_BLOCKS
    assert long.chars > len(text)


# Pictures


def picture(data: str) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_a_picture_counts_for_the_same_however_long_its_data():
    small, large = chat(user([picture("a")])), chat(user([picture("a" * 100_000)]))
    assert small.chars == large.chars == ATTACHMENT_CHARS + len("\0user\0")


def test_pictures_are_told_apart():
    text = {"type": "text", "text": PAPER}
    one, same, other = (chat(user([picture(data), text])) for data in ("a", "a", "b"))
    assert one == same
    assert common(one, other) == 0


# Conversations


def test_a_turn_continues_the_conversation_before_it():
    first = chat(user("Hi"))
    second = chat(user("Hi"), said("Hello!"), user("Trees?"))
    third = chat(user("Hi"), said("Hello!"), user("Trees?"), said("Oak."), user("And?"))
    assert first.continues is None
    assert second.continues == first.conversation
    assert third.continues == second.conversation
    assert len({first.conversation, second.conversation, third.conversation}) == 3


def test_what_tools_said_belongs_to_the_turn():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    asked = chat(user("Hi"))
    answered = chat(user("Hi"), call, {"role": "tool", "tool_call_id": "1", "content": "42"})
    assert answered.continues == asked.conversation


def test_another_conversation_is_no_continuation():
    assert chat(user("Ho"), said("Hello!"), user("Trees?")).continues != chat(user("Hi")).conversation


# Prompts without messages


def test_a_completions_prompt_has_blocks_and_no_conversation():
    one, two = (describe(COMPLETIONS, {"prompt": PAPER + end}, KEY) for end in ("a", "b"))
    assert common(one, two) == len(PAPER) // BLOCK_CHARS
    assert (one.chars, one.tokens, one.conversation) == (len(PAPER) + 1, None, None)


def test_tokens_are_counted_and_not_estimated():
    tokens = list(range(1000))
    one, two = (describe(COMPLETIONS, {"prompt": [*tokens, end]}, KEY) for end in (1, 2))
    assert (one.tokens, one.chars) == (1001, 1001 * CHARS_PER_TOKEN)
    assert common(one, two) == len(one.blocks) == 1001 * CHARS_PER_TOKEN // BLOCK_CHARS


def test_several_prompts_have_no_common_beginning():
    assert describe(COMPLETIONS, {"prompt": [PAPER, PAPER]}, KEY) == Prompt(chars=2 * len(PAPER))
    assert describe(COMPLETIONS, {"prompt": [[1, 2], [3]]}, KEY) == Prompt(chars=12, tokens=3)


def test_of_embeddings_only_the_size_is_known():
    assert describe(EMBEDDINGS, {"input": ["ab", "c"]}, KEY) == Prompt(chars=3)
    assert describe(EMBEDDINGS, {"input": [5, 6]}, KEY) == Prompt(chars=8, tokens=2)


# Reading ahead


def shortened(endpoint: Endpoint, chars: int, **fields) -> dict:
    return orjson.loads(beginning(endpoint, orjson.dumps(fields), chars))


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user("one two three"),
    said("four five"),
    user("six seven"),
]


@given(st.integers(0, 200))
def test_what_is_read_ahead_is_a_beginning_of_the_prompt(chars):
    kept = shortened(CHAT, chars, messages=CONVERSATION)["messages"]
    *before, last = kept
    for message, whole in zip(kept, CONVERSATION, strict=False):
        assert message["role"] == whole["role"]
        assert message["content"]
        assert whole["content"].startswith(message["content"])
    cut = [message for message, whole in zip(kept, CONVERSATION, strict=False) if message != whole]
    assert cut in ([], [last], [before[0], last])
    if len(cut) == 2:
        assert len(kept) == 2


def test_what_ends_before_any_question_gets_the_first_letter_of_one():
    kept = shortened(CHAT, 11, messages=CONVERSATION)["messages"]
    assert kept == [{"role": "system", "content": "Be "}, user("o")]
    assert shortened(CHAT, 11, messages=CONVERSATION[:1])["messages"] == kept[:1]


@pytest.mark.parametrize("chars", [1024, 3 * 1024, 7 * 1024])
def test_it_is_about_as_long_as_was_asked_for(chars):
    messages = [{"role": "system", "content": "Be brief."}, user(PAPER + "And?")]
    whole = chat(*messages)
    part = chat(*shortened(CHAT, chars, messages=messages)["messages"])
    assert part.chars == chars
    assert part.blocks == whole.blocks[: chars // BLOCK_CHARS]


def test_it_asks_for_one_answer_of_one_token():
    body = shortened(
        CHAT, 10, messages=CONVERSATION, n=3, max_completion_tokens=50, logprobs=True, tools=[{"a": 1}]
    )
    assert body["max_tokens"] == 1
    assert not {"n", "max_completion_tokens", "logprobs"} & set(body)
    assert body["tools"] == [{"a": 1}]


def test_parts_and_pictures_are_kept_whole_or_left_out():
    content = [{"type": "text", "text": "ab"}, picture("a"), {"type": "text", "text": "cd"}]

    def kept(chars: int) -> list:
        return shortened(CHAT, chars, messages=[user(content)])["messages"][0]["content"]

    head = len("\0user\0")
    assert kept(head + 1) == [{"type": "text", "text": "a"}]
    assert kept(head + 2) == content[:1]
    assert kept(head + 3) == content[:2]
    assert kept(head + 2 + ATTACHMENT_CHARS + 1) == [*content[:2], {"type": "text", "text": "c"}]


def test_an_answer_that_calls_tools_stays_one():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    messages = [user("Hi"), call, {"role": "tool", "tool_call_id": "1", "content": "42" * 50}]
    whole = chat(*messages)
    kept = shortened(CHAT, whole.chars - 20, messages=messages)["messages"]
    assert kept[:2] == messages[:2]
    assert kept[2]["content"] == "42" * 40


def test_a_completions_prompt_is_cut_too():
    assert shortened(COMPLETIONS, 3, prompt="abcdef", echo=True) == {"prompt": "abc", "max_tokens": 1}
    assert shortened(COMPLETIONS, 8, prompt=[1, 2, 3])["prompt"] == [1, 2]
    assert shortened(COMPLETIONS, 3, prompt=["abcdef", "b"])["prompt"] == "abc"


def test_texts_to_embed_cannot_be_read_ahead():
    assert beginning(EMBEDDINGS, b'{"input": "abc"}', 2) is None


# In a request


def parsed(endpoint: Endpoint = CHAT, **more) -> openai.Request:
    fields = {"model": "m", "messages": CONVERSATION, "prompt": "p", "input": "i"} | more
    return openai.parse(endpoint, json.dumps(fields).encode(), KEY)


def test_a_request_knows_its_prompt_and_the_longest_answer():
    assert parsed().prompt == chat(*CONVERSATION)
    assert parsed().max_output is None
    assert parsed(max_tokens=5).max_output == 5
    assert parsed(max_tokens=5, max_completion_tokens=6).max_output == 6


@pytest.mark.parametrize("tier", [None, "auto", "default", "priority", "scale"])
@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_only_flex_is_batch(tier, endpoint):
    assert parsed(endpoint, service_tier=tier).service_class is ServiceClass.INTERACTIVE
    assert parsed(endpoint, service_tier="flex").service_class is ServiceClass.BATCH


def test_the_part_of_a_request_is_a_request_that_nobody_streams():
    part = parsed(n=3, stream=True, stream_options={"include_usage": True}).beginning(15)
    assert part is not None
    assert (part.choices, part.stream, part.usage_wanted) == (1, False, False)
    assert orjson.loads(part.to_worker("theirs", stream=True))["model"] == "theirs"
    assert parsed(EMBEDDINGS).beginning(15) is None


# What workers tell of the prompt


@pytest.mark.parametrize(
    ("more", "cached"),
    [
        ({}, None),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}, None),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}}, 5),
        ({"usage": {"prompt_tokens": 9}, "timings": {"cache_n": 4}}, 4),
        (
            {
                "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}},
                "timings": {"cache_n": 4},
            },
            0,
        ),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": "many"}}}, None),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": []}, "timings": []}, None),
    ],
)
def test_tokens_that_were_remembered_are_read_off_either_form(more, cached):
    chunk = json.dumps({"choices": []} | more).encode()
    reader = openai.StreamReader("m", usage_wanted=True)
    reader.read(chunk)
    assert reader.usage.cached_tokens == cached


def test_tokens_are_counted_as_they_come_until_the_worker_tells():
    reader = openai.StreamReader("m", usage_wanted=True)
    counts = []
    for delta in ({"role": "assistant"}, {"content": "a"}, {"content": "b"}, {"content": "c"}):
        reader.read(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
        counts.append(reader.tokens)
    reader.read(b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 5}}')
    assert [*counts, reader.tokens] == [0, 1, 2, 3, 5]
