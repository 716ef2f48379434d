"""The JSON file: what is forgiven, what is a fault, and where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.config_file import (
    ConfigFile,
    SecretReference,
    expected,
    parse,
    published_schema,
    read,
)
from balancer.core.model import Worker
from balancer.core.placement import DEFAULT_POLICY, POLICIES, PlacementPolicy
from balancer.core.scorers import SCORERS
from balancer.worker_types import WORKER_TYPES
from worker_agent.forgiving_json import MAX_FAULTS, MAX_FILE_BYTES, ConfigFaults

ROOT = Path(__file__).parents[2]
EXAMPLE = (
    '{"workers": [{"id": "mac-studio", "host": "192.168.1.20", "port": 1234, "type": "lm_studio", '
    '"model": "qwen2.5-7b-instruct", "max_concurrent_requests": 5}]}'
)


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigFaults) as caught:
        parse(text, "f.json")
    assert str(caught.value).splitlines() == [str(fault) for fault in caught.value.faults]
    return [str(fault) for fault in caught.value.faults]


def fault(text: str) -> str:
    only = faults(text)
    assert len(only) == 1, only
    return only[0]


def of_worker(members: str) -> str:
    """The one fault of a worker with these members; columns count from the worker's line."""
    return fault('{"workers": [\n{"host": "h", ' + members + "}]}")


def worker(**members: object) -> Worker:
    return parse(json.dumps({"workers": [members]}), "f.json").workers[0].worker()


# What is right ...


def test_the_published_form_describes_a_worker():
    assert parse(EXAMPLE, "f.json").workers[0].worker() == Worker(
        id="mac-studio",
        type="lm_studio",
        url="http://192.168.1.20:1234",
        cap=5,
        only=frozenset({"qwen2.5-7b-instruct"}),
    )


@pytest.mark.parametrize(
    ("type_name", "port", "cap"),
    [
        *(("agent", 4100, None), ("ollama", 11434, 5), ("lm_studio", 1234, 5), ("openai", 8000, 5)),
        *(("llama_cpp", 8080, 5), ("vllm", 8000, 5)),
    ],
)
def test_a_host_and_a_type_are_enough(type_name, port, cap):
    assert worker(host="box", type=type_name) == Worker(
        id=f"box:{port}",
        type=type_name,
        url=f"{'https' if type_name == 'agent' else 'http'}://box:{port}",
        cap=cap,
    )


def test_a_worker_without_a_type_speaks_openais_api():
    assert worker(host="box").type == "openai"


@pytest.mark.parametrize("host", ["fd00::2", "[fd00::2]"])
def test_an_ipv6_host_stands_in_brackets_in_the_url(host):
    assert worker(host=host, tls=True).url == "https://[fd00::2]:8000"


@pytest.mark.parametrize(
    ("type_name", "url", "found"),
    [
        ("openai", "http://box", "http://box:8000"),
        ("openai", "https://api.example.com", "https://api.example.com:443"),
        ("openai", "https://api.example.com:8443/api/v1/", "https://api.example.com:8443/api/v1"),
        ("vllm", "http://[fd00::2]:9/v1", "http://[fd00::2]:9/v1"),
        ("ollama", "http://box/", "http://box:11434"),
    ],
)
def test_a_url_says_it_all(type_name, url, found):
    assert worker(url=url, type=type_name).url == found


def test_a_private_ca_belongs_to_a_worker():
    assert worker(host="box", tls=True, ca_file="lab.pem").ca_file == "lab.pem"


KEY = {"env": "K"}


def test_a_remote_api_offers_what_is_named_and_nothing_else():
    found = worker(
        type="openai", url="https://api.example.com", fallback=True, api_key=KEY, models={"a": "b"}
    )
    assert found == Worker(
        id="api.example.com:443",
        type="openai",
        url="https://api.example.com:443",
        cap=5,
        aliases=(("a", "b"),),
        fallback=True,
    )


def test_azure_and_anthropic_are_always_fallbacks():
    azure = worker(
        type="azure",
        url="https://n.openai.azure.com",
        api_version="2024-10-21",
        api_key=KEY,
        models={"a": "our-gpt"},
    )
    assert (azure.fallback, azure.api_version) == (True, "2024-10-21")
    claude = worker(type="anthropic", api_key=KEY, models={"a": "claude-sonnet-4-5"})
    assert (claude.fallback, claude.url) == (True, "https://api.anthropic.com:443")


@pytest.mark.parametrize(
    ("members", "headers"),
    [
        ({"host": "h"}, {"Authorization": "Bearer k"}),
        ({"host": "h", "type": "llama_cpp"}, {"Authorization": "Bearer k"}),
        ({"type": "azure", "url": "https://n.openai.azure.com", "models": {"a": "b"}}, {"api-key": "k"}),
        (
            {"type": "anthropic", "models": {"a": "b"}},
            {"x-api-key": "k", "anthropic-version": "2023-06-01"},
        ),
    ],
)
def test_a_key_is_sent_as_the_type_wants_it(members, headers):
    entry = parse(json.dumps({"workers": [members | {"api_key": KEY}]}), "f").workers[0]
    assert entry.headers("k") == headers


def test_comments_trailing_commas_and_a_byte_order_mark_are_forgiven():
    text = '\ufeff// one\n{"port": 1, /* two\n lines */ "workers": [{"host": "a"},],}'
    assert parse(text, "f.json").port == 1


def test_what_looks_like_a_comment_within_text_is_text():
    file = parse('{"$schema": "https://x/*y*/", "workers": []}', "f.json")
    assert file.schema_ == "https://x/*y*/"


def test_what_is_left_out_stays_at_its_default():
    assert parse("{}", "f.json") == ConfigFile()


def test_a_key_is_referred_to_and_never_stands_in_the_file():
    entry = parse('{"workers": [{"host": "h", "api_key": {"env": "K"}}]}', "f").workers[0]
    assert entry.api_key == SecretReference(env="K")


@pytest.mark.parametrize("name", ["balancer.json", "workers.example.json"])
def test_the_files_that_are_shipped_load(name):
    read(ROOT / "configs" / name)


def test_the_shipped_settings_show_every_key_with_its_default():
    file = read(ROOT / "configs" / "balancer.json")
    assert file == ConfigFile()
    assert file.model_fields_set == set(ConfigFile.model_fields) - {"schema_"}
    assert file.scorer_weights.root == POLICIES[DEFAULT_POLICY].weights


def test_the_policies_are_those_of_the_core():
    settings = ConfigFile()
    assert settings.policy == DEFAULT_POLICY
    schema = ConfigFile.model_json_schema()
    assert schema["properties"]["policy"]["enum"] == list(POLICIES)
    assert set(schema["$defs"]["ScorerWeights"]["properties"]) == set(SCORERS)


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_are_left_out_are_the_policys_own(policy):
    assert parse(json.dumps({"policy": policy}), "f").scorer_weights.root == POLICIES[policy].weights
    first = next(iter(POLICIES[policy].weights))
    file = parse(json.dumps({"scorer_weights": {first: 0.75}, "policy": policy}), "f")
    expectation = PlacementPolicy(policy, {first: 0.75}).effective_weights()
    assert file.scorer_weights.root == expectation


def test_an_alias_is_a_public_name_for_one_of_the_workers_own():
    found = worker(host="h", type="ollama", aliases={"qwen": "qwen2.5:7b", "small": "llama3.2"})
    assert found.aliases == (("qwen", "qwen2.5:7b"), ("small", "llama3.2"))
    assert found.only == frozenset()


def test_an_alias_of_the_configured_model_may_leave_out_ollamas_default_tag():
    found = worker(host="h", type="ollama", model="llama3.2", aliases={"a": "llama3.2:latest"})
    assert found.only == {"llama3.2"}
    assert found.aliases == (("a", "llama3.2"),)  # the name under which it is offered


def test_the_shipped_example_has_one_worker_of_each_type_of_the_room():
    file = read(ROOT / "configs" / "workers.example.json")
    rows = [name for name, row in WORKER_TYPES.items() if not row.is_remote]
    assert sorted(entry.type for entry in file.workers) == sorted(rows)


def test_the_remote_apis_of_the_shipped_example_are_commented_out_and_right():
    text = (ROOT / "configs" / "workers.example.json").read_text()
    file = parse(re.sub(r"^    // ?(?=  |[{}])", "    ", text, flags=re.MULTILINE), "f.json")
    remote = [entry.type for entry in file.workers if entry.is_fallback]
    assert sorted(remote) == ["anthropic", "azure", "openai"]


def test_every_key_is_described_in_the_json_schema():
    schema = ConfigFile.model_json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert [
        key for one in objects for key, rule in one["properties"].items() if "description" not in rule
    ] == []


def test_the_published_schema_is_that_of_the_file():
    """Write it anew by: balancer config schema > configs/balancer.schema.json"""
    assert (ROOT / "configs" / "balancer.schema.json").read_text() == published_schema()


# What is wrong, and where ...


@pytest.mark.parametrize(
    ("members", "expectation"),
    [
        ('"prot": 1', 'f.json:2:15: unknown key "prot", did you mean "port"?'),
        ('"type": "LM-Studio"', 'f.json:2:23: "type" is "LM-Studio": expected one of "agent", '),
        ('"type": "lmstudio"', 'did you mean "lm_studio"?'),
        ('"type": "zzz"', '(default "openai")'),
        ('"port": "1"', 'f.json:2:23: "port" is "1": expected a whole number from 1 to 65535'),
        ('"port": 70000', '"port" is 70000: expected a whole number from 1 to 65535'),
        ('"port": 1.5', '"port" is 1.5: expected a whole number'),
        ('"port": true', '"port" is true: expected a whole number'),
        ('"max_concurrent_requests": 0', "expected a whole number from 1 to 4096"),
        ('"api_key": "sk-1"', 'write {"env": "NAME"} or {"file": "PATH"}'),
        ('"api_key": {}', "exactly one of"),
        ('"type": "ollama", "api_key": {"env": "A"}', 'anthropic; this worker is of type "ollama"'),
        ('"url": "http://x"', 'f.json:2:2: "url" says it all: leave out "host"'),
        ('"ca_file": "x.pem"', 'f.json:2:15: ca_file is for https: add "tls": true'),
        ('"fallback": true', 'f.json:2:1: "api_key" is missing: a remote API is used with a key only'),
        ('"fallback": true, "api_key": {"env": "A"}', 'f.json:2:1: "models" is missing: expected what may'),
        ('"models": {"a": "b"}', 'f.json:2:15: "models" is for a fallback: use "aliases"'),
        ('"type": "vllm", "fallback": true', "f.json:2:43: type vllm is of the room: a fallback is of type"),
        ('"type": "azure", "fallback": false', "f.json:2:44: type azure is always a fallback"),
        ('"api_version": "2024-10-21"', "f.json:2:15: api_version is for type azure"),
        ('"type": "azure", "api_version": "new"', "expected one like 2024-10-21"),
        (
            '"fallback": true, "api_key": {"env": "A"}, "models": {"a": "b"}, "aliases": {"c": "d"}',
            'a fallback has no "aliases": its names stand in "models"',
        ),
        (
            '"fallback": true, "api_key": {"env": "A"}, "models": {"a": "b"}, "continues": true',
            'f.json:2:80: a fallback has no "continues"',
        ),
        (
            '"type": "anthropic", "api_key": {"env": "A"}, "models": {"a": "b"}',
            "spoken to over https only",
        ),
        (
            '"type": "azure", "tls": true, "api_key": {"env": "A"}, "models": {"a": "b/c"}, '
            '"api_version": "2024-10-21"',
            'f.json:2:86: "b/c" is no name of a deployment',
        ),
        ('"id": " "', '" " holds nothing'),
        ('"id": "a\\nb"', "cannot be printed"),
        ('"model": ""', "1 to 128 characters"),
        ('"aliases": {"a": ""}', 'f.json:2:32: "a" is "": expected text in double quotes, 1 to 128'),
        ('"aliases": {"": "m"}', 'f.json:2:27: the name "" cannot be used: expected 1 to 128 printable'),
        ('"aliases": {"a\\tb": "m"}', "f.json:2:27: the name"),
        ('"aliases": {"a": "b\\tc"}', "f.json:2:32: "),
        ('"aliases": ["a"]', '"aliases" is a list: expected an object in { } of names, each with text in'),
        (
            '"model": "qwen-7b", "aliases": {"a": "qwen-7b", "b": "qwen-7"}',
            'f.json:2:68: the alias "b" is for "qwen-7", but "model" of this worker is "qwen-7b",'
            ' did you mean "qwen-7b"?',
        ),
        (
            '"model": "llama3.2", "aliases": {"a": "llama3.2:latest"}',
            "did you mean",
        ),
        ('"model": "m", "aliases": {"a": "zzz"}', 'is "m": name that, or leave "model" out'),
        ('"tls": 1', '"tls" is 1: expected true or false'),
    ],
)
def test_a_fault_of_a_worker_says_where_what_and_what_instead(members, expectation):
    assert expectation in of_worker(members)


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("http://192.168.1.20:1234/v1", 'the host alone: write "192.168.1.20"'),
        ("https://api.example", 'write "api.example", and "tls": true'),
        ("192.168.1.20:1234", '"host": "192.168.1.20", "port": 1234'),
        ("my mac", "is not a host"),
        ("a/b", "is not a host"),
        ("fe80::1%a/b", "is not a host"),
        ("", "1 to 253 characters"),
    ],
)
def test_a_host_that_is_more_than_a_host_is_taken_apart_in_the_advice(host, advice):
    assert advice in fault(json.dumps({"workers": [{"host": host}]}))


@pytest.mark.parametrize(
    ("members", "expectation"),
    [
        ({"url": "api.example.com"}, 'f.json:1:22: "api.example.com" is not a url: expected one like https'),
        ({"url": "https://me:secret@api.example.com"}, '"https://api.example.com" is not a url'),
        ({"url": "https://secret@api.example.com"}, '"https://api.example.com" is not a url'),
        ({"url": "https://" + "secret" * 200 + "@api.example.com"}, '"url" is a text of 1224 characters'),
        ({"host": "me:secret@box"}, 'expected the host alone, without a user: "box"'),
        ({"host": "me:secret@box:80"}, 'expected the host alone, without a user: "box:80"'),
        ({"url": "https://api.example.com/v1?key=secret"}, '"https://api.example.com" is not a url'),
        ({"url": "ftp://api.example.com"}, "is not a url"),
        ({"url": "http://h:99999"}, "99999 is not a port"),
        ({"url": "http://h:80/a b"}, "is not a url"),
        ({"url": "http://h:80/x", "type": "agent"}, 'an agent has no path: expected the url without "/x"'),
        (
            {"type": "azure"},
            'f.json:1:14: "url" is missing: expected one like "https://NAME.openai.azure.com"',
        ),
    ],
)
def test_a_url_that_cannot_be_one_is_a_fault_without_its_secrets(members, expectation):
    told = fault(json.dumps({"workers": [members]}))
    assert expectation in told
    assert "secret" not in told


def test_one_api_listed_twice_is_a_fault_and_two_paths_of_one_host_are_two():
    twice = [{"url": "https://h/a/v1"}, {"url": "https://h:443/a/v1/", "id": "x"}]
    assert '"h:443/a/v1" is the worker of line 1 already' in fault(json.dumps({"workers": twice}))
    beside = [{"url": "https://h/a/v1"}, {"url": "https://h/b/v1", "id": "x"}]
    assert len(parse(json.dumps({"workers": beside}), "f").workers) == 2


@pytest.mark.parametrize(
    ("text", "expectation"),
    [
        ("", 'f.json:1:1: nothing in here: expected {"workers": [...]}'),
        (" \n// only a comment", "f.json:1:1: nothing in here"),
        ('{"port": 1', "f.json:1:11: the file ends here too early: expected a comma or }"),
        ('{"workers": [', "expected a value or ]"),
        ('{"port" 1}', "f.json:1:9: 1 does not belong here: expected :"),
        ('{"port": }', "f.json:1:10: } does not belong here: expected a value"),
        ("{}\n}", "f.json:2:1: } does not belong here: expected the end of the file"),
        ('{"port": 1\n"mdns": true}', 'f.json:2:1: expected a comma before "mdns"'),
        ('{"data_dir": "C:\\home"}', "f.json:1:14: "),
        ('{"data_dir": "x}', "f.json:1:14: the text that begins here has no closing"),
        ("{} /* x", "f.json:1:4: the comment that begins here has no end"),
        ('{"port": @}', 'f.json:1:10: "@" does not belong here'),
        ("{'port': 1}", 'f.json:1:2: expected double quotes around a key: "port"'),
        ("{port: 1}", 'f.json:1:2: expected double quotes around a key: "port"'),
        ('{"mdns": True}', "f.json:1:10: True is not a value of JSON, did you mean true?"),
        ('{"data_dir": None}', "did you mean null?"),
        ('{"data_dir": here}', 'did you mean "here"?'),
        ('{"port": 0x10}', "0x10 is not a number of JSON"),
        ('{"port": 007}', "007 is not a number of JSON"),
        ('{"max_wait": 1e999}', '"max_wait" is Infinity'),
        ('{"port": ' + "9" * 5000 + "}", "is not a number of JSON"),
        ('{"port": 1,\n "port": 2}', 'f.json:2:2: "port" stands in line 1 already'),
        ('{"data_dir": "\\ud800"}', "half of a surrogate pair"),
        ("[]", 'f.json:1:1: the file is a list: expected an object like {"workers": [...]}'),
        ("[" * 5000 + "]" * 5000, "nested more than 32 levels deep"),
        ('{"workers": [7]}', "f.json:1:14: workers[0] is 7: expected an object in { } with host, port"),
        ('{"workers": [{}]}', 'f.json:1:14: "host" is missing: expected the name or address of a machine'),
        ('{"workers": {}}', '"workers" is an object: expected a list'),
        ('{"scorer_weights": {"reliability": 0, "expected_latency": 0}}', "every scorer weighs 0"),
        (
            '{"policy": "weighted_random",\n"scorer_weights": {"success_rate": 1, "availabilty": 1}}',
            'f.json:2:39: the policy "weighted_random" has no scorer "availabilty": expected'
            " availability or success_rate or response_time",
        ),
        (
            '{"policy": "round_robin", "scorer_weights": {"availability": 1}}',
            'f.json:1:46: the policy "round_robin" has no scorer "availability": expected rest',
        ),
        (
            '{"scorer_weights": {"reliability": -1}}',
            'f.json:1:36: "reliability" is -1: expected a number from',
        ),
        (
            '{"policy": "fast", "scorer_weights": {"x": 1}}',
            'expected one of "expected_latency", "weighted_random", "least_loaded", "round_robin"',
        ),
        ('{"batch_floor": 0.6}', "expected a number from 0 to 0.5 (default 0.05)"),
        ('{"zzzzzz": 1}', "expected one of host, port"),
        ("x" * (MAX_FILE_BYTES + 1), "longer than"),
    ],
)
def test_a_fault_of_the_text_says_where_what_and_what_instead(text, expectation):
    assert expectation in fault(text)


def test_all_faults_are_told_in_the_order_of_the_file():
    told = faults(
        '{"port": 0,\n"mdsn": true\n"workers": [{"host": "a", "port": 1}, {"host": "A", "port": 1}]}'
    )
    assert [line.split(": ")[0] for line in told] == [
        "f.json:1:10",
        "f.json:2:1",
        "f.json:3:1",
        "f.json:3:48",
    ]


def test_one_id_for_two_workers_is_a_fault_even_on_one_line():
    assert 'the id "x" is taken by the worker of line 1' in fault(
        '{"workers": [{"host": "a", "id": "x"}, {"host": "b", "id": "x"}]}'
    )


def test_an_id_may_not_be_what_another_worker_is_called_by_default():
    assert "is taken" in fault('{"workers": [{"host": "a"}, {"host": "b", "id": "a:8000"}]}')


def test_one_server_listed_twice_is_a_fault_also_when_the_port_is_left_out_once():
    text = (
        '{"workers": [{"host": "a", "type": "ollama", "id": "x"},\n{"host": "a", "port": 11434, "id": "y"}]}'
    )
    assert fault(text) == 'f.json:2:10: "a:11434" is the worker of line 1 already'


def test_a_file_full_of_faults_is_told_in_bounded_length():
    with pytest.raises(ConfigFaults) as caught:
        parse('{"workers": [' + "{}," * 500 + "]}", "f.json")
    lines = str(caught.value).splitlines()
    assert len(caught.value.faults) == 500
    assert len(lines) == MAX_FAULTS + 1
    assert lines[-1] == f"... and {500 - MAX_FAULTS} more faults"


@pytest.mark.parametrize(
    ("content", "expectation"),
    [
        (None, ": there is no such file"),
        (b'{\n"id": "\xff"}', ":2:8: byte 0xff is not UTF-8"),
        (b" " * (MAX_FILE_BYTES + 1), ": longer than"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_fault(tmp_path, content, expectation):
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigFaults) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{expectation}")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigFaults, match="cannot be read"):
        read(tmp_path)


def test_bounds_are_told_in_words():
    assert expected(("port",)) == "a whole number from 1 to 65535 (default 4000)"
    assert expected(("max_wait",)) == "a number from 0.1 to 86400 (default 120.0)"


# Any text ...

PIECES = [
    '{"workers":[',
    '{"host":"h"',
    '"port"',
    ":",
    ",",
    "}",
    "]",
    "{",
    "[",
    "1",
    "-0.5e3",
    "true",
    "None",
]
PIECES += [
    "'x'",
    '"',
    "\\",
    "//",
    "/*",
    "*/",
    '"\\u12',
    "é",
    '"id":"a"',
    "\n",
    "\r\n",
    " ",
    "\ufeff",
    "\ud800",
]


@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_is_a_file_or_has_faults_within_it(text):
    try:
        parse(text, "f.json")
    except ConfigFaults as caught:
        assert caught.faults
        lines = text.removeprefix("\ufeff").split("\n")
        for one in caught.faults:
            assert one.place is not None
            assert 1 <= one.place.line <= len(lines)
            assert 1 <= one.place.column <= len(lines[one.place.line - 1]) + 1
            assert str(one).encode()  # no half characters, which no terminal takes


@given(
    st.integers(1, 65535), st.sampled_from(["agent", "ollama", "lm_studio", "openai"]), st.integers(1, 4096)
)
def test_what_is_written_is_what_is_read(port, kind, cap):
    found = worker(host="h", port=port, type=kind, max_concurrent_requests=cap)
    scheme = "https" if kind == "agent" else "http"
    assert (found.url, found.type, found.cap) == (f"{scheme}://h:{port}", kind, cap)
