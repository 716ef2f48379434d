"""Which files of a repository are fetched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.models.local import Format
from worker_agent.models.selection import (
    HubFile,
    NothingToFetch,
    Selection,
    quantization,
    refused_config,
    select,
    shard_names,
)

GIB = 2**30
SIZES = {"Q2_K": 3, "Q3_K_M": 4, "Q4_0": 4.4, "Q4_K_M": 5, "Q5_K_M": 6, "Q8_0": 8, "F16": 15}
SIZED = [
    HubFile(name=f"m-{kind}.gguf", size=int(size * GIB), blob_id="0" * 40) for kind, size in SIZES.items()
]


def files(*names: str) -> list[HubFile]:
    return [HubFile(name=name, size=10, blob_id="0" * 40) for name in names]


def names(selection: Selection) -> list[str]:
    return [file.name for file in selection.files]


@pytest.mark.parametrize(
    ("limit_gib", "expected"),
    [(None, "Q4_K_M"), (100, "Q4_K_M"), (4.5, "Q4_0"), (4.2, "Q3_K_M"), (3.5, "Q2_K")],
)
def test_the_best_quantisation_that_fits(limit_gib: float | None, expected: str) -> None:
    limit = None if limit_gib is None else int(limit_gib * GIB)
    assert select("a/b", SIZED, formats=[Format.GGUF], limit_bytes=limit).quantization == expected


def test_where_none_fits_the_numbers_are_told() -> None:
    with pytest.raises(
        NothingToFetch, match=r"the smallest that a/b offers takes 3.0 GiB.*may take 2.0 GiB here"
    ):
        select("a/b", SIZED, formats=[Format.GGUF], limit_bytes=2 * GIB)


def test_a_file_that_was_named_comes_whether_it_fits_or_not() -> None:
    chosen = select("a/b", SIZED, formats=[Format.GGUF], wanted="F16", limit_bytes=GIB)
    assert names(chosen) == ["m-F16.gguf"]
    assert names(select("a/b", SIZED, formats=[], wanted="m-Q8_0.gguf")) == ["m-Q8_0.gguf"]


def test_a_quantisation_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(NothingToFetch, match=r"has no GGUF file 'Q6_K'; it has Q4_K_M, Q4_0, Q5_K_M"):
        select("a/b", SIZED, formats=[Format.GGUF], wanted="Q6_K")


def test_where_the_usual_ones_are_missing_a_larger_comes_before_one_that_lost_much() -> None:
    offered = files("m-Q2_K.gguf", "m-Q8_0.gguf", "m-F32.gguf")
    assert select("a/b", offered, formats=[Format.GGUF]).quantization == "Q8_0"


def test_split_files_come_whole_or_not_at_all() -> None:
    whole = [f"Q4_K_M/m-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    chosen = select("a/b", files(*reversed(whole), "m-Q8_0.gguf"), formats=[Format.GGUF])
    assert (names(chosen), chosen.main) == (whole, whole[0])
    lacking = select("a/b", files(*whole[:2], "m-Q8_0.gguf"), formats=[Format.GGUF])
    assert names(lacking) == ["m-Q8_0.gguf"]


def test_parts_of_a_model_that_sees_are_no_model() -> None:
    offered = files("mmproj-Q4_K_M.gguf", "imatrix_Q4_K_M.gguf", "m-Q8_0.gguf")
    assert names(select("a/b", offered, formats=[Format.GGUF])) == ["m-Q8_0.gguf"]


FOLDER = ("config.json", "model.safetensors", "tokenizer.json")


def test_the_first_format_that_the_engines_read_and_the_repository_has() -> None:
    both = files(*FOLDER, "m-Q4_K_M.gguf")
    assert (
        select("a/b", both, formats=[Format.MLX, Format.SAFETENSORS, Format.GGUF]).format
        is Format.SAFETENSORS
    )
    assert select("a/b", both, formats=[Format.GGUF]).format is Format.GGUF
    tagged = select("a/b", both, tags=["mlx"], formats=[Format.MLX, Format.GGUF])
    assert (tagged.format, names(tagged)) == (Format.MLX, sorted(FOLDER))


def test_where_the_best_format_does_not_fit_the_next_one_does() -> None:
    heavy = [HubFile(name=name, size=20 * GIB, blob_id="0" * 40) for name in FOLDER]
    chosen = select("a/b", [*heavy, *SIZED], formats=[Format.SAFETENSORS, Format.GGUF], limit_bytes=10 * GIB)
    assert chosen.quantization == "Q4_K_M"


def test_formats_that_nothing_here_reads() -> None:
    with pytest.raises(NothingToFetch, match="has its weights as safetensors; the engines here read gguf"):
        select("a/b", files(*FOLDER), formats=[Format.GGUF])
    with pytest.raises(NothingToFetch, match="as mlx; the engines here read gguf"):
        select("a/b", files(*FOLDER), tags=["mlx"], formats=[Format.GGUF])


def test_a_folder_brings_its_tokenizer_and_templates_and_no_second_copy() -> None:
    extra = ("merges.txt", "vocab.json", "tokenizer.model", "chat_template.jinja", "1_Pooling/config.json")
    never = (
        *("consolidated.safetensors", "tokenizer.py", "tokenizer.pkl", "model.pt", "training_args.bin"),
        *(
            "onnx/model.json",
            "original/params.json",
            ".gitattributes",
            "LICENSE",
            "model.json",
            "coreml/x.model",
        ),
    )
    chosen = select("a/b", files(*FOLDER, *extra, *never), formats=[Format.SAFETENSORS])
    assert set(names(chosen)) == {*FOLDER, *extra}


def test_shards_that_are_not_all_there() -> None:
    with pytest.raises(NothingToFetch):
        select("a/b", files("config.json", "model-00001-of-00002.safetensors"), formats=[Format.SAFETENSORS])


def test_names_that_a_disk_may_take_for_one() -> None:
    with pytest.raises(NothingToFetch, match="some disks take for one"):
        select("a/b", files(*FOLDER, "Tokenizer.json"), formats=[Format.SAFETENSORS])


CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py", ".so", ".sh", ".exe", ".zip", ".h5", ".msgpack")


@given(
    st.lists(
        st.sampled_from(CODE).flatmap(
            lambda end: st.from_regex(r"[a-z./]{1,8}", fullmatch=True).map(lambda s: s + end)
        )
    )
)
def test_nothing_that_could_hold_code_is_ever_chosen(more: list[str]) -> None:
    try:
        chosen = select("a/b", files(*FOLDER, *set(more)), formats=[Format.SAFETENSORS, Format.GGUF])
    except NothingToFetch:
        return
    assert set(names(chosen)) == set(FOLDER)


def test_code_is_asked_for_by_auto_map_alone() -> None:
    assert refused_config("config.json", b'{"model_type": "llama"}') is None
    assert "auto_map" in (refused_config("tokenizer_config.json", b'{"auto_map": {}}') or "")
    assert refused_config("config.json", b"[]") == "config.json is no JSON object"
    assert refused_config("config.json", b"{" * 100_000) == "config.json is not JSON"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-fp16.gguf", "F16"),
        ("Llama-3-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("m.IQ4_XS.gguf", "IQ4_XS"),
        ("SmolLM2.q4_1.gguf", "Q4_1"),
        ("model.gguf", ""),
    ],
)
def test_the_quantisation_stands_in_the_name(name: str, expected: str) -> None:
    assert quantization(name) == expected


def test_the_parts_of_a_split_file() -> None:
    assert shard_names("a-00002-of-00002.gguf") == ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    for whole in ("a.gguf", "a-00000-of-00000.gguf", "a-00003-of-00002.gguf", "a-00001-of-99999.gguf"):
        assert shard_names(whole) == (whole,)
