"""Step "sandbox": copy what is new out of an upper folder, under names of our own.

Nothing of the tool's metadata comes along but the masked mode and the time of change: no owner, no
extended attributes, no ACL, no set-ID bits, no hard links. A file that replaces one keeps that
one's ACL and ``user.*`` attributes, which are the operator's.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from . import content, kernel
from .changes import Change, Kind, Node
from .journal import Act, Step
from .seen import Identity

_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ACL: Final = "system.posix_acl_access"
# LIMIT: up to so many files are written to disk one by one, more with the whole file system.
_FSYNC_MAX: Final = 32


@dataclass(slots=True)
class Stage:
    """Copies into one workspace. Started by root, what is made belongs to the workspace's owner."""

    upper: int
    workspace: int
    _owner: os.stat_result = field(init=False)
    _files: int = 0

    def __post_init__(self) -> None:
        self._owner = os.fstat(self.workspace)

    def put(self, step: Step, part: Sequence[Change]) -> Identity | None:
        """Make what ``step`` will put in place, beside it. Returns its identity; None for nothing.

        Raises OSError, and Moved where the upper folder is not what the diff read.
        """
        if step.act in (Act.DELETE, Act.CHMOD):
            return None
        with kernel.parent_of(self.workspace, step.path) as (folder, name):
            self._make(part[0], folder, step.aside, base=(folder, name))
            if part[0].node is Node.FOLDER:
                self._fill(folder, step, part)
            self._sync(folder)
            return Identity.of(os.lstat(step.aside, dir_fd=folder))

    def sync(self) -> None:
        """Write on disk what the single files were too many for."""
        if self._files > _FSYNC_MAX:
            kernel.sync_file_system(self.workspace)

    def _fill(self, folder: int, step: Step, part: Sequence[Change]) -> None:
        """Fill a new folder, parents first; then set modes and times, the innermost first."""
        top = kernel.open_beneath(folder, step.aside, kernel.FOLDER)
        try:
            skipped: str | None = None
            made = [part[0]]
            for change in part[1:]:
                if skipped is not None and change.path.startswith(skipped):
                    continue
                # Below a link or file nothing is made; what was deleted goes with the old one.
                if change.refused or change.kind is Kind.DELETED:
                    skipped = change.path + "/"
                    continue
                with kernel.parent_of(top, _inside(step, change)) as (above, name):
                    self._make(change, above, name, base=None)
                made.append(change)
            for change in reversed(made):
                if change.node is Node.FOLDER:
                    self._settle(top, _inside(step, change), change)
        finally:
            os.close(top)

    def _settle(self, top: int, path: str, change: Change) -> None:
        fd = kernel.open_beneath(top, path, kernel.FOLDER)
        try:
            os.fchmod(fd, change.mode)
            os.utime(fd, ns=(change.modified_ns, change.modified_ns))
            self._sync(fd)
        finally:
            os.close(fd)

    def _make(
        self, change: Change, folder: int, name: str, *, base: tuple[int, str] | None
    ) -> None:
        if change.node is Node.FOLDER:
            os.mkdir(name, 0o700, dir_fd=folder)
            made = os.open(name, kernel.FOLDER, dir_fd=folder)
            try:
                self._give(made)
            finally:
                os.close(made)
        elif change.node is Node.SYMLINK:
            os.symlink(change.target or "", name, dir_fd=folder)
            if os.geteuid() == 0:
                uid, gid = self._owner.st_uid, self._owner.st_gid
                os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)
            moment = (change.modified_ns, change.modified_ns)
            os.utime(name, ns=moment, dir_fd=folder, follow_symlinks=False)
        else:
            self._copy(change, folder, name, base)

    def _give(self, fd: int) -> None:
        if os.geteuid() == 0:
            os.fchown(fd, self._owner.st_uid, self._owner.st_gid)

    def _copy(self, change: Change, folder: int, name: str, base: tuple[int, str] | None) -> None:
        with content.regular(kernel.open_beneath(self.upper, change.path, kernel.FILE)) as source:
            fd = os.open(name, _NEW, 0o600, dir_fd=folder)
            try:
                if copy_bytes(source, fd, change.size) != change.after:
                    raise content.Moved(f"{change.path!a} changed")
                if base is not None and change.base is not None and stat.S_ISREG(change.base.mode):
                    _keep_attributes(*base, fd)
                self._give(fd)
                # After chown(2), which takes bits away, and after the ACL, which sets some.
                os.fchmod(fd, change.mode)
                os.utime(fd, ns=(change.modified_ns, change.modified_ns))
                self._sync(fd)
            finally:
                os.close(fd)

    def _sync(self, fd: int) -> None:
        self._files += 1
        if self._files <= _FSYNC_MAX:
            os.fsync(fd)


def _inside(step: Step, change: Change) -> str:
    return change.path[len(step.path) + 1 :]


def copy_bytes(source: int, target: int, size: int) -> str:
    """Copy at most ``size`` bytes and return their digest; what is zero stays a hole."""
    seen, found = hashlib.sha256(), 0
    while found < size and (part := os.read(source, min(_CHUNK, size - found))):
        found += len(part)
        seen.update(part)
        if part == _ZEROS[: len(part)]:
            os.lseek(target, len(part), os.SEEK_CUR)
            continue
        view = memoryview(part)
        while view:
            view = view[os.write(target, view) :]
    os.ftruncate(target, found)
    return seen.hexdigest() if not os.read(source, 1) else ""


def _keep_attributes(folder: int, name: str, target: int) -> None:
    """Give a new file the attributes of the one it replaces."""
    try:
        fd = kernel.open_beneath(folder, name, kernel.FILE)
    except PermissionError:
        return  # its owner cannot read it; attributes are read through a descriptor only
    try:
        for attribute in os.listxattr(fd):
            if attribute == _ACL or attribute.startswith("user."):
                os.setxattr(target, attribute, os.getxattr(fd, attribute))
    finally:
        os.close(fd)
