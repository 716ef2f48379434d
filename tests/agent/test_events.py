from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.events import DONE, MAX_EVENT_BYTES, EventGate, EventTooLong, choices_of, error_event

WORD = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
ERROR = b'data: {"error": {"message": "no memory"}}\n\n'


def through(gate: EventGate, *chunks: bytes) -> bytes:
    return b"".join(map(gate.feed, chunks))


@pytest.mark.parametrize("offset", range(len(WORD) + 1))
def test_a_torn_last_event_stays_here_wherever_it_is_torn(offset: int) -> None:
    gate = EventGate()
    assert through(gate, WORD, WORD[:offset]) == (WORD * 2 if offset == len(WORD) else WORD)
    assert gate.end() is None


@given(st.lists(st.integers(1, 40), min_size=1))
def test_however_a_stream_is_cut_it_comes_out_as_it_was(sizes: list[int]) -> None:
    stream = b": keepalive\n\n" + WORD + WORD.replace(b"\n", b"\r\n") + LAST + DONE
    gate, out, at = EventGate(), b"", 0
    while at < len(stream):
        for size in sizes:
            out += gate.feed(stream[at : at + size])
            at += size
    assert out == stream
    assert (gate.over, gate.events, gate.end()) == (True, 4, b"")


def test_nothing_passes_behind_the_end_mark() -> None:
    gate = EventGate()
    assert through(gate, WORD + DONE + WORD, WORD) == WORD + DONE


def test_an_error_of_the_engines_own_passes_and_nothing_after_it() -> None:
    gate = EventGate()
    assert through(gate, WORD + ERROR + DONE) == WORD + ERROR
    assert (gate.over, gate.end()) == (True, b"")


def test_an_answer_that_is_finished_gets_the_end_mark_that_was_forgotten() -> None:
    gate = EventGate()
    through(gate, WORD, LAST)
    assert gate.end() == DONE


def test_of_two_answers_one_that_is_finished_is_not_enough() -> None:
    gate = EventGate(choices=2)
    through(gate, WORD, LAST)
    assert gate.end() is None


def test_an_end_mark_without_its_blank_line_is_one() -> None:
    gate = EventGate()
    assert through(gate, WORD, b"data: [DONE]\n") == WORD
    assert gate.end() == DONE


def test_words_that_look_like_marks_are_words() -> None:
    quoted = orjson.dumps({"text": 'data: [DONE]\n\ndata: {"error": 1}\n"finish_reason": "stop"'})
    gate = EventGate()
    assert through(gate, b"data: " + quoted + b"\n\n", WORD) == b"data: " + quoted + b"\n\n" + WORD
    assert (gate.over, gate.end()) == (False, None)


def test_comments_pass_and_are_no_events() -> None:
    gate = EventGate()
    assert through(gate, b": keepalive 6/7\n\n") == b": keepalive 6/7\n\n"
    assert gate.events == 0


def test_an_event_without_an_end_is_not_kept_for_ever() -> None:
    gate = EventGate()
    with pytest.raises(EventTooLong):
        for _ in range(20):
            gate.feed(b"x" * (MAX_EVENT_BYTES // 16))


def test_an_error_event_is_one_in_openais_form() -> None:
    event = error_event("engine_died", "it\ndied")
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert orjson.loads(event[6:]) == {
        "error": {"message": "it\ndied", "type": "server_error", "param": None, "code": "engine_died"}
    }


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": None, "prompt": "a"}, 1),
        ({"n": 2, "prompt": ["a", "b"]}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"n": "many", "prompt": []}, 1),
    ],
)
def test_how_many_answers_a_request_asks_for(body: dict[str, object], choices: int) -> None:
    assert choices_of(body) == choices
