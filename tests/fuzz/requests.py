"""What clients send as the body of a request for an answer."""

from __future__ import annotations

from contextlib import suppress

import orjson

from balancer.core.errors import BadRequest
from balancer.core.model import Endpoint
from balancer.dialects import anthropic_upstream, openai, openai_upstream
from tests.fuzz.target import Target, pure

ENDPOINTS = tuple(Endpoint)


def body(data: bytes) -> None:
    """The first byte says for which endpoint. A request is right, or refused with a sentence; what of it goes
    to a worker is JSON with no field that is not listed."""
    pick, data = data[:1] or b"\0", data[1:]
    endpoint = ENDPOINTS[pick[0] % len(ENDPOINTS)]
    try:
        request = openai.parse(endpoint, data, b"secret")
    except BadRequest as refused:
        assert refused.message.isprintable()
        refused.message.encode()
        openai.error_body(refused)
        return
    listed = openai.FIELDS[endpoint].keys() | {"model", "stream", "stream_options", "max_completion_tokens"}
    for stream in (False, True):
        sent = orjson.loads(request.to_worker("theirs", stream=stream))
        assert sent["model"] == "theirs"
        assert not sent.keys() - listed
        for limited in (False, True):
            orjson.loads(openai_upstream.body(request, "m", stream=stream, names_completion_limit=limited))
        with suppress(BadRequest):
            orjson.loads(anthropic_upstream.body(request, "claude", stream=stream))
    for chars in (0, 7, 1000):
        beginning = request.beginning(chars)
        assert beginning is None or isinstance(orjson.loads(beginning.body), dict)
    assert request.choices >= 1
    assert request.prompt is not None


TARGETS = (
    Target(
        "body",
        pure(body),
        (
            *(b'"messages":[', b'{"role":"user","content":"a"}', b'"content":[{"type":"text","text":"a"}]'),
            *(b'"tools":[', b'"stream":true', b'"n":8', b'"prompt":[1,2]', b'"input":["a"]', b'"model":"m"'),
            *(b'"metadata":{"local_only":true}', b'"stream_options":{}', b'"max_tokens":1', b'"stop":["x"]'),
            *(
                b'"tool_choice":"auto"',
                b'"response_format":{"type":"json_object"}',
                b'"image_url":{"url":"x"}',
            ),
            *(b'"logit_bias":{"1":1}', b'"tool_calls":[{"function":{"arguments":"{}"}}]', b'"role":"tool"'),
        ),
    ),
)
