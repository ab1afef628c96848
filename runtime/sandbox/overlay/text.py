"""Step "sandbox": the change of a small text file, as lines for a person; nothing is escaped."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Final

from . import content, kernel
from .changes import Change, Kind, Node

# LIMIT: bytes of a file that is shown, and lines of it that are compared: difflib's time grows with
# the square of the lines that differ.
_BYTES_MAX: Final = 256 << 10
_LINES_MAX: Final = 1_000
_CONTEXT: Final = 3


def unified(change: Change, upper: int, workspace: int) -> list[str] | None:
    """Return a unified diff without line ends, or None where there is no text to compare.

    Lines are hostile: print them only through the terminal's escaping. Both sides are read again;
    None also where they are no longer what the Change says.
    """
    if change.node is not Node.FILE or change.kind is Kind.MODE or change.refused:
        return None
    was_file = change.base is not None and change.before is not None
    old = _lines(workspace, change.path, change.before) if was_file else []
    new = _lines(upper, change.path, change.after) if change.kind is not Kind.DELETED else []
    if old is None or new is None:
        return None
    head = [
        f"--- {'a/' + change.path if was_file else '/dev/null'}",
        f"+++ {'b/' + change.path if change.kind is not Kind.DELETED else '/dev/null'}",
    ]
    return [*head, *_hunks(old, new)]


def _lines(folder: int, path: str, expected: str | None) -> list[str] | None:
    try:
        with content.regular(kernel.open_beneath(folder, path, kernel.FILE)) as fd:
            size = os.fstat(fd).st_size
            if size > _BYTES_MAX:
                return None
            if content.digest(fd, size) != expected:
                return None
            text = os.pread(fd, size, 0).decode()
    except (OSError, content.Moved, UnicodeDecodeError):
        return None
    if "\0" in text:
        return None
    lines = text.split("\n")
    if lines[-1]:
        lines.append("\\ No newline at end of file")
    else:
        del lines[-1]
    return lines


def _hunks(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Compare what lies between the common beginning and the common end."""
    first = _common(old, new)
    last = _common(old[first:][::-1], new[first:][::-1])
    start = max(0, first - _CONTEXT)
    ones = old[start : min(len(old), len(old) - last + _CONTEXT)]
    others = new[start : min(len(new), len(new) - last + _CONTEXT)]
    if len(ones) + len(others) > _LINES_MAX:
        yield _range(start, len(ones), len(others), start)
        yield from (f"-{line}" for line in ones)
        yield from (f"+{line}" for line in others)
        return
    matcher = difflib.SequenceMatcher(None, ones, others)
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        from_, to = group[0], group[-1]
        yield _range(start + from_[1], to[2] - from_[1], to[4] - from_[3], start + from_[3])
        for tag, one, one_end, other, other_end in group:
            if tag == "equal":
                yield from (f" {line}" for line in ones[one:one_end])
                continue
            yield from (f"-{line}" for line in ones[one:one_end])
            yield from (f"+{line}" for line in others[other:other_end])


def _range(old: int, old_count: int, new_count: int, new: int) -> str:
    # diff(1) counts from 1, and names the line before where a side has none.
    old_at, new_at = old + bool(old_count), new + bool(new_count)
    return f"@@ -{old_at},{old_count} +{new_at},{new_count} @@"


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
