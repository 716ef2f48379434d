"""Where API keys are kept: `api_keys.json` in the data folder, written whole, and noticed when it changes.

What another process or a hand changes there holds within a second, what is changed here at once. The file
holds digests only; who may write to it may let others in, so it has to be its owner's alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from balancer.access import MAX_KEYS, Access, ApiKey, Permission, digest_of, written
from balancer.core.errors import Conflict, NotFound
from balancer.keys import KeyFault, read_own
from worker_agent import private_files

log = logging.getLogger(__name__)

FILE = "api_keys.json"
LOOK_SECONDS = 0.4
MAX_FILE_BYTES = 16 * 1024 * 1024
_ID_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
_ID_LENGTH = 10

_State = tuple[int, int, int] | None
"""By which a file is known to be another one than before; None: there is none."""


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: Annotated[tuple[ApiKey, ...], Field(max_length=MAX_KEYS)] = ()


class KeyStore:
    """The keys on disk, and in force."""

    def __init__(self, folder: Path, access: Access, wall: Callable[[], datetime]) -> None:
        self._path = folder / FILE
        self._access = access
        self._wall = wall
        self._keys: tuple[ApiKey, ...] = ()
        self._seen: _State = None
        self._changing = asyncio.Lock()

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """Oldest first, those that are over among them."""
        return self._keys

    def state(self, key: ApiKey) -> str:
        """`in force`, `expired` or `revoked`."""
        if key.revoked is not None:
            return "revoked"
        return "expired" if key.is_over(self._wall()) else "in force"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The keys hold inside the block, and what changes in the file is noticed. Raises `KeyFault`."""
        self._adopt(*await asyncio.to_thread(_read, self._path))
        # Kept here, awaited on leaving. A task group would wrap what is raised in the block.
        watching = asyncio.create_task(self._watch(), name="API keys")  # noqa: TID251
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def create(self, permission: Permission) -> tuple[ApiKey, str]:
        """A new key, and what its holder is given; that is kept nowhere. Raises `Conflict`."""
        secret = secrets.token_urlsafe(32)

        def add(keys: list[ApiKey]) -> ApiKey:
            self._insist_on_free_name(keys, permission.name)
            if len(keys) >= MAX_KEYS:
                over = next((one for one in keys if one.is_over(self._wall())), None)
                if over is None:
                    raise Conflict(f"There are {MAX_KEYS} keys in force: revoke some first.")
                keys.remove(over)
            key = ApiKey(
                **permission.model_dump(),
                id=_new_id({one.id for one in keys}),
                digest=digest_of(secret),
                created=self._wall(),
            )
            keys.append(key)
            return key

        key = await self._changed(add)
        return key, written(key.id, secret)

    async def change(self, key_id: str, revise: Callable[[ApiKey], ApiKey]) -> ApiKey:
        """Other limits for a key. Raises `NotFound`, and `Conflict` for one that is revoked or a name that is
        taken."""

        def put(keys: list[ApiKey]) -> ApiKey:
            key = _one(keys, key_id)
            if key.revoked is not None:
                raise Conflict(f"The key {key_id} was revoked, for good: make a new one.")
            revised = revise(key)
            if revised.name != key.name:
                self._insist_on_free_name(keys, revised.name)
            keys[keys.index(key)] = revised
            return revised

        return await self._changed(put)

    async def revoke(self, key_id: str) -> ApiKey:
        """From now on it is refused, with what waits; what a worker has may finish. Raises `NotFound`."""

        def put(keys: list[ApiKey]) -> ApiKey:
            key = _one(keys, key_id)
            if key.revoked is not None:
                return key
            revoked = key.model_copy(update={"revoked": self._wall()})
            keys[keys.index(key)] = revoked
            return revoked

        return await self._changed(put)

    def _insist_on_free_name(self, keys: list[ApiKey], name: str) -> None:
        now = self._wall()
        if any(one.name == name and not one.is_over(now) for one in keys):
            raise Conflict(f"There is a key named {name!r} already: take another name, or revoke that one.")

    async def _changed(self, change: Callable[[list[ApiKey]], ApiKey]) -> ApiKey:
        """Reads, changes and writes, alone among all processes."""

        def rewrite() -> tuple[ApiKey, tuple[ApiKey, ...], _State]:
            with _alone(self._path):
                keys = list(_read(self._path)[0])
                key = change(keys)
                return key, tuple(keys), _write(self._path, keys)

        async with self._changing:
            try:
                key, keys, state = await asyncio.to_thread(rewrite)
            except KeyFault as fault:
                raise Conflict(f"{fault}.") from None
            except OSError as error:
                raise Conflict(f"{self._path} cannot be written: {error.strerror or error}.") from error
            self._adopt(keys, state)
        return key

    def _adopt(self, keys: tuple[ApiKey, ...], state: _State) -> None:
        self._keys, self._seen = keys, state
        self._access.put(keys)

    async def _watch(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            async with self._changing:
                try:
                    await self._look()
                    told = ""
                except KeyFault as fault:
                    # Read again with the next look: what was wrong may be put right without a change of it.
                    if str(fault) != told:
                        told = str(fault)
                        log.error("%s. Until then the API keys stay as they were", fault)
                except Exception:
                    log.exception("a defect of the balancer, in looking at the API keys")

    async def _look(self) -> None:
        state = await asyncio.to_thread(_state, self._path)
        if state == self._seen:
            return
        keys, state = await asyncio.to_thread(_read, self._path)
        self._adopt(keys, state)
        log.info("the API keys in %s were read again: there are %d", self._path, len(keys))


def _new_id(taken: set[str]) -> str:
    while True:
        found = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
        if found not in taken:
            return found


def _one(keys: list[ApiKey], key_id: str) -> ApiKey:
    for key in keys:
        if key.id == key_id:
            return key
    raise NotFound("There is no API key of that id: `balancer keys list` shows them.")


# The file; all of this blocks ...


def _state(path: Path) -> _State:
    try:
        about = path.lstat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _read(path: Path) -> tuple[tuple[ApiKey, ...], _State]:
    """Raises `KeyFault`."""
    state = _state(path)  # before it is read: what changes in between is noticed by the next look
    try:
        data = read_own(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return (), None
    try:
        keys = _Kept.model_validate_json(data).keys
        if len({key.id for key in keys}) != len(keys):
            raise ValueError
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeyFault(f"{path} does not hold API keys: {where}: {first['msg']}; put it right") from None
    except ValueError:
        raise KeyFault(f"{path} does not hold API keys: an id is there twice") from None
    return keys, state


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _write(path: Path, keys: list[ApiKey]) -> _State:
    """Raises `OSError`."""
    text = _Kept(keys=tuple(keys)).model_dump_json(indent=1, by_alias=True)
    private_files.replace(path, f"{text}\n".encode())
    return _state(path)
