"""A compiled policy that is kept is the same policy, and what is wrong with it is a miss."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from safeconduct.call import Document, Json
from safeconduct.policies import (
    cache,
    decide,
    hosts,
    load,
    load_policy,
    match,
    match_json,
    match_text,
    parse_policy,
)
from safeconduct.policies.cache import MAX_FILES, PolicyCache
from safeconduct.policies.codec import TYPES, NotPlain, decode_policy, encode_policy
from safeconduct.policies.rules import Policy

_EVERYTHING = """version: 1
profiles:
  base: {read: ["$WS"], hide: ["**/.env"], limits: {wall: 60s}}
tools:
  fs.read:
    - {allow: {path: ["$WS/src/**", "$WS/a.toml", "**/x?.py"]}, profile: base, id: read}
    - {deny: {path: {path: ["$WS/**"], not: ["$WS/src/**", "$WS/a.toml"]}}}
  http.get: {ask: {url: ["https://*.example.org/v1/**"]}}
  shell.run:
    - {allow: {argv: [git, {in: [log, diff]}, any, {range: [1, 9]}, {path: ["$WS/**"]}, ...]}}
    - {allow: {argv: [grep, {text: {max: 20B}}, {regex: "[a-z]+"}]}, when: "session.calls < 9"}
  crm.mail:
    - {allow: {to: {email: ["*@example.org"]}, host: {host: any}, rest: any}, rate: 20/h}
    - {deny: {body: {regex: ".*secret.*"}}}
    - {ask: {rows: {range: [1, 9]}, note: {text: {max: 1KiB}}, how: [fast, slow]}}
    - {deny: {shape: {json: {type: object, properties: {a: {type: integer}}}}}}
  crm.*: {deny: {id: [admin]}}
roles:
  reader: {fs.list: {allow: {path: ["$WS/**"]}}}
servers:
  files: {run: [files-server], profile: base}
"""


def _policy(text: str = _EVERYTHING) -> Policy:
    return parse_policy(text.encode(), name="policy.yaml", workspace=Path("/ws"))


_CALLS: list[tuple[str, dict[str, Json]]] = [
    ("fs.read", {"path": "/ws/src/x"}),
    ("fs.read", {"path": "/ws/other"}),
    ("http.get", {"url": "https://a.example.org/v1/x"}),
    ("shell.run", {"argv": ["git", "log", "x", "3", "src"], "cwd": "/ws"}),
    ("shell.run", {"argv": ["git", "log", "x", "3", "/etc"], "cwd": "/ws"}),
    ("shell.run", {"argv": ["grep", "a", "abc"], "cwd": "/ws"}),
    ("crm.mail", {"to": "a@example.org", "host": "x.org", "body": "hello"}),
    ("crm.mail", {"to": "a@example.org", "host": "x.org", "body": "the secret"}),
    ("crm.mail", {"id": "admin"}),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_BYTES", 1)


def test_what_is_read_back_judges_alike() -> None:
    policy = _policy()
    data = encode_policy(policy)
    again = decode_policy(data)
    assert encode_policy(again) == data
    for tool, arguments in _CALLS:
        document = Document(tool=tool, arguments=arguments, workspace="/ws")
        assert decide(again, document) == decide(policy, document)
    assert [again.for_role("reader").version, again.servers] == [policy.version, policy.servers]


def test_the_table_knows_every_matcher() -> None:
    for module in (match, match_text, match_json, hosts):
        for _, found in inspect.getmembers(module, inspect.isclass):
            if dataclasses.is_dataclass(found) and found.__module__ == module.__name__:
                assert found in TYPES, f"{found.__name__} is missing in codec.TYPES"


def test_what_is_not_plain_data_is_not_kept() -> None:
    policy = dataclasses.replace(_policy(), file=Path("x"))  # type: ignore[arg-type]
    with pytest.raises(NotPlain):
        encode_policy(policy)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x91\x01", b"\x91\x92\xcd\xff\xff\x07"])
def test_bytes_that_are_no_policy_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="policy"):
        decode_policy(data)


def test_a_kept_policy_is_found_for_the_same_inputs_alone(tmp_path: Path) -> None:
    kept = PolicyCache(tmp_path / "policies")
    assert kept.find([b"data", b"name"]) is None
    kept.keep([b"data", b"name"], _policy())
    found = kept.find([b"data", b"name"])
    assert found is not None
    assert encode_policy(found) == encode_policy(_policy())
    assert kept.find([b"data", b"nam", b"e"]) is None
    assert kept.find([b"datan", b"ame"]) is None
    (file,) = (tmp_path / "policies").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "policies").stat().st_mode & 0o777 == 0o700


def _kept(tmp_path: Path) -> tuple[PolicyCache, Path]:
    kept = PolicyCache(tmp_path / "policies")
    kept.keep([b"data"], _policy())
    (file,) = (tmp_path / "policies").iterdir()
    assert kept.find([b"data"]) is not None
    return kept, file


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "mode", "folder", "link"])
def test_what_is_wrong_with_a_file_is_a_miss_and_written_anew(tmp_path: Path, harm: str) -> None:
    kept, file = _kept(tmp_path)
    data = file.read_bytes()
    match harm:
        case "cut":
            file.write_bytes(data[:-1])
        case "flip":
            file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        case "empty":
            file.write_bytes(b"")
        case "mode":
            file.chmod(0o620)
        case "folder":
            file.parent.chmod(0o770)
        case _:
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
    assert kept.find([b"data"]) is None
    file.parent.chmod(0o700)
    kept.keep([b"data"], _policy())
    assert kept.find([b"data"]) is not None


def test_another_version_of_the_code_never_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = _kept(tmp_path)
    monkeypatch.setattr(cache, "_code", lambda: b"another")
    assert kept.find([b"data"]) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = PolicyCache(tmp_path / "file" / "policies")
    kept.keep([b"data"], _policy())
    assert kept.find([b"data"]) is None


def _on_disk(tmp_path: Path, text: str = _EVERYTHING) -> Path:
    (tmp_path / "work").mkdir()
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return file


def test_a_file_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = _on_disk(tmp_path), PolicyCache(tmp_path / "kept")
    first = load_policy(file, workspace=tmp_path / "work", cache=kept)

    def never(*_: object) -> Policy:
        raise AssertionError("compiled again")

    monkeypatch.setattr(load, "_compile", never)
    second = load_policy(file, workspace=tmp_path / "work", cache=kept)
    assert encode_policy(second.parts[0]) == encode_policy(first.parts[0])
    for change in ("other bytes", "other workspace"):
        if change == "other bytes":
            file.write_text(_EVERYTHING.replace("admin", "root"))
        with pytest.raises(AssertionError, match="compiled again"):
            load_policy(file, workspace=tmp_path, cache=kept)


def test_a_policy_that_names_its_workspace_is_not_kept(tmp_path: Path) -> None:
    file = _on_disk(tmp_path, f"{_EVERYTHING}workspace: {tmp_path / 'work'}\n")
    load_policy(file, cache=PolicyCache(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


def test_a_cache_that_a_sandbox_may_write_is_not_used(tmp_path: Path) -> None:
    file = _on_disk(tmp_path)
    load_policy(file, workspace=tmp_path, cache=PolicyCache(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    kept = PolicyCache(tmp_path / "policies")
    for number in range(MAX_FILES + 3):
        kept.keep([b"%d" % number], _policy())
    assert len(list((tmp_path / "policies").iterdir())) == MAX_FILES
    assert kept.find([b"%d" % (MAX_FILES + 2)]) is not None
