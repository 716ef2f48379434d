"""What the network doctor reads of the machine that the tests run on."""

from __future__ import annotations

from ipaddress import ip_interface

from worker_agent import multicast, surroundings
from worker_agent.findings import Interface, Kind


def test_this_machine_is_read_whole():
    here = surroundings.here()
    loopback = [one for one in here.interfaces if one.kind is Kind.LOOPBACK]
    assert [one.is_up for one in loopback] == [True]
    assert "127.0.0.1/8" in loopback[0].addresses
    for interface in here.interfaces:
        for address in interface.addresses:
            assert str(ip_interface(address)) == address
    assert here.is_own("127.0.0.1")
    assert not here.is_own("192.0.2.77")
    assert here.machine.system in ("Linux", "Darwin")


def test_proxies_are_told_as_they_are_spelled():
    environment = {"http_proxy": "http://10.0.0.1:3128", "HTTPS_PROXY": "", "PATH": "/bin"}
    assert surroundings.proxies(environment) == ("http_proxy",)


def test_an_interface_that_is_gone_sends_nothing_and_says_why():
    gone = Interface("gone0", Kind.CABLE, True, ("192.0.2.77/24",))
    told = multicast.listen((gone,), seconds=0.1)
    assert [(one.interface, bool(one.error)) for one in told.sent] == [("gone0", True)]
    assert told.heard == ()


def test_no_interface_is_nothing_to_ask():
    assert multicast.listen((), seconds=0.1).sent == ()
