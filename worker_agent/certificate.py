"""A machine's own certificate: made by itself, vouched for by nobody, known by its fingerprint.

It says nothing of its owner. Who wants to know whose it is compares the fingerprint, which the handshake
proves (`handshake`). Blocking.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from worker_agent import private_files
from worker_agent.private_files import FileFault

YEARS = 20
_NAME = "llm-room-balancer"
_A_DAY = timedelta(days=1)  # clocks of a room differ


@dataclass(frozen=True, slots=True)
class Certificate:
    """One that is kept in a file, beside its key."""

    path: Path
    """PEM: the key and the certificate."""
    fingerprint: str
    """SHA-256 of the certificate (DER), 64 hex digits."""

    def server_context(self) -> ssl.SSLContext:
        """For serving with it: TLS 1.2 or newer, HTTP/1.1. Raises `FileFault` where the file is gone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        # Connections last; what would resume one is sent unasked, and read by nobody.
        context.num_tickets = 0
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(
                self.path, password=""
            )  # without one, an encrypted key has it ask the terminal
        except OSError as error:  # ssl.SSLError is one
            raise FileFault(f"the certificate in {self.path} cannot be used: {_reason(error)}") from None
        return context


def fingerprint_of(der: bytes) -> str:
    """As both sides of a connection see it: SHA-256 in lower-case hex."""
    return hashlib.sha256(der).hexdigest()


def made() -> bytes:
    """A new key (ECDSA P-256) and its certificate, as PEM."""
    # Here and not above: needed once in a machine's life, and slow to load.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _A_DAY)
        .not_valid_after(now + timedelta(days=365 * YEARS))
        # No authority: who trusts it trusts this machine, and nothing that its key might sign.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + certificate.public_bytes(Encoding.PEM)


def kept(path: Path) -> Certificate:
    """The certificate in this file, made where there is none. Raises `FileFault` for one that is not whole or
    not ours, and where it cannot be written."""
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read(path)
        with contextlib.suppress(FileExistsError):  # somebody was faster: theirs is as good
            private_files.write_new(path, made())
        return _read(path)
    except OSError as error:
        raise FileFault(
            f"cannot keep a certificate in {path}: {_reason(error)}; choose another --data-dir"
        ) from None


def _read(path: Path) -> Certificate:
    data = private_files.read(path)
    try:
        _, begin, rest = data.decode().partition("-----BEGIN CERTIFICATE-----")
        certificate = Certificate(path, fingerprint_of(ssl.PEM_cert_to_DER_cert(begin + rest)))
        certificate.server_context()  # which compares the certificate with its key
    except (ValueError, FileFault):
        raise FileFault(
            f"{path} holds no certificate with its key: remove it, and a new one is made, which balancers"
            " that knew the old one must be told to accept"
        ) from None
    return certificate


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
