"""What models may take of a machine's memory, where what is asked of it changes while it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from worker_agent import app
from worker_agent import hardware as machine
from worker_agent.cluster_key import ClusterKey
from worker_agent.engines.choice import Installed, NoChoice
from worker_agent.hardware import Gpu, Hardware
from worker_agent.memory import MemoryNow, Pool, held_bytes
from worker_agent.models.catalog import Catalog
from worker_agent.settings import ModelOptions, Settings

GIB = 2**30
CPU_BOX = Hardware(system="Linux", architecture="x86_64", cores=4, memory_bytes=16 * GIB)
GPU_BOX = Hardware(
    system="Linux", architecture="x86_64", cores=4, memory_bytes=16 * GIB, gpus=(Gpu("a GPU", 24 * GIB),)
)

Free = Mapping[Pool, tuple[float, float]]
"""Of each pool what there is and what is free, in GiB."""


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[Pool, float]]:
    def measure(
        hardware: Hardware, free: list[Free], ours: Mapping[Pool, float], given: Mapping[Pool, float]
    ) -> Mapping[Pool, float]:
        """What is measured while it is first so, then so; in GiB."""
        moments: Iterator[Free] = iter(free)

        def now() -> Mapping[Pool, MemoryNow]:
            return {
                pool: MemoryNow(total_bytes=int(total * GIB), available_bytes=int(left * GIB))
                for pool, (total, left) in next(moments).items()
            }

        monkeypatch.setattr(machine, "measure_memory", now)
        monkeypatch.setattr(
            machine, "resident_bytes", lambda _pids: {p: int(size * GIB) for p, size in ours.items()}
        )
        sizes = {pool: int(size * GIB) for pool, size in given.items()}
        measured = app.measuring(0.5, hardware)([4242], sizes)
        return {pool: each.available_bytes / GIB for pool, each in measured.items()}

    return measure


@pytest.mark.parametrize(
    ("before", "after", "may_take"),
    [(4, 4, 5), (4, 10, 5), (10, 4, 5)],
    ids=["nothing happens", "one ends once it was counted", "one grows before it was counted"],
)
def test_an_engine_that_ends_or_grows_meanwhile_is_never_counted_twice(
    measures: Callable[..., Mapping[Pool, float]], before: float, after: float, may_take: float
) -> None:
    free = [{Pool.RAM: (16, before)}, {Pool.RAM: (16, after)}]
    assert measures(CPU_BOX, free, {Pool.RAM: 6}, {}) == {Pool.RAM: may_take}


def test_a_gpu_whose_driver_does_not_answer_has_nothing_free(
    measures: Callable[..., Mapping[Pool, float]],
) -> None:
    silent: list[Free] = [{Pool.RAM: (16, 8), Pool.VRAM: (24, 20)}, {Pool.RAM: (16, 8)}]
    assert measures(GPU_BOX, silent, {Pool.RAM: 0}, {}) == {Pool.RAM: 4, Pool.VRAM: 0}


def test_what_a_driver_does_not_tell_in_a_container_is_what_those_that_serve_were_given(
    measures: Callable[..., Mapping[Pool, float]],
) -> None:
    free: list[Free] = [{Pool.RAM: (16, 8), Pool.VRAM: (24, 4)}] * 2
    given = {Pool.VRAM: 16}
    told = measures(GPU_BOX, free, {Pool.RAM: 2, Pool.VRAM: 0}, given)
    assert told[Pool.VRAM] == 10  # half of what is free and of what it would give back
    told = measures(GPU_BOX, free, {Pool.RAM: 2, Pool.VRAM: 12}, given)
    assert told[Pool.VRAM] == 8  # what is told counts
    assert measures(GPU_BOX, free, {Pool.RAM: 0, Pool.VRAM: 0}, given)[Pool.VRAM] == 2  # it has ended


def test_no_more_is_held_than_is_in_use() -> None:
    now = MemoryNow(total_bytes=24 * GIB, available_bytes=20 * GIB)
    assert held_bytes(now, 0, 16 * GIB) == 4 * GIB


async def test_a_model_whose_disk_is_mounted_later_is_served_then(tmp_path: Path) -> None:
    path = tmp_path / "disk" / "late.gguf"
    settings = Settings(models={"late": ModelOptions(path=str(path), pin=True, keep_alive_seconds=60)})
    installed = Installed(xllamacpp=True)
    inspection = app.Inspection(CPU_BOX, installed, NoChoice("no model was given"))
    offers = await app._offers(settings, inspection, Catalog(tmp_path / "models"), ClusterKey(None, None))
    [offer] = offers.given
    memory = {Pool.RAM: MemoryNow(total_bytes=16 * GIB, available_bytes=8 * GIB)}
    with pytest.raises(NoChoice, match="there is no file or folder"):
        offer.plan(memory)
    path.parent.mkdir()
    path.write_bytes(b"GGUF" + bytes(1000))
    plan = offer.plan(memory)
    assert (plan.name, plan.spec.name, plan.model) == ("late", "llama.cpp", str(path))
    assert (offer.name, offer.pinned, offer.ttl_seconds) == ("late", True, 60)
