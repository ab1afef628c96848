"""Step "verify": what a verification found, and what it did not look at."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from safeconduct.errors import Exit

_KEY_LINE = "NAME+HASH+BASE64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, at entry ``index`` and byte ``offset`` of ``path`` (-1: unknown)."""

    code: str
    message: str
    index: int = -1
    path: str = ""
    offset: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of verifying one trace.

    ``status`` is the exit code. ``level`` is 1 when a key the verifier brought signed the
    checkpoint, else 0. ``claimed_keys`` are the keys the checkpoint says it was signed with: they
    came with the log and are a claim, no more. ``unsigned`` counts entries after the checkpoint.
    """

    status: Exit
    level: int = 0
    origin: str = ""
    signed_by: str = ""
    claimed_keys: tuple[str, ...] = ()
    claimed_key_line: str = ""
    size: int = 0
    root: str = ""
    sessions: int = 0
    calls: int = 0
    open_sessions: int = 0
    open_calls: int = 0
    unsigned: int = 0
    recoveries: int = 0
    findings: tuple[Finding, ...] = ()
    not_checked: tuple[str, ...] = ()
    next_step: str = ""

    @property
    def integrity(self) -> str:
        """Say in one word whether the files hash to the checkpoint: intact, broken, unknown."""
        if self.status is Exit.TAMPERED:
            return "broken"
        unread = any(one.code in ("trace.missing", "trace.io") for one in self.findings)
        return "unknown" if self.status is Exit.TRACE_IO or unread else "intact"

    @property
    def complete(self) -> bool:
        """Tell whether every session is closed, every call has an outcome, all is signed."""
        return self.integrity == "intact" and not self.findings and not self.unsigned

    def lines(self) -> list[str]:
        """Return the report as lines of plain text, safe to print on a terminal."""
        shown = [
            f"{_VERDICT[self.status]}: {self.origin or 'no log'}",
            f"  integrity     {self.integrity}",
            f"  level         L{self.level} {self._signed()}",
            f"  completeness  {'complete' if self.complete else 'incomplete'}: {self._counts()}",
        ]
        for one in self.findings:
            where = f" [{one.path} byte {one.offset}]" if one.offset >= 0 else ""
            shown.append(f"  finding       {one.code}: {one.message}{where}")
        shown += [f"  NOT CHECKED   {one}" for one in self.not_checked]
        if self.next_step:
            shown.append(f"  next          {self.next_step}")
        return [_printable(line) for line in shown]

    def _signed(self) -> str:
        if self.level:
            return f"signed by {self.signed_by}, a key you brought"
        claims = ", ".join(self.claimed_keys) or "nobody"
        return f"trust not established: the log claims the key {claims}; that claim came with it"

    def _counts(self) -> str:
        return (
            f"{self.size} signed entries, {self.unsigned} unsigned, "
            f"{self.sessions} sessions ({self.open_sessions} open), "
            f"{self.calls} calls ({self.open_calls} without outcome)"
        )


_VERDICT = {
    Exit.OK: "VERIFIED",
    Exit.TAMPERED: "TAMPERED",
    Exit.INCOMPLETE: "INCOMPLETE",
    Exit.UNTRUSTED: "NOT TRUSTED",
    Exit.TRACE_IO: "UNREADABLE",
}


def command(directory: str) -> str:
    """Return the command that establishes trust once the key line is known."""
    return f"safeconduct trace verify --key '{_KEY_LINE}' {shlex.quote(directory)}"


def _printable(line: str) -> str:
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in line)
