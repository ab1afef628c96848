"""The errors of the product and the exit codes they become.

One class per thing a caller does differently. Each error has a stable ``code`` that is also
written in the trace, data fields, and ``hint``: one line on what to do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from .call import Outcome, Refused


class Exit(IntEnum):
    """Exit codes of the command line.

    1 is always our own bug and 2 a usage error, so that a crash never accuses.
    """

    OK = 0
    BUG = 1
    USAGE = 2
    TAMPERED = 10
    INCOMPLETE = 11
    UNTRUSTED = 12
    TRACE_IO = 13
    FINDINGS = 20
    LIMIT = 124
    FAILURE = 125
    DENIED = 126
    NOT_FOUND = 127
    SIGNAL = 128


class Error(Exception):
    """Root of every error this package raises on purpose."""

    default_code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = Exit.FAILURE

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class PolicyError(Error):
    """The policy file is wrong, missing or not trusted. Positions count from 1; 0 is unknown."""

    default_code = "policy.invalid"

    def __init__(
        self,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: int = 0,
        code: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.file, self.line, self.column = file, line, column

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else ""
        where = where or (f"{self.file}: " if self.file else "")
        return where + super().__str__()


class Denied(Error):
    """The policy refused the Call, or the Call could not be judged. Nothing ran."""

    default_code = "denied"
    exit_code = Exit.DENIED

    def __init__(
        self,
        message: str,
        *,
        rules: tuple[str, ...] = (),
        code: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.rules = rules


class ApprovalRequired(Denied):
    """A rule asks a person and nobody answered. ``call`` resumes it. Nothing ran."""

    default_code = "approval.required"

    def __init__(self, message: str, *, call: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(message, rules=rules)
        self.call = call


class LimitExceeded(Error):
    """A limit ended the Call. ``limit`` names it; the whole process tree is gone.

    ``outcome`` holds what the Call left until then, where there is something.
    """

    default_code = "limit.exceeded"
    exit_code = Exit.LIMIT

    def __init__(
        self, message: str, *, limit: str, hint: str = "", outcome: Outcome | None = None
    ) -> None:
        super().__init__(message, code=f"limit.{limit}", hint=hint)
        self.limit, self.outcome = limit, outcome


class SandboxFailed(Error):
    """The sandbox broke while it was made or used. Nothing of the Call is left running.

    Only where ``step`` is "close" some of it may be: it did not end, and the hint says so.
    """

    default_code = "sandbox.failed"

    def __init__(
        self,
        message: str,
        *,
        step: str = "",
        errno: int = 0,
        code: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.step, self.errno = step, errno


class SandboxUnavailable(Error):
    """This machine cannot enforce what was asked. ``missing`` names it, the hint what helps."""

    default_code = "sandbox.unavailable"

    def __init__(self, message: str, *, missing: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.missing = missing


class ToolFailed(Error):
    """The Call was allowed and ran, and the tool itself reports an error.

    ``refused`` is what seccomp refused until then, where it was asked for.
    """

    default_code = "tool.failed"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        errno: int = 0,
        hint: str = "",
        refused: tuple[Refused, ...] = (),
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.errno, self.refused = errno, refused


class TraceInvalid(Error):
    """A trace cannot be written, read or believed. ``offset`` is a byte or entry position."""

    default_code = "trace.invalid"

    def __init__(
        self, message: str, *, code: str | None = None, offset: int = -1, hint: str = ""
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.offset = offset


class ProtocolError(Error):
    """A peer (server, client, worker) sent bytes that are not what the protocol allows."""

    default_code = "protocol.invalid"
