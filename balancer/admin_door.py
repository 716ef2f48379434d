"""Who may come in under `/admin`: who has the admin key, and our own page in a browser that was given a
cookie for it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

import orjson
from aiohttp import web

from balancer.core.errors import Forbidden, RequestError, UnsupportedMedia
from balancer.keys import AdminKey
from balancer.orders import Order, read_order
from balancer.sessions import COOKIE, Session, Sessions

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""They change nothing."""

WHO = web.RequestKey("who", str)
"""Who asks, for the log and the audit log: `admin key`, or `session` and its name."""

NOBODY_YET = "nobody yet"
"""Who is about to begin a session."""

_ORIGIN = re.compile(r"(https?)://([a-z0-9._:\[\]-]+)")


class SessionOver(RequestError):
    status, type, code = 401, "invalid_request_error", "session_over"


class _LogIn(Order):
    key: str


class AdminDoor:
    """Lets in by the key, or by a session that the key has begun."""

    def __init__(self, key: AdminKey, clock: Callable[[], float], sessions: Sessions | None = None) -> None:
        self._key = key
        self._clock = clock
        self._sessions = sessions or Sessions()

    def routes(self) -> list[web.AbstractRouteDef]:
        """How a page begins and ends its session; paths without `/admin`."""
        return [
            web.post("/session", self._begin),
            web.get("/session", self._shown),
            web.delete("/session", self._end),
        ]

    def let_in(self, request: web.Request) -> str:
        """Who it is. Raises a `RequestError` for everybody else: to them nothing is told, not even whether a
        path exists."""
        insist_on_own_page(request)
        if request.match_info.handler == self._begin:
            _insist_on_json(request)
            return NOBODY_YET  # the body holds the key
        given = given_key(request)
        token = request.cookies.get(COOKIE, "")
        if given or not token:
            self._key.check(given, request.remote or "")
            if request.method not in SAFE_METHODS and request.body_exists:
                _insist_on_json(request)
            return "admin key"
        session = self._sessions.find(token, self._clock())
        if session is None:
            raise SessionOver("This session has ended: give the admin key again.")
        if request.method not in SAFE_METHODS:
            # No form can send this, whatever a browser thinks of cookies.
            _insist_on_json(request)
        return f"session {session.name}"

    async def _begin(self, request: web.Request) -> web.Response:
        order = await read_order(request, _LogIn)
        self._key.check(order.key.strip(), request.remote or "")
        token = secrets.token_urlsafe(32)
        session = self._sessions.begin(token, self._clock())
        request[WHO] = f"session {session.name}"
        response = self._told(session)
        response.set_cookie(
            COOKIE,
            token,
            max_age=int(self._sessions.policy.longest_seconds),
            path="/",
            secure=request.secure,
            httponly=True,
            samesite="Strict",
        )
        return response

    async def _shown(self, request: web.Request) -> web.Response:
        return self._told(self._sessions.find(request.cookies.get(COOKIE, ""), self._clock()))

    async def _end(self, request: web.Request) -> web.Response:
        self._sessions.end(request.cookies.get(COOKIE, ""))
        response = self._told(None)
        response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=request.secure)
        return response

    def _told(self, session: Session | None) -> web.Response:
        """`session`: null for who came with the key itself."""
        now = self._clock()
        body = {
            "session": session.name if session else None,
            "seconds_left": round(self._sessions.seconds_left(session, now)) if session else None,
        }
        response = web.Response(body=orjson.dumps(body), content_type="application/json")
        response.headers["Cache-Control"] = "no-store"
        return response


def insist_on_own_page(request: web.Request) -> None:
    """Raises `Forbidden` for what a page of any other origin has sent, whatever the settings say of it: pages
    that may ask for answers may not rule the room."""
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    origin = request.headers.get("Origin")
    if site != "same-origin" or (origin is not None and not _is_own(origin, request)):
        raise Forbidden(
            "This can't be asked for by a web page of another site: use this balancer's own page at /ui, "
            "`balancer` commands, or a script."
        )


def _is_own(origin: str, request: web.Request) -> bool:
    found = _ORIGIN.fullmatch(origin.lower())
    if found is None or found[2] != request.headers.get("Host", "").lower():
        return False
    # Behind a proxy that ends TLS, the page's scheme is https and ours is not.
    return found[1] == "https" or not request.secure


def given_key(request: web.Request) -> str:
    """The key that came with a request's headers; empty: none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("X-Admin-Key", "").strip()


def _insist_on_json(request: web.Request) -> None:
    if request.content_type != "application/json":
        raise UnsupportedMedia("Send the order as JSON, with 'Content-Type: application/json'.")
