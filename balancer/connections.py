"""How many connections there may be: in all, and from one address. For both servers together. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from balancer.core.errors import RequestError
from worker_agent.sources import is_loopback


class TooManyConnections(RequestError):
    """Of one address: its own doing, so others are not kept waiting for it."""

    status, type, code = 429, "rate_limit_error", "too_many_connections"
    retry_after = 1.0


class NoConnectionFree(RequestError):
    """Of all together."""

    status, code = 503, "no_connection_free"
    retry_after = 1.0


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    max_connections: int = 10_000
    max_connections_per_address: int = 200
    """Not of this machine's own programs: a batch or a load generator on it may well need more, and whoever
    runs programs here needs no connections to do harm."""


@dataclass(slots=True)
class Connections:
    """Those that are open now."""

    policy: ConnectionPolicy
    count: int = 0
    _by_address: dict[str, int] = field(default_factory=dict)

    def open(self, address: str) -> None:
        """One more, to be closed with `close`. Raises `TooManyConnections` and `NoConnectionFree`; then it
        is not counted."""
        if self.count >= self.policy.max_connections:
            raise NoConnectionFree("Too many connections are open. Try again in 1 s.")
        mine = self._by_address.get(address, 0)
        if mine >= self.policy.max_connections_per_address and not _is_own(address):
            raise TooManyConnections(
                f"This address has {mine} connections open, which is all that one may have (setting "
                "max_connections_per_address). Use fewer, and use them again."
            )
        self._by_address[address] = mine + 1
        self.count += 1

    def close(self, address: str) -> None:
        mine = self._by_address[address] - 1
        if mine:
            self._by_address[address] = mine
        else:
            del self._by_address[address]  # the table holds no more addresses than there are connections
        self.count -= 1


def _is_own(address: str) -> bool:
    """Of a program on this machine; one at the other end of a Unix socket has no address."""
    return not address or is_loopback(address)
