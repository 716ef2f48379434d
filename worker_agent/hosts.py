"""Which names a request may call this agent by. Pure.

A web page in somebody's browser can have a name of its own lead to our address (DNS rebinding), and browsers
then take us for a part of that page's site: they send no `Origin` with its GETs. What gives it away is the
name in the Host header (RELIABILITY D8). Balancers call agents by their addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address

_PORT = re.compile(r":\d{1,5}\Z")
_NAME = re.compile(r"[a-z0-9._-]{1,253}\Z")
_KNOWN = 256
"""Of the hosts that were found right; a balancer says the same each time."""


def own_names(hostname: str) -> frozenset[str]:
    """What a machine with this host name (`socket.gethostname`) is called: `Studio.lan` is `studio.lan`,
    `studio` and `studio.local`."""
    whole = hostname.lower().rstrip(".")
    short = whole.partition(".")[0]
    return frozenset({whole, short, f"{short}.local"}) if short else frozenset()


class Hosts:
    """Judges the Host headers of requests."""

    __slots__ = ("_known", "_names")

    def __init__(self, names: Iterable[str]) -> None:
        """`names` without ports, in any case: the machine's own (`own_names`), and what else was allowed."""
        self._names = frozenset(name.lower().rstrip(".") for name in names)
        self._known: set[str] = set()

    def admit(self, host: str | None) -> bool:
        """Whether this Host header leads to us and nobody else: an address, `localhost`, a name of one word,
        or one of ours. False for none, and for what is no host at all."""
        if host is None:
            return False
        if host not in self._known:
            if not self._is_right(host.lower()):
                return False
            if len(self._known) < _KNOWN:
                self._known.add(host)
        return True

    def _is_right(self, host: str) -> bool:
        name = _PORT.sub("", host)
        if name.startswith("[") and name.endswith("]"):
            return _is_address(name[1:-1], version=6)
        if _NAME.match(name) is None:
            return False
        name = name.removesuffix(".")
        if _is_address(name, version=4):
            return True
        # A name of one word is nobody's on the internet, so no page can have it lead here. One that ends like
        # an address is none, but some programs read it as one (RFC 3986, 7.4: `2130706433`, `127.1`).
        label = name.rpartition(".")[2]
        if not label or label.isdigit() or re.match(r"0x[0-9a-f]*\Z", label):
            return False
        return "." not in name or name.endswith(".localhost") or name in self._names


def _is_address(text: str, *, version: int) -> bool:
    try:
        return ip_address(text).version == version
    except ValueError:
        return False
