"""The shapes of the API's bodies, as JSON Schema 2020-12. Pure.

Requests are described as their readers judge them: with their bounds, and no more is allowed than they allow.
Answers name all keys that are always there; more may come with a newer version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from balancer.access import Permission
from balancer.batch.presets import MAX_PROMPTS, Preset
from balancer.core.model import Endpoint
from balancer.dialects import openai
from worker_agent.wire import WIRE_VERSION, Join

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
OBJECT: Schema = {"type": "object"}
STRINGS: Schema = {"type": "array", "items": STRING}
WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": r"^[^\x00-\x1f\x7f]+$"}
"""`worker_agent.wire.Word`: printable."""


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def closed(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An order: a key that is not known is refused."""
    return {**told(required, optional), "additionalProperties": False}


def told(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An answer, or a request in which further keys are passed over."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


NOTHING = closed({})
"""The body of an order that has nothing to say; it may be left out."""


# Requests for answers ...


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


_TOKENS = array(INTEGER, minItems=1, maxItems=openai.MAX_INPUT_TOKENS)
_PROMPT: Schema = {
    "anyOf": [
        STRING,
        array(STRING, maxItems=openai.MAX_INPUTS),
        _TOKENS,
        array(_TOKENS, maxItems=openai.MAX_INPUTS),
    ]
}
_TOKEN_LIMIT = _integer(1, 10_000_000)

_SAMPLING: Mapping[str, Schema] = {
    "frequency_penalty": _number(-2, 2),
    "logit_bias": OBJECT,
    "max_tokens": _TOKEN_LIMIT,
    "n": _integer(1, openai.MAX_CHOICES),
    "presence_penalty": _number(-2, 2),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": {"anyOf": [STRING, array(STRING, maxItems=16)]},
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "top_k": _integer(-1, 1_000_000),
    "repeat_penalty": _number(0, 100),
    "repetition_penalty": _number(0, 100),
}

_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": sorted(openai.ROLES)},
        "content": {"anyOf": [STRING, array(OBJECT, maxItems=openai.MAX_PARTS), {"type": "null"}]},
    },
    "required": ["role"],
    # Only an assistant may have said nothing: it has called tools.
    "if": {"properties": {"role": {"not": {"const": "assistant"}}}},
    "then": {
        "required": ["content"],
        "properties": {"content": {"anyOf": [STRING, array(OBJECT, maxItems=openai.MAX_PARTS)]}},
    },
}

FIELDS: Mapping[Endpoint, Mapping[str, Schema]] = {
    Endpoint.CHAT: {
        **_SAMPLING,
        "chat_template_kwargs": {
            "type": "object",
            "properties": {"enable_thinking": BOOLEAN, "thinking": BOOLEAN},
            "additionalProperties": False,
        },
        "logprobs": BOOLEAN,
        "max_completion_tokens": _TOKEN_LIMIT,
        "messages": array(_MESSAGE, minItems=1, maxItems=openai.MAX_MESSAGES),
        "parallel_tool_calls": BOOLEAN,
        "reasoning_effort": STRING,
        "response_format": OBJECT,
        "tool_choice": {"anyOf": [STRING, OBJECT]},
        "tools": array(OBJECT),
        "top_logprobs": _integer(0, 20),
    },
    Endpoint.COMPLETIONS: {
        **_SAMPLING,
        "best_of": _integer(1, openai.MAX_CHOICES),
        "echo": BOOLEAN,
        "logprobs": _integer(0, 20),
        "max_tokens": _integer(0, 10_000_000),
        "prompt": _PROMPT,
        "suffix": STRING,
    },
    Endpoint.EMBEDDINGS: {
        "dimensions": _integer(1, 1_000_000),
        "encoding_format": {"enum": ["float", "base64"]},
        "input": _PROMPT,
    },
}
"""The same fields as `openai.FIELDS`; a test holds the two together."""

FOR_US: Mapping[str, Schema] = {
    "prompt_cache_key": STRING,
    "service_tier": {"enum": ["auto", "default", "flex", "priority", "scale"]},
    "metadata": {"type": "object", "properties": {"local_only": nullable({"enum": [True, False, "true"]})}},
}


def asked(endpoint: Endpoint) -> Schema:
    """The body of a request for an answer. Fields that are not listed are passed over, or refused where
    passing over them would give another answer than was asked for."""
    required = openai.REQUIRED[endpoint]
    properties = {name: nullable(one) for name, one in {**FIELDS[endpoint], **FOR_US}.items()}
    properties["model"] = {"type": "string", "minLength": 1, "maxLength": 256}
    properties[required] = {**FIELDS[endpoint][required], "minLength": 1, "minItems": 1}
    schema: Schema = {"type": "object", "properties": properties, "required": ["model", required]}
    if "stream_options" in properties:
        schema["if"] = {"properties": {"stream_options": OBJECT}, "required": ["stream_options"]}
        schema["then"] = {"properties": {"stream": {"const": True}}, "required": ["stream"]}
    return schema


# ... and their answers, as engines give them: what the balancer adds or promises by itself is named.

_ANSWER = told(
    {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING, "choices": array(OBJECT)},
    {"usage": nullable(OBJECT)},
)
ANSWERS: Mapping[Endpoint, Schema] = {
    Endpoint.CHAT: _ANSWER,
    Endpoint.COMPLETIONS: _ANSWER,
    Endpoint.EMBEDDINGS: told({"object": STRING, "data": array(OBJECT)}, {"model": STRING, "usage": OBJECT}),
}


# What is told of the room ...

ERROR = told(
    {
        "error": told(
            {
                "message": STRING,
                "type": STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            }
        )
    }
)
"""What every refusal is, as OpenAI's SDKs read it."""

MODEL = told(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": INTEGER,
        "owned_by": STRING,
        "workers": COUNT,
    },
    {"context_length": COUNT},
)
MODELS = told({"object": {"const": "list"}, "data": array(MODEL)})

_WORKER: Mapping[str, Schema] = {
    "id": STRING,
    "type": STRING,
    "url": STRING,
    "state": STRING,
    "detail": STRING,
    "breaker": {"enum": ["closed", "open", "half_open"]},
    "running": COUNT,
    "slots": COUNT,
    "success_rate": SHARE,
    "average_seconds": nullable(NUMBER),
    "prefill_tokens_per_second": nullable(NUMBER),
    "tokens_per_second": nullable(NUMBER),
    "engine": STRING,
    "hardware": STRING,
    "advice": STRINGS,
}
_ROOM: Mapping[str, Schema] = {
    "waiting": COUNT,
    "waiting_batch": COUNT,
    "running": COUNT,
    "warnings": STRINGS,
}
HEALTH = told({"status": {"const": "ok"}, **_ROOM, "workers": array(told({**_WORKER, "models": STRINGS}))})
READY = told({"ready": BOOLEAN, "workers_ready": COUNT, "workers": COUNT})

_HOLDING: Mapping[str, Schema] = {
    "state": {"enum": ["loaded", "loading", "unloaded", "failed"]},
    "progress": nullable(SHARE),
    "eta_seconds": nullable(NUMBER),
    "load_seconds": nullable(NUMBER),
    "size_bytes": nullable(COUNT),
    "memory_bytes": nullable(COUNT),
    "engine": STRING,
    "detail": STRING,
}
ADMIN_WORKERS = told(
    {
        **_ROOM,
        "workers": array(
            told(
                {
                    **_WORKER,
                    "source": STRING,
                    "draining": BOOLEAN,
                    "stuck": BOOLEAN,
                    "max_concurrent_requests": nullable(COUNT),
                    "fallback": BOOLEAN,
                    "aliases": {"type": "object", "additionalProperties": STRING},
                    "models": array(told({"name": STRING, "names": STRINGS, **_HOLDING})),
                    "memory_total_bytes": nullable(COUNT),
                    "memory_held_bytes": nullable(COUNT),
                }
            )
        ),
        "removed": STRINGS,
    }
)
DRAINING = told({"worker": STRING, "draining": BOOLEAN})
REMOVED = told({"worker": STRING, "removed": BOOLEAN, "note": STRING}, {"source": nullable(STRING)})

ADMIN_MODELS = told(
    {
        "models": array(
            told(
                {
                    "name": STRING,
                    **{name: _HOLDING[name] for name in ("state", "progress", "eta_seconds")},
                    "workers": array(told({"worker": STRING, "own_name": STRING, **_HOLDING})),
                }
            )
        ),
        "downloads": array(told({"worker": STRING, "repo": STRING, "name": STRING, "state": STRING})),
    }
)

# ... and the orders that change it.

LOAD = closed({"model": WORD}, {"worker": nullable(WORD)})
UNLOAD = closed({"model": WORD}, {"worker": nullable(WORD), "force": BOOLEAN})
DELETE = closed({"model": WORD, "worker": WORD}, {"force": BOOLEAN})
DOWNLOAD = {
    **closed(
        {"repo": WORD},
        {
            "worker": nullable(WORD),
            "workers": nullable({"anyOf": [WORD, array(WORD, maxItems=1024)]}),
            "name": nullable(WORD),
            "file": nullable(WORD),
            "revision": nullable(WORD),
        },
    ),
    "oneOf": [
        {"properties": {"worker": WORD, "workers": {"type": "null"}}, "required": ["worker"]},
        {
            "properties": {"worker": {"type": "null"}, "workers": {"anyOf": [WORD, array(WORD, minItems=1)]}},
            "required": ["workers"],
        },
    ],
}
_RESULTS: Mapping[str, Schema] = {
    "action": {"enum": ["load", "unload", "download", "delete", "cancel"]},
    "model": STRING,
    "results": array(told({"worker": STRING, "ok": BOOLEAN, "status": INTEGER, "detail": STRING})),
}
OUTCOME = told(_RESULTS)

PRESETS = told(
    {
        "folder": STRING,
        "presets": array(
            told(
                {
                    "name": STRING,
                    "own": BOOLEAN,
                    "description": STRING,
                    "prompts": COUNT,
                    "faults": STRINGS,
                }
            )
        ),
    }
)
KEPT_PRESET = told({"preset": STRING, "created": BOOLEAN})
DELETED_PRESET = told({"preset": STRING, "deleted": BOOLEAN})

FAULT = told({"message": STRING, "line": nullable(COUNT), "column": nullable(COUNT)})
CONFIG = told(
    {
        "file": nullable(STRING),
        "status": told(
            {
                "state": {"enum": ["ok", "broken"]},
                "since": nullable(STRING),
                "last_good_at": nullable(STRING),
                "faults": array(FAULT),
                "file": nullable(STRING),
            }
        ),
        "needs_restart": STRINGS,
        "settings": OBJECT,
        "sources": OBJECT,
        "workers": array(OBJECT),
    }
)
RELOADED = told({name: STRINGS for name in ("added", "removed", "changed", "applied", "needs_restart")})

WHY = told(
    {
        "request_id": STRING,
        "model": STRING,
        "endpoint": STRING,
        "stream": BOOLEAN,
        "client": STRING,
        "status": INTEGER,
        "error": nullable(STRING),
        "queue_seconds": NUMBER,
        "seconds": NUMBER,
        "service_class": {"enum": ["interactive", "batch"]},
        "warm_ups": COUNT,
        "fallback": BOOLEAN,
        "attempts": array(OBJECT),
    }
)

JOINED = told({"joined": STRING})

# The cluster ...

_STRANGER = told({"id": STRING, "url": STRING, "reason": STRING, "seconds": NUMBER})
CLUSTER = told(
    {
        "id": STRING,
        "tag": STRING,
        "balancers": STRINGS,
        "pending": array(
            told({"id": STRING, "url": STRING, "fingerprint": STRING, "seconds": NUMBER, "command": STRING})
        ),
        "mismatches": array(_STRANGER),
        "turned_away": array(_STRANGER),
        "agents": array(told({"id": STRING, "fingerprint": STRING, "met": BOOLEAN})),
    }
)
INVITATION = told({"invitation": STRING, "command": STRING, "balancers": STRINGS, "note": STRING})
ROTATED = told({"tag": STRING, "agents": array(told({"id": STRING, "outcome": STRING}))})
FORGOTTEN = told({"agent": STRING, "forgotten": BOOLEAN, "note": STRING})
APPROVE = closed({"code": WORD})
APPROVED = told({"worker": STRING, "approved": BOOLEAN})

# ... and who may come in.

_COUNT_OR_NONE = nullable({"type": "integer", "minimum": 1, "maximum": 1_000_000})
_TIME: Schema = {"type": "string", "format": "date-time"}
_PERMISSION: Mapping[str, Schema] = {
    "name": {"type": "string", "minLength": 1, "maxLength": 64},
    "models": array({"type": "string", "minLength": 1, "maxLength": 256}, maxItems=256),
    "class": {"enum": ["interactive", "batch", "both"]},
    "requests_per_minute": _COUNT_OR_NONE,
    "max_concurrent": _COUNT_OR_NONE,
    "local_only": BOOLEAN,
    "expires": nullable(_TIME),
}
CHANGE_API_KEY = closed({}, _PERMISSION)
API_KEY = told(
    {
        **_PERMISSION,
        "id": STRING,
        "created": STRING,
        "revoked": nullable(STRING),
        "state": STRING,
        "under_way": COUNT,
    },
    {"note": STRING},
)
NEW_API_KEY = {**API_KEY, "required": [*API_KEY["required"], "key"]}
API_KEYS = told({"keys": array(API_KEY)})

SIGN_IN = closed({"key": STRING})
SESSION = told({"session": nullable(STRING), "seconds_left": nullable(COUNT)})
AUDIT = told({"records": array(told({"at": STRING}))})


def of_model(kind: type[BaseModel]) -> tuple[Schema, dict[str, Schema]]:
    """Of a pydantic model: its schema, and those that it refers to, by name."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema, schema.pop("$defs", {})


def components() -> dict[str, Schema]:
    """The shapes that have a name."""
    named: dict[str, Schema] = {"Error": ERROR}
    for name, kind in (("Preset", Preset), ("Join", Join), ("NewApiKey", Permission)):
        schema, more = of_model(kind)
        named |= {**more, name: schema}
    # Its own rule, which the model checks after its fields so that the sentence is a better one.
    named["Preset"]["properties"]["prompts"] |= {"minItems": 1, "maxItems": MAX_PROMPTS}
    named["Join"]["properties"] |= {"id": WORD, "wire": {"const": WIRE_VERSION}}
    return named
