"""`balancer ui`: the way to the page."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from balancer.admin_cli import DEFAULT_URL, DataOption, KeyOption, UrlOption, fail, key_for
from balancer.batch.client import root_of
from balancer.dashboard.routes import PAGE_PATH, page_url
from balancer.reached import NotTrusted, reach


def ui(
    url: UrlOption = DEFAULT_URL,
    admin_key_file: KeyOption = None,
    data_dir: DataOption = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser, where it may be signed in already.")
    ] = False,
) -> None:
    """Print the address of the page that signs in by itself. It holds the admin key: give it to nobody."""
    try:
        base = reach(root_of(url.strip())).root
    except NotTrusted as error:
        fail(str(error))
    print(page_url(base, key_for(base, admin_key_file, data_dir)))  # noqa: T201
    if open_:
        # Without the key: a browser is started by a command line, which everybody on this machine can read.
        webbrowser.open(f"{base}{PAGE_PATH}")


def first_words(base: str, admin_key: str) -> str:
    """What is shown on a terminal, once, when the admin key was made. `base`: the balancer's URL there."""
    return (
        f"The room in a browser, signed in:\n{page_url(base, admin_key)}\n"
        "This address holds the admin key: give it to nobody. `balancer ui` prints it again."
    )
