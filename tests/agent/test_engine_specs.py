"""Engines as data. MLX, vLLM and llama-cpp-python run in `tests/engines` only, where somebody has them: their
command lines are held word by word."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from worker_agent.engines import ENGINES
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.llama_cpp_python import LLAMA_CPP_PYTHON
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import (
    Capacity,
    EngineSpec,
    Launch,
    generated,
    is_older,
    refused_argument,
    refused_variable,
    sum_of_metrics,
)
from worker_agent.engines.vllm import VLLM
from worker_agent.memory import Load, Need, Pool
from worker_agent.wire import INFERENCE_PATHS

MIB, GIB = 2**20, 2**30
LAUNCH = Launch(
    python="/venv/bin/python",
    model="org/Some-Model",
    name="some-model",
    port=18083,
    slots=4,
    context_tokens=2048,
    threads=2,
)


def test_mlx_is_started_as_its_server_wants_it() -> None:
    assert MLX.argv(LAUNCH) == shlex.split(
        "/venv/bin/python -m mlx_lm server --model org/Some-Model --host 127.0.0.1 --port 18083"
        " --decode-concurrency 4 --prompt-concurrency 4 --prompt-cache-size 32 --max-tokens 2048"
        " --allowed-origins http://127.0.0.1"
    )


def test_what_mlx_remembers_of_prompts_is_bounded_by_what_was_reserved_for_it() -> None:
    need = Need(weights_bytes=4 * GIB, cache_bytes=GIB, overhead_bytes=0)
    argv = MLX.argv(replace(LAUNCH, need=need))
    assert argv[argv.index("--prompt-cache-bytes") + 1] == str(GIB + 512 * MIB)


def test_mlx_does_not_ask_the_hub_for_a_folder_and_is_given_a_cache_folder_that_exists() -> None:
    folder = replace(LAUNCH, model="/models/m", local=True)
    assert MLX.environment(folder) == {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/models/m"}
    assert MLX.environment(LAUNCH) == {}


def test_mlx_is_never_asked_for_a_name_that_it_would_look_up_on_the_hub() -> None:
    assert MLX.request_model(LAUNCH) == "default_model"


def test_vllm_is_started_as_its_server_wants_it() -> None:
    assert VLLM.argv(LAUNCH) == shlex.split(
        "/venv/bin/python -m vllm.entrypoints.cli.main serve org/Some-Model"
        " --served-model-name some-model"
        " --host 127.0.0.1 --port 18083 --max-num-seqs 4 --max-model-len 2048"
        " --enable-prompt-tokens-details"
    )


def test_vllm_gets_of_its_gpus_what_was_reserved_for_it() -> None:
    launch = replace(LAUNCH, gpus=2, devices=(1, 2), gpu_share=0.66, batch_tokens=16384, local=True)
    words = " ".join(VLLM.argv(launch))
    assert "--max-num-batched-tokens 16384 --gpu-memory-utilization 0.66 --tensor-parallel-size 2" in words
    assert VLLM.environment(launch) == {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "1,2",
    }


def test_vllm_on_a_processor_is_told_its_cache_in_whole_gibibytes() -> None:
    need = Need(weights_bytes=GIB, cache_bytes=3 * GIB, overhead_bytes=0)
    assert VLLM.environment(replace(LAUNCH, need=need))["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in VLLM.environment(replace(LAUNCH, need=need, gpus=1))
    load = Load(weights_bytes=GIB, slots=4, context_tokens=2048, cache_bytes_per_token=23040)
    assert VLLM.need(load).cache_bytes == GIB


def test_vllm_keeps_the_models_own_context_where_none_is_given() -> None:
    assert "--max-model-len" not in VLLM.argv(replace(LAUNCH, context_tokens=None))


def test_a_real_llama_server_gets_its_own_flags() -> None:
    launch = replace(LAUNCH, program="/usr/bin/llama-server", model="/models/a.gguf")
    assert LLAMA_CPP.argv(launch) == shlex.split(
        "/usr/bin/llama-server --model /models/a.gguf --alias some-model --host 127.0.0.1 --port 18083"
        " --parallel 4 --ctx-size 8192 --threads 2 --threads-batch 2 --batch-size 256 --ubatch-size 256"
        " --cache-ram 512 --ctx-checkpoints 4 --flash-attn auto --n-gpu-layers 999"
        " --metrics --slots --jinja --no-webui --offline"
    )


def test_a_model_too_large_for_the_gpu_leaves_it_to_llama_cpp_how_much_goes_there() -> None:
    launch = replace(LAUNCH, model="/models/a.gguf", offload=False)
    for program in (None, "/usr/bin/llama-server"):
        assert "--n-gpu-layers" not in LLAMA_CPP.argv(replace(launch, program=program))


def test_llama_cpp_python_answers_one_after_the_other_and_cuts_none_off() -> None:
    assert LLAMA_CPP_PYTHON.argv(replace(LAUNCH, model="/models/a.gguf")) == shlex.split(
        "/venv/bin/python -m llama_cpp.server --model /models/a.gguf --model_alias some-model"
        " --host 127.0.0.1 --port 18083 --n_ctx 2048 --n_batch 256 --logits_all false"
        " --n_threads 2 --n_threads_batch 2 --n_gpu_layers -1 --interrupt_requests false"
    )
    assert (LLAMA_CPP_PYTHON.most_slots, LLAMA_CPP_PYTHON.ready_path) == (1, "/openapi.json")


def test_without_one_the_wheel_runs_as_a_module() -> None:
    argv = LLAMA_CPP.argv(replace(LAUNCH, model="/models/a.gguf"))
    assert argv[:3] == ["/venv/bin/python", "-m", "worker_agent.engines.llama_cpp_runner"]
    assert argv[argv.index("--context-tokens") + 1] == "2048"


EVERY_ENGINE = pytest.mark.parametrize("spec", ENGINES.values(), ids=lambda spec: spec.name)


@EVERY_ENGINE
def test_the_users_own_words_come_last(spec: EngineSpec) -> None:
    launch = replace(LAUNCH, args=("--seed", "7"))
    assert spec.argv(launch)[-2:] == ["--seed", "7"]
    assert "--seed" not in spec.argv(LAUNCH)


@EVERY_ENGINE
@pytest.mark.parametrize("word", ["--host", "--port=80", "--model", "--mod", "--po"])
def test_the_users_words_cannot_open_an_engine_or_give_it_another_model(spec: EngineSpec, word: str) -> None:
    said = refused_argument(spec, ("--seed", "7", word, "0.0.0.0"))
    assert said is not None
    assert said.startswith(word.partition("=")[0])


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (MLX, "--trust-remote-code"),
        (VLLM, "--trust_remote_code"),
        (VLLM, "--uds"),
        (VLLM, "--config=evil.yaml"),
        (VLLM, "--middleware"),
        (LLAMA_CPP, "-hf"),
        (LLAMA_CPP, "--model-url"),
        (LLAMA_CPP, "--rpc"),
        (LLAMA_CPP, "--tools"),
        (LLAMA_CPP, "--slot-save-path"),
        (LLAMA_CPP_PYTHON, "--api_key"),
        (LLAMA_CPP_PYTHON, "--interrupt_requests"),
    ],
)
def test_flags_that_open_an_engine_or_run_code_are_refused(spec: EngineSpec, word: str) -> None:
    said = refused_argument(spec, (word,))
    assert said is not None
    assert "Take it out" in said


@pytest.mark.parametrize(
    ("spec", "word", "setting"),
    [
        (LLAMA_CPP, "--parallel", "slots"),
        (LLAMA_CPP, "-c", "context_tokens"),
        (VLLM, "--max_model_len=99", "context_tokens"),
        (MLX, "--decode-concurrency", "slots"),
    ],
)
def test_what_has_a_setting_is_set_there(spec: EngineSpec, word: str, setting: str) -> None:
    said = refused_argument(spec, (word,))
    assert said is not None
    assert f"set `{setting}`" in said


@pytest.mark.parametrize(
    ("spec", "args"),
    [
        (LLAMA_CPP, ("--kv-unified", "-ngl", "20", "--cache-type-k", "q8_0", "--lora", "/models/mine.gguf")),
        (MLX, ("--draft-model", "/models/small", "--kv-bits", "8", "--temp", "0.2")),
        (VLLM, ("--enable-lora", "--quantization", "awq", "--kv-cache-dtype", "fp8", "-O3")),
        (VLLM, ("--gpu-memory-utilization", "0.5", "--max-num-batched-tokens", "8192", "--enforce-eager")),
        (VLLM, ("-tp", "2", "-pp", "2", "--distributed-executor-backend", "ray")),
        (LLAMA_CPP_PYTHON, ("--flash_attn", "true", "--chat_format", "chatml")),
    ],
)
def test_flags_that_people_need_are_theirs_to_give(spec: EngineSpec, args: tuple[str, ...]) -> None:
    assert refused_argument(spec, args) is None
    assert spec.argv(replace(LAUNCH, args=args))[-len(args) :] == list(args)


def test_no_flag_that_people_need_is_the_beginning_of_a_refused_one() -> None:
    for spec in ENGINES.values():
        for flag in ("--max-tokens", "--kv-bits", "--load-format", "--seed", "--tokenizer", "--props"):
            assert refused_argument(spec, (flag,)) is None, (spec.name, flag)


def test_variables_that_stand_for_those_flags_are_refused_too() -> None:
    assert refused_variable(LLAMA_CPP, {"LLAMA_ARG_HOST": "0.0.0.0"}) is not None
    assert refused_variable(LLAMA_CPP_PYTHON, {"HOST": "0.0.0.0"}) is not None
    assert refused_variable(VLLM, {"VLLM_API_KEY": "mine"}) is not None
    assert refused_variable(VLLM, {"VLLM_ATTENTION_BACKEND": "FLASHINFER", "HF_TOKEN": "x"}) is None


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [
        ("0.32.0+cpu", "0.30", False),
        ("0.9.2", "0.30", True),
        ("b11549", "b11393", False),
        ("b4621", "b11393", True),
        ("0.31", "0.31", False),
        ("0.31.2", "0.31", False),
        ("unknown", "0.31", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, minimum: str, older: bool) -> None:
    assert is_older(version, minimum) is older


@EVERY_ENGINE
def test_a_need_grows_with_slots_context_and_weights(spec: EngineSpec) -> None:
    def total(**more: int) -> int:
        given = {"weights_bytes": 4 * GIB, "slots": 1, "context_tokens": 8192} | more
        return spec.need(Load(cache_bytes_per_token=128 * 1024, **given)).total_bytes

    assert total() >= 4 * GIB + 8192 * 128 * 1024
    assert total(context_tokens=16384) > total()
    assert total(weights_bytes=5 * GIB) >= total() + GIB
    assert total(slots=8) > total() or spec.most_slots == 1


def test_a_cache_that_no_file_tells_of_is_counted_as_wide_as_any() -> None:
    small, large = (Load(weights_bytes=gib * GIB, slots=1, context_tokens=1) for gib in (4, 40))
    assert small.token_bytes == 512 * 1024  # Llama 2 7B, 4 bits
    assert large.token_bytes == 2560 * 1024  # Llama 1 65B


def test_llama_cpp_needs_no_less_than_was_measured() -> None:
    """SmolLM2 135M, 4 slots of 4096: 509 MiB resident without earlier prompts, which may take 512 more."""
    load = Load(weights_bytes=98_000_000, slots=4, context_tokens=4096, cache_bytes_per_token=23040)
    need = LLAMA_CPP.need(load)
    assert need.cache_bytes == 360 * MIB
    assert need.total_bytes >= (509 + 512) * MIB


def test_vllms_cache_is_a_pool_that_takes_what_there_is() -> None:
    load = Load(
        weights_bytes=10 * GIB,
        slots=32,
        context_tokens=4096,
        cache_bytes_per_token=192 * 1024,
        pool=Pool.VRAM,
        batch_tokens=16384,
    )
    full, least = 24 * GIB, 6 * GIB
    assert VLLM.need(load).cache_bytes == full
    assert VLLM.need(replace(load, room_bytes=21 * GIB)).total_bytes == 21 * GIB
    assert VLLM.need(replace(load, room_bytes=12 * GIB)).cache_bytes == least


@pytest.mark.parametrize("spec", ENGINES.values(), ids=lambda spec: spec.name)
def test_every_engine_listens_on_loopback_serves_known_paths_and_gets_no_secret_by_argv(spec: object) -> None:
    assert isinstance(spec, type(MLX))
    argv = spec.argv(LAUNCH)
    assert "0.0.0.0" not in argv
    assert set(spec.paths) <= set(INFERENCE_PATHS)
    assert not any("key" in word.lower() for word in argv)


def test_the_context_is_read_from_what_the_models_route_says() -> None:
    assert LLAMA_CPP.read_context_tokens({"id": "m", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}}) == 2048
    assert VLLM.read_context_tokens({"id": "m", "max_model_len": 32768}) == 32768
    assert LLAMA_CPP.read_context_tokens({"id": "m", "meta": None}) is None
    assert VLLM.read_context_tokens({"id": "m", "max_model_len": "many"}) is None
    assert MLX.read_context_tokens({"id": "/models/m"}) is None


def test_llama_cpp_holds_its_slots_and_remembers_more_in_ram() -> None:
    per_token = 64 * 1024  # 512 MiB hold 8192 tokens of it
    launch = replace(LAUNCH, cache_bytes_per_token=per_token)
    assert LLAMA_CPP.read_capacity(launch, 2048, "") == Capacity(
        memory_tokens=4 * 2048, cache_tokens=4 * 2048 + 8192
    )


def test_llama_cpp_counts_its_slots_alone_where_the_file_does_not_tell_what_a_token_takes() -> None:
    assert LLAMA_CPP.read_capacity(LAUNCH, 2048, "").cache_tokens == 4 * 2048
    assert LLAMA_CPP.read_capacity(LAUNCH, None, "") == Capacity()


VLLM_METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",calculate_kv_scales="False",cpu_offload_gb="0",\
enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.9",num_cpu_blocks="None",\
num_gpu_blocks="27896",num_gpu_blocks_override="None",swap_space="4"} 1.0
vllm:num_requests_running{engine="0",model_name="m"} 0.0
"""
"""Written after the server's documentation, not recorded."""


def test_one_cache_for_all_slots_is_told_as_one() -> None:
    """`--kv-unified` lets one request fill it; it does not become larger by that."""
    launch = replace(LAUNCH, args=("--kv-unified",))
    assert LLAMA_CPP.read_capacity(launch, 4 * 2048, "").memory_tokens == 4 * 2048


def test_vllm_tells_its_kv_cache_on_its_metrics_page() -> None:
    assert VLLM.capacity_path == "/metrics"
    tokens = 27896 * 16
    assert VLLM.read_capacity(LAUNCH, 32768, VLLM_METRICS) == Capacity(
        memory_tokens=tokens, cache_tokens=tokens
    )


RECORDED_VLLM_METRICS = """\
vllm:cache_config_info{_block_size_resolved="True",block_size="128",cache_dtype="auto",\
effective_attention_block_size="128",enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.92",\
kv_cache_max_concurrency="5.6875",kv_cache_memory_bytes="1073741824",kv_cache_size_tokens="46592",\
num_cpu_blocks="None",num_gpu_blocks="364",num_gpu_blocks_override="None"} 1.0
"""
"""By vLLM 0.32; some of its labels left out."""


def test_vllm_counts_the_tokens_itself_where_it_is_new_enough() -> None:
    page = RECORDED_VLLM_METRICS
    assert VLLM.read_capacity(LAUNCH, 8192, page).memory_tokens == 364 * 128 == 46592
    # Sliding windows beside full attention: the same blocks hold more tokens.
    of_unlike_layers = page.replace('kv_cache_size_tokens="46592"', 'kv_cache_size_tokens="80000"')
    assert VLLM.read_capacity(LAUNCH, 8192, of_unlike_layers).memory_tokens == 80000


@pytest.mark.parametrize(
    "page", ["", "vllm:cache_config_info{} 1.0", VLLM_METRICS.replace("27896", "None"), "\0" * 100]
)
def test_a_vllm_that_does_not_tell_it_is_of_unknown_capacity(page: str) -> None:
    assert VLLM.read_capacity(LAUNCH, 32768, page) == Capacity()


def test_what_mlx_holds_is_not_known() -> None:
    assert MLX.read_capacity(LAUNCH, 2048, "") == Capacity()


@pytest.mark.parametrize(
    "answer", [None, {}, [], {"error": {"message": "no"}}, {"choices": []}, {"choices": [{}]}]
)
def test_an_answer_without_a_message_is_no_token(answer: object) -> None:
    assert not generated(answer)


def test_a_message_is() -> None:
    assert generated({"choices": [{"message": {"role": "assistant", "content": ""}}]})


LLAMA_METRICS = """\
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:predicted_tokens_seconds 58.1234
llamacpp:requests_deferred 1
"""


def test_how_busy_an_engine_is_stands_on_its_metrics_page() -> None:
    assert (LLAMA_CPP.busy_path, VLLM.busy_path) == ("/metrics", "/metrics")
    assert LLAMA_CPP.read_busy(LLAMA_METRICS) == 3
    page = """\
vllm:num_requests_running{engine="0",model_name="m"} 6.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0
"""
    assert VLLM.read_busy(page) == 9


@pytest.mark.parametrize("page", ["", "# nothing", "llamacpp:requests_processing many", "\0" * 100])
def test_a_page_that_does_not_tell_it_says_nothing(page: str) -> None:
    assert LLAMA_CPP.read_busy(page) is None
    assert sum_of_metrics(page, ("llamacpp:requests_processing",)) is None


def test_how_busy_mlx_is_is_not_known() -> None:
    assert MLX.busy_path is None


BEGUN = {"model": "m", "messages": [{"role": "assistant", "content": "a"}], "stream": True}


def test_each_engine_goes_on_with_an_answer_in_its_own_way() -> None:
    assert LLAMA_CPP.continue_chat is not None
    assert VLLM.continue_chat is not None
    assert LLAMA_CPP.continue_chat(BEGUN) == BEGUN
    assert VLLM.continue_chat(BEGUN) == {
        **BEGUN,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert MLX.continue_chat is None
