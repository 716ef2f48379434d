from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.sources import Sources, parse_networks


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "::1", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.5"),
        *("169.254.7.7", "fe80::1", "fe80::1%eth0", "fd00::2", "100.64.0.1", "100.127.255.255"),
        *("::ffff:192.168.1.5", "::ffff:127.0.0.1"),
    ],
)
def test_addresses_of_a_room_are_private(address: str) -> None:
    assert Sources().admit(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "8.8.8.8",
            "172.32.0.1",
            "172.15.255.255",
            "192.169.0.1",
            "100.63.255.255",
            "100.128.0.0",
            "11.0.0.1",
        ),
        *(
            "2001:4860:4860::8888",
            "2001:db8::1",
            "192.0.2.2",
            "::ffff:8.8.8.8",
            "0.0.0.0",
            "::",
            "224.0.0.251",
        ),
        *("", "localhost", "10.0.0.1:80", "010.0.0.1", "10.1", "unknown"),
    ],
)
def test_everything_else_is_not(address: str) -> None:
    assert not Sources().admit(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_when_it_comes_mapped_into_ipv6(address: object) -> None:
    assert Sources().admit(f"::ffff:{address}") == Sources().admit(str(address))


@given(st.text(max_size=60))
def test_no_text_breaks_the_judgement(text: str) -> None:
    assert Sources().admit(text) in (True, False)


def test_a_network_that_is_named_is_served_too() -> None:
    sources = Sources(parse_networks("131.1.0.0/16, 2001:db8::/32, 8.8.8.8"))
    assert all(map(sources.admit, ("131.1.2.3", "::ffff:131.1.2.3", "2001:db8::7", "8.8.8.8", "10.0.0.1")))
    assert not any(map(sources.admit, ("131.2.0.1", "2001:db9::7", "8.8.8.9")))


@pytest.mark.parametrize("text", ["131.1.0.0/33", "nonsense", "131.1.0.0/16,", 7, None, [7.5]])
def test_what_is_no_network_is_named(text: object) -> None:
    with pytest.raises(ValueError, match=r"131\.1\.0\.0/16"):
        parse_networks(text)
