"""TLS towards clients: with a certificate of our own making, or with files that somebody else looks after.

Our own is kept in `tls/` in the data folder, so that who has once decided to trust it need not do so again.
It is made anew only where this machine has names or addresses that it does not cover, or its end is near.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balancer.keys import KeyFault, read_own
from worker_agent import plain_files, private_files

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

log = logging.getLogger(__name__)

FOLDER, CERTIFICATE, KEY = "tls", "certificate.pem", "key.pem"
LOOK_SECONDS = 2.0
LASTS = timedelta(days=820)
"""Systems of Apple refuse a longer one that somebody has decided to trust."""
RENEWED_BEFORE = timedelta(days=30)
MAX_FILE_BYTES = 1024 * 1024
MAX_NAMES = 64


class TlsFault(Exception):
    """The certificate or its key cannot be used; a sentence for the terminal, with what to do."""


@dataclass(frozen=True, slots=True)
class Names:
    """By which clients reach this machine."""

    hosts: frozenset[str]
    """Names in lower case."""
    addresses: frozenset[str]


class ClientTls:
    """What new connections are secured with; may change while all runs."""

    def __init__(self, certificate: Path, key: Path, renew: Callable[[], None] | None = None) -> None:
        """`renew`: makes both files anew where that is due (blocking); None: somebody else does."""
        self._certificate = certificate
        self._key = key
        self._renew = renew
        self._seen: tuple[object, ...] = ()
        self._quiet: set[str] = set()
        self.fingerprint = ""
        """SHA-256 of the certificate, in hex."""
        self.context = self._current = _context()
        """For servers. It hands each connection over to the one with the files as they are now."""
        self.context.sslobject_class = _telling(self._note)
        self.context.sni_callback = self._hand_over

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """`context` can be used inside the block, and follows what becomes of the files. Raises
        `TlsFault`."""
        await asyncio.to_thread(self._load)
        # Kept here, awaited on leaving. A task group would wrap what is raised in the block.
        watching = asyncio.create_task(self._watch(), name="TLS files")  # noqa: TID251
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if await asyncio.to_thread(self._load):
                    log.info("new connections have another certificate now: SHA-256 %s", self.fingerprint)
                told = ""
            except TlsFault as fault:
                # Tried again with the next look: what was wrong may be put right without a change of them.
                if str(fault) != told:
                    told = str(fault)
                    log.error("%s. Until then the certificate stays as it was", fault)
            except Exception:
                log.exception("a defect of the balancer, in looking at its certificate")

    def _load(self) -> bool:
        """Takes the files if they are others than before; whether they are. Blocking. Raises `TlsFault`."""
        if self._renew is not None:
            self._renew()
        seen = _state(self._certificate), _state(self._key)
        if seen == self._seen:
            return False
        try:
            for path in (self._certificate, self._key):
                plain_files.insist_on_plain(path)
            # Into a new one: of a pair that does not fit, half would stay in the one that is in use.
            fresh = _context()
            fresh.load_cert_chain(self._certificate, self._key, _no_password)
            text = self._certificate.read_text("ascii", "replace")
            der = ssl.PEM_cert_to_DER_cert(_first(text))
        except (OSError, ValueError) as error:
            raise TlsFault(_sentence(error, self._certificate, self._key)) from error
        if (_state(self._certificate), _state(self._key)) != seen:
            raise TlsFault(f"{self._certificate} and {self._key} were replaced while they were read")
        self._current, self.fingerprint, self._seen = fresh, hashlib.sha256(der).hexdigest(), seen
        return True

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _note(self, what: str) -> None:
        """Once each: a client that is set up wrongly tries again and again."""
        if what not in self._quiet:
            self._quiet.add(what)
            log.info("%s", what)


def _context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    return made


def _telling(note: Callable[[str], None]) -> type[ssl.SSLObject]:
    """Connections that fail before there is a request are nobody's; this one mistake of people is told of."""

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except ssl.SSLError as error:
                if error.reason == "HTTP_REQUEST":
                    note("plain HTTP came to a port with TLS: clients have to use https://")
                raise

    return Telling


def from_files(certificate: str | None, key: str | None) -> ClientTls:
    """Raises `TlsFault`."""
    if certificate is None or key is None:
        raise TlsFault('"tls": "files" needs both "tls_cert_file" and "tls_key_file"')
    return ClientTls(Path(certificate).expanduser(), Path(key).expanduser())


def self_signed(data_dir: Path, names: Callable[[], Names], wall: Callable[[], datetime]) -> ClientTls:
    """`names`: those that this machine has now; asked again and again."""
    folder = data_dir / FOLDER
    certificate, key = own_certificate(data_dir), folder / KEY
    return ClientTls(certificate, key, lambda: _renewed(certificate, key, names(), wall()))


def own_certificate(data_dir: Path) -> Path:
    """Where the one of our own making is, if there is one."""
    return data_dir / FOLDER / CERTIFICATE


# Our own certificate; all of this blocks ...


def _renewed(certificate: Path, key: Path, wanted: Names, now: datetime) -> None:
    """Makes one where there is none that will do. Raises `TlsFault`."""
    try:
        found = _kept(certificate, key)
        covered = _covered(found) if found is not None else None
        if covered is not None and found is not None:
            in_time = now < found.not_valid_after_utc - RENEWED_BEFORE
            if in_time and wanted.hosts <= covered.hosts and wanted.addresses <= covered.addresses:
                return
            # What it has covered stays covered: a laptop that comes back finds its certificate as it was.
            wanted = Names(
                _bounded(wanted.hosts, covered.hosts), _bounded(wanted.addresses, covered.addresses)
            )
        certificate.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made, secret = _made(wanted, now)
        private_files.replace(key, secret)
        private_files.replace(certificate, made)
    except KeyFault as fault:
        raise TlsFault(str(fault)) from fault
    except OSError as error:
        raise TlsFault(
            f"cannot write a certificate to {certificate.parent}: {error.strerror or error}"
        ) from error


def _bounded(wanted: frozenset[str], covered: frozenset[str]) -> frozenset[str]:
    room = max(0, MAX_NAMES - len(wanted))
    return wanted | frozenset(sorted(covered - wanted)[:room])


def _kept(certificate: Path, key: Path) -> Certificate | None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = load_pem_private_key(read_own(key, MAX_FILE_BYTES), None)  # else somebody else may have it
        found = x509.load_pem_x509_certificate(plain_files.read(certificate, MAX_FILE_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    # Two files cannot be replaced at once: it may have ended in between.
    return found if found.public_key() == secret.public_key() else None


def _covered(certificate: Certificate) -> Names | None:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    return Names(
        frozenset(names.get_values_for_type(x509.DNSName)),
        frozenset(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )


def _made(names: Names, now: datetime) -> tuple[bytes, bytes]:
    """Certificate and key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    title = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "llm-room-balancer")])
    covered: list[Any] = [x509.DNSName(name) for name in sorted(names.hosts)]
    covered += [x509.IPAddress(ipaddress.ip_address(one)) for one in sorted(names.addresses)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(title)
        .issuer_name(title)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of clients differ
        .not_valid_after(now + LASTS)
        .add_extension(x509.SubjectAlternativeName(covered), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret


def covering(hosts: Iterable[str], addresses: Iterable[str]) -> Names:
    """Those of names and addresses that a certificate should hold.

    Of IPv6 addresses only the loopback: others change every day, and with them would the certificate.
    """
    found = {"127.0.0.1", "::1"}
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if address.version == 4 and not address.is_link_local:
            found.add(str(address))
    named = {"localhost", *(host for host in hosts if host and host.isascii() and len(host) <= 253)}
    return Names(frozenset(sorted(named)[:MAX_NAMES]), frozenset(sorted(found)[:MAX_NAMES]))


def _first(text: str) -> str:
    """Of the certificates in a file: the one that is shown to clients."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = text.index(begin)
    return text[start : text.index(end, start) + len(end)]


def _state(path: Path) -> object:
    try:
        about = os.stat(path)  # through links: that is how such files are often replaced
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _no_password() -> str:
    raise ValueError("it has a password: take it off, since nobody is there to type it")


def _sentence(error: OSError | ValueError, certificate: Path, key: Path) -> str:
    both = f"the certificate {certificate} and its key {key} cannot be used"
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{both}: they do not belong together"
        return f"{both}: expected both in PEM form"
    if isinstance(error, OSError):
        return f"{both}: {error.strerror or error}"
    return f"{both}: {error}"
