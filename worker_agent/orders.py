"""What a balancer may have done with the models of this machine, within a session (`gate`)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson
from aiohttp import web

from worker_agent import wire
from worker_agent.exchange import Refused
from worker_agent.gate import read_message
from worker_agent.wire import ModelList, ModelOrder

_LOG = logging.getLogger(__name__)


class Orderly(Protocol):
    """Who carries orders out. Each raises `Refused` for one that cannot be."""

    def listed(self) -> ModelList: ...
    async def load(self, order: ModelOrder) -> None: ...
    async def unload(self, order: ModelOrder) -> None: ...
    async def delete(self, order: ModelOrder) -> None: ...
    async def download(self, order: ModelOrder) -> None: ...
    async def cancel(self, order: ModelOrder) -> None: ...


class Orders:
    """The routes."""

    def __init__(self, orderly: Orderly) -> None:
        self._orderly = orderly

    def routes(self) -> list[web.RouteDef]:
        """For the agent's application."""
        does = {
            "load": (self._orderly.load, 202),
            "unload": (self._orderly.unload, 200),
            "delete": (self._orderly.delete, 200),
            "download": (self._orderly.download, 202),
            "cancel": (self._orderly.cancel, 200),
        }
        return [
            web.get(wire.MODELS_PATH, self._list),
            *(
                web.post(f"{wire.MODELS_PATH}/{word}", self._order(word, carry_out, status))
                for word, (carry_out, status) in does.items()
            ),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        return _answer(self._orderly.listed(), 200)

    def _order(
        self, word: str, carry_out: Callable[[ModelOrder], Awaitable[None]], status: int
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            body = await read_message(request)
            try:
                order = wire.parse_order(body)
            except wire.WireError as error:
                raise Refused(400, "bad_order", f"this order is not understood: {error}") from None
            _LOG.info("%s orders: %s %s", request.remote, word, order.name)
            await carry_out(order)
            return _answer(self._orderly.listed(), status)

        return handle


def _answer(listed: ModelList, status: int) -> web.Response:
    body = orjson.dumps(listed.model_dump(mode="json"))
    return web.Response(body=body, status=status, content_type="application/json")
