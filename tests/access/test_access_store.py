"""API keys on disk: kept as digests, changed by whoever may, noticed when another does."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from balancer.access import Access, ApiKeyOver, ApiKeyWrong, Permission
from balancer.access_store import FILE, KeyStore
from balancer.core.errors import Conflict, NotFound
from balancer.keys import KeyFault

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def room(folder: Path) -> tuple[KeyStore, Access]:
    access = Access(lambda: 0.0, lambda: NOW)
    return KeyStore(folder, access, lambda: NOW), access


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def is_refused(access: Access, key: str, error: type[Exception]) -> bool:
    try:
        access.recognise(bearer(key), "")
    except error:
        return True
    return False


async def test_a_key_is_in_force_at_once_and_after_a_restart_and_is_kept_nowhere(tmp_path: Path):
    store, access = room(tmp_path)
    async with store.running():
        key, given = await store.create(Permission(name="ann"))
        assert access.recognise(bearer(given), "") == key
    file = tmp_path / FILE
    assert given.partition(".")[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store, access = room(tmp_path)
    async with store.running():
        assert access.recognise(bearer(given), "") == key


async def test_a_name_is_given_once_until_its_key_is_revoked(tmp_path: Path):
    store, access = room(tmp_path)
    async with store.running():
        first, given = await store.create(Permission(name="ann"))
        with pytest.raises(Conflict, match="'ann'"):
            await store.create(Permission(name="ann"))
        await store.revoke(first.id)
        assert is_refused(access, given, ApiKeyOver)
        second, _ = await store.create(Permission(name="ann"))
        with pytest.raises(Conflict, match="for good"):
            await store.change(first.id, lambda key: key)
        assert (await store.revoke(first.id)).revoked == NOW
        with pytest.raises(NotFound):
            await store.revoke("nobodys222")
        assert [store.state(key) for key in store.keys] == ["revoked", "in force"]
        assert second.id != first.id


async def test_what_another_process_revokes_is_refused_here(tmp_path: Path):
    ours, access = room(tmp_path)
    theirs, _ = room(tmp_path)
    async with ours.running(), theirs.running():
        key, given = await ours.create(Permission(name="ann"))
        await theirs.revoke(key.id)
        await until(lambda: is_refused(access, given, ApiKeyOver))
        # Neither has lost what the other has done.
        await ours.create(Permission(name="bob"))
        await theirs.create(Permission(name="cyd"))
        await until(lambda: {one.name for one in ours.keys} == {"ann", "bob", "cyd"})


async def test_a_file_that_is_gone_lets_nobody_in(tmp_path: Path):
    store, access = room(tmp_path)
    async with store.running():
        _, given = await store.create(Permission(name="ann"))
        (tmp_path / FILE).unlink()
        await until(lambda: is_refused(access, given, ApiKeyWrong))


async def test_a_file_that_is_broken_by_hand_is_told_of_once_and_changes_nothing(tmp_path: Path, caplog):
    store, access = room(tmp_path)
    async with store.running():
        _, given = await store.create(Permission(name="ann"))
        whole = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(whole[:-20])
        await until(lambda: "stay as they were" in caplog.text)
        assert access.recognise(bearer(given), "").name == "ann"
        with pytest.raises(Conflict, match="does not hold API keys"):
            await store.create(Permission(name="bob"))
        (tmp_path / FILE).write_bytes(whole.replace(b"ann", b"eve"))
        await until(lambda: access.recognise(bearer(given), "").name == "eve")
    assert caplog.text.count("stay as they were") == 1


async def test_a_file_that_is_put_right_without_a_change_of_what_it_holds_counts(tmp_path: Path, caplog):
    """An editor has made it readable for others, and the log said `chmod 600`."""
    store, access = room(tmp_path)
    file = tmp_path / FILE
    async with store.running():
        _, given = await store.create(Permission(name="ann"))
        draft = tmp_path / "draft"
        draft.write_bytes(file.read_bytes().replace(b'"revoked": null', b'"revoked": "2020-01-01T00:00:00Z"'))
        os.chmod(draft, 0o644)
        draft.replace(file)
        await until(lambda: "chmod 600" in caplog.text)
        os.chmod(file, 0o600)
        await until(lambda: is_refused(access, given, ApiKeyOver))
    assert caplog.text.count("stay as they were") == 1


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"{", 0o600, "does not hold API keys"),
        (b'{"keys": [{"id": "x"}]}', 0o600, "does not hold API keys"),
        (b'{"keys": []}', 0o666, "chmod 600"),
    ],
)
async def test_nothing_starts_on_keys_that_cannot_be_trusted(
    tmp_path: Path, content: bytes, mode: int, words: str
):
    file = tmp_path / FILE
    file.write_bytes(content)
    os.chmod(file, mode)
    store, _ = room(tmp_path)
    with pytest.raises(KeyFault, match=words):
        async with store.running():
            pass


async def test_a_link_is_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").write_text('{"keys": []}')
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    store, _ = room(tmp_path)
    with pytest.raises(KeyFault, match="link"):
        async with store.running():
            pass
