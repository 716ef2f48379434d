"""A request for an API of OpenAI's kind that others run: OpenAI's own, Azure's, any compatible one. Pure.

Engines of the room pass over what they do not know; such an API refuses the request for it. So what is not
in OpenAI's own tables is left out: it tells how to sample, in the words of one engine or another.
"""

from __future__ import annotations

from typing import Any

import orjson

from balancer.core.model import Endpoint
from balancer.dialects.openai import Request

ENGINES_OWN = frozenset({"chat_template_kwargs", "min_p", "repeat_penalty", "repetition_penalty", "top_k"})
STREAM_OPTIONS = frozenset({"include_obfuscation"})
"""Beside `include_usage`, which is always asked for."""


def body(request: Request, model: str, *, stream: bool, names_completion_limit: bool) -> bytes:
    """The body for such an API. `names_completion_limit`: it knows the limit of a chat's answer by its newer
    name, and its reasoning models by no other."""
    asked: dict[str, Any] = orjson.loads(request.body)
    given = {"model": model} | {name: value for name, value in asked.items() if name not in ENGINES_OWN}
    if names_completion_limit and request.endpoint is Endpoint.CHAT and "max_tokens" in given:
        given.setdefault("max_completion_tokens", given.pop("max_tokens"))
    if stream:
        options = {
            name: request.stream_options[name] for name in STREAM_OPTIONS & request.stream_options.keys()
        }
        given |= {"stream": True, "stream_options": {**options, "include_usage": True}}
    return orjson.dumps(given)
