"""The profile key ``syscalls``: a closed set, part of the policy, narrowed like every grant."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Profile
from safeconduct.errors import PolicyError
from safeconduct.policies import (
    Policy,
    both,
    check_policy,
    narrow_profiles,
    parse_policy,
    policy_schema,
)
from safeconduct.syscalls import ADDABLE, NEVER

ROOTS = """
    mount unshare setns clone3 bpf io_uring_setup kexec_load init_module keyctl userfaultfd
    perf_event_open seccomp socket
"""


def parse(text: str, folder: Path) -> Policy:
    return parse_policy(f"version: 1\n{text}\n".encode(), name="policy.yaml", workspace=folder)


def test_a_profile_adds_calls_and_like_inherits_them(tmp_path: Path) -> None:
    policy = parse(
        "profiles:\n"
        "  debug: {syscalls: [ptrace, process_vm_readv, ptrace]}\n"
        "  same: {like: debug}\n"
        "  none: {like: debug, syscalls: []}",
        tmp_path,
    )
    assert policy.profiles["debug"].syscalls == ("process_vm_readv", "ptrace")
    assert policy.profiles["same"].syscalls == policy.profiles["debug"].syscalls
    assert policy.profiles["none"].syscalls == ()
    assert policy.default_profile.syscalls == ()


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_may_never_be_added_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(f"profiles:\n  p: {{syscalls: [ptrace, {name}]}}", tmp_path)
    assert (caught.value.code, caught.value.line, caught.value.hint) == (
        "policy.syscall", 3, "remove it",
    )  # fmt: skip
    assert NEVER[name] in caught.value.message


def test_the_tables_are_disjoint_and_name_the_worst() -> None:
    assert not ADDABLE.keys() & NEVER.keys()
    assert NEVER.keys() >= set(ROOTS.split())


@pytest.mark.parametrize(
    ("text", "hint"),
    [("[ptrase]", "did you mean 'ptrace'?"), ("[read]", "known here"), ("ptrace", "list")],
)
def test_other_names_are_refused(text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(f"profiles:\n  p: {{syscalls: {text}}}", tmp_path)
    assert hint in caught.value.hint
    assert caught.value.line == 3


def test_a_wasm_profile_has_no_system_calls(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="wasm module cannot make"):
        parse("profiles:\n  p: {engine: wasm, syscalls: [ptrace]}", tmp_path)


def test_check_says_what_each_opens(tmp_path: Path) -> None:
    policy = parse(
        "profiles:\n  p: {syscalls: [ptrace, io_setup]}\ntools:\n  fs.read: {allow: any}", tmp_path
    )
    found = [one for one in check_policy(policy) if one.code == "check.syscall"]
    assert {(one.line, one.message) for one in found} == {
        (3, f"profile p adds the system call {name}: {ADDABLE[name]}")
        for name in ("ptrace", "io_setup")
    }


def test_it_is_part_of_the_version_and_only_narrows(tmp_path: Path) -> None:
    wide = parse("profiles:\n  p: {syscalls: [ptrace, mbind]}", tmp_path)
    narrow = parse("profiles:\n  p: {syscalls: [mbind, personality]}", tmp_path)
    assert wide.version != parse("profiles:\n  p: {syscalls: [ptrace]}", tmp_path).version
    assert both(wide, narrow).profiles["p"].syscalls == ("mbind",)
    one, other = Profile(name="a", syscalls=("ptrace",)), Profile(name="b")
    assert narrow_profiles(one, other).syscalls == ()


def test_the_schema_lists_them() -> None:
    definitions = policy_schema()["$defs"]
    assert isinstance(definitions, dict)
    assert str(sorted(ADDABLE)) in str(definitions["profile"])
