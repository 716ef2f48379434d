"""The description of the API, as OpenAPI 3.1: made of one table, served and published.

`configs/openapi.json` holds the same; `python -m balancer.openapi` writes it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson
from aiohttp import web

from balancer.openapi import schemas
from balancer.openapi.table import OPERATIONS, Operation, Parameter, Plane, refusals

Json = dict[str, Any]

PATH = "/openapi.json"

_SECURITY: dict[Plane, list[Json]] = {
    Plane.OPEN: [],
    Plane.CLUSTER: [],
    Plane.INFERENCE: [{}, {"apiKey": []}],  # the first: what `auth: lan` asks for
    Plane.ADMIN: [{"adminKey": []}, {"adminKeyHeader": []}, {"session": []}],
}
_SCHEMES: Json = {
    "apiKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "Made by `balancer keys create`; asked for where the setting auth is keys.",
    },
    "adminKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "In the file admin_key in the balancer's data folder.",
    },
    "adminKeyHeader": {"type": "apiKey", "in": "header", "name": "X-Admin-Key"},
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": "balancer_session",
        "description": "Of the page: had for the admin key by POST /admin/session.",
    },
}
_REFUSED: Json = {
    "description": "Refused, with the reason and what to do",
    "content": {"application/json": {"schema": schemas.ref("Error")}},
}


def document() -> Json:
    """The whole of it, as JSON. Says nothing of this installation."""
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llm-room-balancer",
            "version": "1",
            "description": "One OpenAI endpoint in front of a room of machines, and its administration.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": plane.value} for plane in Plane],
        "paths": paths,
        "components": {
            "schemas": schemas.components(),
            "responses": {"Refused": _REFUSED},
            "securitySchemes": _SCHEMES,
        },
    }


def published() -> bytes:
    """As `configs/openapi.json` has it."""
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n"


def openapi_routes() -> list[web.RouteDef]:
    """GET and HEAD of the document, from memory."""
    body = published()
    headers = {
        "Content-Type": "application/json",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "X-Content-Type-Options": "nosniff",
    }

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=headers)

    return [web.get(PATH, handle)]


def _described(operation: Operation) -> Json:
    described: Json = {
        "operationId": _name(operation),
        "summary": operation.summary,
        "tags": [operation.plane.value],
        "security": _SECURITY[operation.plane],
        "parameters": [
            *(_parameter(_of_path(name)) for name in re.findall(r"\{(\w+)\}", operation.path)),
            *map(_parameter, operation.parameters),
        ],
        "responses": _responses(operation),
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": {"schema": operation.body}},
        }
    return described


def _name(operation: Operation) -> str:
    words = re.findall(r"[A-Za-z0-9]+", operation.path)
    return "_".join([operation.method.lower(), *words])


def _of_path(name: str) -> Parameter:
    return Parameter(name=name, where="path", schema={"type": "string", "minLength": 1})


def _parameter(one: Parameter) -> Json:
    told: Json = {
        "name": one.name,
        "in": one.where,
        "required": one.where == "path",
        "schema": one.schema,
    }
    return told | ({"description": one.text} if one.text else {})


def _responses(operation: Operation) -> Json:
    found: Json = {}
    for status, schema in operation.answers.items():
        found[str(status)] = {
            "description": "Done" if status < 300 else "Not now",
            **_content(operation, status, schema),
        }
    for status in refusals(operation) - operation.answers.keys():
        found[str(status)] = {"$ref": "#/components/responses/Refused"}
    return dict(sorted(found.items()))


def _content(operation: Operation, status: int, schema: schemas.Schema | None) -> Json:
    if schema is None:
        return {"content": {operation.text: {"schema": schemas.STRING}}} if operation.text else {}
    content: Json = {"application/json": {"schema": schema}}
    if operation.streams and status == 200:
        content["text/event-stream"] = {"schema": schemas.STRING}
    return {"content": content}
