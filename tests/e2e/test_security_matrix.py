"""Who may ask what: every route and every method, as everybody who might try, on every server of ours.

The routes are those of the running applications, so a new one is in here by itself; what each must answer is
one table by plane. A route that no plane takes in fails.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import pytest

from balancer.core.model import Endpoint
from tests.e2e.conftest import OpenRoom, Room
from tests.e2e.fronts import Answer, answers
from tests.e2e.rooms import application_of, routes
from tests.fakes.engine import FakeEngine
from worker_agent.sources import Sources
from worker_agent.wire import JOIN_PATH, SESSION_HEADER, TUNNEL_PATH

NO_HTTP = "BREW"
"""A method that is none: no parser lets it through, whoever sends it."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", NO_HTTP)
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
WAIT_SECONDS = 60.0
AT_ONCE = 16

CHAT_PAGE = "https://chat.lab.test"
"""The one origin that the settings list."""
EVIL = "evil.test"


class Plane(Enum):
    INFERENCE = "inference"
    ADMIN = "admin"
    DOOR = "door"
    """Where the admin key is exchanged for a session: the key is in the body."""
    CLUSTER = "cluster"
    OPEN = "open"


PLANES: tuple[tuple[str, Plane], ...] = (
    ("/admin/session", Plane.DOOR),
    ("/admin", Plane.ADMIN),
    ("/v1/", Plane.INFERENCE),
    (JOIN_PATH, Plane.CLUSTER),
    (TUNNEL_PATH, Plane.CLUSTER),
    ("/health", Plane.OPEN),
    ("/readyz", Plane.OPEN),
    ("/metrics", Plane.OPEN),
    ("/openapi.json", Plane.OPEN),
    ("/ui", Plane.OPEN),
)
"""By the beginning of a path, the first that fits. Whoever adds a path outside of these decides here whose it
is."""

NOWHERE = ("/", "/nothing", "/v1/nothing", "/admin/nothing", "/admin/", "/cluster/v1/nothing", "/ui/nothing")


def plane_of(path: str) -> Plane:
    for beginning, plane in PLANES:
        if path == beginning or path.startswith(beginning.rstrip("/") + "/"):
            return plane
    raise AssertionError(f"{path} belongs to no plane: say in PLANES whose it is")


# Who asks ...


@dataclass(frozen=True)
class Credentials:
    """What there is to come with, of one running balancer."""

    admin_key: str
    cookie: str
    api_key: str
    revoked_key: str
    cluster_key: str


@dataclass(frozen=True)
class Who:
    """How somebody asks."""

    name: str
    headers: Callable[[Credentials], Mapping[str, str]] = lambda _: {}
    host: str = ""
    kind: str = "application/json"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def everything(own: Credentials) -> dict[str, str]:
    """Who holds all keys, and comes in a way that none of them makes good."""
    return {"X-Admin-Key": own.admin_key, "X-Api-Key": own.api_key}


NOBODY = Who("nobody")
WRONG = Who("a wrong key", lambda _: bearer("sk-lb-aaaaaaaa.wrong-key-of-forty-characters-xxxxxxxxxx"))
API_KEY = Who("an API key", lambda own: bearer(own.api_key))
REVOKED = Who("a revoked API key", lambda own: bearer(own.revoked_key))
ADMIN_KEY = Who("the admin key", lambda own: {"X-Admin-Key": own.admin_key})
ADMIN_BEARER = Who("the admin key as a bearer", lambda own: bearer(own.admin_key))
OWN_PAGE = Who(
    "the page with its cookie",
    lambda own: {"Cookie": f"balancer_session={own.cookie}", "Sec-Fetch-Site": "same-origin"},
)
WRONG_COOKIE = Who("a made up cookie", lambda _: {"Cookie": "balancer_session=" + "A" * 43})
WORKER = Who("a worker", lambda own: {**bearer(own.cluster_key), SESSION_HEADER: own.cluster_key})
EVIL_HOST = Who("all keys, by another host's name", everything, host=EVIL)
EVIL_PAGE = Who("all keys, from another site", lambda own: {**everything(own), "Origin": f"https://{EVIL}"})
CROSS_SITE = Who(
    "a cookie and all keys, across sites",
    lambda own: {
        **everything(own),
        "Cookie": f"balancer_session={own.cookie}",
        "Sec-Fetch-Site": "cross-site",
    },
)
NULL_PAGE = Who("all keys, from a page without an origin", lambda own: {**everything(own), "Origin": "null"})
LISTED_PAGE = Who("the page that is listed", lambda own: {**everything(own), "Origin": CHAT_PAGE})
LISTED_COOKIE = Who(
    "the page that is listed, with a cookie",
    lambda own: {
        "Cookie": f"balancer_session={own.cookie}",
        "Origin": CHAT_PAGE,
        "Sec-Fetch-Site": "cross-site",
    },
)
TEXT = Who("all keys, as plain text", everything, kind="text/plain")
FORM = Who("a form with the cookie", OWN_PAGE.headers, kind="application/x-www-form-urlencoded")

EVERYBODY = (
    *(NOBODY, WRONG, API_KEY, REVOKED, ADMIN_KEY, ADMIN_BEARER, OWN_PAGE, WRONG_COOKIE, WORKER, EVIL_HOST),
    *(EVIL_PAGE, CROSS_SITE, NULL_PAGE, LISTED_PAGE, LISTED_COOKIE, TEXT, FORM),
)

# ... and what each is answered.

DONE = frozenset({200, 201, 202, 204})
JUDGED = DONE | {304, 400, 404, 409, 422, 426, 429, 502, 503}
"""Let in: what the order itself was worth."""
NO_METHOD = frozenset({404, 405})
STRANGER = frozenset({401})
SHUT = frozenset({403})
HOST = frozenset({421})
KIND = frozenset({415})

WRONG_ADMIN = frozenset({403})
"""A key that is not the admin key, told so."""
_ADMIN: Mapping[str, frozenset[int] | None] = {
    NOBODY.name: STRANGER,
    WRONG_COOKIE.name: STRANGER,
    **{who.name: WRONG_ADMIN for who in (WRONG, API_KEY, REVOKED, WORKER)},
    **{who.name: SHUT for who in (LISTED_PAGE, LISTED_COOKIE)},
    **{who.name: None for who in (ADMIN_KEY, ADMIN_BEARER, OWN_PAGE)},
}
_INFERENCE: Mapping[str, frozenset[int] | None] = {
    **{
        who.name: STRANGER
        for who in (
            *(NOBODY, WRONG, REVOKED, ADMIN_KEY, ADMIN_BEARER, OWN_PAGE, WRONG_COOKIE, WORKER),
            LISTED_COOKIE,
        )
    },
    **{who.name: None for who in (API_KEY, LISTED_PAGE)},
}
"""None: let in."""


@dataclass(frozen=True)
class Cell:
    method: str
    path: str
    who: Who
    exists: bool
    """There is such a route."""


def expected(cell: Cell, *, keys: bool) -> frozenset[int]:
    """The statuses that are right. `keys`: API keys are asked for."""
    who, body = cell.who, cell.method in WITH_BODY
    let_in = JUDGED if cell.exists else NO_METHOD
    if cell.method == NO_HTTP:
        return frozenset({400})
    if who is EVIL_HOST:
        return HOST
    if who in (EVIL_PAGE, CROSS_SITE, NULL_PAGE):
        return SHUT
    try:
        plane = plane_of(cell.path)
    except AssertionError:
        if cell.exists:
            raise
        return SHUT if who in (LISTED_PAGE, LISTED_COOKIE) else NO_METHOD
    match plane:
        case Plane.ADMIN | Plane.DOOR:
            if plane is Plane.DOOR and cell.method == "POST" and cell.exists:
                if who in (LISTED_PAGE, LISTED_COOKIE):
                    return SHUT
                return KIND if who in (TEXT, FORM) else frozenset({400})  # the body lacks the key
            if who in (TEXT, FORM):
                return KIND if body or (who is FORM and cell.method not in SAFE) else let_in
            if who is OWN_PAGE and cell.method not in SAFE and not body:
                return KIND  # no page of ours sends such a thing
            found = _ADMIN[who.name]
            return let_in if found is None else found
        case Plane.INFERENCE:
            if who in (LISTED_PAGE, LISTED_COOKIE) and cell.method == "OPTIONS":
                return PREFLIGHT if cell.exists else NO_METHOD | PREFLIGHT
            if not cell.exists:
                return NO_METHOD
            if not keys:
                return KIND if who in (TEXT, FORM) and body else let_in
            if who is FORM:
                return KIND | STRANGER if body else STRANGER
            if who is TEXT:
                return KIND if body else let_in
            found = _INFERENCE[who.name]
            return let_in if found is None else found
        case Plane.CLUSTER:
            if who in (LISTED_PAGE, LISTED_COOKIE):
                return SHUT
            return KIND if who in (TEXT, FORM) and body and cell.exists else let_in
        case Plane.OPEN:
            return SHUT if who in (LISTED_PAGE, LISTED_COOKIE) else let_in


PREFLIGHT = frozenset({204, 405})
"""It is one only with Access-Control-Request-Method."""

# Asking ...

CHAT = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "A tree?"}], "max_tokens": 2})
BODIES = {
    Endpoint.CHAT.value: CHAT,
    Endpoint.COMPLETIONS.value: json.dumps({"model": "fake", "prompt": "A tree is", "max_tokens": 2}),
    Endpoint.EMBEDDINGS.value: json.dumps({"model": "fake", "input": "a tree"}),
}

_addresses = itertools.count(2)


def fresh_address() -> str:
    """One of this machine's many: wrong keys are counted by address, and here are a few thousand."""
    number = next(_addresses)
    return f"127.{1 + number // 60_000}.{number // 250 % 240}.{1 + number % 250}"


async def ask(port: int, cell: Cell, own: Credentials) -> Answer:
    body = BODIES.get(cell.path, "{}") if cell.method in WITH_BODY else ""
    path = cell.path.replace("{", "").replace("}", "")
    lines = [
        f"{cell.method} {path} HTTP/1.1",
        f"Host: {cell.who.host or f'127.0.0.1:{port}'}",
        *(f"{name}: {value}" for name, value in cell.who.headers(own).items()),
        "Connection: close",
    ]
    if body:
        lines += [f"Content-Type: {cell.who.kind}", f"Content-Length: {len(body)}"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(fresh_address(), 0))
    try:
        writer.write("\r\n".join([*lines, "", body]).encode())
        async with asyncio.timeout(WAIT_SECONDS):
            said = await reader.read()
    finally:
        writer.close()
    if cell.method == "HEAD":
        said = said.replace(b"Content-Length:", b"X-Length:", 1)
    (answer,) = answers(said)
    return answer


@dataclass
class Found:
    """What came of all cells."""

    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    paths: set[str] = field(default_factory=set)
    let_in: int = 0

    def judge(self, cell: Cell, answer: Answer, right: frozenset[int]) -> None:
        told = f"{cell.method} {cell.path} as {cell.who.name}: {answer.status}"
        self.counts[cell.who.name] += 1
        self.paths.add(cell.path)
        if answer.status not in right:
            self.wrong.append(f"{told}, not {sorted(right)}: {answer.body[:120]!r}")
        self.let_in += answer.status in DONE
        shared = answer.headers.get("access-control-allow-origin")
        listed = cell.who in (LISTED_PAGE, LISTED_COOKIE) and cell.path.startswith("/v1/")
        if shared is not None and not (listed and shared == CHAT_PAGE):
            self.wrong.append(f"{told}, and a page may read it: {shared}")
        if "access-control-allow-credentials" in answer.headers:
            self.wrong.append(f"{told}, and with cookies")
        if answer.status >= 400 and answer.status != 503 and cell.method != "HEAD" and not _is_error(answer):
            self.wrong.append(f"{told}, but that is no error as clients read it: {answer.body[:120]!r}")


def _is_error(answer: Answer) -> bool:
    try:
        return bool(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


def cells(found: set[tuple[str, str]], *, keys: bool) -> Iterable[Cell]:
    """Without API keys all but the admin plane's, which knows nothing of them."""
    paths = sorted({path for _, path in found} | set(NOWHERE))
    paths = [path for path in paths if keys or not path.startswith("/admin")]
    for path, method, who in itertools.product(paths, METHODS, EVERYBODY):
        yield Cell(method, path, who, (method, path) in found)


async def ask_all(room: Room, found: set[tuple[str, str]], own: Credentials, *, keys: bool) -> Found:
    judged = Found()
    going = asyncio.Semaphore(AT_ONCE)

    async def one(cell: Cell) -> None:
        async with going:
            mine = own
            if cell.who in (OWN_PAGE, FORM) and cell.method == "DELETE":
                mine = replace(own, cookie=await session(room))  # some of these end it
            answer = await ask(room.balancer.port, cell, mine)
            judged.judge(cell, answer, expected(cell, keys=keys))

    async with asyncio.TaskGroup() as group:
        for cell in cells(found, keys=keys):
            group.create_task(one(cell))
    return judged


async def session(room: Room) -> str:
    key = (room.data_dir / "admin_key").read_text().strip()
    async with room.http.post(f"{room.url}/admin/session", json={"key": key}) as response:
        assert response.status == 200, await response.text()
        return response.cookies["balancer_session"].value


async def credentials(room: Room) -> Credentials:
    made = {}
    for name in ("good", "over"):
        status, made[name] = await room.admin("POST", "/keys", {"name": name})
        assert status in (200, 201), made[name]
    status, _ = await room.admin("DELETE", f"/keys/{made['over']['id']}", {})
    assert status == 200
    return Credentials(
        (room.data_dir / "admin_key").read_text().strip(),
        await session(room),
        made["good"]["key"],
        made["over"]["key"],
        (room.data_dir / "cluster_key").read_text().strip(),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("auth", ["keys", "lan"])
@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
async def test_every_route_lets_in_who_it_should_and_nobody_else(
    open_room: OpenRoom, auth: str, hot_path: bool, monkeypatch: pytest.MonkeyPatch, tmp_path
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    async with FakeEngine(tokens=2) as engine:
        room_settings = {"auth": auth, "hot_path": hot_path, "cors_origins": [CHAT_PAGE]}
        async with open_room(engine, **room_settings) as room:
            found = routes(application_of(room.balancer))
            assert {("POST", endpoint.value) for endpoint in Endpoint} <= found
            for _, path in found:
                plane_of(path)
            own = await credentials(room)
            asked_before = sum(request.is_inference for request in engine.requests)
            judged = await ask_all(room, found, own, keys=auth == "keys")
            assert not judged.wrong, f"{len(judged.wrong)} wrong:\n" + "\n".join(judged.wrong[:60])
            asked = {path for _, path in found} | set(NOWHERE) if auth == "keys" else {*judged.paths}
            assert judged.counts.total() == len(asked) * len(METHODS) * len(EVERYBODY)
            print(f"\n{judged.counts.total()} cells: {len(asked)} paths, {judged.let_in} let in")
            # The engine was asked by those alone who were answered.
            lets_in = 2 if auth == "keys" else len(EVERYBODY) - len(ALWAYS_OUT)
            answered = sum(request.is_inference for request in engine.requests) - asked_before
            assert answered == len(Endpoint) * lets_in


class Nobody(Sources):
    """Every address is a stranger's."""

    def admit(self, address: str) -> bool:
        return False


@pytest.mark.parametrize("hot_path", [True, False], ids=["hot", "aiohttp"])
async def test_from_an_address_that_is_not_served_nothing_is_answered(open_room: OpenRoom, hot_path: bool):
    """With every key that there is, forwarded from whomever it says."""
    async with FakeEngine(tokens=2) as engine, open_room(engine, hot_path=hot_path) as room:
        found = routes(application_of(room.balancer))
        own = await credentials(room)
        forwarded = {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
        strangers = [NOBODY, Who("all keys", lambda own: {**everything(own), **forwarded}), OWN_PAGE]
        inference = room.balancer._inference
        inference.adopt(replace(inference.policy, sources=Nobody()))
        asked = sum(request.is_inference for request in engine.requests)
        paths = sorted({path for _, path in found} | set(NOWHERE))
        for path, method, who in itertools.product(paths, METHODS, strangers):
            answer = await ask(room.balancer.port, Cell(method, path, who, (method, path) in found), own)
            assert answer.status == (400 if method == NO_HTTP else 403), (method, path, who.name)
        assert sum(request.is_inference for request in engine.requests) == asked


ALWAYS_OUT = (EVIL_HOST, EVIL_PAGE, CROSS_SITE, NULL_PAGE, TEXT, FORM)
