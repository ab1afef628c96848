"""``safeconduct changes``: what sandboxed calls changed in an overlay and nobody has decided about.

Such sets lie in the state folder. The workspace is as it was until ``commit``; ``rollback`` forgets
a set. Nothing here may run inside a sandbox.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from safeconduct.errors import Exit, SandboxFailed
from safeconduct.runtime.changes import KeptSets, opened_workspace
from safeconduct.runtime.places import Places
from safeconduct.runtime.sandbox.overlay import Change, CommitReport, unified

from .options import JsonOption
from .places import refuse_inside_sandbox
from .terminal import print_json, print_line, print_table, tell

SetArgument = Annotated[str, typer.Argument(metavar="ID", help="A set from `changes ls`.")]

# LIMIT: lines of text that `diff` prints of one file.
_LINES_MAX = 2_000


def list_changes(as_json: JsonOption = False) -> int:
    """List the kept sets of changes, newest first."""
    sets = _sets()
    rows: list[dict[str, object]] = []
    for name in sets.names():
        try:
            found = sets.load(name)
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
                "conflicts": len(changes.conflicts),
            }
        )
    if as_json:
        print_json(rows)
        return Exit.OK
    if not rows:
        tell(f"there are no changes to decide about in {sets.places.changes}")
        return Exit.OK
    columns = ("id", "workspace", "changes", "later", "refused", "conflicts", "error")
    print_table(columns, [[str(row.get(name, "")) for name in columns] for row in rows])
    return Exit.OK


def diff(
    name: SetArgument,
    as_json: JsonOption = False,
    names_only: Annotated[bool, typer.Option("--names", help="Print no text of files.")] = False,
) -> int:
    """Show what a set changes, and what of it takes effect later."""
    sets = _sets()
    found = sets.load(name)
    if as_json:
        print_json([change.to_json() for change in found.changes])
        return Exit.OK
    with opened_workspace(found.workspace) as workspace, sets.opened(name) as upper:
        for change in found.changes:
            print_line(_said(change))
            for line in [] if names_only else _text(change, upper, workspace):
                print_line(f"  {line}")
    return Exit.OK


def commit_changes(name: SetArgument, as_json: JsonOption = False) -> int:
    """Apply a set to its workspace, all of it or nothing; refused entries are left out.

    Exits with 125 and changes nothing where the workspace is no longer what the call saw.
    """
    refuse_inside_sandbox("changes commit")
    _tell_report(_sets().commit(name), as_json)
    return Exit.OK


def rollback(name: SetArgument) -> int:
    """Forget a set; the workspace stays as it is."""
    refuse_inside_sandbox("changes rollback")
    found = _sets().rollback(name)
    tell(f"{len(found.changes)} changes are forgotten; {found.workspace} is as it was")
    return Exit.OK


def _sets() -> KeptSets:
    return KeptSets(places=Places.of(os.environ))


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
