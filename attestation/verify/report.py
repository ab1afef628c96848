"""Step "verify": what a verification found, and how a person is told."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.reader import Replayable
from safeconduct.errors import Exit

if TYPE_CHECKING:
    from .vouching import Trust

_KEY_LINE = "NAME+HASH+BASE64"
PROGRAM: Final = "safeconduct trace verify"
"""The command that next steps speak of, unless the caller names another."""
# LIMIT: characters of one message; a log may have it quote an entry's 64 KiB.
_MESSAGE_CHARACTERS = 500
# Findings of a log that hashes to its checkpoint. They come only where nothing else is broken.
CONTRADICTIONS: Final = frozenset(
    {
        "held.rollback",
        "held.fork",
        "head.fork",
        "rotation.fork",
        "rotation.invalid",
        "rotation.limit",
        "rotation.retired",
        "cosignature.invalid",
        "trust.fork",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, at entry ``index`` and byte ``offset`` of ``path`` (-1: unknown)."""

    code: str
    message: str
    index: int = -1
    path: str = ""
    offset: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One step of assurance (L1 to L5), whether the trace reaches it, and why or why not."""

    number: int
    reached: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What stands in the log, as facts and report both say it."""

    findings: tuple[Finding, ...] = ()
    claimed_keys: tuple[str, ...] = ()
    claimed_key_line: str = ""
    sessions: int = 0
    calls: int = 0
    open_sessions: int = 0
    open_calls: int = 0
    unsigned: int = 0
    recoveries: int = 0
    redactions: int = 0
    clock_back: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Seen):
    """What a verification saw; ``make_report`` says what follows from it."""

    directory: Path
    head: Checkpoint | None = None
    trust: Trust | None = None
    pinned: bool = False
    forgot: bool = False
    journal_closed: bool = False
    isolation: str = ""
    replayable: Replayable = field(default_factory=Replayable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Seen):
    """The outcome of verifying one trace.

    ``status`` is the exit code. ``level`` is the highest of ``levels`` that is reached; 0 when no
    key the verifier brought signed the checkpoint. ``claimed_keys`` are the keys the checkpoint
    says it was signed with: they came with the log and are a claim, no more. ``unsigned`` counts
    entries after the checkpoint, ``replayable`` calls whose arguments are here to judge again and
    ``sealed`` entries whose openings only the operator's vault opens. ``clock_back`` is the first
    entry whose time is earlier than that of the entry before, or -1. ``carried_from`` are the key
    lines that handed the log over, in the end to ``signed_key``.
    """

    status: Exit
    level: int = 0
    levels: tuple[Level, ...] = ()
    origin: str = ""
    signed_by: str = ""
    signed_key: str = ""
    carried_from: tuple[str, ...] = ()
    size: int = 0
    root: str = ""
    rotations: int = 0
    replayable: int = 0
    sealed: int = 0
    openings_cut: bool = False
    not_checked: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()

    @property
    def integrity(self) -> str:
        """Say in one word whether the files hash to the checkpoint: intact, broken, unknown."""
        if self.status is Exit.TAMPERED and not self._contradicts():
            return "broken"
        unread = any(one.code in ("trace.missing", "trace.io") for one in self.findings)
        return "unknown" if self.status is Exit.TRACE_IO or unread else "intact"

    @property
    def complete(self) -> bool:
        """Tell whether every session is closed, every call has an outcome, all is signed."""
        return self.integrity == "intact" and not self.findings and not self.unsigned

    def _contradicts(self) -> bool:
        """Tell whether it hashes to its checkpoint, but against what was signed elsewhere."""
        return any(one.code in CONTRADICTIONS for one in self.findings)

    def lines(self, program: str = PROGRAM) -> list[str]:
        """Return the report as lines of plain text, safe to print on a terminal.

        ``program`` is how the reader calls this verifier; next steps are spelled with it.
        """
        shown = [
            f"{_VERDICT[self.status]}: {self.origin or 'no log'}",
            f"  this means    {self._meaning()}",
            f"  integrity     {self.integrity}",
            f"  level         L{self.level} {self._signed()}",
        ]
        shown += [
            f"    L{one.number} {'yes' if one.reached else 'no '}      {one.why}"
            for one in self.levels
        ]
        shown.append(
            f"  completeness  {'complete' if self.complete else 'incomplete'}: {self._counts()}"
        )
        shown.append(f"  replay        {self._coverage()}")
        for one in self.findings:
            entry = f" at entry {one.index}" if one.index >= 0 else ""
            where = f" [{one.path} byte {one.offset}]" if one.offset >= 0 else ""
            shown.append(f"  finding       {one.code}{entry}: {one.message}{where}")
        shown += [f"  NOT CHECKED   {one}" for one in self.not_checked]
        shown += [f"  next          {one.replace(PROGRAM, program)}" for one in self.next_steps]
        return [_printable(line) for line in shown]

    def _meaning(self) -> str:
        if self._contradicts():
            return "do not rely on this trace: it contradicts what was signed before, or elsewhere"
        if self.status is Exit.UNTRUSTED and self.level:
            return "these records are the log's own; the witnesses your policy asks for are missing"
        if self.status is Exit.INCOMPLETE and self.integrity == "unknown":
            return "files are missing, so nothing here could be held against what was signed"
        return _MEANS[self.status]

    def _signed(self) -> str:
        if self.level:
            return f"signed by {self.signed_by}, a key you trust"
        if self._contradicts():
            return "nothing is vouched for: two signed statements about this log exclude each other"
        if self.status is Exit.TAMPERED:
            return "nobody vouches for it as it is: the files are not what was signed"
        if self.signed_by and self.integrity == "unknown":
            return f"{self.signed_by} signed a head, and the files that lead to it are not all here"
        claims = self.claimed_key_line or ", ".join(self.claimed_keys) or "nobody's"
        return f"trust not established: the log claims the key {claims}; that claim came with it"

    def _counts(self) -> str:
        return (
            f"{self.size} signed entries, {self.unsigned} unsigned, "
            f"{self.sessions} sessions ({self.open_sessions} open), "
            f"{self.calls} calls ({self.open_calls} without outcome)"
        )

    def _coverage(self) -> str:
        least = "at least " if self.openings_cut else ""
        said = f"{least}{self.replayable} of {self.calls} calls have their arguments in this folder"
        if self.sealed:
            said += f"; openings of {self.sealed} entries are sealed, for the operator's vault"
        return said


_VERDICT = {
    Exit.OK: "VERIFIED",
    Exit.TAMPERED: "TAMPERED",
    Exit.INCOMPLETE: "INCOMPLETE",
    Exit.UNTRUSTED: "NOT TRUSTED",
    Exit.TRACE_IO: "UNREADABLE",
}

_MEANS = {
    Exit.OK: "these are the records that were signed: none changed, added, moved or taken out",
    Exit.TAMPERED: "do not rely on this trace: it is not what its recorder signed",
    Exit.INCOMPLETE: "what is here is as it was signed; something that belongs to it is not here",
    Exit.UNTRUSTED: "the files may agree with each other; nobody you trust vouches for them",
    Exit.TRACE_IO: "the folder could not be read; nothing was decided",
}


def clip(message: str) -> str:
    """Return a message as a finding holds it."""
    left_out = len(message) - _MESSAGE_CHARACTERS
    if left_out <= 0:
        return message
    return f"{message[:_MESSAGE_CHARACTERS]}... ({left_out} more characters)"


def command(directory: str) -> str:
    """Return the command that establishes trust once the key line is known."""
    return f"{PROGRAM} --key '{_KEY_LINE}' {shlex.quote(directory)}"


def make_report(facts: Facts) -> Report:
    """Say what follows from the facts: verdict, levels, what was not checked, what to do."""
    from .verdict import levels_of, next_steps, not_checked, status_of

    trust, head = facts.trust, facts.head
    status = status_of(facts)
    levels = levels_of(facts, status)
    return Report(
        **{one.name: getattr(facts, one.name) for one in fields(Seen)},
        status=status,
        level=max((one.number for one in levels if one.reached), default=0),
        levels=levels,
        origin=head.origin if head else "",
        signed_by=trust.signed_by.name if trust and trust.signed_by else "",
        signed_key=trust.signed_by.line if trust and trust.signed_by else "",
        carried_from=tuple(key.line for key in trust.carried_from) if trust else (),
        size=head.size if head else 0,
        root=head.root.hex() if head else "",
        rotations=trust.rotations if trust else 0,
        replayable=min(facts.replayable.documents, facts.calls),
        sealed=facts.replayable.sealed,
        openings_cut=facts.replayable.cut,
        not_checked=not_checked(facts, status, levels),
        next_steps=next_steps(facts, status),
    )


def _printable(line: str) -> str:
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in line)
