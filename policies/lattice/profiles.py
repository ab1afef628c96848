"""Policy lattice: which of two profiles shows and allows a program more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from safeconduct.call import LIMIT_FIELDS, Limits, Profile, WorkspaceMode
from safeconduct.policies.capability import covers
from safeconduct.policies.match import spell

from .inclusion import Language, search

_COMPARED = frozenset(
    ["name", "engine", "workspace", "read", "write", "hide", "imports", "syscalls", "limits"]
)
_LIMIT_NAMES = {field: name for name, field in LIMIT_FIELDS.items()}


def profile_within(narrow: Profile, wide: Profile) -> bool:
    """Tell whether a program surely reaches no more in one profile than in another."""
    return narrow == wide or next(profile_widenings(wide, narrow), None) is None


def profile_widenings(old: Profile, new: Profile) -> Iterator[str]:
    """Say in words what the second profile gives and the first does not, one thing at a time."""
    if old.engine is not new.engine:
        yield f"runs on {new.engine} instead of {old.engine}"
        return
    modes = list(WorkspaceMode)
    if modes.index(new.workspace) < modes.index(old.workspace):
        yield f"has the workspace {new.workspace} instead of {old.workspace}"
    yield from _reach(old, new)
    yield from _additions(old, new)
    yield from _limits(old.limits, new.limits)
    for item in fields(Profile):
        # A field that is not known here must not change: nobody said which side is wider.
        if item.name not in _COMPARED and getattr(old, item.name) != getattr(new, item.name):
            yield f"has another {item.name}"


def _reach(old: Profile, new: Profile) -> Iterator[str]:
    for path in _beyond(new.write, old.write):
        yield f"writes {spell(path)}"
    for path in _beyond((*new.read, *new.write), (*old.read, *old.write)):
        yield f"reads {spell(path)}"
    for pattern in old.hide:
        if not _hidden(pattern, new.hide):
            yield f"no longer hides {spell(pattern)}"


def _additions(old: Profile, new: Profile) -> Iterator[str]:
    for word, mine, theirs in (
        ("finds loaded", old.imports, new.imports),
        ("may call", old.syscalls, new.syscalls),
    ):
        for name in sorted({*theirs} - {*mine}):
            yield f"{word} {name}"


def _beyond(paths: Iterable[str], within: Iterable[str]) -> Iterator[str]:
    folders = tuple(within)
    for path in dict.fromkeys(paths):
        if not any(covers(folder, path) for folder in folders):
            yield path


def _hidden(pattern: str, hide: tuple[str, ...]) -> bool:
    """Tell whether patterns surely hide all that one hides: a name and all it holds (globs.py)."""
    if pattern in hide:
        return True
    return search([_language((pattern,))], [_language(hide)]).none


def _language(patterns: tuple[str, ...]) -> Language:
    return Language((*one.removeprefix("/").split("/"), "**") for one in patterns)


def _limits(old: Limits, new: Limits) -> Iterator[str]:
    for item in fields(Limits):
        mine, theirs = _limit(old, item.name), _limit(new, item.name)
        if mine is not None and (theirs is None or theirs > mine):
            name = _LIMIT_NAMES.get(item.name, item.name)
            yield f"has the limit {name} {'none' if theirs is None else theirs} instead of {mine}"


def _limit(limits: Limits, name: str) -> int | None:
    value: int | None = getattr(limits, name)
    # Without a bound of its own, a file is bounded as the whole disk is (call.Limits).
    return limits.disk_bytes if name == "file_bytes" and value is None else value
