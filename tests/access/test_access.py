"""API keys: who holds one, what each may do, and that no limit is ever passed."""

from __future__ import annotations

import random
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.access import (
    Access,
    ApiKey,
    ApiKeyMissing,
    ApiKeyOver,
    ApiKeyWrong,
    Bucket,
    ClassNotAllowed,
    RateLimited,
    TooManyWrongApiKeys,
    digest_of,
    presented,
    written,
)
from balancer.core.model import ServiceClass
from balancer.keys import Guesses, GuessPolicy

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SECRET = "s" * 43
INTERACTIVE, BATCH = ServiceClass.INTERACTIVE, ServiceClass.BATCH


class Time:
    """Two clocks that a test moves."""

    def __init__(self) -> None:
        self.monotonic = 0.0
        self.wall = NOW


def key(key_id: str = "abcdefgh22", **more: object) -> ApiKey:
    fields: dict[str, object] = {"id": key_id, "name": key_id, "digest": digest_of(SECRET), "created": NOW}
    return ApiKey(**fields | more)  # type: ignore[arg-type]


def access(*keys: ApiKey, time: Time | None = None, guesses: Guesses | None = None) -> Access:
    time = time or Time()
    found = Access(lambda: time.monotonic, lambda: time.wall, guesses)
    found.put(keys)
    return found


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


WRONG = "This API key is not valid here: `balancer keys list` shows those that are."
GIVEN = written("abcdefgh22", SECRET)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(GIVEN),
        {"authorization": f"bearer   {GIVEN} "},
        {"x-api-key": GIVEN},
        {"api-key": GIVEN},
        {"authorization": "Bearer none", "x-api-key": GIVEN},
        {"authorization": "Basic abc", "api-key": GIVEN},
    ],
)
def test_a_key_comes_in_any_header_that_clients_use(headers: dict[str, str]):
    assert access(key()).recognise(headers, "10.0.0.1").name == "abcdefgh22"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}, {"authorization": "Bearer "}])
def test_without_a_key_it_says_that_one_is_needed(headers: dict[str, str]):
    with pytest.raises(ApiKeyMissing, match="balancer keys create"):
        access(key()).recognise(headers, "10.0.0.1")


CORPUS = [
    "' OR '1'='1",
    "'; DROP TABLE keys;--",
    "sk-lb-' OR 1=1--.x",
    f"sk-lb-abcdefgh22' OR ''='.{SECRET}",
    'sk-lb-{"$ne": null}.{"$ne": null}',
    "sk-lb-abcdefgh22.",
    "sk-lb-abcdefgh22",
    "sk-lb-.",
    f"sk-lb-.{SECRET}",
    f"sk-lb-%2A.{SECRET}",
    f"sk-lb-abcdefgh22.{SECRET}.",
    f"sk-lb-abcdefgh22.{SECRET}\x00",
    f"sk-lb-ABCDEFGH22.{SECRET}",
    f"abcdefgh22.{SECRET}",
    f"sk-lb-abcdefgh22.{digest_of(SECRET)}",
    "sk-lb-" + "a" * 10_000,
    "sk-lb-../../etc/passwd.x",
    "${jndi:ldap://evil.test/a}",
    "\udcff\udcfe",
    "sk-lb-abcdefgh22." + "\u0131" * 43,
    "Bearer " + GIVEN,
]


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_what_is_no_key_gets_one_and_the_same_answer_which_repeats_nothing_of_it(text: str):
    for headers in (bearer(text), {"x-api-key": text}):
        with pytest.raises(ApiKeyWrong) as caught:
            access(key()).recognise(headers, "10.0.0.1")
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        assert caught.value.message == WRONG
        assert text.strip() not in caught.value.message


@given(st.text(max_size=300))
def test_no_text_is_a_key_but_the_key(text: str):
    if presented(bearer(text)) == GIVEN:
        return
    with pytest.raises((ApiKeyMissing, ApiKeyWrong)):
        access(key()).recognise(bearer(text), "10.0.0.1")


def test_that_a_key_is_over_is_told_only_to_who_has_its_secret():
    time = Time()
    keys = (key(expires=NOW + timedelta(days=1)), key("revoked222", revoked=NOW))
    room = access(*keys, time=time)
    assert room.recognise(bearer(GIVEN), "")
    time.wall += timedelta(days=1)
    with pytest.raises(ApiKeyOver, match="has expired") as expired:
        room.recognise(bearer(GIVEN), "")
    with pytest.raises(ApiKeyOver, match="was revoked") as revoked:
        room.recognise(bearer(written("revoked222", SECRET)), "")
    assert [one.value.code for one in (expired, revoked)] == ["api_key_expired", "api_key_revoked"]
    for key_id in ("abcdefgh22", "revoked222"):
        with pytest.raises(ApiKeyWrong):
            room.recognise(bearer(written(key_id, "wrong" * 9)), "")


def test_wrong_keys_are_slowed_down_and_the_right_one_beside_them_is_not():
    room = access(key())
    outcomes = []
    for number in range(14):
        try:
            room.recognise(bearer(f"sk-lb-abcdefgh22.guess{number}"), "10.0.0.1")
        except (ApiKeyWrong, TooManyWrongApiKeys) as error:
            outcomes.append(error.status)
    assert outcomes == [401] * 10 + [429] * 4
    assert room.recognise(bearer(GIVEN), "10.0.0.1").id == "abcdefgh22"


def test_a_hundred_thousand_addresses_that_guess_take_bounded_memory():
    guesses = Guesses(GuessPolicy())
    room = access(key(), guesses=guesses)
    for number in range(100_000):
        address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        with suppress(ApiKeyWrong, TooManyWrongApiKeys):
            room.recognise(bearer("sk-lb-abcdefgh22.x"), address)
    assert len(guesses) <= GuessPolicy().max_addresses


def test_what_a_key_is_for():
    only = key(models=("a", "b"))
    assert [only.allows_model(name) for name in ("a", "b", "A", "c", "")] == [True, True, False, False, False]
    assert key().allows_model("anything")


@pytest.mark.parametrize(
    ("of", "named", "meant", "becomes"),
    [
        ("both", None, INTERACTIVE, INTERACTIVE),
        ("both", BATCH, INTERACTIVE, BATCH),
        ("both", None, BATCH, BATCH),
        ("batch", None, INTERACTIVE, BATCH),
        ("batch", BATCH, BATCH, BATCH),
        ("batch", INTERACTIVE, INTERACTIVE, None),
        ("interactive", None, INTERACTIVE, INTERACTIVE),
        ("interactive", None, BATCH, None),
        ("interactive", BATCH, INTERACTIVE, None),
    ],
)
def test_the_class_of_a_request_is_one_that_its_key_allows(
    of: str, named: ServiceClass | None, meant: ServiceClass, becomes: ServiceClass | None
):
    holder = key(service_class=of)
    if becomes is None:
        with pytest.raises(ClassNotAllowed):
            holder.class_of(named, meant)
    else:
        assert holder.class_of(named, meant) is becomes


@given(
    limit=st.integers(1, 600),
    gaps=st.lists(st.floats(0, 30, allow_nan=False), max_size=200),
)
def test_in_no_window_are_more_requests_taken_than_the_limit_and_a_minutes_worth(
    limit: int, gaps: list[float]
):
    bucket, now, taken = Bucket(), 1e6, []
    for gap in gaps:
        now += gap
        if bucket.take(limit, now) == 0:
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            window = taken[last] - taken[first]
            assert last - first + 1 <= limit * (1 + window / 60) + 1e-3


@given(limit=st.integers(1, 10_000), taken=st.integers(0, 50))
def test_who_waits_as_long_as_told_is_let_in(limit: int, taken: int):
    bucket, now = Bucket(), 1e6
    for _ in range(limit + taken if limit < 100 else taken):
        bucket.take(limit, now)
    before = bucket.left(limit, now)
    wait = bucket.take(limit, now)
    assert (wait == 0) == (before > 0)
    if wait:
        assert bucket.take(limit, now + wait) == 0


def test_what_is_left_is_told_and_comes_back():
    time = Time()
    room = access(holder := key(requests_per_minute=2), time=time)
    assert room.take(holder)["x-ratelimit-remaining-requests"] == "1"
    assert room.take(holder)["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimited) as caught:
        room.take(holder)
    assert caught.value.retry_after == pytest.approx(30)
    assert caught.value.headers["x-ratelimit-limit-requests"] == "2"
    assert caught.value.headers["x-ratelimit-reset-requests"] == "60s"
    time.monotonic += 30
    assert room.take(holder)["x-ratelimit-remaining-requests"] == "0"


class Ended(BaseException):
    """However a request may end: a cancellation is no `Exception` either."""


@given(limit=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_however_requests_end_each_gives_its_place_back(limit: int, seed: int):
    """Any order of begins and ends, by return and by what is raised; the key's row is read again between."""
    dice = random.Random(seed)
    room = access(holder := key(max_concurrent=limit))
    running: list[ExitStack] = []
    for _ in range(60):
        what = dice.random()
        if what < 0.5:
            stack = ExitStack()
            if len(running) < limit:
                stack.enter_context(room.holding(holder))
                running.append(stack)
            else:
                with pytest.raises(RateLimited):
                    stack.enter_context(room.holding(holder))
        elif what < 0.6:
            room.put([holder])
        elif running:
            stack = running.pop(dice.randrange(len(running)))
            if dice.random() < 0.5:
                with suppress(Ended), stack:
                    raise Ended
            stack.close()
        assert room.under_way(holder.id) == len(running)
    for stack in running:
        stack.close()
    assert room.under_way(holder.id) == 0
