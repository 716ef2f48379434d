"""A file that was saved is noticed, however that was done; one that is being written is waited for."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from balancer.config_watch import ConfigWatch, ConfigWatchPolicy

QUICK = ConfigWatchPolicy(look_seconds=0.02, settle_seconds=0.05)


class Reader:
    """What a balancer would read, each time that it is told to."""

    def __init__(self, *files: Path) -> None:
        self.files = files
        self.read: list[str] = []
        self.news = asyncio.Event()

    async def saved(self) -> None:
        self.read.append(self.files[0].read_text() if self.files[0].exists() else "gone")
        self.news.set()

    async def until_it_read(self, text: str) -> None:
        async with asyncio.timeout(10):
            while not self.read or self.read[-1] != text:
                self.news.clear()
                await self.news.wait()


@contextmanager
def watched(*files: Path) -> Iterator[Reader]:
    reader = Reader(*files)
    watch = asyncio.ensure_future(ConfigWatch(lambda: reader.files, reader.saved, QUICK).run())
    try:
        yield reader
    finally:
        watch.cancel()


def in_place(file: Path, text: str) -> None:
    file.write_text(text)


def renamed(file: Path, text: str) -> None:
    draft = file.with_suffix(".swp")
    draft.write_text(text)
    draft.replace(file)


def deleted_and_created(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)


def link_turned(file: Path, text: str) -> None:
    """As Kubernetes does with a ConfigMap: the name is a link through `..data`, which is a link itself."""
    folder = file.parent / f"..{len(os.listdir(file.parent))}"
    folder.mkdir()
    (folder / file.name).write_text(text)
    data = file.parent / "..data"
    draft = file.parent / "..draft"
    draft.symlink_to(folder.name)
    draft.replace(data)
    if not file.is_symlink():
        file.unlink()
        file.symlink_to(f"..data/{file.name}")


def with_the_old_time(file: Path, text: str) -> None:
    before = file.stat()
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("save", [in_place, renamed, deleted_and_created, link_turned, with_the_old_time])
async def test_every_way_to_save_a_file_is_noticed(tmp_path: Path, save: Callable[[Path, str], None]):
    file = tmp_path / "balancer.json"
    file.write_text("text 0")
    with watched(file) as reader:
        await reader.until_it_read("text 0")
        for number in range(1, 4):  # of one length, so that no size tells
            save(file, f"text {number}")
            await reader.until_it_read(f"text {number}")
        assert reader.read == ["text 0", "text 1", "text 2", "text 3"]


async def test_a_file_that_is_still_being_written_is_not_read(tmp_path: Path):
    file = tmp_path / "balancer.json"
    file.write_text("0")
    with watched(file) as reader:
        await reader.until_it_read("0")
        for _ in range(20):
            with file.open("a") as out:
                out.write("1")
            await asyncio.sleep(QUICK.settle_seconds / 4)
        await reader.until_it_read("0" + 20 * "1")
        assert len(reader.read) < 6


async def test_a_file_that_is_gone_or_another_one_is_a_change(tmp_path: Path):
    file = tmp_path / "balancer.json"
    file.write_text("0")
    with watched(file) as reader:
        await reader.until_it_read("0")
        file.unlink()
        await reader.until_it_read("gone")
        reader.files = (tmp_path / "other.json", file)
        (tmp_path / "other.json").write_text("2")
        await reader.until_it_read("2")


async def test_to_touch_a_file_changes_nothing_and_a_file_that_it_names_counts(tmp_path: Path):
    file, key = tmp_path / "balancer.json", tmp_path / "key"
    file.write_text("0")
    key.write_text("a")
    with watched(file, key) as reader:
        await reader.until_it_read("0")
        os.utime(file)
        key.write_text("b")
        async with asyncio.timeout(10):
            while len(reader.read) < 2:
                await asyncio.sleep(0.01)
        assert reader.read == ["0", "0"]
