"""Step "verify": processes that check ranges of a log side by side.

A worker loads neither cryptography nor anything that the check of a bundle does not need. It gets
the trace folder as a descriptor, reads requests from descriptor 0 and answers on descriptor 1;
when its input ends, it ends. Memory stays flat: at most two ranges are under way in each.
"""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec

from safeconduct import errors
from safeconduct.attestation.folder import Folder

from .ranges import check_range
from .summary import Summary

# LIMIT: workers of one verification; more cores than this were not measured.
MAX_JOBS = 64
# Ranges asked of a worker ahead of the one that is read, so that it never waits for us.
_AHEAD = 2
_STOP_S = 5.0
_REQUEST: Final = struct.Struct(">QI?")
_LENGTH: Final = struct.Struct(">I")
# LIMIT: a summary: the calls of a range, and log.open entries told whole.
_MAX_ANSWER_BYTES = 64 << 20
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    f"from {__package__}.worker import main; "
    "raise SystemExit(main(sys.argv[2:]))"
)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Summary)


class WorkerLost(Exception):
    """A worker could not be started or went away; its range can be checked here instead."""


def main(arguments: Sequence[str]) -> int:
    """Serve one verification: ``FD SIZE``."""
    fd, size = (int(argument) for argument in arguments)
    gc.disable()  # nothing here makes cycles, and looking for them costs a tenth of the time
    with Folder(fd) as folder, suppress(BrokenPipeError):
        while len(request := sys.stdin.buffer.read(_REQUEST.size)) == _REQUEST.size:
            start, count, structure = _REQUEST.unpack(request)
            summary = check_range(folder, range(start, start + count), size, structure=structure)
            answer = _encoder.encode(summary)
            sys.stdout.buffer.write(_LENGTH.pack(len(answer)) + answer)
            sys.stdout.buffer.flush()
    return 0


class _Worker:
    """One worker process and the pipes to it."""

    def __init__(self, directory_fd: int, size: int) -> None:
        # This folder may be reached through a link; errors.py lies inside the package itself.
        root = str(Path(errors.__file__).parents[1])
        argv = [sys.executable, "-I", "-c", _BOOT, root, str(directory_fd), str(size)]
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(directory_fd,),
                start_new_session=True,  # an interrupt is for us; the worker ends with its pipe
            )
        except (OSError, ValueError) as error:
            raise WorkerLost("it cannot be started") from error
        self.pid = self._process.pid

    def ask(self, bundles: range, structure: bool) -> None:
        try:
            pipe = _pipe(self._process.stdin)
            pipe.write(_REQUEST.pack(bundles.start, len(bundles), structure))
            pipe.flush()
        except OSError as error:
            raise WorkerLost("it does not listen") from error

    def answer(self) -> Summary:
        pipe = _pipe(self._process.stdout)
        head = pipe.read(_LENGTH.size)
        if len(head) != _LENGTH.size:
            raise WorkerLost("it ended")
        length = _LENGTH.unpack(head)[0]
        data = pipe.read(length) if length <= _MAX_ANSWER_BYTES else b""
        if len(data) != length:
            raise WorkerLost("it ended in the middle of an answer")
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise WorkerLost("its answer cannot be read") from error

    def close(self) -> None:
        with suppress(OSError):
            _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # noqa: S101 - INVARIANT: both were asked for
    return pipe


def check_ranges(
    directory_fd: int,
    size: int,
    ranges: Iterable[range],
    jobs: int,
    *,
    structure: Callable[[], bool],
) -> Generator[tuple[range, Summary]]:
    """Yield each range with its summary, in order, checked by ``jobs`` processes.

    ``structure`` tells, when a range is handed out, whether its entries are still to be parsed.
    With one job, and where a worker is lost, ranges are checked in this process.
    """
    if jobs < 2:
        yield from _check_here(directory_fd, size, ranges, structure)
        return
    waiting = deque[tuple[_Worker, range]]()
    workers: list[_Worker] = []
    left = iter(ranges)
    try:
        workers += (_Worker(directory_fd, size) for _ in range(jobs))
        idle = deque(workers * _AHEAD)
        while True:
            while idle and (bundles := next(left, None)) is not None:
                worker = idle.popleft()
                waiting.append((worker, bundles))
                worker.ask(bundles, structure())
            if not waiting:
                return
            worker, bundles = waiting[0]
            summary = worker.answer()
            waiting.popleft()
            idle.append(worker)
            yield bundles, summary
    except WorkerLost:
        for worker in workers:
            worker.close()
        workers.clear()
        rest = [bundles for _, bundles in waiting]
        yield from _check_here(directory_fd, size, rest, structure)
        yield from _check_here(directory_fd, size, left, structure)
    finally:
        for worker in workers:
            worker.close()


def _check_here(
    directory_fd: int, size: int, ranges: Iterable[range], structure: Callable[[], bool]
) -> Generator[tuple[range, Summary]]:
    with Folder(directory_fd) as folder:
        for bundles in ranges:
            yield bundles, check_range(folder, bundles, size, structure=structure())


def usable_cpus() -> int:
    """Return on how many processors this process may run."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1
