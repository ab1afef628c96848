"""``safeconduct policy check``: what is wrong or doubtful about a policy file."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit
from safeconduct.policies import Finding, Level, check_file, discover_policy

from .options import JsonOption, WorkspaceOption
from .terminal import print_json, print_line, printable, tell


class Format(StrEnum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"


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
    _print(findings, Format.JSON if as_json else output, str(file))
    counted = [one for one in findings if strict or one.level is Level.ERROR]
    return Exit.FINDINGS if counted else Exit.OK


def _print(findings: tuple[Finding, ...], output: Format, file: str) -> None:
    if output is Format.JSON:
        print_json([one.to_json() for one in findings])
        return
    for one in findings:
        if output is Format.GITHUB:
            print(_github(one))
            continue
        where = f"{one.file}:{one.line}:{one.column}"
        print_line(f"{where}: {one.level} {one.code}: {one.message}")
        if one.fix:
            print_line(f"  fix: {one.fix}")
    if not findings and output is Format.TEXT:
        print_line(f"{file}: no findings")


def _github(one: Finding) -> str:
    """Write a workflow command (docs.github.com, "Workflow commands", setting messages)."""
    place = f"file={_property(one.file)},line={max(one.line, 1)},col={max(one.column, 1)}"
    fix = f" (fix: {one.fix})" if one.fix else ""
    message = _data(f"{one.message}{fix}")
    return f"::{one.level} {place},title={_property(one.code)}::{message}"


def _data(text: str) -> str:
    return printable(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
