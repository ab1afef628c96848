"""Step "verify": what follows from what a verification saw: verdict, levels, what is left to do."""

from __future__ import annotations

import shlex
from typing import Final

from safeconduct.attestation.chain import MAX_KNOWN
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.errors import Exit

from .report import PROGRAM, Facts, Level, command
from .trust import moment, speaks_for
from .vouching import Trust

# These say that something is not there, or that trust is not established; every other finding
# says that bytes are not what was signed, or that the signed log breaks its own rules.
_ABSENT: Final = frozenset(
    {"trace.missing", "session.open", "call.open", "log.unsigned", "trust.tail", "head.newer"}
)
_UNTRUSTED: Final = frozenset(
    {"trace.origin", "held.untrusted", "rotation.uncovered", "trust.quorum", "key.origin"}
)
_UNREADABLE: Final = frozenset({"trace.io"})

_FORGOT: Final = (
    f"whether the id of a session, or of a call in it, was used twice: {MAX_KNOWN} of each were"
    " compared, and there are more"
)
_CLOSED: Final = "entries after the signed head: you may not look into the journal (ask its owner)"
_ALWAYS: Final = (
    "whether everything that happened was recorded, and recorded truthfully",
    "openings and blobs (they are outside the signed tree; replay checks each it uses)",
)


def status_of(facts: Facts) -> Exit:
    """A broken hash accuses whoever signed; absence does not; without a key nothing counts."""
    codes = {one.code for one in facts.findings}
    signed = facts.trust is not None and facts.trust.signed_by is not None
    if codes & _UNREADABLE:
        return Exit.TRACE_IO
    if codes - _ABSENT - _UNTRUSTED:
        return Exit.TAMPERED
    if (not signed and facts.claimed_keys) or codes & _UNTRUSTED:
        return Exit.UNTRUSTED
    return Exit.INCOMPLETE if codes else Exit.OK


def levels_of(facts: Facts, status: Exit) -> tuple[Level, ...]:
    """Return L1 to L5; none where the files are not what was signed."""
    trust = facts.trust
    if trust is None or status not in (Exit.OK, Exit.INCOMPLETE, Exit.UNTRUSTED):
        return ()
    # INVARIANT: without the whole tree nothing here was held against the signed root.
    whole = all(one.code != "trace.missing" for one in facts.findings)
    # A quorum that is not met takes nothing from the log's own signature.
    lacking = {one.code for one in facts.findings} <= {"trust.quorum", *_ABSENT}
    signed = trust.signed_by is not None and whole and (status is not Exit.UNTRUSTED or lacking)
    witnessed = trust.verdict is not None and trust.verdict.witnessed
    return (
        Level(number=1, reached=signed, why=_why_signed(trust)),
        Level(
            number=2, reached=signed and trust.held is not None, why=_why_held(trust, facts.head)
        ),
        Level(number=3, reached=signed and witnessed, why=_why_cosigned(trust)),
        Level(number=4, reached=False, why="a third party's timestamp: not offered by this log"),
        Level(number=5, reached=False, why="a key bound to hardware: not offered by this log"),
    )


def _why_signed(trust: Trust) -> str:
    if trust.signed_by is None:
        return "no key you brought signed it"
    if trust.rotations:
        return f"signed by {trust.signed_by.name}; {trust.rotations} change(s) of key followed"
    return f"signed by {trust.signed_by.name}, a key you brought"


def _why_held(trust: Trust, head: Checkpoint | None) -> str:
    if trust.held is None:
        return "no earlier checkpoint of this log was held against it (--checkpoint FILE)"
    if head is not None and trust.held.size == head.size:
        return f"the same head as last time, of {head.size} entries ({trust.held_from})"
    return f"extends the checkpoint of {trust.held.size} entries that you held ({trust.held_from})"


def _why_cosigned(trust: Trust) -> str:
    verdict = trust.verdict
    if verdict is None:
        return "no policy says whose cosignatures count (--policy FILE)"
    if verdict.witnessed:
        names = ", ".join(one.witness for one in verdict.cosigned if not one.operator)
        newest = f"the newest at {moment(verdict.newest)}{verdict.said_ahead()}"
        return f"your policy asks for {verdict.quorum}; cosigned by {names}, {newest}"
    if verdict.quorum_met and any(one.operator for one in verdict.cosigned):
        return "cosigned by the operator's own witnesses only: that adds nothing to its signature"
    if verdict.quorum_met:
        return "your policy asks for no witness"
    return f"your policy asks for {verdict.quorum}; that is not met{verdict.said_ahead()}"


def not_checked(facts: Facts, status: Exit, levels: tuple[Level, ...]) -> tuple[str, ...]:
    """Say what the verdict does not cover."""
    if status is Exit.TAMPERED:
        return ("what else is wrong: after the first entry that is, nothing more is believed",)
    reached = {one.number for one in levels if one.reached}
    unchecked: list[str] = []
    if 3 in reached:
        unchecked.append("what was recorded after the witnesses cosigned: it is not in this copy")
    elif 2 in reached:
        unchecked.append("a tail dropped after the checkpoint you held would not be noticed")
    else:
        unchecked.append(
            "a dropped tail would not be noticed: compare the size with a checkpoint you hold"
        )
    unchecked += _about_keys(facts)
    if 3 not in reached:
        unchecked.append("whether others were shown another history of this log (L3 tells)")
    unchecked += _ALWAYS
    unchecked += [_FORGOT] * facts.forgot
    unchecked += [_CLOSED] * facts.journal_closed
    times = "times are the recording machine's own"
    if facts.clock_back >= 0:
        times += f": its clock was set back before entry {facts.clock_back}"
    unchecked.append(times)
    if not facts.pinned:
        unchecked.append("that it is the log you meant: any log of that key passes (--origin)")
    if facts.isolation:
        same = " (same user id as the recorder)" if facts.isolation == "process" else ""
        unchecked.append(f"the signer's isolation: the log says {facts.isolation!r}{same}")
    if facts.recoveries:
        unchecked.append(f"what {facts.recoveries} crash(es) took before it was recorded")
    if facts.redactions:
        unchecked.append(f"what {facts.redactions} erasure(s) took, which the log itself tells of")
    return tuple(unchecked)


def _about_keys(facts: Facts) -> list[str]:
    """Say where the keys that were brought leave something open."""
    trust, head = facts.trust, facts.head
    if trust is None or head is None:
        return []
    said: list[str] = []
    if trust.passed_over:
        said.append(
            "what is remembered of this log under a key you did not bring: bring its line as well"
        )
    if trust.signed_by is not None and not speaks_for(trust.signed_by.name, head.origin):
        said.append(
            f"that {trust.signed_by.name} may sign for {head.origin}: the names do not correspond,"
            " and any key you bring passes for any log"
        )
    return said


def next_steps(facts: Facts, status: Exit) -> tuple[str, ...]:
    """Say what to do with this verdict."""
    codes = {one.code for one in facts.findings}
    if status is Exit.UNTRUSTED:
        if codes & _UNTRUSTED:
            return ("compare what you brought (key, origin, checkpoint, policy) with its source",)
        asked = "get the key line from the operator, not from this folder, then: "
        return (asked + command(str(facts.directory)),)
    if codes & {"held.rollback", "held.fork", "rotation.fork"}:
        return (
            "keep this folder and the checkpoint you hold: together they prove it to anybody",
            "ask the operator, and whoever else has a copy, for the log's newest state",
        )
    if "head.fork" in codes:
        return (
            "keep this folder unchanged: the two signed heads in it prove the fork to anybody",
            "ask the operator which history is the log's, and whoever else has a copy for theirs",
        )
    if status is Exit.TAMPERED:
        return (
            "keep this folder unchanged, as evidence: the first finding names the first bad entry",
            "get another copy, from the operator or a backup, and verify that one",
        )
    if status is Exit.INCOMPLETE:
        return (
            "ask the operator whether the log was still being written, and for a newer copy",
            f"hold this one's checkpoint against that copy: {PROGRAM} --checkpoint FILE",
        )
    if status is Exit.OK:
        kept = shlex.quote(str(facts.directory / "checkpoint"))
        return (
            f"keep a copy of {kept}: with `{PROGRAM} --checkpoint COPY` a later one that is"
            " shorter, or another history, is found out",
        )
    return ("check the path, and that you may read it",)
