"""What is fuzzed, as the runner and the tests see it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

CORPUS = Path(__file__).parent / "corpus"

Check = Callable[[bytes], None]
"""Raises for what must not be: any exception but the part's declared one, a promise that is not kept."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Target:
    """A part of ours that reads what others write."""

    name: str
    running: Callable[[], AbstractContextManager[Check]]
    words: tuple[bytes, ...] = ()
    """That mean something to it."""
    is_slow: bool = False
    """Milliseconds for an input, not microseconds."""

    @property
    def folder(self) -> Path:
        return CORPUS / self.name

    def cases(self) -> dict[str, bytes]:
        """By names of files."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}


def pure(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """Of what needs nothing around it."""
    return lambda: nullcontext(check)


def looped(
    opened: Callable[[], AbstractAsyncContextManager[_T]], check: Callable[[_T, bytes], Awaitable[None]]
) -> Callable[[], AbstractContextManager[Check]]:
    """Of what lives in an event loop: opened once, checked with input after input. What is raised where
    nobody awaits it counts too, and what is logged as an error of our own."""

    @contextmanager
    def running() -> Iterator[Check]:
        strays: list[str] = []
        with asyncio.Runner() as runner, _noting_errors(strays):
            runner.get_loop().set_exception_handler(lambda _, told: strays.append(repr(told)))
            context = opened()

            async def checked(data: bytes) -> None:
                await check(thing, data)
                assert not strays, strays

            thing = runner.run(context.__aenter__())
            try:
                yield lambda data: runner.run(checked(data))
            finally:
                runner.run(context.__aexit__(None, None, None))

    return running


class _Errors(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(self.format(record))


@contextmanager
def _noting_errors(told: list[str]) -> Iterator[None]:
    handler = _Errors(told)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
