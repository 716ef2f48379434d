"""What is answered under `/admin` about the cluster: who waits to be let in, who is remembered, the key that
all share. Put behind the admin key by `admin`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import orjson
from aiohttp import web

from balancer.addresses import join_line
from balancer.admin import RECORDED
from balancer.cluster import Cluster, NoSuchPending, NotApproved, Pending, Stranger
from balancer.core.errors import Conflict, NotFound
from balancer.core.model import WorkerId
from balancer.keys import CannotRotate
from balancer.orders import Nothing, Order, read_order
from worker_agent.handshake import CODE_LENGTH
from worker_agent.wire import Word

log = logging.getLogger(__name__)


class _Approve(Order):
    code: Word


class ClusterRoutes:
    """The cluster, seen and changed."""

    def __init__(
        self,
        cluster: Cluster,
        places: Callable[[], Sequence[str]],
        clock: Callable[[], float],
        wake: Callable[[WorkerId], None] = lambda _: None,
    ) -> None:
        """`places`: where other machines reach this balancer, `host:port`. `wake` has an agent looked at
        now."""
        self._cluster = cluster
        self._places = places
        self._clock = clock
        self._wake = wake

    def routes(self) -> list[web.AbstractRouteDef]:
        """Their paths without `/admin`."""
        return [
            web.get("/cluster", self._shown),
            web.post("/cluster/invite", self._invite),
            web.post("/cluster/rotate-key", self._rotate),
            web.delete("/cluster/agents/{id}", self._forget),
            web.post("/workers/{id}/approve", self._approve),
        ]

    async def _shown(self, _request: web.Request) -> web.Response:
        """Nothing of it is secret: certificates and tags are shown to everybody who asks a machine."""
        cluster, now = self._cluster, self._clock()
        met = {session.worker_id for session in cluster.sessions}
        strangers = cluster.strangers
        return _json(
            {
                "id": cluster.id,
                "tag": cluster.tag,
                "balancers": self._places(),
                "pending": [_pending_body(one, now) for one in cluster.pending],
                "mismatches": [_stranger_body(one, now) for one in strangers if one.is_other_certificate],
                "turned_away": [
                    _stranger_body(one, now) for one in strangers if not one.is_other_certificate
                ],
                "agents": [
                    {"id": agent_id, "fingerprint": fingerprint, "met": agent_id in met}
                    for agent_id, fingerprint in sorted(cluster.remembered.items())
                ],
            }
        )

    async def _invite(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing)
        places = tuple(self._places())
        invitation = self._cluster.invitation(places)
        _note(request, "an invitation was shown: it holds the cluster key")
        return _json(
            {
                "invitation": invitation,
                "command": join_line(invitation),
                "balancers": places,
                "note": "Whoever has this line can join, and can act as a balancer. It holds until the key "
                "is rotated.",
            }
        )

    async def _approve(self, request: web.Request) -> web.Response:
        order = await read_order(request, _Approve)
        agent_id = request.match_info["id"]
        if sum(letter.isalnum() for letter in order.code) != CODE_LENGTH:
            raise Conflict(f"A code has {CODE_LENGTH} letters and digits, like 7KQ2-M9XD: this is none.")
        try:
            await self._cluster.approve(agent_id, order.code)
        except NoSuchPending as error:
            raise NotFound(_sentence(error)) from None
        except NotApproved as error:
            _note(request, f"agent {agent_id} was not let in")
            raise Conflict(_sentence(error)) from None
        self._wake(WorkerId(agent_id))
        _note(request, f"agent {agent_id} was let in")
        return _json({"worker": agent_id, "approved": True})

    async def _rotate(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing)
        try:
            outcomes = await self._cluster.rotate()
        except CannotRotate as error:
            raise Conflict(_sentence(error)) from None
        _note(request, "the cluster has a new key")
        return _json(
            {
                "tag": self._cluster.tag,
                "agents": [
                    {"id": agent_id, "outcome": outcome} for agent_id, outcome in sorted(outcomes.items())
                ],
            }
        )

    async def _forget(self, request: web.Request) -> web.Response:
        await read_order(request, Nothing)
        agent_id = request.match_info["id"]
        if not await self._cluster.forget(agent_id):
            raise NotFound(f"No agent {agent_id!r} is remembered: `balancer cluster show` lists them.")
        self._wake(WorkerId(agent_id))
        _note(request, f"the certificate of agent {agent_id} is forgotten")
        note = "The next agent of that id that holds the cluster key is taken for it."
        return _json({"agent": agent_id, "forgotten": True, "note": note})


def _pending_body(pending: Pending, now: float) -> dict[str, object]:
    return {
        "id": pending.id,
        "url": pending.url,
        "fingerprint": pending.fingerprint,
        "seconds": round(now - pending.since, 1),
        "command": f"balancer workers approve {pending.id} CODE",
    }


def _stranger_body(stranger: Stranger, now: float) -> dict[str, object]:
    return {
        "id": stranger.id,
        "url": stranger.url,
        "reason": stranger.reason,
        "seconds": round(now - stranger.since, 1),
    }


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _note(request: web.Request, what: str) -> None:
    """Who changed what; names that come from elsewhere begin no line of their own."""
    said = what if what.isprintable() else ascii(what)
    request[RECORDED] = {"what": said}
    log.info("admin %s: %s", request.remote, said)


def _json(body: object) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")
