"""The same room as in the end-to-end tests, and the faults that are the same wherever a request goes."""

from tests.e2e.conftest import open_room

__all__ = ["open_room"]
