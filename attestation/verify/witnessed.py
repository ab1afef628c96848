"""Step "verify": which of a trace's kept heads others than its operator have witnessed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import MAX_SIZE
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.errors import TraceInvalid

from .trust import TrustPolicy, Verdict

CHECKPOINTS = "checkpoints"
# LIMIT: earlier heads that are looked at; the names of a hostile folder may all be one file.
MAX_HEADS = 1024
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


def kept_notes(folder: Folder, up_to: int = MAX_SIZE) -> Iterator[tuple[Checkpoint, Note]]:
    """Yield the notes of the newest heads of a size up to this, largest first.

    What is no note is passed over. Nothing is verified. A head's place in the tree is the
    reader's to check.
    """
    sizes = [int(name) for name in folder.names(CHECKPOINTS) if _SIZE.fullmatch(name)]
    for size in sorted((one for one in sizes if one <= up_to), reverse=True)[:MAX_HEADS]:
        name = str(size)
        try:
            note = Note.parse(folder.read(f"{CHECKPOINTS}/{name}", limit=MAX_NOTE_BYTES))
            head = Checkpoint.parse(note.text)
        except TraceInvalid:
            continue
        if head.size == size:
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
    for kept, note in kept_notes(folder, head.size):
        if kept.origin != head.origin:
            continue
        try:
            verdict = policy.evaluate(note, keys=keys, operators=operators, now=now)
        except TraceInvalid:
            continue
        if verdict.witnessed:
            return verdict
    return None
