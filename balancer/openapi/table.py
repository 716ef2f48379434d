"""Every route of the balancer, with what it takes and what it answers: one row each. Pure.

A route without a row fails a test, and a row without a route as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from balancer.audit import MAX_LISTED
from balancer.core.model import Endpoint
from balancer.openapi import schemas
from balancer.openapi.schemas import Schema
from worker_agent.wire import AGENT_HEADER, JOIN_PATH, TAG_HEADER, TUNNEL_PATH, TUNNEL_PROTOCOL


class Plane(StrEnum):
    """Whose door a route is behind."""

    INFERENCE = "inference"
    """Open to the addresses that are served; with `auth: keys`, to who brings an API key."""
    ADMIN = "admin"
    """To who brings the admin key, or the session that was had for it."""
    CLUSTER = "cluster"
    """To agents. Nothing that they say here is believed before both have proven that they hold the key."""
    OPEN = "open"
    """To the addresses that are served: tells nothing of anybody's requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    name: str
    schema: Schema
    where: str = "query"
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    plane: Plane
    summary: str
    answers: Mapping[int, Schema | None]
    """By status, those that are no refusal; None: no body, or none that is JSON."""
    refusals: frozenset[int] = frozenset()
    """Beside those that every operation of its kind has."""
    body: Schema | None = None
    body_required: bool = True
    parameters: tuple[Parameter, ...] = ()
    streams: bool = False
    """It may be answered by server-sent events."""
    text: str = ""
    """The content type of an answer that is no JSON."""


ANY_REFUSALS = frozenset({400, 403, 421})
"""No proper HTTP; an address, page or host name that is not served."""
BODY_REFUSALS = frozenset({408, 413, 415})
_OF_PLANES: Mapping[Plane, frozenset[int]] = {
    Plane.OPEN: frozenset(),
    Plane.CLUSTER: frozenset(),
    Plane.ADMIN: frozenset({401, 429}),
    Plane.INFERENCE: frozenset({401, 429}),
}
_OF_ANSWERS = frozenset({404, 422, 502, 503, 504, 508})


def refusals(operation: Operation) -> frozenset[int]:
    """Every status with which it may be refused."""
    body = BODY_REFUSALS if operation.body is not None else frozenset()
    return ANY_REFUSALS | _OF_PLANES[operation.plane] | body | operation.refusals


_HEADERS = (
    Parameter(
        name="X-Priority",
        where="header",
        schema={"enum": ["interactive", "batch"]},
        text="Who waits for whom: batch takes the room that interactive leaves.",
    ),
    Parameter(
        name="X-Local-Only",
        where="header",
        schema={"enum": ["true", "false"]},
        text="true: the request must not leave the room, whatever fallbacks there are.",
    ),
)

_SUMMARIES = {
    Endpoint.CHAT: "An answer to a conversation",
    Endpoint.COMPLETIONS: "A text that goes on from a prompt",
    Endpoint.EMBEDDINGS: "Vectors of texts",
}


def _inference() -> Iterable[Operation]:
    for endpoint, summary in _SUMMARIES.items():
        yield Operation(
            method="POST",
            path=endpoint.value,
            plane=Plane.INFERENCE,
            summary=summary,
            body=schemas.asked(endpoint),
            answers={200: schemas.ANSWERS[endpoint]},
            refusals=_OF_ANSWERS,
            parameters=_HEADERS,
            streams=endpoint is not Endpoint.EMBEDDINGS,
        )
    yield Operation(
        method="GET",
        path="/v1/models",
        plane=Plane.INFERENCE,
        summary="The models that can be asked for",
        answers={200: schemas.MODELS},
    )
    yield Operation(
        method="GET",
        path="/v1/models/{model}",
        plane=Plane.INFERENCE,
        summary="One of them",
        answers={200: schemas.MODEL},
        refusals=frozenset({404}),
    )


def _open() -> Iterable[Operation]:
    yield Operation(
        method="GET",
        path="/health",
        plane=Plane.OPEN,
        summary="Whether the balancer lives, and what it sees of the room",
        answers={200: schemas.HEALTH},
    )
    yield Operation(
        method="GET",
        path="/readyz",
        plane=Plane.OPEN,
        summary="Whether a request could be served now",
        answers={200: schemas.READY, 503: schemas.READY},
    )
    yield Operation(
        method="GET",
        path="/metrics",
        plane=Plane.OPEN,
        summary="For Prometheus",
        answers={200: None},
        text="text/plain",
        refusals=frozenset({404}),
    )
    yield Operation(
        method="GET",
        path="/openapi.json",
        plane=Plane.OPEN,
        summary="This document",
        answers={200: schemas.OBJECT},
    )


def _cluster() -> Iterable[Operation]:
    yield Operation(
        method="POST",
        path=JOIN_PATH,
        plane=Plane.CLUSTER,
        summary="An agent asks to be looked at",
        body=schemas.ref("Join"),
        answers={200: schemas.JOINED},
        refusals=frozenset({409}),
    )
    yield Operation(
        method="GET",
        path=TUNNEL_PATH,
        plane=Plane.CLUSTER,
        summary="An agent that cannot be reached offers a connection, by an HTTP upgrade",
        answers={101: None},
        refusals=frozenset({429}),
        parameters=(
            Parameter(name="Upgrade", where="header", schema={"const": TUNNEL_PROTOCOL}),
            Parameter(name=AGENT_HEADER, where="header", schema=schemas.STRING, text="Its id, URL-encoded."),
            Parameter(name=TAG_HEADER, where="header", schema=schemas.STRING, text="The tag of its key."),
        ),
    )


def _admin(
    method: str,
    path: str,
    summary: str,
    answer: Schema,
    *,
    status: int = 200,
    body: Schema | None = None,
    body_required: bool = False,
    refusals: Iterable[int] = (),
    parameters: tuple[Parameter, ...] = (),
    further: Mapping[int, Schema] | None = None,
) -> Operation:
    """`further`: answers with another status."""
    return Operation(
        method=method,
        path=f"/admin{path}",
        plane=Plane.ADMIN,
        summary=summary,
        answers={status: answer, **(further or {})},
        body=body,
        body_required=body_required,
        refusals=frozenset(refusals),
        parameters=parameters,
    )


def _room() -> Iterable[Operation]:
    yield _admin("GET", "/workers", "The room, with all that is known of each worker", schemas.ADMIN_WORKERS)
    for action, summary in (
        ("drain", "Give a worker nothing new"),
        ("undrain", "Give it requests again"),
        ("resume", "The same as undrain"),
    ):
        yield _admin(
            "POST",
            f"/workers/{{id}}/{action}",
            summary,
            schemas.DRAINING,
            body=schemas.NOTHING,
            refusals=(404,),
        )
    yield _admin(
        "POST",
        "/workers/{id}/admit",
        "Let a removed worker belong to the room again",
        schemas.REMOVED,
        body=schemas.NOTHING,
        refusals=(404,),
    )
    yield _admin(
        "DELETE",
        "/workers/{id}",
        "Remove a worker from the room",
        schemas.REMOVED,
        body=schemas.NOTHING,
        refusals=(404, 409),
    )
    yield _admin(
        "GET",
        "/requests/{id}/why",
        "Why a finished request went where it went",
        schemas.WHY,
        refusals=(404,),
    )


def _models() -> Iterable[Operation]:
    yield _admin("GET", "/models", "Every model, where it is and how it is", schemas.ADMIN_MODELS)
    for action, body, summary in (
        ("load", schemas.LOAD, "Load a model"),
        ("unload", schemas.UNLOAD, "Free the memory that a model takes"),
        ("download", schemas.DOWNLOAD, "Fetch a model from the hub"),
        ("delete", schemas.DELETE, "Delete a model from a machine's disk"),
        ("cancel", schemas.LOAD, "End a download"),
    ):
        yield _admin(
            "POST",
            f"/models/{action}",
            summary,
            schemas.OUTCOME,
            body=body,
            body_required=True,
            further={202: schemas.OUTCOME},
            refusals=(404, 409, 502),
        )


def _presets() -> Iterable[Operation]:
    yield _admin("GET", "/presets", "What documents can be asked", schemas.PRESETS)
    yield _admin("GET", "/presets/{name}", "One preset", schemas.ref("Preset"), refusals=(404,))
    yield _admin(
        "PUT",
        "/presets/{name}",
        "Keep a preset",
        schemas.KEPT_PRESET,
        body=schemas.ref("Preset"),
        body_required=True,
        further={201: schemas.KEPT_PRESET},
        refusals=(409,),
    )
    yield _admin(
        "DELETE",
        "/presets/{name}",
        "Delete one of your own",
        schemas.DELETED_PRESET,
        body=schemas.NOTHING,
        refusals=(404, 409),
    )


def _configuration() -> Iterable[Operation]:
    yield _admin("GET", "/config", "The settings that are in force, without secrets", schemas.CONFIG)
    yield _admin(
        "POST",
        "/config/reload",
        "Read the configuration again",
        schemas.RELOADED,
        body=schemas.NOTHING,
        refusals=(422,),
    )


def _cluster_admin() -> Iterable[Operation]:
    yield _admin(
        "GET", "/cluster", "The cluster: who waits, who is remembered, who was turned away", schemas.CLUSTER
    )
    yield _admin(
        "POST",
        "/cluster/invite",
        "The command by which a machine joins; it holds the cluster key",
        schemas.INVITATION,
        body=schemas.NOTHING,
    )
    yield _admin(
        "POST",
        "/cluster/rotate-key",
        "Give the cluster a new key",
        schemas.ROTATED,
        body=schemas.NOTHING,
        refusals=(409,),
    )
    yield _admin(
        "DELETE",
        "/cluster/agents/{id}",
        "Forget an agent's certificate, to take the next one of that name for it",
        schemas.FORGOTTEN,
        body=schemas.NOTHING,
        refusals=(404,),
    )
    yield _admin(
        "POST",
        "/workers/{id}/approve",
        "Let in a machine that waits, by the code that it shows",
        schemas.APPROVED,
        body=schemas.APPROVE,
        body_required=True,
        refusals=(404, 409),
    )


def _keys() -> Iterable[Operation]:
    yield _admin("GET", "/keys", "The API keys of clients, without their secrets", schemas.API_KEYS)
    yield _admin(
        "POST",
        "/keys",
        "Make one; its secret is in this answer and nowhere else",
        schemas.NEW_API_KEY,
        status=201,
        body=schemas.ref("NewApiKey"),
        body_required=True,
        refusals=(409,),
    )
    yield _admin(
        "PATCH",
        "/keys/{id}",
        "Change what its holder may do",
        schemas.API_KEY,
        body=schemas.CHANGE_API_KEY,
        refusals=(404, 409),
    )
    yield _admin(
        "DELETE",
        "/keys/{id}",
        "Revoke it",
        schemas.API_KEY,
        body=schemas.NOTHING,
        refusals=(404, 409),
    )


def _sessions() -> Iterable[Operation]:
    yield _admin(
        "POST",
        "/session",
        "Exchange the admin key for a cookie, which only this balancer's own page gets",
        schemas.SESSION,
        body=schemas.SIGN_IN,
        body_required=True,
    )
    yield _admin("GET", "/session", "The session that this is", schemas.SESSION)
    yield _admin("DELETE", "/session", "End it", schemas.SESSION, body=schemas.NOTHING)
    yield _admin(
        "GET",
        "/audit",
        "The last changes, newest first",
        schemas.AUDIT,
        parameters=(
            Parameter(name="limit", schema={"type": "integer", "minimum": 1, "maximum": MAX_LISTED}),
        ),
    )


OPERATIONS: tuple[Operation, ...] = (
    *_inference(),
    *_open(),
    *_cluster(),
    *_room(),
    *_cluster_admin(),
    *_keys(),
    *_sessions(),
    *_models(),
    *_presets(),
    *_configuration(),
)

FOR_BROWSERS = ("/ui",)
"""Paths, and what is below them, that are no API: the page and its files."""
