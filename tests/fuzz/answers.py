"""What workers answer, hostile ones too: streams, whole answers, complaints, answers to probes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import orjson

from balancer.core.model import Condition, Endpoint
from balancer.dialects import anthropic_upstream
from balancer.dialects.framing import EventFrames
from balancer.dialects.openai import (
    AnswerError,
    Assembly,
    StreamReader,
    parse_whole,
    read_complaint,
)
from balancer.dialects.passing import Passage
from balancer.worker_types import MAX_MODELS, WORKER_TYPES, ProbeFailed, said_in
from tests.fuzz.mutation import cuts
from tests.fuzz.target import Target, pure
from worker_agent.events import EventGate, EventTooLong

EVENT_WORDS = (
    *(b"data: ", b"data:", b"data: [DONE]\n\n", b"\n\n", b"\r\n\r\n", b": comment\n\n", b"event: x\n"),
    *(b'"finish_reason":"stop"', b'"usage":{}', b'"error"', b'"choices":[', b'"delta":{}', b'"index":'),
    *(b'{"error":{"message":"m"}}', b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b'"tool_calls":['),
    *(b'"content"', b'"model":"x"', b'"text":"a"'),
)


def frames(data: bytes) -> None:
    """Cut in any way, the same events come out."""
    whole, cut = EventFrames(), EventFrames()
    expected = whole.feed(data) + whole.end()
    found = [event for piece in cuts(data) for event in cut.feed(piece)] + cut.end()
    assert found == expected
    assert not cut.holds


def gate(data: bytes) -> None:
    """The agent's side: only whole events pass, the same ones however they are cut; up to blank lines."""
    with suppress(EventTooLong):
        assert _passed([data]) == _passed(cuts(data))


def _passed(pieces: Iterable[bytes]) -> tuple[bytes, bytes | None]:
    through = EventGate()
    passed = b"".join(through.feed(piece) for piece in pieces)
    assert not passed or passed.endswith((b"\n\n", b"\n\r\n"))
    return passed.rstrip(b"\r\n"), through.end()


def stream(data: bytes) -> None:
    """The balancer's side: nothing but whole events reach the client, and nothing is raised."""
    reader = StreamReader("ours", usage_wanted=True)
    passage = Passage(reader)
    passed = b""
    for piece in cuts(data):
        passed += passage.feed(piece)
        if passage.fault is not None:
            break
    passed += passage.end()
    assert not passed or (passed.startswith(b"data: ") and passed.endswith(b"\n\n"))
    assert reader.tokens >= 0


def assembled(data: bytes) -> None:
    """A stream that is put together again for a client that wanted none."""
    reader = StreamReader("ours", usage_wanted=True)
    assembly = Assembly(Endpoint.CHAT, "ours")
    with suppress(AnswerError):
        for event in EventFrames().feed(data):
            chunk = reader.read_chunk(event)
            if chunk is not None:
                assembly.add(chunk)
        _write(assembly.result())


def whole(data: bytes) -> None:
    with suppress(AnswerError):
        answer, _ = parse_whole(data, "ours")
        assert answer["model"] == "ours"
        _write(answer)
    complaint = read_complaint(data)
    complaint.message.encode()
    said_in(data).encode()


def _write(answer: Any) -> None:
    with suppress(orjson.JSONEncodeError):  # what is nested deeper than can be written, says the relay
        orjson.dumps(answer)


def anthropic(data: bytes) -> None:
    """Another API's answers, made into OpenAI's."""
    events = anthropic_upstream.Events(created=1)
    made = b"".join(events.feed(piece) for piece in cuts(data)) + events.end()
    for event in EventFrames().feed(made):
        assert event == b"[DONE]" or isinstance(orjson.loads(event), dict)
    told = anthropic_upstream.Whole(created=1)
    with suppress(AnswerError):
        told.feed(data)
        assert orjson.loads(told.end())["choices"]


PROBED = [row for row in WORKER_TYPES.values() if row.probe_path is not None]


def probe(data: bytes) -> None:
    """The answer of any server that the config lists. The first byte says which, and with what status."""
    pick, body = data[:1] or b"\0", data[1:]
    row = PROBED[pick[0] % len(PROBED)]
    status = (200, 401, 503)[pick[0] // len(PROBED) % 3]
    condition = Condition(ready=True)
    with suppress(ProbeFailed):
        condition = row.read_probe(status, body)
    for page in row.more:
        with suppress(ProbeFailed):
            condition = page.read(condition, status, body)
    assert len(condition.models) <= MAX_MODELS
    for offer in condition.models:
        assert len(offer.name) <= 128, offer
        assert offer.name.isprintable(), offer


TARGETS = (
    Target("frames", pure(frames), EVENT_WORDS),
    Target("gate", pure(gate), EVENT_WORDS),
    Target("stream", pure(stream), EVENT_WORDS),
    Target("assembled", pure(assembled), EVENT_WORDS),
    Target("whole", pure(whole), EVENT_WORDS),
    Target(
        "anthropic",
        pure(anthropic),
        (
            *EVENT_WORDS,
            *(b'"type":"message_start"', b'"type":"content_block_start"', b'"type":"content_block_delta"'),
            *(b'"type":"message_delta"', b'"type":"message_stop"', b'"stop_reason":"end_turn"', b'"index":0'),
            *(
                b'"type":"text_delta"',
                b'"partial_json":"{"',
                b'"type":"tool_use"',
                b'"input":{}',
                b'"usage":',
            ),
        ),
    ),
    Target(
        "probe",
        pure(probe),
        (b'"models":[', b'"data":[', b'"id":"', b'"name":"', b'"size":', b"vllm:", b" 1e9\n"),
    ),
)
