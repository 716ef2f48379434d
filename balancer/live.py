"""The settings that are in force: read again while all runs, applied as a difference, or left as they are.

What runs is never cut: a request keeps the worker, the address and the limits with which it began. A file
that is broken, empty or gone changes nothing; the last good one stays in force, and what is wrong is told.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from balancer.admin import ConfigFault, NotReloaded, Reloaded
from balancer.discovery import Entry
from balancer.settings import NAMES, Settings, SettingsError
from worker_agent.forgiving_json import ConfigFaults, Fault

log = logging.getLogger(__name__)

MAX_FAULTS_LOGGED = 10


def _always(_before: Settings, _after: Settings) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """Settings that may change while all runs."""

    names: frozenset[str]
    apply: Callable[[Settings], None]
    """Given all settings as they are in force from now on, without those that wait for a restart."""
    fits: Callable[[Settings, Settings], bool] = _always
    """Whether what there is can take these over from those; else they wait for a restart."""


class LiveConfiguration:
    """The settings that are in force, which the same file, variables and flags may change while all runs."""

    def __init__(self, settings: Settings, put_room: Callable[[Sequence[Entry]], None]) -> None:
        """`put_room`: replaces the workers that the configuration lists."""
        self._in_force = settings
        self._room = settings.room
        self._sources = {name: settings.source_of(name) for name in NAMES}
        self._put_room = put_room
        self._live: tuple[LiveSettings, ...] = (LiveSettings(frozenset({"log_level"}), _set_log_level),)
        self._needs_restart: tuple[str, ...] = ()
        self._faults: tuple[ConfigFault, ...] = ()
        self._since = self._last_good = datetime.now(UTC)
        self._reading = asyncio.Lock()
        self._soon: set[asyncio.Task[None]] = set()

    def govern(self, *live: LiveSettings) -> None:
        """These take effect from now on when the configuration is read again."""
        self._live += live

    @property
    def is_ok(self) -> bool:
        """The file, as it was last read, is what is in force."""
        return not self._faults

    def shown(self) -> Mapping[str, object]:
        """As JSON, without secrets."""
        workers = [dataclasses.asdict(entry.worker) for entry in self._room]  # headers hold secrets
        for worker in workers:
            worker["only"] = sorted(worker["only"])
        file = self._in_force.config
        return {
            "file": None if file is None else str(file),
            "status": {
                "state": "ok" if self.is_ok else "broken",
                "since": _iso(self._since),
                "last_good_at": _iso(self._last_good),
                "faults": [dataclasses.asdict(fault) for fault in self._faults],
                "file": None if file is None else str(file),
            },
            "needs_restart": self._needs_restart,
            "settings": self._in_force.model_dump(mode="json", exclude={"workers"}),
            "sources": self._sources,
            "workers": workers,
        }

    def files(self) -> tuple[Path, ...]:
        """Those that say what the settings are. Blocking."""
        return self._in_force.files()

    async def reload(self, by: str) -> Reloaded:
        """Raises `NotReloaded`. `by`: who wants it, for the log."""
        async with self._reading:
            fresh = await self._fresh()
            told = self._apply(fresh, anyway=True)
            log.info("%s: the configuration was read again (%s)", by, told)
            return told

    async def was_saved(self) -> None:
        """Reads it again, since a file has changed; the log says what came of it."""
        async with self._reading:
            told_already = self._faults
            try:
                fresh = await self._fresh()
            except NotReloaded as refused:
                if refused.faults != told_already:
                    _log_faults("it was saved", refused)
                return
            told = self._apply(fresh, anyway=False)
            if told != Reloaded():
                log.info("the configuration was saved: %s", told)

    def reload_soon(self, by: str) -> None:
        """In a task; nobody waits for its outcome but the log."""

        async def go() -> None:
            try:
                await self.reload(by)
            except NotReloaded as refused:
                _log_faults(by, refused)
            except Exception:
                log.exception("a defect of the balancer, in reading the configuration again")

        # Kept in _soon until it ends; aclose awaits it.
        task = asyncio.create_task(go(), name="reload")  # noqa: TID251
        self._soon.add(task)
        task.add_done_callback(self._soon.discard)

    async def aclose(self) -> None:
        """Ends what `reload_soon` has begun."""
        for task in self._soon:
            task.cancel()
        await asyncio.gather(*self._soon, return_exceptions=True)

    async def _fresh(self) -> Settings:
        """The settings as they are to be. Raises `NotReloaded`, and keeps why for those who ask later."""
        if self._in_force.config is None:
            raise NotReloaded(
                [ConfigFault("The balancer was started without --config: there is no file to read again.")]
            )
        try:
            fresh = await asyncio.to_thread(self._in_force.read_again)
        except ConfigFaults as error:
            faults = [_fault(one) for one in error.faults]
        except SettingsError as error:
            faults = [ConfigFault(line) for line in str(error).splitlines()]
        else:
            self._note_good()
            return fresh
        if self.is_ok:
            self._since = datetime.now(UTC)
        self._faults = tuple(faults)
        raise NotReloaded(faults)

    def _note_good(self) -> None:
        self._last_good = datetime.now(UTC)
        if not self.is_ok:
            self._faults, self._since = (), self._last_good
            log.info("the configuration is fine again")

    def _apply(self, fresh: Settings, *, anyway: bool) -> Reloaded:
        """`anyway`: the workers are put into the room also where none has changed; those that were removed by
        hand come back with it."""
        before = {entry.worker.id: entry for entry in self._room}
        after = {entry.worker.id: entry for entry in fresh.room}
        if before and not after:
            log.warning(
                "the configuration lists no workers any more: %d leave the room, and finish what they have",
                len(before),
            )
        if anyway or before != after:
            self._put_room(fresh.room)
        self._room = fresh.room
        applied = self._take_over(fresh)
        self._sources |= {
            name: fresh.source_of(name)
            for name in NAMES
            if _value(self._in_force, name) == _value(fresh, name)
        }
        self._needs_restart = _differing(self._in_force, fresh)
        return Reloaded(
            added=tuple(sorted(after.keys() - before.keys())),
            removed=tuple(sorted(before.keys() - after.keys())),
            changed=tuple(
                sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
            ),
            applied=tuple(name for name in NAMES if name in applied),
            needs_restart=self._needs_restart,
        )

    def _take_over(self, fresh: Settings) -> set[str]:
        """Names of the settings that have another value from now on."""
        applied: set[str] = set()
        for live in self._live:
            changed = {name for name in live.names if _value(self._in_force, name) != _value(fresh, name)}
            if not changed:
                continue
            wanted = self._in_force.taking(changed, fresh)
            if live.fits(self._in_force, wanted):
                live.apply(wanted)
                self._in_force = wanted
                applied |= changed
        return applied


def _value(settings: Settings, name: str) -> object:
    """By which it is seen that it has changed."""
    value: object = getattr(settings, name)
    return settings.named_sources() if name == "discover" else value  # with the keys that it names


def _set_log_level(settings: Settings) -> None:
    logging.getLogger().setLevel(settings.log_level)


def _log_faults(by: str, refused: NotReloaded) -> None:
    """A line for each: none can hide behind another."""
    for fault in refused.faults[:MAX_FAULTS_LOGGED]:
        log.error("%s: the configuration stays as it is: %s", by, fault.message)
    more = len(refused.faults) - MAX_FAULTS_LOGGED
    if more > 0:
        log.error("%s: ... and %d more faults; `balancer config check FILE` tells them all", by, more)


def _fault(fault: Fault) -> ConfigFault:
    place = fault.place
    return ConfigFault(str(fault), place.line if place else None, place.column if place else None)


def _differing(in_force: Settings, fresh: Settings) -> tuple[str, ...]:
    """Settings that are other than what is in force, and hold from the next start on."""
    names = [name for name in NAMES if getattr(in_force, name) != getattr(fresh, name)]
    for name in ("admin_key", "cluster_key"):  # themselves, wherever they come from
        if getattr(in_force, name) != getattr(fresh, name) and f"{name}_file" not in names:
            names.append(name)
    return tuple(names)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
