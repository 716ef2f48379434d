"""`python -m tests.fuzz TARGET... --seconds N`: mutates a corpus for so long, and keeps what breaks it.

With `--guided` and the package `atheris` installed, its coverage decides which mutations are worth keeping;
else they are blind. What breaks a target is written into its corpus as `found-*`, for the tests to replay
once it is mended. Exit status 1: something was found.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from random import Random

from tests.fuzz.mutation import any_edits, mutated
from tests.fuzz.target import Check, Target
from tests.fuzz.targets import TARGETS

SLOW_SECONDS = 1.0
"""Of our own processor time: nothing of the size that is tried here may keep an event loop so long."""
MOST_FINDS = 20


def blind(target: Target, seconds: float, seed: int) -> int:
    """How many different kinds of finds there are."""
    dice = Random(seed)
    cases = list(target.cases().values()) or [b""]
    found: dict[str, bytes] = {}
    tried, slowest = 0, 0.0
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        check = stack.enter_context(target.running())
        while time.monotonic() < until and len(found) < MOST_FINDS:
            data = mutated(dice.choice(cases), any_edits(dice), target.words, cases)
            tried += 1
            before = time.process_time()
            what = broken(check, data)
            took = time.process_time() - before
            slowest = max(slowest, took)
            if what is None and took > SLOW_SECONDS:
                what = f"took {took:.1f} s"
            if what is not None:
                stack.close()  # what it has left behind must not count for the next
                check = stack.enter_context(target.running())
            if what is not None and what not in found:
                found[what] = data
                print(f"{target.name}: {what}\n  {keep(target, data)}", flush=True)
    print(
        f"{target.name}: {tried} inputs from {len(cases)} cases in {seconds:g} s, "
        f"slowest {1000 * slowest:.1f} ms, {len(found)} kinds of finds"
    )
    return len(found)


def broken(check: Check, data: bytes) -> str | None:
    """What is wrong, with the place of it; None: nothing."""
    try:
        check(data)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.lineno}"
    return None


def keep(target: Target, data: bytes) -> str:
    """Where it is kept."""
    target.folder.mkdir(parents=True, exist_ok=True)
    path = target.folder / f"found-{hashlib.sha256(data).hexdigest()[:10]}"
    path.write_bytes(data)
    return str(path)


def guided(target: Target, seconds: int) -> None:
    """By atheris, which ends the process; what it finds is kept by libFuzzer as `crash-*`."""
    import atheris

    atheris.instrument_all()
    folder = str(target.folder)
    words = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-artifact_prefix={folder}/",
        "-max_len=65536",
        folder,
    ]
    with target.running() as check:
        atheris.Setup(words, check)
        atheris.Fuzz()


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="one target, by atheris")
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.CRITICAL)  # what matters is noted by the targets
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    names = given.targets or list(TARGETS)
    if given.guided:
        guided(TARGETS[names[0]], int(given.seconds))
    finds = sum(blind(TARGETS[name], given.seconds, given.seed) for name in names)
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
