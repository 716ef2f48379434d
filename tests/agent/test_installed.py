from __future__ import annotations

import pytest

from worker_agent.installed import detect, parse_build, parse_devices


@pytest.mark.parametrize(
    ("output", "build"),
    [
        ("version: 0.7.0 (build 11669, commit Debian)\nbuilt with GNU 16.2.0 for Linux x86_64\n", "b11669"),
        ("version: 4621 (6eecde3c)\nbuilt with cc (Ubuntu 13.3.0) 13.3.0\n", "b4621"),
        ("load_backend: loaded CPU backend\nversion: 8146 (abc)\n", "b8146"),
        ("", None),
        ("unknown argument\n", None),
    ],
)
def test_a_llama_server_says_which_build_it_is(output: str, build: str | None) -> None:
    assert parse_build(output) == build


def test_a_llama_server_names_the_devices_that_it_is_built_for() -> None:
    output = """\
ggml_cuda_init: found 1 CUDA devices:
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23300 MiB free)
"""
    assert parse_devices(output) == ("CUDA0",)
    assert parse_devices("Available devices:\n  (none)\n") == ()
    assert parse_devices("") == ()


def test_this_environment_has_the_wheel_and_knows_its_build() -> None:
    found = detect()
    assert found.xllamacpp or found.llama_server
    assert found.versions["llama.cpp"].startswith("b")
