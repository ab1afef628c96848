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
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safeconduct.call import Profile, WorkspaceMode
from safeconduct.errors import SandboxFailed
from safeconduct.mounts import Mounts, is_within

from . import folders, places
from .hidden import find_hidden
from .witness import Witness

# LIMIT: profiles whose Shields are remembered.
_PROFILES_MAX = 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Shield:
    """Absolute paths that exist: ``protected`` stay unchanged, ``hidden`` stay absent.

    ``anchors`` are writable folders that hold a protected path and must not be renamed.
    """

    protected: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raised:
    """A Shield, the names that must not appear in ``folder``, the workspace that it was made for,
    and what would have to change for another one.

    INVARIANT: the witness looked before the Shield was made, so whatever changed since then shows.
    """

    folder: int
    shield: Shield
    free: Sequence[str]
    witness: Witness


class Shields:
    """Raises the Shield of each call in one workspace. Safe to use from several threads.

    ``protected`` are names relative to the workspace; a folder's ends with a slash. ``frozen`` are
    absolute paths of files (the policies in force) that no tool may change, wherever they lie.
    ``absent`` are absolute paths (keys, traces) that no tool sees, whatever its profile grants.
    ``lock`` is a file, out of every tool's reach, that counts the processes which use the
    workspace: only the last one removes the folders made here, in ``close``.
    """

    def __init__(
        self,
        workspace: str,
        protected: Sequence[str],
        absent: Sequence[str] = (),
        *,
        frozen: Sequence[str] = (),
        lock: Path | None = None,
    ) -> None:
        self._workspace = workspace
        self._protected = tuple(protected)
        self._absent = tuple(absent)
        self._aliases = _aliases(absent)
        self._frozen = (*frozen, *_aliases(frozen))
        self._workspace_fd = os.open(workspace, _FOLDER)
        # Those that others have taken the place of: calls may still run in them.
        self._former: list[int] = []
        self._moving = threading.Lock()
        self._lock = _share(lock) if lock is not None else None
        self._known: dict[Profile, _Raised] = {}
        # Folders made here: not every file system can mark them.
        self._made: set[str] = set()

    @contextmanager
    def raised(self, profile: Profile, hides: Callable[[str], bool]) -> Generator[Shield]:
        """Shield one call; afterwards check that nothing protected has appeared.

        ``hides`` says of an absolute path whether the profile hides it. Raises SandboxFailed
        where a path cannot be shielded or a protected file appeared during the call.
        """
        raised = self._known.get(profile)
        if raised is None or not raised.witness.unchanged():
            raised = self._raise(profile, hides)
            if len(self._known) >= _PROFILES_MAX:
                self._known.clear()
            self._known[profile] = raised
        try:
            yield raised.shield
        finally:
            if raised.free and not raised.witness.unchanged():
                _set_aside(raised.folder, raised.free)

    def close(self) -> None:
        """Remove the empty folders made here, if this process is the last one to need them."""
        try:
            if self._lock is None or _is_last(self._lock):
                self._release(self._workspace_fd, self._made)
                for former in self._former:
                    self._release(former, set())
        finally:
            for folder in (self._workspace_fd, *self._former):
                os.close(folder)
            if self._lock is not None:
                os.close(self._lock)

    def _release(self, workspace: int, made: set[str]) -> None:
        for name in self._protected:
            parts = name.rstrip("/").split("/")
            for count in range(1, len(parts) + 1):
                folder = "/".join(parts[:count])
                places.release(workspace, folder, made=folder in made)

    def _folder(self) -> int:
        """Return the folder that the workspace is now: somebody may have put another in its place,
        and what is held and set aside in the one before would protect nothing.

        Raises SandboxFailed where there is none, or a link.
        """
        with self._moving:
            try:
                if not os.path.samestat(os.stat(self._workspace), os.fstat(self._workspace_fd)):
                    found = os.open(self._workspace, _FOLDER | os.O_NOFOLLOW)
                    self._former.append(self._workspace_fd)
                    self._workspace_fd, self._made = found, set()
            except OSError as error:
                raise SandboxFailed(
                    f"The workspace {self._workspace} cannot be opened: {error.strerror}.",
                    step="shield",
                    errno=error.errno or 0,
                    code="workspace.missing",
                    hint="Put it back where it was, or start again with another.",
                ) from error
            return self._workspace_fd

    def refuses(self, path: str) -> bool:
        """Tell whether an absolute path lies where no tool may look at all."""
        return any(is_within(path, folder) for folder in (*self._absent, *self._aliases))

    def freezes(self, path: str) -> bool:
        """Tell whether an absolute real path is a file that no tool may change."""
        return any(path == os.path.realpath(frozen) for frozen in self._frozen)

    def _raise(self, profile: Profile, hides: Callable[[str], bool]) -> _Raised:
        self._refuse_absent_grants(profile)
        names = [name for name in self._protected if self._exposed(profile, name)]
        kept = [path for path in self._frozen if _writable(profile, path)]
        absent = [path for path in self._absent if _granted(profile, path)]
        witness = Witness()
        guarded = (*kept, *absent, *(self._path(name) for name in names))
        for folder, root in sorted(
            _above((self._workspace, *profile.read, *profile.write), guarded).items()
        ):
            folders.open_way(root, folder)
            witness.add(folder)
        for path in kept:
            for root in _writable(profile, path):
                self._refuse_links(path, root)
        # Through an overlay no name reaches the workspace: what is missing needs no place held, and
        # what appears there is not this call's (overlay/names.py says what is never copied out).
        direct = profile.workspace is WorkspaceMode.DIRECT
        workspace = self._folder()
        for name in names:
            self._refuse_links(self._path(name), self._workspace)
            kept.append(self._path(self._hold_place(workspace, name) if direct else name))
        kept = [path for path in dict.fromkeys(kept) if places.look(path)]
        free = [name for name in names if direct and not places.look(self._path(name))]
        hidden = [path for path in absent if places.look(path)]
        if profile.hide:
            hidden += find_hidden(profile, hides, witness)
        hidden = _outermost(hidden)
        kept = _outermost(kept)
        held = [*kept, *hidden, *(self._path(name) for name in free)]
        # What lies in a protected folder cannot be renamed anyway.
        anchors = [
            folder
            for folder in _anchors(profile, held)
            if not any(is_within(folder, path) for path in kept)
        ]
        shield = Shield(protected=tuple(kept), hidden=tuple(hidden), anchors=tuple(anchors))
        return _Raised(folder=workspace, shield=shield, free=free, witness=witness)

    def _refuse_absent_grants(self, profile: Profile) -> None:
        # INVARIANT: what lies at an absent path is reached by no name but those that are hidden.
        for root in (*profile.read, *profile.write):
            if self.refuses(root) or any(is_within(name, root) for name in self._aliases):
                raise SandboxFailed(
                    f"The profile grants {root}, where keys or traces lie.",
                    step="shield",
                    code="sandbox.absent_granted",
                )

    def _exposed(self, profile: Profile, name: str) -> bool:
        path = self._path(name)
        return any(is_within(path, root) or is_within(root, path) for root in profile.write)

    def _path(self, name: str) -> str:
        return os.path.join(self._workspace, name.rstrip("/"))

    def _refuse_links(self, path: str, root: str) -> None:
        for part in (*folders_between(root, path), path):
            found = places.look(part)
            if found is not None and stat.S_ISLNK(found.st_mode):
                raise SandboxFailed(
                    f"{part} is a symbolic link, so it cannot be protected from the tool.",
                    step="shield",
                    code="sandbox.protected_link",
                )

    def _hold_place(self, workspace: int, name: str) -> str:
        """Return what to protect for ``name``: itself, or the topmost folder above it that was
        missing and is now held. A missing file in an existing folder cannot be held.
        """
        parts = name.rstrip("/").split("/")
        for count in range(1, len(parts) + 1):
            held = "/".join(parts[:count])
            is_folder = count < len(parts) or name.endswith("/")
            found = places.look(self._path(held))
            if found is None and is_folder:
                if places.hold(workspace, held):
                    self._made.add(held)
                return held
            # A file where a folder belongs (`.git` of a worktree) is itself what to protect.
            ours = held in self._made or places.is_held(workspace, held)
            if ours or (found is not None and not stat.S_ISDIR(found.st_mode)):
                return held
        return name.rstrip("/")


def _set_aside(workspace: int, names: Sequence[str]) -> None:
    found, failed = list[str](), list[SandboxFailed]()
    for name in names:
        try:
            if places.set_aside(workspace, name):
                found.append(name)
        except SandboxFailed as error:
            failed.append(error)  # one that resists saves none of the others
    if failed:
        raise failed[0]
    if found:
        raise SandboxFailed(
            f"{', '.join(found)} appeared during the call; no tool may write that. Set aside.",
            step="shield",
            code="sandbox.protected_made",
        )


def _writable(profile: Profile, path: str) -> list[str]:
    """Return the folders that the profile may write and that hold ``path``."""
    return [root for root in profile.write if is_within(path, root)]


def _above(roots: Iterable[str], paths: Sequence[str]) -> dict[str, str]:
    """Name every folder above ``paths``, each with the outermost of the roots it is reached by."""
    return {
        folder: root
        for root in sorted(roots, key=len, reverse=True)
        for path in paths
        if is_within(path, root)
        for folder in (root, *folders_between(root, path))
    }


def _anchors(profile: Profile, held: Sequence[str]) -> tuple[str, ...]:
    """Return the writable folders above what is held: renamed, they would take it along."""
    anchors = {
        folder
        for path in held
        for root in profile.write
        if is_within(path, root)
        for folder in folders_between(root, path)
        if (found := places.look(folder)) is not None and stat.S_ISDIR(found.st_mode)
    }
    return tuple(sorted(anchors))


def folders_between(root: str, path: str) -> Iterator[str]:
    """Yield the folders below ``root`` and above ``path``, outermost first."""
    current = root
    for part in path.removeprefix(root).strip("/").split("/")[:-1]:
        current = os.path.join(current, part)
        yield current


def _outermost(paths: Iterable[str]) -> list[str]:
    """Leave out what lies below another of the paths."""
    found: list[str] = []
    # By components, a folder stands right before all that lies below it.
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not (found and is_within(path, found[-1])):
            found.append(path)
    return found


def _share(lock: Path) -> int:
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Only `close` below ever holds it alone, and for a moment, flock(2).
        fcntl.flock(fd, fcntl.LOCK_SH)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_last(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _granted(profile: Profile, path: str) -> bool:
    return any(is_within(path, root) for root in (*profile.read, *profile.write))


def _aliases(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the names outside of these that lead to them, or into them: bind mounts."""
    if not paths:
        return ()
    mounts = Mounts()
    names = {name for path in paths for name in mounts.names_below("/", path)}
    return tuple(sorted(name for name in names if not any(is_within(name, path) for path in paths)))
