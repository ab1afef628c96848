"""Erasing a session: gone from every file, said in the log, proofs intact, at any crash."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from errno import EIO, ENOSPC
from functools import partial
from pathlib import Path

import pytest

from safeconduct.attestation import Missing, Opening, TraceWriter, read_entries, read_opened
from safeconduct.attestation.entry import committed_digest
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.privacy.erasure import (
    DAY_MS,
    erase_closed_before,
    erase_sessions,
    finish_erasures,
    keep_retention,
    order_erasure,
)
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.writing.appending import Clock
from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench, record_call  # noqa: TID251 - the tests' own kit
from .test_vault import (  # noqa: TID251 - the tests' own kit
    SECRET,
    files_with,
    lines_of,
    record_large,
    vault_of,
    write_secrets,
)


@contextmanager
def open_writer(
    bench: Bench, vault: Vault | None, *, clock: Clock | None = None
) -> Generator[TraceWriter]:
    with (
        closing(bench.signer()) as signer,
        TraceWriter.open(bench.trace, signer=signer, vault=vault, clock=clock or Clock()) as writer,
    ):
        yield writer


def opened_of(trace: Path, vault: Vault | None, session: str) -> set[str]:
    """Return what became of a session's openings: opened, or why not."""
    return {
        one.code if isinstance(one, Missing) else "opened"
        for _, entry, found in read_opened(trace, vault=vault)
        for one in found.values()
        if entry.session == session
    }


def redactions(trace: Path) -> list[dict[str, object]]:
    return [entry.body for _, entry in read_entries(trace) if entry.kind is EntryKind.REDACTION]


def remains(bench: Bench, session: str, ciphertext: set[bytes]) -> list[str]:
    """Return every file of trace and keys that holds anything of a session.

    The open journal keeps what was encrypted with the destroyed key until it is signed for.
    """
    folders = (bench.trace, bench.root / "keys")
    names = [str(path) for folder in folders for path in folder.rglob(f"*{session}*")]
    held = [name for piece in ciphertext for name in files_with(piece, *folders)]
    return [*names, *(name for name in held if not name.endswith(".wal"))]


def pieces(bench: Bench, session: str) -> set[bytes]:
    """Return tell-tale bytes of a session's key, openings and blobs as they lie on disk."""
    openings = lines_of(bench.trace, session)
    keys = [path.read_bytes()[-60:] for path in (bench.root / "keys" / "vault").rglob(session)]
    digests = {
        digest
        for _, entry in read_entries(bench.trace)
        if entry.session == session
        for value in entry.body.values()
        if (digest := committed_digest(value)) is not None
    }
    blobs = [bench.trace / "blobs" / digest for digest in digests]
    held = [blob.read_bytes()[:64] for blob in blobs if blob.exists()]
    assert len(held) == 1
    told = [str(line.get("sealed") or line["salt"])[:64].encode() for line in openings]
    return {*keys, *held, *told}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "plain"])
def test_nothing_of_an_erased_session_remains_and_the_rest_does(bench: Bench, sealed: bool) -> None:
    vault = vault_of(bench)
    gone, kept = write_secrets(bench, vault if sealed else None, sessions=2)
    before = pieces(bench, gone)
    assert len(before) >= 4
    assert all(files_with(piece, bench.trace, bench.root / "keys") for piece in before)
    with open_writer(bench, vault) as writer:
        (done,) = erase_sessions(writer, [gone], reason="asked by the person")
        assert (done.session, done.found, done.blobs) == (gone, True, 1)
        assert remains(bench, gone, before) == []
    assert remains(bench, gone, before) == []
    assert bool(files_with(SECRET.encode(), bench.trace)) is not sealed  # of the other session
    assert opened_of(bench.trace, vault, gone) == {"opening.missing"}
    assert opened_of(bench.trace, vault, kept) == {"opened"}
    assert redactions(bench.trace) == [
        {"session": gone, "what": "openings", "by": "operator", "reason": "asked by the person"}
    ]
    report = bench.verify()
    assert (report.status, report.calls, report.complete) == (Exit.OK, 4, True)


def test_copies_made_before_cannot_be_read_afterwards(bench: Bench) -> None:
    vault = vault_of(bench)
    (gone,) = write_secrets(bench, vault)
    copy = bench.root / "copy"
    shutil.copytree(bench.trace, copy)
    assert opened_of(copy, vault, gone) == {"opened"}
    with open_writer(bench, vault) as writer:
        erase_sessions(writer, [gone])
    assert opened_of(copy, vault, gone) == {"opening.sealed"}


def test_an_open_session_goes_on_unread(bench: Bench) -> None:
    vault = vault_of(bench)
    with open_writer(bench, vault) as writer:
        gone, kept = (writer.open_session("local", "sdk") for _ in range(2))
        for session in (gone, kept):
            record_call(writer, session, f"a{session}", path=f"/ws/{SECRET}")
            record_large(writer, session, f"b{session}")
        writer.checkpoint()
        before = pieces(bench, gone)
        erase_sessions(writer, [gone])
        for session in (gone, kept):
            record_call(writer, session, f"c{session}", path=f"/ws/{SECRET}")
            record_large(writer, session, f"d{session}")
        writer.checkpoint()
        assert remains(bench, gone, before) == []
        assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []
        writer.close_session(gone)
    assert remains(bench, gone, before) == []
    assert opened_of(bench.trace, vault, gone) == {"opening.missing"}
    assert opened_of(bench.trace, vault, kept) == {"opened"}
    assert bench.verify().status == Exit.OK


def test_an_unknown_session_erases_nothing_at_all(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    with open_writer(bench, vault) as writer, pytest.raises(TraceInvalid) as caught:
        erase_sessions(writer, [session, "0000"])
    assert caught.value.code == "erase.unknown"
    assert opened_of(bench.trace, vault, session) == {"opened"}
    assert redactions(bench.trace) == []
    for bad in ("../../keys/vault", "", "a" * 65, session[:8]):
        with open_writer(bench, vault) as writer, pytest.raises(TraceInvalid):
            erase_sessions(writer, [bad])


def test_without_the_vault_nothing_is_said_to_be_erased(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    with open_writer(bench, None) as writer, pytest.raises(TraceInvalid) as caught:
        erase_sessions(writer, [session])
    assert caught.value.code == "erase.no_vault"
    assert redactions(bench.trace) == []
    with open_writer(bench, vault) as writer:  # it was ordered, and is done where that can be
        assert [one.session for one in finish_erasures(writer)] == [session]
    assert opened_of(bench.trace, vault, session) == {"opening.missing"}


def test_repeating_it_is_no_harm(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    with open_writer(bench, vault) as writer:
        (first,) = erase_sessions(writer, [session])
        (again,) = erase_sessions(writer, [session])
        assert finish_erasures(writer) == []
    assert (first.found, again.found, again.blobs) == (True, False, 0)
    assert len(redactions(bench.trace)) == 2


_CHANGES = ("write", "fsync", "fdatasync", "rename", "unlink", "ftruncate", "open")
_KILLED, _REFUSED = 9, 10


def stopped_at(step: int, work: Callable[[], object], errno: int = 0) -> bool:
    """Run work in a fork that is killed at its step-th call on files, or where that fails.

    Tell whether it came to that step. What fails must be refused as a TraceInvalid, nothing else.
    """
    if (pid := os.fork()) == 0:
        left = step

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left == -1 and errno:
                    raise OSError(errno, os.strerror(errno))
                if left < 0 and not errno:
                    os._exit(_KILLED)
                return real(*arguments, **named)

            return call

        try:
            for name in _CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            work()
        except TraceInvalid:
            os._exit(_REFUSED)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0 if left >= 0 else _REFUSED)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, _KILLED, _REFUSED), f"step {step}: {status}"
    return status != 0


@pytest.mark.parametrize("errno", [0, EIO, ENOSPC], ids=["killed", "EIO", "ENOSPC"])
def test_a_crash_or_fault_at_every_step_leaves_all_or_nothing_and_can_be_repeated(
    bench: Bench, errno: int
) -> None:
    vault = vault_of(bench)
    gone, kept = write_secrets(bench, vault, sessions=2)
    before = pieces(bench, gone)
    pristine = bench.root / "pristine"
    for name in ("trace", "keys", "state"):
        shutil.copytree(bench.root / name, pristine / name)
    outcomes: set[str] = set()

    def restore() -> None:
        for name in ("trace", "keys", "state"):
            shutil.rmtree(bench.root / name)
            shutil.copytree(pristine / name, bench.root / name)

    def erase() -> None:
        with open_writer(bench, vault_of(bench)) as writer:
            erase_sessions(writer, [gone])

    stride = int(os.environ.get("SAFECONDUCT_ERASE_STRIDE", "29"))  # 1 tries every step: minutes
    step = {0: 0, EIO: 1, ENOSPC: 2}[errno]
    while stopped_at(step, erase, errno):
        # As it was left: read by who knows nothing of what was going on.
        left = opened_of(bench.trace, vault, gone)
        assert left in ({"opened"}, {"opening.sealed"}, {"opening.missing"}), step
        if left != {"opened"}:
            assert [one["session"] for one in redactions(bench.trace)] == [gone], step
        assert opened_of(bench.trace, vault, kept) == {"opened"}
        # After the next open by a runtime.
        ordered = list((bench.trace / "journal").glob("*.erase"))
        with open_writer(bench, vault) as writer:
            finish_erasures(writer)
        found = opened_of(bench.trace, vault, gone)
        said = len(redactions(bench.trace))
        if found == {"opened"}:
            assert (said, ordered) == (0, []), step
            outcomes.add("whole")
        else:
            assert said in (1, 2), step
            assert remains(bench, gone, before) == [], step
            outcomes.add("nothing")
        assert bench.verify().status == Exit.OK, step
        # And asked for again.
        with open_writer(bench, vault) as writer:
            erase_sessions(writer, [gone])
        assert remains(bench, gone, before) == [], step
        assert opened_of(bench.trace, vault, kept) == {"opened"}
        restore()
        step += stride
    assert outcomes == {"whole", "nothing"}
    assert step > 20


def killed(work: Callable[[], object]) -> None:
    """Do work in a fork that is then killed: nothing is closed."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(9)
    os.waitpid(pid, 0)


def test_the_journal_of_a_killed_run_brings_nothing_back(bench: Bench) -> None:
    ids: list[str] = []
    read, write = os.pipe()

    def work() -> None:
        vault = vault_of(bench)
        writer = TraceWriter.open(bench.trace, signer=bench.signer(), vault=vault)
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "a", path=f"/ws/{SECRET}")
        record_large(writer, session, "b")
        erase_sessions(writer, [session])
        record_call(writer, session, "c", path=f"/ws/{SECRET}")
        os.write(write, session.encode())

    killed(work)
    os.close(write)
    with os.fdopen(read) as pipe:
        ids.append(pipe.read())
    vault = vault_of(bench)
    assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []
    with open_writer(bench, vault) as writer:
        finish_erasures(writer)
    assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []
    assert opened_of(bench.trace, vault, ids[0]) <= {"opening.missing", "opening.sealed"}
    assert not list((bench.root / "keys").rglob(ids[0]))
    assert bench.verify().status == Exit.OK


def test_plain_openings_in_the_journal_of_a_killed_run_go_too(bench: Bench) -> None:
    """Three runs are killed or erase: one without a vault, one after its erasure, one is whole."""

    def record() -> None:
        writer = TraceWriter.open(bench.trace, signer=bench.signer())
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "a", path=f"/ws/{SECRET}")
        record_large(writer, session, "b")

    def erase() -> None:
        writer = TraceWriter.open(bench.trace, signer=bench.signer(), vault=vault_of(bench))
        erase_sessions(writer, [the_session(bench)])

    killed(record)
    assert files_with(SECRET.encode(), bench.trace / "journal")
    killed(erase)
    with open_writer(bench, vault_of(bench)) as writer:
        finish_erasures(writer)
    with open_writer(bench, vault_of(bench)) as writer:  # the journal of before is gone now
        finish_erasures(writer)
    assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []
    assert not list((bench.trace / "journal").glob("*.erase"))
    assert opened_of(bench.trace, vault_of(bench), the_session(bench)) == {"opening.missing"}
    assert len(redactions(bench.trace)) == 1
    assert bench.verify().status == Exit.OK


def the_session(bench: Bench) -> str:
    (session,) = {
        entry.session
        for _, entry in read_entries(bench.trace)
        if entry.kind is EntryKind.SESSION_OPEN
    }
    return session


def test_what_was_ordered_while_another_wrote_is_done_by_the_next(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    with Folder(bench.trace) as folder:
        order_erasure(folder, session, by="operator", reason="x" * 300)
        order_erasure(folder, session, by="somebody else")  # the first one stands
    (bench.trace / "journal" / "zz.erase").write_bytes(b"\xff garbage")
    with open_writer(bench, vault) as writer:
        done = finish_erasures(writer)
    assert {one.session: one.found for one in done} == {session: True, "zz": False}
    by = {str(one["session"]): one["by"] for one in redactions(bench.trace)}
    assert by == {session: "operator", "zz": "unknown"}
    assert bench.verify().status == Exit.OK


def test_openings_of_a_run_without_a_vault_are_looked_for_in_the_journal(bench: Bench) -> None:
    """A crashed run may have left plain openings there: the journal is turned over too."""
    vault = vault_of(bench)
    (session,) = write_secrets(bench, None)
    with open_writer(bench, vault) as writer:
        (wal,) = (bench.trace / "journal").glob("*.wal")
        with wal.open("ab") as file:
            file.write(b'{"field":"stdout","salt":"00')
        erase_sessions(writer, [session])
        journal = b"".join(file.read_bytes() for file in (bench.trace / "journal").iterdir())
        assert b"salt" not in journal
        assert not list((bench.trace / "journal").glob("*.erase"))
    assert len(redactions(bench.trace)) == 1


def test_by_age_only_what_was_closed_before_goes(bench: Bench) -> None:
    vault = vault_of(bench)
    now_ms = 1_800_000_000_000
    ids: list[str] = []
    for days in (100, 80):
        clock = Clock(wall_ns=partial(int, (now_ms - days * DAY_MS) * 1_000_000))
        with open_writer(bench, vault, clock=clock) as writer:
            ids.append(writer.open_session("local", "sdk"))
            record_call(writer, ids[-1], "c")
            writer.close_session(ids[-1])
    with open_writer(bench, vault) as writer:
        # No file is that old yet: nothing is read through.
        assert keep_retention(writer, days=90, now_ms=now_ms) == []
        old = (now_ms - 99 * DAY_MS) / 1000
        os.utime(bench.trace / "openings" / f"{ids[0]}.jsonl", (old, old))
        done = keep_retention(writer, days=90, now_ms=now_ms)
        assert [one.session for one in done] == [ids[0]]
        assert keep_retention(writer, days=90, now_ms=now_ms) == []
        assert erase_closed_before(writer, now_ms - 90 * DAY_MS) == []
    assert opened_of(bench.trace, vault, ids[0]) == {"opening.missing"}
    assert opened_of(bench.trace, vault, ids[1]) == {"opened"}
    (said,) = redactions(bench.trace)
    assert (said["by"], said["reason"]) == ("retention", "older than 90 days")


@pytest.mark.parametrize("index", [-1, 0, 3, 99])
def test_an_order_that_names_another_entry_is_still_logged(bench: Bench, index: int) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault, sessions=1)
    order = bench.trace / "journal" / f"{session}.erase"
    order.write_text(f'{{"by":"x","index":{index}}}')
    with open_writer(bench, vault) as writer:
        (done,) = finish_erasures(writer)
        assert done.index not in (-1, 0, 3, 99)
    (said,) = redactions(bench.trace)
    assert (said["session"], said["by"]) == (session, "x")


def test_an_open_session_is_not_old(bench: Bench) -> None:
    vault = vault_of(bench)
    with open_writer(bench, vault) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c")
        assert erase_closed_before(writer, 2**52) == []
        found = [one for _, _, found in read_opened(bench.trace, vault=vault) for one in found]
        assert found
    assert opened_of(bench.trace, vault, session) == {"opened"}


def test_a_session_erased_twice_in_one_order_has_one_entry(bench: Bench) -> None:
    vault = vault_of(bench)
    first, second = write_secrets(bench, vault, sessions=2)
    with open_writer(bench, vault) as writer:
        done = erase_sessions(writer, [first, second, first])
    assert sorted(one.session for one in done) == sorted([first, second])
    assert len(redactions(bench.trace)) == 2
    assert not [one for one in read_opened(bench.trace, vault=vault) if _any_open(one[2])]


def _any_open(found: dict[str, Opening | Missing]) -> bool:
    return any(isinstance(one, Opening) for one in found.values())
