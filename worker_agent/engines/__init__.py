"""The engines that an agent can run: one row each."""

from __future__ import annotations

from collections.abc import Mapping

from worker_agent.engines.llama_cpp import LLAMA_CPP
from worker_agent.engines.llama_cpp_python import LLAMA_CPP_PYTHON
from worker_agent.engines.mlx import MLX
from worker_agent.engines.spec import EngineSpec
from worker_agent.engines.vllm import VLLM

ENGINES: Mapping[str, EngineSpec] = {spec.name: spec for spec in (LLAMA_CPP, LLAMA_CPP_PYTHON, MLX, VLLM)}
