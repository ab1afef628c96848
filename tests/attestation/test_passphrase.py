"""Keys under a passphrase: one file form, wrong ones refused, and where the passphrase may lie."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import SignerClient, generate_key, load_key, write_key
from safeconduct.attestation.signing import kernel_keyring
from safeconduct.attestation.signing.key import Ask
from safeconduct.attestation.signing.passphrase import DESCRIPTOR, FILE, ask_from, given_passphrase
from safeconduct.attestation.signing.protected_key import (
    is_protected,
    protect,
    protected_line,
    unprotect,
)
from safeconduct.errors import TraceInvalid

from .kit import NAME, Bench  # noqa: TID251 - the tests' own kit

SECRET = b"correct horse battery staple"
KEY = generate_key(NAME)
TEXT = protect(KEY, SECRET, log2_n=14)


def answering(secret: bytes) -> Ask:
    return lambda _line: secret


def code(text: str, secret: bytes = SECRET) -> str:
    with pytest.raises(TraceInvalid) as caught:
        unprotect(text, secret)
    return caught.value.code


def test_only_the_passphrase_opens_it() -> None:
    assert unprotect(TEXT, SECRET) == KEY
    assert is_protected(TEXT)
    assert not is_protected(KEY.line)
    assert protected_line(TEXT) == KEY.verifier.line
    assert KEY.line.split("+", 4)[4] not in TEXT
    assert code(TEXT, b"wrong") == code(TEXT, b"") == code(TEXT, b"x" * 2000) == "key.passphrase"


def test_two_files_of_one_key_share_nothing() -> None:
    other = protect(KEY, SECRET, log2_n=14)
    assert other.split("\n")[:2] == TEXT.split("\n")[:2]
    assert other.split("\n")[2] != TEXT.split("\n")[2]
    assert other.split("\n")[3] != TEXT.split("\n")[3]


@given(at=st.integers(0, len(TEXT) - 1), mark=st.sampled_from("A9+/= \n"))
def test_any_changed_character_is_refused(at: int, mark: str) -> None:
    changed = TEXT[:at] + mark + TEXT[at + 1 :]
    if changed != TEXT:
        assert code(changed) in {"key.passphrase", "key.invalid"}


def test_a_file_that_costs_too_much_or_too_little_is_refused_unread() -> None:
    for cost in ("13", "21", "31", "99999999999", "014", "-1", ""):
        assert code(TEXT.replace("scrypt 14 ", f"scrypt {cost} ")) == "key.invalid"
    for words in ("14 8 2", "14 16 1", "14 8"):
        assert code(TEXT.replace("14 8 1", words)) == "key.invalid"


def test_the_signer_asks_for_it_and_signs(bench: Bench) -> None:
    bench.key.unlink()
    line = write_key(bench.key, NAME, passphrase=SECRET)
    asked: list[str] = []

    def ask(line: str) -> bytes:
        asked.append(line)
        return SECRET

    signer = SignerClient.start(bench.key, state=bench.state, ask=ask)
    assert signer.key.line == line
    assert asked == [line]
    assert Path(f"/proc/{signer.pid}/cmdline").read_bytes().find(SECRET) < 0
    signer.close()
    for other in (None, answering(b"wrong"), answering(b"")):
        with pytest.raises(TraceInvalid) as caught:
            SignerClient.start(bench.key, state=bench.state, ask=other)
        assert caught.value.code == "key.passphrase"
        assert caught.value.hint
    with pytest.raises(TraceInvalid) as caught:
        load_key(bench.key)
    assert caught.value.code == "key.passphrase"


def test_a_passphrase_file_is_as_private_as_a_key(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    environment = {FILE: str(path)}
    assert given_passphrase(environment) == SECRET
    assert ask_from(environment)("any line") == SECRET
    with pytest.raises(TraceInvalid) as caught:
        given_passphrase(environment, forbidden=[tmp_path])
    assert caught.value.code == "key.permissions"
    path.chmod(0o640)
    with pytest.raises(TraceInvalid) as caught:
        given_passphrase(environment)
    assert caught.value.code == "key.permissions"
    (tmp_path / "link").symlink_to(path)
    for bad in (str(tmp_path / "link"), str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(TraceInvalid) as caught:
            given_passphrase({FILE: bad})
        assert caught.value.code in {"key.permissions", "key.missing"}
    path.chmod(0o600)
    for text in (b"", b"\n", b"x" * 2000):
        path.write_bytes(text)
        with pytest.raises(TraceInvalid) as caught:
            given_passphrase(environment)
        assert caught.value.code == "key.passphrase"
    assert given_passphrase({}) is None


def test_a_passphrase_from_a_descriptor_does_not_reach_children() -> None:
    read, write = os.pipe()
    os.set_inheritable(read, True)
    os.write(write, SECRET + b"\n")
    os.close(write)
    assert given_passphrase({DESCRIPTOR: str(read)}) == SECRET
    assert not os.get_inheritable(read)
    os.close(read)
    for bad in (str(read), "x", "-1"):
        with pytest.raises(TraceInvalid) as caught:
            given_passphrase({DESCRIPTOR: bad})
        assert caught.value.code == "key.passphrase"


def test_the_kernel_keeps_one_for_a_while() -> None:
    line = generate_key(f"example.org/{secrets.token_hex(8)}").verifier.line
    assert kernel_keyring.kept(line) is None
    try:
        kernel_keyring.keep(line, SECRET, seconds=60)
    except TraceInvalid as error:
        pytest.skip(f"needs keyrings(7): {error.message}")
    try:
        assert kernel_keyring.kept(line) == SECRET
        assert ask_from({})(line) == SECRET
        kernel_keyring.keep(line, b"another", seconds=60)
        assert kernel_keyring.kept(line) == b"another"
    finally:
        assert kernel_keyring.forget(line)
    assert kernel_keyring.kept(line) is None
    assert not kernel_keyring.forget(line)
