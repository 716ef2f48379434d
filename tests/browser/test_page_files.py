"""The page's files as they are served: nothing in them that its own content policy would refuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import webbrowser
from html.parser import HTMLParser
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner

from balancer.__main__ import app
from balancer.dashboard.routes import CONTENT_POLICY, page_routes, page_url

STATIC = Path(__file__).parents[2] / "balancer" / "dashboard" / "static"
FILES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture
async def served():
    app = web.Application()
    app.add_routes(page_routes())
    async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
        yield http


async def test_the_page_and_each_file_come_with_what_a_browser_may_do(served: aiohttp.ClientSession):
    for path in ("/ui", "/ui/", *(f"/ui/static/{name}" for name in FILES if name != "index.html")):
        async with served.get(path) as response:
            assert response.status == 200, path
            assert response.headers["Content-Security-Policy"] == CONTENT_POLICY
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["X-Frame-Options"] == "DENY"
            assert response.headers["Referrer-Policy"] == "no-referrer"
            assert response.headers["Cache-Control"] == ("no-cache" if "static" in path else "no-store")
            kind, tag, body = response.content_type, response.headers["ETag"], await response.read()
        assert kind in ("text/html", "text/css", "text/javascript", "image/svg+xml")
        name = path.rpartition("/")[2] if "static" in path else "index.html"
        assert body == (STATIC / name).read_bytes()
        async with served.get(path, headers={"If-None-Match": tag}) as response:
            assert (response.status, await response.read()) == (304, b"")
        async with served.head(path) as response:
            assert response.status == 200
    for path in ("/ui/static/index.html", "/ui/static/", "/ui/static/..%2froutes.py", "/ui/routes.py"):
        async with served.get(path) as response:
            assert response.status == 404, path


class _Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []
        self.files: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        self.bad += [f"{tag} {name}" for name in told if name.startswith("on") or name == "style"]
        if tag in ("style", "base", "iframe", "object", "embed") or (tag == "script" and "src" not in told):
            self.bad.append(tag)
        if tag == "form" and "action" in told:
            self.bad.append("form action")
        self.files += [value or "" for name, value in told.items() if name in ("src", "href")]
        if (own := told.get("id")) is not None:
            self.ids.append(own)
        if tag == "label":
            self.labelled.append(told.get("for") or "")
        self._in_script = tag == "script"

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.bad.append("inline script")
        self._in_script = False


def test_the_page_has_no_script_style_or_handler_within_it():
    page = _Read()
    page.feed((STATIC / "index.html").read_text())
    assert page.bad == []
    assert {f"/ui/static/{name}" for name in ("app.js", "style.css", "icon.svg")} == set(page.files)
    assert len(page.ids) == len(set(page.ids))
    assert "key" in page.labelled


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_makes_no_markup_of_a_string_and_asks_nobody_else(name: str):
    text = (STATIC / name).read_text()
    for way in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment"),
        *("eval(", "Function(", "DOMParser", "srcdoc", "setAttribute", "javascript:"),
        *("http://", "https://", "localStorage", "sessionStorage", "document.cookie"),
    ):
        assert way not in text, way


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_read(name: str):
    text = (STATIC / name).read_bytes()
    told = subprocess.run(["node", "--check", "--input-type=module"], input=text, capture_output=True)
    assert told.returncode == 0, told.stderr.decode()


def test_each_name_that_a_script_looks_up_is_in_the_page():
    page = _Read()
    page.feed((STATIC / "index.html").read_text())
    asked = {name for one in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', (STATIC / one).read_text())}
    assert asked
    assert asked <= set(page.ids)


def test_the_address_that_signs_in_hides_the_key_where_nobody_is_sent_it():
    url = page_url("http://127.0.0.1:4000", "a+b/c #d&token=e")
    assert url == "http://127.0.0.1:4000/ui#token=a%2Bb%2Fc%20%23d%26token%3De"


def test_the_command_prints_that_address_and_opens_the_page_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    (tmp_path / "key").write_text("the-admin-key-of-this-test\n")
    words = ["ui", "--url", "http://127.0.0.1:4001/v1", "--admin-key-file", str(tmp_path / "key"), "--open"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert told.output == "http://127.0.0.1:4001/ui#token=the-admin-key-of-this-test\n"
    assert opened == ["http://127.0.0.1:4001/ui"]
