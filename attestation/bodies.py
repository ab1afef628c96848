"""Step "record": whether a body may be recorded, and its bytes.

``require_plain`` and ``require_body`` are the rule. The bodies that every call has are first tried
against a typed form: what msgspec finds to fit, spelled in printable ASCII, also fits the rule.
INVARIANT: a form accepts nothing that the rule refuses; a property test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from safeconduct.call import EntryKind, Json

from .encoding import MAX_INTEGER, require_plain, spell
from .entry import MAX_NAME_CHARACTERS, require_body

_encode = msgspec.json.Encoder(order="deterministic").encode
_convert = msgspec.convert
# Looking up a member of an Enum runs Python code; these are looked up for every entry.
_INTENT, _DECISION = EntryKind.CALL_INTENT, EntryKind.CALL_DECISION
_OUTCOME = EntryKind.CALL_OUTCOME
# Printable ASCII is seen in the spelled bytes, all at once.
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
_Integer = Annotated[int, msgspec.Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a body may hold besides its commitments, for the quick way."""

    call: _Name


class _Intent(_Form, frozen=True, kw_only=True):
    tool: _Name
    caller: _Name
    origin: _Name
    parent: str | None = None


class _Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str | None = None
    calls: _Integer = 0
    denied: _Integer = 0
    now_ms: _Integer = 0


class _Decision(_Form, frozen=True, kw_only=True):
    effect: Literal["allow", "ask", "deny"]
    code: _Name
    rules: list[str]
    policy: _Name
    enforcement: Literal["object", "sandbox", "advisory"]
    profile: str | None = None
    facts: _Facts | None = None
    observed: bool = False
    irreversible: bool = False
    obligations: list[str] = []


class _Outcome(_Form, frozen=True, kw_only=True):
    status: Literal["ok", "failed", "limit", "denied", "error", "unknown"]
    code: str | None = None
    exit_code: _Integer | None = None
    signal: _Integer | None = None
    limit: str | None = None
    truncated: bool = False
    tier: str | None = None
    layers: list[str] = []
    held: dict[str, str] = {}
    usage: dict[str, _Integer | None] = {}
    repeats: _Integer | None = None


def spell_body(kind: EntryKind, body: Mapping[str, Json], commitments: Mapping[str, Json]) -> bytes:
    """Return the bytes of a body with its commitments.

    Raise TraceInvalid ``trace.body`` or ``trace.encoding`` for what may not be recorded.
    """
    whole = {**body, **commitments} if commitments else body
    if kind is _DECISION:
        form: type[_Form] | None = _Decision
    elif kind is _OUTCOME:
        form = _Outcome
    else:
        form = _Intent if kind is _INTENT and "document" in commitments else None
    if form is not None:
        try:
            _convert(body, form)
            data = _encode(whole)
        except (TypeError, ValueError, RecursionError, OverflowError):
            pass  # msgspec.ValidationError is a ValueError; what is wrong is said below
        else:
            # A backslash would spell a quote, a backslash or a control character, DEL itself.
            if data.isascii() and b"\\" not in data and b"\x7f" not in data:
                return data
    require_plain(body)  # before commitments enter it: those are ours, and flat is fast
    require_body(kind, whole)
    return spell(whole)
