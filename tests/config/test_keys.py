"""The balancer's own keys: made once, kept from others, compared without a hint, and hard to guess."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from balancer import keys
from balancer.keys import AdminKey, Guesses, GuessPolicy, KeyFault, KeyMissing, KeyWrong, TooManyGuesses

GIVEN = "a-key-that-is-long-enough"


def made(folder) -> keys.Keys:
    return keys.found(folder, admin=None, cluster=None)


def test_the_first_start_makes_both_keys_and_the_second_finds_them(tmp_path):
    first = made(tmp_path / "new" / "folder")
    assert first.made == (tmp_path / "new/folder/admin_key", tmp_path / "new/folder/cluster_key")
    assert first.admin != first.cluster.current
    assert min(len(first.admin), len(first.cluster.current)) >= 43  # 256 bits
    second = made(tmp_path / "new" / "folder")
    assert (second.admin, second.cluster, second.made) == (first.admin, first.cluster, ())


def test_a_key_is_its_owners_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        made(tmp_path)
    finally:
        os.umask(before)
    for name in ("admin_key", "cluster_key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["admin_key", "cluster_key"]  # no draft is left


def test_a_key_is_in_no_repr(tmp_path):
    own = made(tmp_path)
    assert own.admin not in repr(own)
    assert own.cluster.current not in repr(own)


def test_a_key_that_is_given_is_used_and_nothing_is_made_for_it(tmp_path):
    own = keys.found(tmp_path, admin=GIVEN, cluster=GIVEN + "2")
    assert (own.admin, own.cluster, own.made) == (GIVEN, keys.ClusterKeys(GIVEN + "2"), ())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_key_that_others_can_reach_is_refused_with_what_to_do(tmp_path, mode):
    made(tmp_path)
    (tmp_path / "admin_key").chmod(mode)
    with pytest.raises(KeyFault, match="chmod 600"):
        made(tmp_path)


def put(path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)


@pytest.mark.parametrize("content", ["", "short", "two words are no key at all", b"\xff" * 40])
def test_a_file_that_holds_no_key_is_refused(tmp_path, content):
    put(tmp_path / "admin_key", content)
    with pytest.raises(KeyFault, match=r"admin_key is not usable: expected one word of at least 16"):
        made(tmp_path)


def test_a_file_that_is_far_too_long_is_refused(tmp_path):
    put(tmp_path / "admin_key", "x" * 10_000)
    with pytest.raises(KeyFault, match=r"admin_key is too long to be ours: remove it"):
        made(tmp_path)


def test_a_key_that_is_given_and_too_short_is_refused(tmp_path):
    with pytest.raises(KeyFault, match="the cluster key that the settings give is not usable"):
        keys.found(tmp_path, admin=None, cluster="short")


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_what_is_no_file_of_ours_is_not_read(tmp_path, what):
    path = tmp_path / "admin_key"
    if what == "link":
        put(tmp_path / "elsewhere", GIVEN)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path, 0o600)  # which nobody writes to: reading it would wait for ever
    with pytest.raises(KeyFault, match="admin_key"):
        made(tmp_path)


def test_a_folder_that_cannot_be_made_is_said_with_what_to_do(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(KeyFault, match="choose another --data-dir"):
        made(tmp_path / "data")


def test_of_many_that_start_at_once_all_have_the_same_keys(tmp_path):
    """Two balancers overlap when one is renewed; none may read a key that the other is still writing."""
    start, found = threading.Barrier(8), []

    def begin() -> None:
        start.wait()
        found.append(made(tmp_path))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(own.admin, own.cluster) for own in found}) == 1
    assert len(found) == 8


# Guessing ...


def judge(now: list[float], **policy: float) -> AdminKey:
    return AdminKey(GIVEN, lambda: now[0], GuessPolicy(**policy))


def test_the_right_key_passes_and_none_and_a_wrong_one_are_told_apart():
    key = judge([0.0])
    key.check(GIVEN, "10.0.0.1")
    with pytest.raises(KeyMissing):
        key.check("", "10.0.0.1")
    for wrong in (GIVEN[:-1], GIVEN + "x", "\udcff", "x" * 100_000):
        with pytest.raises(KeyWrong):
            key.check(wrong, "10.0.0.1")


def test_after_so_many_wrong_keys_none_is_looked_at_until_some_time_has_passed():
    now = [0.0]
    key = judge(now, at_once=3, seconds_each=6.0)
    for _ in range(3):
        with pytest.raises(KeyWrong):
            key.check("wrong", "10.0.0.1")
    with pytest.raises(TooManyGuesses) as refused:
        key.check(GIVEN, "10.0.0.1")  # the right one too: else to wait would slow no guess down
    assert refused.value.retry_after == 6.0
    key.check(GIVEN, "10.0.0.2")
    now[0] = 6.0
    key.check(GIVEN, "10.0.0.1")
    with pytest.raises(KeyWrong):
        key.check("wrong", "10.0.0.1")
    with pytest.raises(TooManyGuesses):
        key.check("wrong", "10.0.0.1")


def test_to_come_without_a_key_is_no_guess():
    key = judge([0.0], at_once=1)
    for _ in range(50):
        with pytest.raises(KeyMissing):
            key.check("", "10.0.0.1")
    key.check(GIVEN, "10.0.0.1")


def test_right_keys_use_up_nothing():
    key = judge([0.0], at_once=1)
    for _ in range(50):
        key.check(GIVEN, "10.0.0.1")


def test_a_flood_of_addresses_takes_bounded_memory_and_forgets_the_oldest():
    guesses = Guesses(GuessPolicy(at_once=1, max_addresses=100))
    for number in range(1000):
        guesses.wrong(f"10.0.{number // 256}.{number % 256}", 0.0)
    assert len(guesses) == 100
    assert guesses.wait_seconds("10.0.0.0", 0.0) == 0.0
    assert guesses.wait_seconds("10.0.3.231", 0.0) > 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("fd00::1", "fd00::2", True),  # a machine has all addresses of such a network
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("fd00::1", "fd00:0:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("", "", True),
    ],
)
def test_who_can_change_addresses_at_will_is_counted_as_one(one, other, same):
    guesses = Guesses(GuessPolicy(at_once=1))
    guesses.wrong(one, 0.0)
    assert (guesses.wait_seconds(other, 0.0) > 0) == same
