from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def an_mdns_name_of_our_own() -> None:
    """Not here: packets of the corpus are those of the network, and reach nobody but our own browser."""
