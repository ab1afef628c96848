"""Step "verify": check a proof, a session bundle or a statement that somebody handed on.

What it is about is checked first, then who vouches for it. Brought comes from the verifier: key
lines, or a tlog-policy of logs, witnesses and a quorum. Nothing of the log itself is needed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import Entry, parse_entry
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import Note, VerifierKey
from safeconduct.attestation.verify.report import Finding, clip
from safeconduct.attestation.verify.trust import TrustPolicy, keys_for
from safeconduct.attestation.verify.vouching import Brought, listed_keys
from safeconduct.errors import Exit, TraceInvalid

from .bundle import FIRST_LINE as _BUNDLE_LINE
from .bundle import read_bundle_file
from .evidence_report import PROGRAM, Evidence
from .proof import FIRST_LINE as _PROOF_LINE
from .proof import MAX_PROOF_BYTES, LogProof
from .statement import MAX_ENVELOPE_BYTES, Envelope, Statement

_NOBODY = TrustPolicy(logs=(), witnesses=(), groups=(), quorum="none")
_RECORDED = "whether what was recorded is what happened: it is what the log's operator recorded"
# LIMIT: bytes looked at to tell what kind of file this is.
_LOOKED_AT = 64


@dataclass(slots=True)
class _Facts:
    """What has been found so far."""

    kind: str
    head: Checkpoint | None = None
    level: int = 0
    signed_by: str = ""
    witnesses: tuple[str, ...] = ()
    quorum: str = ""
    claimed: tuple[str, ...] = ()
    index: int = -1
    leaf: bytes = b""
    session: str = ""
    entries: int = 0
    complete: bool = True
    shows: list[str] = field(default_factory=list[str])
    unchecked: list[str] = field(default_factory=list[str])
    doubts: list[Finding] = field(default_factory=list[Finding])
    newest: int = -1

    def doubt(self, code: str, message: str) -> None:
        """Note why trust is not established; whether the file is true is looked at all the same."""
        self.doubts.append(Finding(code=code, message=message))


def check_file(
    stream: BinaryIO, brought: Brought, *, entry: bytes | None = None, name: str = "FILE"
) -> Evidence:
    """Check a proof, bundle or statement, told apart by how it begins; the stream can seek.

    ``entry`` is one that a proof must be about, and a bundle or statement hold. ``name`` stands
    in the commands that the result suggests. Hostile files end in an Evidence, never in an
    exception.
    """
    start = stream.read(_LOOKED_AT)
    stream.seek(0)
    if start.startswith(_BUNDLE_LINE.encode()):
        return _conclude(
            _Facts("session bundle"), name, lambda facts: _bundle(facts, stream, brought, entry)
        )
    if start.startswith(b"{"):
        data = stream.read(MAX_ENVELOPE_BYTES + 1)
        return _conclude(
            _Facts("statement"), name, lambda facts: _statement(facts, data, brought, entry)
        )
    data = stream.read(MAX_PROOF_BYTES + 1)
    if not data.startswith(_PROOF_LINE.encode()):
        finding = Finding(code="proof.unknown", message="this is no proof, bundle or statement")
        return Evidence(kind="file", status=Exit.TRACE_IO, findings=(finding,))
    return _conclude(_Facts("proof"), name, lambda facts: _proof(facts, data, brought, entry))


def _conclude(facts: _Facts, name: str, check: Callable[[_Facts], None]) -> Evidence:
    findings: tuple[Finding, ...] = ()
    try:
        check(facts)
        status = Exit.OK if facts.complete else Exit.INCOMPLETE
    except TraceInvalid as error:
        # Of a file's own bytes there is nothing to read again: what does not parse is not true.
        status = Exit.UNTRUSTED if error.code == "trace.origin" else Exit.TAMPERED
        findings = (Finding(code=error.code, message=clip(error.message), index=error.offset),)
    findings += tuple(facts.doubts)
    if status in (Exit.OK, Exit.INCOMPLETE) and (facts.doubts or not facts.signed_by):
        status = Exit.UNTRUSTED
    good = status in (Exit.OK, Exit.INCOMPLETE)
    return Evidence(
        kind=facts.kind,
        status=status,
        level=facts.level if good else 0,
        origin=facts.head.origin if facts.head else "",
        size=facts.head.size if facts.head else 0,
        root=facts.head.root.hex() if facts.head else "",
        signed_by=facts.signed_by,
        witnesses=facts.witnesses,
        quorum=facts.quorum,
        newest=facts.newest,
        claimed_keys=facts.claimed,
        index=facts.index,
        leaf=facts.leaf.hex(),
        session=facts.session,
        entries=facts.entries,
        shows=tuple(facts.shows) if status is not Exit.TAMPERED else (),
        findings=findings,
        not_checked=(*facts.unchecked, _RECORDED),
        next_step=_next_step(status, name),
    )


def _next_step(status: Exit, name: str) -> str:
    if status is not Exit.UNTRUSTED:
        return ""
    command = f"{PROGRAM} --key 'NAME+HASH+BASE64' {shlex.quote(name)}"
    return f"get the key line, or the policy, from the operator, then: {command}"


def _judge(facts: _Facts, checkpoint: bytes, brought: Brought) -> Checkpoint:
    """Find out who vouches for a signed head."""
    note = Note.parse(checkpoint)
    facts.claimed = tuple(f"{one.name}+{one.id.hex()}" for one in note.signatures)
    head = facts.head = Checkpoint.parse(note.text)
    _require_origin(head.origin, brought)
    policy = brought.policy or _NOBODY
    keys = keys_for(head.origin, brought.keys, listed_keys(brought.policy, head.origin))
    verdict = policy.evaluate(note, keys=keys, operators=brought.operators, now=brought.now)
    if verdict.log is None:
        strangers = [key for key in brought.keys if key not in keys and _claimed(key, note)]
        _doubt_strangers(facts, strangers)
        return head
    facts.signed_by = _brought_name(verdict.log, brought)
    facts.witnesses = tuple(one.witness for one in verdict.cosigned)
    facts.quorum = verdict.quorum if brought.policy else ""
    facts.newest = verdict.newest
    if not verdict.enough:
        facts.doubt("trust.quorum", verdict.lacking())
    facts.level = 3 if verdict.witnessed else 1
    if not verdict.witnessed:
        facts.unchecked.append(
            "whether others were shown another log: no independent witness counts here"
        )
    if brought.origin is None and brought.policy is None:
        facts.unchecked.append("that it is the log you meant: any log of that key passes")
    return head


def _claimed(key: VerifierKey, note: Note) -> bool:
    named = key.of_log(note.text.partition("\n")[0])
    return any(named.made(one) and named.verifies(one, note.text) for one in note.signatures)


def _doubt_strangers(facts: _Facts, strangers: Sequence[VerifierKey]) -> None:
    """Say why a key that was brought and did sign does not count."""
    for key in strangers:
        origin = facts.head.origin if facts.head else ""
        facts.doubt(
            "key.origin",
            f"{key.name} signed it, and that name does not speak for {origin}:"
            " of several keys only one whose name does counts",
        )


def _brought_name(key: VerifierKey, brought: Brought) -> str:
    """Return the name under which the verifier brought a key; a log's own is its origin."""
    return next((one.name for one in brought.keys if one.public == key.public), key.name)


def _require_origin(origin: str, brought: Brought) -> None:
    if brought.origin not in (None, origin):
        raise TraceInvalid(f"this is the log {origin}, not {brought.origin}", code="trace.origin")


def _proof(facts: _Facts, data: bytes, brought: Brought, entry: bytes | None) -> None:
    proof = LogProof.parse(data)
    head = _judge(facts, proof.checkpoint, brought)
    facts.index, facts.entries = proof.index, 1
    given = entry if entry is not None else proof.entry
    leaf = leaf_hash(given) if given is not None else proof.leaf
    if leaf is None:
        raise TraceInvalid(
            "it does not say which entry it is about: name the entry's file", code="proof.entry"
        )
    if proof.leaf not in (None, leaf) or proof.entry not in (None, given):
        raise TraceInvalid("it is about another entry than the one given", code="proof.entry")
    facts.leaf = leaf
    if not proof.holds(leaf, head):
        raise TraceInvalid("the entry is not where the proof says", code="proof.hash")
    facts.shows.append(f"entry {proof.index} of {head.origin} has the hash {leaf.hex()}")
    if given is None:
        facts.unchecked.append("what the entry says: the proof holds its hash alone")
        return
    said = parse_entry(given)
    facts.session = said.session
    facts.shows.append(_sentence(proof.index, said))


def _find(facts: _Facts, indices: Sequence[int], leaves: Sequence[bytes], entry: bytes) -> None:
    """Require the entry that somebody asks about among those that a file holds."""
    leaf = leaf_hash(entry)
    if leaf not in leaves:
        raise TraceInvalid("the entry given is not among those it holds", code="proof.entry")
    facts.index, facts.leaf = indices[leaves.index(leaf)], leaf
    facts.shows.append(f"the entry given is entry {facts.index}, with the hash {leaf.hex()}")


def _bundle(facts: _Facts, stream: BinaryIO, brought: Brought, entry: bytes | None) -> None:
    bundle = read_bundle_file(stream)
    head = _judge(facts, bundle.checkpoint, brought)
    facts.session, facts.entries = bundle.session, len(bundle.indices)
    if not bundle.holds(head):
        raise TraceInvalid("its entries are not in the signed tree", code="bundle.hash")
    if entry is not None:
        _find(facts, bundle.indices, bundle.leaves, entry)
    facts.complete = bundle.closed
    calls = f"{bundle.calls} calls ({bundle.open_calls} without outcome)"
    facts.shows.append(f"session {bundle.session}: {len(bundle.indices)} entries, {calls}")
    if bundle.closed:
        facts.shows.append("it is whole: from its first entry to its end, none is missing")
    else:
        facts.shows.append(
            "it is whole up to its last entry here; its end is not: it went on, or was cut off"
        )
    facts.unchecked.append("whether the log holds a second session of that id: verify the trace")
    if bundle.forgot:
        facts.unchecked.append("whether it uses the id of a call twice: it has too many calls")


def _statement(facts: _Facts, data: bytes, brought: Brought, entry: bytes | None) -> None:
    envelope = Envelope.parse(data)
    statement = Statement.parse(envelope.payload)
    facts.head, origin = statement.head, statement.head.origin
    _require_origin(origin, brought)
    facts.claimed = tuple(one.keyid for one in envelope.signatures)
    listed = listed_keys(brought.policy, origin)
    keys = [*listed, *keys_for(origin, brought.keys, listed)]
    signer = envelope.signer([key.of_log(origin) for key in keys])
    if signer is None:
        others = [key for key in brought.keys if key not in keys]
        _doubt_strangers(facts, [key for key in others if envelope.signer([key.of_log(origin)])])
    facts.entries, facts.session = len(statement.entries), statement.session
    if entry is not None:
        leaves = [leaf_hash(held) for _, held, _ in statement.entries]
        _find(facts, [index for index, _, _ in statement.entries], leaves, entry)
    facts.shows += [_sentence(index, said) for index, _, said in statement.entries]
    if signer is not None:
        facts.signed_by, facts.level = _brought_name(signer, brought), 1
        if brought.policy is not None and brought.policy.quorum != "none":
            facts.doubt(
                "trust.quorum", "a statement has no cosignatures, and the policy wants some"
            )
    facts.unchecked.append("that the entries are in the tree: the signer says that it checked")
    if not statement.unbroken:
        facts.unchecked.append(
            "that these entries are of one use of the id: others stand between them (verify the"
            " trace: no id is used twice)"
        )
    facts.unchecked.append("whether the call or session has other entries (export --session shows)")


def _sentence(index: int, entry: Entry) -> str:
    """Say what an entry is, in words that came out of it."""
    words = [f"entry {index} is {entry.kind} of session {entry.session}"]
    for name in ("call", "tool", "effect", "status"):
        if isinstance(entry.body.get(name), str):
            words.append(f"{name} {entry.body[name]}")
    return ", ".join(words)


def trusted_keys(lines: Sequence[str]) -> tuple[VerifierKey, ...]:
    """Parse key lines. Raise TraceInvalid ``key.invalid``."""
    return tuple(VerifierKey.parse(line.strip()) for line in lines)
