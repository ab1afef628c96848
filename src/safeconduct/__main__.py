"""The command line's entry point: ``safeconduct`` and ``python -m safeconduct``."""

# First of all, and without a `from __future__` above it, which would be an import too: -m puts the
# current folder in front of everything, so a project's own typer.py would run in our place.
# https://docs.python.org/3/library/sys.html#sys.path (safe_path: nothing was put there)
import gc
import os
import sys

# Loading a verb makes many objects and hardly any garbage: collecting seldom starts it a tenth
# sooner (https://docs.python.org/3/library/gc.html#gc.set_threshold).
_ALLOCATIONS_BETWEEN_COLLECTIONS = 50_000


def _forget_current_folder() -> None:
    """Take the folder that ``-m`` added off the import path."""
    try:
        current = os.getcwd()
    except OSError:  # the folder is gone
        current = ""
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", current):
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_folder()


def main() -> None:
    """Run one command and exit with its code."""
    gc.set_threshold(_ALLOCATIONS_BETWEEN_COLLECTIONS)
    from safeconduct.runtime.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
