"""The certificate that a machine makes for itself, and the file that it is kept in."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from worker_agent import private_files
from worker_agent.certificate import Certificate, fingerprint_of, kept, made
from worker_agent.private_files import FileFault


def test_it_says_nothing_of_its_owner_and_is_good_for_long() -> None:
    certificate = x509.load_pem_x509_certificate(made())
    assert certificate.subject == certificate.issuer
    assert certificate.subject.rfc4514_string() == "CN=llm-room-balancer"
    told = {extension.oid._name for extension in certificate.extensions}
    assert told == {"basicConstraints", "extendedKeyUsage", "subjectKeyIdentifier"}
    assert certificate.not_valid_before_utc < datetime.now(UTC)
    assert certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=365 * 19)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_it_is_made_once_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "agent-1.pem"
    first, again = kept(path), kept(path)
    assert first == again
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["agent-1.pem"]
    assert kept(tmp_path / "another.pem").fingerprint != first.fingerprint


def test_two_that_start_at_once_have_the_same(tmp_path: Path) -> None:
    found: list[Certificate] = []
    threads = [threading.Thread(target=lambda: found.append(kept(tmp_path / "a.pem"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def served(certificate: Certificate, client: ssl.SSLContext) -> ssl.SSLSocket:
    """What a client has of a handshake with it."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with certificate.server_context().wrap_socket(ours, server_side=True) as tls:
                tls.recv(1)
        except OSError:
            ours.close()

    threading.Thread(target=serve, daemon=True).start()
    return client.wrap_socket(theirs, server_hostname=None)


def test_its_fingerprint_is_what_a_connection_shows(tmp_path: Path) -> None:
    certificate = kept(tmp_path / "a.pem")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_alpn_protocols(["h2", "http/1.1"])
    with served(certificate, client) as tls:
        seen = tls.getpeercert(binary_form=True)
        assert seen is not None
        assert fingerprint_of(seen) == certificate.fingerprint
        assert tls.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_not_spoken(tmp_path: Path, version: ssl.TLSVersion) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.minimum_version, client.maximum_version = version, version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        served(kept(tmp_path / "a.pem"), client)


def test_it_vouches_for_no_other() -> None:
    extension = x509.load_pem_x509_certificate(made()).extensions.get_extension_for_class(
        x509.BasicConstraints
    )
    assert extension.critical
    assert not extension.value.ca


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:300]),
        lambda path: path.write_bytes(path.read_bytes()[:-60]),
        lambda path: path.write_bytes(made().partition(b"-----BEGIN CERT")[0] + _certificate_of(made())),
        lambda path: path.write_bytes(b"\xff" * 1000),
    ],
    ids=["empty", "half", "torn", "the key of another", "no text"],
)
def test_a_file_that_is_not_whole_is_refused_and_left_as_it_is(tmp_path: Path, spoil: object) -> None:
    path = tmp_path / "a.pem"
    kept(path)
    spoil(path)  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(FileFault, match="holds no certificate with its key: remove it"):
        kept(path)
    assert path.read_bytes() == before


def _certificate_of(pem: bytes) -> bytes:
    return b"-----BEGIN CERT" + pem.partition(b"-----BEGIN CERT")[2]


# Any file with a secret.


def test_a_file_that_others_can_read_or_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    private_files.write_new(path, b"one")
    path.chmod(0o640)
    with pytest.raises(FileFault, match="may be known to others"):
        private_files.read(path)
    path.chmod(0o600)
    assert private_files.read(path) == b"one"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(FileFault, match="it is a link"):
        private_files.read(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(FileFault, match="is no file"):
        private_files.read(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    private_files.write_new(path, b"one")
    os.chown(path, 65534, -1)
    with pytest.raises(FileFault, match="belongs to another user"):
        private_files.read(path)


def test_a_new_file_replaces_none_and_a_replaced_one_is_never_half(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    private_files.write_new(path, b"one")
    with pytest.raises(FileExistsError):
        private_files.write_new(path, b"two")
    assert private_files.read(path) == b"one"
    private_files.replace(path, b"two")
    assert private_files.read(path) == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        private_files.replace(tmp_path / "folder", b"one")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
