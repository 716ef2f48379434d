"""Engines as data. MLX and vLLM run in `tests/engines` only, where somebody has them: their command lines are
held word by word."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from worker_agent.engines import ENGINES
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import Capacity, Launch, generated, sum_of_metrics
from worker_agent.engines.vllm import VLLM
from worker_agent.wire import INFERENCE_PATHS

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
        " --decode-concurrency 4 --prompt-concurrency 4"
    )


def test_mlx_is_never_asked_for_a_name_that_it_would_look_up_on_the_hub() -> None:
    assert MLX.request_model(LAUNCH) == "default_model"


def test_vllm_is_started_as_its_server_wants_it() -> None:
    assert VLLM.argv(LAUNCH) == shlex.split(
        "/venv/bin/python -m vllm.entrypoints.cli.main serve org/Some-Model"
        " --served-model-name some-model"
        " --host 127.0.0.1 --port 18083 --max-num-seqs 4 --max-model-len 2048"
        " --enable-prompt-tokens-details"
    )


def test_vllm_keeps_the_models_own_context_where_none_is_given() -> None:
    assert "--max-model-len" not in VLLM.argv(replace(LAUNCH, context_tokens=None))


def test_a_real_llama_server_gets_its_own_flags() -> None:
    launch = replace(LAUNCH, program="/usr/bin/llama-server", model="/models/a.gguf")
    assert LLAMA_CPP.argv(launch) == shlex.split(
        "/usr/bin/llama-server --model /models/a.gguf --alias some-model --host 127.0.0.1 --port 18083"
        " --parallel 4 --ctx-size 8192 --threads 2 --threads-batch 2 --batch-size 256 --ubatch-size 256"
        " --cache-ram 512 --metrics --slots --jinja --no-webui"
    )


def test_without_one_the_wheel_runs_as_a_module() -> None:
    argv = LLAMA_CPP.argv(replace(LAUNCH, model="/models/a.gguf"))
    assert argv[:3] == ["/venv/bin/python", "-m", "worker_agent.engines.llama_cpp_runner"]
    assert argv[argv.index("--context-tokens") + 1] == "2048"


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
