"""Step "verify": the lines of a tlog-policy file, parsed strictly (C2SP tlog-policy)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from safeconduct.attestation.cosignature import COSIGNATURE, CosignerKey
from safeconduct.attestation.note import ED25519, VerifierKey, decode_base64
from safeconduct.errors import TraceInvalid

NONE = "none"
# LIMIT: tlog-policy asks for at least 32 logs, 32 witnesses and 32 groups.
MAX_ITEMS = 256
MAX_FILE_BYTES = 1 << 20
MAX_LINES = 10_000

_ML_DSA_44 = b"\x06"
_ML_DSA_44_BYTES = 1312
_FORBIDDEN = re.compile(rb"[^\t\n\x20-\x7e\x80-\xff]")
_SPACE = re.compile(rb"[ \t]+")
_DECIMAL = re.compile(r"[1-9][0-9]{0,5}")
_KEY_FORM = re.compile(r"[^+]+\+[0-9a-f]{8}\+(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedLog:
    """A ``log`` line. ``key`` is None where its kind cannot be checked here."""

    key: VerifierKey | None
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedWitness:
    """A ``witness`` line. ``key`` is None where its kind (ML-DSA-44) cannot be checked here."""

    name: str
    key: CosignerKey | None
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A ``group`` line: ``threshold`` of the members, each a witness or an earlier group."""

    name: str
    threshold: int
    members: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    """What has been read so far of one file."""

    logs: list[TrustedLog] = field(default_factory=list[TrustedLog])
    witnesses: list[TrustedWitness] = field(default_factory=list[TrustedWitness])
    groups: list[Group] = field(default_factory=list[Group])
    quorum: str | None = None
    names: set[str] = field(default_factory=set[str])
    members: set[str] = field(default_factory=set[str])
    log_keys: set[bytes] = field(default_factory=set[bytes])
    witness_keys: set[bytes] = field(default_factory=set[bytes])


def parse_lines(
    data: bytes,
) -> tuple[tuple[TrustedLog, ...], tuple[TrustedWitness, ...], tuple[Group, ...], str]:
    """Return logs, witnesses, groups and the quorum's name.

    Raise TraceInvalid ``trust.invalid``; ``offset`` is the byte at which the bad line starts.
    """
    _require_characters(data)
    reading = _Reading()
    offset = 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            if number > MAX_LINES:
                raise _Bad(f"a policy has at most {MAX_LINES} lines")
            _read_line(reading, line)
        except (_Bad, TraceInvalid) as error:
            raise _invalid(f"line {number}: {error.args[0]}", offset) from error
        offset += len(line) + 1
    if reading.quorum is None:
        raise _invalid("there is no quorum line", len(data))
    return (
        tuple(reading.logs),
        tuple(reading.witnesses),
        tuple(reading.groups),
        reading.quorum,
    )


class _Bad(Exception):
    """A line is wrong; its argument says how."""


def _require_characters(data: bytes) -> None:
    if len(data) > MAX_FILE_BYTES:
        raise _invalid(f"it has more than {MAX_FILE_BYTES} bytes", MAX_FILE_BYTES)
    bad = _FORBIDDEN.search(data)
    if bad:
        code = data[bad.start()]
        what = "a carriage return" if code == 0x0D else f"the control character 0x{code:02x}"
        line = data.count(b"\n", 0, bad.start()) + 1
        raise _invalid(f"line {line}: it holds {what}", bad.start())
    # Every line ends in a newline: a last one without may be the front of a longer word.
    if data and not data.endswith(b"\n"):
        raise _invalid("its last line has no newline: it may be cut off", len(data))


def _read_line(reading: _Reading, line: bytes) -> None:
    stripped = line.strip(b" \t")
    if not stripped or stripped.startswith(b"#"):
        return
    words = [word.decode("utf-8", "surrogateescape") for word in _SPACE.split(stripped)]
    read = _READERS.get(words[0])
    if read is None:
        raise _Bad(f"{words[0][:40]!r} is none of log, witness, group, quorum")
    read(reading, words[1:])


def _read_log(reading: _Reading, words: list[str]) -> None:
    if len(words) not in (1, 2):
        raise _Bad("write: log VKEY [URL]")
    kind, public = _key_material(words[0])
    if kind == COSIGNATURE:
        raise _Bad("this is a witness's key (type 0x04), not a log's")
    key = VerifierKey.parse(words[0]) if kind == ED25519 else None
    if public in reading.log_keys:
        raise _Bad("another log line has the same public key")
    _require_room(reading.logs)
    reading.log_keys.add(public)
    reading.logs.append(TrustedLog(key=key, url=words[1] if len(words) == 2 else ""))


def _read_witness(reading: _Reading, words: list[str]) -> None:
    if len(words) not in (2, 3):
        raise _Bad("write: witness NAME VKEY [URL]")
    name, line = words[:2]
    kind, public = _key_material(line)
    if kind == ED25519:
        raise _Bad("this is a log's key (type 0x01); a witness cosigns with type 0x04")
    key = CosignerKey.parse(line) if kind == COSIGNATURE else None
    if public in reading.witness_keys:
        raise _Bad("another witness line has the same public key")
    _require_room(reading.witnesses)
    _define(reading, name)
    reading.witness_keys.add(public)
    url = words[2] if len(words) == 3 else ""
    reading.witnesses.append(TrustedWitness(name=name, key=key, url=url))


def _read_group(reading: _Reading, words: list[str]) -> None:
    if len(words) < 3:
        raise _Bad("write: group NAME all|any|K MEMBER…")
    name, rule, *members = words
    for member in members:
        if member == NONE or member not in reading.names:
            raise _Bad(f"{member[:80]!r} is no witness or group of an earlier line")
        if member in reading.members:
            raise _Bad(f"{member[:80]!r} is a member already; each name is one once at most")
        reading.members.add(member)
    _require_room(reading.groups)
    _define(reading, name)
    threshold = _threshold(rule, len(members))
    reading.groups.append(Group(name=name, threshold=threshold, members=tuple(members)))


def _read_quorum(reading: _Reading, words: list[str]) -> None:
    if len(words) != 1:
        raise _Bad("write: quorum NAME")
    if reading.quorum is not None:
        raise _Bad("there is a quorum line already")
    if words[0] != NONE and words[0] not in reading.names:
        raise _Bad(f"{words[0][:80]!r} is no witness or group of an earlier line")
    reading.quorum = words[0]


_READERS: dict[str, Callable[[_Reading, list[str]], None]] = {
    "log": _read_log,
    "witness": _read_witness,
    "group": _read_group,
    "quorum": _read_quorum,
}


def _threshold(rule: str, count: int) -> int:
    if rule == "any":
        return 1
    if rule == "all":
        return count
    if _DECIMAL.fullmatch(rule) is None or int(rule) > count:
        raise _Bad(f"{rule[:40]!r} is none of all, any, 1 to {count}")
    return int(rule)


def _define(reading: _Reading, name: str) -> None:
    if name == NONE:
        raise _Bad("the name 'none' is taken: it means that no witness is needed")
    if name in reading.names:
        raise _Bad(f"{name[:80]!r} is defined already")
    reading.names.add(name)


def _key_material(line: str) -> tuple[bytes, bytes]:
    """Return a key line's type byte and public key, for any type that is known of."""
    match = _KEY_FORM.fullmatch(line)
    if match is None:
        raise _Bad(f"{line[:80]!r} has not the form of a key: name+hash+base64")
    data = decode_base64(match[1], code="key.invalid")
    kind, public = data[:1], data[1:]
    lengths = {ED25519: 32, COSIGNATURE: 32, _ML_DSA_44: _ML_DSA_44_BYTES}
    if kind not in lengths:
        raise _Bad(f"keys of type 0x{kind.hex()} are not known")
    if len(public) != lengths[kind]:
        raise _Bad("the key has the wrong length")
    return kind, public


def _require_room(items: list[TrustedLog] | list[TrustedWitness] | list[Group]) -> None:
    if len(items) == MAX_ITEMS:
        raise _Bad(f"more than {MAX_ITEMS} lines of this kind")


def _invalid(why: str, offset: int) -> TraceInvalid:
    return TraceInvalid(
        f"the trust policy cannot be used: {why}",
        code="trust.invalid",
        offset=offset,
        hint="its form is C2SP tlog-policy: log, witness, group and quorum lines",
    )
