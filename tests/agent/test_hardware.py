from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from worker_agent import hardware
from worker_agent.hardware import (
    CgroupMemory,
    CgroupMount,
    Gpu,
    Hardware,
    by_number,
    cgroup_folders,
    memory_under,
    metal_limit,
    parse_anonymous,
    parse_cgroup_mounts,
    parse_compute_apps,
    parse_cpu_max,
    parse_gpu_memory,
    parse_meminfo,
    parse_memory_max,
    parse_nvidia_smi,
    parse_own_cgroup,
    parse_reclaimable,
    parse_top,
    parse_uuids,
    usable_cores,
    visible,
)
from worker_agent.memory import DeviceNow, MemoryNow, Pool, budget

MIB, GIB = 2**20, 2**30


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
    assert parse_memory_max("9223372036854771712\n") is None  # version 1 without a limit


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


MEMINFO = """\
MemTotal:       24684084 kB
MemFree:        22341000 kB
MemAvailable:   23866416 kB
Buffers:           12345 kB
HugePages_Total:       0
"""


def test_the_kernel_tells_what_is_available() -> None:
    assert parse_meminfo(MEMINFO) == (24684084 * 1024, 23866416 * 1024)
    assert parse_meminfo("MemTotal: 1 kB\n") is None
    assert parse_meminfo("") is None


V2_CGROUP = "0::/user.slice/user-1000.slice/app.service\n"
V2_MOUNTS = """\
23 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw
29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""
V1_CGROUP = """\
9:name=systemd:/
4:memory:/process_api/60bf
1:cpu,cpuacct:/
0::/
"""
V1_MOUNTS = """\
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_every_group_above_us_is_looked_at() -> None:
    own = parse_own_cgroup(V2_CGROUP)
    [mount] = parse_cgroup_mounts(V2_MOUNTS, "cgroup2")
    assert own is not None
    assert cgroup_folders(mount, own) == (
        "/sys/fs/cgroup/user.slice/user-1000.slice/app.service",
        "/sys/fs/cgroup/user.slice/user-1000.slice",
        "/sys/fs/cgroup/user.slice",
        "/sys/fs/cgroup",
    )


def test_version_1_has_a_hierarchy_for_each_controller() -> None:
    assert parse_own_cgroup(V1_CGROUP, "memory") == "/process_api/60bf"
    assert parse_own_cgroup(V1_CGROUP, "cpu") == "/"
    assert parse_own_cgroup(V1_CGROUP) == "/"
    assert parse_own_cgroup(V1_CGROUP, "io") is None
    [mount] = parse_cgroup_mounts(V1_MOUNTS, "cgroup", "memory")
    assert mount == CgroupMount("/sys/fs/cgroup/memory", "/")
    assert parse_cgroup_mounts(V1_MOUNTS, "cgroup", "cpuacct") == (CgroupMount("/sys/fs/cgroup/cpu", "/"),)
    assert parse_cgroup_mounts("nonsense\n - \n", "cgroup2") == ()


def test_a_container_that_sees_its_group_as_the_root_finds_its_files_there() -> None:
    mount = CgroupMount("/sys/fs/cgroup", "/docker/abc")
    assert cgroup_folders(mount, "/docker/abc/sub") == ("/sys/fs/cgroup/sub", "/sys/fs/cgroup")
    assert cgroup_folders(mount, "/docker/abc") == ("/sys/fs/cgroup",)
    assert cgroup_folders(CgroupMount("/sys/fs/cgroup", "/"), "/../../x") == (
        "/sys/fs/cgroup/x",
        "/sys/fs/cgroup",
    )


def test_files_that_the_kernel_would_give_away_are_no_use_of_memory() -> None:
    v2 = "anon 1000\nfile 900\ninactive_file 300\nactive_file 200\n"
    v1 = "inactive_file 1\nactive_file 2\ntotal_inactive_file 30\ntotal_active_file 40\n"
    assert (parse_reclaimable(v2), parse_reclaimable(v1), parse_reclaimable("")) == (500, 70, 0)


def test_the_tightest_group_counts() -> None:
    groups = [
        CgroupMemory(limit_bytes=8 * GIB, used_bytes=2 * GIB, reclaimable_bytes=GIB),
        CgroupMemory(limit_bytes=4 * GIB, used_bytes=GIB, reclaimable_bytes=0),
        CgroupMemory(limit_bytes=64 * GIB, used_bytes=62 * GIB, reclaimable_bytes=GIB),
    ]
    assert memory_under(16 * GIB, 10 * GIB, groups[:2]) == MemoryNow(
        total_bytes=4 * GIB, available_bytes=3 * GIB
    )
    assert memory_under(128 * GIB, 100 * GIB, groups[2:]).available_bytes == 3 * GIB
    assert memory_under(16 * GIB, 10 * GIB, []) == MemoryNow(total_bytes=16 * GIB, available_bytes=10 * GIB)


def test_a_group_over_its_limit_has_nothing_left() -> None:
    group = CgroupMemory(limit_bytes=GIB, used_bytes=2 * GIB, reclaimable_bytes=0)
    assert group.available_bytes == 0


@pytest.mark.parametrize(
    ("memory_gib", "told", "limit_gib"), [(36, "0", 24), (64, "0", 48), (64, "57344", 56), (24, "", 16)]
)
def test_a_mac_lets_its_gpu_use_a_part_of_its_memory(memory_gib: int, told: str, limit_gib: int) -> None:
    assert metal_limit(memory_gib * GIB, told + "\n") == limit_gib * GIB


def test_gpus_tell_what_is_free_and_who_holds_what() -> None:
    assert parse_gpu_memory("0, 24564, 23000\n1, 24564, 512\n2, [N/A], [N/A]\n") == (
        DeviceNow(index=0, total_bytes=24564 * MIB, available_bytes=23000 * MIB),
        DeviceNow(index=1, total_bytes=24564 * MIB, available_bytes=512 * MIB),
    )
    apps = "1234, 8000\n1234, 7000\n99, [N/A]\n5, 1\n"
    assert parse_compute_apps(apps) == {1234: 15000 * MIB, 5: MIB}
    assert parse_gpu_memory("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("variable", "indexes"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("7", []), ("", []), ("-1", []), ("GPU-4f3a", [0, 1])],
)
def test_gpus_that_the_user_hides_are_not_counted(variable: str | None, indexes: list[int]) -> None:
    gpus = [DeviceNow(index=index, total_bytes=1, available_bytes=1) for index in (0, 1)]
    assert [gpu.index for gpu in visible(gpus, variable)] == indexes


def test_what_processes_hold_is_read_without_the_files_that_they_map() -> None:
    status = "VmRSS:\t  302580 kB\nRssAnon:\t  178988 kB\nRssFile:\t  123592 kB\nRssShmem:\t 12 kB\n"
    assert parse_anonymous(status) == (178988 + 12) * 1024
    assert parse_anonymous("") == 0


def test_what_a_mac_shows_of_processes_is_read() -> None:
    top = """\
Processes: 512 total
PID    MEM
4242   9216M
77*    12K+
1      1G-
"""
    assert parse_top(top) == {4242: 9 * GIB, 77: 12 * 1024, 1: GIB}


def test_models_may_take_a_share_of_what_is_free_and_of_what_they_hold() -> None:
    now = MemoryNow(total_bytes=16 * GIB, available_bytes=8 * GIB)
    assert budget(now, 2 * GIB, 0.9) == 9 * GIB
    assert budget(now, 100 * GIB, 0.5) == 8 * GIB  # never more than there is
    assert budget(MemoryNow(total_bytes=GIB, available_bytes=0), 0, 0.9) == 0


def test_this_machines_memory_is_measured() -> None:
    now = hardware.measure_memory()[Pool.RAM]
    assert 0 < now.available_bytes <= now.total_bytes <= psutil.virtual_memory().total


def test_memory_that_a_process_takes_is_seen_in_it_and_in_those_below_it() -> None:
    program = "import sys; held = bytearray(b'x' * (200 << 20)); print('there', flush=True); sys.stdin.read()"
    shell = [
        sys.executable,
        "-c",
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])",
    ]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        held = hardware.resident_bytes([process.pid])[Pool.RAM]
        process.communicate()
    assert 200 * MIB <= held < 300 * MIB
    assert hardware.resident_bytes([process.pid]) == {Pool.RAM: 0, Pool.VRAM: 0}


@pytest.mark.parametrize(
    ("variable", "number"),
    [("GPU-bb22", "1"), ("GPU-bb22-2, GPU-aa11", "1,0"), ("GPU-cc", "GPU-cc"), ("0", "0")],
)
def test_gpus_that_are_named_by_uuid_are_found_by_their_numbers(variable: str, number: str) -> None:
    told = parse_uuids("GPU-aa11-1, 0\nGPU-bb22-2, 1\nNo devices were found\n")
    assert told == {"GPU-aa11-1": 0, "GPU-bb22-2": 1}
    assert by_number(variable, told) == number
