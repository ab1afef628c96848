"""Step "verify": which of a trace's kept heads others than its operator have witnessed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.errors import TraceInvalid

from .trust import TrustPolicy, Verdict

CHECKPOINTS = "checkpoints"


def kept_notes(folder: Folder) -> Iterator[tuple[Checkpoint, Note]]:
    """Yield the notes of earlier heads, largest first; what is no note is passed over.

    Nothing is verified. A head's place in the tree is the reader's to check.
    """
    names = [name for name in folder.names(CHECKPOINTS) if name.isdecimal() and name.isascii()]
    for name in sorted(names, key=lambda one: (len(one), one), reverse=True):
        try:
            note = Note.parse(folder.read(f"{CHECKPOINTS}/{name}", limit=MAX_NOTE_BYTES))
            head = Checkpoint.parse(note.text)
        except TraceInvalid:
            continue
        if str(head.size) == name:
            yield head, note


def newest_witnessed(
    folder: Folder,
    policy: TrustPolicy,
    head: Checkpoint,
    *,
    keys: Sequence[VerifierKey] = (),
    operators: Collection[str] = (),
    now: int | None = None,
) -> Verdict | None:
    """Return the verdict on the newest kept head, up to ``head``, that others witnessed.

    While a log is written its newest head is not cosigned yet, an earlier one is. That this one
    is a head of the same tree is for the caller to prove. Notes with a false line are passed over.
    """
    for kept, note in kept_notes(folder):
        if kept.origin != head.origin or kept.size > head.size:
            continue
        try:
            verdict = policy.evaluate(note, keys=keys, operators=operators, now=now)
        except TraceInvalid:
            continue
        if verdict.witnessed:
            return verdict
    return None
