"""What `safeconduct policy check` finds: a Finding, its level and its place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from safeconduct.call import Json
from safeconduct.policies.rules import Rule
from safeconduct.policies.syntax import Position


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to look at, with its place (from 1; 0 is unknown) and what to do."""

    level: Level
    code: str
    file: str
    line: int
    column: int
    message: str
    fix: str

    def to_json(self) -> dict[str, Json]:
        """Return it as plain JSON."""
        return {
            "level": self.level.value,
            "code": self.code,
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "message": self.message,
            "fix": self.fix,
        }


def finding(level: Level, code: str, file: str, where: Position, message: str, fix: str) -> Finding:
    """Make a Finding about a place in a file."""
    return Finding(
        level=level,
        code=code,
        file=file,
        line=where.line,
        column=where.column,
        message=message,
        fix=fix,
    )


def at(rule: Rule, level: Level, code: str, message: str, fix: str) -> Finding:
    """Make a Finding about a rule."""
    return finding(level, code, rule.file, rule.position, message, fix)
