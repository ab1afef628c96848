"""New files that a verb writes: whole or not at all, and never over another one."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .source import UsageError

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def require_new(path: Path) -> None:
    """Refuse to overwrite anything."""
    if os.path.lexists(path) or not path.name:
        raise UsageError(f"{path} exists already", hint="name a new file with --out")


@contextmanager
def new_file(path: Path) -> Generator[BinaryIO]:
    """Make a file that has its name only when the block has ended well; overwrite none.

    What is in it may be private: others cannot read it, as with every file of a trace's owner.
    """
    require_new(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fd = os.open(temporary, _CREATE, 0o600)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {why}", hint="name a file you can write") from error
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            # A link, unlike rename(2), replaces nothing that came meanwhile. And it is one to what
            # we wrote, whatever somebody else who may write here has given our name to by now:
            # only with a folder, here an unused one, does os.link follow /proc's, linkat(2).
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="name a file you can write") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_new(path: Path, data: bytes) -> None:
    """Write a new file."""
    with new_file(path) as file:
        file.write(data)
