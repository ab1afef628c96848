"""Step "verify": whose word the checkpoint is, and what else the verifier held against it.

L1 a key the verifier brought signed it (or one that such a key handed the log over to), L2 it
extends a checkpoint the verifier held, L3 it is cosigned as the verifier's policy asks by
witnesses other than the operator. Everything a log says about keys is a claim until one of the
verifier's own keys vouches for it. Called only for a log whose entries hash to its checkpoint.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import verify_consistency
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.attestation.rotation import follow_rotation
from safeconduct.attestation.tiles import TileStore
from safeconduct.errors import TraceInvalid

from .trust import TrustPolicy, Verdict, keys_for, speaks_for
from .witnessed import newest_witnessed

_HEADS = "checkpoints"
_SIZE = re.compile(r"[1-9][0-9]{0,18}")

Accuse = Callable[[TraceInvalid, str, int], None]
"""Take what is wrong, in which file and at which entry."""

Recall = Callable[[str], Sequence[tuple[str, bytes]]]
"""Return the notes remembered of the log of an origin, each with words for where it is from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a verifier brings: nothing of it comes from the log.

    ``held`` are checkpoint notes kept from before (or from somebody else), with the words for
    where each comes from; ``recall`` finds those remembered of the log that is verified, which
    do not count unless a trusted key signed them.
    ``operators`` are witnesses of the policy that belong to the operator.
    ``now`` (POSIX seconds) refuses cosignatures from the future.
    """

    keys: tuple[VerifierKey, ...] = ()
    origin: str | None = None
    held: tuple[tuple[str, bytes], ...] = ()
    recall: Recall | None = None
    policy: TrustPolicy | None = None
    operators: Collection[str] = ()
    now: int | None = None


class Trust:
    """Finds out what may be believed about one checkpoint. ``signed_by`` is None until then."""

    def __init__(
        self, folder: Folder, note: Note, head: Checkpoint, brought: Brought, accuse: Accuse
    ) -> None:
        self._folder, self._note, self._head = folder, note, head
        self._brought, self._accuse = brought, accuse
        listed = listed_keys(brought.policy, head.origin)
        counted = keys_for(head.origin, brought.keys, listed)
        self.trusted: list[VerifierKey] = [*counted, *listed]
        self._strangers = [key for key in brought.keys if key not in counted]
        self._sizes: list[int] | None = None
        self._retired: dict[VerifierKey, VerifierKey] = {}
        self.signed_by: VerifierKey | None = None
        self.rotations = 0
        self.held: Checkpoint | None = None
        self.held_from = ""
        self.passed_over = 0
        self.verdict: Verdict | None = None

    def require_origin(self) -> None:
        """Raise TraceInvalid ``trace.origin`` for another log than the verifier means."""
        if self._brought.origin not in (None, self._head.origin):
            message = f"this is the log {self._head.origin}, not {self._brought.origin}"
            raise TraceInvalid(message, code="trace.origin")

    def check_signatures(self) -> None:
        """Raise TraceInvalid ``checkpoint.signature`` where a trusted key's signature is false."""
        self.signed_by = None
        for key in self.trusted:
            if signs(key, self._note):
                self.signed_by = self.signed_by or key

    def follow(self, rotations: Sequence[tuple[int, bytes]]) -> None:
        """Carry the brought keys over to the ones they handed the log over to."""
        for index, data in rotations:
            try:
                self._rotate(index, data)
            except TraceInvalid as error:
                if error.code != "rotation.stranger":
                    self._accuse(error, "", index)
        self.check_signatures()
        if (
            self.signed_by is not None
            and self.signed_by in self._retired
            and not self._signed_anew()
        ):
            name = self.signed_by.name
            message = f"the head is signed by {name} alone, which handed the log over"
            self._accuse(TraceInvalid(message, code="rotation.retired"), "checkpoint", -1)

    def name_stranger(self) -> None:
        """Where nobody vouches for the log but a key for other logs was brought, say so."""
        for key in self._strangers if self.signed_by is None else ():
            try:
                if not signs(key, self._note):
                    continue
            except TraceInvalid:  # the line of a key that does not count is no accusation
                continue
            message = (
                f"{key.name} signed it, and that name does not speak for {self._head.origin}:"
                " of several keys only one whose name does counts"
            )
            self._accuse(TraceInvalid(message, code="key.origin"), "checkpoint", -1)

    def _signed_anew(self) -> bool:
        fresh = [key for key in self.trusted if key not in self._retired]
        return any(signs(key, self._note) for key in fresh)

    def _rotate(self, index: int, data: bytes) -> None:
        body = parse_entry(data).body
        new = follow_rotation(body, self.trusted, self._head.origin)
        old = VerifierKey.parse(str(body["old"]))
        if self._retired.get(old, new) != new:
            message = f"{old.name} hands the log over a second time, to {new.name}"
            raise TraceInvalid(message, code="rotation.retired")
        path, note, head = self._covering(index)
        if not signs(old, note):
            raise TraceInvalid(
                f"{path} covers the handing over to {new.name} and is not signed by {old.name}",
                code="rotation.uncovered",
            )
        self._require_extends(head, "rotation.fork", f"{path}, signed by {old.name},")
        self.rotations += 1
        self._retired[old] = new
        if new not in self.trusted:
            self.trusted.append(new)

    def _covering(self, index: int) -> tuple[str, Note, Checkpoint]:
        """Return the smallest stored checkpoint that covers an entry; at last the newest one."""
        if self._sizes is None:  # read once: a log may be handed over thousands of times
            names = [name for name in self._folder.names(_HEADS) if _SIZE.fullmatch(name)]
            self._sizes = sorted(size for size in map(int, names) if size < self._head.size)
        at = bisect_right(self._sizes, index)
        if at == len(self._sizes):
            return "checkpoint", self._note, self._head
        path = f"{_HEADS}/{self._sizes[at]}"
        note = Note.parse(self._folder.read(path, limit=MAX_NOTE_BYTES))
        head = Checkpoint.parse(note.text)
        if head.size != self._sizes[at] or head.origin != self._head.origin:
            raise TraceInvalid(f"{path} is of another log", code="rotation.uncovered")
        return path, note, head

    def compare_held(self, *, whole: bool = True) -> None:
        """Hold the log against the checkpoints the verifier brought.

        Without the ``whole`` tree only size and root are compared, and L2 is not reached.
        """
        for source, data in self._brought.held:
            try:
                self._compare(source, Note.parse(data), whole)
            except TraceInvalid as error:
                self._accuse(error, "", -1)
        self._compare_remembered(whole)

    def _compare_remembered(self, whole: bool) -> None:
        """Compare what is remembered under keys trusted now; count what is under others."""
        recall = self._brought.recall
        for source, data in recall(self._head.origin) if recall else ():
            try:
                note = Note.parse(data)
                known = self._signed(note)
            except TraceInvalid:  # a damaged memory is none
                continue
            if not known:
                self.passed_over += 1
                continue
            try:
                self._compare(source, note, whole)
            except TraceInvalid as error:
                self._accuse(error, "", -1)

    def _compare(self, source: str, note: Note, whole: bool) -> None:
        held = Checkpoint.parse(note.text)
        if held.origin != self._head.origin:
            message = f"the checkpoint held ({source}) is of the log {held.origin}"
            raise TraceInvalid(message, code="held.untrusted")
        if not self._signed(note):
            message = f"no key of yours signed the checkpoint held ({source})"
            raise TraceInvalid(message, code="held.untrusted")
        if held.size > self._head.size:
            raise TraceInvalid(
                f"you hold a signed checkpoint of {held.size} entries ({source}) and this log ends"
                f" after {self._head.size}: entries were cut off, or it is an old copy",
                code="held.rollback",
            )
        if not whole and held.size < self._head.size:
            return
        what = f"the checkpoint you hold ({source})"
        if not whole:
            if held.root != self._head.root:
                raise TraceInvalid(f"{what} has another root", code="held.fork")
            return
        self._require_extends(held, "held.fork", what)
        if held.size and (self.held is None or held.size > self.held.size):
            self.held, self.held_from = held, source

    def _signed(self, note: Note) -> bool:
        return any(signs(key, note) for key in self.trusted)

    def _require_extends(self, old: Checkpoint, code: str, what: str) -> None:
        """Prove, from hashes that need not be believed, that the head extends an older one."""
        head = self._head
        tiles = TileStore.load(self._folder, head.size)
        proof = tiles.prove_consistency(old.size, head.size)
        if not verify_consistency(old.size, old.root, head.size, head.root, proof):
            raise TraceInvalid(
                f"{what} is of another history of this log: the two were signed apart",
                code=code,
                hint="keep both checkpoints: together they prove that the log was forked",
            )

    def judge_witnesses(self) -> None:
        """Hold the checkpoint against the verifier's policy of witnesses."""
        policy = self._brought.policy
        if policy is None:
            return
        try:
            self.verdict = policy.evaluate(
                self._note,
                keys=self.trusted,
                operators=self._brought.operators,
                now=self._brought.now,
            )
        except TraceInvalid as error:
            self._accuse(error, "checkpoint", -1)
            return
        if self.signed_by is None or self.verdict.enough:
            return
        try:
            if self._witnessed_before(policy):
                return
        except TraceInvalid as error:
            self._accuse(error, "checkpoint", -1)
            return
        self._accuse(TraceInvalid(self.verdict.lacking(), code="trust.quorum"), "checkpoint", -1)

    def _witnessed_before(self, policy: TrustPolicy) -> bool:
        """Look for an earlier head with its quorum: while a log is written its newest has none."""
        found = newest_witnessed(
            self._folder,
            policy,
            self._head,
            keys=self.trusted,
            operators=self._brought.operators,
            now=self._brought.now,
        )
        if found is None:
            return False
        size = found.head.size
        self._require_extends(found.head, "trust.fork", f"the witnessed head of {size} entries")
        tail = self._head.size - size
        message = f"the last {tail} entries are not witnessed yet; the {size} before them are"
        self._accuse(TraceInvalid(message, code="trust.tail"), "checkpoint", -1)
        return True


def listed_keys(policy: TrustPolicy | None, origin: str) -> list[VerifierKey]:
    """Return a policy's log keys that speak for an origin, by the names they have in the file."""
    logs = policy.logs if policy else ()
    return [one.key for one in logs if one.key and speaks_for(one.key.name, origin)]


def signs(key: VerifierKey, note: Note) -> bool:
    """Tell whether a key signed a note. Raise ``checkpoint.signature`` where its line is false."""
    found = False
    named = key.of_log(note.text.partition("\n")[0])
    for line in note.signatures:
        if not named.made(line):
            continue
        if not named.verifies(line, note.text):
            raise TraceInvalid(
                f"the signature of {key.name} on the checkpoint of {note.text.split()[1]} entries"
                " is false",
                code="checkpoint.signature",
            )
        found = True
    return found
