"""Step "sandbox": open folders that a program may have closed to us.

INVARIANT: what we may not look at is not taken for absent. Programs of an ordinary user's sandbox
have the user's uid, as the supervisor has, which is not above permissions (CAP_DAC_OVERRIDE in
capabilities(7)): whoever owns a folder can chmod(2) it so that neither is told what it holds, put
something there all the same, and open it again later. Mounts and Landlock do not stop that.

Rights are only added, only those that are needed, only for the owner, and only to a folder of our
own that is already open: no link is followed, and nothing else can take its place meanwhile.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

# What the owner needs to reach what is in a folder, to list it too, and to change its entries.
SEARCH: Final = stat.S_IXUSR
LIST: Final = stat.S_IRUSR | stat.S_IXUSR
CHANGE: Final = stat.S_IWUSR | stat.S_IXUSR

# Opening for O_PATH asks for no right over the folder itself, open(2).
HANDLE: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LISTED: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_ours(status: os.stat_result) -> bool:
    """Tell whether a program of ours, of this user, could have changed the mode."""
    return status.st_uid == os.geteuid()


def admit(folder: int, rights: int) -> bool:
    """Give ourselves ``rights`` over an open folder; False where it is not ours.

    Raises OSError where it cannot be changed.
    """
    status = os.fstat(folder)
    if not is_ours(status):
        return False
    if status.st_mode & rights == rights:
        return True  # given meanwhile: whoever was refused before tries again
    # fchmod(2) takes no O_PATH descriptor; the link in /proc leads to the object itself.
    os.chmod(f"/proc/self/fd/{folder}", stat.S_IMODE(status.st_mode) | rights)
    return True


def look_at(folder: int, name: str) -> os.stat_result:
    """Return what is at ``name`` in an open folder, which may be closed to us. Raises OSError."""
    try:
        return os.lstat(name, dir_fd=folder)
    except PermissionError:
        if not admit(folder, SEARCH):
            raise
        return os.lstat(name, dir_fd=folder)


def step_down(folder: int, name: str) -> int:
    """Return a handle on the folder at ``name``, which may be closed itself.

    Raises OSError; NotADirectoryError for a link too.
    """
    try:
        return os.open(name, HANDLE, dir_fd=folder)
    except PermissionError:
        if not admit(folder, SEARCH):
            raise
        return os.open(name, HANDLE, dir_fd=folder)


def list_again(handle: int) -> int:
    """Open a folder that one has a handle on so that its entries can be listed and looked at.

    Raises OSError.
    """
    try:
        # Looking "." up needs the right to search, opening it the right to read.
        return os.open(".", _LISTED, dir_fd=handle)
    except PermissionError:
        if not admit(handle, LIST):
            raise
        return os.open(".", _LISTED, dir_fd=handle)


def list_below(folder: int, name: str) -> int:
    """Open the folder at ``name`` so that its entries can be listed. Raises OSError."""
    # To go on to what it holds takes another right, which is added when it turns out to be missing.
    with suppress(PermissionError):
        return os.open(name, _LISTED, dir_fd=folder)
    handle = step_down(folder, name)
    try:
        return list_again(handle)
    finally:
        os.close(handle)


def open_way(root: str, folder: str) -> None:
    """Give ourselves the rights to search and list every folder from ``root`` down to ``folder``.

    Stops at the first that is missing, no folder, or not ours to open: whoever looks behind it is
    told so by the kernel.
    """
    if os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        return
    parts = folder.removeprefix(root).strip("/")
    with suppress(OSError):
        current = os.open(root, HANDLE)
        try:
            for part in parts.split("/") if parts else ():
                _admit_listing(current)
                below = step_down(current, part)
                os.close(current)
                current = below
            _admit_listing(current)
        finally:
            os.close(current)


def _admit_listing(folder: int) -> None:
    with suppress(PermissionError):
        os.close(list_again(folder))
