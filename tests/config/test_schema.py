"""The published JSON schema accepts what the balancer accepts, as far as a schema can say it."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.config_file import ConfigFile, Tunables, WorkerEntry, parse, published_schema, read
from worker_agent.forgiving_json import ConfigFaults, plain, read_text, tree

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = jsonschema_rs.validator_for(json.loads(published_schema()))

BEYOND_A_SCHEMA = {"data_dir", "allow_networks", "allow_hosts", "cors_origins", "scorer_weights", "log_level"}
"""Settings whose validators look at more than a schema can tell, or forgive more."""
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.sampled_from([2**16 - 1, 2**16, 10**6, 10**6 + 1, 86_400, 86_401, 0.05, 0.1, 0.5, 0.9, 0.91])
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.sampled_from(["", "x", "text", "json", "keys", "off", "round_robin", "x" * 254, "x" * 1025])
    | st.lists(st.text(max_size=3), max_size=2)
)


def accepted(content: object) -> bool:
    try:
        parse(json.dumps(content), "f.json")
    except ConfigFaults:
        return False
    return True


def is_whole_float(value: object) -> bool:
    """5.0 is a whole number to a schema, and a fraction to those who write files."""
    return isinstance(value, float) and value.is_integer()


@pytest.mark.parametrize("name", ["balancer.json", "workers.example.json"])
def test_the_files_that_are_shipped_are_valid_by_the_published_schema(name):
    complaints: list[Any] = []
    root = tree(read_text(CONFIGS / name), complaints, instead="")
    assert root is not None
    content = plain(root, complaints)
    assert complaints == []
    # Editors are told by it too.
    assert [str(error) for error in SCHEMA.iter_errors(json.loads(json.dumps(content)))] == []
    read(CONFIGS / name)


def test_the_schema_may_be_named_in_the_file():
    assert SCHEMA.is_valid({"$schema": "balancer.schema.json"})
    assert parse('{"$schema": "balancer.schema.json"}', "f.json") is not None


@given(st.sampled_from(sorted(set(Tunables.model_fields) - BEYOND_A_SCHEMA)), VALUES)
def test_a_setting_is_right_by_the_schema_where_it_is_right(name, value):
    content = {name: value}
    if not is_whole_float(value):
        assert SCHEMA.is_valid(content) == accepted(content)


@given(st.sampled_from(sorted(ConfigFile.model_fields)), VALUES)
def test_whatever_is_accepted_is_right_by_the_schema(name, value):
    content = {name: value}
    # Its case does not matter; and what a variable says with commas is taken from the file too.
    is_forgiven = name in {"log_level", "allow_hosts", "allow_networks", "cors_origins"}
    if accepted(content) and not (is_forgiven and isinstance(value, str)):
        assert SCHEMA.is_valid(content)


@given(st.dictionaries(st.sampled_from(sorted(WorkerEntry.model_fields)), VALUES, max_size=3))
def test_a_worker_that_is_accepted_is_right_by_the_schema(members):
    content = {"workers": [{"host": "a"} | members]}
    if accepted(content):
        assert SCHEMA.is_valid(content)


@given(st.text(max_size=12).filter(lambda name: name not in ConfigFile.model_fields and name != "$schema"))
def test_an_unknown_key_is_wrong_by_both(name):
    assert not accepted({name: 1})
    assert not SCHEMA.is_valid({name: 1})
