"""API keys of clients: who may ask for answers, for which models, how often and how much at once. Pure: both
clocks are given.

A key is `sk-lb-<id>.<secret>`. Its id is no secret and finds its row; of the secret, which is 256 bits of
chance, only the SHA-256 is kept. What a key has used up is counted here and forgotten with the process.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from balancer.core.errors import RequestError
from balancer.core.model import ModelName, ServiceClass
from balancer.keys import Guesses

KEY_PREFIX = "sk-lb-"
MAX_KEYS = 4096
"""In the file, those that are revoked among them."""
MAX_GIVEN_CHARACTERS = 256
"""Of what comes in place of a key, before it is looked at."""
MINUTE_SECONDS = 60.0
_ROUNDING_SECONDS = 1e-6
_NO_DIGEST = sha256(b"").hexdigest()
"""Compared with where there is no such key, so that this takes as long."""


class ApiKeyMissing(RequestError):
    status, type, code = 401, "invalid_request_error", "api_key_missing"


class ApiKeyWrong(RequestError):
    """Unknown or wrong: which of both is not told."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class ApiKeyOver(RequestError):
    """Told only to who has the right secret."""

    status, type = 401, "invalid_request_error"

    def __init__(self, name: str, *, revoked: bool) -> None:
        super().__init__(
            f"The API key {name!r} {'was revoked' if revoked else 'has expired'}: ask whoever runs this "
            "balancer for a new one (`balancer keys create`)."
        )
        self.code = "api_key_revoked" if revoked else "api_key_expired"


class TooManyWrongApiKeys(RequestError):
    status, type, code = 429, "rate_limit_error", "too_many_wrong_keys"

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "Too many wrong API keys came from this address: wait as long as Retry-After says, and use a "
            "key that `balancer keys list` knows."
        )
        self.retry_after = retry_after


class ModelNotAllowed(RequestError):
    status, type, code, param = 403, "invalid_request_error", "model_not_allowed", "model"

    def __init__(self, key: ApiKey, model: str) -> None:
        super().__init__(
            f"The API key {key.name!r} is not for the model {model!r}. It is for: {', '.join(key.models)}."
        )


class ClassNotAllowed(RequestError):
    status, type, code = 403, "invalid_request_error", "class_not_allowed"

    def __init__(self, key: ApiKey) -> None:
        super().__init__(
            f"The API key {key.name!r} is for requests of class {key.service_class!r} only: leave out "
            "X-Priority and service_tier."
        )


class RateLimited(RequestError):
    """More requests in a minute than the key allows."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers


def _printable(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be printable, without blanks at its ends")
    return text


KeyId = Annotated[str, Field(pattern=r"^[a-z0-9]{8,12}$")]
KeyName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
ModelNames = Annotated[
    tuple[Annotated[ModelName, Field(min_length=1, max_length=256)], ...], Field(max_length=256)
]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Permission(BaseModel):
    """What the holder of a key may do; it can be changed while the key is in use."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    name: KeyName
    """For people and for the log; no two keys that are in force have the same."""
    models: ModelNames = ()
    """By the names that clients use, whole; none: all."""
    service_class: Annotated[Literal["interactive", "batch", "both"], Field(alias="class")] = "both"
    """A key for one class alone: what names no class is of that one."""
    requests_per_minute: Count | None = None
    max_concurrent: Count | None = None
    """Requests that wait or run."""
    local_only: bool = False
    """No fallback outside of the room may see its requests."""
    expires: AwareDatetime | None = None


class ApiKey(Permission):
    """A key as it is kept."""

    id: KeyId
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the secret, in hex."""
    created: AwareDatetime
    revoked: AwareDatetime | None = None

    def is_over(self, now: AwareDatetime) -> bool:
        """Revoked or expired."""
        return self.revoked is not None or (self.expires is not None and now >= self.expires)

    def allows_model(self, model: str) -> bool:
        return not self.models or model in self.models

    def class_of(self, named: ServiceClass | None, meant: ServiceClass) -> ServiceClass:
        """Of a request whose header names the one, if any, and whose body the other. Raises
        `ClassNotAllowed`."""
        if self.service_class == "both":
            return named or meant
        only = ServiceClass(self.service_class)
        if (named is not None and named is not only) or (
            meant is ServiceClass.BATCH and only is ServiceClass.INTERACTIVE
        ):
            raise ClassNotAllowed(self)
        return only


def digest_of(secret: str) -> str:
    """As it is kept."""
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def written(key_id: str, secret: str) -> str:
    """The key as its holder is given it."""
    return f"{KEY_PREFIX}{key_id}.{secret}"


def presented(headers: Mapping[str, str]) -> str:
    """What a request brings as its key; empty: nothing. Of several headers, one that holds a key of ours.
    `headers`: by names in lower case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    given = [one for one in (bearer, headers.get("x-api-key"), headers.get("api-key")) if one]
    return next((one for one in given if one.startswith(KEY_PREFIX)), given[0] if given else "")


@dataclass(slots=True)
class Bucket:
    """A minute's worth of requests at once, filled again steadily: within any `t` seconds at most
    `per_minute * (1 + t / 60)` are taken."""

    full_at: float = -math.inf

    def take(self, per_minute: int, now: float) -> float:
        """Takes one; else gives the seconds until there is one."""
        full_at = max(self.full_at, now) + MINUTE_SECONDS / per_minute
        wait = full_at - now - MINUTE_SECONDS
        if wait > _ROUNDING_SECONDS:
            return wait
        self.full_at = full_at
        return 0.0

    def left(self, per_minute: int, now: float) -> int:
        """Requests that can be taken at once."""
        empty = max(0.0, self.full_at - now)
        return max(0, math.floor((MINUTE_SECONDS - empty + _ROUNDING_SECONDS) * per_minute / MINUTE_SECONDS))

    def seconds_until_full(self, now: float) -> float:
        return max(0.0, self.full_at - now)


@dataclass(slots=True)
class _Used:
    bucket: Bucket = field(default_factory=Bucket)
    under_way: int = 0


class Access:
    """The keys that there are, and what each has used up."""

    def __init__(
        self, clock: Callable[[], float], wall: Callable[[], AwareDatetime], guesses: Guesses | None = None
    ) -> None:
        """`clock`: monotonic, in seconds. `wall`: the time of day, for what expires."""
        self._clock = clock
        self._wall = wall
        self._guesses = guesses or Guesses()
        self._keys: dict[str, ApiKey] = {}
        self._used: dict[str, _Used] = {}
        self.on_over: Callable[[ApiKey], None] = lambda _: None
        """Told of each key that was revoked, or is gone."""

    def put(self, keys: Iterable[ApiKey]) -> None:
        """These and no others from now on."""
        before, self._keys = self._keys, {key.id: key for key in keys}
        self._used = {name: used for name, used in self._used.items() if name in self._keys}
        for key_id, key in before.items():
            if key.revoked is None and self._is_revoked(key_id):
                self.on_over(key)

    def insist_on_force(self, key: ApiKey) -> None:
        """Raises `ApiKeyOver` for one that was revoked since it was recognised."""
        if self._is_revoked(key.id):
            raise ApiKeyOver(key.name, revoked=True)

    def _is_revoked(self, key_id: str) -> bool:
        key = self._keys.get(key_id)
        return key is None or key.revoked is not None

    def recognise(self, headers: Mapping[str, str], address: str) -> ApiKey:
        """Whose request it is. Raises `ApiKeyMissing`, `ApiKeyWrong`, `ApiKeyOver` and, for an address that
        sends wrong ones again and again, `TooManyWrongApiKeys`.

        The right key is let in whatever else came from its address: behind one address may sit a whole lab,
        and no number of guesses finds 256 bits.
        """
        given = presented(headers)
        if not given:
            raise ApiKeyMissing(
                "This balancer wants an API key, as `Authorization: Bearer sk-lb-...`: whoever runs it makes "
                "one by `balancer keys create`."
            )
        key = self._found(given)
        if key is not None:
            if key.revoked is not None or (key.expires is not None and key.is_over(self._wall())):
                raise ApiKeyOver(key.name, revoked=key.revoked is not None)
            return key
        now = self._clock()
        if wait := self._guesses.wait_seconds(address, now):
            raise TooManyWrongApiKeys(wait)
        self._guesses.wrong(address, now)
        raise ApiKeyWrong("This API key is not valid here: `balancer keys list` shows those that are.")

    def _found(self, given: str) -> ApiKey | None:
        if len(given) > MAX_GIVEN_CHARACTERS:
            return None
        key_id, _, secret = given.removeprefix(KEY_PREFIX).partition(".")
        key = self._keys.get(key_id)
        right = hmac.compare_digest(digest_of(secret), key.digest if key else _NO_DIGEST)
        return key if right and given.startswith(KEY_PREFIX) else None

    def take(self, key: ApiKey) -> Mapping[str, str]:
        """Counts one request; gives the headers that tell the client what is left. Raises `RateLimited`."""
        limit = key.requests_per_minute
        if limit is None:
            return _NO_LIMITS
        bucket, now = self._use(key).bucket, self._clock()
        wait = bucket.take(limit, now)
        told = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(bucket.left(limit, now)),
            "x-ratelimit-reset-requests": f"{math.ceil(bucket.seconds_until_full(now))}s",
        }
        if wait:
            raise RateLimited(
                f"The API key {key.name!r} may send {limit} requests a minute. Try again in "
                f"{math.ceil(wait)} s.",
                wait,
                told,
            )
        return told

    @contextmanager
    def holding(self, key: ApiKey) -> Iterator[None]:
        """One of the requests that the key may have under way, until the block ends, however it does. Raises
        `RateLimited`."""
        used = self._use(key)
        if key.max_concurrent is not None and used.under_way >= key.max_concurrent:
            raise RateLimited(
                f"The API key {key.name!r} may have {key.max_concurrent} requests under way at once. Try "
                "again when one has ended.",
                1.0,
                {"x-ratelimit-limit-concurrent": str(key.max_concurrent)},
            )
        used.under_way += 1
        try:
            yield
        finally:
            used.under_way -= 1

    def under_way(self, key_id: str) -> int:
        """Requests of this key that wait or run."""
        used = self._used.get(key_id)
        return used.under_way if used else 0

    def _use(self, key: ApiKey) -> _Used:
        used = self._used.get(key.id)
        if used is None:
            used = self._used[key.id] = _Used()
        return used


_NO_LIMITS: Mapping[str, str] = {}
