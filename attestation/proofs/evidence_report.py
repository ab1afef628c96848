"""Step "verify": the outcome of checking a file that was handed on, and how a person is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from safeconduct.attestation.verify.report import Finding
from safeconduct.attestation.verify.trust import moment
from safeconduct.errors import Exit

PROGRAM: Final = "safeconduct trace verify-proof"
"""The command that next steps speak of, unless the caller names another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The outcome of checking one file. ``status`` is the exit code.

    ``level`` is 1 where a trusted log key signed, 3 where independent witnesses did as well, the
    ``newest`` of them at that second of POSIX time (-1: none did);
    ``shows`` says in sentences what holds if the status is OK. ``claimed_keys`` came with the file.
    """

    kind: str
    status: Exit
    level: int = 0
    origin: str = ""
    size: int = 0
    root: str = ""
    signed_by: str = ""
    witnesses: tuple[str, ...] = ()
    quorum: str = ""
    newest: int = -1
    claimed_keys: tuple[str, ...] = ()
    index: int = -1
    leaf: str = ""
    session: str = ""
    entries: int = 0
    shows: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_checked: tuple[str, ...] = ()
    next_step: str = ""

    def lines(self, program: str = PROGRAM) -> list[str]:
        """Return the outcome as lines of plain text, safe to print on a terminal.

        ``program`` is how the reader calls this verifier; the next step is spelled with it.
        """
        shown = [
            f"{_VERDICT[self.status]}: {self.kind} of {self.origin or 'no log'}",
            f"  this means    {_MEANS[self.status]}",
        ]
        if self.size:
            shown.append(f"  head          {self.size} entries, root {self.root}")
        shown.append(f"  level         L{self.level} {self._vouched()}")
        good = self.status in (Exit.OK, Exit.INCOMPLETE)
        shown += [f"  {'shows        ' if good else 'would show   '} {one}" for one in self.shows]
        shown += [f"  finding       {one.code}: {one.message}" for one in self.findings]
        shown += [f"  NOT CHECKED   {one}" for one in self.not_checked]
        if self.next_step:
            shown.append(f"  next          {self.next_step.replace(PROGRAM, program)}")
        return [_printable(line) for line in shown]

    def _vouched(self) -> str:
        if self.status is Exit.TAMPERED:
            return "nobody vouches for it as it is"
        if not self.signed_by:
            claims = ", ".join(self.claimed_keys) or "nobody"
            return f"trust not established: it claims the key {claims}; that claim came with it"
        if self.witnesses:
            names = ", ".join(self.witnesses)
            newest = f", the newest at {moment(self.newest)}" if self.newest >= 0 else ""
            return f"signed by {self.signed_by}, cosigned by {names}{newest}"
        return f"signed by {self.signed_by}, a key you brought"


_VERDICT = {
    Exit.OK: "VERIFIED",
    Exit.TAMPERED: "NOT TRUE",
    Exit.INCOMPLETE: "INCOMPLETE",
    Exit.UNTRUSTED: "NOT TRUSTED",
    Exit.TRACE_IO: "UNREADABLE",
}
_MEANS = {
    Exit.OK: "what it shows stands in the log that the key signed",
    Exit.TAMPERED: "do not rely on it: it is not what was signed",
    Exit.INCOMPLETE: "what is here was signed; the session went on, or its end was left out",
    Exit.UNTRUSTED: "it may agree with itself; nobody you trust vouches for it",
    Exit.TRACE_IO: "it could not be read; nothing was decided",
}


def _printable(line: str) -> str:
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in line)
