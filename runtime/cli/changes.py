"""``safeconduct changes``: what sandboxed calls changed in an overlay and nobody has decided about.

Such sets lie in the state folder. The workspace is as it was until ``commit``; ``rollback`` forgets
a set. Nothing here may run inside a sandbox.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Error, Exit, SandboxFailed
from safeconduct.runtime.places import Places
from safeconduct.runtime.sandbox.overlay import Change, CommitReport, commit, shelf, unified

from .options import JsonOption
from .places import refuse_inside_sandbox
from .terminal import print_json, print_line, print_table, tell

SetArgument = Annotated[str, typer.Argument(metavar="ID", help="A set from `changes ls`.")]

# LIMIT: lines of text that `diff` prints of one file.
_LINES_MAX = 2_000


def list_changes(as_json: JsonOption = False) -> int:
    """List the kept sets of changes, newest first."""
    folder = changes_folder(Places.of(os.environ))
    rows: list[dict[str, object]] = []
    for name in shelf.shelved(folder):
        try:
            found = shelf.load(folder, name)
        except SandboxFailed as error:
            rows.append({"id": name, "error": error.code})
            continue
        changes = found.changes
        rows.append(
            {
                "id": name,
                "workspace": found.workspace,
                "changes": len(changes),
                "later": len(changes.later),
                "refused": len(changes.refused),
            }
        )
    if as_json:
        print_json(rows)
        return Exit.OK
    if not rows:
        tell(f"there are no changes to decide about in {folder}")
        return Exit.OK
    columns = ("id", "workspace", "changes", "later", "refused", "error")
    print_table(columns, [[str(row.get(name, "")) for name in columns] for row in rows])
    return Exit.OK


def diff(
    name: SetArgument,
    as_json: JsonOption = False,
    names_only: Annotated[bool, typer.Option("--names", help="Print no text of files.")] = False,
) -> int:
    """Show what a set changes, and what of it takes effect later."""
    folder = changes_folder(Places.of(os.environ))
    found = shelf.load(folder, name)
    if as_json:
        print_json([change.to_json() for change in found.changes])
        return Exit.OK
    workspace = _open_workspace(found.workspace)
    try:
        with shelf.opened(folder, name) as upper:
            for change in found.changes:
                print_line(_said(change))
                for line in [] if names_only else _text(change, upper, workspace):
                    print_line(f"  {line}")
    finally:
        os.close(workspace)
    return Exit.OK


def commit_changes(name: SetArgument, as_json: JsonOption = False) -> int:
    """Apply a set to its workspace, all of it or nothing; refused entries are left out.

    Exits with 125 and changes nothing where the workspace is no longer what the call saw.
    """
    refuse_inside_sandbox("changes commit")
    places = Places.of(os.environ)
    folder = changes_folder(places)
    found = shelf.load(folder, name)
    workspace = _open_workspace(found.workspace)
    try:
        with shelf.opened(folder, name) as upper:
            report = commit(
                found.changes,
                upper=upper,
                workspace=workspace,
                journal=journal_folder(places, found.workspace),
                # A set is made after the last process of its calls is gone, and nothing writes it.
                ended=lambda: True,
            )
    finally:
        os.close(workspace)
    shelf.drop(folder, name)
    _tell_report(report, as_json)
    return Exit.OK


def rollback(name: SetArgument) -> int:
    """Forget a set; the workspace stays as it is."""
    refuse_inside_sandbox("changes rollback")
    folder = changes_folder(Places.of(os.environ))
    found = shelf.load(folder, name)
    shelf.drop(folder, name)
    tell(f"{len(found.changes)} changes are forgotten; {found.workspace} is as it was")
    return Exit.OK


def changes_folder(places: Places) -> Path:
    """Return where kept sets lie."""
    return places.state / "changes"


def journal_folder(places: Places, workspace: str) -> Path:
    """Return where the journal of a workspace's commits lies."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(workspace))).hexdigest()[:32]
    return places.state / "commits" / name


def _open_workspace(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Error(
            f"{path}: {error.strerror}",
            code="workspace.missing",
            hint="put the workspace back where it was, or roll the changes back",
        ) from error


def _said(change: Change) -> str:
    what = f"{change.kind:8} {change.path}{'/' if change.node == 'folder' else ''}"
    if change.target is not None:
        what += f" -> {change.target}"
    notes = [
        f"{word}: {why}"
        for word, why in (
            ("REFUSED", change.refused),
            ("CONFLICT", change.conflict),
            ("later", change.later),
        )
        if why
    ]
    return what + (f"   [{'; '.join(notes)}]" if notes else "")


def _text(change: Change, upper: int, workspace: int) -> list[str]:
    lines = unified(change, upper, workspace) or []
    if len(lines) <= _LINES_MAX:
        return lines
    return [*lines[:_LINES_MAX], f"… {len(lines) - _LINES_MAX} more lines"]


def _tell_report(report: CommitReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
        return
    print_line(f"{len(report.applied)} changes applied, {len(report.refused)} refused")
    for change in (*report.refused, *report.later):
        print_line(f"  {_said(change)}")
    for path in report.kept:
        tell(f"{path} was written meanwhile", "the version before lies beside it: .safeconduct-*")
