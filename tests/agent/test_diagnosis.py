"""Each rule of the network doctor: what was measured, what it says, and what it leaves unsaid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from worker_agent.diagnosis import Stand, diagnose
from worker_agent.findings import (
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
    Machine,
    Multicast,
    OwnPort,
    PortRange,
    PortState,
    Proof,
    Sent,
    Who,
    as_json,
    has_fault,
    summary,
)

TAG, OTHER_TAG = "a" * 16, "b" * 16
ETH = Interface("eth0", Kind.CABLE, True, ("10.0.0.5/24", "fe80::5/64"))
WIFI = Interface("wlan0", Kind.WIFI, True, ("10.0.0.6/24",))
VPN = Interface("utun3", Kind.TUNNEL, True, ("10.8.0.2/24",))
LOOPBACK = Interface("lo", Kind.LOOPBACK, True, ("127.0.0.1/8",))
HEARD = Multicast(sent=(Sent("eth0"),), heard=(("eth0", "10.0.0.9"),), seconds=3.5)
SILENT = replace(HEARD, heard=())
HERE = Here(Machine(), (LOOPBACK, ETH), (), HEARD)
AGENT = Stand(Who.WORKER, 4100, mdns=True, by_address=False, key=KeyFile("key", TAG))
BALANCER = Stand(Who.BALANCER, 4000, mdns=True, by_address=False, key=KeyFile("key", TAG))
PORT = OwnPort(4100, {"127.0.0.1": PortState.OURS, "10.0.0.5": PortState.OURS})
THERE = Contact(
    Who.BALANCER,
    "hub",
    "10.0.0.9",
    4000,
    Known.GIVEN,
    addresses=("10.0.0.9",),
    connect_seconds=(0.001,) * 5,
    source="10.0.0.5",
    peer="10.0.0.9",
    speaks=True,
)
STUDIO = replace(THERE, who=Who.WORKER, name="studio", port=4100, proof=Proof.RIGHT, state="ready")


def found(
    stand: Stand = AGENT,
    here: Here = HERE,
    own: OwnPort = PORT,
    contacts: tuple[Contact, ...] = (THERE,),
) -> list[Finding]:
    return [one for one in diagnose(stand, here, own, contacts) if one.level is not Level.OK]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def hearing(multicast: Multicast, *, system: str = "Linux") -> Here:
    return replace(HERE, multicast=multicast, machine=Machine(system=system))


def test_where_all_is_well_nothing_is_found():
    assert found() == []
    assert found(BALANCER, contacts=(STUDIO,)) == []
    assert not has_fault(diagnose(AGENT, HERE, PORT, (THERE,)))


# Multicast.


def test_multicast_that_does_not_pass_is_named_once_the_other_answers_at_its_address():
    one = only(found(here=hearing(SILENT)))
    assert (one.area, one.level) == ("multicast", Level.FAULT)
    assert "multicast does not pass" in one.sentence
    assert "`worker-agent join http://10.0.0.9:4000`" in one.fix


def test_a_balancer_tells_the_other_machine_to_join_by_its_own_address():
    one = only(found(BALANCER, hearing(SILENT), contacts=(replace(STUDIO, known=Known.GIVEN),)))
    assert "`worker-agent join http://10.0.0.5:4000`" in one.fix


def test_multicast_that_nothing_needs_is_no_fault():
    one = only(found(replace(AGENT, by_address=True), hearing(SILENT)))
    assert one.level is Level.WARNING
    assert only(found(replace(AGENT, mdns=False))).level is Level.NOTE


def test_silence_alone_says_nothing_of_its_cause():
    lost = replace(THERE, error="timeout")
    by_area = {one.area: one for one in found(here=hearing(SILENT), contacts=(lost,))}
    assert by_area["multicast"].level is Level.WARNING
    assert "there is none, or" in by_area["multicast"].sentence
    assert by_area["balancer hub"].level is Level.FAULT


@pytest.mark.parametrize(
    "contact",
    [
        replace(THERE, peer="10.0.0.5", addresses=("10.0.0.5",)),
        replace(THERE, peer="127.0.0.1", addresses=("127.0.0.1",)),
        replace(THERE, peer="10.9.0.9", addresses=("10.9.0.9",)),
        replace(THERE, announces=False),
    ],
    ids=["ourselves", "loopback", "another network", "no agent"],
)
def test_who_should_not_be_heard_speaks_for_nothing(contact):
    one = only(found(here=hearing(SILENT), contacts=(contact,)))
    assert one.level is Level.WARNING
    assert "there is none, or" in one.sentence


def test_one_that_is_not_heard_among_others_has_mdns_off_or_blocked():
    heard = replace(HEARD, heard=(("eth0", "10.0.0.77"),))
    one = only(found(here=hearing(heard)))
    assert one.level is Level.WARNING
    assert "hub can be reached by address, but is not heard" in one.sentence


@pytest.mark.parametrize(
    ("system", "error", "says"),
    [
        ("Darwin", "EHOSTUNREACH", "Privacy & Security > Local Network"),
        ("Linux", "EPERM", "let UDP to 224.0.0.251 port 5353 out"),
        ("Linux", "ENETUNREACH", "sudo ip route add 224.0.0.0/4 dev eth0"),
        ("Linux", "EINVAL", "join by address"),
    ],
)
def test_multicast_that_cannot_be_sent_has_its_cause_by_the_error(system, error, says):
    multicast = Multicast(sent=(Sent("eth0", error),), seconds=3.5)
    one = only(found(here=hearing(multicast, system=system)))
    assert one.level is Level.FAULT
    assert error in one.sentence
    assert says in one.fix


def test_a_port_that_another_program_keeps_leaves_us_deaf():
    one = only(found(here=hearing(Multicast(deaf="EADDRINUSE; another program may keep it for itself"))))
    assert "EADDRINUSE" in one.sentence


# This machine.


def test_interfaces_without_usual_addresses():
    def on(*interfaces: Interface) -> list[Finding]:
        return [one for one in found(here=replace(HERE, interfaces=interfaces)) if one.area == "network"]

    assert only(on(LOOPBACK)).level is Level.FAULT
    assert only(on(replace(ETH, is_up=False))).level is Level.FAULT
    assert "`--host ::`" in only(on(replace(ETH, addresses=("2001:db8::5/64", "fe80::5/64")))).fix
    assert "no DHCP server" in only(on(replace(ETH, addresses=("169.254.7.7/16",)))).sentence
    assert "eth0 and wlan0 are in the same network" in only(on(ETH, WIFI)).sentence
    assert "mtu 1500" in only(on(replace(ETH, mtu=9000))).fix
    assert "a VPN is up (utun3)" in only(on(ETH, VPN)).sentence


def test_wsl_and_containers_are_behind_addresses_of_their_own():
    hidden = replace(ETH, addresses=("172.20.1.5/20",))
    wsl = replace(HERE, machine=Machine(is_wsl=True))
    assert "networkingMode=mirrored" in found(here=replace(wsl, interfaces=(hidden,)))[0].fix
    assert found(here=wsl) == [], "mirrored: it has the address of Windows"
    assert "--network host" in only(found(here=replace(HERE, machine=Machine(is_container=True)))).fix


def test_proxies_and_own_names_are_noted():
    noted = only(found(here=replace(HERE, machine=Machine(proxies=("HTTP_PROXY",)))))
    assert (noted.level, "NO_PROXY" in noted.fix) == (Level.NOTE, True)
    debian = Machine(host_name="box", host_addresses=("127.0.1.1",))
    assert only(found(here=replace(HERE, machine=debian))).level is Level.NOTE
    named = Machine(host_name="box", host_addresses=("127.0.1.1", "10.0.0.5"))
    assert found(here=replace(HERE, machine=named)) == []


def test_own_port():
    def at(loopback: PortState, lan: PortState, stand: Stand = AGENT) -> Finding:
        own = OwnPort(4100, {"127.0.0.1": loopback, "10.0.0.5": lan}, "python, process 7")
        return only(found(stand, own=own, contacts=(THERE if stand is AGENT else STUDIO,)))

    ours, closed, stranger = PortState.OURS, PortState.CLOSED, PortState.STRANGER
    assert "--host 0.0.0.0" in at(ours, closed).fix
    assert "another program (python, process 7) answers on port 4100" in at(stranger, stranger).sentence
    assert at(closed, closed).level is Level.WARNING
    assert at(closed, closed, BALANCER).level is Level.FAULT
    bound = OwnPort(4100, {"10.0.0.5": ours})
    assert found(own=bound) == []


def test_the_cluster_key():
    assert "balancer workers approve ID CODE" in only(found(replace(AGENT, key=KeyFile("key")))).fix
    assert "`balancer up`" in only(found(replace(BALANCER, key=KeyFile("key")), contacts=(STUDIO,))).fix
    broken = only(found(replace(AGENT, key=KeyFile("key", fault="key may be known to others: ..."))))
    assert (broken.level, broken.sentence) == (Level.FAULT, "key may be known to others: ...")


def test_firewalls_with_the_command_that_opens_them():
    def behind(firewall: Firewall) -> list[Finding]:
        return found(here=replace(HERE, firewalls=(firewall,)))

    ours, mdns = PortRange(4100, 4100, "tcp"), PortRange(5353, 5353, "udp")
    assert behind(Firewall("ufw", (ours, mdns))) == []
    closed = only(behind(Firewall("ufw", (mdns,))))
    assert closed.level is Level.FAULT
    assert closed.fix == "`sudo ufw allow 4100/tcp`"
    assert only(behind(Firewall("ufw", (ours,)))).level is Level.WARNING, "to be found is not to be reached"
    assert only(behind(Firewall("nftables", (), certain=False))).level is Level.WARNING
    unseen = only(behind(Firewall("firewalld")))
    assert (unseen.level, "without root" in unseen.sentence) == (Level.NOTE, True)
    assert "--setblockall off" in only(behind(Firewall("macOS firewall", blocks_all=True))).fix


# Clusters.


def announced(who: Who, tag: str = TAG, fault: str = "") -> Here:
    one = Announced(who, "x", "10.0.0.9", 4000, tag, fault)
    return hearing(replace(HEARD, announced=(one,)))


def test_another_clusters_balancer_is_a_fault_only_where_there_is_no_other():
    assert found(here=announced(Who.BALANCER)) == []
    alone = only(found(here=announced(Who.BALANCER, OTHER_TAG)))
    assert (alone.level, "balancer cluster invite" in alone.fix) == (Level.FAULT, True)
    assert (
        only(found(replace(AGENT, by_address=True), announced(Who.BALANCER, OTHER_TAG))).level is Level.NOTE
    )


def test_a_balancer_tells_agents_without_its_key():
    assert found(BALANCER, announced(Who.WORKER), contacts=(STUDIO,)) == []
    waiting = only(found(BALANCER, announced(Who.WORKER, ""), contacts=(STUDIO,)))
    assert "`balancer workers approve x CODE`" in waiting.fix
    assert only(found(BALANCER, announced(Who.WORKER, OTHER_TAG), contacts=(STUDIO,))).level is Level.WARNING
    assert only(found(here=announced(Who.BALANCER, fault="its record speaks wire version 1"))).fix == (
        "update the older of the two"
    )


# Others.


def test_nobody_known_is_a_fault():
    one = only(found(contacts=()))
    assert (one.area, one.level) == ("balancer", Level.FAULT)
    assert found(replace(BALANCER, by_address=True), contacts=()) == [], "they come by tunnels"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"addresses": (), "host": "hub.local"}, "libnss-mdns"),
        ({"addresses": (), "host": "hub"}, "name it by its address"),
        ({"error": "ECONNREFUSED"}, "start it there: `balancer up`"),
        ({"error": "timeout"}, "look whether it is on"),
        ({"error": "timeout", "known": Known.HEARD}, "open the port on that machine"),
        ({"error": "timeout", "peer": "10.9.0.9"}, '"dial_out": true'),
        ({"error": "EPERM"}, "let TCP to port 4000 out"),
        ({"refused": True, "speaks": False, "said": "not from here"}, '"allow_networks"'),
        ({"speaks": False, "said": "status 404"}, "give the right port"),
        ({"listed": False}, "`worker-agent join http://10.0.0.9:4000`"),
    ],
)
def test_what_keeps_a_balancer_away(change, says):
    one = only(found(contacts=(replace(THERE, **change),)))
    assert (one.area, one.level) == ("balancer hub", Level.FAULT)
    assert says in one.fix


def test_macos_denies_the_local_network_by_saying_that_there_is_no_way():
    contact = replace(THERE, error="EHOSTUNREACH")
    assert "Local Network" in only(found(here=hearing(HEARD, system="Darwin"), contacts=(contact,))).fix
    assert "Local Network" not in only(found(contacts=(contact,))).fix


@pytest.mark.parametrize(
    ("change", "level", "says"),
    [
        ({"proof": Proof.WRONG}, Level.FAULT, "`balancer cluster invite`"),
        ({"is_other_certificate": True}, Level.FAULT, "`balancer cluster forget studio`"),
        ({"by_code": True}, Level.WARNING, "`balancer workers approve studio CODE`"),
        ({"state": "failed", "detail": "no memory"}, Level.WARNING, "worker-agent doctor"),
    ],
)
def test_what_keeps_a_worker_out(change, level, says):
    one = only(found(BALANCER, contacts=(replace(STUDIO, **change),)))
    assert one.level is level
    assert says in one.fix


def test_a_vpn_that_takes_the_way_to_our_own_network():
    here = replace(HERE, interfaces=(LOOPBACK, ETH, VPN))
    taken = [
        one
        for one in found(here=here, contacts=(replace(THERE, source="10.8.0.2"),))
        if one.area != "network"
    ]
    assert only(taken).level is Level.WARNING
    assert "split tunnel" in only(taken).fix
    far = replace(THERE, source="10.8.0.2", peer="10.30.0.9", addresses=("10.30.0.9",))
    assert [one.level for one in found(here=here, contacts=(far,)) if one.area != "network"] == [Level.NOTE]
    overlay = replace(far, peer="100.101.1.9", addresses=("100.101.1.9",))
    assert [one for one in found(here=here, contacts=(overlay,)) if one.area != "network"] == []


def test_clocks_and_slow_ways():
    late = only(found(contacts=(replace(THERE, clock_ahead_seconds=-3600.0),)))
    assert "its clock is 60 minutes behind this one's" in late.sentence
    assert found(contacts=(replace(THERE, clock_ahead_seconds=200.0),)) == []
    slow = only(found(contacts=(replace(THERE, connect_seconds=(0.01, 0.2, 0.3)),)))
    assert slow.level is Level.NOTE


# What is told.


def test_what_programs_read():
    told = as_json(diagnose(AGENT, hearing(SILENT), PORT, (THERE,)))
    assert told["ok"] is False
    assert {frozenset(one) for one in told["findings"]} == {frozenset({"area", "level", "sentence", "fix"})}
    assert summary(found(here=hearing(SILENT))) == "1 fault"
    assert summary([]) == "nothing is wrong"
