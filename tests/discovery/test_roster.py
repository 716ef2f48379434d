"""Who belongs to the room, by whichever of three ways they came."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balancer.core.model import Condition, Event, Gone, Lost, Reported, Seen, Worker, WorkerId
from balancer.discovery import (
    EVICT_AFTER_SECONDS,
    FORGET_AFTER_SECONDS,
    MAX_BANNED,
    MAX_GUESTS,
    MAX_REFUSALS_TOLD,
    TRY_NEXT_AFTER_SECONDS,
    Entry,
    Interface,
    NotAdmitted,
    Roster,
    TooManyBanned,
    by_reachability,
    own_interfaces,
)
from worker_agent import wire

TAG = "0123456789abcdef"
"""Of this cluster."""
OWN = (
    ipaddress.ip_interface("127.0.0.1/8"),
    ipaddress.ip_interface("192.168.1.9/24"),
    ipaddress.ip_interface("172.17.0.1/16"),
    ipaddress.ip_interface("fd00::9/64"),
    ipaddress.ip_interface("::1/128"),
)


class Scene:
    """A roster, a clock that stands still until told, and what came out."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.watched: dict[WorkerId, tuple[str, Mapping[str, str]]] = {}
        self.follows = 0
        self.woken: list[WorkerId] = []
        self.meets = True
        """Whoever is looked for is met at once."""
        self.roster = Roster(
            tell=self.events.append,
            watches=self,
            clock=lambda: self.now,
            tags=lambda: frozenset({TAG}),
            interfaces=lambda: OWN,
        )

    def follow(self, worker: Worker, headers: Mapping[str, str] = {}, *, is_guest: bool = False) -> None:
        self.follows += 1
        self.watched[worker.id] = (worker.url, headers)
        if is_guest and self.meets:
            self.roster.met(worker)

    def wake(self, worker_id: WorkerId) -> None:
        self.woken.append(worker_id)

    def forget(self, worker_id: WorkerId) -> None:
        del self.watched[worker_id]

    def static(self, **urls: str) -> None:
        self.roster.static([Entry(Worker(id=WorkerId(i), type="openai", url=url)) for i, url in urls.items()])

    def joined(self, agent_id: str, address: str, port: int = 4100) -> None:
        self.roster.joined(wire.Join(id=agent_id, port=port), address)

    def found(self, agent_id: str, *addresses: str, tag: str = TAG) -> None:
        self.roster.found(wire.Announced(agent_id, tag), addresses, 4100)

    def alive(self, worker_id: str) -> None:
        self.roster.notice(Reported(WorkerId(worker_id), Condition()))

    def lost(self, worker_id: str) -> None:
        self.roster.notice(Lost(WorkerId(worker_id), "silent", abandon=True))

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.roster.tick()

    @property
    def urls(self) -> dict[str, str]:
        return {worker.id: worker.url for worker in self.roster.workers}


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_each_of_the_three_ways_leads_into_the_room(scene):
    scene.static(a="http://192.168.1.20:8000")
    scene.joined("b", "192.168.1.21")
    scene.found("c", "192.168.1.22")
    assert scene.urls == {
        "a": "http://192.168.1.20:8000",
        "b": "https://192.168.1.21:4100",
        "c": "https://192.168.1.22:4100",
    }
    assert [type(event) for event in scene.events] == [Seen] * 3
    assert scene.watched["c"] == ("https://192.168.1.22:4100", {})


@pytest.mark.parametrize("first", ["found", "joined"])
def test_an_agent_that_is_found_and_joins_is_one_worker_and_is_watched_once(scene, first):
    ways = [lambda: scene.found("x", "192.168.1.20"), lambda: scene.joined("x", "192.168.1.20")]
    for way in ways if first == "found" else reversed(ways):
        way()
    assert list(scene.urls) == ["x"]
    assert scene.follows == 1


def test_announcements_and_joins_that_repeat_change_nothing(scene):
    scene.found("x", "192.168.1.20")
    scene.joined("y", "192.168.1.21")
    scene.alive("x")
    before = list(scene.events), scene.follows
    for _ in range(50):
        scene.found("x", "192.168.1.20")
        scene.joined("y", "192.168.1.21")
        scene.after(0.1)
    assert (scene.events, scene.follows) == before


def test_the_config_wins_over_a_guest_of_the_same_id(scene):
    scene.joined("x", "192.168.1.20")
    scene.static(x="http://192.168.1.30:8000")
    scene.joined("x", "192.168.1.20")
    scene.found("x", "192.168.1.21")
    assert scene.urls == {"x": "http://192.168.1.30:8000"}


def test_the_config_wins_over_a_guest_of_the_same_address(scene):
    scene.found("x", "192.168.1.20")
    scene.static(mine="https://192.168.1.20:4100")
    scene.found("x", "192.168.1.20")
    scene.joined("x", "192.168.1.20")
    assert list(scene.urls) == ["mine"]
    assert Gone(WorkerId("x")) in scene.events


def test_a_join_wins_over_an_announcement_that_is_lost(scene):
    scene.found("x", "192.168.1.66")
    scene.joined("x", "192.168.1.20")
    scene.found("x", "192.168.1.66")
    assert scene.urls == {"x": "https://192.168.1.20:4100"}


def test_a_new_config_leaves_workers_in_peace_that_it_lists_as_before(scene):
    scene.static(a="http://h:1", b="http://h:2")
    before = scene.follows
    scene.static(a="http://h:1", c="http://h:3")
    assert scene.follows == before + 1
    assert scene.events[-2:] == [
        Seen(Worker(id=WorkerId("c"), type="openai", url="http://h:3")),
        Gone(WorkerId("b")),
    ]


def test_a_room_whose_workers_are_all_renamed_is_never_empty(scene):
    scene.static(a="http://h:1", b="http://h:2")
    scene.events.clear()
    scene.static(c="http://h:1", d="http://h:2")
    assert [type(event) for event in scene.events] == [Seen, Seen, Gone, Gone]
    assert scene.watched.keys() == {"c", "d"}


def test_a_new_key_in_the_config_is_used_from_then_on(scene):
    worker = Worker(id=WorkerId("a"), type="openai", url="http://h:1")
    scene.roster.static([Entry(worker, {"Authorization": "Bearer 1"})])
    scene.roster.static([Entry(worker, {"Authorization": "Bearer 2"})])
    assert scene.watched["a"] == ("http://h:1", {"Authorization": "Bearer 2"})


def test_an_entry_does_not_show_its_key():
    assert "sk-1" not in repr(
        Entry(Worker(id=WorkerId("a"), type="openai", url="u"), {"Authorization": "sk-1"})
    )


def test_a_join_that_leads_nowhere_gives_way_to_an_announcement_after_some_seconds(scene):
    scene.joined("x", "192.168.1.20")
    scene.alive("x")
    scene.lost("x")
    scene.after(TRY_NEXT_AFTER_SECONDS - 0.1)
    scene.found("x", "192.168.1.21")
    assert scene.urls == {"x": "https://192.168.1.20:4100"}
    scene.after(0.1)
    scene.found("x", "192.168.1.21")
    assert scene.urls == {"x": "https://192.168.1.21:4100"}


def test_a_join_at_a_new_address_has_its_own_seconds_however_long_the_agent_was_lost(scene):
    scene.joined("x", "192.168.1.20")
    scene.after(60)
    scene.joined("x", "192.168.1.22")
    scene.found("x", "192.168.1.21")
    assert scene.urls == {"x": "https://192.168.1.22:4100"}


def test_a_worker_of_the_config_never_gives_way_to_an_announcement(scene):
    scene.static(x="http://192.168.1.30:8000")
    scene.after(60)
    scene.found("x", "192.168.1.21")
    assert scene.urls == {"x": "http://192.168.1.30:8000"}


def test_an_agent_that_joins_by_another_of_its_announced_addresses_is_no_second_one(scene):
    scene.found("x", "192.168.1.20", "10.0.0.1")
    scene.alive("x")
    scene.joined("x", "10.0.0.1")
    assert scene.urls == {"x": "https://192.168.1.20:4100"}


# Strangers ...


def test_an_announcement_cannot_move_a_worker_that_is_alive(scene):
    scene.found("x", "192.168.1.20")
    scene.alive("x")
    scene.found("x", "192.168.1.66")
    scene.after(60)
    assert scene.urls == {"x": "https://192.168.1.20:4100"}
    assert scene.follows == 1


def test_a_second_agent_of_an_id_is_told_to_take_another(scene):
    scene.joined("x", "192.168.1.20")
    scene.alive("x")
    with pytest.raises(NotAdmitted, match="give this one another id with --id"):
        scene.joined("x", "192.168.1.66")
    assert scene.urls == {"x": "https://192.168.1.20:4100"}


def test_a_second_agent_of_an_id_that_is_only_announced_is_warned_of_once(scene, caplog):
    scene.found("x", "192.168.1.20")
    scene.alive("x")
    for _ in range(3):
        scene.found("x", "192.168.1.66")
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        'agent x, announced at https://192.168.1.66:4100, stays out: an agent called "x" is alive at '
        "https://192.168.1.20:4100: give this one another id with --id"
    )


def test_a_flood_of_second_agents_does_not_fill_the_log(scene, caplog):
    scene.found("x", "192.168.1.20")
    scene.alive("x")
    for n in range(1000):
        scene.found("x", f"10.0.{n // 250}.{n % 250 + 1}")
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == MAX_REFUSALS_TOLD


def test_an_agent_that_moved_is_followed_once_it_is_lost_at_its_old_address(scene):
    scene.joined("x", "192.168.1.20")
    scene.alive("x")
    scene.lost("x")
    scene.joined("x", "192.168.1.21")
    assert scene.urls == {"x": "https://192.168.1.21:4100"}


def test_an_agent_that_was_renamed_takes_the_place_of_its_old_name(scene):
    scene.joined("old", "192.168.1.20")
    scene.alive("old")
    with pytest.raises(NotAdmitted, match='"old" is alive'):
        scene.joined("new", "192.168.1.20")
    scene.lost("old")
    scene.joined("new", "192.168.1.20")
    assert list(scene.urls) == ["new"]


def test_an_announcement_of_who_was_not_met_ends_nobody_that_is_lost_for_a_moment(scene):
    """Else anybody on the link could have requests told that there is no such model."""
    scene.joined("a", "192.168.1.20")
    scene.alive("a")
    scene.lost("a")
    scene.meets = False
    scene.found("evil", "192.168.1.20")
    assert not any(isinstance(event, Gone) for event in scene.events)
    assert set(scene.urls) == {"a"}
    scene.alive("a")
    assert scene.urls == {"a": "https://192.168.1.20:4100"}


def test_who_was_lost_where_another_is_met_is_looked_for_at_its_other_addresses(scene):
    scene.found("a", "192.168.1.20", "192.168.1.21")
    scene.alive("a")
    scene.lost("a")
    scene.found("b", "192.168.1.20")
    assert set(scene.urls) == {"a", "b"}
    scene.after(TRY_NEXT_AFTER_SECONDS)
    assert scene.urls == {"a": "https://192.168.1.21:4100", "b": "https://192.168.1.20:4100"}


def test_machines_that_share_an_inner_address_are_told_apart(scene):
    scene.found("x", "10.0.3.1", "192.168.1.20")
    assert scene.urls == {"x": "https://192.168.1.20:4100"}
    scene.found("y", "10.0.3.1")
    scene.alive("y")
    scene.found("z", "10.0.3.1", "10.9.9.9")
    assert scene.urls["z"] == "https://10.9.9.9:4100"


@pytest.mark.parametrize("address", ["", "mac.local", "fe80::1%a]b", "1.2.3.4.5"])
def test_a_join_from_no_address_is_refused(scene, address):
    with pytest.raises(NotAdmitted, match="not an address"):
        scene.joined("x", address)


def test_a_join_over_a_dual_stack_socket_has_an_ipv4_address(scene):
    scene.joined("x", "::ffff:192.168.1.20")
    scene.joined("y", "fe80::1%br-lan.7")
    assert scene.urls == {"x": "https://192.168.1.20:4100", "y": "https://[fe80::1%br-lan.7]:4100"}


def test_a_flood_of_names_stays_within_bounds_and_gives_way_to_those_who_report(scene):
    scene.static(mine="http://h:1")
    scene.joined("real", "192.168.1.20")
    scene.alive("real")
    for n in range(10_000):
        scene.found(f"fake{n}", f"10.0.{n // 250}.{n % 250 + 1}")
    assert len(scene.urls) == MAX_GUESTS + 1
    with pytest.raises(NotAdmitted, match="full"):
        scene.joined("late", "192.168.1.21")
    scene.after(EVICT_AFTER_SECONDS)
    scene.joined("late", "192.168.1.21")
    assert len(scene.urls) == MAX_GUESTS + 1
    assert {"mine", "real", "late"} <= set(scene.urls)


# Time ...


def test_a_guest_that_is_lost_for_long_is_forgotten_and_may_come_back(scene):
    scene.found("x", "192.168.1.20")
    scene.alive("x")
    scene.after(10 * FORGET_AFTER_SECONDS)
    scene.lost("x")
    scene.after(FORGET_AFTER_SECONDS - 1)
    scene.lost("x")  # lost anew each time is lost since the first
    assert "x" in scene.urls
    scene.after(1)
    assert scene.urls == {}
    assert scene.events[-1] == Gone(WorkerId("x"))
    assert scene.watched == {}
    scene.found("x", "192.168.1.20")
    assert "x" in scene.urls


def test_a_guest_that_never_reported_is_forgotten_too(scene):
    scene.found("x", "192.168.1.20", "10.0.0.1")
    for _ in range(int(FORGET_AFTER_SECONDS)):
        scene.after(1)
    assert scene.urls == {}


def test_a_worker_of_the_config_is_never_forgotten(scene):
    scene.static(x="http://h:1")
    scene.lost("x")
    scene.after(10 * FORGET_AFTER_SECONDS)
    assert "x" in scene.urls


def test_a_guest_that_was_removed_stays_out_however_it_comes_until_it_is_admitted(scene):
    scene.joined("x", "192.168.1.20")
    assert scene.roster.sources == {"x": "join"}
    assert scene.roster.remove(WorkerId("x"))
    assert scene.events[-1] == Gone(WorkerId("x"))
    assert scene.watched == {}
    scene.found("x", "192.168.1.20")
    with pytest.raises(NotAdmitted, match=r"POST /admin/workers/x/admit"):
        scene.joined("x", "192.168.1.21")
    assert (scene.urls, scene.roster.banned) == ({}, ("x",))
    assert scene.roster.admit(WorkerId("x"))
    assert not scene.roster.admit(WorkerId("x"))
    assert scene.urls == {}  # it is let in, not fetched
    scene.found("x", "192.168.1.20")
    assert scene.roster.sources == {"x": "mdns"}


def test_a_worker_of_the_config_that_was_removed_is_back_with_the_next_config(scene):
    scene.static(a="http://192.168.1.20:8000", b="http://192.168.1.21:8000")
    assert scene.roster.remove(WorkerId("a"))
    assert list(scene.urls) == ["b"]
    follows = scene.follows
    scene.static(a="http://192.168.1.20:8000", b="http://192.168.1.21:8000")
    assert scene.roster.sources == {"b": "config", "a": "config"}
    assert scene.follows == follows + 1  # the other one is left in peace


def test_a_worker_of_the_config_that_is_admitted_is_back_at_once(scene):
    scene.static(a="http://192.168.1.20:8000", b="http://192.168.1.21:8000")
    scene.roster.remove(WorkerId("a"))
    scene.roster.remove(WorkerId("b"))
    scene.joined("guest", "192.168.1.20", 8000)  # the same server, under a name of its own
    assert scene.roster.admit(WorkerId("a"))
    assert scene.urls == {"a": "http://192.168.1.20:8000"}


def test_there_are_so_many_removals_and_no_more(scene):
    for number in range(MAX_BANNED + 1):
        scene.static(**{f"w{number}": f"http://192.168.1.20:{number + 1}"})
        if number < MAX_BANNED:
            assert scene.roster.remove(WorkerId(f"w{number}"))
    with pytest.raises(TooManyBanned, match=str(MAX_BANNED)):
        scene.roster.remove(WorkerId(f"w{MAX_BANNED}"))
    assert list(scene.urls) == [f"w{MAX_BANNED}"]


def test_who_is_not_there_cannot_be_removed(scene):
    assert not scene.roster.remove(WorkerId("x"))
    assert scene.roster.banned == ()


def test_the_addresses_of_a_lost_agent_are_tried_in_turn_until_it_reports(scene):
    scene.found("x", "10.0.0.1", "192.168.1.20", "10.0.0.2")
    tried = [scene.urls["x"]]
    for _ in range(3):
        scene.after(TRY_NEXT_AFTER_SECONDS - 0.1)
        scene.after(0.1)
        tried.append(scene.urls["x"])
    hosts = [url.removeprefix("https://").removesuffix(":4100") for url in tried]
    assert hosts == ["192.168.1.20", "10.0.0.1", "10.0.0.2", "192.168.1.20"]
    scene.alive("x")
    scene.after(60)
    assert scene.urls["x"] == tried[-1]


# Guests, before they were met ...


def test_nobody_is_told_of_a_guest_before_it_was_met(scene):
    scene.meets = False
    scene.joined("x", "192.168.1.20")
    scene.found("y", "192.168.1.21")
    assert set(scene.watched) == {"x", "y"}
    assert (scene.events, scene.roster.workers, dict(scene.roster.sources)) == ([], (), {})
    scene.roster.met(Worker(id=WorkerId("x"), type="agent", url="https://192.168.1.20:4100"))
    assert scene.roster.sources == {"x": "join"}
    assert [type(event) for event in scene.events] == [Seen]
    scene.roster.remove(WorkerId("y"))
    assert [type(event) for event in scene.events] == [Seen]  # who was never here is not gone either


def test_an_agent_of_another_cluster_is_none_of_ours_and_one_without_a_key_is_looked_at(scene):
    scene.found("theirs", "192.168.1.20", tag="f" * 16)
    scene.found("new", "192.168.1.21", tag="")
    assert list(scene.watched) == ["new"]


def test_announcements_that_flap_each_second_are_told_of_at_most_once_in_ten(scene):
    """RELIABILITY M9d."""
    scene.meets = False
    for second in range(60):
        scene.found("x", f"192.168.1.{20 + second % 3}")
        scene.after(1.0)
    assert scene.events == []
    assert scene.follows <= 60 / TRY_NEXT_AFTER_SECONDS + 1  # and each address has its time to answer


def test_an_agent_that_is_met_elsewhere_than_it_was_looked_for_has_moved(scene):
    scene.meets = False
    scene.found("x", "192.168.1.20")
    scene.roster.met(Worker(id=WorkerId("x"), type="agent", url="https://192.168.1.30:4100"))
    assert scene.urls == {"x": "https://192.168.1.30:4100"}
    scene.alive("x")
    scene.roster.met(Worker(id=WorkerId("x"), type="agent", url="https://192.168.1.31:4100"))
    assert scene.urls == {"x": "https://192.168.1.30:4100"}  # whoever is alive stays


def test_an_agent_that_dials_is_one_worker_however_often_it_says_so(scene):
    scene.roster.dialled("mac 1")
    scene.roster.dialled("mac 1")
    assert scene.urls == {"mac 1": "tunnel://mac%201"}
    assert scene.follows == 1
    scene.alive("mac 1")
    scene.joined("mac 1", "192.168.1.20")
    assert scene.urls == {"mac 1": "tunnel://mac%201"}
    scene.lost("mac 1")
    scene.after(TRY_NEXT_AFTER_SECONDS)
    assert scene.urls == {"mac 1": "https://192.168.1.20:4100"}


# Addresses ...


@pytest.mark.parametrize(
    ("announced", "usable"),
    [
        (["10.0.0.1", "192.168.1.20"], ["192.168.1.20", "10.0.0.1"]),
        (["fd00::5", "192.168.1.20"], ["192.168.1.20", "fd00::5"]),
        (["2001:db8::1", "fd00::5"], ["fd00::5", "2001:db8::1"]),
        (["fe80::1", "192.168.1.20"], ["192.168.1.20"]),
        (["fe80::1%eth0", "10.0.0.1"], ["10.0.0.1", "fe80::1%eth0"]),
        (["127.0.0.1", "192.168.1.20"], ["192.168.1.20"]),
        (["192.168.1.9", "127.0.0.1"], ["127.0.0.1", "192.168.1.9"]),
        (["127.0.0.1"], ["127.0.0.1"]),
        (["172.17.0.1", "192.168.1.20"], ["192.168.1.20", "172.17.0.1"]),
        (["0.0.0.0", "224.0.0.251", "::", "ff02::fb", "x", ""], []),
        (["10.0.0.1", "10.0.0.1"], ["10.0.0.1"]),
    ],
)
def test_the_likeliest_address_comes_first(announced: Sequence[str], usable: Sequence[str]):
    assert list(by_reachability(announced, OWN)) == list(usable)


def test_an_agent_without_a_usable_address_stays_out_and_that_is_logged(scene, caplog):
    caplog.set_level("INFO")
    scene.found("x", "fe80::1")
    assert scene.urls == {}
    assert "no address that can be reached" in caplog.text


def test_the_addresses_of_this_machine_are_read_with_their_networks():
    own: Sequence[Interface] = own_interfaces()
    assert ipaddress.ip_interface("127.0.0.1/8") in own
    if socket.has_ipv6:
        assert all(interface.network.prefixlen > 0 for interface in own)


# Any history ...


class Histories(RuleBasedStateMachine):
    ids = st.sampled_from(["a", "b", "c", "d"])
    hosts = st.sampled_from(["192.168.1.20", "192.168.1.21", "10.0.0.1"])

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.listed: dict[str, str] = {}
        self.removed: set[str] = set()

    @rule(entries=st.dictionaries(ids, hosts, max_size=3))
    def a_config_is_read(self, entries: dict[str, str]) -> None:
        unique = {host: i for i, host in entries.items()}
        self.listed = {i: f"https://{host}:4100" for host, i in unique.items()}
        self.scene.static(**self.listed)
        self.removed -= self.listed.keys()

    @rule(agent=ids)
    def somebody_removes_it(self, agent: str) -> None:
        was_there = agent in self.scene.urls
        assert self.scene.roster.remove(WorkerId(agent)) == was_there
        if was_there:
            self.removed.add(agent)

    @rule(agent=ids)
    def somebody_admits_it(self, agent: str) -> None:
        assert self.scene.roster.admit(WorkerId(agent)) == (agent in self.removed)
        self.removed.discard(agent)

    @rule(agent=ids, host=hosts)
    def an_agent_joins(self, agent: str, host: str) -> None:
        try:
            self.scene.joined(agent, host)
        except NotAdmitted:
            assert agent not in self.listed or agent in self.removed

    @rule(agent=ids, addresses=st.lists(hosts, max_size=3))
    def an_agent_is_found(self, agent: str, addresses: list[str]) -> None:
        self.scene.found(agent, *addresses)

    @rule(agent=ids)
    def it_reports(self, agent: str) -> None:
        self.scene.alive(agent)

    @rule(agent=ids)
    def it_is_lost(self, agent: str) -> None:
        self.scene.lost(agent)

    @rule(seconds=st.sampled_from([1.0, TRY_NEXT_AFTER_SECONDS, FORGET_AFTER_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.scene.after(seconds)

    @invariant()
    def what_was_told_is_what_is_watched_and_what_is_known(self) -> None:
        told: dict[str, str] = {}
        for event in self.scene.events:
            if isinstance(event, Seen):
                told[event.worker.id] = event.worker.url
            elif isinstance(event, Gone):
                del told[event.worker_id]
        assert told == self.scene.urls == {i: url for i, (url, _) in self.scene.watched.items()}

    @invariant()
    def the_config_holds(self) -> None:
        expected = {name: url for name, url in self.listed.items() if name not in self.removed}
        assert expected.items() <= self.scene.urls.items()

    @invariant()
    def who_was_removed_stays_out(self) -> None:
        assert not self.removed & self.scene.urls.keys()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
