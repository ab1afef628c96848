"""Policy step 1: which files a Codex patch touches. Every path that any reader could find in it.

The parser that applies a patch is lenient: it trims lines before it looks for a header, and takes
a patch out of a here-document (codex-rs/apply-patch/src/parser.rs). So every line that begins
with `***` after trimming counts as a header here, also where it is only context, and one that is
not understood refuses the patch.
"""

from __future__ import annotations

from typing import Final

# LIMIT: files of one patch.
MAX_PATCH_PATHS: Final = 256
_MARKER: Final = "***"
_PLAIN: Final = frozenset({"*** Begin Patch", "*** End Patch", "*** End of File"})
_HEADERS: Final = ("*** Add File: ", "*** Delete File: ", "*** Update File: ", "*** Move to: ")


def patch_paths(patch: str) -> tuple[str, ...]:
    """Return the paths as they stand in the headers, without repeats; ValueError for no patch."""
    paths: dict[str, None] = {}
    for line in patch.split("\n"):
        header = line.strip()
        if not header.startswith(_MARKER) or header in _PLAIN or set(header) == {"*"}:
            continue
        paths[_path(line, header)] = None
        if len(paths) > MAX_PATCH_PATHS:
            raise ValueError(f"a patch names more than {MAX_PATCH_PATHS} files")
    if not paths:
        raise ValueError("a patch names no file")
    return tuple(paths)


def _path(line: str, header: str) -> str:
    for prefix in _HEADERS:
        path = header.removeprefix(prefix)
        if path != header and path == path.strip() and path:
            # Where a line is not trimmed, what follows the path would belong to it.
            if line.rstrip("\r").endswith(path):
                return path
            break
    raise ValueError(f"a patch has a header that is not understood: {header[:40]!r}")
