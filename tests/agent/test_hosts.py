"""By which names an agent may be called: rebinding of DNS names finds it deaf."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.hosts import Hosts, own_names

HOSTS = Hosts([*own_names("Studio.lan"), "LLM.lab.example"])


@pytest.mark.parametrize(
    "host",
    [
        *(
            "192.168.1.7:4100",
            "127.0.0.1",
            "8.8.8.8:80",
            "[::1]:4100",
            "[fe80::1]",
            "[fe80::1%en0]:4100",
            "[2001:db8::7]:4100",
        ),
        *("localhost", "localhost:4100", "LOCALHOST", "api.localhost:80", "studio", "Studio.local:4100"),
        *("studio.lan", "studio.lan.", "gpu-box:4100", "gpu_box", "llm.lab.example:4100"),
    ],
)
def test_an_address_and_a_name_of_its_own_are_served(host: str) -> None:
    assert HOSTS.admit(host)
    assert HOSTS.admit(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:4100", "studio.evil.test", "studio.local.evil.test", "other.local"),
        *("127.0.0.1.evil.test", "192.168.1.7.nip.io", "xlocalhost.com", "localhost.evil.test"),
        *("", ".", ":4100", "local host", "evil.test@127.0.0.1", "127.0.0.1/evil.test", "evil.test#studio"),
        *("[::1", "::1", "[127.0.0.1]", "127.1", "2130706433", "0x7f000001", "999.1.1.1"),
        *("studio\n", "studio\r\nx: y", "studio\0", "stüdio", "localhost:port", "127.0.0.1:4100:4100"),
    ],
)
def test_any_other_is_not(host: str) -> None:
    assert not HOSTS.admit(host)


def test_a_request_without_a_host_is_not_served() -> None:
    assert not HOSTS.admit(None)


def test_a_machine_without_a_name_has_none() -> None:
    assert own_names("") == frozenset()
    assert not Hosts(own_names("")).admit("")


def test_what_was_admitted_before_admits_nothing_else() -> None:
    hosts = Hosts(["studio.lan"])
    for number in range(1000):
        assert hosts.admit(f"10.0.{number // 250}.{number % 250}")
    assert not hosts.admit("evil.test")


@given(st.text(max_size=100))
def test_no_text_breaks_the_judgement(text: str) -> None:
    assert HOSTS.admit(text) in (True, False)


@given(st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){1,3}\.[a-z]{2,10}", fullmatch=True))
def test_no_name_that_somebody_can_register_is_served_unless_it_was_allowed(name: str) -> None:
    reserved = name.endswith((".local", ".localhost"))
    assert reserved or not Hosts(own_names("studio")).admit(name)
