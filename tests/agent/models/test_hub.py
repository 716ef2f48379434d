"""Where an answer of the hub may send us."""

from __future__ import annotations

import httpx2
import pytest

from worker_agent.models import hub
from worker_agent.models.hub import HubError, reach


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["127.0.0.1"], 0),
        (["::1"], 0),
        (["::ffff:127.0.0.1"], 0),
        (["169.254.169.254"], 0),
        (["fe80::1"], 0),
        (["0.0.0.0"], 0),
        (["192.168.1.10"], 1),
        (["10.0.0.1", "8.8.8.8"], 1),
        (["fd00::1"], 1),
        (["8.8.8.8", "2606:4700::1"], 2),
        ([], 2),
    ],
)
def test_how_far_away_an_address_is(addresses: list[str], expected: int) -> None:
    assert reach(addresses) == expected


ADDRESSES = {
    "hub.example": "8.8.8.8",
    "cdn.example": "8.8.4.4",
    "inside.example": "10.0.0.7",
    "lan.example": "10.0.0.8",
}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_addresses", lambda host: [ADDRESSES.get(host, host)])


def passed(endpoint: str, url: str) -> str | None:
    """The token with which a request leaves. Raises `HubError` where it does not."""
    request = httpx2.Request("GET", url, headers={"Authorization": "Bearer hf_secret"})
    hub._Gate(endpoint).request(request)
    return request.headers.get("Authorization")


def test_the_token_stays_with_the_hub() -> None:
    assert passed("https://hub.example", "https://hub.example/a/b") == "Bearer hf_secret"
    assert passed("https://hub.example", "https://HUB.example:443/a/b") == "Bearer hf_secret"
    for elsewhere in ("https://cdn.example/x", "https://hub.example:8443/x"):
        assert passed("https://hub.example", elsewhere) is None


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "169.254.169.254", "inside.example", "[::1]"])
def test_a_hub_in_the_internet_cannot_send_us_into_this_network(host: str) -> None:
    with pytest.raises(HubError, match="inside this network: refused"):
        passed("https://hub.example", f"https://{host}/latest/meta-data")


def test_a_mirror_in_this_network_may_name_another_in_it_and_not_this_machine() -> None:
    assert passed("http://lan.example", "http://inside.example/x") is None
    with pytest.raises(HubError, match="inside this network"):
        passed("http://lan.example", "http://127.0.0.1/x")


def test_encryption_is_not_given_up() -> None:
    with pytest.raises(HubError, match="without encryption"):
        passed("https://hub.example", "http://cdn.example/x")
    with pytest.raises(HubError, match="without encryption"):
        passed("https://hub.example", "http://hub.example/x")
