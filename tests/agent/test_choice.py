from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.engines import ENGINES
from worker_agent.engines.choice import (
    Choice,
    Installed,
    NoChoice,
    Wish,
    choose,
    engine_for,
    outdated,
    preferred_format,
)
from worker_agent.hardware import Gpu, Hardware
from worker_agent.models.local import Format, LocalModel
from worker_agent.wire import ServedModel

GIB = 2**30
LINUX = Hardware(system="Linux", architecture="x86_64", cores=8, memory_bytes=16 * GIB)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 24564 * 2**20)
GPU_BOX = Hardware(system="Linux", architecture="x86_64", cores=16, memory_bytes=64 * GIB, gpus=(RTX_4090,))
MAC = Hardware(system="Darwin", architecture="arm64", cores=8, memory_bytes=16 * GIB, apple_chip="Apple M2")
QUICKSTART = Installed(xllamacpp=True, embedded_model="/site-packages/small.gguf")


def test_a_plain_machine_serves_the_embedded_model_with_llama_cpp() -> None:
    choice = choose(LINUX, QUICKSTART, Wish())
    assert (choice.engine.name, choice.model, choice.name) == (
        "llama.cpp",
        "/site-packages/small.gguf",
        "smollm2-135m-instruct",
    )


def test_a_plain_machine_is_told_how_to_fetch_a_larger_model() -> None:
    [advice] = choose(LINUX, QUICKSTART, Wish()).advice
    assert "uv run worker-agent models download ORG/MODEL" in advice
    assert "uv run worker-agent run --model NAME" in advice


def test_a_gpu_box_without_vllm_works_at_once_and_is_told_the_command_that_does_better() -> None:
    choice = choose(GPU_BOX, QUICKSTART, Wish())
    assert choice.engine.name == "llama.cpp"
    assert choice.advice[0].endswith(
        "uv run --extra vllm worker-agent run --engine vllm --model Qwen/Qwen2.5-14B-Instruct-AWQ"
    )


def test_an_apple_machine_without_mlx_is_told_the_command_that_fits_its_memory() -> None:
    choice = choose(MAC, QUICKSTART, Wish())
    assert choice.engine.name == "llama.cpp"
    assert choice.advice[0].endswith(
        "uv run --extra mlx worker-agent run --engine mlx --model mlx-community/Qwen2.5-7B-Instruct-4bit"
    )


def test_an_installed_engine_without_a_model_downloads_nothing_by_itself() -> None:
    choice = choose(GPU_BOX, Installed(vllm=True, xllamacpp=True, embedded_model="/small.gguf"), Wish())
    assert choice.engine.name == "llama.cpp"
    assert "no model was given" in choice.why
    assert "--engine vllm --model" in choice.advice[0]


@pytest.mark.parametrize(
    ("hardware", "installed", "engine"),
    [(MAC, Installed(mlx=True), "mlx"), (GPU_BOX, Installed(vllm=True), "vllm")],
)
def test_the_best_engine_serves_the_model_that_was_given(
    hardware: Hardware, installed: Installed, engine: str
) -> None:
    choice = choose(hardware, installed, Wish(model="org/Big-Model-4bit"))
    assert (choice.engine.name, choice.model, choice.name) == (engine, "org/Big-Model-4bit", "Big-Model-4bit")


def test_a_gguf_file_goes_to_llama_cpp_even_beside_a_gpu() -> None:
    installed = Installed(vllm=True, xllamacpp=True, llama_server="/usr/bin/llama-server")
    choice = choose(GPU_BOX, installed, Wish(model="models/Big.Q4_K_M.gguf"))
    assert (choice.engine.name, choice.name) == ("llama.cpp", "Big.Q4_K_M")


def test_the_name_is_the_users_to_give() -> None:
    assert choose(LINUX, QUICKSTART, Wish(name="room-model")).name == "room-model"


@pytest.mark.parametrize(
    ("wish", "installed", "says"),
    [
        (Wish(engine="vllm"), QUICKSTART, "vllm is not installed; type: uv run"),
        (Wish(engine="vllm"), Installed(vllm=True), "vllm needs a model"),
        (Wish(engine="mlx", model="org/m"), QUICKSTART, "mlx is not installed"),
        (Wish(engine="llama.cpp"), Installed(), "llama.cpp is not installed"),
        (Wish(engine="llama.cpp", model="org/m"), QUICKSTART, "serves GGUF files"),
        (Wish(model="org/m"), QUICKSTART, "is for vllm, which is not installed"),
        (Wish(engine="ollama"), QUICKSTART, "there is no engine 'ollama'"),
        (Wish(), Installed(xllamacpp=True), "the embedded one is not installed"),
    ],
)
def test_what_cannot_be_served_says_what_to_do(wish: Wish, installed: Installed, says: str) -> None:
    with pytest.raises(NoChoice, match=says):
        choose(GPU_BOX, installed, wish)


EVERYTHING = Installed(mlx=True, vllm=True, xllamacpp=True, llama_cpp_python=True)


def a_model(format: Format) -> LocalModel:
    return LocalModel(name="m", path="/models/m", format=format)


@pytest.mark.parametrize(
    ("hardware", "format", "engine"),
    [
        (MAC, Format.MLX, "mlx"),
        (MAC, Format.SAFETENSORS, "mlx"),
        (MAC, Format.GGUF, "llama.cpp"),
        (MAC, Format.HUB, "mlx"),
        (GPU_BOX, Format.SAFETENSORS, "vllm"),
        (GPU_BOX, Format.GGUF, "llama.cpp"),
        (GPU_BOX, Format.HUB, "vllm"),
        (LINUX, Format.GGUF, "llama.cpp"),
    ],
)
def test_each_form_of_a_model_has_its_engine_on_each_machine(
    hardware: Hardware, format: Format, engine: str
) -> None:
    spec, why = engine_for(a_model(format), hardware, EVERYTHING)
    assert spec.name == engine
    assert why


@pytest.mark.parametrize(
    ("hardware", "format", "installed", "wished", "says"),
    [
        (LINUX, Format.SAFETENSORS, EVERYTHING, "auto", "fetch it as GGUF"),
        (LINUX, Format.HUB, EVERYTHING, "auto", "fetch it as GGUF"),
        (MAC, Format.MLX, QUICKSTART, "auto", "type: uv sync --extra mlx"),
        (GPU_BOX, Format.SAFETENSORS, QUICKSTART, "auto", "type: uv sync --extra vllm"),
        (GPU_BOX, Format.MLX, EVERYTHING, "vllm", "whose weights are safetensors quantised by MLX"),
        (GPU_BOX, Format.GGUF, EVERYTHING, "vllm", "fetch the model as safetensors"),
        (MAC, Format.SAFETENSORS, EVERYTHING, "llama.cpp", "fetch the model as GGUF"),
        (LINUX, Format.GGUF, QUICKSTART, "llama-cpp-python", "type: uv sync --extra llama-cpp-python"),
        (LINUX, Format.GGUF, Installed(llama_cpp_python=True), "auto", "llama.cpp, which is not installed"),
        (LINUX, Format.GGUF, EVERYTHING, "ollama", "there is no engine 'ollama'"),
    ],
)
def test_a_form_that_nothing_here_reads_says_what_to_do(
    hardware: Hardware, format: Format, installed: Installed, wished: str, says: str
) -> None:
    with pytest.raises(NoChoice, match=says):
        engine_for(a_model(format), hardware, installed, wished)


def test_an_engine_that_was_asked_for_by_name_serves_what_it_reads() -> None:
    for name, format in (
        ("vllm", Format.SAFETENSORS),
        ("mlx", Format.MLX),
        ("llama-cpp-python", Format.GGUF),
    ):
        assert engine_for(a_model(format), LINUX, EVERYTHING, name)[0].name == name


@pytest.mark.parametrize(
    ("hardware", "installed", "formats"),
    [
        (MAC, EVERYTHING, (Format.MLX, Format.GGUF, Format.SAFETENSORS)),
        (MAC, QUICKSTART, (Format.GGUF,)),
        (MAC, Installed(mlx=True), (Format.MLX, Format.SAFETENSORS)),
        (GPU_BOX, EVERYTHING, (Format.SAFETENSORS, Format.GGUF)),
        (GPU_BOX, QUICKSTART, (Format.GGUF,)),
        (LINUX, QUICKSTART, (Format.GGUF,)),
        (LINUX, Installed(), (Format.GGUF,)),
    ],
)
def test_a_model_is_fetched_in_the_form_that_serves_best_here(
    hardware: Hardware, installed: Installed, formats: tuple[Format, ...]
) -> None:
    assert preferred_format(hardware, installed) == formats


def test_llama_cpp_python_serves_the_embedded_model_for_those_who_name_it() -> None:
    installed = Installed(llama_cpp_python=True, embedded_model="/small.gguf")
    choice = choose(LINUX, installed, Wish(engine="llama-cpp-python"))
    assert (choice.engine.name, choice.model) == ("llama-cpp-python", "/small.gguf")


def test_an_engine_too_old_to_be_safe_is_named_with_the_reason_and_the_command() -> None:
    installed = Installed(vllm=True, xllamacpp=True, versions={"vllm": "0.13.2", "llama.cpp": "b11549"})
    said = outdated(ENGINES["vllm"], installed)
    assert said is not None
    assert said.startswith("vllm 0.13.2 is older than 0.30")
    assert "CVE-2026-22807" in said
    assert said.endswith("uv sync --extra vllm")
    assert outdated(ENGINES["llama.cpp"], installed) is None
    assert outdated(ENGINES["mlx"], installed) is None


hardwares = st.builds(
    Hardware,
    system=st.sampled_from(["Linux", "Darwin"]),
    architecture=st.sampled_from(["x86_64", "arm64", "aarch64"]),
    cores=st.integers(1, 128),
    memory_bytes=st.integers(2**28, 2**41),
    gpus=st.lists(st.builds(Gpu, st.just("NVIDIA A"), st.integers(0, 2**38)), max_size=2).map(tuple),
)
installations = st.builds(
    Installed,
    mlx=st.booleans(),
    vllm=st.booleans(),
    llama_server=st.sampled_from([None, "/usr/bin/llama-server"]),
    xllamacpp=st.booleans(),
    embedded_model=st.sampled_from([None, "/small.gguf"]),
)
wishes = st.builds(
    Wish,
    engine=st.sampled_from(["auto", *ENGINES]),
    model=st.sampled_from([None, "org/Model", "/m.gguf"]),
    name=st.sampled_from([None, "n"]),
)


@given(hardwares, installations, wishes)
def test_only_what_is_installed_is_chosen_and_only_what_was_given_or_embedded_is_served(
    hardware: Hardware, installed: Installed, wish: Wish
) -> None:
    choice: Choice | NoChoice
    try:
        choice = choose(hardware, installed, wish)
    except NoChoice as refused:
        assert len(str(refused)) > 20
        return
    assert installed.has(choice.engine)
    assert choice.model in (wish.model, installed.embedded_model)
    assert wish.engine in ("auto", choice.engine.name)
    assert all(len(line) <= 400 and line.isprintable() for line in choice.advice)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/models/" + "x" * 150 + ".gguf", "x" * 128),
        ("/models/a\nb.gguf", "a_b"),
        ("./.gguf", "model"),
        ("/models/Ünï mit Leerzeichen.gguf", "Ünï mit Leerzeichen"),
    ],
)
def test_whatever_a_file_is_called_its_model_gets_a_name_that_can_be_told(file: str, name: str) -> None:
    assert choose(LINUX, QUICKSTART, Wish(model=file)).name == name
    assert ServedModel(name=name).name == name


def test_a_model_in_this_very_folder_has_a_name_to_ask_for() -> None:
    assert choose(GPU_BOX, Installed(vllm=True), Wish(model="./")).name == "model"
