import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.dialects.framing import MAX_EVENT_BYTES, EventFrames, FramingError, event

datas = st.lists(
    st.binary(min_size=1).filter(lambda data: b"\n" not in data and b"\r" not in data), max_size=8
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(place, len(data)) for place in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@given(datas, st.lists(st.integers(0, 400)))
def test_the_cut_does_not_matter(events, cuts):
    frames = EventFrames()
    stream = b"".join(map(event, events))
    assert [e for piece in cut(stream, cuts) for e in frames.feed(piece)] == events
    assert frames.end() == []


def test_comments_and_other_fields_carry_nothing():
    stream = b": keepalive 6/7\n\nevent: x\nid: 1\nretry: 5\ndata: a\n\n:\ndata:b\r\n\r\n"
    assert EventFrames().feed(stream) == [b"a", b"b"]


def test_data_of_several_lines_is_one_event():
    assert EventFrames().feed(b"data: a\ndata: b\n\n") == [b"a\nb"]


@pytest.mark.parametrize("last", [b"data: [DONE]", b"data: [DONE]\n", b'data: {"a":1}'])
def test_a_last_event_without_its_blank_line_counts(last):
    frames = EventFrames()
    assert frames.feed(last) + frames.end() == [last.strip()[6:]]


def test_a_torn_last_event_is_dropped():
    frames = EventFrames()
    assert frames.feed(b'data: {"choices": [{"del') + frames.end() == []


def test_an_endless_line_is_an_error_before_it_fills_the_memory():
    frames = EventFrames()
    with pytest.raises(FramingError):
        for _ in range(100):
            frames.feed(b"data: " + b"x" * (MAX_EVENT_BYTES // 50))


def test_an_event_of_endlessly_many_lines_is_an_error_too():
    frames = EventFrames()
    with pytest.raises(FramingError):
        for _ in range(100):
            frames.feed(b"data: " + b"x" * (MAX_EVENT_BYTES // 50) + b"\n")
