"""From what was measured to what is wrong and how to mend it: one rule after the other. Pure.

A rule names a cause only where something speaks for it. That nobody is heard may mean that nobody is there;
that a machine answers at its address and is not heard means that multicast does not pass.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from worker_agent import firewalls
from worker_agent.findings import (
    MDNS_PORT,
    Announced,
    Contact,
    Finding,
    Firewall,
    Here,
    Interface,
    KeyFile,
    Kind,
    Known,
    Level,
    OwnPort,
    PortState,
    Proof,
    Who,
    as_host,
    is_overlay,
    own_lan_address,
    parsed,
)

CLOCK_SECONDS = 300.0
"""From here on a difference is told: certificates and keys with a date begin and end by the clock."""
SLOW_SECONDS = 0.05
"""To connect. A room's network takes a millisecond, Wi-Fi a few."""
ETHERNET_MTU = 1500
_WSL_NETWORK = ip_network("172.16.0.0/12")
_LOCAL_NETWORK = (
    "allow this program in System Settings > Privacy & Security > Local Network (a terminal's grant holds for"
    " what is started in it, a launchd agent needs its own), then start it again"
)


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the doctor stands, and what this side relies on."""

    side: Who
    port: int
    """Ours."""
    mdns: bool
    """Whether our settings let us find others by mDNS, and be found."""
    by_address: bool
    """Whether a balancer's address is in our settings, or a worker is in use already."""
    key: KeyFile

    @property
    def others(self) -> str:
        return "balancer" if self.side is Who.WORKER else "worker"


def diagnose(stand: Stand, here: Here, own: OwnPort, contacts: Sequence[Contact]) -> tuple[Finding, ...]:
    """All findings, this machine's before those of others."""
    return (
        *machine(here),
        *interfaces(here),
        *own_port(stand, own),
        *key(stand),
        *open_ports(stand, here),
        *multicast(stand, here, contacts),
        *clusters(stand, here),
        *others(stand, here, contacts),
    )


# This machine ...


def machine(here: Here) -> Iterator[Finding]:
    """Where it runs, and what its surroundings do to that."""
    told = here.machine
    addresses = [ip_address(one) for interface in here.lan for one in interface.ipv4]
    if told.is_wsl and all(one in _WSL_NETWORK for one in addresses):
        yield Finding(
            "machine",
            Level.WARNING,
            "this is WSL2 behind Windows' own address: other machines reach neither its ports nor its mDNS",
            'set "networkingMode=mirrored" under [wsl2] in %UserProfile%\\.wslconfig, then `wsl --shutdown`;'
            ' or let the agent open the connections: "dial_out": true and "balancers" in its settings',
        )
    elif told.is_container:
        yield Finding(
            "machine",
            Level.NOTE,
            "this is a container: unless it shares its host's network, other machines reach only the ports"
            " that are published, and no mDNS",
            "start it with `--network host`; or publish the port and join by address; or let the agent open"
            ' the connections: "dial_out": true and "balancers" in its settings',
        )
    if told.proxies:
        yield Finding(
            "machine",
            Level.NOTE,
            f"{', '.join(told.proxies)} is set: balancer and agents do not use it, but curl and the SDKs do",
            "give clients the exception NO_PROXY with the balancer's address",
        )
    yield from _host_name(here)


def _host_name(here: Here) -> Iterator[Finding]:
    name, addresses = here.machine.host_name, here.machine.host_addresses
    found = [parsed(one) for one in addresses]
    if addresses and all(one is not None and one.is_loopback for one in found):
        yield Finding(
            "machine",
            Level.NOTE,
            f"its own name {name} leads to loopback here ({', '.join(addresses)}), as Debian and Ubuntu set"
            " it up: addresses are told to others, not this name",
        )


def interfaces(here: Here) -> Iterator[Finding]:
    """What there is to be reached by."""
    lan = [one for one in here.lan if one.addresses]
    if not lan:
        yield Finding(
            "network",
            Level.FAULT,
            "no interface towards other machines is up",
            "plug in a cable or join a Wi-Fi; `ip address` (macOS: `ifconfig`) shows the interfaces",
        )
        return
    shown = "; ".join(
        f"{one.name} ({one.kind.value}) {', '.join(one.ipv4 or one.global_ipv6) or 'link-local IPv6 only'}"
        for one in lan
    )
    yield Finding("network", Level.OK, shown)
    yield from _without_usual_addresses(lan)
    yield from _in_one_network(lan)
    for one in lan:
        if one.mtu > ETHERNET_MTU:
            yield Finding(
                "network",
                Level.NOTE,
                f"{one.name} sends packets of {one.mtu} bytes: where a switch or a machine on the way does"
                " not take them, short requests work and long ones hang",
                f"`sudo ip link set {one.name} mtu {ETHERNET_MTU}`, if that is what you see",
            )
    tunnels = [one.name for one in here.interfaces if one.is_up and one.kind is Kind.TUNNEL and one.addresses]
    if tunnels:
        yield Finding(
            "network",
            Level.NOTE,
            f"a VPN is up ({', '.join(tunnels)}); whether it takes the way to others is told with each below",
        )


def _without_usual_addresses(lan: Sequence[Interface]) -> Iterator[Finding]:
    ipv4 = [ip_address(one) for interface in lan for one in interface.ipv4]
    if not ipv4:
        yield Finding(
            "network",
            Level.WARNING,
            "there is no IPv4 address, and by default balancer and agents listen on IPv4",
            "start both with `--host ::`",
        )
    elif all(one.is_link_local for one in ipv4):
        yield Finding(
            "network",
            Level.WARNING,
            f"the only IPv4 address is {ipv4[0]}: no DHCP server gave one, so only machines on the same cable"
            " with such an address are reached",
            "look at the cable and the router; or give the machines fixed addresses of one network",
        )


def _in_one_network(lan: Sequence[Interface]) -> Iterator[Finding]:
    for number, one in enumerate(lan):
        for other in lan[number + 1 :]:
            if any(one.holds(address) for address in other.ipv4):
                yield Finding(
                    "network",
                    Level.NOTE,
                    f"{one.name} and {other.name} are in the same network: answers may leave by the other",
                    f"switch one off (Wi-Fi, where there is a cable) if connections to {one.name} hang",
                )


def own_port(stand: Stand, own: OwnPort) -> Iterator[Finding]:
    """Whether we listen, and where."""
    what = "agent" if stand.side is Who.WORKER else "balancer"
    start = "worker-agent run" if stand.side is Who.WORKER else "balancer up"
    strangers = [address for address, state in own.states.items() if state is PortState.STRANGER]
    ours = [address for address, state in own.states.items() if state is PortState.OURS]
    closed = [address for address, state in own.states.items() if state is PortState.CLOSED]
    if strangers:
        program = f" ({own.program})" if own.program else ""
        yield Finding(
            "port",
            Level.FAULT,
            f"another program{program} answers on port {own.number} at {', '.join(strangers)}, not this"
            f" {what}",
            f"stop it (`sudo lsof -i :{own.number}` says which it is), or choose another port: `{start}"
            f" --port {own.number + 1}`",
        )
    elif not ours:
        yield Finding(
            "port",
            Level.WARNING if stand.side is Who.WORKER else Level.FAULT,
            f"no {what} runs on port {own.number} of this machine",
            f"start it: `{start}`; or name its port here with --port",
        )
    elif beyond := [one for one in closed if not _is_loopback(one)]:
        yield Finding(
            "port",
            Level.FAULT,
            f"the {what} on port {own.number} does not listen at {', '.join(beyond)}: others cannot reach it",
            f"start it with `--host 0.0.0.0`, or `--host ::` for IPv6 too (it listens at {', '.join(ours)})",
        )
    else:
        yield Finding("port", Level.OK, f"the {what} listens on port {own.number} at {', '.join(ours)}")


def _is_loopback(address: str) -> bool:
    found = parsed(address)
    return found is not None and found.is_loopback


def key(stand: Stand) -> Iterator[Finding]:
    """The cluster key on this machine."""
    told = stand.key
    if told.fault:
        yield Finding("cluster key", Level.FAULT, told.fault)
    elif told.tag:
        yield Finding("cluster key", Level.OK, f"there is one, of the cluster {told.tag}")
    elif stand.side is Who.WORKER:
        yield Finding(
            "cluster key",
            Level.WARNING,
            f"this agent has none ({told.path}): it waits until somebody approves it",
            "run the line that `balancer cluster invite` shows on the balancer; or type the code that this"
            " agent shows there: `balancer workers approve ID CODE`",
        )
    else:
        yield Finding(
            "cluster key",
            Level.WARNING,
            f"there is none yet ({told.path}): it is made when the balancer starts",
            "start it: `balancer up`",
        )


def open_ports(stand: Stand, here: Here) -> Iterator[Finding]:
    """What the firewalls of this machine let in."""
    wanted = [(stand.port, "tcp"), *([(MDNS_PORT, "udp")] if stand.mdns else [])]
    for firewall in here.firewalls:
        closed = [one for one in wanted if firewall.lets_in(*one) is False]
        unseen = [one for one in wanted if firewall.lets_in(*one) is None]
        if closed:
            yield _closed(firewall, closed, here, is_ours=(stand.port, "tcp") in closed)
        elif unseen:
            yield Finding(
                "firewall",
                Level.NOTE,
                f"{firewall.name} is on, and what it lets in is not to be seen"
                + ("" if firewall.name == firewalls.MACOS else " without root"),
                f"if others do not reach this machine: {_open(firewall, unseen, here)}",
            )
        else:
            yield Finding("firewall", Level.OK, f"{firewall.name} is on, and lets in what is needed")


def _closed(firewall: Firewall, closed: Sequence[tuple[int, str]], here: Here, *, is_ours: bool) -> Finding:
    ports = " and ".join(f"{port}/{protocol}" for port, protocol in closed)
    return Finding(
        "firewall",
        Level.FAULT if is_ours and firewall.certain else Level.WARNING,
        f"{firewall.name} is on and {'lets' if firewall.certain else 'seems to let'} nobody in at {ports}",
        _open(firewall, closed, here),
    )


def _open(firewall: Firewall, ports: Sequence[tuple[int, str]], here: Here) -> str:
    return f"`{firewalls.commands(firewall, ports, here.machine.program)}`"


# Multicast ...


def multicast(stand: Stand, here: Here, contacts: Sequence[Contact]) -> Iterator[Finding]:
    """Whether mDNS leaves this machine and comes in."""
    told = here.multicast
    relies = stand.mdns and not stand.by_address
    serious = Level.FAULT if relies else Level.WARNING
    if not stand.mdns:
        yield Finding(
            "multicast",
            Level.NOTE,
            f"mDNS is switched off in the settings: each {stand.others} has to be named by its address",
        )
    if told.deaf:
        yield Finding(
            "multicast",
            serious,
            f"nothing can be heard on port {MDNS_PORT}: {told.deaf}",
            f"let the program that holds the port share it, or join by address: `{_join(stand, here)}`",
        )
        return
    failed = [one for one in told.sent if one.error]
    for one in failed:
        yield _not_sent(stand, here, one.interface, one.error, serious)
    if not told.heard:
        if not failed:
            yield _nobody_heard(stand, here, contacts, serious)
        return
    for interface in dict.fromkeys(name for name, _ in told.heard):
        addresses = dict.fromkeys(address for name, address in told.heard if name == interface)
        yield Finding(
            "multicast", Level.OK, f"mDNS of {len(addresses)} other machine(s) is heard on {interface}"
        )
    yield from _some_not_heard(stand, here, contacts)


def _not_sent(stand: Stand, here: Here, interface: str, error: str, serious: Level) -> Finding:
    sentence = f"multicast cannot be sent on {interface} ({error})"
    if here.machine.system == "Darwin" and error in ("EHOSTUNREACH", "EPERM", "EACCES"):
        return Finding(
            "multicast",
            serious,
            f"{sentence}: macOS keeps this program from the local network",
            _LOCAL_NETWORK,
        )
    if error in ("EPERM", "EACCES"):
        return Finding(
            "multicast",
            serious,
            f"{sentence}: a firewall of this machine forbids it",
            f"let UDP to 224.0.0.251 port {MDNS_PORT} out, or join by address: `{_join(stand, here)}`",
        )
    if error in ("ENETUNREACH", "EHOSTUNREACH", "ENODEV"):
        return Finding(
            "multicast",
            serious,
            f"{sentence}: there is no route for it",
            f"`sudo ip route add 224.0.0.0/4 dev {interface}`, or join by address: `{_join(stand, here)}`",
        )
    return Finding("multicast", serious, sentence, f"join by address: `{_join(stand, here)}`")


def _nobody_heard(stand: Stand, here: Here, contacts: Sequence[Contact], serious: Level) -> Finding:
    near = _near(here, contacts)
    if near:
        return Finding(
            "multicast",
            serious,
            f"{_names(near)} can be reached by address, but no mDNS of any other machine was heard in"
            f" {here.multicast.seconds:g} s: multicast does not pass between this machine and others"
            " (isolation of the Wi-Fi or VLAN, a guest network, a switch, a firewall)",
            f"{_where(stand)}: `{_join(stand, here, near[0])}`; or allow multicast between clients in the"
            " access point's settings",
        )
    return Finding(
        "multicast",
        Level.WARNING,
        f"no mDNS of any other machine was heard in {here.multicast.seconds:g} s: there is none, or multicast"
        " does not pass (isolation of the Wi-Fi or VLAN, a guest network)",
        f"{_where(stand)}: `{_join(stand, here)}`",
    )


def _some_not_heard(stand: Stand, here: Here, contacts: Sequence[Contact]) -> Iterator[Finding]:
    """Of a network where mDNS works otherwise."""
    if silent := _near(here, contacts):
        yield Finding(
            "multicast",
            Level.WARNING,
            f"{_names(silent)} can be reached by address, but is not heard, though others are: mDNS is"
            " switched off there, or blocked for it alone",
            f"{_where(stand)}: `{_join(stand, here, silent[0])}`; and run the doctor there",
        )


def _near(here: Here, contacts: Sequence[Contact]) -> list[Contact]:
    """Reached in a network of our own, where mDNS should pass, and not heard."""
    heard = {address for _, address in here.multicast.heard}
    sources = {one.source for one in here.multicast.announced}
    return [
        one
        for one in contacts
        if one.is_reached
        and one.announces
        and not here.is_own(one.peer)
        and not heard.union(sources).intersection((one.peer, *one.addresses))
        and any(interface.holds(one.peer) for interface in here.lan)
    ]


def _names(contacts: Sequence[Contact]) -> str:
    return " and ".join(one.name for one in contacts[:3]) + (" and others" if len(contacts) > 3 else "")


def _where(stand: Stand) -> str:
    return "join by address" if stand.side is Who.WORKER else "on the other machine, join by address"


def _join(stand: Stand, here: Here, contact: Contact | None = None) -> str:
    """The command, for this machine or, as a balancer tells it, for another."""
    if stand.side is Who.WORKER:
        return f"worker-agent join {contact.url if contact else 'http://BALANCER:4000'}"
    address = own_lan_address(here.interfaces)
    return f"worker-agent join http://{as_host(address) if address else 'THIS-MACHINE'}:{stand.port}"


# Clusters ...


def clusters(stand: Stand, here: Here) -> Iterator[Finding]:
    """Whether those that are heard belong to ours."""
    told = here.multicast.announced
    for one in told:
        if one.fault:
            yield Finding(
                "cluster",
                Level.WARNING,
                f"{_announced(one)} is heard, but {one.fault}",
                "update the older of the two",
            )
    other = Who.BALANCER if stand.side is Who.WORKER else Who.WORKER
    heard = [one for one in told if one.who is other and not one.fault]
    if stand.side is Who.WORKER:
        yield from _balancers_heard(stand, heard)
    else:
        yield from _workers_heard(stand, heard)


def _balancers_heard(stand: Stand, heard: Sequence[Announced]) -> Iterator[Finding]:
    if not stand.key.tag or not heard:
        return
    strangers = [one for one in heard if one.tag != stand.key.tag]
    lone = len(strangers) == len(heard)
    for one in strangers:
        yield Finding(
            "cluster",
            Level.FAULT if lone and not stand.by_address else Level.NOTE,
            f"{_announced(one)} belongs to another cluster, or its key was changed: it is not joined",
            "if it is yours: run the line that `balancer cluster invite` shows there on this machine",
        )


def _workers_heard(stand: Stand, heard: Sequence[Announced]) -> Iterator[Finding]:
    for one in heard:
        if not one.tag:
            yield Finding(
                "cluster",
                Level.WARNING,
                f"{_announced(one)} has no cluster key yet: it waits for approval",
                f"type the code that it shows: `balancer workers approve {one.id} CODE`",
            )
        elif stand.key.tag and one.tag != stand.key.tag:
            yield Finding(
                "cluster",
                Level.WARNING,
                f"{_announced(one)} holds the key of another cluster, or one that was changed since",
                "if it is yours: run the line that `balancer cluster invite` shows on that machine",
            )


def _announced(one: Announced) -> str:
    return f"the {one.who.value} {one.id} at {one.source}"


# Others ...


def others(stand: Stand, here: Here, contacts: Sequence[Contact]) -> Iterator[Finding]:
    """Each machine that is known, and how it went to reach it."""
    if not contacts and not stand.by_address:
        yield Finding(
            stand.others,
            Level.FAULT,
            f"no {stand.others} is known: none is named" + (", and none was heard" if stand.mdns else ""),
            f"start one there, then {_where(stand)}: `{_join(stand, here)}`",
        )
    for contact in contacts:
        yield from contact_findings(stand, here, contact)


def contact_findings(stand: Stand, here: Here, contact: Contact) -> Iterator[Finding]:
    """Of one other machine: what hinders, else that it is well."""
    area = f"{contact.who.value} {contact.name}"
    if not contact.addresses:
        yield Finding(area, Level.FAULT, *_no_address(contact))
        return
    if contact.error:
        yield Finding(area, Level.FAULT, *_no_connection(stand, here, contact))
        yield from _way(here, area, contact)
        return
    hindrance = _hindrance(stand, contact)
    if hindrance is not None:
        yield Finding(area, *hindrance)
    else:
        yield Finding(area, Level.OK, _well(contact))
    yield from _way(here, area, contact)
    yield from _times(area, contact)


def _no_address(contact: Contact) -> tuple[str, str]:
    fix = "name it by its address"
    if contact.host.endswith(".local"):
        fix += "; names in .local are looked up by mDNS, which on Linux needs the package libnss-mdns"
    return f"the name {contact.host} leads to no address here", fix


def _no_connection(stand: Stand, here: Here, contact: Contact) -> tuple[str, str]:
    at = f"{contact.peer or contact.host} port {contact.port}"
    is_near = any(interface.holds(contact.peer) for interface in here.interfaces)
    program = "worker-agent run" if contact.who is Who.WORKER else "balancer up"
    opened = f"`sudo ufw allow {contact.port}/tcp`, or as `doctor` says there"
    if contact.error == "ECONNREFUSED":
        return (
            f"the machine answers, but nothing listens at {at}",
            f"start it there: `{program}`; it may have another port, or listen on loopback only (--host)",
        )
    if here.machine.system == "Darwin" and contact.error == "EHOSTUNREACH" and is_near:
        return f"macOS says that there is no way to {at}, which is in this machine's network", _LOCAL_NETWORK
    if contact.error in ("EPERM", "EACCES"):
        return (
            f"this machine's own firewall forbids to connect to {at}",
            f"let TCP to port {contact.port} out",
        )
    if contact.known is Known.HEARD:
        return (
            f"it is heard by mDNS, but {at} does not answer ({contact.error}): a firewall there drops what"
            " comes",
            f"open the port on that machine: {opened}",
        )
    if is_near:
        return (
            f"{at} does not answer ({contact.error}): the machine is off, asleep or has another address now,"
            " a firewall there drops what comes, or the Wi-Fi keeps its clients apart",
            f"look whether it is on; open the port there: {opened}",
        )
    return (
        f"{at} does not answer ({contact.error}), and it is in none of this machine's networks: a router, a"
        " VLAN or a VPN is in between",
        f"have the router let TCP to port {contact.port} through; or let the agent open the connections:"
        ' "dial_out": true and "balancers" in its settings',
    )


def _hindrance(stand: Stand, contact: Contact) -> tuple[Level, str, str] | None:
    """What is wrong although there is a connection."""
    if contact.refused:
        return (
            Level.FAULT,
            f"it does not serve this machine's address {contact.source}: {contact.said}",
            'name this network under "allow_networks" in its settings',
        )
    if not contact.speaks:
        return (
            Level.FAULT,
            f"something answers at port {contact.port}, but not as a {contact.who.value} does:"
            f" {contact.said}",
            "give the right port; or update the older of the two",
        )
    if contact.is_other_certificate:
        return (
            Level.FAULT,
            "it shows another certificate than the one that it was met with: its data folder was emptied, or"
            " another machine has taken its name",
            f"if it is yours: `balancer cluster forget {contact.name}`, and it is met anew",
        )
    if contact.proof is Proof.WRONG:
        return (
            Level.FAULT,
            f"it holds another cluster key than this balancer: {contact.said or 'the proof was refused'}",
            "run the line that `balancer cluster invite` shows on that machine",
        )
    if contact.by_code:
        return (
            Level.WARNING,
            "it has no cluster key yet, and waits for approval",
            f"type the code that it shows: `balancer workers approve {contact.name} CODE`",
        )
    if contact.listed is False:
        return (
            Level.FAULT,
            "it answers, but does not list this machine's agent: it has not heard of it, could not reach it,"
            " or they hold different keys",
            f"`worker-agent join {contact.url}`; the balancer's log and `balancer doctor` there say the rest",
        )
    if contact.state not in ("", "ready"):
        return Level.WARNING, f"it is {contact.state}: {contact.detail or 'no reason is told'}", _look(stand)
    return None


def _look(stand: Stand) -> str:
    return "" if stand.side is Who.WORKER else "run `worker-agent doctor --network` there"


def _well(contact: Contact) -> str:
    words = [f"answers at {contact.peer} port {contact.port}"]
    if contact.proof is Proof.RIGHT:
        words.append("has the cluster's key")
    if contact.listed:
        words.append("lists this machine's agent")
    if contact.state:
        words.append(f"is {contact.state}")
    if contact.connect_seconds:
        least, median = min(contact.connect_seconds), statistics.median(contact.connect_seconds)
        words.append(f"connects in {least * 1000:.1f} ms at best, {median * 1000:.1f} ms in the middle")
    return ", ".join(words)


def _way(here: Here, area: str, contact: Contact) -> Iterator[Finding]:
    """Whether a VPN takes what should go over the LAN."""
    interface = here.interface_of(contact.source) if contact.source else None
    if interface is None or interface.kind is not Kind.TUNNEL or is_overlay(contact.peer):
        return
    if any(one.holds(contact.peer) for one in here.lan):
        yield Finding(
            area,
            Level.WARNING,
            f"the way to {contact.peer} goes through the VPN {interface.name}, though it is in this machine's"
            " own network",
            "allow access to the local network in the VPN's settings (split tunnel), or end the VPN",
        )
    else:
        yield Finding(area, Level.NOTE, f"the way to {contact.peer} goes through the VPN {interface.name}")


def _times(area: str, contact: Contact) -> Iterator[Finding]:
    if contact.connect_seconds and statistics.median(contact.connect_seconds) > SLOW_SECONDS:
        milliseconds = statistics.median(contact.connect_seconds) * 1000
        yield Finding(
            area,
            Level.NOTE,
            f"connecting takes {milliseconds:.0f} ms: it is far away, on weak Wi-Fi, or busy",
            "use a cable where you can",
        )
    ahead = contact.clock_ahead_seconds
    if ahead is not None and abs(ahead) > CLOCK_SECONDS:
        yield Finding(
            area,
            Level.WARNING,
            f"its clock is {abs(ahead) / 60:.0f} minutes {'ahead of' if ahead > 0 else 'behind'} this one's:"
            " certificates and keys with a date may not be valid yet, or no more (routing goes by no clock)",
            "set both by NTP: `sudo timedatectl set-ntp true`, or Date & Time in the System Settings",
        )
