"""``safeconduct policy check``: what is wrong or doubtful about a policy file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit
from safeconduct.policies import Level, check_file, discover_policy

from .findings import Format, print_findings
from .options import JsonOption, WorkspaceOption
from .terminal import tell


def check(
    file: Annotated[
        Path | None, typer.Argument(help="Policy file; without it the usual places are searched.")
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to print the findings.")
    ] = Format.TEXT,
    workspace: WorkspaceOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings count as errors.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Check a policy file and print every finding with its place and a fix.

    Exits with 0 where there is no error, 20 otherwise. Warnings count only with --strict.
    """
    if file is None:
        found = discover_policy(start=Path.cwd(), environment=os.environ)
        file = found.path
        tell(f"checking {file}: {found.why}")
    findings = check_file(file, workspace=workspace)
    form = Format.JSON if as_json else output
    counted = [one for one in findings if strict or one.level is Level.ERROR]
    # A warning that does not count must not fail a CI server's report either.
    shown = counted if form is Format.JUNIT else findings
    print_findings(shown, form, clean=f"{file}: no findings")
    return Exit.FINDINGS if counted else Exit.OK
