"""How the commands of this machine speak to a balancer: over TLS where that one has it, and trusting whom.

A balancer on this machine that has made its own certificate is known by that, without a word on the command
line, and without asking anybody else.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from balancer.client_tls import own_certificate
from balancer.config_file import ConfigFile

TRY_SECONDS = 3.0
DEFAULT_PORTS = {"http": 80, "https": 443}
CA_FILE_VARIABLE = "BALANCER_CA_FILE"

_data_dir_named: ContextVar[Path | None] = ContextVar("data_dir_named", default=None)
_ca_file_named: ContextVar[Path | None] = ContextVar("ca_file_named", default=None)
"""By the options of the command under way."""


class NotTrusted(Exception):
    """The file with certificates cannot be used; a sentence for the terminal."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Where to, and whom to trust there."""

    root: str
    """With a scheme, without a path."""
    tls: ssl.SSLContext | bool
    """As aiohttp takes it."""


def reach(root: str) -> Reached:
    """How to speak to the balancer at this address: with or without a scheme, without a path.

    May connect to it once, if it is on this machine. Blocking. Raises `NotTrusted`.
    """
    url = root if "://" in root else f"http://{root}"
    parts = urlsplit(url)
    own = own_certificate(_data_dir()) if is_here(parts.hostname or "") else None
    if own is not None and not own.is_file():
        own = None
    ca_file = _ca_file_named.get() or os.environ.get(CA_FILE_VARIABLE)
    if parts.scheme == "https":
        return Reached(url, _trusting(ca_file, own) if ca_file or own else True)
    if own is None:
        return Reached(url, True)
    trusted = _trusting(ca_file, own)
    if not _speaks_tls(parts.hostname or "", parts.port or DEFAULT_PORTS["http"], trusted):
        return Reached(url, True)
    return Reached(f"https{url.removeprefix(parts.scheme)}", trusted)


def is_here(host: str) -> bool:
    """A name or an address of this machine's own."""
    if host in ("localhost", socket.gethostname().lower()):
        return True
    bare = host.partition("%")[0]
    try:
        if ipaddress.ip_address(bare).is_loopback:
            return True
    except ValueError:
        return False
    found = (one.address.partition("%")[0] for those in psutil.net_if_addrs().values() for one in those)
    return bare in found


def _trusting(ca_file: str | Path | None, own: Path | None) -> ssl.SSLContext:
    """What the system trusts, and these."""
    context = ssl.create_default_context()
    for file in (ca_file, own):
        if file is None:
            continue
        try:
            context.load_verify_locations(file)
        except OSError as error:
            why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise NotTrusted(f"the certificates in {file} cannot be used: {why}") from error
    return context


def _speaks_tls(host: str, port: int, context: ssl.SSLContext) -> bool:
    """Nothing is said but hello: a key that is sent next goes to whoever has that certificate."""
    try:
        with (
            socket.create_connection((host, port), timeout=TRY_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except OSError:  # not there, or plain: asking it will tell
        return False


def _data_dir() -> Path:
    """Of the command under way."""
    given = _data_dir_named.get() or os.environ.get("BALANCER_DATA_DIR")
    return Path(given).expanduser() if given else ConfigFile().data_dir


def noted_data_dir(path: Path | None) -> Path | None:
    """For the option: whom to trust is found there from now on."""
    _data_dir_named.set(path)
    return path


def noted_ca_file(path: Path | None) -> Path | None:
    """For the option: whom else to trust from now on."""
    _ca_file_named.set(path)
    return path
