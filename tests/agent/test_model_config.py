"""What is read from a model folder's config.json, as the hub has them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.model_config import facts
from worker_agent.models.local import Facts

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


def test_grouped_heads_are_counted_as_they_are_kept() -> None:
    assert facts(QWEN) == Facts(cache_bytes_per_token=28 * 4 * 128 * 2 * 2, context_tokens=32768)


def test_heads_of_their_own_width_are_counted_by_it() -> None:
    assert facts(QWEN | {"head_dim": 256}).cache_bytes_per_token == 28 * 4 * 256 * 2 * 2


def test_without_grouped_heads_each_head_keeps_its_own() -> None:
    config = {key: value for key, value in QWEN.items() if key != "num_key_value_heads"}
    assert facts(config).cache_bytes_per_token == 28 * 28 * 128 * 2 * 2


def test_sliding_windows_are_counted_as_if_they_kept_everything() -> None:
    window = {"sliding_window": 1024, "layer_types": ["sliding_attention"] * 28}
    assert facts(QWEN | window).cache_bytes_per_token == facts(QWEN).cache_bytes_per_token


def test_latent_attention_keeps_a_narrow_row_counted_twice() -> None:
    config = QWEN | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert facts(config).cache_bytes_per_token == 2 * 61 * 576 * 2


def test_wide_numbers_take_twice_as_much() -> None:
    wide = facts(QWEN | {"torch_dtype": "float32"}).cache_bytes_per_token
    assert wide == 2 * 28 * 4 * 128 * 2 * 2


def test_a_model_that_sees_is_asked_for_its_language_part() -> None:
    config = {"model_type": "gemma3", "text_config": QWEN, "vision_config": {"num_hidden_layers": 27}}
    assert facts(config) == facts(QWEN)


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "4-bit"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq 4-bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({}, ""),
    ],
)
def test_a_quantization_is_named(config: dict[str, Any], quantization: str) -> None:
    assert facts(config).quantization == quantization


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from([*QWEN, "text_config", "quantization", "head_dim", "dtype"]), json_values)
)
def test_any_configuration_is_read_without_harm(config: dict[str, Any]) -> None:
    found = facts(QWEN | config)
    assert found.cache_bytes_per_token is None or found.cache_bytes_per_token > 0
