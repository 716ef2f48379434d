"""What a balancer may have done with the models of this machine, behind the cluster key.

Every request carries a proof of the key for just this request (`handshake`). Without a key nobody may load,
fetch or delete anything here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson
from aiohttp import web

from worker_agent import wire
from worker_agent.exchange import Refused
from worker_agent.handshake import Nonces
from worker_agent.wire import ModelList, ModelOrder

_LOG = logging.getLogger(__name__)
BODY_BYTES = 64 * 1024
_BODY_SECONDS = 10.0


class Orderly(Protocol):
    """Who carries orders out. Each raises `Refused` for one that cannot be."""

    def listed(self) -> ModelList: ...
    async def load(self, order: ModelOrder) -> None: ...
    async def unload(self, order: ModelOrder) -> None: ...
    async def delete(self, order: ModelOrder) -> None: ...
    async def download(self, order: ModelOrder) -> None: ...
    async def cancel(self, order: ModelOrder) -> None: ...


class Orders:
    """The routes. `key`: the cluster's; None: every order is refused, with what to do."""

    def __init__(self, orderly: Orderly, agent_id: str, key: str | None) -> None:
        self._orderly = orderly
        self._agent_id = agent_id
        self._key = key
        self._nonces = Nonces()

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
            web.post(wire.CHALLENGE_PATH, self._challenge),
            web.get(wire.MODELS_PATH, self._list),
            *(
                web.post(f"{wire.MODELS_PATH}/{word}", self._order(word, carry_out, status))
                for word, (carry_out, status) in does.items()
            ),
        ]

    async def _challenge(self, _request: web.Request) -> web.Response:
        self._insist_on_a_key()
        nonce = self._nonces.give(secrets.token_urlsafe(24), _now())
        return web.json_response({"nonce": nonce, "id": self._agent_id})

    async def _list(self, request: web.Request) -> web.Response:
        self._insist_on_proof(request, b"")
        return _answer(self._orderly.listed(), 200)

    def _order(
        self, word: str, carry_out: Callable[[ModelOrder], Awaitable[None]], status: int
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            body = await _read(request)
            self._insist_on_proof(request, body)
            try:
                order = wire.parse_order(body)
            except wire.WireError as error:
                raise Refused(400, "bad_order", f"this order is not understood: {error}") from None
            _LOG.info("%s orders: %s %s", request.remote, word, order.name)
            await carry_out(order)
            return _answer(self._orderly.listed(), status)

        return handle

    def _insist_on_a_key(self) -> str:
        if self._key is None:
            raise Refused(
                403,
                "cluster_key_needed",
                "this agent has no cluster key: give it the balancer's, as WORKER_AGENT_CLUSTER_KEY or in the"
                ' file that "cluster_key_file" names, and start it again',
            )
        return self._key

    def _insist_on_proof(self, request: web.Request, body: bytes) -> None:
        key, proof = self._insist_on_a_key(), request.headers.get(wire.PROOF_HEADER, "")
        if not self._nonces.accepts(key, proof, self._agent_id, request.method, request.path, body, _now()):
            raise Refused(
                403,
                "cluster_key_wrong",
                f"{wire.PROOF_HEADER} does not prove the cluster key: ask {wire.CHALLENGE_PATH} for a nonce"
                " before each order, and see that both sides have the same key",
            )


async def _read(request: web.Request) -> bytes:
    if (request.content_length or 0) > BODY_BYTES or "Transfer-Encoding" in request.headers:
        raise Refused(413, "body_too_large", f"an order may have {BODY_BYTES} bytes, with a Content-Length")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except web.RequestPayloadError:
        raise Refused(400, "body_broken", "the order's body came to no end") from None
    except TimeoutError:
        raise Refused(408, "body_too_slow", "the order's body did not arrive in time") from None


def _answer(listed: ModelList, status: int) -> web.Response:
    body = orjson.dumps(listed.model_dump(mode="json"))
    return web.Response(body=body, status=status, content_type="application/json")


def _now() -> float:
    return asyncio.get_running_loop().time()
