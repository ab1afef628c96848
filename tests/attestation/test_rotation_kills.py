"""Killed by SIGKILL before any file operation of a rotation: no key is lost, no tree is forked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from safeconduct.attestation import (
    SignerClient,
    TraceWriter,
    VerifierKey,
    read_entries,
    verify_trace,
    write_key,
)
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import Note
from safeconduct.attestation.rotation import follow_rotation
from safeconduct.attestation.signing.key_files import KeyFiles
from safeconduct.attestation.signing.protected_key import is_protected, protect
from safeconduct.attestation.signing.signer_state import SignerState
from safeconduct.attestation.writing.handover import rotate_key
from safeconduct.errors import TraceInvalid

from .killed_signer import Countdown  # noqa: TID251
from .kit import NAME, Bench  # noqa: TID251 - the tests' own kit
from .rotation_kit import ORIGIN, Log, key_folder  # noqa: TID251

PACKAGE = Path(__file__).parents[2] / "src"
KILLED = Path(__file__).with_name("killed_signer.py")


# -- killed at every step ---------------------------------------------------------------------


def killed_signer(bench: Bench, step: int) -> SignerClient:
    """Start a real signer that kills itself before its n-th file operation of a rotation."""
    command = [sys.executable, str(KILLED), str(PACKAGE), str(step), str(bench.key)]
    return SignerClient.start_command([*command, str(bench.state), str(bench.trace)])


def rotate_by_hand(client: SignerClient, log: Log) -> None:
    entry = log.entry(client.rotate(ORIGIN))
    if len(log.leaves) == 1:
        log.sign(client, entry)
    client.finish_rotation(ORIGIN, index=1, entry=entry, proof=[log.leaves[0]])


def dies_rotating(client: SignerClient, log: Log) -> bool:
    try:
        rotate_by_hand(client, log)
    except TraceInvalid as error:
        if error.code != "signer.lost":
            raise
        return True
    finally:
        client.close()
    return False


def benches(tmp_path: Path) -> Iterator[tuple[int, Bench]]:
    for step in range(1, 200):
        root = tmp_path / str(step)
        root.mkdir()
        yield step, Bench(root=root, key_line=write_key(root / "alice.key", NAME))


def test_killed_before_any_operation_of_a_rotation_it_can_be_finished(tmp_path: Path) -> None:
    killed: list[int] = []
    for step, bench in benches(tmp_path):
        private = bench.key.read_text().split("+", 4)[4].strip()
        log = Log(bench)
        client = killed_signer(bench, step)
        log.sign(client, b"first")
        signed = log.head()
        died = dies_rotating(client, log)
        after = bench.signer()
        require_no_fork(after, signed, log)
        if after.key.line == bench.key_line:
            finish_after(after, log)
        assert after.key.line != bench.key_line
        require_one_signature(after, log)
        after.close()
        assert key_folder(bench) == ["alice.key", "alice.pub"]
        assert private not in bench.key.read_text()
        assert (bench.root / "alice.pub").read_text() == after.key.line + "\n"
        if not died:
            break
        killed.append(step)
    assert len(killed) >= 12  # new key, its head, link, rename, erasing, unlink, public line


def require_no_fork(client: SignerClient, signed: Checkpoint, log: Log) -> None:
    """What was signed before the kill is remembered, and no other tree of that size is signed."""
    last = client.last(ORIGIN)
    assert last in (signed, log.head())
    other = Checkpoint(origin=ORIGIN, size=last.size, root=leaf_hash(b"another history"))
    with pytest.raises(TraceInvalid) as caught:
        client.sign(other, old_size=last.size, proof=[])
    assert caught.value.code == "signer.refused"


def finish_after(client: SignerClient, log: Log) -> None:
    """Take the rotation up again as a recorder does: with the entry it has, or a new one."""
    body = client.rotate(ORIGIN)
    entry = log.entry(body)
    if len(log.leaves) == 2:
        assert leaf_hash(entry) == log.leaves[1], "after a crash the statement must be the same"
        if client.last(ORIGIN).size == 1:
            log.leaves.pop()
    if len(log.leaves) == 1:
        lines = log.sign(client, entry)
        assert lines.count("\n") == 2
    client.finish_rotation(ORIGIN, index=1, entry=entry, proof=[log.leaves[0]])


def require_one_signature(client: SignerClient, log: Log) -> None:
    head = log.head()
    line = client.sign(head, old_size=head.size, proof=[])
    note = Note.parse(f"{head.text()}\n{line}".encode())
    assert [client.key.of_log(ORIGIN).made(one) for one in note.signatures] == [True]
    assert client.key.verifies(note.signatures[0], note.text)


def in_a_child(work: Callable[[], None], step: int) -> tuple[bool, list[str]]:
    """Run work in a fork that dies by SIGKILL before its n-th file operation; say if it did."""
    read, write = os.pipe()
    say = os.write  # as it is now: the countdown counts later ones
    child = os.fork()
    if child == 0:
        try:
            with Countdown(step, tell=lambda name: say(write, f"{name}\n".encode())):
                work()
            os._exit(0)
        finally:
            os._exit(3)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().split("\n")[:-1]
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, names


def test_killed_twice_in_a_row_a_key_is_always_there(tmp_path: Path) -> None:
    """Before every operation of the change of files, and before every one of its repair."""
    deaths, first = 0, True
    for step in range(1, 100):
        for again in range(1, 40):
            path = tmp_path / f"{step}-{again}.key"
            line = write_key(path, NAME)
            first, _ = in_a_child(partial(change, path), step)
            second, _ = in_a_child(partial(look, path), again)
            require_whole(path, line)
            deaths += first and second
            if not second:
                break
        if not first:
            break
    assert deaths >= 10


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_operation_leaves_a_key(tmp_path: Path, error: int) -> None:
    failures, said = 0, b""
    for step in range(1, 25):  # there are fewer operations
        path = tmp_path / f"{step}.key"
        line = write_key(path, NAME)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with Countdown(step, error=error):
                    change(path)
                os.write(write, b"whole")
            except OSError:
                os.write(write, b"failed")
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        assert said in (b"whole", b"failed")
        require_whole(path, line)
        failures += said == b"failed"
    assert said == b"whole"
    assert failures >= 10


def require_whole(path: Path, old_line: str, passphrase: bytes | None = None) -> None:
    """One of the two keys is in force, nothing of the old one is left beside the new one."""
    files = open_files(path, passphrase)
    now, coming = files.current.verifier.line, files.next
    files.close()
    left = {one.name.removeprefix(path.name) for one in path.parent.glob(f"{path.name}*")}
    assert left - {".making"} == ({""} if coming is None else {"", ".next"})
    if now != old_line:
        assert coming is None
    change(path, passphrase)
    assert [one.name for one in path.parent.glob(f"{path.name}*")] == [path.name]


def test_a_key_under_a_passphrase_rotates_to_one_under_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protect, "__kwdefaults__", {"log2_n": 14})
    secret = b"correct horse"
    for step in (1, 4, 6, 8, 100):
        path = tmp_path / f"{step}.key"
        line = write_key(path, NAME, passphrase=secret)
        in_a_child(partial(change, path, secret), step)
        require_whole(path, line, secret)
        assert is_protected(path.read_text())


def test_killed_while_it_remembers_a_head_it_knows_one_as_new_as_it_signed(tmp_path: Path) -> None:
    deaths = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)
        heads = [
            Checkpoint(origin=ORIGIN, size=size, root=leaf_hash(bytes([size])))
            for size in range(1, 5)
        ]
        died, done = in_a_child(partial(remember, folder, heads, tmp_path / f"{step}.said"), step)
        said = (tmp_path / f"{step}.said").read_text().split() if done else []
        last = SignerState(folder).last(ORIGIN)
        assert last.size in {len(said), len(said) + 1}
        assert last.size == 0 or last == heads[last.size - 1]
        deaths += died
        if not died:
            break
    assert deaths >= 8


def remember(folder: Path, heads: list[Checkpoint], said: Path) -> None:
    state = SignerState(folder)
    with said.open("w", buffering=1) as file:
        for one in heads:
            state.remember(one)
            file.write(f"{one.size}\n")


def open_files(path: Path, passphrase: bytes | None) -> KeyFiles:
    return KeyFiles.open(path, ask=None if passphrase is None else lambda _: passphrase)


def look(path: Path, passphrase: bytes | None = None) -> None:
    open_files(path, passphrase).close()


def change(path: Path, passphrase: bytes | None = None) -> None:
    files = open_files(path, passphrase)
    files.begin()
    files.finish()
    files.close()


def test_no_byte_of_the_old_key_is_touched_before_the_new_one_is_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    write_key(path, NAME)
    died, names = in_a_child(partial(change, path), 1000)
    assert not died
    touched = names.index("pwrite")
    renamed = max(at for at, name in enumerate(names[:touched]) if name == "rename")
    assert "fsync" in names[renamed:touched]
    assert "link" in names[:renamed]
    assert names[touched : touched + 4] == ["pwrite", "fsync", "unlink", "fsync"]


# -- the recorder killed at every step ---------------------------------------------------------


def recorder(bench: Bench, step: int) -> int:
    """Run a recorder that rotates and dies before its n-th file operation; return its status."""
    command = [sys.executable, str(KILLED), str(PACKAGE), "--record", str(step)]
    places = [str(bench.key), str(bench.state), str(bench.trace)]
    return subprocess.run([*command, *places], check=False, timeout=60).returncode


def test_killed_recorder_leaves_a_log_whose_rotation_can_be_followed(tmp_path: Path) -> None:
    """Every fourth operation; all of them with SAFECONDUCT_KILL_ALL=1."""
    stride = 1 if os.environ.get("SAFECONDUCT_KILL_ALL") else 4
    killed = 0
    for step in range(1, 400, stride):
        root = tmp_path / str(step)
        root.mkdir()
        bench = Bench(root=root, key_line=write_key(root / "alice.key", NAME))
        status = recorder(bench, step)
        assert status in (0, -signal.SIGKILL)
        signer = bench.signer()
        with TraceWriter.open(bench.trace, signer=signer) as writer:
            origin = writer.origin
            if signer.key.line == bench.key_line:
                rotate_key(writer, signer, bench.trace)
        now = signer.key
        signer.close()
        assert followed(bench, origin) == now
        assert key_folder(bench) == ["alice.key", "alice.pub"]
        if status == 0:
            break
        killed += 1
    assert killed >= 5


def followed(bench: Bench, origin: str) -> VerifierKey:
    """Follow every rotation of a log as a verifier who holds only the first key line does."""
    trusted = VerifierKey.parse(bench.key_line)
    sizes = sorted(
        int(path.name) for path in (bench.trace / "checkpoints").iterdir() if path.name.isdecimal()
    )
    for index, entry in read_entries(bench.trace):
        if entry.kind != "key.rotate":
            continue
        new = follow_rotation(entry.body, {trusted, VerifierKey.parse(bench.key_line)}, origin)
        covering = next(size for size in sizes if size > index)
        note = Note.parse((bench.trace / "checkpoints" / str(covering)).read_bytes())
        old = VerifierKey.parse(str(entry.body["old"])).of_log(origin)
        assert any(old.made(one) and old.verifies(one, note.text) for one in note.signatures)
        trusted = new
    note = Note.parse((bench.trace / "checkpoint").read_bytes())
    last = trusted.of_log(origin)
    assert any(last.made(one) and last.verifies(one, note.text) for one in note.signatures)
    report = verify_trace(bench.trace, [trusted.line])
    assert report.status == 0, report
    return trusted
