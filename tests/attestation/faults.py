"""A disk that fails: every operation on files of one folder is counted, and the n-th can fail.

It stands under the real writer, in the same process: `os` functions that change files are wrapped
while `Disk.watching` lasts, and act only on what lies below the folder.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from inspect import currentframe
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import pytest

from safeconduct.attestation import folder as folder_module

# What changes a file or makes it durable. Reading is hostile input's matter, not the disk's.
OPERATIONS = ("write", "pwrite", "fdatasync", "fsync", "rename", "unlink", "mkdir", "ftruncate")
_CREATING = os.O_CREAT
_Argument: TypeAlias = Any  # of whatever the operation takes: it is passed on as it is


class Disk:
    """Counts operations below a folder; ``fail_at`` is the one that fails, with ``error``.

    ``short`` lets the failing write take half of its bytes first, as a disk that fills up does.
    ``sticky`` has every later write and sync fail too: a full disk stays full.
    """

    def __init__(
        self, root: Path, *, fail_at: int = -1, error: int = errno.EIO, short: bool = False,
        sticky: bool = False,
    ) -> None:  # fmt: skip
        self._root = os.path.realpath(root)
        self._fail_at, self._error, self._short, self._sticky = fail_at, error, short, sticky
        self.count = 0
        self.failed = ""
        self.sites: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Generator[None]:
        """Stand between the writer and the kernel inside the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            patch.setattr(os, "open", self._opening(os.open))
            real = folder_module.sync_file_system
            patch.setattr(folder_module, "sync_file_system", self._wrapped("syncfs", real))
            yield

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: _Argument, **kwargs: _Argument) -> _Argument:
            if not self._is_ours(args, kwargs):
                return real(*args, **kwargs)
            if self._is_turn(name, currentframe()):
                if self._short and name == "write" and len(args[1]) > 1:
                    return real(args[0], args[1][: len(args[1]) // 2])
                raise OSError(self._error, os.strerror(self._error))
            return real(*args, **kwargs)

        return operation

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def opening(*args: _Argument, **kwargs: _Argument) -> int:
            flags = args[1] if len(args) > 1 else kwargs["flags"]
            creates = flags & _CREATING and self._is_ours(args, kwargs)
            if creates and self._is_turn("open", currentframe()):
                raise OSError(self._error, os.strerror(self._error))
            return real(*args, **kwargs)

        return opening

    def _is_ours(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        of = kwargs.get("dir_fd", kwargs.get("src_dir_fd", args[0] if args else None))
        if isinstance(of, int):
            try:
                of = os.readlink(f"/proc/self/fd/{of}")
            except OSError:
                return False
        return isinstance(of, str) and os.path.abspath(of).startswith(self._root)

    def _is_turn(self, name: str, frame: FrameType | None) -> bool:
        caller = frame.f_back if frame is not None else None
        assert caller is not None
        site = f"{Path(caller.f_code.co_filename).name}:{caller.f_code.co_name}:{name}"
        self.sites[site] = self.sites.get(site, 0) + 1
        self.count += 1
        if self.count - 1 == self._fail_at:
            self.failed = site
            return True
        return bool(self.failed) and self._sticky
