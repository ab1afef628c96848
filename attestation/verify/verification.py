"""Step "verify": check a trace that may have been prepared by an enemy.

Trust comes from the verifier: a key found inside the folder is a claim and nothing else. Every
entry is hashed from its stored bytes and carried up to the signed root; hash tiles only help to
name the first bad entry. Reading is streaming, in constant memory, over all processors, and
follows no link. Nothing of runtime, policies or wasmtime is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.reader import CHECKPOINT, Replayable, count_openings, read_checkpoint
from safeconduct.attestation.tiles import TILE_WIDTH
from safeconduct.errors import TraceInvalid

from .exact import ExactReader
from .join import JoinedChains
from .ranges import RANGE_BUNDLES
from .report import Facts, Finding, Report, clip, make_report
from .summary import Summary
from .tree import Tree
from .trust import TrustPolicy
from .unsigned import Unsigned, look_at_journal
from .vouching import Brought, Recall, Trust
from .worker import MAX_JOBS, check_ranges, usable_cpus

# LIMIT: findings kept; the first is the one that matters.
_MAX_FINDINGS = 20
# LIMIT: keys a verifier may bring.
MAX_KEYS = 64
# LIMIT: handings over of the log's key that are followed.
_MAX_ROTATIONS = 4096
# Below this, starting a worker takes longer than it saves.
_WORKER_BUNDLES = 4 * RANGE_BUNDLES

Progress: TypeAlias = Callable[[int, int], None]
"""Is told, now and then, how many entries of how many are checked."""


def verify_trace(
    directory: Path,
    keys: Sequence[str],
    *,
    origin: str | None = None,
    held: Sequence[tuple[str, bytes]] = (),
    recall: Recall | None = None,
    policy: TrustPolicy | None = None,
    operators: Collection[str] = (),
    now: int | None = None,
    jobs: int | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Verify a trace against what the verifier brings: public key lines, above all.

    ``origin`` pins which log it must be; without it, any log of the key will do, and the report
    says so. ``held`` are checkpoint notes the verifier kept, each with words for where it is
    from: the log must extend them. So must it those that ``recall`` finds for its origin, where
    a trusted key signed them. Of several keys only those whose name speaks for the origin count.
    ``policy`` says which witnesses must have cosigned, and
    ``operators`` which of them are the operator's own; ``now`` is POSIX seconds. ``jobs`` is how
    many processes to use, by default one for each processor. Hostile folders end in a Report,
    never in an exception; only a key line that is no key raises TraceInvalid ``key.invalid``.
    """
    brought = Brought(
        keys=tuple(VerifierKey.parse(line.strip()) for line in keys[:MAX_KEYS]),
        origin=origin,
        held=tuple(held),
        recall=recall,
        policy=policy,
        operators=operators,
        now=now,
    )
    try:
        descriptor = _open(directory)
    except TraceInvalid as error:
        finding = Finding(code=error.code, message=error.message)
        return make_report(Facts(directory=directory, findings=(finding,)))
    try:
        with Folder(descriptor) as folder:
            wanted = usable_cpus() if jobs is None else jobs
            jobs = max(1, min(wanted, MAX_JOBS))
            run = _Verification(folder, descriptor, brought, jobs, on_progress)
            return run.run(directory)
    finally:
        os.close(descriptor)


def _open(directory: Path) -> int:
    """Open the folder once: workers read what we read, whatever takes its name meanwhile."""
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise TraceInvalid(f"{directory}: {why}", code="trace.io") from error


class _Verification:
    """The state of one run: the tree built so far, the chains, the findings."""

    def __init__(
        self,
        folder: Folder,
        descriptor: int,
        brought: Brought,
        jobs: int,
        on_progress: Progress | None,
    ) -> None:
        self._folder, self._descriptor, self._brought = folder, descriptor, brought
        self._jobs, self._on_progress = jobs, on_progress
        self._findings: list[Finding] = []
        self._chains = JoinedChains()
        self._isolation = ""
        self._claimed_line = ""
        self._recoveries = 0
        self._redactions = 0
        self._rotations: list[tuple[int, bytes]] = []
        self._rotation_cut = -1
        self._origins: dict[str, int] = {}
        self._unsigned = Unsigned()
        self._time = -1
        self._clock_back = -1

    def run(self, directory: Path) -> Report:
        """Check tree, entries, chains, journal and then whose word it is."""
        head: Checkpoint | None = None
        trust: Trust | None = None
        claimed: tuple[str, ...] = ()
        try:
            note, head = read_checkpoint(self._folder)
            claimed = tuple(f"{one.name}+{one.id.hex()}" for one in note.signatures)
            trust = Trust(self._folder, note, head, self._brought, self._accuse)
            trust.require_origin()
            trust.check_signatures()
            self._check_tree(head)
        except TraceInvalid as error:
            self._tell(error, CHECKPOINT if head is None else "", error.offset, -1)
        if head is not None and trust is not None and not self._findings:
            try:
                trust.follow(self._rotations, self._rotation_cut)
                trust.name_stranger()
                trust.compare_held()
                trust.judge_witnesses()
                trust.compare_kept()
            except TraceInvalid as error:
                self._accuse(error, CHECKPOINT, -1)
            self._check_origins(head.origin)
            self._check_ends()
            self._unsigned = look_at_journal(self._folder, head.size, self._accuse)
        elif trust is not None and trust.signed_by is not None and self._only_missing():
            # Files that are left out must not keep a rollback, or an unmet quorum, from being told.
            trust.compare_held(whole=False)
            trust.judge_witnesses()
            trust.compare_kept(whole=False)
        return make_report(self._facts(directory, head, trust, claimed))

    # -- the tree ----------------------------------------------------------------------------

    def _check_tree(self, head: Checkpoint) -> None:
        """Hash every entry up to the root. Tiles that disagree name the first bad entry."""
        tree = Tree(self._folder, self._tell)
        exact = ExactReader(self._folder, head.size, self._chains, self._tell)
        bundles = (head.size + TILE_WIDTH - 1) // TILE_WIDTH
        jobs = self._jobs if bundles >= _WORKER_BUNDLES else 1
        checked = check_ranges(
            self._descriptor, head.size, _ranges(bundles), jobs, structure=lambda: exact.sound
        )
        leaves = b""
        for span, fast in checked:
            summary, sound = fast, exact.sound
            if fast.fault >= 0 or (exact.sound and not self._chains.join(fast)):
                summary = exact.read(span)
            # A worker may have parsed ahead of the first bad entry: nothing after that is told.
            if sound:
                self._note_facts(summary, span.start * TILE_WIDTH)
            for root in summary.roots:
                tree.push(root)
            leaves = summary.leaves
            if summary.fault >= 0:
                checked.close()
                return
            exact.sound = exact.sound and not self._findings
            if self._on_progress is not None:
                self._on_progress(summary.at(span), head.size)
        if tree.finish(leaves) != head.root:
            message = f"the {head.size} entries do not hash to the checkpoint's root"
            self._tell(_bad("trace.root", message), CHECKPOINT, -1, -1)

    def _note_facts(self, summary: Summary, first: int) -> None:
        if self._clock_back < 0:
            behind = 0 <= summary.first_time < self._time
            self._clock_back = first if behind else summary.back
        self._time = max(self._time, summary.last_time)
        if summary.key_line:
            self._isolation, self._claimed_line = summary.isolation, summary.key_line
        for origin, index in summary.origins.items() if len(self._origins) < 2 else ():
            self._origins.setdefault(origin, index)
        self._recoveries += summary.recoveries
        self._redactions += summary.redactions
        room = _MAX_ROTATIONS - len(self._rotations)
        self._rotations += summary.rotations[:room]
        cut = [index for index, _ in summary.rotations[room:]] or [summary.cut]
        self._rotation_cut = cut[0] if self._rotation_cut < 0 else self._rotation_cut

    def _check_origins(self, origin: str) -> None:
        """Report a run that another log began: its entries were signed under a name not theirs."""
        for claimed, index in self._origins.items():
            if claimed != origin:
                message = f"this log.open is of the log {claimed}, not of {origin}"
                self._accuse(_bad("log.origin", message), "", index)

    # -- what is left open -------------------------------------------------------------------

    def _check_ends(self) -> None:
        """Report what the signed entries leave open."""
        for session in self._chains.open.values():
            for call, intent in session.calls.items():
                self._accuse(_bad("call.open", f"call {call!r} has no outcome"), "", intent)
            what = "this run of the log" if session.is_log else "a session"
            message = f"{what} is not closed: it was still going on, or its end was cut off"
            self._accuse(_bad("session.open", message), "", session.opened_at)

    def _only_missing(self) -> bool:
        return all(one.code == "trace.missing" for one in self._findings)

    # -- what is told ------------------------------------------------------------------------

    def _accuse(self, error: TraceInvalid, path: str, index: int) -> None:
        self._tell(error, path, -1, index)

    def _tell(self, error: TraceInvalid, path: str, offset: int, index: int) -> None:
        if len(self._findings) < _MAX_FINDINGS:
            said = clip(error.message)
            one = Finding(code=error.code, message=said, index=index, path=path, offset=offset)
            self._findings.append(one)

    def _facts(
        self,
        directory: Path,
        head: Checkpoint | None,
        trust: Trust | None,
        claimed: tuple[str, ...],
    ) -> Facts:
        replayable = Replayable(cut=True)
        with suppress(TraceInvalid, OSError):  # of those that cannot be looked at, nothing is said
            replayable = count_openings(self._folder)
        return Facts(
            directory=directory,
            findings=tuple(self._findings),
            head=head,
            trust=trust,
            pinned=self._brought.origin is not None,
            claimed_keys=claimed,
            claimed_key_line=self._claimed_line,
            sessions=self._chains.sessions,
            calls=self._chains.calls,
            open_sessions=sum(not one.is_log for one in self._chains.open.values()),
            open_calls=self._chains.open_calls,
            unsigned=self._unsigned.entries,
            journal_closed=self._unsigned.closed,
            forgot=self._chains.forgot,
            recoveries=self._recoveries,
            redactions=self._redactions,
            clock_back=self._clock_back,
            isolation=self._isolation,
            replayable=replayable,
        )


def _ranges(bundles: int) -> Iterator[range]:
    for start in range(0, bundles, RANGE_BUNDLES):
        yield range(start, min(start + RANGE_BUNDLES, bundles))


def _bad(code: str, message: str) -> TraceInvalid:
    return TraceInvalid(message, code=code)
