"""The balancer's two keys: the admin key, without which nothing under `/admin` is answered, and the cluster
key, by which balancers and agents know each other.

Both are made on the first start and kept in the data folder, readable by their owner alone; or they are given
by the settings. No key is ever logged or passed on a command line.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from balancer.core.errors import RequestError
from worker_agent import private_files
from worker_agent.handshake import LEAST_KEY_CHARACTERS, MOST_KEY_CHARACTERS, is_cluster_key
from worker_agent.private_files import FileFault

ADMIN_KEY = "admin_key"
CLUSTER_KEY = "cluster_key"
FORMER_CLUSTER_KEYS = "cluster_keys_former"
"""What the files in the data folder are called."""
MAX_FORMER_KEYS = 3
"""An agent that was away for more changes of the key than that is to be let in anew."""

MAX_KEY_BYTES = 8192


class KeyFault(Exception):
    """A key that cannot be had or must not be used; a sentence for the terminal, with what to do."""


class KeyMissing(RequestError):
    status, type, code = 401, "invalid_request_error", "admin_key_missing"


class KeyWrong(RequestError):
    status, type, code = 403, "invalid_request_error", "admin_key_wrong"


class TooManyGuesses(RequestError):
    status, type, code = 429, "rate_limit_error", "too_many_wrong_keys"

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "Too many wrong admin keys came from this address. Wait as long as Retry-After says, and give "
            f"the right one: it is in the file {ADMIN_KEY} in the balancer's data folder."
        )
        self.retry_after = retry_after


class CannotRotate(Exception):
    """The cluster key stays as it is; a sentence for people."""


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """The cluster's key, and those that it had before."""

    current: str = field(repr=False)
    former: tuple[str, ...] = field(default=(), repr=False)
    """The last one first. Good for nothing but to give the current one to agents that were away."""
    folder: Path | None = None
    """Where they are kept; None: the settings give the key."""

    def followed_by(self, key: str) -> ClusterKeys:
        """With another current one. Pure."""
        former = (self.current, *(one for one in self.former if one != self.current))
        return ClusterKeys(key, former[:MAX_FORMER_KEYS], self.folder)


def rotated(keys: ClusterKeys) -> ClusterKeys:
    """With a new current key, kept on the disk. Blocking. Raises `CannotRotate`."""
    if keys.folder is None:
        raise CannotRotate(
            "the settings give the cluster key: change it there and on every agent, and restart all of them"
        )
    fresh = keys.followed_by(secrets.token_urlsafe(32))
    try:
        # First the former ones: whatever happens in between, no agent has a key that is kept nowhere.
        private_files.replace(
            keys.folder / FORMER_CLUSTER_KEYS, "".join(f"{one}\n" for one in fresh.former).encode()
        )
        private_files.replace(keys.folder / CLUSTER_KEY, f"{fresh.current}\n".encode())
    except OSError as error:
        raise CannotRotate(f"{keys.folder} cannot be written to: {error.strerror or error}") from error
    return fresh


@dataclass(frozen=True, slots=True)
class Keys:
    """Both keys, ready to be used."""

    admin: str = field(repr=False)
    cluster: ClusterKeys
    made: tuple[Path, ...] = ()
    """The files that did not exist before."""


def found(data_dir: Path, *, admin: str | None, cluster: str | None) -> Keys:
    """The keys that are given, else those in the data folder, made where there are none. Blocking.

    Raises `KeyFault`.
    """
    made: list[Path] = []

    def one(name: str, given: str | None) -> str:
        if given is not None:
            return _strong(given, f"the {name.replace('_', ' ')} that the settings give")
        path = data_dir / name
        key, is_new = _kept(path)
        if is_new:
            made.append(path)
        return key

    admin_key = one(ADMIN_KEY, admin)
    if cluster is not None:
        return Keys(admin_key, ClusterKeys(one(CLUSTER_KEY, cluster)), tuple(made))
    current = one(CLUSTER_KEY, None)
    former = tuple(key for key in _former(data_dir / FORMER_CLUSTER_KEYS) if key != current)
    return Keys(admin_key, ClusterKeys(current, former, data_dir), tuple(made))


def _former(path: Path) -> tuple[str, ...]:
    try:
        lines = read_own(path, MAX_KEY_BYTES).decode("ascii", "replace").split()
    except FileNotFoundError:
        return ()
    return tuple(line for line in lines if is_cluster_key(line))[:MAX_FORMER_KEYS]


# Files ...


def read(path: Path) -> str:
    """The key in a file of our own. Raises `KeyFault`, and `FileNotFoundError` where there is none."""
    data = read_own(path, MAX_KEY_BYTES)
    try:
        key = data.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    return _strong(key, f"the key in {path}")


def read_own(path: Path, limit_bytes: int) -> bytes:
    """A file that nobody else can read or write. Raises `KeyFault`, also for a longer one, and
    `FileNotFoundError` where there is none."""
    try:
        return private_files.read(path, limit_bytes, anybodys_for_root=True)
    except FileFault as fault:
        raise KeyFault(str(fault)) from fault


def _kept(path: Path) -> tuple[str, bool]:
    """The key in this file, and whether it had to be made."""
    with suppress(FileNotFoundError):
        return read(path), False
    try:
        key = secrets.token_urlsafe(32)
        private_files.write_new(path, f"{key}\n".encode())
        return key, True
    except FileExistsError as error:
        if path.is_file():  # another balancer that starts at the same time was faster
            return read(path), False
        raise _unwritable(path, error) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> KeyFault:
    name = path.name.upper()
    return KeyFault(
        f"cannot write the new key {path}: {error.strerror or error}; choose another --data-dir, or give the "
        f"key by the variable BALANCER_{name}"
    )


def _strong(key: str, what: str) -> str:
    if not is_cluster_key(key):
        raise KeyFault(
            f"{what} is not usable: expected one word of at least {LEAST_KEY_CHARACTERS} and at most "
            f"{MOST_KEY_CHARACTERS} characters. Without one, a key is made on the next start"
        )
    return key


# Who comes with one ...


@dataclass(frozen=True, slots=True)
class GuessPolicy:
    """How many wrong keys may come from one address."""

    at_once: int = 10
    seconds_each: float = 6.0
    """After which one more may come."""
    max_addresses: int = 1024
    """That are remembered; the one that was wrong longest ago is forgotten for one more."""


class Guesses:
    """Wrong keys, counted by address. Pure: the time is an argument."""

    def __init__(self, policy: GuessPolicy | None = None) -> None:
        self._policy = policy or GuessPolicy()
        self._spent_until: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """Addresses that are remembered."""
        return len(self._spent_until)

    def wait_seconds(self, address: str, now: float) -> float:
        """Until a key from this address may be looked at; 0: now."""
        spent = self._spent_until.get(_network(address), now) - now
        return max(0.0, spent - (self._policy.at_once - 1) * self._policy.seconds_each)

    def wrong(self, address: str, now: float) -> None:
        network = _network(address)
        self._spent_until[network] = max(self._spent_until.get(network, now), now) + self._policy.seconds_each
        self._spent_until.move_to_end(network)
        while len(self._spent_until) > self._policy.max_addresses:
            self._spent_until.popitem(last=False)


def _network(address: str) -> str:
    """Whoever has an IPv6 address has 2^64 of them."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))


class AdminKey:
    """Tells who holds the admin key from who does not."""

    def __init__(self, key: str, clock: Callable[[], float], policy: GuessPolicy | None = None) -> None:
        self._digest = _digest(key)
        self._clock = clock
        self._guesses = Guesses(policy)

    def check(self, given: str, address: str) -> None:
        """Raises `KeyMissing`, `KeyWrong` and `TooManyGuesses`. `given`: empty for none."""
        if not given:
            raise KeyMissing(
                "This needs the admin key, as `Authorization: Bearer KEY`. It is in the file "
                f"{ADMIN_KEY} in the balancer's data folder, unless its settings give another."
            )
        now = self._clock()
        if wait := self._guesses.wait_seconds(address, now):
            raise TooManyGuesses(wait)  # not looked at: else to wait would slow no guess down
        # Digests: what differs between two of them says nothing of the keys, nor does their length.
        if not hmac.compare_digest(_digest(given), self._digest):
            self._guesses.wrong(address, now)
            raise KeyWrong(
                f"This is not the admin key. It is in the file {ADMIN_KEY} in the balancer's data folder, "
                "unless its settings give another."
            )


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
