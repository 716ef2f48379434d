"""Which names a request may call this balancer by, and which web pages may send it any. Pure.

A page in somebody's browser can reach what that person's machine can reach. The two ways it has are closed
on every route and for every method: a name of its own that leads to our address (DNS rebinding) is refused
by the Host header, and a request across sites by what browsers say of where it comes from (RELIABILITY D8).

Pages whose origin the settings list may ask for answers, and read them; nothing else, and no other page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from balancer.core.errors import RequestError


class WrongHost(RequestError):
    status, type, code = 421, "invalid_request_error", "host_not_allowed"


class CrossSite(RequestError):
    status, type, code = 403, "invalid_request_error", "origin_not_allowed"


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    hosts: frozenset[str] = frozenset()
    """Names in lower case, without port, that lead to this machine, beside those that always do."""
    origins: frozenset[str] = frozenset()
    """Web origins (`https://chat.lab.org`) whose pages may ask for answers."""


LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

APP_SCHEMES = frozenset({"app", "capacitor", "file", "tauri", "vscode-file", "vscode-webview"})
"""Of programs that show pages of their own. No web page can claim one of these."""

_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._:\[\]-]*)")
_PORT = re.compile(r":\d{1,5}$")
_CROSS = ("cross-site", "same-site")
_NOTHING: Mapping[str, str] = MappingProxyType({})

READABLE_HEADERS = (
    "X-Request-ID, Retry-After, X-Balancer-Worker, X-Balancer-Model, X-Balancer-Attempts, X-Balancer-Reason, "
    "X-Balancer-Queue-Ms, X-Balancer-Fallback, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests"
)
"""Of our answers, by scripts of a page that is listed."""
_SENDABLE_HEADERS = frozenset(
    {
        "accept",
        "accept-language",
        "api-key",
        "authorization",
        "cache-control",
        "content-language",
        "content-type",
        "openai-beta",
        "openai-organization",
        "openai-project",
        "user-agent",
        "x-api-key",
        "x-local-only",
        "x-priority",
        "x-request-id",
        "x-requested-with",
    }
)
_SENDABLE_PREFIXES = ("anthropic-", "x-stainless-")
_HEADER_NAME = re.compile(r"[a-z0-9-]{1,64}")
PREFLIGHT_SECONDS = 600
"""For which a browser need not ask again."""


def is_for_answers(path: str) -> bool:
    """Whether it belongs to the API of clients, which other pages may be let into."""
    return path.startswith("/v1/")


class Origins:
    """Judges requests by their Host, Origin and Sec-Fetch-Site."""

    __slots__ = ("_known", "_policy")

    def __init__(self, policy: OriginPolicy) -> None:
        self._policy = policy
        self._known: set[str] = set()  # hosts that were found to be right, as they came

    def adopt(self, policy: OriginPolicy) -> None:
        """Judge by it from now on."""
        self._policy = policy
        self._known.clear()

    def check(self, headers: Mapping[str, str], *, inference: bool) -> None:
        """Raises `WrongHost` and `CrossSite`. `headers`: by names in any case if the mapping ignores it, else
        in lower case. `inference`: pages of this machine and of programs may ask for answers, not more."""
        host = headers.get("host", "")
        if host not in self._known:
            self._check_host(host)
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site")
        if origin is None:
            if site in _CROSS:
                raise _cross_site()
        elif not self._is_welcome(origin, host, inference):
            raise _cross_site()

    def shared(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """What the answer has to say for the page that asked to read it; nothing unless that one is listed.
        `headers`: as for `check`."""
        origin = headers.get("origin")
        if origin is None or origin not in self._policy.origins:
            return _NOTHING
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": READABLE_HEADERS,
            "Vary": "Origin",
        }

    def preflight(self, headers: Mapping[str, str]) -> Mapping[str, str] | None:
        """The head of the answer to a browser that asks what a page may send; None: that page is not listed,
        or it asks no such thing."""
        shared = self.shared(headers)
        if not shared or "access-control-request-method" not in headers:
            return None
        wanted = headers.get("access-control-request-headers", "").lower().split(",")
        names = [name for name in map(str.strip, wanted[:64]) if _is_sendable(name)]
        answer = {
            **shared,
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        }
        if names:
            answer["Access-Control-Allow-Headers"] = ", ".join(names)
        if headers.get("access-control-request-private-network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"
        return answer

    def _check_host(self, host: str) -> None:
        name = _PORT.sub("", host.lower())
        # A name of one word is nobody's on the internet, so no page can have it lead here. An address is
        # no name at all.
        right = (
            name in LOCAL_HOSTS
            or name.endswith(".localhost")
            or _ADDRESS.fullmatch(name) is not None
            or (name != "" and "." not in name and name.isascii())
            or name in self._policy.hosts
        )
        if not right:
            raise WrongHost(
                "This balancer does not know the name that it was called by. Use its address, or add the "
                'name to its settings: "allow_hosts": ["NAME"].'
            )
        if len(self._known) < 256:
            self._known.add(host)

    def _is_welcome(self, origin: str, host: str, inference: bool) -> bool:
        if origin in self._policy.origins:
            return inference or origin.partition("://")[2] == host.lower()
        parts = _ORIGIN.fullmatch(origin.lower())
        if parts is None:
            return False
        scheme, authority = parts.groups()
        if scheme in ("http", "https"):
            return authority == host.lower() or (inference and _PORT.sub("", authority) in LOCAL_HOSTS)
        return inference and scheme in APP_SCHEMES


def _is_sendable(name: str) -> bool:
    if _HEADER_NAME.fullmatch(name) is None:
        return False
    return name in _SENDABLE_HEADERS or name.startswith(_SENDABLE_PREFIXES)


def _cross_site() -> CrossSite:
    return CrossSite(
        "A page of another site sent this request. If that page is yours, add its origin to the settings of "
        'the balancer: "cors_origins": ["https://..."].'
    )
