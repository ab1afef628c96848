"""Step "sandbox": what an overlay holds, as values: a Change an entry, Changes for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, cast

from safeconduct.call import Json
from safeconduct.errors import Error

from .seen import Identity

# LIMIT: paths that one Conflict names.
_PATHS_MAX: Final = 100


class Kind(StrEnum):
    """What happened to an entry of the workspace."""

    CREATED = "created"
    MODIFIED = "modified"
    DELETED = "deleted"
    MODE = "mode"


class Node(StrEnum):
    """What an entry is: after the change, or before it where it was deleted."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"
    SPECIAL = "special"


class Conflict(Error):
    """The workspace is no longer what the overlay saw. Nothing of the commit is left in it.

    ``paths`` are the entries that differ, relative to the workspace; at most 100 of them.
    """

    default_code = "workspace.conflict"

    def __init__(self, paths: Iterable[str], *, why: str = "") -> None:
        self.paths = tuple(path for path, _ in zip(paths, range(_PATHS_MAX), strict=False))
        shown = ", ".join(ascii(path) for path in self.paths[:3])
        more = ", …" if len(self.paths) > 3 else ""
        super().__init__(
            f"The workspace changed under the overlay: {shown}{more}{why and f' ({why})'}.",
            hint="Look at both versions, then roll back and run again, or merge by hand.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One entry that the overlay made, changed or deleted.

    ``path`` is relative to the workspace; bytes that are not UTF-8 are surrogates (PEP 383), and it
    may hold anything but NUL: print it only through the terminal's escaping. ``before`` and
    ``after`` are SHA-256 in hex of a regular file's content, ``target`` what a symlink holds.
    ``later`` says why the change takes effect outside of every sandbox, ``refused`` why it is never
    copied out, ``conflict`` why the base is not what the overlay saw. ``mode`` is what a commit
    sets. ``base`` is the state of the entry it replaces.
    """

    path: str
    kind: Kind
    node: Node
    mode: int = 0
    size: int = 0
    modified_ns: int = 0
    before: str | None = None
    after: str | None = None
    target: str | None = None
    later: str | None = None
    refused: str | None = None
    conflict: str | None = None
    base: Identity | None = None

    def to_json(self) -> dict[str, Json]:
        """Return it for a trace or a file; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Change:
        """Read what ``to_json`` wrote to a file of ours. Raises TypeError, ValueError, KeyError."""
        fields = dict(data)
        if "base" in fields:
            fields["base"] = Identity(**cast("dict[str, int]", fields["base"]))
        fields["kind"] = Kind(str(fields["kind"]))
        fields["node"] = Node(str(fields["node"]))
        return cls(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Everything an overlay holds, folders before what is in them, names sorted."""

    entries: tuple[Change, ...] = ()

    def __iter__(self) -> Iterator[Change]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def later(self) -> tuple[Change, ...]:
        """What takes effect outside of every sandbox, when somebody's next program reads it."""
        return tuple(change for change in self.entries if change.later)

    @property
    def refused(self) -> tuple[Change, ...]:
        """What is never copied out."""
        return tuple(change for change in self.entries if change.refused)

    @property
    def conflicts(self) -> tuple[Change, ...]:
        """What somebody else changed meanwhile."""
        return tuple(change for change in self.entries if change.conflict)

    def find(self, path: str) -> Change | None:
        """Return the change of one path."""
        return next((change for change in self.entries if change.path == path), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """LIMIT: how much of a hostile upper folder is looked at.

    More ``entries`` than this, or more ``text_bytes`` in their paths and link targets together,
    refuse the whole; what lies deeper, has a longer path, or no longer fits in ``read_bytes`` (of
    both sides together, holes counted) is refused alone.
    """

    entries: int = 200_000
    # A path of some KiB for each entry takes far more memory here than it takes there.
    text_bytes: int = 64 << 20
    depth: int = 64
    path_bytes: int = 3_500
    read_bytes: int = 4 << 30
