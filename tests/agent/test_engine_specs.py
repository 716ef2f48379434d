"""Engines as data: MLX and vLLM are never run here, so their command lines are held word by word."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from worker_agent.engines import ENGINES
from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import Launch, generated
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


@pytest.mark.parametrize(
    "answer", [None, {}, [], {"error": {"message": "no"}}, {"choices": []}, {"choices": [{}]}]
)
def test_an_answer_without_a_message_is_no_token(answer: object) -> None:
    assert not generated(answer)


def test_a_message_is() -> None:
    assert generated({"choices": [{"message": {"role": "assistant", "content": ""}}]})
