"""What machines of the cluster say to each other, and what anybody can say in their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from tests.fuzz.target import Target, pure
from worker_agent import handshake, wire
from worker_agent.gate import Challenges

MESSAGES: tuple[Callable[[bytes], object], ...] = (
    wire.Report.from_line,
    wire.parse_join,
    wire.parse_hello,
    wire.parse_hello_answer,
    wire.parse_proof,
    wire.parse_proof_answer,
    wire.parse_new_key,
    wire.parse_order,
    wire.parse_models,
)


def message(data: bytes) -> None:
    """The first byte says which one is expected."""
    pick, data = data[:1] or b"\0", data[1:]
    try:
        read = MESSAGES[pick[0] % len(MESSAGES)](data)
    except wire.WireError as error:
        assert str(error).isprintable(), error
        str(error).encode()
        return
    if isinstance(read, wire.Report):
        again = wire.Report.from_line(read.to_line())
        assert again == read
        assert read.id.isprintable()
        assert all(model.name.isprintable() and len(model.name) <= 128 for model in read.models)


def proof(data: bytes) -> None:
    """A handshake whose parts anybody chose: nothing but the very same transcript has the same proof."""
    fields = data.decode("utf-8", "replace").split("|")
    fields += [""] * (6 - len(fields))
    balancer, agent, one, other, fingerprint, given = fields[:6]
    key = handshake.key_bytes("a key that nobody else has")
    said = handshake.Transcript(balancer, agent, one, other, fingerprint, wire.WIRE_VERSION)
    turned = handshake.Transcript(agent, balancer, other, one, fingerprint, wire.WIRE_VERSION)
    ours = said.proof(key, handshake.Role.BALANCER)
    assert not handshake.is_proof(said, key, handshake.Role.BALANCER, given)
    assert not handshake.is_proof(said, key, handshake.Role.AGENT, ours)
    assert turned == said or not handshake.is_proof(turned, key, handshake.Role.BALANCER, ours)
    assert ours not in (said.session(key), said.proof(key, handshake.Role.AGENT))


def nonces(data: bytes) -> None:
    """Each is good once and for a while, whatever comes, and no other one ever is."""
    challenges = Challenges(b"k" * 32, len(data) + 1)
    given: dict[int, tuple[str, float]] = {}
    now = 0.0
    assert not challenges.is_good(data.decode("utf-8", "replace"), now)
    for number, byte in enumerate(data):
        now += (byte >> 4) * 1.5
        if byte & 1:
            given[number] = challenges.give(f"chance-{number}", now), now
        elif (taken := given.pop(number - (byte & 15), None)) is not None:
            nonce, began = taken
            assert challenges.is_good(nonce, now) == (now - began <= handshake.NONCE_SECONDS)
            challenges.use_up(nonce, now)
            assert not challenges.is_good(nonce, now)


def invitation(data: bytes) -> None:
    """What was pasted; a fault is told without a letter of what was."""
    text = data.decode("utf-8", "replace")
    handshake.is_invitation(text)
    try:
        read = handshake.parse_invitation(text)
    except ValueError as error:
        told = "the invitation is not whole: copy all of it, from `lb2.` to the end of its line, as "
        assert str(error) == told + "`balancer cluster invite` shows it"
        return
    assert handshake.is_cluster_key(read.key)
    assert handshake.parse_invitation(str(read)) == read


def code(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    plain = handshake.plain_code(text)
    assert len(plain) <= 2 * handshake.CODE_LENGTH
    assert handshake.plain_code(handshake.shown_code(plain)[: 2 * handshake.CODE_LENGTH + 1])[:1] == plain[:1]


def txt(data: bytes) -> None:
    """An mDNS record's properties, a line each."""
    properties: dict[bytes, bytes | None] = {}
    for line in data.split(b"\n")[:64]:
        name, is_there, value = line.partition(b"=")
        properties[name] = value if is_there else None
    with suppress(wire.WireError):
        found = wire.parse_txt(properties)
        assert found.id.isprintable()
        assert 1 <= len(found.id) <= 128
        assert len(found.tag) in (0, 16)
        assert len(found.fingerprint) in (0, 64)
        assert all(len(f"{k}={v}".encode()) <= 600 for k, v in wire.txt_record(found).items())


TARGETS = (
    Target(
        "message",
        pure(message),
        (
            *(
                b'"wire":2',
                b'"wire":1',
                b'"id":"a"',
                b'"nonce":"',
                b'"models":[{"name":"m"}]',
                b'"port":4100',
            ),
            *(b'"state":"ready"', b'"slots":1', b'"running":0', b'"proof":"', b"0" * 64, b'"by":"code"'),
            *(b'"memory_total_bytes":9007199254740993', b'"progress":0.5', b'"detail":"x"', b'"downloads":['),
        ),
    ),
    Target("proof", pure(proof), (b"|", b"||||||", b"0" * 64)),
    Target("nonces", pure(nonces), (b"\x01", b"\x00", b"\x01" * 300, b"\xff")),
    Target(
        "invitation",
        pure(invitation),
        (b"lb2.", b".", b"@", b",", b"%2e", b"%40", b"https://h:1", b"[::1]:4000"),
    ),
    Target("code", pure(code), ("ß".encode(), "٣".encode(), b"-", b"O0I1")),
    Target(
        "txt",
        pure(txt),
        (b"v=2\n", b"id=a\n", b"c=0123456789abcdef\n", b"fp=" + b"0" * 64 + b"\n", b"=", b"id\n"),
    ),
)
