"""Step "verify": whose word the checkpoint is, and what else the verifier held against it.

L1 a key the verifier brought signed it (or one that such a key handed the log over to), L2 it
extends a checkpoint the verifier held, L3 it is cosigned as the verifier's policy asks by
witnesses other than the operator. Everything a log says about keys is a claim until one of the
verifier's own keys vouches for it. Called only for a log whose entries hash to its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note, VerifierKey
from safeconduct.errors import TraceInvalid

from .handover import Handovers, require_extends, signs
from .kept import compare_kept
from .trust import TrustPolicy, Verdict, keys_for, speaks_for
from .witnessed import newest_witnessed

Accuse = Callable[[TraceInvalid, str, int], None]
"""Take what is wrong, in which file and at which entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """A note that is remembered of a log, with words for where it is from.

    ``signer`` and ``under``, the mark of another key, are there where a verification carried trust
    over from that key to the signer: who trusts the one then believes this note of the other.
    """

    source: str
    note: bytes
    under: str = ""
    signer: VerifierKey | None = None


Recall = Callable[[str], Sequence[Recalled]]
"""Return what is remembered of the log of an origin."""


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
        self._handovers = Handovers(folder, note, head, self.trusted)
        self.signed_by: VerifierKey | None = None
        self.held: Checkpoint | None = None
        self.held_from = ""
        self.passed_over = 0
        self.verdict: Verdict | None = None

    @property
    def rotations(self) -> int:
        """Return how many changes of key were followed."""
        return self._handovers.count

    @property
    def carried_from(self) -> list[VerifierKey]:
        """Return the trusted keys from which trust was carried over to the one that signed."""
        new, leads_to = self.signed_by, self._handovers.leads_to
        return [key for key in self.trusted if leads_to(key, new)] if new is not None else []

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

    def follow(self, rotations: Sequence[tuple[int, bytes]], cut: int = -1) -> None:
        """Carry the brought keys over to the ones they handed the log over to.

        ``cut`` is the first ``key.rotate`` entry that is too large, or one too many: a key may
        have been ended by it. INVARIANT: none is passed over in silence.
        """
        for index, data in rotations:
            try:
                self._handovers.follow(index, data)
            except TraceInvalid as error:
                if error.code != "rotation.stranger":
                    self._accuse(error, "", index)
        if cut >= 0:
            message = "a change of key is too large, or one of too many, to be followed"
            self._accuse(TraceInvalid(message, code="rotation.limit"), "", cut)
        self.check_signatures()
        signer = self.signed_by
        if signer is None or not self._handovers.ended(signer) or self._handovers.signed_anew():
            return
        message = f"the head is signed by {signer.name} alone, which handed the log over"
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
        for one in recall(self._head.origin) if recall else ():
            try:
                note = Note.parse(one.note)
                known = self._signed(note) or self._was_carried(one, note)
            except TraceInvalid:  # a damaged memory is none
                continue
            if not known:
                self.passed_over += 1
                continue
            try:
                self._compare(one.source, note, whole, known=True)
            except TraceInvalid as error:
                self._accuse(error, "", -1)

    def _was_carried(self, one: Recalled, note: Note) -> bool:
        """Tell whether trust in a key of ours was carried over to the signer of a note."""
        ours = any(one.under == key_mark(key) for key in self.trusted)
        return ours and one.signer is not None and signs(one.signer, note)

    def _compare(self, source: str, note: Note, whole: bool, *, known: bool = False) -> None:
        held = Checkpoint.parse(note.text)
        if held.origin != self._head.origin:
            message = f"the checkpoint held ({source}) is of the log {held.origin}"
            raise TraceInvalid(message, code="held.untrusted")
        if not known and not self._signed(note):
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
        require_extends(self._folder, self._head, old, code, what)

    def compare_kept(self, *, whole: bool = True) -> None:
        """Hold the log against its other heads that lie in the folder, signed by a trusted key."""
        if self.signed_by is None:
            return
        folder, head, keys = self._folder, self._head, self.trusted
        try:
            compare_kept(folder, head, keys, lambda e, path: self._accuse(e, path, -1), whole=whole)
        except TraceInvalid as error:  # a folder in the place of which something else stands
            self._accuse(error, "", -1)

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


def key_mark(key: VerifierKey) -> str:
    """Return what names a key in the verifier's memory."""
    return sha256(key.public).hexdigest()[:16]


def listed_keys(policy: TrustPolicy | None, origin: str) -> list[VerifierKey]:
    """Return a policy's log keys that speak for an origin, by the names they have in the file."""
    logs = policy.logs if policy else ()
    return [one.key for one in logs if one.key and speaks_for(one.key.name, origin)]
