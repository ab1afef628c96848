"""Step "sandbox": paths inside granted folders that a sandbox must not see or must not change.

The agent must not write its own rules: rule files, repository hooks and the configuration of
agents and editors are read-only in every sandbox, and the profile's ``hide`` patterns are absent.

A protected folder that does not exist is made, empty, while a sandbox may write around it: only
what exists can be mounted read-only. (For `.git/hooks` in a workspace without `.git`, it is `.git`
that is held: a repository made by a tool would bring its own hooks.) A protected file that does
not exist cannot be held that way (an empty one would end up in somebody's commit), so one that
appears during a call is set aside before the call returns, and the call fails.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from safeconduct.call import Profile
from safeconduct.errors import SandboxFailed

# LIMIT: entries looked at to find what a profile hides; more refuses the call.
_ENTRIES_MAX = 200_000
# Marks the folders we made, so that whoever is last knows which to remove, xattr(7).
_MARK = "user.safeconduct.placeholder"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Shield:
    """Absolute paths that exist: ``protected`` stay unchanged, ``hidden`` stay absent.

    ``anchors`` are writable folders that hold a protected path and must not be renamed.
    """

    protected: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()


class Shields:
    """Raises the Shield of each call in one workspace. Safe to use from several threads.

    ``protected`` are names relative to the workspace; a folder's ends with a slash. ``absent``
    are absolute paths (keys, traces) that no sandbox sees, whatever its profile grants. ``close``
    removes the folders made here, unless another process still runs sandboxes in the workspace.
    """

    def __init__(
        self, workspace: str, protected: Sequence[str], absent: Sequence[str] = ()
    ) -> None:
        self._workspace = workspace
        self._protected = tuple(protected)
        self._absent = tuple(absent)
        # A shared lock on the folder itself counts the processes that use it, flock(2).
        self._lock = os.open(workspace, _FOLDER)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    @contextmanager
    def raised(self, profile: Profile, hides: Callable[[str], bool]) -> Generator[Shield]:
        """Shield one call; afterwards check that nothing protected has appeared.

        ``hides`` says of an absolute path whether the profile hides it. Raises SandboxFailed
        where a path cannot be shielded or the call made a protected file.
        """
        names = [name for name in self._protected if self._exposed(profile, name)]
        kept: list[str] = []
        for name in names:
            self._refuse_links(name)
            kept.append(self._hold_place(name))
        kept = list(dict.fromkeys(name for name in kept if os.path.lexists(self._path(name))))
        free = [name for name in names if not os.path.lexists(self._path(name))]
        anchors = dict.fromkeys(
            folder
            for name in kept
            for folder in self._folders_above(name)
            if any(_within(folder, root) for root in profile.write)
        )
        hidden = {
            path for path in self._absent if os.path.lexists(path) and _granted(profile, path)
        }
        if profile.hide:
            hidden.update(_find_hidden(profile, hides))
        shield = Shield(
            protected=tuple(self._path(name) for name in kept),
            hidden=tuple(sorted(hidden)),
            anchors=tuple(anchors),
        )
        try:
            yield shield
        finally:
            self._take_away(free)

    def close(self) -> None:
        """Remove the empty folders made here, if this process is the last one to need them."""
        try:
            with suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove_places()
        finally:
            os.close(self._lock)

    def refuses(self, path: str) -> bool:
        """Tell whether an absolute path lies where no tool may look at all."""
        return any(_within(path, folder) for folder in self._absent)

    def _exposed(self, profile: Profile, name: str) -> bool:
        path = self._path(name)
        return any(_within(path, root) or _within(root, path) for root in profile.write)

    def _path(self, name: str) -> str:
        return os.path.join(self._workspace, name.rstrip("/"))

    def _folders_above(self, name: str) -> Iterator[str]:
        path = self._workspace
        for part in name.rstrip("/").split("/")[:-1]:
            path = os.path.join(path, part)
            yield path

    def _refuse_links(self, name: str) -> None:
        for path in (*self._folders_above(name), self._path(name)):
            if os.path.islink(path):
                raise SandboxFailed(
                    f"{path} is a symbolic link, so it cannot be protected from the tool.",
                    step="shield",
                    code="sandbox.protected_link",
                )

    def _hold_place(self, name: str) -> str:
        """Return what to protect for ``name``: itself, or the topmost folder above it that was
        missing and is now held. A missing file in an existing folder cannot be held.
        """
        parts = name.rstrip("/").split("/")
        for count in range(1, len(parts) + 1):
            held = "/".join(parts[:count])
            is_folder = count < len(parts) or name.endswith("/")
            if not os.path.lexists(self._path(held)) and is_folder:
                self._make_place(self._path(held))
                return held
            # A file where a folder belongs (`.git` of a worktree) is itself what to protect.
            if _is_place(self._path(held)) or os.path.isfile(self._path(held)):
                return held
        return name.rstrip("/")

    def _make_place(self, path: str) -> None:
        try:
            os.mkdir(path, 0o755)
            if os.geteuid() == 0:
                owner = os.stat(self._workspace)
                os.chown(path, owner.st_uid, owner.st_gid)
        except FileExistsError:
            return
        except OSError as error:
            raise SandboxFailed(
                f"{path} cannot be protected: {error.strerror}.", step="shield"
            ) from error
        with suppress(OSError):
            os.setxattr(path, _MARK, b"1")

    def _remove_places(self) -> None:
        for name in self._protected:
            for path in (*self._folders_above(name), self._path(name)):
                if _is_place(path):
                    with suppress(OSError):
                        os.rmdir(path)

    def _take_away(self, names: Sequence[str]) -> None:
        made: list[str] = []
        for name in names:
            path = self._path(name)
            if os.path.lexists(path):
                os.rename(path, f"{path}.refused-{os.urandom(4).hex()}")
                made.append(path)
        if made:
            raise SandboxFailed(
                f"The call made {', '.join(made)}, which no tool may write; set aside.",
                step="shield",
                code="sandbox.protected_made",
            )


def _is_place(path: str) -> bool:
    """Tell whether we made this folder only to hold its place."""
    try:
        return os.getxattr(path, _MARK, follow_symlinks=False) == b"1"
    except OSError:
        return False


def _granted(profile: Profile, path: str) -> bool:
    return any(_within(path, root) for root in (*profile.read, *profile.write))


def _find_hidden(profile: Profile, hides: Callable[[str], bool]) -> Iterator[str]:
    waiting = sorted({*profile.read, *profile.write})
    seen = 0
    while waiting:
        folder = waiting.pop()
        if hides(folder):
            yield folder
            continue
        if not os.path.isdir(folder) or os.path.islink(folder):
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if hides(entry.path):
                        yield entry.path
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except PermissionError:
            continue  # what we cannot list, the sandbox cannot either: it has fewer rights
        if seen > _ENTRIES_MAX:
            raise SandboxFailed(
                f"More than {_ENTRIES_MAX} entries to search for hidden files.", step="shield"
            )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
