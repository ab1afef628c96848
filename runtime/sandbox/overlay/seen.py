"""Step "sandbox": what an overlay saw of its base, and whether the base is still that.

The upper folder alone does not say what it was made from. Walking the workspace beforehand would;
instead one moment is remembered. The change time of an inode cannot be set by anybody, and renames,
writes, chmod and new links all move it to now (inode(7)). So an entry of the base whose change time
lies before the moment the overlay was mounted is still what the overlay saw, and any other is not.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, TypeAlias

from safeconduct.errors import SandboxUnavailable

from . import kernel

# Which extended attributes the overlay itself writes: those of a mount made by root, or with the
# mount option ``userxattr``. INVARIANT: only these are read; a tool can write the other kind.
Marks: TypeAlias = Literal["trusted", "user"]

# LIMIT: how long to wait for the file system's clock to go on; kernels tick every 1 to 10 ms.
_TICK_S: Final = 0.02
# struct ovl_fb in the kernel's fs/overlayfs/overlayfs.h: version, magic, length, flags, type, uuid.
_ORIGIN_MAGIC: Final = 0xFB
_ORIGIN_TYPE, _ORIGIN_HANDLE = 4, 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What tells one state of a file from every other: it must be the same at the commit."""

    device: int
    inode: int
    changed_ns: int
    modified_ns: int
    size: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Read it off a stat result."""
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            changed_ns=status.st_ctime_ns,
            modified_ns=status.st_mtime_ns,
            # A folder's size says how its entries are stored, not what they are.
            size=0 if stat.S_ISDIR(status.st_mode) else status.st_size,
            mode=status.st_mode,
        )

    def moved(self, status: os.stat_result) -> bool:
        """Tell whether this is the same file in the same state, after we renamed it.

        Renaming moves the change time, so that one is not compared.
        """
        now = Identity.of(status)
        return (self.device, self.inode, self.modified_ns, self.size, self.mode) == (
            now.device, now.inode, now.modified_ns, now.size, now.mode,
        )  # fmt: skip


class Snapshot:
    """The moment an overlay began. Take it right before the overlay is mounted.

    INVARIANT: one Snapshot for as long as the same upper folder is in use, also over several calls:
    a base file that changed between two calls may have been read in the first and written in the
    second. After a commit the overlay is stale: mount a new one and take a new Snapshot.
    """

    def __init__(self, stamp_ns: int, device: int) -> None:
        """Take over a stamp; use ``take``."""
        self._stamp_ns, self._device = stamp_ns, device
        self._clock = kernel.ClockWatch()
        self._set_back = False

    @classmethod
    def take(cls, workspace: int) -> Snapshot:
        """Remember now, by the clock of the workspace's file system. Holds one descriptor.

        Changes nothing there. Raises SandboxUnavailable where the file system cannot do it.
        """
        try:
            probe = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=workspace)
        except OSError as error:
            raise SandboxUnavailable(
                f"The workspace's file system keeps no unnamed files ({error.strerror}).",
                missing="overlay:tmpfile",
                hint="Use workspace: direct, or keep the workspace on a local file system.",
            ) from error
        try:
            return cls(_next_stamp_ns(probe), os.fstat(workspace).st_dev)
        finally:
            os.close(probe)

    def still(self, status: os.stat_result) -> bool:
        """Tell whether an entry of the base is still what the overlay saw."""
        # Once seen, a clock that went back stays a fact.
        self._set_back = self._set_back or self._clock.set_back()
        return (
            not self._set_back
            and status.st_ctime_ns < self._stamp_ns
            and status.st_dev == self._device
        )

    def still_there(self, base: int, name: str, status: os.stat_result, origin: Origin) -> bool:
        """Tell whether a folder of the base is still the folder the overlay saw, whatever is new
        in it: making an entry moves a folder's change time too.
        """
        handle = origin.handle and kernel.file_handle(base, name)
        if origin.handle and handle:
            return origin.handle == handle
        # Without a handle (rootless): an entry made or removed moves both times alike; a rename of
        # the folder itself moves only the change time.
        return self.still(status) or status.st_ctime_ns == status.st_mtime_ns

    def close(self) -> None:
        """Close the descriptor."""
        self._clock.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the overlay noted when it copied a base entry up: that it did, and from which inode.

    ``handle`` is empty where the kernel could not tell (rootless).
    """

    copied: bool = False
    handle: bytes = b""


def read_origin(path: str, marks: Marks) -> Origin:
    """Read the note from an upper entry, given as a path that leads to it through no link."""
    try:
        value = os.getxattr(path, f"{marks}.overlay.origin", follow_symlinks=False)
    except OSError:
        return Origin()
    if len(value) <= _ORIGIN_HANDLE or value[1] != _ORIGIN_MAGIC:
        return Origin(copied=True)
    return Origin(
        copied=True, handle=value[_ORIGIN_TYPE : _ORIGIN_TYPE + 1] + value[_ORIGIN_HANDLE:]
    )


def is_opaque(path: str, marks: Marks) -> bool:
    """Tell whether an upper folder hides what the base has there."""
    try:
        return os.getxattr(path, f"{marks}.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False


def is_whiteout(path: str, status: os.stat_result, marks: Marks) -> bool:
    """Tell whether an upper entry means that the base entry is deleted.

    Two forms: a character device 0/0, and since Linux 6.7 an empty file with a mark
    (https://docs.kernel.org/filesystems/overlayfs.html, "whiteouts and opaque directories").
    """
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev == 0
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        return False
    try:
        os.getxattr(path, f"{marks}.overlay.whiteout", follow_symlinks=False)
    except OSError:
        return False
    return True


def _next_stamp_ns(probe: int) -> int:
    """Return a change time later than every one given out before, on the probe's file system.

    Since Linux 6.13 a time that somebody looked at is followed by a finer one ("multigrain"), so
    the second try succeeds at once; before, the clock ticks within 10 ms. Where it does not go on
    (whole seconds) the first time counts: then what changed shortly before is a conflict too.
    """
    first = os.fstat(probe).st_ctime_ns
    until = time.monotonic() + _TICK_S
    while time.monotonic() < until:
        os.fchmod(probe, 0o600)
        stamp = os.fstat(probe).st_ctime_ns
        if stamp > first:
            return stamp
        time.sleep(0.0002)
    return first
