"""What this machine itself is like, to a network doctor: interfaces, firewalls, names. Blocking; asks only
the system and its programs, changes nothing.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from worker_agent import firewalls
from worker_agent.findings import Firewall, Here, Interface, Machine, kind_of, wifi_ports
from worker_agent.hardware import printed_by

ASK_SECONDS = 2.0
"""Of a program of the system."""
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def here() -> Here:
    """This machine as it is now, but for what is heard by multicast. Takes up to some 3 s."""
    with ThreadPoolExecutor(3) as pool:
        about = pool.submit(machine)
        seen = pool.submit(interfaces)
        walls = pool.submit(lambda: tuple(active_firewalls()))
        return Here(about.result(), seen.result(), walls.result())


def machine() -> Machine:
    """Where we run."""
    name = socket.gethostname()
    return Machine(
        system=platform.system(),
        program=os.path.realpath(sys.executable),
        is_wsl="microsoft" in platform.release().lower(),
        is_container=any(file.exists() for file in _CONTAINER_FILES) or "container" in os.environ,
        proxies=proxies(os.environ),
        host_name=name,
        host_addresses=_addresses_of(name),
    )


def proxies(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variables that name one, in capitals or not. Pure."""
    names = (spelled for name in _PROXIES for spelled in (name, name.lower()))
    return tuple(name for name in names if environment.get(name))


def _addresses_of(name: str) -> tuple[str, ...]:
    """As the hosts file has it; a name server is asked for other machines only (`contacts`)."""
    try:
        lines = Path("/etc/hosts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ()
    words = [line.partition("#")[0].split() for line in lines]
    return tuple(dict.fromkeys(line[0] for line in words if name in line[1:]))


def interfaces() -> tuple[Interface, ...]:
    """All of them, loopback too."""
    stats = psutil.net_if_stats()
    wifi = _wifi()
    return tuple(
        Interface(
            name,
            kind_of(name, wireless=name in wifi),
            name in stats and stats[name].isup,
            tuple(
                _with_prefix(entry.address, entry.netmask) for entry in entries if entry.family in _FAMILIES
            ),
            stats[name].mtu if name in stats else 0,
        )
        for name, entries in psutil.net_if_addrs().items()
    )


def _with_prefix(address: str, mask: str | None) -> str:
    plain = address.partition("%")[0]
    if mask is None:
        return str(ipaddress.ip_interface(plain))
    # ipaddress has no constructor from an IPv6 netmask in colon form: count its bits.
    return f"{plain}/{int(ipaddress.ip_address(mask)).bit_count()}"


def _wifi() -> frozenset[str]:
    if sys.platform == "darwin":
        return wifi_ports(printed_by(("networksetup", "-listallhardwareports"), ASK_SECONDS))
    root = Path("/sys/class/net")
    return frozenset(file.parent.name for file in root.glob("*/wireless"))


def active_firewalls() -> Iterator[Firewall]:
    """Those of this machine that are on, as far as this user may see."""
    if sys.platform == "darwin":
        words = (firewalls.SOCKETFILTERFW, "--getglobalstate", "--getblockall")
        found = firewalls.macos(printed_by(words, ASK_SECONDS))
        if found is not None:
            yield found
        return
    known = [one for one in (_ufw(), _firewalld()) if one is not None]
    yield from known
    # Both of them make rules for nftables, which would only be told twice.
    if not known and (found := firewalls.nftables(_printed("nft", "list", "ruleset"))) is not None:
        yield found


def _ufw() -> Firewall | None:
    try:
        conf = Path("/etc/ufw/ufw.conf").read_text("utf-8", "replace")
    except OSError:
        return None
    return firewalls.ufw(conf, _printed("ufw", "status", "verbose"))


def _firewalld() -> Firewall | None:
    state = _printed("firewall-cmd", "--state")
    return firewalls.firewalld(state, _printed("firewall-cmd", "--list-all") if state else "")


def _printed(program: str, *words: str) -> str:
    """They are often not on a user's PATH."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    return "" if path is None else printed_by((path, *words), ASK_SECONDS)
