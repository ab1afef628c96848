"""Step "record": files of one trace folder, opened as if somebody hostile had prepared it.

Every component below the root is opened relative to its parent's descriptor, without following
links (openat(2), O_NOFOLLOW), and without blocking on FIFOs or devices. Reads are bounded. Writes
go to a temporary name, are synced and renamed, so that a reader sees a whole file or none.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from safeconduct.errors import TraceInvalid

from .files import (
    CHANGE,
    create,
    read_limited,
    require_only_name,
    shred,
    sync_file_system,
    unreadable,
    write_whole,
)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = CHANGE | os.O_CREAT
# With more files at once, one syncfs(2) is sooner done than an fdatasync(2) for each.
_MANY_FILES = 24
# A read returns at most this many names; a folder of ours holds far fewer at any one level.
MAX_NAMES = 100_000


class Folder:
    """A trace folder held open by descriptor. Paths are relative, with ``/`` between parts."""

    def __init__(self, directory: Path | int) -> None:
        """Open an existing folder. The root may be reached through links, or be a descriptor.

        One that is handed in as a descriptor stays open, and is the caller's.
        """
        name, above = (".", directory) if isinstance(directory, int) else (directory, None)
        try:
            self._root = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
        except OSError as error:
            raise TraceInvalid(
                f"{directory}: {error.strerror}", code="trace.io", hint="name a trace folder"
            ) from error

    def close(self) -> None:
        """Release the descriptor; what comes later fails, whoever has its number then."""
        root, self._root = self._root, -1
        os.close(root)

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, path: str, *, limit: int) -> bytes:
        """Return a whole regular file of at most ``limit`` bytes.

        Raise TraceInvalid ``trace.missing``, ``trace.hostile`` (a link, FIFO, folder or too large)
        or ``trace.io``.
        """
        with self.open(path) as fd:
            return read_limited(fd, path, limit)

    @contextmanager
    def open(self, path: str) -> Generator[int]:
        """Open a regular file to read; it is closed on leaving the block."""
        with self._parent(path) as (parent, name):
            try:
                fd = os.open(name, _READ, dir_fd=parent)
            except OSError as error:
                raise unreadable(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TraceInvalid(f"{path} is not a regular file", code="trace.hostile")
            yield fd
        finally:
            os.close(fd)

    def exists(self, path: str) -> bool:
        """Tell whether something has this name, without following it."""
        try:
            with self._parent(path) as (parent, name):
                os.stat(name, dir_fd=parent, follow_symlinks=False)
        except (OSError, TraceInvalid):
            return False
        return True

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder; empty where there is none."""
        try:
            with self._descend(path.split("/") if path else []) as fd, os.scandir(fd) as entries:
                names: list[str] = []
                for entry in entries:
                    if len(names) == MAX_NAMES:
                        raise TraceInvalid(f"{path} holds too many files", code="trace.hostile")
                    names.append(entry.name)
                return sorted(names)
        except TraceInvalid as error:
            if error.code == "trace.missing":
                return []
            raise
        except OSError as error:
            raise unreadable(path or "the folder", error) from error

    @contextmanager
    def scan(self, path: str) -> Generator[Iterator[os.DirEntry[str]]]:
        """Look through a folder of any length, in no order. A missing one is a TraceInvalid."""
        with self._descend(path.split("/")) as fd, os.scandir(fd) as entries:
            yield entries

    def statuses(self, path: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield (name, status) of what is in a folder, without following links."""
        with self._descend(path.split("/")) as fd, os.scandir(fd) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)

    def make(self, path: str, *, mode: int = 0o755) -> None:
        """Create a folder, and the ones above it, durably."""
        self.make_below(self._root, path.split("/"), mode)

    @staticmethod
    def make_below(root: int, parts: list[str], mode: int) -> None:
        """Create nested folders below a descriptor."""
        fd = os.dup(root)
        try:
            for part in parts:
                with suppress(FileExistsError):
                    os.mkdir(part, mode, dir_fd=fd)
                    os.fsync(fd)
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        finally:
            os.close(fd)

    def write(
        self,
        path: str,
        data: bytes,
        *,
        mode: int = 0o644,
        durable: bool = True,
        synced: bool = False,
    ) -> None:
        """Replace a file at once. When ``durable``, it survives a power cut after the return.

        When only ``synced``, its bytes do, under the name it had or the one it has now.
        """
        folder = path.rpartition("/")[0]
        if folder and not self.exists(folder):
            self.make(folder)
        with self._parent(path) as (parent, name):
            temporary = f".{name}.tmp"
            fd = create(temporary, mode, parent)
            try:
                write_whole(fd, data)
                if durable or synced:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            if durable:
                os.fsync(parent)

    def write_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Replace many files; all survive a power cut after the return.

        Each is whole under its name at any time, for readers; after a power cut one may be torn
        that this call did not return for. A folder is synced once for all files in it, and when
        there are very many files, the file system once for all.
        """
        files = list(files)
        together = len(files) > _MANY_FILES
        folders: dict[str, None] = {}
        for path, data in files:
            self.write(path, data, durable=False, synced=not together)
            folders[path.rpartition("/")[0]] = None
        if together:
            sync_file_system(self._root)
            return
        for folder in folders:
            with self._descend(folder.split("/")) as fd:
                os.fsync(fd)

    def open_append(self, path: str, *, mode: int = 0o644) -> int:
        """Open or create a file to append to; the caller closes the descriptor."""
        return self._open_durable(path, _CREATE | os.O_APPEND, mode)

    def open_end(self, path: str, *, mode: int = 0o644) -> int:
        """Do the same, but only be where it ends now: what follows may be set aside before."""
        fd = self._open_durable(path, _CREATE, mode)
        os.lseek(fd, 0, os.SEEK_END)
        return fd

    def _open_durable(self, path: str, flags: int, mode: int) -> int:
        with self._parent(path) as (parent, name):
            fd = os.open(name, flags, mode, dir_fd=parent)
            try:
                require_only_name(path, fd)
                os.fsync(parent)
            except BaseException:
                os.close(fd)
                raise
            return fd

    @contextmanager
    def appended(self, path: str, *, mode: int = 0o644) -> Generator[int]:
        """Open or create a file to append to; it is closed on leaving the block."""
        fd = self.open_append(path, mode=mode)
        try:
            yield fd
        finally:
            os.close(fd)

    def lock(self) -> None:
        """Lock the folder itself, flock(2), until it is closed. Raise BlockingIOError."""
        fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def open_lock(self, path: str) -> int:
        """Open or create a lock file; the caller closes the descriptor."""
        with self._parent(path) as (parent, name):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, 0o600, dir_fd=parent)

    def truncate(self, path: str, size_bytes: int) -> None:
        """Cut a file of ours and make that durable."""
        with self._parent(path) as (parent, name):
            fd = os.open(name, CHANGE, dir_fd=parent)
            try:
                require_only_name(path, fd)
                os.ftruncate(fd, size_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError), self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def destroy(self, path: str) -> bool:
        """Overwrite a file with zeros and remove it, durably; tell whether it was there."""
        try:
            with self._parent(path) as (parent, name):
                return shred(parent, name, linked=False)
        except TraceInvalid as error:
            if error.code == "trace.missing":  # nor is its folder
                return False
            raise

    def remove_folder(self, path: str) -> None:
        """Remove a flat folder with its files, if it is there."""
        for name in self.names(path):
            self.remove(f"{path}/{name}")
        with suppress(FileNotFoundError, TraceInvalid), self._parent(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    @contextmanager
    def _parent(self, path: str) -> Generator[tuple[int, str]]:
        *folders, name = path.split("/")
        with self._descend(folders) as fd:
            yield fd, name

    @contextmanager
    def _descend(self, parts: list[str]) -> Generator[int]:
        fd = os.dup(self._root)
        try:
            for part in parts:
                try:
                    below = os.open(part, _DIRECTORY, dir_fd=fd)
                except OSError as error:
                    raise unreadable("/".join(parts), error) from error
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)
