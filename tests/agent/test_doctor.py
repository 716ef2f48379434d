"""What `worker-agent doctor` finds on machines that are not at hand, and how it says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker_agent import doctor, installed
from worker_agent.engines.choice import Choice, Installed, NoChoice, Wish, choose
from worker_agent.hardware import Gpu, Hardware
from worker_agent.memory import MemoryNow, Pool
from worker_agent.models.local import Facts, Format, LocalModel
from worker_agent.plans import Options

GIB, KIB = 2**30, 2**10
LINUX = Hardware(system="Linux", architecture="x86_64", cores=8, memory_bytes=16 * GIB)
GPU_BOX = Hardware(
    system="Linux",
    architecture="x86_64",
    cores=16,
    memory_bytes=64 * GIB,
    gpus=(Gpu("NVIDIA GeForce RTX 4090", 24 * GIB),),
)
MAC = Hardware(
    system="Darwin", architecture="arm64", cores=12, memory_bytes=64 * GIB, apple_chip="Apple M2 Max"
)
KEYS = {
    *("hardware", "installed", "engine", "why", "model", "name", "slots", "context_tokens", "threads"),
    *("needs", "tokens_per_second", "advice", "memory", "engines", "fits", "models", "install"),
}


def free(ram_gib: float, vram_gib: float | None = None) -> dict[Pool, MemoryNow]:
    pools = {Pool.RAM: MemoryNow(total_bytes=int(ram_gib * GIB), available_bytes=int(ram_gib * GIB))}
    if vram_gib is not None:
        pools[Pool.VRAM] = MemoryNow(total_bytes=int(vram_gib * GIB), available_bytes=int(vram_gib * GIB))
    return pools


def quickstart(**more: Any) -> Installed:
    """With the real embedded model, which is looked at."""
    return Installed(xllamacpp=True, embedded_model=installed.detect().embedded_model, **more)


def found(hardware: Hardware, has: Installed, memory: dict[Pool, MemoryNow], **more: Any) -> dict[str, Any]:
    choice: Choice | NoChoice
    try:
        choice = choose(hardware, has, Wish())
    except NoChoice as error:
        choice = error
    findings = doctor.findings(hardware, has, choice, memory, **more)
    return dict(json.loads(json.dumps(findings)))


def test_everything_is_told_under_keys_that_stay() -> None:
    told = found(LINUX, quickstart(), free(16))
    assert set(told) == KEYS
    assert (told["engine"], told["slots"], told["context_tokens"]) == ("llama.cpp", 4, 8192)
    assert told["needs"]["total_bytes"] == sum(
        told["needs"][f"{part}_bytes"] for part in ("weights", "cache", "engine")
    )
    assert told["memory"]["ram"]["for_models_bytes"] == int(0.9 * 16 * GIB)


def test_where_nothing_can_run_the_rest_is_told_all_the_same() -> None:
    told = found(MAC, Installed(), free(48))
    assert told["engine"] is None
    assert "is not installed" in told["why"]
    assert set(told) == KEYS - {
        *("model", "name", "slots", "context_tokens", "threads", "needs", "tokens_per_second")
    }
    assert told["install"][0] == "mlx: uv sync --extra mlx"


def test_a_model_that_is_not_there_is_why_nothing_runs() -> None:
    choice = choose(LINUX, quickstart(), Wish(model="/no/such/model.gguf"))
    told = doctor.findings(LINUX, quickstart(), choice, free(16))
    assert told["engine"] is None
    assert "/no/such/model.gguf" in told["why"]


def test_one_that_does_not_fit_says_so_with_the_numbers() -> None:
    told = found(LINUX, quickstart(), free(0.6))
    assert told["engine"] is None
    assert "models may take 0.5 GiB of this machine" in told["why"]


@pytest.mark.parametrize(
    ("hardware", "memory", "engine", "largest"),
    [
        (LINUX, free(16), "llama.cpp", ("14B", "Q4_K_M")),
        (MAC, free(48), "mlx", ("70B", "4-bit")),
        (GPU_BOX, free(64, 24), "vllm", ("14B", "AWQ 4-bit")),
        (LINUX, free(1), "llama.cpp", None),
    ],
)
def test_the_largest_model_that_fits_is_known_before_it_is_fetched(
    hardware: Hardware, memory: dict[Pool, MemoryNow], engine: str, largest: tuple[str, str] | None
) -> None:
    sizes = found(hardware, quickstart(), memory)["fits"]
    fitting = [(size["parameters"], size["quantization"]) for size in sizes if size["fits"]]
    assert {size["engine"] for size in sizes} == {engine}
    assert (fitting[-1] if fitting else None) == largest
    assert all(size["slots"] >= 1 for size in sizes if size["fits"])


@pytest.mark.parametrize(
    ("name", "gb_per_second"),
    [
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 672),
        ("NVIDIA GeForce RTX 4070", 504),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA L40S", 864),
        ("NVIDIA Something New", None),
    ],
)
def test_a_gpus_memory_is_known_by_its_name(name: str, gb_per_second: int | None) -> None:
    hardware = Hardware(
        system="Linux", architecture="x86_64", cores=1, memory_bytes=GIB, gpus=(Gpu(name, GIB),)
    )
    assert doctor.memory_bandwidth(hardware) == gb_per_second


def test_a_macs_speed_follows_from_its_memory_and_a_plain_machines_is_not_known() -> None:
    assert doctor.memory_bandwidth(MAC) == 400
    assert doctor.tokens_per_second(MAC, 4 * GIB, Pool.RAM) == 62
    assert doctor.tokens_per_second(MAC, 2**20, Pool.RAM) == 300  # bounded by other things
    assert doctor.tokens_per_second(LINUX, 4 * GIB, Pool.RAM) is None
    assert doctor.tokens_per_second(GPU_BOX, 4 * GIB, Pool.RAM) is None  # beside the GPU


def test_an_engine_that_is_too_old_is_named_as_unsafe() -> None:
    told = found(GPU_BOX, quickstart(vllm=True, versions={"vllm": "0.13.0"}), free(64, 24))
    assert told["engines"]["vllm"]["safe"] is False
    assert told["engines"]["llama.cpp"]["safe"] is None  # its version is not known
    assert told["engines"]["mlx"] == {
        "installed": False,
        "version": None,
        "minimum_version": "0.31",
        "safe": None,
        "detail": "",
        "install": "uv sync --extra mlx",
    }
    assert any("vllm 0.13.0 is older than" in line for line in told["install"])


def test_models_that_are_here_are_told_with_what_they_would_get(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    facts = Facts(cache_bytes_per_token=56 * KIB, context_tokens=32768)
    fits = LocalModel(
        name="m", path=str(tmp_path / "m.gguf"), format=Format.GGUF, size_bytes=4 * GIB, facts=facts
    )
    large = LocalModel(
        name="l", path=str(tmp_path / "m.gguf"), format=Format.GGUF, size_bytes=40 * GIB, facts=facts
    )
    told = found(LINUX, quickstart(), free(16), models=[fits, large])["models"]
    assert (told[0]["fits"], told[0]["engine"], told[0]["slots"]) == (True, "llama.cpp", 4)
    assert told[1]["fits"] is False
    assert told[1]["detail"].startswith("l needs 4")


def test_what_the_user_wished_counts() -> None:
    told = found(LINUX, quickstart(), free(16), options=Options(slots=2, context_tokens=1024), share=0.5)
    assert (told["slots"], told["context_tokens"]) == (2, 1024)
    assert told["memory"]["ram"]["for_models_bytes"] == 8 * GIB


def test_people_read_it_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(found(GPU_BOX, quickstart(), free(64, 24)))
    said = capsys.readouterr().out
    assert "engine: llama.cpp\n" in said
    assert "fits: 14B AWQ 4-bit (8.4 GiB): 32 slots of 4096 tokens by vllm, about 74 tokens/s" in said
    assert "install: vllm: uv sync --extra vllm\n" in said
    assert "\x1b" not in said


def test_this_very_machine_can_be_looked_at() -> None:
    from worker_agent import hardware

    told = found(hardware.detect(), installed.detect(), dict(hardware.measure_memory()))
    assert set(told) >= {"engine", "memory", "fits"}
