"""Where a balancer is reached: from this machine, and from others."""

from __future__ import annotations

import errno
import ipaddress
import shlex
import socket

import psutil

from worker_agent import sources


def own_url(host: str, port: int, *, tls: bool = False) -> str:
    """Where a balancer that listens on this host is reached from its own machine."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"{'https' if tls else 'http'}://{_in_url(host)}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a balancer that listens there can be reached from this machine only."""
    return host == "localhost" or sources.is_loopback(host)


def lan_addresses(host: str) -> tuple[str, ...]:
    """Where others reach a balancer that listens on this host: that one, or all IPv4 addresses of this
    machine's running interfaces."""
    if host not in ("0.0.0.0", "::", ""):
        return (host,)
    running = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in running and not name.startswith(("docker", "br-", "veth"))
        for address in addresses
        if _is_lan(address.address)
    ]
    return tuple(dict.fromkeys(found))


MAX_PLACES = 4
"""That an invitation names; its line is to be copied."""


def places(host: str, port: int, *, tls: bool = False) -> tuple[str, ...]:
    """The same as an invitation has them: `192.168.1.10:4000`, under TLS with `https://` before it."""
    scheme = "https://" if tls else ""
    return tuple(f"{scheme}{_in_url(one)}:{port}" for one in lan_addresses(host)[:MAX_PLACES])


def join_line(invitation: str) -> str:
    """What makes another machine a worker, typed there in a checkout of this project."""
    return f"pip install uv && uv run worker-agent join {shlex.quote(invitation)}"


def cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> str:
    """A sentence for the terminal, with what to change: the address or the port."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = error.strerror or reason
    # A name that is no name at all fails when it is put into the letters of DNS.
    if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
        advice = "Give an address or a name of this machine with --host, or 0.0.0.0 for all of its own."
    else:
        advice = "Choose another port with --port."
    return f"cannot listen on {host}:{port}: {reason}. {advice}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_lan(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local)
