"""The command line's entry point: ``safeconduct`` and ``python -m safeconduct``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run one command and exit with its code."""
    from safeconduct.runtime.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
