"""The audit log: one record for each change, whatever becomes of the disk."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from balancer.audit import Audit, AuditPolicy


def audit(folder: Path, policy: AuditPolicy | None = None) -> Audit:
    return Audit(folder, lambda: 0.0, lambda: datetime(2030, 1, 1, tzinfo=UTC), policy)


def lines(file: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


async def test_records_are_written_in_order_for_the_owners_eyes(tmp_path: Path):
    log = audit(tmp_path)
    async with log.running():
        for number in range(100):
            log.record(who="admin key", number=number)
        newest = await log.last(3)
    file = tmp_path / "audit.jsonl"
    assert [one["number"] for one in lines(file)] == list(range(100))
    assert [one["number"] for one in newest] == [99, 98, 97]
    assert lines(file)[0]["at"] == "2030-01-01T00:00:00.000+00:00"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_what_was_recorded_last_is_written_on_leaving(tmp_path: Path):
    log = audit(tmp_path)
    async with log.running():
        log.record(number=1)
    assert lines(tmp_path / "audit.jsonl")[0]["number"] == 1


async def test_files_are_rotated_and_only_so_many_kept(tmp_path: Path):
    log = audit(tmp_path, AuditPolicy(max_bytes=300, max_files=2))
    async with log.running():
        for number in range(40):
            log.record(number=number)
            await log.last(1)
        assert [one["number"] for one in await log.last(6)] == [39, 38, 37, 36, 35, 34]
    sizes = {name: os.stat(tmp_path / name).st_size for name in os.listdir(tmp_path)}
    assert sorted(sizes) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert max(sizes.values()) <= 300


async def test_after_a_line_that_was_torn_the_next_one_is_whole(tmp_path: Path):
    file = tmp_path / "audit.jsonl"
    file.write_bytes(b'{"number":1}\n{"numb')
    log = audit(tmp_path)
    async with log.running():
        log.record(number=2)
        assert [one["number"] for one in await log.last(9)] == [2, 1]


async def test_a_disk_that_takes_nothing_is_told_of_and_holds_nobody_up(tmp_path: Path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "audit.jsonl").mkdir()  # nothing can be appended to that
    log = audit(tmp_path)
    async with log.running():
        for number in range(5):
            log.record(number=number)
            await log._flush()
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_link(file: Path) -> None:
    (file.parent / "elsewhere").write_text("{}\n")
    file.symlink_to("elsewhere")


@pytest.mark.parametrize("put", [a_pipe, a_link, Path.mkdir])
async def test_what_is_no_file_in_its_place_holds_nobody_up(
    tmp_path: Path, caplog, put: Callable[[Path], None]
):
    put(tmp_path / "audit.jsonl")
    log = audit(tmp_path)
    async with asyncio.timeout(20), log.running():
        log.record(number=1)
        with pytest.raises(OSError):
            await log.last(9)
    assert "cannot be written" in caplog.text
    assert not (tmp_path / "elsewhere").exists() or (tmp_path / "elsewhere").read_text() == "{}\n"


async def test_more_than_can_wait_is_counted_and_not_kept(tmp_path: Path, caplog):
    log = audit(tmp_path, AuditPolicy(max_waiting=10))
    for number in range(100):
        log.record(number=number)
    assert "records are lost" in caplog.text
    async with log.running():
        pass
    assert len(lines(tmp_path / "audit.jsonl")) == 10


async def test_whoever_guesses_keys_cannot_fill_the_disk(tmp_path: Path):
    now = [0.0]
    log = Audit(tmp_path, lambda: now[0], lambda: datetime(2030, 1, 1, tzinfo=UTC))
    async with log.running():
        for _ in range(1000):
            log.refused(refused="admin_key_wrong")
        now[0] = 1.0
        log.refused(refused="admin_key_wrong")
    assert [one.get("times") for one in lines(tmp_path / "audit.jsonl")] == [None, 1000]


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", '"}{"who":"root"', "\u202e", "\x00"])
async def test_no_value_begins_a_record_of_its_own(tmp_path: Path, text: str):
    log = audit(tmp_path)
    async with log.running():
        log.record(what=text)
    assert [one["what"] for one in lines(tmp_path / "audit.jsonl")] == [text]
