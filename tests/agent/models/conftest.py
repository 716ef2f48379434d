from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes.hub import FakeHub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(token="hf_secret") as running:
        yield running
