"""``safeconduct policy test``: does a policy judge the calls of its test file as it should?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit
from safeconduct.policies import discover_policy, read_policy_file
from safeconduct.policies.checks.cases import beside, read_cases
from safeconduct.policies.checks.testing import Report, run_cases

from .findings import Check, Format, as_check, print_findings, print_junit
from .options import JsonOption
from .terminal import print_json, print_line, tell


def run_tests(
    file: Annotated[
        Path | None, typer.Argument(help="Policy file; without it the usual places are searched.")
    ] = None,
    tests: Annotated[
        Path | None,
        typer.Option("--tests", help="Test file (default: policy.test.yaml beside policy.yaml)."),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to print the findings.")
    ] = Format.TEXT,
    as_json: JsonOption = False,
) -> int:
    """Judge the calls of a policy's test file and compare with what it expects.

    Nothing runs: paths are looked up in a temporary workspace that holds what the file lists. A
    grant that no test sees both allow and refuse is a finding. Exits with 0, with findings 20.
    """
    if file is None:
        found = discover_policy(start=Path.cwd(), environment=os.environ)
        file = found.path
        tell(f"testing {file}: {found.why}")
    report = run_cases(read_policy_file(file), read_cases(tests or beside(file)))
    _print(report, Format.JSON if as_json else output)
    return Exit.FINDINGS if report.findings else Exit.OK


def _print(report: Report, output: Format) -> None:
    if output is Format.JSON:
        print_json(report.to_json())
        return
    if output is Format.JUNIT:
        # Under its own name each case keeps its history, whatever came of it.
        cases = [
            Check(name=one.case.name, file=report.file, wrong=one.wrong) for one in report.results
        ]
        print_junit([*cases, *map(as_check, report.uncovered)])
        return
    total, failed = len(report.results), len(report.failures)
    print_findings(report.findings, output, clean=f"{report.file}: {total} cases, no findings")
    if report.findings and output is Format.TEXT:
        print_line(
            f"{total} cases: {total - failed} as expected, {failed} not;"
            f" {len(report.uncovered)} times a grant is not tried"
        )
