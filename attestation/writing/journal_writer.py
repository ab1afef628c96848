"""Step "record": the open end of the journal, and who waits for the disk together.

Frames are put into memory under the writer's lock and written from there with one write(2). Who
needs them on disk leads one fdatasync(2) for all who came meanwhile, or waits for its leader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from errno import EINTR, ENOSPC
from itertools import pairwise
from threading import Lock

from safeconduct.attestation.files import allocate
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import (
    ASIDE_BYTES,
    journal_files,
    journal_path,
    write_failed,
)

from .group_sync import GroupSync

# So much is set aside at once, when less than this is left for one write. The rest of it is zeros
# that every reader of the journal has to read.
_ROOM_BYTES, _ROOM_LEFT_BYTES = 256 << 10, 64 << 10
_NEVER = 1 << 63


class Journal:
    """The file being written.

    ``put`` and ``write`` are called under the writer's lock, all else without it. After one failed
    write or sync nothing is accepted any more: the kernel may have dropped the dirty pages it
    could not write, so a retry that succeeds proves nothing (fsync(2), EIO).
    """

    def __init__(self, folder: Folder, lock: Lock, *, first: int, size: int) -> None:
        """Open ``<first>.wal`` to append entry number ``size`` next; ``lock`` is the writer's."""
        self._folder, self._lock = folder, lock
        self._file: int = first
        self._fd = folder.open_end(journal_path(first))
        self._bytes = self._room = os.fstat(self._fd).st_size
        self._buffer: list[bytes] = []
        self._size = size
        self._group = GroupSync(self._sync)
        self.start, self.stop = self._group.start, self._group.close

    @property
    def size_bytes(self) -> int:
        """Return the length of the file being written."""
        return self._bytes

    @property
    def first(self) -> int:
        """Return the index of the first entry in the file being written."""
        return self._file

    def put(self, frame: bytes, *, write: bool) -> None:
        """Take the frame of an entry into memory, and perhaps ``write`` it with those before."""
        self._buffer.append(frame)
        self._size += 1
        if write:
            self.write()

    def write(self) -> None:
        """Hand all frames to the kernel: from here on they survive a killed process."""
        if self._group.failure is not None:
            self._group.require_sound()
        buffer = self._buffer
        if not buffer:
            return
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        try:
            buffer.clear()
            if os.write(self._fd, data) != len(data):
                raise OSError(ENOSPC, "short write: no space left")
            self._bytes += len(data)
        except OSError as error:
            self._group.failure = error
            raise write_failed(error) from error
        except BaseException:
            # Whether the frames were written nobody knows: nothing may follow on them.
            self._group.failure = self._group.failure or OSError(EINTR, "interrupted")
            raise

    def sync(self, index: int) -> None:
        """Return once entry ``index`` is on disk. One fdatasync serves all who wait."""
        self._group.reach(index)

    def turn_over(self, ready: Callable[[int], object]) -> None:
        """Go on in a new file, the old one being on disk; ``remove`` removes it later.

        ``ready`` is called under the writer's lock with the new file's first index: no entry
        comes in between.
        """
        self._group.alone(lambda: self._turn_over(ready))

    def files_before(self, index: int) -> list[int]:
        """Return the files that hold only entries before ``index``, never the one in use."""
        pairs = pairwise(journal_files(self._folder))
        return [one for one, following in pairs if following <= index and one != self._file]

    def remove(self, files: Iterable[int]) -> None:
        """Remove files, oldest first: what stays must follow on without a gap."""
        for first in files:
            self._folder.remove(journal_path(first))

    def close(self) -> None:
        """Close the file and leave it: the next open recovers from it."""
        fd, self._fd = self._fd, -1  # the number may be somebody else's soon
        if fd >= 0:
            os.close(fd)

    def _sync(self) -> int:
        with self._lock:
            self._make_room()
            self.write()
            reached = self._size
        os.fdatasync(self._fd)  # no other leader can close it meanwhile
        return reached

    def _make_room(self) -> None:
        """Set the next stretch of the file aside before it is written; the caller has the lock.

        Where that cannot be done the file grows with each write, as slowly as any.
        """
        if self._bytes + _ROOM_LEFT_BYTES <= self._room:
            return
        end = self._bytes + _ROOM_BYTES
        end -= end % ASIDE_BYTES
        made = allocate(self._fd, self._bytes, end - self._bytes)
        self._room = end if made else _NEVER

    def _turn_over(self, ready: Callable[[int], object]) -> int:
        self._sync()  # most of it, while others may append
        with self._lock:
            self.write()
            os.fdatasync(self._fd)
            # A file without entries stays: the new one would have its name, and begin behind the
            # room that is set aside in it.
            if self._size != self._file:
                fd = self._folder.open_end(journal_path(self._size))
                old, self._fd = self._fd, fd
                self._file, self._bytes, self._room = self._size, 0, 0
                os.close(old)
                ready(self._size)
            return self._size
