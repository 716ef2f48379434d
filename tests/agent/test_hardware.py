from __future__ import annotations

import os

import psutil
import pytest

from worker_agent import hardware
from worker_agent.hardware import (
    Gpu,
    Hardware,
    parse_cpu_max,
    parse_memory_max,
    parse_nvidia_smi,
    usable_cores,
)

GIB = 2**30


def test_nvidia_smi_names_every_gpu_with_its_memory() -> None:
    output = "NVIDIA GeForce RTX 4090, 24564\nNVIDIA H200, 143771\n"
    assert parse_nvidia_smi(output) == (
        Gpu("NVIDIA GeForce RTX 4090", 24564 * 2**20),
        Gpu("NVIDIA H200", 143771 * 2**20),
    )


@pytest.mark.parametrize(
    "output",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "NVIDIA GB10, [N/A]\n",
        ", 12\n",
    ],
)
def test_what_is_no_gpu_line_is_left_out(output: str) -> None:
    assert parse_nvidia_smi(output) == ()


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000", 2.0), ("150000 100000", 1.5), ("max 100000", None), ("", None), ("x y", None)],
)
def test_a_container_quota_is_read(text: str, cores: float | None) -> None:
    assert parse_cpu_max(text + "\n") == cores


def test_a_container_memory_limit_is_read() -> None:
    assert parse_memory_max("4294967296\n") == 4 * GIB
    assert parse_memory_max("max\n") is None
    assert parse_memory_max("") is None


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, None, 8), (8, 2.0, 2), (8, 1.5, 1), (8, 0.2, 1), (2, 4.0, 2)]
)
def test_the_tighter_of_affinity_and_quota_counts(affinity: int, quota: float | None, cores: int) -> None:
    assert usable_cores(affinity, quota) == cores


def test_hardware_reads_as_one_line() -> None:
    linux = Hardware(system="Linux", architecture="x86_64", cores=16, memory_bytes=64 * GIB)
    gpus = (Gpu("NVIDIA GeForce RTX 4090", 24564 * 2**20),)
    gpu_box = Hardware(system="Linux", architecture="x86_64", cores=16, memory_bytes=64 * GIB, gpus=gpus)
    mac = Hardware(
        system="Darwin", architecture="arm64", cores=24, memory_bytes=192 * GIB, apple_chip="Apple M2 Ultra"
    )
    assert str(linux) == "16 x86_64 cores, 64 GiB"
    assert str(gpu_box) == "NVIDIA GeForce RTX 4090 24 GiB, 16 x86_64 cores, 64 GiB"
    assert str(mac) == "Apple M2 Ultra, 192 GiB"
    assert mac.is_apple_silicon
    assert not gpu_box.is_apple_silicon


def test_this_machine_is_seen_as_it_is() -> None:
    seen = hardware.detect()
    assert 1 <= seen.cores <= (os.cpu_count() or 1)
    assert 0 < seen.memory_bytes <= psutil.virtual_memory().total
    assert str(seen).isprintable()
