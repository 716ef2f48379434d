"""Talks to the hub: what a repository holds, and the bytes of a file from any place on.

Through `huggingface_hub`, over plain HTTP. What it does by itself is not enough for us: its downloads begin
anew after a cut (2.4), write as much as a server sends, and its token goes to more hosts than the one that
the user named. So its client is asked for each answer, and every request and answer passes the `_Gate`.

Only the process that downloads imports this.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_VERBOSITY": "critical",
}
"""Xet would fetch with a program of its own, past everything here: no bounds, no resume, no pace told. Hubs
serve the same bytes over HTTP."""
os.environ.update(QUIET)  # read at import

import httpx2  # noqa: E402
from huggingface_hub import HfApi, hf_hub_url  # noqa: E402
from huggingface_hub.errors import (  # noqa: E402
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: E402
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from worker_agent.models.selection import HubFile  # noqa: E402

_US = ("llm-room-balancer", "1")
_CONNECT_SECONDS = 15.0
_SILENCE_SECONDS = 30.0
"""Without a byte for so long a connection counts as cut."""
_MOST_ANSWER_BYTES = 32 * 1024 * 1024
"""Of an answer that is not a file's content: what is listed of a repository with thousands of files."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_CHECK_AGAIN = (408, 425, 429)


class HubError(Exception):
    """The hub will not give it; the sentence says what to do."""


class NoSuchRevision(HubError):
    """It has the repository, and not this branch, tag or commit of it."""


class Cut(Exception):
    """The hub could not be reached, or stopped in the middle: it may well go on at the next try.

    `wait_seconds`: as it asked for; None: it did not.
    """

    def __init__(self, sentence: str, wait_seconds: float | None = None) -> None:
        super().__init__(sentence)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """What a hub tells of a repository at one commit."""

    commit: str
    files: tuple[HubFile, ...]
    tags: tuple[str, ...]


class Hub:
    """One hub, with the token for it."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token: str | bool = token or False
        self._host = urlsplit(self._endpoint).hostname or ""
        client = get_session()
        gate = _Gate(self._endpoint)
        client.event_hooks = {
            "request": [*client.event_hooks["request"], gate.request],
            "response": [*client.event_hooks["response"], gate.response],
        }
        client.timeout = httpx2.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)

    def repository(self, repo: str, revision: str | None) -> Repository:
        """Its files at that revision. Raises `HubError` and `Cut`."""
        with self._translated(repo):
            try:
                info = HfApi(self._endpoint, self._token, *_US).model_info(
                    repo, revision=revision, files_metadata=True, timeout=_SILENCE_SECONDS
                )
                files = tuple(
                    HubFile(
                        name=str(file.rfilename),
                        size=_size(file.size),
                        sha256=None if file.lfs is None else _digits(file.lfs.sha256, 64),
                        blob_id=None if file.blob_id is None else _digits(file.blob_id, 40),
                    )
                    for file in info.siblings or ()
                )
                return Repository(
                    commit=_digits(info.sha, 40), files=files, tags=tuple(map(str, info.tags or ()))
                )
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                if isinstance(error, HFValidationError | httpx2.HTTPError):
                    raise
                raise HubError(
                    f"{self._host} does not answer as a hub does ({type(error).__name__}): check HF_ENDPOINT"
                ) from None

    @contextlib.contextmanager
    def content(self, repo: str, commit: str, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes of a file: where they really begin, which is `start` or 0, and they themselves.

        Raises `HubError` and `Cut`, also while the bytes are read.
        """
        headers = build_hf_headers(token=self._token, library_name=_US[0], library_version=_US[1])
        headers["Accept-Encoding"] = "identity"  # a compressed answer cannot be gone on with in the middle
        if start:
            headers["Range"] = f"bytes={start}-"
        url = hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)
        with self._translated(repo), get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            yield _begin(response, start), response.iter_bytes()

    @contextlib.contextmanager
    def _translated(self, repo: str) -> Iterator[None]:
        """The library's exceptions as ours."""
        try:
            yield
        except GatedRepoError:
            raise HubError(self._gated(repo)) from None
        except RevisionNotFoundError:
            raise NoSuchRevision(
                f"{repo} has no such revision at {self._host}: leave --revision out, or look there"
            ) from None
        except RepositoryNotFoundError:
            raise HubError(self._not_found(repo)) from None
        except EntryNotFoundError:
            raise HubError(
                f"a file that {repo} lists is not there at {self._host}: try again later"
            ) from None
        except HfHubHTTPError as error:
            raise self._of_status(repo, error) from None
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it") from None
        except HFValidationError:
            raise HubError(f"{repo!a} is not a repository's name") from None
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise Cut(
                f"{self._host} cannot be reached or stopped answering ({type(error).__name__})"
            ) from None
        except httpx2.HTTPError as error:
            raise HubError(
                f"{self._host} cannot be used ({type(error).__name__}): check HF_ENDPOINT and the proxy"
            ) from None

    def _gated(self, repo: str) -> str:
        what = f"accept its licence at {self._endpoint}/{repo}"
        if not self._token:
            return f"{repo} is gated: {what}, then set HF_TOKEN or give hub_token_file"
        return f"{repo} is gated, and this token's owner has no access yet: {what}"

    def _not_found(self, repo: str) -> str:
        if self._token:
            return f"{self._host} has no {repo}, or this token may not read it: check the name and the token"
        return f"{self._host} has no {repo}, or it is private: check the name; for a private one set HF_TOKEN"

    def _of_status(self, repo: str, error: HfHubHTTPError) -> HubError | Cut:
        status = error.response.status_code
        if status >= 500 or status in _CHECK_AGAIN:
            return Cut(f"{self._host} answered {status}", _retry_after(error.response))
        if status == 401 and not self._token:
            return HubError(self._not_found(repo))
        if status == 401:
            return HubError(f"{self._host} does not know this token (401): make a new one and set HF_TOKEN")
        if status == 403:
            return HubError(
                f"{self._host} refuses {repo} (403): the token needs read access to it;"
                f" see {self._endpoint}/{repo}"
            )
        return HubError(f"{self._host} answered {status} for {repo}")


class _Gate:
    """What may leave and enter, redirects included."""

    def __init__(self, endpoint: str) -> None:
        self._origin = _origin(endpoint)
        self._api = f"{urlsplit(endpoint).path.rstrip('/')}/api/"
        self._reach: dict[str, int] = {}

    def request(self, request: httpx2.Request) -> None:
        """The token goes to the hub alone; and an answer cannot send us to where the hub's own address does
        not lead: from the internet into this network, from HTTPS to plain text."""
        origin = _origin(str(request.url))
        if origin == self._origin:
            return
        request.headers.pop("authorization", None)
        if self._origin[0] == "https" and origin[0] != "https":
            raise HubError(f"{self._origin[1]} sends us to {origin[1]} without encryption: refused")
        if self._reach_of(origin[1]) < self._reach_of(self._origin[1]):
            raise HubError(
                f"{self._origin[1]} sends us to {origin[1]}, which is inside this network: refused"
            )

    def response(self, response: httpx2.Response) -> None:
        """Only a file's content may be long: everything else is read into memory."""
        url = str(response.request.url)
        is_api = _origin(url) == self._origin and urlsplit(url).path.startswith(self._api)
        if response.status_code not in (200, 206) or is_api:
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _Bounded(response.stream, self._origin[1])

    def _reach_of(self, host: str) -> int:
        if host not in self._reach:
            self._reach[host] = reach(_addresses(host))
        return self._reach[host]


class _Bounded(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, host: str) -> None:
        self._stream = stream
        self._host = host

    def __iter__(self) -> Iterator[bytes]:
        count = 0
        for piece in self._stream:
            count += len(piece)
            if count > _MOST_ANSWER_BYTES:
                raise HubError(f"{self._host} sends an answer without end: check HF_ENDPOINT")
            yield piece

    def close(self) -> None:
        self._stream.close()


def reach(addresses: Sequence[str]) -> int:
    """How far away the nearest of these IP addresses is: 0 this machine, 1 this network, 2 the internet. No
    address: 2, since it is a proxy then that finds the host. Pure."""
    return min((_distance(ipaddress.ip_address(address)) for address in addresses), default=2)


def _distance(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return _distance(mapped)
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        return 0
    return 2 if address.is_global else 1


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[4][0]).partition("%")[0] for address in found]


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def _begin(response: httpx2.Response, start: int) -> int:
    """Where the answer's content begins. Raises `Cut` where it is not what was asked for."""
    if response.status_code != 206:
        return 0  # it knows no ranges, and sends everything
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise Cut("the hub sends another part than was asked for")
    return start


def _retry_after(response: httpx2.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError("a size")
    return value


def _digits(value: object, least: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{40,64}", value) or len(value) < least:
        raise ValueError("a hash")
    return value
