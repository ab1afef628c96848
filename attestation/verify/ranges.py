"""Step "verify": check a range of entry bundles without knowing what came before it.

Ranges are checked side by side, each in a process of its own. What a range cannot decide alone
(does its first entry of a session follow the last one? was that call open?) it hands on in its
summary, and ``join.py`` decides it exactly. INVARIANT: a summary without ``fault`` never
passes what ``parse_entry`` and ``Chains.follow`` would refuse; where this module is in doubt it
says ``fault``, and the range is read again, slowly, entry by entry (``exact.py``).

What is fast here: one decode, one re-spelling and one comparison for a whole bundle, or for as much
of one as may be decoded at once. Canonical entries hold no newline, so lines that are spelled as
they stand have the boundaries they had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Final, TypeAlias, cast

import msgspec

from safeconduct.attestation.encoding import MAX_ENTRY_BYTES, MAX_INTEGER
from safeconduct.attestation.entry import (
    MAX_NAME_CHARACTERS,
    VERSION,
    Entry,
    parse_entry,
    require_body,
)
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import HASH_BYTES
from safeconduct.attestation.tiles import TILE_WIDTH, bundle_path, read_bundle, read_tile
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from . import story
from .summary import BEFORE, Part, Summary, full_root

# LIMIT: bundles of one range: what a worker holds of them is small, what it returns too.
RANGE_BUNDLES = 64
# How deep a body is decoded by type; a deeper one takes the slow way, up to MAX_DEPTH.
_FAST_DEPTH = 5
_HASH_HEX = 2 * HASH_BYTES
# LIMIT: bytes of entries that are decoded at once: as objects they take up to thirty times as much.
_DECODED_BYTES = 512 << 10
_DECODED_ENTRIES = _DECODED_BYTES // MAX_ENTRY_BYTES
# Of usual entries only as many as stay, as objects, in a processor's cache until they are followed.
_SLICE_BYTES = 64 << 10
# LIMIT: sets of clear fields remembered for one range.
_KNOWN_MAX = 4096

_Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
_Version: TypeAlias = Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]


def _values(depth: int) -> Any:  # noqa: ANN401 - a type made at run time
    """Return the type of values nested at most ``depth`` deep, without fractions."""
    held: Any = None | bool | _Integer | str
    for _ in range(depth):
        held = None | bool | _Integer | str | list[held] | dict[str, held]
    return held


_dict: Any = dict  # its parameter is no type that a checker knows
_Line: Final = msgspec.defstruct(
    "_Line",
    [
        ("body", _dict[str, _values(_FAST_DEPTH)]),
        ("kind", str),
        ("mono_ns", _Count),
        ("prev", str | None),
        ("session", str),
        ("sseq", _Count),
        ("time", _Count),
        ("v", _Version),
    ],
    frozen=True,
    forbid_unknown_fields=True,
    gc=False,
)
_decoder: Final = msgspec.json.Decoder(_Line)
_encoder: Final = msgspec.json.Encoder(order="deterministic")

_SESSION = re.compile(r"[0-9a-z-]{1,64}")
_KINDS = {kind.value: kind for kind in EntryKind}
_LOG_OPEN = EntryKind.LOG_OPEN.value
_FIRST = frozenset({_LOG_OPEN, EntryKind.SESSION_OPEN.value})
EFFECTS = frozenset({"allow", "ask", "deny"})
ENFORCEMENTS = frozenset({"object", "sandbox", "advisory"})
STATUSES = frozenset({"ok", "failed", "limit", "denied", "error", "unknown"})


class _Doubt(Exception):
    """Something here is not as the fast way expects: the exact reader decides."""


@dataclass(slots=True)
class _State:
    """The parts of the range so far; ``open`` are the ones that are not closed."""

    open: dict[str, Part] = field(default_factory=dict[str, Part])
    over: set[str] = field(default_factory=set[str])
    parts: list[Part] = field(default_factory=list[Part])
    sessions: int = 0
    calls: int = 0
    # Clear fields that passed before: most entries have the same few.
    known: set[tuple[object, ...]] = field(default_factory=set[tuple[object, ...]])
    # Of the lines at hand: digits of commitments, and entries that come back whole.
    digests: list[str] = field(default_factory=list[str])
    telling: list[tuple[int, Entry]] = field(default_factory=list[tuple[int, Entry]])


def check_range(folder: Folder, bundles: range, size: int, *, structure: bool = True) -> Summary:
    """Hash and, unless told otherwise, parse some bundles of a log of ``size`` entries.

    Never raises TraceInvalid: what cannot be read or does not fit is a ``fault``.
    """
    state = _State()
    summary = Summary()
    for number in bundles:
        width = min(TILE_WIDTH, size - number * TILE_WIDTH)
        try:
            entries = _read(folder, number, width)
            leaves = [sha256(b"\x00" + data).digest() for data in entries]
            joined = b"".join(leaves)
            if joined != read_tile(folder, 0, number, width):
                raise _Doubt
            if structure:
                _follow(state, summary, number * TILE_WIDTH, entries, joined.hex())
        except (_Doubt, TraceInvalid):
            summary.fault = number
            break
        summary.size += width
        if width == TILE_WIDTH:
            summary.roots.append(full_root(joined))
        else:
            summary.leaves = joined
    try:
        for part in state.open.values():
            _require_once(part)
    except _Doubt:
        summary.fault = bundles.start
    summary.parts = state.parts
    summary.sessions, summary.calls = state.sessions, state.calls
    return summary


def _read(folder: Folder, number: int, width: int) -> list[bytes]:
    """Cut a bundle into its entries. What follows them is for the exact reader."""
    bundle = read_bundle(folder, number, width)
    entries: list[bytes] = []
    end = 0
    try:
        for _ in range(width):
            start = end + 2
            end = start + (bundle[end] << 8 | bundle[end + 1])
            entries.append(bundle[start:end])
    except IndexError as error:
        raise _Doubt from error
    if end != len(bundle) and (end > len(bundle) or folder.exists(bundle_path(number, width))):
        raise _Doubt
    return entries


def _follow(state: _State, summary: Summary, first: int, entries: list[bytes], leaves: str) -> None:
    """Parse the entries of a bundle, a slice at a time, and follow their sessions."""
    # Nobody hears what was told of a bundle whose end is in doubt: its range is read again.
    at = 0
    for lines, odd in _parse(entries):
        _follow_lines(state, first + at, lines, odd, leaves[at * _HASH_HEX :])
        summary.see_times(first + at, [line.time for line in lines])
        for index, line in state.telling:
            summary.tell(index, line.kind, line.body, entries[index - first])
        at += len(lines)
    for part in state.open.values():
        part.gather()


def _follow_lines(
    state: _State, first: int, lines: Sequence[Any], odd: Iterable[bytes], leaves: str
) -> None:
    state.digests, state.telling = [], []
    find, step = state.open.get, _STEPS.get
    try:
        for at, line in enumerate(lines):
            part = find(line.session)
            if part is None:
                part = _begin(state, first + at, line)
            elif line.sseq != part.sseq + 1 or line.prev != part.prev or line.kind in _FIRST:
                raise _Doubt
            part.sseq, part.prev = line.sseq, leaves[at * _HASH_HEX : (at + 1) * _HASH_HEX]
            step(line.kind, _rare)(state, part, first + at, line)
    except (KeyError, TypeError) as error:
        raise _Doubt from error
    # Printable text was taken for granted above: `odd` are the entries where it must be looked at.
    for data in odd:
        parse_entry(data)
    if "".join(state.digests).encode().translate(None, b"0123456789abcdef"):
        raise _Doubt


def _parse(entries: list[bytes]) -> Iterator[tuple[Sequence[Any], Iterable[bytes]]]:
    """Parse entries, in slices, and name those whose texts may hold more than printable ASCII."""
    slices = max(1, -(-sum(map(len, entries)) // _SLICE_BYTES))
    step = -(-len(entries) // slices)
    if slices * _SLICE_BYTES > _DECODED_BYTES:
        step = _DECODED_ENTRIES
    for start in range(0, len(entries), step):
        part = entries[start : start + step]
        joined = b"\n".join(part)
        try:
            lines = _decoder.decode_lines(joined)
        except (msgspec.DecodeError, ValueError, RecursionError):
            for data in part:  # one at a time, as each may take as much as a slice
                yield [parse_entry(data)], ()
            continue
        if len(lines) != len(part) or _encoder.encode_lines(lines) != joined + b"\n":
            raise _Doubt
        plain = _is_plain(joined)
        yield lines, () if plain else [data for data in part if not _is_plain(data)]


def _is_plain(data: bytes) -> bool:
    """Tell whether all texts in canonical JSON are printable ASCII: other characters are escaped,
    delete excepted.
    """
    return b"\\" not in data and b"\x7f" not in data and data.isascii()


def _begin(state: _State, index: int, line: Entry) -> Part:
    session = line.session
    if _SESSION.fullmatch(session) is None:
        raise _Doubt
    starts = line.kind in _FIRST
    if starts and (line.sseq != 0 or line.prev is not None):
        raise _Doubt
    is_log = line.kind == _LOG_OPEN
    if session in state.over or (index == 0 and not is_log):
        raise _Doubt
    part = Part(session, starts, is_log, index, line.sseq, line.prev, line.sseq)
    state.open[session] = part
    state.parts.append(part)
    state.sessions += starts and not is_log
    return part


def _intent(state: _State, part: Part, index: int, line: Entry) -> None:
    body = line.body
    clear: tuple[object, ...] = (body["tool"], body["caller"], body["origin"])
    if clear not in state.known:
        _learn(state, clear)
    state.digests.append(_digest(body["document"]))
    call = _name(body["call"])
    if call in part.calls:
        raise _Doubt
    part.fresh.append(call)
    part.calls[call] = index
    state.calls += 1


def _decision(state: _State, part: Part, index: int, line: Entry) -> None:
    body = line.body
    clear = (body["effect"], body["enforcement"], body["code"], body["policy"])
    call = _name(body["call"])
    if clear not in state.known:
        _learn_decision(state, clear)
        if story.bars(body):
            story.bar(part.barred, body)
    if type(body["rules"]) is not list:
        raise _Doubt
    _use_call(part, call)


def _outcome(state: _State, part: Part, index: int, line: Entry) -> None:
    if line.body["status"] not in STATUSES:
        raise _Doubt
    call = _name(line.body["call"])
    intent = part.calls.pop(call, None)
    if intent is None:
        _need(part, call)
        intent = BEFORE
    if intent == BEFORE:
        part.taken.append(call)
        if story.ran(line.body):
            part.ran.append(call)
    if part.barred and part.barred.pop(call, None) is not None and story.ran(line.body):
        raise _Doubt


def _rare(state: _State, part: Part, index: int, line: Entry) -> None:
    kind = _KINDS[line.kind]
    require_body(kind, line.body)
    if kind is EntryKind.SESSION_CLOSE:
        if part.calls:
            raise _Doubt
        part.closed = True
        state.over.add(part.session)
        _require_once(part)
        if part.starts:
            part.begun.clear()
        del state.open[part.session]
    elif kind is EntryKind.APPROVAL:
        _use_call(part, line.body["call"])
        if story.approves(line.body):
            story.approve(part.barred, line.body["call"])
            part.freed.append(line.body["call"])
    else:
        state.telling.append((index, line))


_Step: TypeAlias = Callable[[_State, Part, int, Entry], None]
_STEPS: Final[Mapping[str, _Step]] = {
    EntryKind.CALL_INTENT.value: _intent,
    EntryKind.CALL_DECISION.value: _decision,
    EntryKind.CALL_OUTCOME.value: _outcome,
}


def _use_call(part: Part, call: str) -> None:
    if call not in part.calls:
        _need(part, call)
        part.calls[call] = BEFORE


def _require_once(part: Part) -> None:
    """Leave it to the exact reader where a call id may have been used twice."""
    part.gather()
    ids = part.ids()
    begun = set(ids)
    if len(begun) != len(ids) or not begun.isdisjoint(part.needed):
        raise _Doubt


def _need(part: Part, call: str) -> None:
    """Leave it to the join whether the call was open before; here it must be unheard of."""
    if part.starts or call in part.needed:
        raise _Doubt
    part.needed.add(call)


def _name(value: object) -> str:
    if type(value) is not str or not 0 < len(value) <= MAX_NAME_CHARACTERS:
        raise _Doubt
    return value


def _learn(state: _State, names: tuple[object, ...]) -> None:
    for name in names:
        _name(name)
    if len(state.known) < _KNOWN_MAX:
        state.known.add(names)


def _learn_decision(state: _State, clear: tuple[object, ...]) -> None:
    if clear[0] not in EFFECTS or clear[1] not in ENFORCEMENTS:
        raise _Doubt
    for name in clear:
        _name(name)
    # What may keep its call from running is looked at each time.
    if clear[0] == "allow" and len(state.known) < _KNOWN_MAX:
        state.known.add(clear)


def _digest(document: object) -> str:
    """Return the digits of a commitment; whether they are digits is looked at for all at once."""
    if type(document) is not dict:
        raise _Doubt
    fields = cast("dict[str, object]", document)
    digest = fields["commitment"]
    if len(fields) != 1 or type(digest) is not str or len(digest) != _HASH_HEX:
        raise _Doubt
    return digest
