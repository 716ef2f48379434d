"""What can go wrong with a request, sorted by whose fault it is. Pure.

The class decides the HTTP status, whether the client should try again, and whether a worker's record
suffers. A worker's own words travel as the message; a dialect gives the error its shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType


class RequestError(Exception):
    """A request that ends without an answer. `status` and `code` are HTTP's and OpenAI's."""

    status = 500
    code: str | None = None
    type = "server_error"
    param: str | None = None
    retry_after: float | None = None
    """Seconds after which a new try has a fair chance; None: trying again changes nothing."""
    more: Mapping[str, object] = MappingProxyType({})
    """What the error says besides, under keys of its own."""
    headers: Mapping[str, str] = MappingProxyType({})
    """What the head of its answer says besides."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


# The client's fault: nothing about any worker is learned, and the same request will fail again.


class BadRequest(RequestError):
    status, type = 400, "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Forbidden(RequestError):
    status, type, code = 403, "invalid_request_error", "source_not_allowed"


class NotFound(RequestError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(RequestError):
    status, type, code, param = 404, "invalid_request_error", "model_not_found", "model"

    def __init__(self, model: str, models: Sequence[str]) -> None:
        there = ", ".join(models[:20]) + (", ..." if len(models) > 20 else "")
        super().__init__(
            f"The model {model!r} is not served here. Models that are: {there}."
            if models
            else f"The model {model!r} is not served here; no worker serves any model yet."
        )


class OnlyOutside(RequestError):
    status, type, code, param = 404, "invalid_request_error", "model_not_local", "model"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"Only a fallback outside of this room serves the model {model!r}, and the request is local "
            "only. Leave out X-Local-Only and metadata.local_only to let it go there, or ask for a model "
            "of the room."
        )


class MethodNotAllowed(RequestError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class BodyTimeout(RequestError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(RequestError):
    status, type, code = 409, "invalid_request_error", "conflict"


class BodyTooLarge(RequestError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMedia(RequestError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class Rejected(RequestError):
    """A worker read the request and says that it is wrong (a prompt longer than its context, say)."""

    type = "invalid_request_error"

    def __init__(self, status: int, message: str, *, code: str | None, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


# The room's fault: nobody has room, or nobody is there. A later try may succeed.


class QueueFull(RequestError):
    status, type, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LoopDetected(RequestError):
    status, code = 508, "loop_detected"


class ShuttingDown(RequestError):
    status, code = 503, "shutting_down"
    retry_after = 1.0


class NoRoom(RequestError):
    status, code = 503, "no_worker_available"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelLoading(RequestError):
    """No worker will have the model loaded in time; one has begun."""

    status, code = 503, "model_loading"

    def __init__(
        self, model: str, worker: str, progress: float | None, eta_seconds: float | None, retry_after: float
    ) -> None:
        eta = "" if eta_seconds is None else f", about {math.ceil(eta_seconds)} s to go"
        done = "" if progress is None else f", {progress:.0%} done"
        super().__init__(
            f"The model {model!r} is being loaded on {worker}{done}{eta}. "
            f"Try again in {math.ceil(retry_after)} s."
        )
        self.retry_after = retry_after
        self.more = {"loading": {"worker": worker, "progress": progress, "eta_seconds": eta_seconds}}


class ModelFailed(NoRoom):
    """Each worker that has the model says that it cannot load it."""

    code = "model_failed"


# The workers' fault, after every retry that was allowed.


class WorkerFailed(RequestError):
    status, code = 502, "worker_failed"


class StreamBroken(RequestError):
    """For the error event that ends a stream whose worker failed."""

    status, code = 502, "stream_broken"

    def __init__(self, why: str) -> None:
        """`why` it could not go on elsewhere: a clause, for people."""
        super().__init__(
            f"The worker failed in the middle of its answer, and it could not be continued: {why}. "
            "What came until then is not the whole answer; send the request again."
        )


class Quarantined(RequestError):
    """The request itself is what engines died of: no `retry_after`, since it would happen again."""

    status, code = 502, "request_quarantined"

    def __init__(self, engines: int, seconds: float) -> None:
        """`engines` that died over it; `seconds` for which it is not tried again."""
        super().__init__(
            f"{engines} engines ended while they worked on this request, so it is not tried again for "
            f"{math.ceil(seconds)} s. Ask differently or for less (a shorter prompt, fewer tokens), and look "
            "at the log of the worker for what its engine died of."
        )


class TimedOut(RequestError):
    status, type, code = 504, "server_error", "timeout"
