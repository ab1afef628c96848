"""What the kernel has mounted where: whether one folder can be reached through another.

Two names can lead to one folder although neither lies below the other: a bind mount shows a part
of a file system at a second place. So places are compared as (file system, path inside it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .errors import TraceInvalid

_TABLE: Final = "/proc/self/mountinfo"
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    """A line of the table: what lies at ``root`` of a file system is seen at ``point``."""

    number: int
    device: str
    root: str
    point: str


class Mounts:
    """The mounts of this process, as they were when this was made."""

    def __init__(self) -> None:
        """Read the table. Raise TraceInvalid ``mounts.unknown`` where procfs does not show it."""
        try:
            with open(_TABLE, "rb") as file:
                self._mounts = [_parse(line) for line in file]
        except OSError as error:
            raise _unknown(f"{_TABLE}: {error.strerror}") from error

    def names_below(self, folder: str, path: str) -> list[str]:
        """Return the names below ``folder`` that lead to what lies at ``path``, or to a part of it.

        ``folder`` is among them where it is itself a part of what lies there. Neither has to
        exist. Raise TraceInvalid ``mounts.unknown`` where the kernel does not tell where one lies.
        """
        target = self._places(path)
        return sorted(
            {
                os.path.normpath(os.path.join(name, _below(there, place)))
                for name, device, place in self._places(folder)
                for _, other, there in target
                if device == other and (is_within(there, place) or is_within(place, there))
            }
        )

    def _places(self, path: str) -> Sequence[tuple[str, str, str]]:
        """Return (name, file system, path in it) of a path and of every mount below it."""
        real = os.path.realpath(path)
        number = _mount_number(real)
        mount = next((one for one in self._mounts if one.number == number), None)
        if mount is None or not is_within(real, mount.point):
            raise _unknown(f"the mount that {path} lies in is not shown in {_TABLE}")
        inner = os.path.join(mount.root, _below(real, mount.point))
        below = (one for one in self._mounts if one is not mount and is_within(one.point, real))
        return [
            (real, mount.device, os.path.normpath(inner)),
            *((one.point, one.device, one.root) for one in below),
        ]


def is_within(path: str, folder: str) -> bool:
    """Tell by their names whether a path is a folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _below(path: str, folder: str) -> str:
    """Return what has to be joined to ``folder`` for ``path``: nothing where it lies above."""
    return path[len(folder) :].lstrip("/") if is_within(path, folder) else ""


def _mount_number(path: str) -> int:
    """Return the number of the mount that a path, or what exists of it, is seen through."""
    for one in _upwards(path):
        try:
            fd = os.open(one, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            # proc(5): of two mounts at one place only the kernel says which is on top.
            with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
                told = dict(line.split(b":", 1) for line in file if b":" in line)
        finally:
            os.close(fd)
        return int(told[b"mnt_id"])
    raise _unknown(f"no part of {path} can be opened")


def _unknown(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"what tools could reach cannot be told: {why}",
        code="mounts.unknown",
        hint="mount /proc; where chroot(2) was used, make its folder a mount point first",
    )


def _upwards(path: str) -> Iterator[str]:
    while path != "/":
        yield path
        path = os.path.dirname(path)
    yield path


def _parse(line: bytes) -> _Mount:
    """Take a line apart, proc(5): number, parent, device, root, mount point, and more."""
    number, _, device, root, point = line.split(b" ", 5)[:5]
    return _Mount(
        number=int(number), device=device.decode("ascii"), root=_plain(root), point=_plain(point)
    )


def _plain(field: bytes) -> str:
    """Undo the octal escapes of spaces, tabs, newlines and backslashes."""
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), field))
