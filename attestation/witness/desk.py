"""Witness step 2: whether to cosign a checkpoint (C2SP tlog-witness, "add-checkpoint").

A cosignature says: this is the largest tree of this log that I have seen, and it extends every
one I cosigned before. So at most one of two forks is ever cosigned, whoever holds the log's key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

from safeconduct.attestation.cosignature import Cosignature, CosigningKey
from safeconduct.attestation.merkle import EMPTY_ROOT, verify_consistency
from safeconduct.attestation.note import Note, VerifierKey
from safeconduct.attestation.verify.trust import speaks_for
from safeconduct.attestation.writing.cosigned import signature_line
from safeconduct.errors import TraceInvalid

from .state import Held, WitnessState, damaged
from .submission import MAX_BODY_BYTES, Submission

TEXT: Final = "text/plain; charset=utf-8"
SIZE: Final = "text/x.tlog.size"
# LIMIT: how far the witness's clock may have stepped back; what was cosigned "as of" a later time
# would contradict a cosignature of an earlier one.
_MAX_STEP_BACK_S = 300
# LIMIT: signatures of the log's own that are kept beside a cosignature.
_MAX_LOG_LINES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer: status, body, and what the body is."""

    status: int
    body: bytes = b""
    kind: str = TEXT


class _Refused(Exception):
    """The request ends here with this answer."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.answer = Answer(status=status, body=f"{why}\n".encode())


class Witness:
    """A witness for the logs it knows. Thread-safe: one request is judged at a time.

    INVARIANT: a head is compared with the one held, and takes its place, under one lock; and the
    new one is on disk before its cosignature leaves.
    """

    def __init__(
        self,
        key: CosigningKey,
        logs: Sequence[VerifierKey],
        state: WitnessState,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Serve ``logs``: each key speaks for the origin of its name and those below it."""
        self._key, self._logs, self._state, self._clock = key, tuple(logs), state, clock
        self._verifier = key.verifier
        self._lock = Lock()

    def add_checkpoint(self, body: bytes) -> Answer:
        """Judge one request and cosign its checkpoint if it extends the one held."""
        try:
            if len(body) > MAX_BODY_BYTES:
                raise _Refused(413, "the request is too large")
            try:
                sent = Submission.parse(body)
            except TraceInvalid as error:
                raise _Refused(400, error.message) from error
            self._require_signed(sent)
            if sent.old_size > sent.head.size:
                raise _Refused(400, "the old size is larger than the checkpoint's")
            with self._lock:
                return self._cosign(sent, body)
        except _Refused as refused:
            return refused.answer

    def checkpoint(self, name: str) -> Answer:
        """Return the note held for a log, by the hash of its origin."""
        try:
            with self._lock:
                held = self._state.by_hash(name)
        except TraceInvalid as error:
            return Answer(status=500, body=f"{error.message}\n".encode())
        if held is None:
            return Answer(status=404, body=b"no checkpoint of this log was ever cosigned\n")
        return Answer(status=200, body=held.data)

    def evidence(self, name: str, piece: str = "") -> Answer:
        """Return one piece of evidence about a log, or the names of all."""
        with self._lock:
            if not self._state.knows(name):
                return Answer(status=404, body=b"this log is unknown\n")
            if not piece:
                names = self._state.evidence(name)
                return Answer(status=200, body="".join(f"{one}\n" for one in names).encode())
            data = self._state.read_evidence(name, piece)
        if data is None:
            return Answer(status=404, body=b"there is no such evidence\n")
        return Answer(status=200, body=data)

    def _cosign(self, sent: Submission, body: bytes) -> Answer:
        origin, head = sent.head.origin, sent.head
        held = self._remembered(origin)
        held_size = held.head.size if held else 0
        if held is not None:
            self._look_for_fork(held, sent, body)
        if sent.old_size != held_size:
            return Answer(status=409, body=f"{held_size}\n".encode(), kind=SIZE)
        if head.size == 0 and head.root != EMPTY_ROOT:
            raise _Refused(422, "an empty tree has another root")
        if not _extends(held, sent):
            if held is not None and head.size > held_size:
                self._state.accuse("unproven", held, body, head)
            raise _Refused(422, "the proof does not lead from the tree cosigned before")
        if held is None and self._state.is_full():
            raise _Refused(429, "there is no room for another log")
        # Extension lines are part of what is cosigned (tlog-cosignature), so not head.text().
        line = self._key.sign(sent.note.text, time=self._time(held)).line
        data = _cosigned_note(sent.note, self._known_lines(sent), line)
        try:
            self._state.keep(Held(head=head, note=Note.parse(data), data=data))
        except TraceInvalid as error:
            raise _Refused(500, error.message) from error
        return Answer(status=200, body=line.encode())

    def _look_for_fork(self, held: Held, sent: Submission, body: bytes) -> None:
        """Keep evidence: what is signed can never be taken back."""
        if sent.head.size == held.head.size and sent.head.root != held.head.root:
            self._state.accuse("fork", held, body, sent.head)
        elif sent.head.size < held.head.size:
            self._state.accuse("behind", held, body, sent.head)

    def _require_signed(self, sent: Submission) -> None:
        """Refuse unless a known log's key signed, and no line that claims one is false."""
        keys = self._keys(sent.head.origin)
        if not keys:
            raise _Refused(404, "this log is unknown here")
        good = False
        for key in keys:
            for line in sent.note.signatures:
                if not key.made(line):
                    continue
                if not key.verifies(line, sent.note.text):
                    raise _Refused(403, "the log's signature is false")
                good = True
        if not good:
            raise _Refused(403, "no key known for this log signed the checkpoint")

    def _keys(self, origin: str) -> list[VerifierKey]:
        return [key.of_log(origin) for key in self._logs if speaks_for(key.name, origin)]

    def _known_lines(self, sent: Submission) -> list[str]:
        """Return the log's own signature lines; what strangers added is not passed on."""
        lines: dict[str, str] = {}
        for key in self._keys(sent.head.origin)[:_MAX_LOG_LINES]:
            # One for each key: whoever has the key can sign the same text in many ways.
            for line in sent.note.signatures:
                if key.made(line):
                    lines.setdefault(key.line, signature_line(line))
        return list(lines.values())

    def _time(self, held: Held | None) -> int:
        now = int(self._clock())
        last = self._last_time(held)
        if now < 1 or now < last - _MAX_STEP_BACK_S:
            raise _Refused(503, "the witness's clock went back")
        return max(now, last)

    def _last_time(self, held: Held | None) -> int:
        lines = held.note.signatures if held else ()
        found = [Cosignature.parse(line) for line in lines if self._verifier.made(line)]
        return max((one.time for one in found if one is not None), default=0)

    def _remembered(self, origin: str) -> Held | None:
        """Return the head held for a log, after looking whether it is one that was cosigned."""
        try:
            held = self._state.held(origin)
            if held is not None:
                self._require_known(held)
        except TraceInvalid as error:
            raise _Refused(500, error.message) from error
        return held

    def _require_known(self, held: Held) -> None:
        """Raise unless a key of the log, or ours, signed it: else it is not this memory."""
        text = held.note.text
        for line in held.note.signatures:
            if self._verifier.verified(line, text) is not None:
                return
            keys = self._keys(held.head.origin)
            if any(key.made(line) and key.verifies(line, text) for key in keys):
                return
        raise damaged(f"the head of {held.head.origin[:80]!r} is not signed by a key that is known")


def _extends(held: Held | None, sent: Submission) -> bool:
    if held is None:
        return not sent.proof
    head, old = sent.head, held.head
    return verify_consistency(old.size, old.root, head.size, head.root, sent.proof)


def _cosigned_note(note: Note, lines: Sequence[str], cosignature: str) -> bytes:
    return f"{note.text}\n{''.join(lines)}{cosignature}".encode()
