from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from worker_agent.settings import Settings, SettingsError, load

EXAMPLE = Path(__file__).parents[2] / "configs" / "worker_agent.json"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("WORKER_AGENT_") or name == "LOG_LEVEL"]:
        monkeypatch.delenv(name)


def test_the_example_file_shows_every_key_with_its_default() -> None:
    assert set(json.loads(EXAMPLE.read_text())) == set(Settings.model_fields)
    assert load(EXAMPLE, {}).model_dump() == load(None, {}).model_dump()


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "agent.json"
    file.write_text('{"port": 1, "slots": 1, "threads": 1}')
    monkeypatch.setenv("WORKER_AGENT_PORT", "2")
    monkeypatch.setenv("WORKER_AGENT_SLOTS", "2")
    settings = load(file, {"port": 3, "slots": None})
    assert (settings.port, settings.slots, settings.threads) == (3, 2, 1)


def test_balancers_are_a_list_with_commas_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_AGENT_BALANCERS", "http://a:4000, http://b:4000")
    assert load(None, {}).balancers == ("http://a:4000", "http://b:4000")


@pytest.mark.parametrize("variable", ["LOG_LEVEL", "WORKER_AGENT_LOG_LEVEL"])
def test_the_log_level_is_read_from_either_variable(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "DEBUG")
    assert load(None, {}).log_level == "debug"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prot": 1}', """agent.json:1:2: 'prot' is not a setting; did you mean "port"?"""),
        ('{"Log-Level": "info"}', 'did you mean "log_level"?'),
        ('{"zzz\\n": 1}', "agent.json:1:2: 'zzz\\n' is not a setting; there are engine, model, "),
        ("[1]", "agent.json:1:1: expected an object"),
        ("[" * 5000, "agent.json:1:"),
        (b"\xff", "agent.json:1:1: byte 0xff is not UTF-8"),
        ('{"port": 70000}', "agent.json:1:10: port: Input should be less than or equal to 65535"),
        ('{"port": 1,\n "slots" 2}', "agent.json:2:10: 2 does not belong here: expected :"),
        (
            '{\n"balancers": ["192.168.1.10"]}',
            "agent.json:2:15: balancers.0: must begin with http://",
        ),
        ('{"id": "a\\nb"}', "id: must be printable"),
    ],
)
def test_a_wrong_file_is_told_by_its_place(tmp_path: Path, text: str | bytes, says: str) -> None:
    file = tmp_path / "agent.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        load(file, {})
    assert says in str(caught.value)


def test_comments_and_trailing_commas_are_forgiven(tmp_path: Path) -> None:
    file = tmp_path / "agent.json"
    file.write_text('// of this machine\n{"port": 1, /* two */ "slots": 2, "balancers": ["http://a:4000",],}')
    settings = load(file, {})
    assert (settings.port, settings.slots, settings.balancers) == (1, 2, ("http://a:4000",))


def test_a_wrong_variable_is_not_told_at_a_place_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "agent.json"
    file.write_text('{"port": 1}')
    monkeypatch.setenv("WORKER_AGENT_PORT", "none")
    with pytest.raises(SettingsError, match=r"^port: Input should be"):
        load(file, {})


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SettingsError, match="there is no file"):
        load(Path("/no/such/file.json"), {})


@pytest.mark.skipif(sys.platform != "linux", reason="has no file that nobody can read, not even root")
def test_a_file_that_cannot_be_read_is_told_with_the_systems_reason() -> None:
    with pytest.raises(SettingsError, match="/proc/self/mem: cannot be read: Input/output error"):
        load(Path("/proc/self/mem"), {})


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://a..b:4000",
            "http://.local:4000",
            f"http://{'x' * 64}:4000",
            "http://:4000",
            "http://a b:4000",
        ),
        *("http://mac:70000", "http://mac:0", "http://mac:port", "http://[::1:4000", "http://"),
    ],
)
def test_a_balancers_address_must_be_one_that_can_be_looked_up(url: str) -> None:
    with pytest.raises(SettingsError, match=r"balancers\.0: .*must name a host and a port, like http://"):
        load(None, {"balancers": (url,)})


@pytest.mark.parametrize(
    "url", ["http://mac.local:4000", "https://büro:4000/", "http://[fd00::7]:4000", "http://mac.local."]
)
def test_names_and_addresses_are_balancers_addresses(url: str) -> None:
    assert load(None, {"balancers": (url,)}).balancers == (url,)


def test_the_cluster_key_comes_from_its_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sixteen-and-more-characters\n")
    settings = load(None, {"cluster_key_file": file})
    assert settings.cluster_key is not None
    assert settings.cluster_key.get_secret_value() == "sixteen-and-more-characters"
    assert "sixteen" not in repr(settings)
    given = load(None, {"cluster_key_file": file, "cluster_key": "one-that-was-given-by-itself"})
    assert given.cluster_key is not None
    assert given.cluster_key.get_secret_value() == "one-that-was-given-by-itself"


def test_a_cluster_key_that_cannot_be_used_is_told_without_its_words(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(SettingsError, match=r"cluster_key_file: .*key cannot be read: No such file"):
        load(None, {"cluster_key_file": file})
    for wrong in ("too-short", "two words are no cluster key", "k" * 513):
        file.write_text(wrong)
        for given in ({"cluster_key_file": file}, {"cluster_key": wrong}):
            with pytest.raises(SettingsError, match="must hold one word of 16 to 512 characters") as caught:
                load(None, given)
            assert wrong not in str(caught.value)
