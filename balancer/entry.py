"""Where the `balancer` command begins: Ctrl-C while the program is being read is no traceback either."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from balancer.__main__ import app  # here, since reading it takes the better part of a second

        app()
    except KeyboardInterrupt:
        sys.exit(130)
