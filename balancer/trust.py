"""TLS towards workers: whose certificates are trusted, and what is wrong with one, in words.

Certificates are always verified, and that they are for the host that was asked for. No setting turns that
off: a worker with a certificate of a private CA, or one of its own making, is given a `ca_file`. Agents alone
are known by their certificates themselves (`pinning`).
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping
from pathlib import Path

from worker_agent import plain_files

_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})
_NOT_YET_VALID = 9
_EXPIRED = 10
_OTHER_HOST = frozenset({62, 64})
"""OpenSSL's numbers (X509_V_ERR_...): of a name that does not match, and of an address."""

_NO_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)


_in_use: dict[str | None, ssl.SSLContext] = {}


def context(ca_file: str | None = None) -> ssl.SSLContext:
    """One for all connections that trust the same: the certificates in this file and no other ones, or, for
    None, what the system trusts. Raises `OSError` for a file that cannot be read or holds none."""
    known = _in_use.get(ca_file)
    if known is None:
        known = _in_use[ca_file] = read(ca_file)
    return known


def read(ca_file: str | None = None) -> ssl.SSLContext:
    """The same as the file is now; what is in use stays. Blocking, and raises as `context` does."""
    if ca_file is not None:
        plain_files.insist_on_plain(Path(ca_file))
    made = ssl.create_default_context(cafile=ca_file)
    made.set_alpn_protocols(["http/1.1"])
    return made


@functools.cache
def pinning() -> ssl.SSLContext:
    """For connections whose certificate the caller compares itself, with the one that it expects."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    return made


def replace(contexts: Mapping[str | None, ssl.SSLContext]) -> None:
    """Certificates may have been renewed: these hold for the next connections, in place of all before."""
    global _in_use
    _in_use = dict(contexts)


def complaint(error: ssl.SSLError) -> str:
    """What went wrong with a connection, with what to do; without anything of what was sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_certificate(error)
    if error.reason in _NO_TLS:
        return 'it does not speak TLS there: say http in place of https (leave out "tls")'
    return f"it does not speak TLS as expected ({error.reason or type(error).__name__})"


def _of_certificate(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in _UNKNOWN_ISSUER:
        return (
            "its TLS certificate is signed by nobody who is trusted here: for a private CA, or a certificate "
            'of its own making, name the file with the certificate as "ca_file" of this worker'
        )
    if code in _OTHER_HOST:
        return "its TLS certificate is for another host: ask it by a name that stands in the certificate"
    if code == _EXPIRED:
        return "its TLS certificate has expired, or the clock of this machine is wrong"
    if code == _NOT_YET_VALID:
        return "its TLS certificate is not valid yet, or the clock of this machine is wrong"
    return f"its TLS certificate is not trusted ({error.verify_message})"
