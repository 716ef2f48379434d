import pytest

from worker_agent import wire


@pytest.fixture(autouse=True)
def an_mdns_name_of_our_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that advertise and browse on this machine's own network do so under another name, lest the agents
    that they invent turn up in the room of somebody who runs a balancer beside the tests. Those in network
    namespaces have a network to themselves, and real processes on it."""
    if request.node.get_closest_marker("namespaces") is None:
        monkeypatch.setattr(wire, "SERVICE_TYPE", "_llm-test._tcp.local.")
        monkeypatch.setattr(wire, "BALANCER_SERVICE_TYPE", "_llm-test-lb._tcp.local.")
