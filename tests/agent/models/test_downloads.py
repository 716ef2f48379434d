"""The downloads of an agent: begun, told, cancelled, gone on with, and gone when the agent goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from fakes.hub import FakeHub, Faults

from agent.models.scenes import CHECKOUT, FOLDER_REPO, GGUF_REPO, environment, gguf, transformers_folder
from agent.scenes import alive, until, wait_until
from worker_agent.models.catalog import Catalog
from worker_agent.models.downloads import (
    DEFAULT_ENDPOINT,
    DownloadPolicy,
    DownloadRefused,
    Downloads,
    hub_endpoint,
    hub_token,
)
from worker_agent.models.local import Format
from worker_agent.wire import Download, DownloadState, ModelOrder

FILE = "tiny-Q4_K_M.gguf"
ORDER = ModelOrder(name="tiny", repo=GGUF_REPO)


class Scene:
    """Downloads that run against the fake hub."""

    def __init__(self, hub: FakeHub, folder: Path, *, token: str | None = None, at_once: int = 1) -> None:
        self.catalog = Catalog(folder)
        self.changes = 0
        policy = DownloadPolicy(
            endpoint=hub.endpoint,
            token=token,
            formats=(Format.GGUF, Format.SAFETENSORS),
            margin_bytes=0,
            retry_seconds=0.0,
            at_once=at_once,
            most_waiting=2,
        )
        self.downloads = Downloads(self.catalog, policy, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def told(self, name: str = "tiny") -> Download:
        return next(each for each in self.downloads.told() if each.name == name)

    async def ended(self, name: str = "tiny") -> Download:
        await until(lambda: self.told(name).state in (DownloadState.DONE, DownloadState.FAILED), seconds=60)
        return self.told(name)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Downloads]:
        async with self.downloads.running():
            yield self.downloads


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def test_a_download_is_told_from_its_start_to_its_end(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(400_000)
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(hold_after=150_000)})
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        begun = downloads.start(ORDER)
        assert (begun.state, begun.repo, begun.total_bytes) == (DownloadState.DOWNLOADING, GGUF_REPO, None)
        assert downloads.start(ORDER) == begun, "the same one once more is the one that runs"
        await until(lambda: 0 < scene.told().done_bytes < len(content))
        assert scene.told().total_bytes == len(content)
        assert scene.changes > 1
        hub.release.set()
        ended = await scene.ended()
        assert (ended.state, ended.done_bytes, ended.detail) == (DownloadState.DONE, len(content), "")
        assert ended.eta_seconds is None
        assert [model.name for model in scene.catalog.scan()] == ["tiny"]
        with pytest.raises(DownloadRefused, match="is here already") as refused:
            downloads.start(ORDER)
        assert refused.value.code == "model_exists"


async def test_why_a_download_failed_is_told_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, gated=True)
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        downloads.start(ORDER)
        ended = await scene.ended()
        assert ended.state is DownloadState.FAILED
        assert ended.detail.endswith(f"{hub.endpoint}/{GGUF_REPO}, then set HF_TOKEN or give hub_token_file")
        hub.repos[GGUF_REPO].gated = False
        downloads.start(ORDER)
        assert (await scene.ended()).state is DownloadState.DONE
        assert len(downloads.told()) == 1, "of one name the last is told"


async def test_cancelled_and_begun_again_it_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf(1_000_000)
    repo = hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(hold_after=400_000)})
    scene = Scene(hub, tmp_path)
    part = tmp_path / ".staging" / "tiny" / f"{FILE}.part"
    async with scene.running() as downloads:
        downloads.start(ORDER)
        await until(lambda: part.exists() and part.stat().st_size == 400_000)
        assert downloads.cancel("tiny")
        repo.faults.clear()
        downloads.start(ORDER)  # while the one before is still leaving
        ended = await scene.ended()
        assert ended.state is DownloadState.DONE
        assert hub.asked_for(FILE)[-1].range == "bytes=400000-"
        assert (tmp_path / "tiny" / FILE).read_bytes() == content
        assert not downloads.cancel("tiny"), "it has ended"


async def test_what_was_cancelled_leaves_no_process_and_says_how_to_go_on(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(hold_after=1000)})
    scene = Scene(hub, tmp_path)
    before = children()
    async with scene.running() as downloads:
        downloads.start(ORDER)
        await until(lambda: scene.told().done_bytes)
        ours = children() - before
        assert len(ours) == 2, "the guard and the process behind it"
        downloads.cancel("tiny")
        ended = await scene.ended()
        assert (ended.state, "start it again to go on" in ended.detail) == (DownloadState.FAILED, True)
        assert not any(map(alive, ours))


async def test_the_end_of_the_agent_is_the_end_of_its_downloads(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(hold_after=1000)})
    scene = Scene(hub, tmp_path)
    before = children()
    async with scene.running() as downloads:
        downloads.start(ORDER)
        downloads.start(ModelOrder(name="later", repo=GGUF_REPO))
        await until(lambda: scene.told().done_bytes)
        ours = children() - before
    assert not any(map(alive, ours))
    with pytest.raises(DownloadRefused, match="is stopping"):
        downloads.start(ModelOrder(name="another", repo=GGUF_REPO))


AGENT_STAND_IN = """
import asyncio, sys
from pathlib import Path
from worker_agent.models.catalog import Catalog
from worker_agent.models.downloads import DownloadPolicy, Downloads
from worker_agent.wire import ModelOrder
async def main():
    downloads = Downloads(Catalog(Path(sys.argv[2])), DownloadPolicy(endpoint=sys.argv[1]), lambda: None)
    async with downloads.running():
        downloads.start(ModelOrder(name="tiny", repo=sys.argv[3]))
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_an_agent_that_is_killed_leaves_no_process_and_what_has_come(hub: FakeHub, tmp_path: Path) -> None:
    content = gguf()
    hub.add(GGUF_REPO, {FILE: content}, faults={FILE: Faults(hold_after=100_000)})
    argv = [sys.executable, "-c", AGENT_STAND_IN, hub.endpoint, str(tmp_path), GGUF_REPO]
    with subprocess.Popen(argv, cwd=CHECKOUT, env=environment()) as agent:
        part = tmp_path / ".staging" / "tiny" / f"{FILE}.part"
        wait_until(lambda: part.exists() and part.stat().st_size == 100_000)
        family = [child.pid for child in psutil.Process(agent.pid).children(recursive=True)]
        agent.kill()
    assert len(family) == 2
    wait_until(lambda: not any(map(alive, family)))
    assert part.stat().st_size == 100_000
    assert Catalog(tmp_path).scan() == ()


async def test_others_wait_for_their_turn_and_are_not_without_number(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(hold_after=1000)})
    hub.add(FOLDER_REPO, transformers_folder())
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        downloads.start(ORDER)
        hub.repos["org/Other"] = hub.repos[FOLDER_REPO]
        waiting = downloads.start(ModelOrder(name="org/Other"))
        assert (waiting.name, waiting.detail) == ("Other", "waits for another download to end")
        with pytest.raises(
            DownloadRefused, match="is being downloaded from org/Tiny-GGUF already"
        ) as refused:
            downloads.start(ModelOrder(name="Tiny", repo=FOLDER_REPO))
        assert refused.value.code == "name_taken"
        downloads.start(ModelOrder(name="third", repo=FOLDER_REPO))
        with pytest.raises(DownloadRefused, match="3 downloads wait or run already") as refused:
            downloads.start(ModelOrder(name="fourth", repo=FOLDER_REPO))
        assert refused.value.code == "too_many_downloads"
        assert downloads.cancel("third"), "also one that has not begun"
        assert (await scene.ended("third")).state is DownloadState.FAILED
        hub.release.set()
        assert (await scene.ended("Other")).state is DownloadState.DONE
        assert (await scene.ended("tiny")).state is DownloadState.DONE


@pytest.mark.parametrize(
    "order",
    [
        ModelOrder(name="../../etc", repo=GGUF_REPO),
        ModelOrder(name="quarantine", repo=GGUF_REPO),
        ModelOrder(name="tiny", repo="../../etc"),
        ModelOrder(name="tiny"),
        ModelOrder(name="tiny", repo=GGUF_REPO, revision="../main"),
    ],
)
async def test_names_that_are_none_are_refused_before_a_process_starts(
    hub: FakeHub, tmp_path: Path, order: ModelOrder
) -> None:
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        with pytest.raises(DownloadRefused) as refused:
            downloads.start(order)
        assert refused.value.code == "bad_name"
        assert downloads.told() == ()
    assert hub.asked == []


async def test_the_token_is_in_no_argument_no_log_and_no_report(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.add(GGUF_REPO, {FILE: gguf()}, gated=True, faults={FILE: Faults(hold_after=1000)})
    scene = Scene(hub, tmp_path, token="hf_secret")
    before = children()
    async with scene.running() as downloads:
        downloads.start(ORDER)
        await until(lambda: scene.told().done_bytes)
        for pid in children() - before:
            assert "hf_secret" not in " ".join(psutil.Process(pid).cmdline())
        hub.release.set()
        ended = await scene.ended()
        assert ended.state is DownloadState.DONE, ended.detail
    assert "hf_secret" not in caplog.text + ended.model_dump_json() + repr(scene.downloads.__dict__)
    assert "hf_secret" in {asked.token.removeprefix("Bearer ") for asked in hub.asked if asked.token}


async def test_a_process_that_dies_by_itself_is_told(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        downloads.start(ORDER)
        ended = await scene.ended()
    assert (ended.state, ended.detail.startswith("the process that downloads ended with code")) == (
        DownloadState.FAILED,
        True,
    )


def test_where_the_token_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hf_kept\n")
    assert hub_token(file, {"HF_TOKEN": "hf_other"}) == "hf_kept"
    assert hub_token(None, {"HF_TOKEN": " hf_other ", "HF_HOME": str(tmp_path)}) == "hf_other"
    assert hub_token(None, {"HF_HOME": str(tmp_path)}) == "hf_kept"
    assert hub_token(None, {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}) is None
    assert hub_token(None, {"HF_HOME": str(tmp_path / "nowhere")}) is None
    with pytest.raises(DownloadRefused, match="the hub's token cannot be read"):
        hub_token(tmp_path / "nothing", {})


def test_which_hub() -> None:
    assert hub_endpoint({}) == hub_endpoint({"HF_ENDPOINT": ""}) == DEFAULT_ENDPOINT
    assert hub_endpoint({"HF_ENDPOINT": "http://mirror.local:8080/"}) == "http://mirror.local:8080"


def test_a_policy_shows_no_token() -> None:
    assert "hf_secret" not in repr(DownloadPolicy(token="hf_secret"))


def test_the_pace_gives_the_time_that_is_left() -> None:
    from worker_agent.models.downloads import _Job

    job = _Job(ORDER, GGUF_REPO, "tiny")
    job.hear(json.dumps({"done": 500, "total": 2000}), 0.0)
    assert job.told(waits=False).eta_seconds is None
    for second in range(1, 21):
        job.hear(json.dumps({"done": 500 + 50 * second}), float(second))
    assert job.told(waits=False).eta_seconds == pytest.approx(10)
    job.hear("a warning of some library", 21.0)
    job.hear('["no", "object"]', 21.0)
    assert job.told(waits=False).done_bytes == 1500


async def test_two_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(GGUF_REPO, {FILE: gguf()}, faults={FILE: Faults(hold_after=1000)})
    scene = Scene(hub, tmp_path, at_once=2)
    async with scene.running() as downloads:
        downloads.start(ORDER)
        downloads.start(ModelOrder(name="second", repo=GGUF_REPO))
        await until(lambda: scene.told().done_bytes and scene.told("second").done_bytes)
        hub.release.set()
        await asyncio.gather(scene.ended(), scene.ended("second"))
        assert [model.name for model in scene.catalog.scan()] == ["second", "tiny"]


async def test_a_hub_that_claims_more_bytes_than_there_are_spoils_no_report(
    hub: FakeHub, tmp_path: Path
) -> None:
    names = [f"tiny-Q4_K_M-0000{part}-of-00002.gguf" for part in (1, 2)]
    huge = Faults(told_size=2**53 - 1)
    hub.add(GGUF_REPO, dict.fromkeys(names, gguf()), faults=dict.fromkeys(names, huge))
    scene = Scene(hub, tmp_path)
    async with scene.running() as downloads:
        downloads.start(ORDER)
        ended = await scene.ended()
    assert ended.state is DownloadState.FAILED
    assert "more on the disk" in ended.detail
    assert ended.total_bytes is None
