"""Step "sandbox": compare a hostile upper folder with its base, bounded, following no links.

INVARIANT: no process of the tool lives, so nothing moves in the upper folder; the base may change
at any time, and whatever differs from what the overlay saw becomes a conflict.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from safeconduct.errors import LimitExceeded, SandboxFailed

from . import content, kernel, later
from .changes import Bounds, Change, Changes, Kind, Node
from .leaf import Leaves, Sides
from .names import Protects, is_git_link
from .seen import Identity, Marks, Origin, Snapshot, is_opaque, is_whiteout, read_origin

_CHANGED = "it changed after the overlay began"
_REMOVED = "it was removed after the overlay began"
_MADE = "it was made after the overlay began"
_REPLACED = "another folder took its place after the overlay began"
_PROTECTED = "no tool may write this name"
_HOLDS = "it holds what must stay"


def diff(
    upper: int,
    workspace: int,
    snapshot: Snapshot,
    *,
    marks: Marks,
    protected: Protects,
    bounds: Bounds | None = None,
) -> Changes:
    """Return what the overlay with this upper folder changed in the workspace.

    Both are folder descriptors; ``marks`` says how the overlay was mounted. Reads every changed
    file on both sides. Raises LimitExceeded (`limit.changes`) for too many entries and
    SandboxFailed (`workspace.moved`) where something in the upper folder still moves.
    """
    walk = _Walk(workspace, snapshot, marks, protected, bounds or Bounds())
    try:
        return Changes(entries=tuple(walk.run(upper)))
    except OSError as error:
        # What could be listed a moment ago and cannot be opened now is moving.
        raise content.Moved(f"Something failed ({error.strerror})") from error


@dataclass(slots=True)
class _Frame:
    """A folder on the way down: both sides of it, and the names still to look at.

    ``opaque`` is also true of what lies in an opaque folder: the overlay marks only the outermost.
    """

    path: str
    upper: int | None
    base: int | None
    opaque: bool
    names: Iterator[str]

    def join(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    def close(self) -> None:
        for fd in (self.upper, self.base):
            if fd is not None:
                os.close(fd)


class _Walk:
    """One diff. Folders are open from the top down to where it is, so depth is bounded."""

    def __init__(
        self, workspace: int, snapshot: Snapshot, marks: Marks, protected: Protects, bounds: Bounds
    ) -> None:
        self._workspace, self._snapshot = workspace, snapshot
        self._marks: Marks = marks
        self._protected, self._bounds = protected, bounds
        self._leaves = Leaves(workspace, content.Budget(bounds.read_bytes))
        self._left, self._text_left = bounds.entries, bounds.text_bytes
        self._frames: list[_Frame] = []
        self._found: list[Change] = []
        # Where in `found` the folders of the base stand that the overlay takes away.
        self._gone: dict[str, int] = {}

    def run(self, upper: int) -> list[Change]:
        try:
            # A later call of the session may have taken our permission away again.
            content.enter(upper)
            self._push("", os.dup(upper), os.dup(self._workspace), opaque=False)
            while self._frames:
                frame = self._frames[-1]
                name = next(frame.names, None)
                if name is None:
                    self._frames.pop().close()
                else:
                    self._entry(frame, name)
        finally:
            while self._frames:
                self._frames.pop().close()
        return self._found

    def _push(self, path: str, upper: int | None, base: int | None, *, opaque: bool) -> None:
        frame = _Frame(path, upper, base, opaque, iter(()))
        self._frames.append(frame)
        names = set(self._list(upper, path)) if upper is not None else set[str]()
        if base is not None and (opaque or upper is None):
            # An opaque folder hides the base's: whatever it does not hold itself is deleted.
            names.update(self._list(base, path))
        frame.names = iter(sorted(names))

    def _list(self, folder: int, path: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                self._left -= 1
                self._text_left -= len(path) + len(entry.name)
                self._refuse_more()
                yield entry.name

    def _refuse_more(self) -> None:
        if self._left >= 0 and self._text_left >= 0:
            return
        bounds = self._bounds
        what = (
            f"{bounds.entries} entries" if self._left < 0 else f"{bounds.text_bytes} bytes of names"
        )
        raise LimitExceeded(
            f"The overlay changed more than {what}.",
            limit="changes",
            hint="Roll it back, or let the tool write less.",
        )

    def _entry(self, frame: _Frame, name: str) -> None:
        path = frame.join(name)
        base = _status(frame.base, name)
        upper = _status(frame.upper, name)
        if frame.upper is not None and upper is not None and self._marks == "user":
            _let_read(frame.upper, name, upper)
        if upper is None or is_whiteout(_link(frame, name), upper, self._marks):
            if base is not None:
                self._deleted(frame, name, base)
            return
        node = _node(upper.st_mode)
        if refused := self._refusal(path, node):
            kind = Kind.CREATED if base is None else Kind.MODIFIED
            self._found.append(Change(path=path, kind=kind, node=node, refused=refused))
        elif node is Node.FOLDER:
            self._folder(frame, name, upper, base)
        else:
            self._leaf(frame, name, node, upper, base)

    def _refusal(self, path: str, node: Node) -> str | None:
        if self._protected(path) or (node is not Node.FOLDER and is_git_link(_last(path))):
            return _PROTECTED
        if node is Node.SPECIAL:
            return "devices, sockets and FIFOs are not copied"
        if path.count("/") >= self._bounds.depth:
            return f"it lies deeper than {self._bounds.depth} folders"
        if len(os.fsencode(path)) > self._bounds.path_bytes:
            return f"its path is longer than {self._bounds.path_bytes} bytes"
        return None

    def _deleted(self, frame: _Frame, name: str, base: os.stat_result) -> None:
        """Note a deletion. What lies in a deleted folder follows, entry by entry."""
        path, node = frame.join(name), _node(base.st_mode)
        change = Change(
            path=path,
            kind=Kind.DELETED,
            node=node,
            size=base.st_size,
            base=Identity.of(base),
            conflict=None if self._snapshot.still(base) else _CHANGED,
            refused=self._refusal(path, node),
            later=None if node is Node.FOLDER else later.reason(path),
        )
        if node is Node.FILE and not change.refused:
            change = replace(change, before=self._leaves.base_digest(frame.base, name, base))
        self._add(change)
        if change.refused:
            self._keep_above(path)
        elif node is Node.FOLDER:
            self._push(path, None, _open_base(frame.base, name), opaque=False)

    def _add(self, change: Change) -> None:
        taken = change.kind in (Kind.DELETED, Kind.MODIFIED)
        if taken and change.base is not None and stat.S_ISDIR(change.base.mode):
            self._gone[change.path] = len(self._found)
        self._found.append(change)

    def _keep_above(self, path: str) -> None:
        """Refuse to take away every folder that holds what must stay."""
        parts = path.split("/")
        for count in range(1, len(parts)):
            at = self._gone.get("/".join(parts[:count]))
            if at is not None and self._found[at].refused is None:
                self._found[at] = replace(self._found[at], refused=_HOLDS)

    def _leaf(
        self, frame: _Frame, name: str, node: Node, upper: os.stat_result,
        base: os.stat_result | None,
    ) -> None:  # fmt: skip
        """Compare a file or a link; a folder that stood there before is deleted below it."""
        assert frame.upper is not None  # noqa: S101 - an upper entry lies in an upper folder
        path = frame.join(name)
        change = self._leaves.compare(
            Sides(path=path, name=name, upper=frame.upper, base=frame.base), node, upper, base
        )
        if change is None:
            return
        self._text_left -= len(change.target or "")
        self._refuse_more()
        origin = read_origin(_link(frame, name), self._marks)
        self._add(replace(change, conflict=self._conflict(frame, base, origin)))
        if base is not None and stat.S_ISDIR(base.st_mode):
            self._push(path, None, _open_base(frame.base, name), opaque=False)

    def _conflict(self, frame: _Frame, base: os.stat_result | None, origin: Origin) -> str | None:
        if base is not None:
            return None if self._snapshot.still(base) else _CHANGED
        if frame.base is None or not origin.copied:
            return None
        # Copied up from this name, which was then removed outside; or from another name, and
        # renamed inside. Nothing was removed from a folder that has not changed.
        return None if self._snapshot.still(os.fstat(frame.base)) else _REMOVED

    def _folder(
        self, frame: _Frame, name: str, upper: os.stat_result, base: os.stat_result | None
    ) -> None:
        assert frame.upper is not None  # noqa: S101 - an upper entry lies in an upper folder
        path = frame.join(name)
        opaque = frame.opaque or is_opaque(_link(frame, name), self._marks)
        origin = read_origin(_link(frame, name), self._marks)
        merged = base is not None and stat.S_ISDIR(base.st_mode)
        before = stat.S_IMODE(base.st_mode) if base is not None and merged else 0
        mode = content.folder_mode(upper.st_mode, before)
        kind = Kind.CREATED if base is None else Kind.MODE if merged else Kind.MODIFIED
        conflict = self._folder_conflict(frame, name, base, opaque, origin)
        same = before in (stat.S_IMODE(upper.st_mode), mode)
        if not merged or not same or conflict:
            self._add(
                Change(
                    path=path, kind=kind, node=Node.FOLDER, mode=mode,
                    modified_ns=upper.st_mtime_ns, conflict=conflict,
                    base=Identity.of(base) if base is not None else None,
                )
            )  # fmt: skip
        inner = _open_base(frame.base, name) if merged else None
        try:
            below = content.open_upper(frame.upper, name, kernel.FOLDER)
        except OSError:
            if inner is not None:
                os.close(inner)
            raise
        self._push(path, below, inner, opaque=opaque)

    def _folder_conflict(
        self, frame: _Frame, name: str, base: os.stat_result | None, opaque: bool, origin: Origin
    ) -> str | None:
        if base is None or frame.base is None:
            return _REMOVED if origin.copied else None
        if not stat.S_ISDIR(base.st_mode):
            return None if self._snapshot.still(base) else _CHANGED
        if opaque:
            return None  # every entry of the base's folder is compared by itself
        if not origin.copied:
            return _MADE
        there = self._snapshot.still_there(frame.base, name, base, origin)
        return None if there else _REPLACED


def _link(frame: _Frame, name: str) -> str:
    """Name an upper entry for the calls that take no descriptor and follow no last link."""
    return f"/proc/self/fd/{frame.upper}/{name}"


def _status(folder: int | None, name: str) -> os.stat_result | None:
    if folder is None:
        return None
    try:
        return os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return None


def _let_read(folder: int, name: str, status: os.stat_result) -> None:
    """Give ourselves the right to read an upper entry: who may not is not told its `user.`
    attributes either, xattr(7), and so neither that it is opaque nor that it was copied.
    """
    flags = {stat.S_IFREG: kernel.FILE, stat.S_IFDIR: kernel.FOLDER}.get(
        stat.S_IFMT(status.st_mode)
    )
    if flags is not None and not status.st_mode & stat.S_IRUSR:
        os.close(content.open_upper(folder, name, flags))


def _open_base(folder: int | None, name: str) -> int | None:
    """Open a folder of the base; None where it is gone or became a link since it was looked at."""
    if folder is None:
        return None
    try:
        return kernel.open_beneath(folder, name, kernel.FOLDER)
    except PermissionError as error:
        raise SandboxFailed(
            f"{name!a} in the workspace cannot be listed.",
            step="overlay",
            errno=error.errno or 0,
        ) from error
    except OSError:
        return None


def _node(mode: int) -> Node:
    kinds = {stat.S_IFREG: Node.FILE, stat.S_IFDIR: Node.FOLDER, stat.S_IFLNK: Node.SYMLINK}
    return kinds.get(stat.S_IFMT(mode), Node.SPECIAL)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
