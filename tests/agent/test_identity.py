from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.identity import NoIdentity, identity, made_id
from worker_agent.uninstall import Refused, held


def test_an_agent_is_the_same_after_a_restart(tmp_path: Path) -> None:
    with identity(tmp_path / "new" / "folder") as first:
        pass
    with identity(tmp_path / "new" / "folder") as again:
        assert again == first


def test_two_agents_of_one_machine_are_two_and_stay_so(tmp_path: Path) -> None:
    with identity(tmp_path) as first, identity(tmp_path) as second:
        assert first.id != second.id
        assert first.certificate != second.certificate
    with identity(tmp_path) as first_again, identity(tmp_path) as second_again:
        assert (first_again, second_again) == (first, second)


def test_a_given_id_is_used_and_nothing_is_kept(tmp_path: Path) -> None:
    with identity(tmp_path, "mine") as who, identity(tmp_path, "yours") as other:
        assert who.id == "mine"
        assert who.certificate.parent == tmp_path
        assert who.certificate != other.certificate
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_one_whose_id_is_given_is_not_removed_under_it(tmp_path: Path) -> None:
    with identity(tmp_path, "mine"), pytest.raises(Refused, match="an agent uses"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_used_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoIdentity, match="give --data-dir or --id"), identity(tmp_path / "file"):
        pass


@given(st.text(max_size=300))
def test_any_host_name_makes_an_id_that_the_wire_takes(hostname: str) -> None:
    made = made_id(hostname, "1a2b")
    assert made.isascii()
    assert made.isprintable()
    assert len(made) <= 128
    assert made.endswith("-1a2b")
