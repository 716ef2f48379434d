"""Layers, names of variables, secrets, and the sentences about what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from balancer.config_file import ConfigFile, Tunables
from balancer.core.placement import POLICIES
from balancer.settings import SettingsError, load, variable
from worker_agent.forgiving_json import ConfigFaults


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for key in (*Tunables.model_fields, "workers", "admin_key", "cluster_key"):
        monkeypatch.delenv(variable(key), raising=False)


@pytest.fixture
def config(tmp_path):
    def write(**members: object) -> Path:
        path = tmp_path / "balancer.json"
        path.write_text(json.dumps(members))
        return path

    return write


def complaint(path: Path | None = None, **flags: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(path, flags)
    return str(caught.value)


def test_without_any_layer_the_defaults_hold():
    settings = load(None, {})
    assert settings.model_dump(exclude={"workers"}) == ConfigFile().model_dump(exclude={"workers", "schema_"})
    assert (settings.max_retries, settings.request_timeout, settings.max_concurrent_batch) == (3, 300, 50)
    assert (settings.host, settings.port, settings.health_check_interval) == ("0.0.0.0", 4000, 5)


def test_the_shipped_file_holds_the_defaults():
    shipped = Path(__file__).parents[2] / "configs" / "balancer.json"
    assert load(shipped, {}).model_dump() == load(None, {}).model_dump()


def test_a_file_beats_defaults_a_variable_the_file_and_a_flag_the_variable(config, monkeypatch):
    path = config(port=1, max_queue=1, max_retries=1)
    monkeypatch.setenv("BALANCER_MAX_QUEUE", "2")
    monkeypatch.setenv("MAX_RETRIES", "2")
    settings = load(path, {"max_retries": 3, "port": None})
    assert (settings.port, settings.max_queue, settings.max_retries, settings.max_body_mib) == (1, 2, 3, 32)


@pytest.mark.parametrize(
    ("name", "value", "key", "expectation"),
    [
        ("HEALTH_CHECK_INTERVAL", "2.5", "health_check_interval", 2.5),
        ("REQUEST_TIMEOUT", "30", "request_timeout", 30.0),
        ("MAX_RETRIES", "0", "max_retries", 0),
        ("MAX_CONCURRENT_BATCH", "7", "max_concurrent_batch", 7),
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("ENABLE_METRICS", "false", "enable_metrics", False),
        ("BALANCER_PORT", "8080", "port", 8080),
        ("BALANCER_MDNS", "no", "mdns", False),
        ("BALANCER_DATA_DIR", "/srv/x", "data_dir", Path("/srv/x")),
        ("BALANCER_MAX_QUEUE", "", "max_queue", 1000),
        ("BALANCER_MAX_QUEUE_BATCH", "5", "max_queue_batch", 5),
        ("BALANCER_MAX_WAIT_BATCH", "60", "max_wait_batch", 60.0),
        ("BALANCER_BATCH_RESERVE", "0", "batch_reserve", 0.0),
        ("BALANCER_BATCH_FLOOR", "0.1", "batch_floor", 0.1),
        ("BALANCER_POLICY", "round_robin", "policy", "round_robin"),
        ("BALANCER_HOT_PATH", "false", "hot_path", False),
        ("BALANCER_MAX_CONNECTIONS", "500", "max_connections", 500),
        ("BALANCER_ALLOW_HOSTS", "LLM.lab.org, b", "allow_hosts", ("llm.lab.org", "b")),
        ("BALANCER_CORS_ORIGINS", "https://chat.lab.org", "cors_origins", ("https://chat.lab.org",)),
    ],
)
def test_a_setting_has_its_variable(monkeypatch, name, value, key, expectation):
    assert variable(key) == name
    monkeypatch.setenv(name, value)
    assert getattr(load(None, {}), key) == expectation


@pytest.mark.parametrize("name", ["PORT", "HOST", "max_retries", "BALANCER_MAX_RETRIES"])
def test_a_variable_of_another_name_says_nothing(monkeypatch, name):
    before = load(None, {}).model_dump()
    monkeypatch.setenv(name, "12")
    assert load(None, {}).model_dump() == before


def test_weights_in_a_variable_are_laid_over_those_of_the_file(config, monkeypatch):
    monkeypatch.setenv("BALANCER_SCORER_WEIGHTS", '{"availability": 1}')
    path = config(policy="weighted_random", scorer_weights={"response_time": 0.5})
    weights = load(path, {}).scorer_weights.root
    assert weights == {"availability": 1, "success_rate": 0.4, "response_time": 0.5}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_from_a_variable_weighs_by_its_own_weights(config, monkeypatch, policy):
    path = config(policy="weighted_random", scorer_weights={"availability": 0.5})
    monkeypatch.setenv("BALANCER_POLICY", policy)
    given = {"availability": 0.5} if policy == "weighted_random" else {}
    assert load(path, {}).scorer_weights.root == {**POLICIES[policy].weights, **given}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MAX_RETRIES", "many", "MAX_RETRIES is 'many': expected a whole number from 0 to 20 (default 3)"),
        ("MAX_RETRIES", "99", "MAX_RETRIES is '99': expected a whole number from 0 to 20 (default 3)"),
        ("REQUEST_TIMEOUT", "nan", "REQUEST_TIMEOUT is 'nan': expected a number from 0.1 to 86400"),
        ("ENABLE_METRICS", "maybe", "ENABLE_METRICS is 'maybe': expected true or false (default true)"),
        ("LOG_LEVEL", "loud", 'LOG_LEVEL is \'loud\': expected one of "DEBUG", "INFO"'),
        ("BALANCER_PORT", "tcp://10.0.0.1:4000", "BALANCER_PORT is 'tcp://10.0.0.1:4000': expected a whole"),
        ("BALANCER_SCORER_WEIGHTS", "0.4", "BALANCER_SCORER_WEIGHTS is '0.4': expected an object"),
        (
            "BALANCER_SCORER_WEIGHTS",
            '{"availability": 1}',
            'the policy "expected_latency" has no scorer "availability": expected reliability or expect',
        ),
        ("BALANCER_POLICY", "fast", "BALANCER_POLICY is 'fast': expected one of \"expected_latency\", "),
        ("BALANCER_BATCH_RESERVE", "1", "BALANCER_BATCH_RESERVE is '1': expected a number from 0 to 0.9"),
        ("BALANCER_SCORER_WEIGHTS", "{", "BALANCER_SCORER_WEIGHTS is not JSON: expected an object"),
        ("BALANCER_ALLOW_HOSTS", "a:4000", "'a:4000' is not a name such as balancer.lab.org"),
        ("BALANCER_CORS_ORIGINS", "chat.lab.org", "'chat.lab.org' is not an origin such as https://"),
        ("BALANCER_WORKERS", "[]", "workers are listed in the JSON file only"),
    ],
)
def test_a_bad_variable_is_named_with_what_was_expected(monkeypatch, name, value, sentence):
    monkeypatch.setenv(name, value)
    told = complaint()
    assert sentence in told
    assert len(told.splitlines()) == 1


def test_two_bad_variables_are_told_together(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "x")
    monkeypatch.setenv("BALANCER_PORT", "y")
    assert len(complaint().splitlines()) == 2


def test_a_bad_flag_is_named_as_the_flag(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "1")
    assert complaint(max_retries=-1).startswith("--max-retries is '-1': expected a whole number")
    assert complaint(max_retreis=1) == "--max-retreis is not a setting"


def test_a_faulty_file_is_told_as_the_file(config):
    with pytest.raises(ConfigFaults, match=r"balancer\.json:1:10: "):
        load(config(port=0), {})


def test_a_setting_cannot_be_changed_later():
    with pytest.raises(ValueError, match="frozen"):
        load(None, {}).port = 1


def test_a_home_in_a_path_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BALANCER_DATA_DIR", "~/x")
    assert load(None, {}).data_dir == tmp_path / "x"
    monkeypatch.delenv("BALANCER_DATA_DIR")
    assert load(None, {}).data_dir.is_relative_to(tmp_path)


# Secrets ...


def room_with(config, reference):
    return config(workers=[{"host": "box", "api_key": reference}])


def test_a_key_comes_from_a_variable_or_from_a_file_beside_the_config(config, monkeypatch, tmp_path):
    monkeypatch.setenv("BOX_KEY", "sk-1")
    (tmp_path / "key").write_text("sk-2\n")
    from_variable = load(room_with(config, {"env": "BOX_KEY"}), {}).room[0]
    assert from_variable.headers == {"Authorization": "Bearer sk-1"}
    from_file = load(room_with(config, {"file": "key"}), {})
    assert from_file.room[0].headers == {"Authorization": "Bearer sk-2"}
    assert "sk-2" not in repr(from_file) + repr(from_file.room) + from_file.model_dump_json()


def test_workers_without_a_key_send_none(config):
    assert [entry.headers for entry in load(config(workers=[{"host": "box"}]), {}).room] == [{}]


@pytest.mark.parametrize(
    ("reference", "content", "sentence"),
    [
        ({"env": "BOX_KEY"}, None, "environment variable BOX_KEY, which is not set"),
        ({"file": "key"}, None, "cannot be read: No such file"),
        ({"file": "key"}, b"\n", "is empty"),
        ({"file": "key"}, b"a" * 9000, "is too long"),
        ({"file": "key"}, b"\xff", "not plain ASCII"),
        ({"file": "key"}, b"a\r\nX-Evil: 1", "expected one word"),
    ],
)
def test_a_key_that_cannot_be_had_is_told_with_its_worker(
    config, tmp_path, monkeypatch, reference, content, sentence
):
    monkeypatch.delenv("BOX_KEY", raising=False)
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    told = complaint(room_with(config, reference))
    assert told.startswith('the api_key of worker "box:8000" comes from')
    assert sentence in told


@pytest.mark.parametrize("key", ["sk-ant-api03-abcdefghijklmnop", "0a1b" * 8, "sk-proj-" + "A1b2" * 39])
@pytest.mark.parametrize("member", ["env", "file", "key"])
def test_a_key_in_the_place_of_a_name_is_not_shown(config, key, member):
    with pytest.raises((SettingsError, ConfigFaults)) as caught:
        load(room_with(config, {member: key}), {})
    assert key[:12] not in str(caught.value)


def test_a_key_in_the_place_of_its_file_is_not_shown(config):
    assert "sk-ant" not in complaint(config(admin_key_file="sk-ant-api03-abcdefghijklmnop"))


def test_the_balancers_own_keys_come_from_variables_or_files_and_are_in_no_dump(config, monkeypatch):
    path = config(admin_key_file="keys/admin", cluster_key_file="~/cluster")
    monkeypatch.setenv("HOME", str(path.parent))
    (path.parent / "keys").mkdir()
    (path.parent / "keys" / "admin").write_text("the-admin-key\n")
    (path.parent / "cluster").write_text("the-cluster-key\n")
    settings = load(path, {})
    assert (settings.admin_key, settings.cluster_key) == ("the-admin-key", "the-cluster-key")
    monkeypatch.setenv("BALANCER_ADMIN_KEY", "from-the-variable")
    monkeypatch.setenv("BALANCER_CLUSTER_KEY_FILE", str(path.parent / "keys" / "admin"))
    settings = load(path, {})
    assert (settings.admin_key, settings.cluster_key) == ("from-the-variable", "the-admin-key")
    for text in (repr(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "from-the-variable" not in text
        assert "the-admin-key" not in text


def test_without_any_the_balancers_own_keys_are_left_to_the_data_folder():
    settings = load(None, {})
    assert (settings.admin_key, settings.cluster_key) == (None, None)


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_an_own_key_that_cannot_be_had_is_told(config, content):
    path = config(admin_key_file="admin")
    if content is not None:
        (path.parent / "admin").write_text(content)
    assert complaint(path).startswith(f"the admin key comes from the file {path.parent / 'admin'}, which ")


def test_a_key_does_not_stand_in_the_file_itself(config):
    with pytest.raises(ConfigFaults, match='unknown key "admin_key", did you mean "admin_key_file"'):
        load(config(admin_key="the-admin-key-itself"), {})


def test_settings_are_read_again_from_the_same_layers(config, monkeypatch):
    path = config(max_queue=1, max_retries=1)
    settings = load(path, {"max_retries": 2})
    path.write_text('{"max_queue": 5, "max_retries": 5, "max_body_mib": 5}')
    monkeypatch.setenv("BALANCER_MAX_BODY_MIB", "6")
    again = settings.read_again()
    assert (again.max_queue, again.max_retries, again.max_body_mib) == (5, 2, 6)
    assert settings.max_queue == 1


def test_every_missing_key_is_told(config):
    assert "NOT_THERE" not in os.environ
    path = config(workers=[{"host": name, "api_key": {"env": "NOT_THERE"}} for name in ("a", "b")])
    assert len(complaint(path).splitlines()) == 2
