"""How findings are printed: for a person, a program, GitHub's annotations, or JUnit readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from xml.sax.saxutils import quoteattr

from safeconduct.policies import Finding

from .terminal import print_json, print_line, printable


class Format(StrEnum):
    """How findings are printed."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    JUNIT = "junit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at, as JUnit counts it; ``wrong`` is empty where it is fine."""

    name: str
    file: str
    wrong: str = ""


def print_findings(findings: Sequence[Finding], output: Format, *, clean: str) -> None:
    """Print findings, or ``clean`` where there is none."""
    if output is Format.JSON:
        print_json([one.to_json() for one in findings])
    elif output is Format.JUNIT:
        print_junit([as_check(one) for one in findings] or [Check(name=clean, file="policy")])
    elif output is Format.GITHUB:
        for one in findings:
            print(_github(one))
    else:
        for one in findings:
            where = f"{one.file}:{one.line}:{one.column}"
            print_line(f"{where}: {one.level} {one.code}: {one.message}")
            if one.fix:
                print_line(f"  fix: {one.fix}")
        if not findings:
            print_line(clean)


def as_check(one: Finding) -> Check:
    """Return a finding as a check that failed."""
    where = f"{one.file}:{one.line}:{one.column}"
    fix = f" (fix: {one.fix})" if one.fix else ""
    return Check(
        name=f"{one.code} at {where}", file=one.file, wrong=f"{one.level}: {one.message}{fix}"
    )


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


def print_junit(checks: Sequence[Check]) -> None:
    """Print one suite in the form that CI servers read (testmoapp/junitxml, "common format")."""
    wrong = [one for one in checks if one.wrong]
    print('<?xml version="1.0" encoding="UTF-8"?>')
    print(f'<testsuites tests="{len(checks)}" failures="{len(wrong)}">')
    print(f'<testsuite name="safeconduct policy" tests="{len(checks)}" failures="{len(wrong)}">')
    for one in checks:
        name = f"<testcase classname={_attribute(one.file)} name={_attribute(one.name)}"
        if one.wrong:
            print(f"{name}><failure message={_attribute(one.wrong)}/></testcase>")
        else:
            print(f"{name}/>")
    print("</testsuite>\n</testsuites>")


def _attribute(text: str) -> str:
    # What is not printable is escaped first: XML has no way to write most control characters.
    return quoteattr(printable(text)).encode("ascii", "xmlcharrefreplace").decode()
