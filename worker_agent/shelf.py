"""What this machine has on disk, and what is done with it by order: scanned, offered, fetched, deleted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from worker_agent.changes import Changes
from worker_agent.exchange import Refused
from worker_agent.models.catalog import Catalog, NotAModel
from worker_agent.models.downloads import DownloadRefused, Downloads
from worker_agent.models.local import LocalModel
from worker_agent.offers import Offer
from worker_agent.report import served_model
from worker_agent.residents import Residents
from worker_agent.wire import Download, DownloadState, ModelList, ModelOrder

_LOG = logging.getLogger(__name__)
LOOK_SECONDS = 60.0
"""`worker-agent models` fetches and deletes beside a running agent, too."""


class Shelf:
    """The models that can be loaded: those that were given at the start, then those that were downloaded."""

    def __init__(
        self,
        given: Sequence[Offer],
        offer: Callable[[LocalModel], Offer],
        catalog: Catalog,
        residents: Residents,
        missing: Sequence[Offer] = (),
    ) -> None:
        """`offer`: on which terms a downloaded model can be loaded. `missing`: names that the user expects to
        be downloaded, as they are told until that is done."""
        self._given = given
        self._missing = missing
        self._offer = offer
        self._catalog = catalog
        self._residents = residents
        self._downloads: Downloads | None = None
        self._downloaded: tuple[LocalModel, ...] = ()
        self._looked = False

    def fetched_by(self, downloads: Downloads) -> None:
        """What these finish appears at once. To be called before they run."""
        self._downloads = downloads

    def told(self) -> tuple[Download, ...]:
        """The downloads under way, and those that ended lately."""
        return () if self._downloads is None else self._downloads.told()

    def offer_the_given(self) -> None:
        """Before the disk is looked at."""
        self._residents.offer(self._given)

    async def look(self) -> None:
        """Offers what is there now."""
        before = self._downloaded
        try:
            self._downloaded = await asyncio.to_thread(self._catalog.scan)
        except OSError as error:
            _LOG.warning("%s cannot be read: %s", self._catalog.folder, error.strerror or error)
        if self._looked and self._downloaded == before:
            return
        self._looked = True
        self._residents.offer([*self._given, *map(self._offer, self._downloaded), *self._missing])

    async def keep_looking(self, changes: Changes, every_seconds: float = LOOK_SECONDS) -> None:
        """Offers what is there, and what arrives, until cancelled."""
        done = self._done()
        while True:
            await self.look()
            try:
                async with asyncio.timeout(every_seconds):
                    done = await self._more_than(done, changes)
            except TimeoutError:
                done &= self._done()

    async def _more_than(self, done: set[tuple[str, str]], changes: Changes) -> set[tuple[str, str]]:
        """The finished downloads, once there is one that was none of these."""
        while True:
            change, before = changes.next, done
            done = self._done()
            if done - before:
                return done
            await change.wait()

    def _done(self) -> set[tuple[str, str]]:
        return {(each.repo, each.name) for each in self.told() if each.state is DownloadState.DONE}

    # Orders

    def listed(self) -> ModelList:
        """What there is."""
        models = tuple(map(served_model, self._residents.standings()))
        return ModelList(models=models, downloads=self.told())

    async def load(self, order: ModelOrder) -> None:
        """Begins to; raises `Refused`."""
        self._insist_on(order.name)
        self._residents.load(order.name)

    async def unload(self, order: ModelOrder) -> None:
        """Raises `Refused`."""
        self._insist_on(order.name)
        await self._residents.unload(order.name, force=order.force)

    async def delete(self, order: ModelOrder) -> None:
        """Raises `Refused`."""
        self._insist_on(order.name)
        if not any(model.name == order.name and model.ours for model in self._downloaded):
            message = f"{order.name} was not downloaded by this agent: delete its files by hand"
            raise Refused(409, "model_not_ours", message)
        if any(offer.name == order.name for offer in self._given):
            message = f"{order.name} is another model, which was given at the start: stop serving that first"
            raise Refused(409, "model_not_ours", message)
        if self._residents.resident(order.name) is not None:
            if not order.force:
                raise Refused(409, "model_loaded", f"{order.name} is loaded: unload it first, or use force")
            await self._residents.unload(order.name, force=True)
        try:
            await asyncio.to_thread(self._catalog.delete, order.name)
        except NotAModel as error:
            raise Refused(409, "model_not_deleted", str(error)) from None
        finally:
            await self.look()

    async def download(self, order: ModelOrder) -> None:
        """Begins to; raises `Refused`."""
        if self._downloads is None:
            raise Refused(409, "no_downloads", "this agent fetches no models")
        try:
            self._downloads.start(order)
        except DownloadRefused as refused:
            raise Refused(409, refused.code, str(refused)) from None

    async def cancel(self, order: ModelOrder) -> None:
        """Raises `Refused` where nothing of that name is being fetched."""
        if self._downloads is None or not self._downloads.cancel(order.name):
            raise Refused(404, "no_such_download", f"nothing called {order.name} is being downloaded")

    def _insist_on(self, name: str) -> None:
        if not self._residents.knows(name):
            names = ", ".join(self._residents.names) or "none"
            raise Refused(404, "model_not_found", f"there is no model {name} here; there are: {names}"[:400])
