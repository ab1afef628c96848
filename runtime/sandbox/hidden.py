"""Step "sandbox": find what a profile hides in the folders it grants.

A folder that cannot be searched is hidden as a whole: a program that owns it may have closed it for
just as long as this takes, and a name in a folder that cannot be listed can still be guessed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from safeconduct.call import Profile
from safeconduct.errors import SandboxFailed

from . import folders, places
from .witness import Witness

# LIMIT: entries looked at to find what a profile hides; more refuses the call.
_ENTRIES_MAX = 200_000


def find_hidden(profile: Profile, hides: Callable[[str], bool], witness: Witness) -> Iterator[str]:
    """Yield absolute paths that exist and have to be covered; ``hides`` judges one.

    ``witness`` is shown every folder before it is searched. Raises SandboxFailed where something
    can be neither searched nor covered.
    """
    roots = {*profile.read, *profile.write}
    for path in _search(roots, hides, witness):
        cover = _cover(path, roots)
        if cover is not None:
            yield cover


def _search(roots: set[str], hides: Callable[[str], bool], witness: Witness) -> Iterator[str]:
    waiting = sorted(roots)
    seen = 0
    while waiting:
        folder = waiting.pop()
        if hides(folder):
            yield folder
            continue
        witness.add(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > _ENTRIES_MAX:
                        raise _too_many()
                    if hides(entry.path):
                        yield entry.path
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            if _must_cover(folder, error):
                yield folder


def _must_cover(folder: str, error: OSError) -> bool:
    """Judge a folder that could not be searched."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return False  # gone, or a granted file
    if isinstance(error, PermissionError):
        return not _shut_for_programs(folder)
    # Such as a path longer than the kernel takes: what cannot be searched is refused.
    raise SandboxFailed(
        f"{folder[:200]} cannot be searched for hidden files: {error.strerror}.", step="shield"
    ) from error


def _shut_for_programs(folder: str) -> bool:
    """Tell whether no program of this user can enter a folder, nor change that it cannot."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    # Programs of root's sandboxes have other users, who may have rights that we lack.
    if os.geteuid() == 0 or folders.is_ours(status):
        return False
    return not os.access(folder, os.X_OK, effective_ids=True)


def _cover(path: str, roots: set[str]) -> str | None:
    """Return what to cover so that ``path`` is: itself, or the folder around it that is closed."""
    while True:
        try:
            os.lstat(path)
        except PermissionError:
            if path not in roots:
                path = os.path.dirname(path)
                continue
        except OSError:
            pass
        else:
            return path
        # What is not there needs no cover; everything else is refused.
        places.look(path)
        return None


def _too_many() -> SandboxFailed:
    return SandboxFailed(
        f"More than {_ENTRIES_MAX} entries to search for hidden files.", step="shield"
    )
