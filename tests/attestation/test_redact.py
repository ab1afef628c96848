"""A copy with chosen openings only still verifies, and holds nothing of what was held back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from safeconduct.attestation import Missing, Opening, read_opened
from safeconduct.attestation.privacy.redaction import export_opened
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench  # noqa: TID251 - the tests' own kit
from .test_vault import (  # noqa: TID251 - the tests' own kit
    SECRET,
    codes,
    files_with,
    large,
    lines_of,
    put_lines,
    vault_of,
    write_secrets,
)


def opened(trace: Path, vault: Vault | None = None) -> dict[tuple[str, str, str], bytes]:
    """Return what opens, by session, call and field."""
    return {
        (entry.session, entry.body["call"], name): one.data
        for _, entry, found in read_opened(trace, vault=vault)
        for name, one in found.items()
        if isinstance(one, Opening)
    }


def same_tree(one: Path, other: Path) -> bool:
    return (one / "checkpoint").read_bytes() == (other / "checkpoint").read_bytes()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "plain"])
def test_without_redactions_a_stranger_reads_all_of_it(bench: Bench, sealed: bool) -> None:
    vault = vault_of(bench)
    write_secrets(bench, vault if sealed else None, sessions=2)
    copy = bench.root / "copy"
    done = export_opened(bench.trace, copy, vault=vault)
    assert (done.redacted, done.missing) == (0, 0)
    assert opened(copy) == opened(bench.trace, vault)
    assert done.opened == len(opened(copy)) == 14
    assert same_tree(copy, bench.trace)
    assert bench.verify(copy).status == Exit.OK
    for private in ("openings", "blobs"):
        assert (copy / private).stat().st_mode & 0o077 == 0


def test_a_field_is_held_back_everywhere(bench: Bench) -> None:
    vault = vault_of(bench)
    write_secrets(bench, vault, sessions=2)
    copy = bench.root / "copy"
    done = export_opened(bench.trace, copy, redact=["document", "stdout"], vault=vault)
    assert {name for _, _, name in opened(copy)} == {"value", "stderr"}
    assert done.redacted == 8
    assert files_with(SECRET.encode(), copy) == []  # documents and large outputs held it
    assert bench.verify(copy).status == Exit.OK


def test_a_session_is_held_back_whole(bench: Bench) -> None:
    vault = vault_of(bench)
    gone, kept = write_secrets(bench, vault, sessions=2)
    copy = bench.root / "copy"
    export_opened(bench.trace, copy, redact=[gone[:12]], vault=vault)
    assert {session for session, _, _ in opened(copy)} == {kept}
    assert not list(copy.rglob(f"*{gone}*"))
    assert files_with(b"d0 " + SECRET.encode(), copy) == []
    assert len(files_with(b"d1 " + SECRET.encode(), copy)) == 1
    assert bench.verify(copy).status == Exit.OK


def test_a_field_of_one_session_is_held_back_alone(bench: Bench) -> None:
    vault = vault_of(bench)
    first, second = write_secrets(bench, vault, sessions=2)
    copy = bench.root / "copy"
    export_opened(bench.trace, copy, redact=[f"{first}/stdout"], vault=vault)
    missing = {
        (entry.session, name)
        for _, entry, found in read_opened(copy)
        for name, one in found.items()
        if isinstance(one, Missing)
    }
    assert missing == {(first, "stdout")}
    assert (second, "d1", "stdout") in opened(copy)


def test_what_names_nothing_or_two_things_exports_nothing(bench: Bench) -> None:
    vault = vault_of(bench)
    first, second = write_secrets(bench, vault, sessions=2)
    bad = ["stdouts", "STDOUT", "", "/", f"{first}/", "/stdout", f"{first}/document2", first[:3]]
    bad += ["stdout/document", f"{first[:-1]}x", "call", "a b", "../x", f"{first}/a/b"]
    for word in bad:
        with pytest.raises(TraceInvalid) as caught:
            export_opened(bench.trace, bench.root / "copy", redact=["document", word], vault=vault)
        assert caught.value.code == "redact.unknown", word
    with pytest.raises(TraceInvalid):
        export_opened(bench.trace, bench.root / "copy", redact=["document"] * 2000, vault=vault)
    assert not (bench.root / "copy").exists()
    assert first != second


def test_the_beginning_of_two_sessions_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(1000))

    def counted(size: int) -> bytes:
        return next(numbers).to_bytes(size, "big")

    monkeypatch.setattr(os, "urandom", counted)
    write_secrets(bench, None, sessions=2)
    monkeypatch.undo()
    with pytest.raises(TraceInvalid) as caught:
        export_opened(bench.trace, bench.root / "copy", redact=["000000"])
    assert caught.value.code == "redact.ambiguous"
    assert not (bench.root / "copy").exists()


def test_without_the_vault_nothing_sealed_is_handed_on(bench: Bench) -> None:
    write_secrets(bench, vault_of(bench))
    done = export_opened(bench.trace, bench.root / "copy")
    assert (done.opened, done.missing) == (0, 7)
    assert not list((bench.root / "copy" / "openings").iterdir())
    assert codes(bench.root / "copy", None) == {"opening.missing"}


def test_a_false_opening_is_not_handed_on(bench: Bench) -> None:
    (session,) = write_secrets(bench, None)
    lines = lines_of(bench.trace, session)
    for line in lines:
        if "value" in line:
            line["value"] = json.dumps({"forged": True})
    put_lines(bench.trace, session, lines)
    done = export_opened(bench.trace, bench.root / "copy")
    assert done.missing == 3
    assert files_with(b"forged", bench.root / "copy") == []


def test_a_folder_that_is_there_is_not_written_into(bench: Bench) -> None:
    write_secrets(bench, None)
    (bench.root / "copy").mkdir()
    with pytest.raises(TraceInvalid) as caught:
        export_opened(bench.trace, bench.root / "copy")
    assert caught.value.code == "export.exists"


def test_openings_of_a_copy_can_be_redacted_further(bench: Bench) -> None:
    """Who got a copy can hand on less of it, without any key."""
    vault = vault_of(bench)
    write_secrets(bench, vault)
    export_opened(bench.trace, bench.root / "all", vault=vault)
    done = export_opened(bench.root / "all", bench.root / "some", redact=["stdout"])
    assert (done.opened, done.redacted, done.missing) == (5, 2, 0)
    assert large("d0") not in opened(bench.root / "some").values()
    assert bench.verify(bench.root / "some").status == Exit.OK
