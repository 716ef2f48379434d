"""The page in a real browser, over a real balancer: who is let in, what is shown, what can be moved."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from balancer.dashboard.routes import page_url
from tests.browser.chromium import PROGRAM, Page, browsing
from tests.e2e.conftest import OpenRoom, Room, free_port, listed, open_room
from tests.fakes.engine import FakeEngine

__all__ = ["open_room"]

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine")


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with browsing(tmp_path / "browser") as found:
        yield found


def key_of(room: Room) -> str:
    return (room.data_dir / "admin_key").read_text().strip()


async def sign_in(page: Page, room: Room) -> None:
    await page.open(page_url(room.url, key_of(room)))
    await page.until("!document.querySelector('#room').hidden")


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent)"


async def click(page: Page, within: str, label: str) -> None:
    """A button, as soon as it is there."""
    every = f"[...document.querySelectorAll({json.dumps(within)})]"
    find = f"{every}.find(one => one.textContent === {json.dumps(label)})"
    await page.until(f"Boolean({find}) && !{find}.disabled")
    await page.value(f"{find}.click()")


async def test_the_key_of_the_address_signs_in_and_is_gone_from_it(open_room: OpenRoom, page: Page):
    async with FakeEngine() as engine, open_room(engine) as room:
        key = key_of(room)
        await sign_in(page, room)
        assert await page.value("location.href") == f"{room.url}/ui"
        assert await page.until(texts("#workers h3")) == ["a"]
        (cookie,) = await page.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
        assert await page.value("document.cookie") == ""
        # Chromium tells of the fragment in what was navigated to; no request line had it.
        assert not any(key in url.partition("#")[0] for url in page.requested)
        await page.do("Page.reload")
        await page.until("!document.querySelector('#room').hidden")
        assert page.errors == []


async def test_without_a_key_a_form_asks_for_it_and_a_wrong_one_is_told_of(open_room: OpenRoom, page: Page):
    async with open_room() as room:
        await page.open(f"{room.url}/ui")
        await page.until("!document.querySelector('#sign-in').hidden")
        assert await page.value("document.querySelector('#room').hidden")
        await page.until("document.activeElement.id === 'key'")
        await page.type("not the key of this balancer")
        await page.press("Enter")
        await page.until("document.querySelector('#notice').textContent.includes('not the admin key')")
        assert await page.value("document.querySelector('#key').value") == ""
        await page.value("document.querySelector('#key').focus()")
        await page.type(key_of(room))
        await page.press("Enter")
        await page.until("!document.querySelector('#room').hidden")
        await click(page, "header button", "Sign out")
        await page.until("!document.querySelector('#sign-in').hidden")
        assert await page.cookies() == []
        await page.do("Page.reload")
        await page.until("!document.querySelector('#sign-in').hidden")
        assert page.errors == []


HOSTILE = (
    "<img src=x onerror=hacked=1>",
    "</h3><script>hacked=1</script>",
    "\"'><svg onload=hacked=1>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'>",
    "{{constructor.constructor('hacked=1')()}}",
    "javascript:hacked=1",
    "__proto__",
    "constructor",
)


async def test_whatever_a_worker_is_called_is_text(open_room: OpenRoom, page: Page):
    async with FakeEngine() as engine:
        first, *others = HOSTILE
        rows = [
            listed(engine, first, aliases=dict.fromkeys(HOSTILE, "fake")),
            *(listed(engine, name, port=free_port()) for name in others),  # nobody is there: shown as lost
        ]
        async with open_room(*rows) as room:
            await room.ready()
            await sign_in(page, room)
            await page.until(f"document.querySelectorAll('#workers h3').length === {len(HOSTILE)}")
            assert set(await page.value(texts("#workers h3"))) == set(HOSTILE)
            shown = await page.value(texts("#workers li li"))
            assert len(shown) == 1
            assert all(name in shown[0] for name in HOSTILE)
            assert await page.value("typeof hacked") == "undefined"
            assert await page.value("document.querySelectorAll('main img, main svg, iframe').length") == 0
            assert await page.value("document.scripts.length") == 1
            assert page.errors == []


async def test_a_script_that_got_in_would_not_run(open_room: OpenRoom, page: Page):
    """What the policy is for: the page is as strict as its headers say."""
    async with open_room() as room:
        await page.open(f"{room.url}/ui")
        await page.until("!document.querySelector('#sign-in').hidden")
        await page.value(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked=1'}))"
        )
        await page.value("document.body.insertAdjacentHTML('beforeend', '<img src=/x onerror=hacked=1>')")
        await page.until("document.images[0].complete")
        assert await page.value("typeof hacked") == "undefined"
        await page.until("true")
        assert any("Content Security Policy" in one for one in page.errors)


async def test_a_worker_is_drained_and_removed_by_keyboard_after_a_question(open_room: OpenRoom, page: Page):
    async with FakeEngine() as engine, open_room(engine) as room:
        await sign_in(page, room)
        await click(page, "#workers button", "Drain")
        await page.until("document.querySelector('#question').open")
        await page.press("Escape")
        await page.until("!document.querySelector('#question').open")
        assert room.worker("a").state == "ready"
        await page.value("document.querySelector('#workers button').focus()")
        await page.press("Enter")
        await page.until("document.querySelector('#question').open")
        assert await page.value("document.activeElement.id") == "question-no"
        await page.press("Tab")
        await page.press("Enter")
        await room.until(lambda: room.worker("a").state == "draining", "a drains")
        await page.until("document.querySelector('#workers .state').textContent === 'draining'")
        await click(page, "#workers button", "Send requests again")
        await room.until(lambda: room.worker("a").state == "ready", "a is back")
        await click(page, "#workers button", "Remove")
        await click(page, "#question button", "Yes")
        await room.until(lambda: not room.balancer.snapshot().workers, "a is gone")
        assert await page.until(texts("#removed bdi")) == ["a"]
        records = await page.until(f"{texts('#audit li')}.length >= 3 && {texts('#audit li')}")
        assert "DELETE /admin/workers/{id} a" in records[0]
        assert page.errors == []


async def test_a_broken_configuration_is_shown_by_line_and_column(open_room: OpenRoom, page: Page):
    async with FakeEngine() as engine, open_room(engine, watch_config=True) as room:
        await sign_in(page, room)
        room.config.write_text('{"workers": [\n  {"id": 5}\n]}')
        faults = await page.until(f"{texts('#faults li')}.length && {texts('#faults li')}")
        assert "line 2, column" in faults[0]
        assert "stays in force" in await page.value("document.querySelector('#configuration').textContent")


async def test_on_a_phone_nothing_is_wider_than_the_screen(open_room: OpenRoom, page: Page):
    async with FakeEngine() as engine:
        name = "a-machine-with-a-very-long-name-without-any-place-to-break-it" * 2
        async with open_room(listed(engine, name)) as room:
            await page.do(
                "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True
            )
            await sign_in(page, room)
            await page.until("document.querySelectorAll('#workers h3').length === 1")
            assert await page.value("document.documentElement.scrollWidth") <= 360


async def test_a_session_that_is_over_asks_for_the_key_again(open_room: OpenRoom, page: Page):
    async with open_room() as room:
        await sign_in(page, room)
        await page.do("Network.clearBrowserCookies")
        await page.until("!document.querySelector('#sign-in').hidden")
        assert await page.value("document.querySelector('#room').hidden")
