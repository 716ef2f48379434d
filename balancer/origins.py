"""Which names a request may call this balancer by, and which web pages may send it any. Pure.

A page in somebody's browser can reach what that person's machine can reach. The two ways it has are closed
on every route and for every method: a name of its own that leads to our address (DNS rebinding) is refused
by the Host header, and a request across sites by what browsers say of where it comes from (RELIABILITY D8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Web origins (`https://chat.lab.org`) whose pages may ask."""


LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

APP_SCHEMES = frozenset({"app", "capacitor", "file", "tauri", "vscode-file", "vscode-webview"})
"""Of programs that show pages of their own. No web page can claim one of these."""

_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._:\[\]-]*)")
_PORT = re.compile(r":\d{1,5}$")
_CROSS = ("cross-site", "same-site")


class Origins:
    """Judges requests by their Host, Origin and Sec-Fetch-Site."""

    __slots__ = ("_known", "_policy")

    def __init__(self, policy: OriginPolicy) -> None:
        self._policy = policy
        self._known: set[str] = set()  # hosts that were found to be right, as they came

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
            return True
        parts = _ORIGIN.fullmatch(origin.lower())
        if parts is None:
            return False
        scheme, authority = parts.groups()
        if scheme in ("http", "https"):
            return authority == host.lower() or (inference and _PORT.sub("", authority) in LOCAL_HOSTS)
        return inference and scheme in APP_SCHEMES


def _cross_site() -> CrossSite:
    return CrossSite(
        "A page of another site sent this request. If that page is yours, add its origin to the settings of "
        'the balancer: "allow_origins": ["https://..."].'
    )
