"""API keys under `/admin/keys`: seen, made, changed, revoked."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

import orjson
from aiohttp import web
from pydantic import Field, ValidationError

from balancer.access import Access, ApiKey, Count, KeyName, ModelNames, Permission
from balancer.access_store import KeyStore
from balancer.core.errors import BadRequest
from balancer.orders import Nothing, Order, read_order


class _NewKey(Permission):
    """As it comes: what has to be in force from the first moment on."""


class _Change(Order):
    """Only what is to be another from now on; null takes a limit away."""

    name: KeyName | None = None
    models: Annotated[ModelNames | None, Field(strict=False)] = None
    service_class: Annotated[Literal["interactive", "batch", "both"] | None, Field(alias="class")] = None
    requests_per_minute: Count | None = None
    max_concurrent: Count | None = None
    local_only: bool | None = None
    expires: datetime | None = None


_CANNOT_BE_NULL = frozenset({"name", "models", "service_class", "local_only"})


class KeyRoutes:
    """The routes of one store."""

    def __init__(self, store: KeyStore, access: Access) -> None:
        self._store = store
        self._access = access

    def routes(self) -> list[web.AbstractRouteDef]:
        """Paths without `/admin`."""
        return [
            web.get("/keys", self._all),
            web.post("/keys", self._create),
            web.patch("/keys/{id}", self._change),
            web.delete("/keys/{id}", self._revoke),
        ]

    async def _all(self, _request: web.Request) -> web.Response:
        return _json({"keys": [self._shown(key) for key in self._store.keys]})

    async def _create(self, request: web.Request) -> web.Response:
        order = await read_order(request, _NewKey)
        key, given = await self._store.create(Permission(**order.model_dump()))
        # Once, and nowhere else: what is kept is a digest.
        return _json({**self._shown(key), "key": given}, status=201)

    async def _change(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Change)
        fields = order.model_dump(exclude_unset=True)
        for name in _CANNOT_BE_NULL & fields.keys():
            if fields[name] is None:
                raise BadRequest(f"`{name}` cannot be null: leave it out to keep it.", param=name)

        def revise(key: ApiKey) -> ApiKey:
            try:
                return ApiKey(**{**key.model_dump(), **fields})
            except ValidationError:
                raise BadRequest("`expires` needs a time zone, like 2030-01-31T12:00:00Z.") from None

        return _json(self._shown(await self._store.change(request.match_info["id"], revise)))

    async def _revoke(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing)
        key = await self._store.revoke(request.match_info["id"])
        note = "It is refused from now on, and so is what waits with it; what a worker has may finish."
        return _json({**self._shown(key), "note": note})

    def _shown(self, key: ApiKey) -> Mapping[str, object]:
        told = key.model_dump(mode="json", by_alias=True, exclude={"digest"})
        return {**told, "state": self._store.state(key), "under_way": self._access.under_way(key.id)}


def _json(body: Mapping[str, object], status: int = 200) -> web.Response:
    response = web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
