"""What firewalls' own programs print, as samples have it, and the commands that open a port."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker_agent import firewalls
from worker_agent.findings import Kind, PortRange, kind_of, wifi_ports

SAMPLES = Path(__file__).parent / "firewalls"
TCP, MDNS = (4000, "tcp"), (5353, "udp")


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


def test_ufw_is_read_with_and_without_root():
    seen = firewalls.ufw(sample("ufw_conf_on"), sample("ufw_status_active"))
    assert seen is not None
    assert (seen.lets_in(*TCP), seen.lets_in(*MDNS)) == (True, False)
    assert seen.lets_in(6005, "udp") is True
    assert seen.lets_in(6005, "tcp") is False
    assert seen.lets_in(4100, "tcp") is False, "a rule that denies opens nothing"
    unseen = firewalls.ufw(sample("ufw_conf_on"), "")
    assert unseen is not None
    assert unseen.lets_in(*TCP) is None


def test_ufw_that_lets_a_whole_network_in_lets_everything_in():
    found = firewalls.ufw(sample("ufw_conf_on"), sample("ufw_status_network_allowed"))
    assert found is not None
    assert found.lets_in(*TCP)
    assert found.lets_in(*MDNS)


@pytest.mark.parametrize(("conf", "status"), [("ufw_conf_off", ""), ("ufw_conf_on", "ufw_status_inactive")])
def test_ufw_that_is_off_is_no_firewall(conf, status):
    assert firewalls.ufw(sample(conf), sample(status) if status else "") is None


def test_firewalld_is_read_by_zone_ports_and_services():
    public = firewalls.firewalld("running\n", sample("firewalld_public"))
    assert public is not None
    assert (public.lets_in(*TCP), public.lets_in(*MDNS), public.lets_in(8080, "tcp")) == (False, True, True)
    workstation = firewalls.firewalld("running\n", sample("firewalld_workstation"))
    assert workstation is not None
    assert workstation.lets_in(*TCP)
    assert workstation.lets_in(*MDNS)
    assert firewalls.firewalld("not running\n", "") is None
    silent = firewalls.firewalld("running\n", "")
    assert silent is not None
    assert silent.lets_in(*TCP) is None


def test_nftables_is_a_firewall_where_it_drops_what_comes_in():
    found = firewalls.nftables(sample("nft_drops"))
    assert found is not None
    assert (found.lets_in(*TCP), found.lets_in(*MDNS), found.lets_in(4100, "tcp")) == (True, True, False)
    assert not found.certain
    opened = firewalls.commands(found, [(4100, "tcp")], "")
    assert opened == "sudo nft insert rule inet filter input tcp dport 4100 accept"
    assert firewalls.nftables(sample("nft_docker_only")) is None
    assert firewalls.nftables("") is None


@pytest.mark.parametrize("name", ["macos_12_on", "macos_15_on"])
def test_the_firewall_of_macos_asks_by_program(name):
    found = firewalls.macos(sample(name))
    assert found is not None
    assert found.lets_in(*TCP) is None
    assert "--unblockapp /opt/python" in firewalls.commands(found, [TCP], "/opt/python")


def test_the_firewall_of_macos_may_block_all_or_be_off():
    found = firewalls.macos(sample("macos_15_blocks_all"))
    assert found is not None
    assert found.lets_in(*TCP) is False
    assert firewalls.commands(found, [TCP], "/opt/python").startswith(
        f"sudo {firewalls.SOCKETFILTERFW} --setblockall off && "
    )
    assert firewalls.macos(sample("macos_off")) is None
    assert firewalls.macos("") is None


def test_commands_name_each_port():
    ufw = firewalls.Firewall(firewalls.UFW, ())
    assert firewalls.commands(ufw, [TCP, MDNS], "") == "sudo ufw allow 4000/tcp && sudo ufw allow 5353/udp"
    firewalld = firewalls.Firewall(firewalls.FIREWALLD, (PortRange(1, 2, "tcp"),))
    assert firewalls.commands(firewalld, [TCP], "") == (
        "sudo firewall-cmd --permanent --add-port=4000/tcp && sudo firewall-cmd --reload"
    )


def test_interfaces_are_known_by_their_names():
    assert wifi_ports(sample("macos_hardware_ports")) == {"en1"}
    kinds = {
        "lo": Kind.LOOPBACK, "lo0": Kind.LOOPBACK, "eth0": Kind.CABLE, "enp3s0": Kind.CABLE,
        "wlp2s0": Kind.WIFI, "utun3": Kind.TUNNEL, "wg0": Kind.TUNNEL, "tailscale0": Kind.TUNNEL,
        "ppp0": Kind.TUNNEL, "tun0": Kind.TUNNEL, "docker0": Kind.BRIDGE, "br-3fa9": Kind.BRIDGE,
        "veth12": Kind.BRIDGE, "virbr0": Kind.BRIDGE, "bridge0": Kind.BRIDGE, "awdl0": Kind.BRIDGE,
        "llw0": Kind.BRIDGE,
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds
    assert kind_of("en1", wireless=True) is Kind.WIFI
