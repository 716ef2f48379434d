"""The page for people under `/ui`: its files, served from memory.

They hold no data and no key, so anybody who is served at all may have them. What the page shows it asks
`/admin` for, with a session; what it may do in a browser is said by its headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from urllib.parse import quote

from aiohttp import web

PAGE_PATH = "/ui"
STATIC_PATH = "/ui/static"

CONTENT_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
"""No script, style or data but the page's own, and nobody's frame around it: a text that would be markup has
nothing that it could do."""

_ALWAYS: Mapping[str, str] = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_TYPES: Mapping[str, str] = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

_PAGE = "index.html"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def page_routes() -> list[web.RouteDef]:
    """GET and HEAD of the page and of each of its files. Reads them: blocking, once, at the start."""
    found = sorted(
        (file.name, file.read_bytes()) for file in (files("balancer.dashboard") / "static").iterdir()
    )
    routes = []
    for name, data in found:
        handler = _answering(data, _TYPES[name.rpartition(".")[2]], kept=name != _PAGE)
        paths = (PAGE_PATH, f"{PAGE_PATH}/") if name == _PAGE else (f"{STATIC_PATH}/{name}",)
        routes += [web.get(path, handler) for path in paths]
    return routes


def page_url(base: str, key: str) -> str:
    """What somebody opens who is to be let in. `base`: the balancer's URL. The key stands in the fragment,
    which no browser sends, so that no log and no proxy has it."""
    return f"{base}{PAGE_PATH}#token={quote(key, safe='')}"


def _answering(data: bytes, kind: str, *, kept: bool) -> _Handler:
    """`kept`: browsers may keep it, and ask each time whether it is still the same."""
    tag = hashlib.sha256(data).hexdigest()[:32]
    headers = {
        **_ALWAYS,
        "Content-Type": kind,
        "Cache-Control": "no-cache" if kept else "no-store",
        "ETag": f'"{tag}"',
    }

    async def handle(request: web.Request) -> web.StreamResponse:
        asked = request.if_none_match
        if asked is not None and any(one.value in (tag, "*") for one in asked):
            return web.Response(status=304, headers={n: v for n, v in headers.items() if n != "Content-Type"})
        return web.Response(body=data, headers=headers)

    return handle
