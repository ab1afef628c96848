"""``safeconduct trace show``: what a trace recorded, as a story that a person can read.

Nothing in a trace is believed here, and every text in it may be an attack on the terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, TypeAlias, cast

import typer

from safeconduct.attestation import Entry, Missing, Opening, read_opened
from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid

from .options import JsonOption, TraceArgument
from .outcome import output_json
from .places import find_trace, own_vault
from .source import UsageError
from .terminal import clip, print_line, tell
from .trace_ls import clock

Opened: TypeAlias = Mapping[str, Opening | Missing]
_Step: TypeAlias = tuple[int, Entry, Opened]

_VALUE_CHARACTERS = 600
_OUTPUT_LINES = 12
_LINE_CHARACTERS = 200
# LIMIT: bytes of one committed value in JSON; a longer one is left out and its size told.
_JSON_BYTES_MAX = 1 << 20
_STORY: Mapping[EntryKind, str] = {
    EntryKind.LOG_OPEN: "{origin}, signer isolation {signer_isolation}",
    EntryKind.SESSION_OPEN: "caller {caller}, through {origin}",
    EntryKind.POLICY_LOAD: "{file} {policy}, tier {tier}",
    EntryKind.CALL_INTENT: "{call} {tool}, caller {caller}, through {origin}",
    EntryKind.CALL_DECISION: "{call} {effect} ({code}) by {rules}, {enforcement},"
    " profile {profile}",
    EntryKind.CALL_OUTCOME: "{call} {ending}",
    EntryKind.APPROVAL: "{call} {answer} by {by}",
    EntryKind.KEY_ROTATE: "from {old} to {new}",
    EntryKind.REDACTION: "{what} of session {session} erased by {by}",
    EntryKind.HEARTBEAT: "{sessions} sessions and {calls} calls are open",
    EntryKind.LOG_RECOVERED: "{dropped_bytes} bytes lost; {calls} calls were open",
    EntryKind.SESSION_CLOSE: "{status}",
}
_RAW = frozenset({"stdout", "stderr"})


def show(
    trace: TraceArgument,
    session: Annotated[
        str | None, typer.Option("--session", help="Only this session (its id, or how it begins).")
    ] = None,
    call: Annotated[
        str | None, typer.Option("--call", help="Only this call (its id, or how it begins).")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Tell entry by entry what a trace recorded, with what its commitments open to.

    Nothing is verified. Exits with 13 where the trace cannot be read.
    """
    path = find_trace(trace, os.environ)
    tell("nothing here is verified", f"safeconduct trace verify {path}")
    shown, vault = 0, own_vault(os.environ)
    try:
        steps = _wanted(read_opened(path, vault=vault), session, call)
        shown = _print_json(steps) if as_json else _print_story(steps)
    except TraceInvalid as error:
        tell(f"{error.message} [{error.code}]", "name a trace folder, or a name from: trace ls")
        return Exit.TRACE_IO
    if not shown and not (session or call):
        tell(f"{path} has no entries", "name a trace folder, or a name from: trace ls")
        return Exit.TRACE_IO
    if not shown:
        raise UsageError("the trace has no such session or call", hint="leave the option away")
    return Exit.OK


def _wanted(steps: Iterator[_Step], session: str | None, call: str | None) -> Iterator[_Step]:
    for index, entry, opened in steps:
        if session and not entry.session.startswith(session):
            continue
        if call and not str(entry.body.get("call", "")).startswith(call):
            continue
        yield index, entry, opened


def _print_json(steps: Iterator[_Step]) -> int:
    """Print a list, entry by entry: a trace may be larger than memory."""
    shown = 0
    print("[", end="")
    try:
        for index, entry, opened in steps:
            print(
                ",\n" if shown else "\n", json.dumps(_plain(index, entry, opened)), sep="", end=""
            )
            shown += 1
    finally:
        print("\n]")
    return shown


def _plain(index: int, entry: Entry, opened: Opened) -> dict[str, object]:
    return {
        "index": index,
        "kind": str(entry.kind),
        "session": entry.session,
        "time": entry.time,
        "body": entry.body,
        "opened": {name: _opened_json(name, item) for name, item in opened.items()},
    }


def _opened_json(name: str, item: Opening | Missing) -> dict[str, object]:
    if isinstance(item, Missing):
        return {"missing": item.code}
    if len(item.data) > _JSON_BYTES_MAX:
        return {"left_out_bytes": len(item.data)}
    if name in _RAW:
        return dict(output_json(item.data))
    try:
        return {"value": item.json()}
    except TraceInvalid as error:
        return {"missing": error.code}


def _print_story(steps: Iterator[_Step]) -> int:
    shown = 0
    for index, entry, opened in steps:
        shown += 1
        moment = clock(entry.time)
        print_line(f"#{index} {moment} {entry.session[:8]} {entry.kind}  {_sentence(entry)}")
        for name, item in opened.items():
            _print_opened(name, item)
    return shown


def _sentence(entry: Entry) -> str:
    """Say in one line what the clear fields tell. Any field may be absent or of another type."""
    words = _Words({name: _word(value) for name, value in entry.body.items()})
    if entry.kind is EntryKind.CALL_OUTCOME:
        words["ending"] = _ending(entry.body)
    return clip(_STORY[entry.kind].format_map(words), _VALUE_CHARACTERS)


class _Words(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"no {name}"


def _word(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in cast("list[object]", value)) or "nothing"
    return "none" if value is None else str(value)


def _ending(body: Mapping[str, object]) -> str:
    facts = [str(body.get("status", ""))]
    for name in ("code", "exit_code", "signal", "limit", "tier"):
        if body.get(name) is not None:
            facts.append(f"{name} {body[name]}")
    if body.get("truncated"):
        facts.append("output cut at its limit")
    return ", ".join(facts)


def _print_opened(name: str, item: Opening | Missing) -> None:
    if isinstance(item, Missing):
        print_line(f"    {name}: {item.code} ({item.reason})")
    elif name in _RAW:
        _print_output(name, item.data)
    else:
        text = item.data[: 4 * _VALUE_CHARACTERS].decode("utf-8", "backslashreplace")
        left_out = len(item.data) - len(text.encode("utf-8", "replace"))
        cut = clip(text, _VALUE_CHARACTERS)
        print_line(f"    {name}: {cut}{f' … ({left_out} more bytes)' if left_out > 0 else ''}")


def _print_output(name: str, data: bytes) -> None:
    head = data[: _OUTPUT_LINES * _LINE_CHARACTERS * 4]
    lines = head.decode("utf-8", "backslashreplace").splitlines()
    for line in lines[:_OUTPUT_LINES]:
        print_line(f"    {name}| {clip(line, _LINE_CHARACTERS)}")
    if len(lines) > _OUTPUT_LINES or len(head) < len(data):
        print_line(f"    {name}| … ({len(data)} bytes in all; --json shows more)")
