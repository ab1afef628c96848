"""Policy tests, step 2: every Case is judged, and every grant must have been seen both ways.

Nothing runs and no sandbox is needed: calls are brought to their canonical form in a temporary
workspace and decided. So a policy means on every machine what its tests say.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from safeconduct.call import Call, Document, Effect, Json
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies.binding import Rule
from safeconduct.policies.canonical import canonicalize
from safeconduct.policies.decision import decide
from safeconduct.policies.files import PolicyFile
from safeconduct.policies.load import compile_policy
from safeconduct.policies.match import Argv
from safeconduct.policies.rules import Judged
from safeconduct.policies.signatures import BUILT_IN, Holds, Kind
from safeconduct.policies.wildcards import compile_tool_pattern

from .cases import Case, Cases, Link, beside, read_cases
from .findings import Finding, Level, at

_PREFIX: Final = "safeconduct-test-"
# LIMIT: folders above a file in the workspace of the tests; making and removing them is recursive.
MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one Case. ``document`` is None where the Call had no canonical form."""

    case: Case
    effect: Effect
    code: str
    rules: tuple[str, ...]
    reason: str
    document: Document | None = None

    @property
    def wrong(self) -> str:
        """Say what is not as expected; empty where all is."""
        case = self.case
        if self.effect is not case.expect:
            return f"expected {case.expect}, was {self.effect} ({self.code}): {self.reason}"
        if case.rule is not None and case.rule not in self.rules:
            decided = ", ".join(self.rules) or "no rule"
            return f"expected rule {case.rule} to decide, but {decided} did ({self.code})"
        if case.code is not None and case.code != self.code:
            return f"expected the code {case.code}, was {self.code}: {self.reason}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of all Cases of a policy. ``uncovered`` are grants that they do not try."""

    policy: str
    results: tuple[Result, ...]
    uncovered: tuple[Finding, ...]
    file: str

    @property
    def failures(self) -> tuple[Result, ...]:
        """Return the results that are not as expected."""
        return tuple(result for result in self.results if result.wrong)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Return what is wrong, each with its place."""
        failed = tuple(
            Finding(
                level=Level.ERROR,
                code="test.failed",
                file=self.file,
                line=one.case.position.line,
                column=one.case.position.column,
                message=f"{one.case.name}: {one.wrong}",
                fix="change the policy, or what the test expects of it",
            )
            for one in self.failures
        )
        return failed + self.uncovered

    def to_json(self) -> dict[str, Json]:
        """Return it as plain JSON."""
        return {
            "file": self.file,
            "policy": self.policy,
            "cases": [
                {
                    "name": one.case.name,
                    "line": one.case.position.line,
                    "expect": one.case.expect.value,
                    "effect": one.effect.value,
                    "code": one.code,
                    "rules": list(one.rules),
                    "wrong": one.wrong,
                }
                for one in self.results
            ],
            "findings": [one.to_json() for one in self.findings],
        }


def run_cases(file: PolicyFile, cases: Cases) -> Report:
    """Judge all Cases by a policy file and those it extends, in a workspace of their own.

    A policy that names its workspace is for no other, so its tests run in that one, as it is.
    Raise PolicyError where the policy does not load or the workspace cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        workspace = Path(os.path.realpath(folder)) / "work"
        workspace.mkdir()
        try:
            policy = compile_policy(file, workspace=workspace)
        except PolicyError as error:
            if error.code != "policy.workspace" or cases.files is not None:
                raise
            policy = compile_policy(file)
        else:
            _furnish(workspace, _names(cases) if cases.files is None else cases.files, cases.file)
        results = tuple(_run(policy, case) for case in cases.cases)
        return Report(
            policy=policy.version,
            results=results,
            uncovered=tuple(_uncovered(policy, results)),
            file=cases.file,
        )


def require_passing(file: PolicyFile) -> None:
    """Run the tests beside a policy file, where there are any.

    Raise PolicyError ``policy.tests`` where one fails, ``test.*`` where they cannot be read.
    A grant that no test tries is no failure.
    """
    path = beside(file.path)
    if not os.path.lexists(path):
        return
    report = run_cases(file, read_cases(path))
    if report.failures:
        first, count = report.failures[0], len(report.failures)
        raise PolicyError(
            f"{count} of its own tests fail; the first is {first.case.name!a}: {first.wrong}",
            file=report.file,
            line=first.case.position.line,
            column=first.case.position.column,
            code="policy.tests",
            hint=f"see them all with: safeconduct policy test {file.path}",
        )


def _run(policy: Judged, case: Case) -> Result:
    arguments = {name: _expand(value, policy.workspace) for name, value in case.arguments.items()}
    call = Call(id="test", tool=case.tool, arguments=arguments, session="test")
    try:
        judged = policy.for_role(case.role)
        with canonicalize(judged, call) as canonical:
            document = canonical.document
            decision = decide(judged, document, case.facts)
    except (Denied, PolicyError) as error:
        return _result(case, Effect.DENY, error.code, error.message, policy.workspace)
    found = _result(case, decision.effect, decision.code, decision.reason, policy.workspace)
    return replace(found, rules=decision.rules, document=document)


def _result(case: Case, effect: Effect, code: str, reason: str, workspace: str) -> Result:
    # The temporary folder has another name in every run.
    said = reason.replace(workspace, "$WS")
    return Result(case=case, effect=effect, code=code, rules=(), reason=said)


def _expand(value: Json, workspace: str) -> Json:
    # LIMIT: the depth of what a test file holds is bounded (syntax.MAX_DEPTH).
    if isinstance(value, str):
        inside = value == "$WS" or value.startswith("$WS/")
        return workspace + value.removeprefix("$WS") if inside else value
    if isinstance(value, Mapping):
        return {name: _expand(item, workspace) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_expand(item, workspace) for item in value]
    return value


def _names(cases: Cases) -> Iterator[str]:
    """Yield what the calls to our own tools name, which is what they find unless `files` says."""
    for case in cases.cases:
        signature = BUILT_IN.get(case.tool)
        for name, argument in signature.arguments.items() if signature else ():
            value = case.arguments.get(name)
            if not isinstance(value, str) or argument.kind not in (Kind.PATH, Kind.NEW_PATH):
                continue
            inside = value.removeprefix("$WS/")
            if inside.startswith("/") or not {"", ".", ".."}.isdisjoint(inside.split("/")):
                continue
            if argument.kind is Kind.NEW_PATH:
                folder = inside.rpartition("/")[0]
                yield from [f"{folder}/"] if folder else []
            else:
                yield f"{inside}/" if argument.holds is Holds.FOLDER else inside


def _furnish(workspace: Path, names: Iterable[str | Link], file: str) -> None:
    """Make the files, folders and links; links last, so that nothing is made through one."""
    listed = [*names]
    links = [one for one in listed if isinstance(one, Link)]
    plain = sorted({name for name in listed if isinstance(name, str)}, key=_folders_first)
    _refuse_odd(links, [*plain, *(link.name for link in links)], file)
    folders = _above(plain)
    try:
        for name in plain:
            path = workspace / name
            if name.endswith("/") or name in folders:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        for link in links:
            path = workspace / link.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(_expand_text(link.target, workspace))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(
            f"the workspace of the tests cannot be made: {why}",
            file=file,
            code="test.files",
            hint="say under files what is a file (a) and what a folder (a/)",
        ) from error


def _refuse_odd(links: Sequence[Link], names: Sequence[str], file: str) -> None:
    """Refuse names that are too deep, and links that would be made through another link."""
    said = ""
    if any(name.count("/") > MAX_DEPTH for name in names):
        said = f"a name of the tests has more than {MAX_DEPTH} folders"
    # That would be made wherever the other link leads, outside of this workspace.
    elif _above([link.name for link in links]):
        said = "a link of the tests lies below another one"
    if said:
        raise PolicyError(
            said, file=file, code="test.files", hint="name fewer and simpler files under files"
        )


def _above(names: Iterable[str]) -> frozenset[str]:
    """Return which of the names others lie below, without a slash at the end."""
    ordered = sorted({f"{name.removesuffix('/')}/" for name in names})
    pairs = itertools.pairwise(ordered)
    return frozenset(one[:-1] for one, after in pairs if after.startswith(one))


def _folders_first(name: str) -> tuple[bool, str]:
    return (not name.endswith("/"), name)


def _expand_text(text: str, workspace: Path) -> str:
    return str(_expand(text, str(workspace)))


def _uncovered(policy: Judged, results: Sequence[Result]) -> Iterator[Finding]:
    """Find grants without a case that they allow, or without one that is refused beside them."""
    # What it extends has tests of its own.
    for rule in policy.parts[-1].every_rule():
        if rule.effect is Effect.DENY:
            continue
        fix = f"add a case for {rule.tool} to the tests"
        if not any(rule.id in one.rules and one.effect is not Effect.DENY for one in results):
            message = f"no test sees {rule.id} grant a call"
            yield at(rule, Level.WARNING, "test.no_grant", message, fix)
        if not any(_refused_beside(rule, one) for one in results):
            message = f"no test sees a call refused that {rule.id} does not grant"
            yield at(rule, Level.WARNING, "test.no_refusal", message, fix)


def _refused_beside(rule: Rule, result: Result) -> bool:
    """Tell whether a Call was refused that this grant is near to: of its tool and its program."""
    if result.effect is not Effect.DENY or not _is_for(rule, result.case.tool):
        return False
    argv = result.case.arguments.get("argv")
    for matcher in (rule.matchers or {}).values():
        if not isinstance(matcher, Argv) or not matcher.programs:
            continue
        # `[git, ...]` refuses no git: then any other program is what lies beside it.
        whole = len(matcher.elements) == 1 and matcher.rest
        named = isinstance(argv, Sequence) and len(argv) > 0 and argv[0] in matcher.programs
        if not whole and isinstance(argv, Sequence) and not named:
            return False
    return True


def _is_for(rule: Rule, tool: str) -> bool:
    return rule.tool == tool or ("*" in rule.tool and compile_tool_pattern(rule.tool).matches(tool))
