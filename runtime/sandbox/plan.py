"""Step "sandbox": what a template is asked to make, and when two calls can have the same one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from safeconduct.call import Profile, Tier, WorkspaceMode

from . import machine
from .layout import INSIDE_UID, inside
from .shield import Shield, folders_between

# Each template made by root takes a block of host ids, one for each sandbox that lives,
# template.rs LIVING_MAX.
_ID_BLOCK = 1024
# LIMIT: mounts that are handed over as descriptors, one each, SCM_MAX_FD in unix(7).
_LATE_BINDS_MAX = 240
# Folders that every sandbox shows; /tmp is its own.
_ALWAYS_SHOWN = ("/usr", "/tmp")  # noqa: S108


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What native/launcher/src/request.rs calls a Plan; the names are the same."""

    layers: Sequence[str]
    identity: Mapping[str, object]
    network: str = "shared"
    mounts: Sequence[Mapping[str, object]] = ()
    landlock: Sequence[Mapping[str, object]] = ()
    rlimits: Sequence[Mapping[str, object]] = ()
    cgroups: Sequence[Mapping[str, object]] = ()
    name: str = ""
    scratch: str | None = None
    late: bool = False
    explain: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything of a call that its template depends on; the same object for calls alike.

    ``ahead`` is how many sandboxes shall wait for the next calls like it, None as many as usual.
    """

    profile: Profile
    workspace: str
    shield: Shield
    cwd: str
    explain: bool = False
    ahead: int | None = None
    tier: Tier = Tier.FULL

    @property
    def key(self) -> Hashable:
        """Equal for calls that can have sandboxes of the same template.

        A granted folder that was replaced by another, or by a link, needs a new one.
        """
        granted = tuple([_object(path) for path in self._granted])
        return self._fixed, granted, self._carved() if self.tier is Tier.LANDLOCK else None

    @cached_property
    def _granted(self) -> Sequence[str]:
        return tuple(dict.fromkeys((*self.profile.read, *self.profile.write)))

    @cached_property
    def _fixed(self) -> Hashable:
        """What of the key cannot change."""
        # A folder that is not shown has to be made for a program to start in.
        folder = None if self._shows(self.cwd) else self.cwd
        return _Hashed(
            (self.profile, self.workspace, self.shield, folder, self.explain, self.ahead)
        )

    def _carved(self) -> Hashable:
        """Name what Landlock rules around the shield were made for: the entries of each folder
        that holds something shielded are granted one by one, and rules stick to inodes.
        """
        shielded = {*self.shield.protected, *self.shield.hidden}
        folders = {
            folder
            for root in (*self.profile.read, *self.profile.write)
            for path in shielded
            if inside(path, root) and path != root
            for folder in (root, *folders_between(root, path))
        }
        changed = [(path, _object(path), _changed_ns(path)) for path in sorted(folders)]
        return tuple(changed), tuple(_object(path) for path in sorted(shielded))

    @property
    def base_key(self) -> Hashable:
        """Equal for calls whose sandboxes differ only in what can be attached late."""
        return "late", self.profile.limits, self.profile.syscalls

    @property
    def ready(self) -> int | None:
        """How many sandboxes shall wait in the pool of this setting, None as many as usual.

        INVARIANT: an overlay is mounted after its snapshot was taken, so not before its call.
        """
        return 0 if self.profile.workspace.overlaid else self.ahead

    def can_be_late(self, tier: Tier) -> bool:
        """Tell whether the profile's folders can be attached when the call comes."""
        direct = self.profile.workspace is WorkspaceMode.DIRECT
        binds = len(self.profile.read) + len(self.profile.write)
        binds += len(self.shield.protected) + len(self.shield.anchors)
        usual = not self.explain and self.ahead is None
        return tier is Tier.FULL and direct and usual and binds <= _LATE_BINDS_MAX

    def _shows(self, folder: str) -> bool:
        roots = (*self.profile.read, *self.profile.write, *_ALWAYS_SHOWN)
        return any(folder == root or folder.startswith(f"{root}/") for root in roots)


class _Hashed:
    """Something large that is looked up often: its hash is computed once."""

    __slots__ = ("_hash", "_what")

    def __init__(self, what: Hashable) -> None:
        self._what, self._hash = what, hash(what)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._what == other._what


def identity(workspace: str | None, tier: Tier) -> tuple[dict[str, object], bool]:
    """Choose the host ids; True when the workspace must be id-mapped to them. Raises OSError.

    Without ``workspace`` nothing is mapped yet.
    """
    if not machine.is_root():
        own: dict[str, object] = {"uid": os.geteuid(), "gid": os.getegid(), "owner": None}
        return own | {"inside": INSIDE_UID}, False
    block = secrets.randbelow(machine.OWN_ID_COUNT // _ID_BLOCK)
    uid = machine.OWN_ID_FIRST + block * _ID_BLOCK
    mapped = tier is Tier.FULL and workspace is not None
    owner = owner_of(workspace) if mapped and workspace is not None else None
    return {"uid": uid, "gid": uid, "inside": INSIDE_UID, "owner": owner}, mapped


def owner_of(workspace: str) -> tuple[int, int]:
    """Return who owns a workspace on disk. Raises OSError."""
    status = os.stat(workspace)
    return status.st_uid, status.st_gid


def _object(path: str) -> tuple[int, ...]:
    """Name what is at ``path`` now."""
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    # Whose it is decides how it is mapped.
    kind = stat.S_IFMT(status.st_mode)
    return status.st_dev, status.st_ino, kind, status.st_uid, status.st_gid


def _changed_ns(path: str) -> int:
    """Return when an entry of the folder was made or removed last, or later."""
    try:
        return os.lstat(path).st_ctime_ns
    except OSError:
        return 0
