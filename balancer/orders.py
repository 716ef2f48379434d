"""The body of an order under `/admin`: read within bounds, and checked against what the order takes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from balancer.core.errors import BadRequest, BodyTimeout, BodyTooLarge, UnsupportedMedia

MAX_BODY_BYTES = 64 * 1024
"""Of an order; a preset may be larger."""
BODY_SECONDS = 30.0

TARGETS: web.RequestKey[Mapping[str, object]] = web.RequestKey("targets", Mapping)
"""What an order is about, for the audit log: the names in it, nothing else of its body."""
_NAMES = ("model", "worker", "workers", "repo", "name")

_Body = TypeVar("_Body", bound=BaseModel)


class Order(BaseModel):
    """What an order's body may hold; anything else is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Nothing(Order):
    """An order without a body, or with an empty object."""


async def read_order(request: web.Request, kind: type[_Body], seconds: float = BODY_SECONDS) -> _Body:
    """The body as an order; none is an empty one. `seconds`: for it to arrive.

    Raises a `RequestError` that names what is wrong.
    """
    data = await read_body(request, MAX_BODY_BYTES, seconds)
    try:
        fields = orjson.loads(data or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error.msg} at byte {error.pos}.") from None
    if not isinstance(fields, dict):
        raise BadRequest('The body is a JSON object, like {"model": "NAME"}.')
    try:
        order = kind.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise _misordered(error, kind) from None
    request[TARGETS] = {name: fields[name] for name in _NAMES if name in kind.model_fields and name in fields}
    return order


async def read_body(request: web.Request, limit: int, seconds: float = BODY_SECONDS) -> bytes:
    """Raises a `RequestError` for one that is too large, compressed, or does not come."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Compressed request bodies are not accepted: leave out Content-Encoding.")
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise BodyTimeout(f"The request body did not arrive within {seconds:g} s.") from None
    return bytes(body)


def _misordered(error: ValidationError, kind: type[BaseModel]) -> BadRequest:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"][:1])
    known = ", ".join(field.alias or name for name, field in kind.model_fields.items()) or "no keys"
    match first["type"]:
        case "missing":
            sentence = f"`{where}` is missing"
        case "extra_forbidden":
            sentence = f"`{where[:60]}` is not known here"
        case _:
            sentence = f"`{where}`: {first['msg']}"
    return BadRequest(
        f"{sentence}. The body of this order is a JSON object with {known}.", param=where or None
    )


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes, the most that is read here.")
