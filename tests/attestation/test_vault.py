"""Openings and blobs cannot be read without the vault, and false ones are never believed."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64decode
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from safeconduct.attestation import Missing, Opening, TraceWriter, read_opened
from safeconduct.attestation.entry import commit
from safeconduct.attestation.privacy.opened import unseal
from safeconduct.attestation.privacy.openings import INLINE_BYTES, parse_line
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import EntryKind, Json
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit

SECRET = "hunter2-correct-horse"


def large(call: str) -> bytes:
    return f"{call} {SECRET} ".encode() * (INLINE_BYTES // 16)


def vault_of(bench: Bench) -> Vault:
    (bench.root / "keys").mkdir(mode=0o700, exist_ok=True)
    return Vault.open(bench.root / "keys" / "vault.key", forbidden=[bench.trace])


def write_secrets(bench: Bench, vault: Vault | None, *, sessions: int = 1) -> list[str]:
    """Write a trace whose calls carry a secret in small and in large openings."""
    signer = bench.signer()
    ids: list[str] = []
    with closing(signer), TraceWriter.open(bench.trace, signer=signer, vault=vault) as writer:
        for number in range(sessions):
            session = writer.open_session("local", "sdk")
            ids.append(session)
            record_call(writer, session, f"c{number}", path=f"/ws/{SECRET}/{number}")
            record_large(writer, session, f"d{number}")
            writer.close_session(session)
    return ids


def record_large(writer: TraceWriter, session: str, call: str) -> None:
    intent: dict[str, Json] = {"call": call, "tool": "t", "caller": "l", "origin": "o"}
    document: Json = {"tool": "t", "arguments": {"secret": SECRET}, "workspace": "/"}
    committed: dict[str, Json | bytes] = {"stdout": large(call), "stderr": b"\x01" * INLINE_BYTES}
    writer.append(EntryKind.CALL_INTENT, intent, session=session, committed={"document": document})
    outcome: dict[str, Json] = {"call": call, "status": "ok"}
    writer.append(EntryKind.CALL_OUTCOME, outcome, session=session, committed=committed)


def files_with(needle: bytes, *folders: Path) -> list[str]:
    """Return the files below some folders that hold these bytes, whatever they are called."""
    return sorted(
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and needle in path.read_bytes()
    )


def all_opened(trace: Path, vault: Vault | None) -> list[Opening | Missing]:
    return [one for _, _, found in read_opened(trace, vault=vault) for one in found.values()]


def codes(trace: Path, vault: Vault | None) -> set[str]:
    found = all_opened(trace, vault)
    return {one.code if isinstance(one, Missing) else "opened" for one in found}


def test_without_a_vault_the_secret_lies_in_the_files(bench: Bench) -> None:
    write_secrets(bench, None)
    assert {Path(name).parent.name for name in files_with(SECRET.encode(), bench.trace)} == {
        "openings",
        "blobs",
    }
    assert codes(bench.trace, None) == {"opened"}


def test_with_one_no_file_holds_it_and_the_vault_opens_it(bench: Bench) -> None:
    vault = vault_of(bench)
    write_secrets(bench, vault, sessions=2)
    assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []
    assert codes(bench.trace, vault) == {"opened"}
    assert codes(bench.trace, Vault.find(bench.root / "keys" / "vault.key")) == {"opened"}
    data = [one.data for one in all_opened(bench.trace, vault) if isinstance(one, Opening)]
    assert data.count(large("d0")) == data.count(large("d1")) == 1
    assert codes(bench.trace, None) == {"opening.sealed"}
    assert bench.verify().status == Exit.OK
    for path in (bench.root / "keys").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_while_the_log_is_open_the_journal_holds_no_secret_either(bench: Bench) -> None:
    vault, signer = vault_of(bench), bench.signer()
    with closing(signer), TraceWriter.open(bench.trace, signer=signer, vault=vault) as writer:
        session = writer.open_session("local", "sdk")
        for number in range(3):
            record_call(writer, session, f"c{number}", path=f"/ws/{SECRET}")
            record_large(writer, session, f"d{number}")
            assert files_with(SECRET.encode(), bench.trace, bench.root / "keys") == []


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "plain"])
def test_what_only_the_journal_holds_opens_too(bench: Bench, sealed: bool) -> None:
    """A killed run leaves its last openings there; so does one that is just writing."""
    vault, signer = vault_of(bench), bench.signer()
    held = vault if sealed else None
    with closing(signer), TraceWriter.open(bench.trace, signer=signer, vault=held) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c", path=f"/ws/{SECRET}")
        record_large(writer, session, "d")
        shutil.copytree(bench.trace, bench.root / "copy")
        shutil.rmtree(bench.root / "copy" / "openings")
        (bench.root / "copy" / "openings").mkdir()
        assert codes(bench.root / "copy", vault) == {"opened"}
        if sealed:
            assert codes(bench.root / "copy", None) == {"opening.sealed"}


def test_openings_from_before_there_was_a_vault_stay_readable(bench: Bench) -> None:
    write_secrets(bench, None)
    vault = vault_of(bench)
    write_secrets(bench, vault)
    assert codes(bench.trace, vault) == {"opened"}
    assert codes(bench.trace, None) == {"opened", "opening.sealed"}


def test_another_vault_opens_nothing(bench: Bench) -> None:
    write_secrets(bench, vault_of(bench))
    shutil.move(bench.root / "keys", bench.root / "old")
    assert codes(bench.trace, vault_of(bench)) == {"opening.sealed"}
    # Nor with the wrapped keys of the right one.
    shutil.rmtree(bench.root / "keys" / "vault")
    shutil.copytree(bench.root / "old" / "vault", bench.root / "keys" / "vault")
    assert codes(bench.trace, vault_of(bench)) == {"opening.sealed"}
    assert codes(bench.trace, Vault.open(bench.root / "old" / "vault.key")) == {"opened"}


def lines_of(trace: Path, session: str) -> list[dict[str, Json]]:
    text = (trace / "openings" / f"{session}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def put_lines(trace: Path, session: str, lines: list[dict[str, Json]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (trace / "openings" / f"{session}.jsonl").write_text(text)


def swap_places(trace: Path, ours: str, theirs: str) -> None:
    """Let each sealed line stand at the index of the one that follows it."""
    lines = lines_of(trace, ours)
    moved = [line | {"index": after["index"]} for line, after in pairwise(lines)]
    put_lines(trace, ours, moved)


def swap_sessions(trace: Path, ours: str, theirs: str) -> None:
    """Give each session the sealed lines of the other, at its own indices."""
    mine, others = lines_of(trace, ours), lines_of(trace, theirs)
    put_lines(trace, ours, [a | {"index": b["index"]} for a, b in zip(others, mine, strict=True)])


def flip(trace: Path, ours: str, theirs: str) -> None:
    lines = lines_of(trace, ours)
    for line in lines:
        sealed = str(line["sealed"])
        line["sealed"] = sealed[:40] + ("A" if sealed[40] != "A" else "B") + sealed[41:]
    put_lines(trace, ours, lines)


def shorten(trace: Path, ours: str, theirs: str) -> None:
    put_lines(trace, ours, [line | {"sealed": "QUJD"} for line in lines_of(trace, ours)])


def in_plain(trace: Path, ours: str, theirs: str) -> None:
    """Put openings of the forger's own making where the sealed ones were."""
    forged: list[dict[str, Json]] = [
        {"index": line["index"], "field": field, "salt": "00" * 32, "value": "{}"}
        for line in lines_of(trace, ours)
        for field in ("document", "value", "stdout", "stderr")
    ]
    put_lines(trace, ours, forged)


@pytest.mark.parametrize("forge", [swap_places, swap_sessions, flip, shorten, in_plain])
def test_a_forged_opening_is_never_believed(
    bench: Bench, forge: Callable[[Path, str, str], None]
) -> None:
    vault = vault_of(bench)
    ours, theirs = write_secrets(bench, vault, sessions=2)
    true = {
        (index, name): one.data
        for index, _, found in read_opened(bench.trace, vault=vault)
        for name, one in found.items()
        if isinstance(one, Opening)
    }
    forge(bench.trace, ours, theirs)
    for index, entry, found in read_opened(bench.trace, vault=vault):
        for name, one in found.items():
            if entry.session == theirs:
                assert isinstance(one, Opening)
            assert not isinstance(one, Opening) or one.data == true[index, name]
            assert isinstance(one, Opening) or one.code in ("opening.false", "opening.missing")
    assert "opening.false" in codes(bench.trace, vault)


def test_blobs_that_were_changed_or_exchanged_are_false(bench: Bench) -> None:
    vault = vault_of(bench)
    write_secrets(bench, vault, sessions=2)
    first, second = sorted((bench.trace / "blobs").iterdir())
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held[:-1])
    found = [one for one in all_opened(bench.trace, vault) if isinstance(one, Missing)]
    assert [one.code for one in found] == ["opening.false"] * 2
    second.write_bytes(large("d1"))
    assert "opening.false" in codes(bench.trace, vault)


def test_a_true_opening_is_believed_beside_a_forged_one(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    lines = lines_of(bench.trace, session)
    flip(bench.trace, session, session)
    both = [
        line for pair in zip(lines_of(bench.trace, session), lines, strict=True) for line in pair
    ]
    put_lines(bench.trace, session, both)
    assert codes(bench.trace, vault) == {"opened"}


def readable_by_others(key: Path) -> None:
    key.chmod(0o640)


def second_name(key: Path) -> None:
    os.link(key, key.with_name("other"))


def link(key: Path) -> None:
    key.rename(key.with_name("real"))
    key.symlink_to("real")


def open_folder(key: Path) -> None:
    key.with_suffix("").chmod(0o755)


def linked_folder(key: Path) -> None:
    key.with_suffix("").rename(key.with_name("elsewhere"))
    key.with_suffix("").symlink_to("elsewhere")


def pipe(key: Path) -> None:
    key.unlink()
    os.mkfifo(key, 0o600)


def of_somebody_else(key: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(key, 12345, 12345)


@pytest.mark.parametrize(
    "spoil",
    [readable_by_others, second_name, link, open_folder, linked_folder, pipe, of_somebody_else],
)
def test_a_vault_that_others_could_have_is_refused(
    bench: Bench, spoil: Callable[[Path], None]
) -> None:
    vault_of(bench)
    key = bench.root / "keys" / "vault.key"
    spoil(key)
    for open_it in (Vault.open, Vault.find):
        with pytest.raises(TraceInvalid) as caught:
            open_it(key)
        assert caught.value.code in ("key.permissions", "key.io")
        assert caught.value.hint


def test_a_session_key_that_others_can_read_is_refused(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    (file,) = (bench.root / "keys" / "vault").rglob(session)
    file.chmod(0o644)
    with pytest.raises(TraceInvalid, match="others can read it") as caught:
        all_opened(bench.trace, vault)
    assert caught.value.code == "key.permissions"


@pytest.mark.parametrize("through", ["name", "link"])
def test_a_vault_inside_the_workspace_or_the_trace_is_refused(
    bench: Bench, tmp_path: Path, through: str
) -> None:
    workspace = tmp_path / "ws"
    (workspace / "deep").mkdir(parents=True)
    keys = workspace / "deep"
    if through == "link":
        keys = tmp_path / "looks-outside"
        keys.symlink_to(workspace / "deep")
    with pytest.raises(TraceInvalid) as caught:
        Vault.open(keys / "vault.key", forbidden=[bench.trace, workspace])
    assert caught.value.code == "key.permissions"
    assert list((workspace / "deep").iterdir()) == []  # and none was made there


@pytest.mark.parametrize("text", ["", "x", "SAFECONDUCT-VAULT-KEY-1 QUJD\n", "\xff" * 300])
def test_what_is_no_vault_key_is_refused(bench: Bench, text: str) -> None:
    vault_of(bench)
    key = bench.root / "keys" / "vault.key"
    key.write_text(text)
    with pytest.raises(TraceInvalid) as caught:
        Vault.open(key)
    assert caught.value.code == "key.invalid"


def test_where_there_is_no_vault_readers_make_none(bench: Bench) -> None:
    assert Vault.find(bench.root / "vault.key") is None
    assert not (bench.root / "vault.key").exists()


def test_many_that_make_a_vault_at_once_agree_on_it(bench: Bench) -> None:
    keys: list[Vault] = []
    threads = [Thread(target=lambda: keys.append(vault_of(bench))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    sealed = [vault.log("l").obtain("s").seal_lines(1, b"x") for vault in keys]
    for vault in keys:
        key = vault.log("l").find("s")
        assert key is not None
        assert [key.open_lines(1, one) for one in sealed] == [b"x"] * 8


def test_a_half_destroyed_key_counts_as_gone(bench: Bench) -> None:
    vault = vault_of(bench)
    (session,) = write_secrets(bench, vault)
    (file,) = (bench.root / "keys" / "vault").rglob(session)
    file.write_bytes(bytes(file.stat().st_size))
    assert codes(bench.trace, vault) == {"opening.sealed"}


def test_a_trace_that_names_another_log_gets_no_key(bench: Bench) -> None:
    """Keys are bound to the log: a folder prepared by somebody else does not borrow one."""
    vault = vault_of(bench)
    write_trace(bench, calls=1)
    (session,) = write_secrets(bench, vault)
    (bench.trace / "origin").write_text("example.org/other\n")
    assert codes(bench.trace, vault) == {"opened", "opening.sealed"}
    assert vault.log("example.org/other").find(session) is None


VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "trace" / "vault.json").read_text())


def test_the_published_vector_opens(tmp_path: Path) -> None:
    """What another implementation checks itself against, we pass too."""
    key_file = tmp_path / VECTOR["wrapped_key_path"]
    key_file.parent.mkdir(mode=0o700, parents=True)
    key_file.parents[1].chmod(0o700)
    for path, data in (
        (tmp_path / "vault.key", VECTOR["vault.key"].encode()),
        (key_file, bytes.fromhex(VECTOR["wrapped_key"])),
    ):
        path.touch(0o600)
        path.write_bytes(data)
    key = Vault.open(tmp_path / "vault.key").log(VECTOR["origin"]).find(VECTOR["session"])
    assert key is not None
    line = parse_line(VECTOR["line"]["stored"].encode())
    assert line is not None
    assert line.index == VECTOR["line"]["index"]
    document, stdout = unseal(line, key)
    blob = key.open_blob(VECTOR["commitments"]["stdout"], bytes.fromhex(VECTOR["blob"]["stored"]))
    assert blob.hex() == VECTOR["blob"]["plaintext"]
    for one, data in ((document, (document.value or "").encode()), (stdout, blob)):
        assert commit(bytes.fromhex(one.salt), data) == VECTOR["commitments"][one.field]
    for case in VECTOR["false"]:
        forged = parse_line(case["line"].encode())
        assert forged is not None, case["why"]
        with pytest.raises(TraceInvalid) as caught:
            unseal(forged, key)
        assert caught.value.code == "opening.false", case["why"]


def test_the_vector_is_what_its_text_says() -> None:
    """The same with nothing of ours but the words of docs/trace-format.md."""
    secret = b64decode(VECTOR["vault.key"].split()[1])
    origin, session = VECTOR["origin"], VECTOR["session"]
    magic, wrapped = b"safeconduct/session-key/v1\n", bytes.fromhex(VECTOR["wrapped_key"])
    place = magic + f"{origin}\n{session}".encode()
    rest = wrapped.removeprefix(magic)
    key = AESGCM(secret).decrypt(rest[:12], rest[12:], place)
    assert key.hex() == VECTOR["session_key"]
    sealed = b64decode(json.loads(VECTOR["line"]["stored"])["sealed"])
    place = f"safeconduct/openings/v1\n{session}\n7".encode()
    assert (
        AESGCM(key).decrypt(sealed[:12], sealed[12:], place).decode() == VECTOR["line"]["plaintext"]
    )
    stored, digest = bytes.fromhex(VECTOR["blob"]["stored"]), VECTOR["commitments"]["stdout"]
    place = f"safeconduct/blob/v1\n{session}\n{digest}".encode()
    assert AESGCM(key).decrypt(stored[:12], stored[12:], place).hex() == VECTOR["blob"]["plaintext"]
    assert VECTOR["wrapped_key_path"].split("/")[1] == sha256(origin.encode()).hexdigest()[:32]
