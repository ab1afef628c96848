"""The signer: a process of its own that holds the log's key and signs only growing trees.

It reads bounded binary frames on descriptor 0 and answers there; end of input ends it. Before a
signature leaves, the head it covers is on disk, so that no crash makes it sign a smaller tree or
another tree of the same size. ``signer.py`` is the other end and describes the frames.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from safeconduct.errors import TraceInvalid

from .checkpoint import Checkpoint
from .key import load_key, require_outside
from .merkle import EMPTY_ROOT, verify_consistency
from .note import SigningKey
from .signer import (
    ANSWER_BAD,
    ANSWER_GOOD,
    Request,
    error_frame,
    parse_request,
    receive,
    send,
)

_PR_SET_DUMPABLE = 4  # prctl(2)
_MAX_STATE_BYTES = 1024


def main(arguments: Sequence[str]) -> int:
    """Serve one client: ``KEY STATE [FORBIDDEN…]``. The channel is descriptor 0."""
    channel = socket.socket(fileno=0)
    try:
        _harden()
        key_path, state, *forbidden = (Path(argument) for argument in arguments)
        require_outside(state, forbidden)
        key = load_key(key_path, forbidden=forbidden)
        _prepare_state(state)
    except TraceInvalid as error:
        send(channel, ANSWER_BAD + error_frame(error))
        return 1
    send(channel, ANSWER_GOOD + key.verifier.line.encode())
    while (data := receive(channel)) is not None:
        try:
            answer = ANSWER_GOOD + _answer(key, state, parse_request(data))
        except TraceInvalid as error:
            answer = ANSWER_BAD + error_frame(error)
        except OSError as error:
            lost = TraceInvalid(f"the signer's state: {error.strerror}", code="signer.state")
            answer = ANSWER_BAD + error_frame(lost)
        send(channel, answer)
    return 0


def _harden() -> None:
    """Keep the key out of core dumps and out of reach of ptrace and /proc/<pid>/mem."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise TraceInvalid("the signer cannot be made non-dumpable", code="signer.state")


def _prepare_state(state: Path) -> None:
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(state)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise TraceInvalid(
            f"others can write the signer's state in {state}",
            code="key.permissions",
            hint=f"chmod 700 {state}",
        )


def _answer(key: SigningKey, state: Path, request: Request) -> bytes:
    path = state / sha256(request.origin.encode()).hexdigest()
    with _locked(state):
        last = _read_last(path, request.origin)
        if request.root is None:
            return last.text().encode()
        head = Checkpoint(origin=request.origin, size=request.new_size, root=request.root)
        _require_extends(last, request)
        _write_last(path, head)
        return key.sign(head.text()).encode()


def _require_extends(last: Checkpoint, request: Request) -> None:
    assert request.root is not None  # noqa: S101 - INVARIANT: only sign requests come here
    if request.old_size != last.size:
        raise _refused(f"the last signed tree has {last.size} entries, not {request.old_size}")
    if request.new_size < last.size:
        raise _refused(f"{request.new_size} entries are fewer than the {last.size} signed before")
    proof = request.proof
    if not verify_consistency(last.size, last.root, request.new_size, request.root, proof):
        raise _refused("the tree does not extend the one signed before")


@contextmanager
def _locked(state: Path) -> Generator[None]:
    """Let one signer at a time look at the state: two runtimes may share a key."""
    fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read_last(path: Path, origin: str) -> Checkpoint:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return Checkpoint(origin=origin, size=0, root=EMPTY_ROOT)
    with os.fdopen(fd, "rb") as file:
        data = file.read(_MAX_STATE_BYTES + 1)
    try:
        last = Checkpoint.parse(data.decode("ascii"))
    except (TraceInvalid, UnicodeDecodeError) as error:
        raise TraceInvalid("the signer's state is damaged", code="signer.state") from error
    if last.origin != origin:
        raise TraceInvalid("the signer's state is of another log", code="signer.state")
    return last


def _write_last(path: Path, head: Checkpoint) -> None:
    """Replace the state durably: data, then name, then folder."""
    temporary = path.with_suffix(".tmp")
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(fd, "wb") as file:
        file.write(head.text().encode())
        file.flush()
        os.fsync(fd)
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refused(why: str) -> TraceInvalid:
    return TraceInvalid(f"the signer refuses: {why}", code="signer.refused")
