"""A real signer, or recorder, that dies by SIGKILL before its n-th file operation in a rotation.

``killed_signer.py PACKAGE STEP KEY STATE FORBIDDEN…`` is a signer with its channel as descriptor
0. ``killed_signer.py PACKAGE --record STEP KEY STATE TRACE`` records, rotates and closes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

# What changes names or bytes, or makes them durable; opening is not listed, as it follows by one.
OPERATIONS = ("link", "rename", "unlink", "fsync", "pwrite", "chmod", "write", "fdatasync")


class Countdown:
    """While it is open, counts file operations of this process and kills it before one of them.

    With ``error`` that one operation fails with this errno instead, and the process goes on.
    """

    def __init__(
        self, step: int, *, tell: Callable[[str], object] | None = None, error: int = 0
    ) -> None:
        self._left, self._tell, self._error = step, tell, error
        self._kept: dict[str, Callable[..., object]] = {}

    def __enter__(self) -> Countdown:
        for name in OPERATIONS:
            self._kept[name] = getattr(os, name)
            setattr(os, name, self._counted(name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, operation in self._kept.items():
            setattr(os, name, operation)

    def _counted(self, name: str) -> Callable[..., object]:
        operation = self._kept[name]

        def counted(*arguments: object, **options: object) -> object:
            self._left -= 1
            if self._left == 0 and self._error:
                raise OSError(self._error, os.strerror(self._error))
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._tell is not None:
                self._tell(name)
            return operation(*arguments, **options)

        return counted


def record(step: str, *arguments: str) -> int:
    """Record a call, and count from where the log is to go on under a new key."""
    from safeconduct.attestation import SignerClient, TraceWriter
    from safeconduct.attestation.writing.handover import rotate_key

    key, state, trace = (Path(argument) for argument in arguments)
    signer = SignerClient.start(key, state=state, forbidden=[trace])
    with TraceWriter.open(trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        with Countdown(int(step)):
            rotate_key(writer, signer, trace)
            writer.close_session(session)
    signer.close()
    return 0


def main(package: str, step: str, *arguments: str) -> int:
    """Serve as the signer does, and count from the first request to rotate."""
    sys.path.insert(0, package)
    if step == "--record":
        return record(*arguments)
    from safeconduct.attestation.signing import signer_process
    from safeconduct.attestation.signing.signer_request import Request, Rotate, parse_request

    armed: list[Countdown] = []

    def parse(data: bytes) -> Request:
        request = parse_request(data)
        if isinstance(request, Rotate) and not armed:
            armed.append(Countdown(int(step)).__enter__())
        return request

    signer_process.parse_request = parse  # type: ignore[attr-defined]
    return signer_process.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
