"""Firewalls: which are on, what they let in, and the commands that open a port. Pure: texts in, values out.

Each function reads what the firewall's own program prints, as samples under `tests/agent/firewalls` have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from worker_agent.findings import MDNS_PORT, Firewall, PortRange

UFW, FIREWALLD, NFTABLES, MACOS = "ufw", "firewalld", "nftables", "macOS firewall"
SOCKETFILTERFW = "/usr/libexec/ApplicationFirewall/socketfilterfw"

_SERVICES = {"mdns": PortRange(MDNS_PORT, MDNS_PORT, "udp")}
"""Of firewalld's services, those that matter to us."""


def ufw(conf: str, status: str) -> Firewall | None:
    """`conf`: /etc/ufw/ufw.conf, which everybody may read. `status`: `ufw status verbose`, which only root
    gets."""
    if "Status: inactive" in status or re.search(r"^Default: allow \(incoming\)", status, re.MULTILINE):
        return None
    if "Status: active" in status:
        return Firewall(UFW, tuple(_ufw_rules(status)))
    enabled = re.search(r"^\s*ENABLED\s*=\s*yes\s*$", conf, re.MULTILINE | re.IGNORECASE)
    return Firewall(UFW) if enabled else None


def _ufw_rules(status: str) -> Iterator[PortRange]:
    rule = re.compile(r"^(\S+)(?: \(v6\))?(?: on \S+)?\s+(?:ALLOW|LIMIT)(?: IN)?\s")
    for line in status.splitlines():
        found = rule.match(line)
        if found is None:
            continue
        if found[1] == "Anywhere":  # whatever comes from a network that is named behind it
            yield PortRange(0, 65535, "")
            continue
        ports, _, protocol = found[1].partition("/")
        for port in ports.split(","):
            yield from _port_range(port.replace(":", "-"), protocol)


def firewalld(state: str, zone: str) -> Firewall | None:
    """`state`: `firewall-cmd --state`. `zone`: `firewall-cmd --list-all`; empty where that is not told."""
    if state.strip() != "running":
        return None
    if not zone.strip():
        return Firewall(FIREWALLD)
    told = {
        name.strip(): rest.split()
        for name, colon, rest in (line.partition(":") for line in zone.splitlines())
        if colon
    }
    if told.get("target") == ["ACCEPT"]:
        return None
    ports = [
        one
        for word in told.get("ports", [])
        for one in _port_range(word.partition("/")[0], word.partition("/")[2])
    ]
    services = [_SERVICES[name] for name in told.get("services", []) if name in _SERVICES]
    return Firewall(FIREWALLD, (*ports, *services))


def nftables(ruleset: str) -> Firewall | None:
    """`nft list ruleset`, which only root gets: the first chain for what comes in that drops by default. Its
    rules are read as far as they name ports."""
    for table, body in re.findall(r"^table (\S+ \S+) \{\n(.*?)^\}", ruleset, re.MULTILINE | re.DOTALL):
        for chain, rules in re.findall(r"^\tchain (\S+) \{\n(.*?)^\t\}", body, re.MULTILINE | re.DOTALL):
            if re.search(r"type filter hook input .*policy drop;", rules):
                return Firewall(NFTABLES, tuple(_nft_rules(rules)), certain=False, chain=f"{table} {chain}")
    return None


def _nft_rules(rules: str) -> Iterator[PortRange]:
    for protocol, ports in re.findall(r"\b(tcp|udp) dport (\{[^}]*\}|\S+)[^\n]*\baccept", rules):
        for port in ports.strip("{}").split(","):
            yield from _port_range(port.strip(), protocol)


def _port_range(text: str, protocol: str) -> Iterator[PortRange]:
    """Nothing for what is no port: a rule may name a service or an application."""
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    if found is not None:
        yield PortRange(int(found[1]), int(found[2] or found[1]), protocol)
    elif text == "mdns":
        yield _SERVICES["mdns"]


def macos(told: str) -> Firewall | None:
    """`socketfilterfw --getglobalstate --getblockall`, in the wordings of macOS 12 and of 15."""
    state = re.search(r"\(State = (\d)\)", told)
    if state is None or state[1] == "0":
        return None
    blocks = re.search(r"block all (?:ENABLED|state set to enabled)", told, re.IGNORECASE)
    return Firewall(MACOS, blocks_all=state[1] == "2" or blocks is not None)


def commands(firewall: Firewall, ports: Sequence[tuple[int, str]], program: str) -> str:
    """What to type to let these ports in. `program`: the one that listens; macOS asks by program."""
    named = [f"{port}/{protocol}" for port, protocol in ports]
    match firewall.name:
        case "ufw":
            return " && ".join(f"sudo ufw allow {port}" for port in named)
        case "firewalld":
            words = " ".join(f"--add-port={port}" for port in named)
            return f"sudo firewall-cmd --permanent {words} && sudo firewall-cmd --reload"
        case "nftables":
            where = firewall.chain or "inet filter input"
            return " && ".join(
                f"sudo nft insert rule {where} {protocol} dport {port} accept" for port, protocol in ports
            )
    all_off = f"sudo {SOCKETFILTERFW} --setblockall off && " if firewall.blocks_all else ""
    return f"{all_off}sudo {SOCKETFILTERFW} --add {program} && sudo {SOCKETFILTERFW} --unblockapp {program}"
