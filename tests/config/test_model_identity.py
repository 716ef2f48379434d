"""Which models are taken for the same one, and which are never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.model import Condition, ModelName, ModelOffer
from balancer.identity import (
    MAX_CHARACTERS,
    automatic_name,
    conflicts,
    identity,
    ollama_identity,
    with_automatic_names,
)


@pytest.mark.parametrize(
    ("name", "expectation"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen2.5-7b-instruct q4_k_m"),
        ("/models/Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen2.5-7b-instruct q4_k_m"),
        ("qwen2.5:7b-instruct-q4_K_M", "qwen2.5-7b-instruct q4_k_m"),
        ("qwen2.5-7b-instruct@q4_k_m", "qwen2.5-7b-instruct q4_k_m"),
        ("hf.co/bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M", "qwen2.5-7b-instruct q4_k_m"),
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "qwen2.5-7b-instruct 4bit"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "qwen2.5-7b-instruct awq"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen2.5-7b-instruct gptq-int4"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "qwen2.5-7b-instruct bnb-4bit"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct q4_1"),
        ("Meta-Llama-3.1-8B-Instruct-Q8_0.gguf", "llama3.1-8b-instruct q8_0"),
        ("llama3.1:8b-instruct-q8_0", "llama3.1-8b-instruct q8_0"),
        ("gemma-2-9b-it-IQ2_XXS", "gemma2-9b-it iq2_xxs"),
        ("Mixtral-8x7B-Instruct-v0.1-Q4_K_M-00001-of-00002.gguf", "mixtral-8x7b-instruct-v0.1 q4_k_m"),
        ("lmstudio-community/Qwen3-30B-A3B-Instruct-2507-MLX-4bit", "qwen3-30b-a3b-instruct-2507 4bit"),
        ("m-7b-FP16", "m-7b f16"),
        ("m-7b-f16", "m-7b f16"),
    ],
)
def test_the_ways_to_write_one_model_have_one_identity(name, expectation):
    assert identity(name) == expectation


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("m-7b-q4_k_m", "m-7b-q4_k_s"),
        ("m-7b-Q4_K_M", "m-7b-UD-Q4_K_M"),
        ("m-7b-4bit", "m-7b-4bit-DWQ"),
        ("m-7b-4bit", "m-7b-bnb-4bit"),
        ("m-7b-bf16", "m-7b-f16"),
        ("m-7b-instruct-q4_0", "m-7b-q4_0"),
        ("m-7b-instruct-q4_0", "m-7b-instruct-abliterated-q4_0"),
        ("m-7b-q4_0", "m-7b-q4_0-my-finetune"),
        ("m-7b-q4_0", "m-70b-q4_0"),
        ("m1.5-7b-q4_0", "m15-7b-q4_0"),
    ],
)
def test_what_may_be_another_model_has_another_identity(one, other):
    assert identity(one)
    assert identity(other)
    assert identity(one) != identity(other)


@pytest.mark.parametrize(
    "name",
    [
        "model.gguf",
        "ggml-model-q4_0.gguf",
        "gpt-4o",
        "Qwen/Qwen2.5-7B-Instruct",
        "4bit",
        "7b",
        "modèle-7b-q4_0",
        "m 7b q4_0\n",
        "m-7b-q4_" + "x" * 400,
        "a" * 200 + "-7b-q4_0",
        "",
    ],
)
def test_a_name_that_does_not_tell_enough_has_no_identity(name):
    assert identity(name) == ""


@pytest.mark.parametrize(
    ("told", "expectation"),
    [
        ("Q4_K - Medium", "m-7b q4_k_m"),
        ("Q3_K - Large", "m-7b q3_k_l"),
        ("(guessed) Q8_0", "m-7b q8_0"),
        ("all F32", "m-7b f32"),
        ("IQ2_XXS - 2.0625 bpw", "m-7b iq2_xxs"),
        ("4bit", "m-7b 4bit"),
        ("unknown", ""),
        ("", ""),
        ("Q4_0 \x1b", ""),
    ],
)
def test_a_quantisation_that_is_told_apart_counts_where_the_name_has_none(told, expectation):
    assert identity("m-7b", told) == expectation
    assert identity("m-7b-q5_0", told) == "m-7b q5_0"


def test_a_name_of_ollama_without_a_variant_equals_only_another_of_ollama():
    bare = ollama_identity("llama3.2:3b", "3.2B", "Q4_K_M")
    assert bare == ollama_identity("llama3.2:latest", "3.2B", "Q4_K_M") == "ollama/llama3.2-3.2b q4_k_m"
    assert bare != identity("meta-llama/Llama-3.2-3B-Q4_K_M")
    whole = ollama_identity("llama3.2:3b-instruct-q4_K_M", "3.2B", "Q4_K_M")
    assert whole == identity("Llama-3.2-3B-Instruct-Q4_K_M.gguf")


@pytest.mark.parametrize("name", ["", "é", ":latest", "modèle:7b"])
def test_a_name_of_ollama_that_cannot_be_read_has_no_identity_whatever_else_is_told(name):
    assert ollama_identity(name, "7B", "Q4_0") == ""


@given(st.text(max_size=60), st.text(max_size=20), st.text(max_size=20))
def test_any_name_has_a_bounded_plain_identity_of_two_words_or_none(name, size, told):
    for found in (identity(name, told), ollama_identity(name, size, told)):
        assert found == "" or (len(found.split(" ")) == 2 and found.isascii() and found.isprintable())
        assert len(found) <= MAX_CHARACTERS


@given(st.from_regex(r"[a-z]{2,8}-[1-9]b(-instruct)?-(q4_k_m|8bit|awq|gptq-int4)", fullmatch=True))
def test_an_automatic_name_tells_the_identity_that_it_was_made_of(name):
    assert identity(automatic_name(identity(name))) == identity(name) != ""


# Names in the room ...


def offer(name: str, of: str = "", **more: object) -> ModelOffer:
    return ModelOffer(name=ModelName(name), identity=of, **more)


def test_workers_with_one_model_offer_it_under_one_automatic_name():
    mac, box = (
        with_automatic_names(Condition(models=(offer(name, identity(name)),)))
        for name in ("Qwen2.5-7B-Instruct-Q4_K_M", "qwen2.5:7b-instruct-q4_K_M")
    )
    shared = {one.name for one in mac.models} & {one.name for one in box.models}
    assert shared == {"qwen2.5-7b-instruct~q4_k_m"}
    assert [one.known_as for one in box.models] == [None, "qwen2.5:7b-instruct-q4_K_M"]


def test_different_quantisations_share_no_automatic_name():
    names = {
        one.name
        for name in ("m-7b-q4_0", "m-7b-q8_0")
        for one in with_automatic_names(Condition(models=(offer(name, identity(name)),))).models
    }
    assert names == {"m-7b-q4_0", "m-7b-q8_0", "m-7b~q4_0", "m-7b~q8_0"}


def test_a_model_of_unknown_identity_gets_no_automatic_name():
    condition = Condition(models=(offer("m"),))
    assert with_automatic_names(condition) == condition


def test_of_two_names_of_one_model_the_loaded_one_is_asked_for():
    condition = Condition(models=(offer("a", "m-7b q4_0", loaded=False), offer("b", "m-7b q4_0")))
    assert with_automatic_names(condition).models[2:] == (
        offer("m-7b~q4_0", "m-7b q4_0", known_as=ModelName("b"), automatic=True),
    )


def test_an_automatic_name_keeps_the_way_to_the_workers_own():
    condition = Condition(models=(offer("short", "m-7b q4_0", known_as=ModelName("short:latest")),))
    assert with_automatic_names(condition).models[1].known_as == "short:latest"


def test_a_name_that_a_worker_uses_itself_stays_its_own():
    condition = Condition(models=(offer("m-7b~q4_0"), offer("m", "m-7b q4_0")))
    assert with_automatic_names(condition) == condition


@pytest.mark.parametrize(
    ("identities", "told"),
    [
        (("m-7b q4_0", "m-7b q4_0"), False),
        (("m-7b q4_0", ""), False),
        (("m-7b q4_0", "m-7b q8_0"), True),
        (("m-7b q4_0", "n-7b q4_0"), True),
        (("ollama/m-7.6b q4_0", "m-7b-instruct q4_0"), False),
        (("ollama/m-7.6b q4_0", "m-7b-instruct q8_0"), True),
        (("ollama/m-7.6b q4_0", "ollama/n-7.6b q4_0"), True),
    ],
)
def test_one_name_for_different_models_is_told(identities, told):
    sentences = conflicts({ModelName("chat"): [offer("chat", of) for of in identities]})
    assert len(sentences) == told


def test_a_conflict_says_what_to_do_next():
    served = {ModelName("chat"): [offer("chat", "m-7b q8_0"), offer("chat", "m-7b q4_0")]}
    told = '"chat" is not the same model on all workers: m-7b q4_0, m-7b q8_0. '
    assert conflicts(served) == [told + 'Name them apart with "aliases".']
    served[ModelName("m-7b~q4_0")] = [offer("m-7b~q4_0", "m-7b q4_0")]
    assert conflicts(served) == [
        told + 'Ask for m-7b~q4_0 to get that one alone, or name them apart with "aliases".'
    ]
