"""Policy steps 1 to 3 joined: a file, read once, becomes a Policy that carries its digest."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safeconduct.errors import PolicyError

from .assembly import assemble
from .language import read_spec
from .rules import Policy
from .syntax import MAX_BYTES, Source, parse_syntax

POLICY_FOLDER = ".safeconduct"
POLICY_FILE = "policy.yaml"
_PROJECT = "project"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """The bytes of a policy file with what the kernel said about the object they came from."""

    path: Path
    data: bytes
    owner_uid: int
    mode: int

    @property
    def digest(self) -> str:
        """Return `sha256:<hex>` of the bytes: the policy version."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


def read_policy_file(path: Path) -> PolicyFile:
    """Read a regular file of at most 1 MiB, once. Never blocks on a FIFO or a device."""

    def refuse(message: str, hint: str) -> PolicyError:
        return PolicyError(message, file=str(path), code="policy.unreadable", hint=hint)

    try:
        # O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise PolicyError(
            "there is no such policy file",
            file=str(path),
            code="policy.not_found",
            hint="check the path, or write one with: safeconduct init",
        ) from error
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise refuse(f"cannot be opened: {text}", "check the path and its mode") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise refuse("not a regular file", "a policy is a plain file")
        data = _read_at_most(fd, MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}", "check the disk") from error
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise refuse(f"larger than {MAX_BYTES} bytes", "use wider patterns")
    return PolicyFile(path=path, data=data, owner_uid=status.st_uid, mode=status.st_mode)


def _read_at_most(fd: int, size: int) -> bytes:
    chunks: list[bytes] = []
    while size > 0 and (chunk := os.read(fd, size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def load_policy(path: Path, *, workspace: Path | None = None) -> Policy:
    """Load a policy file for a workspace; PolicyError says what is wrong and where.

    ``workspace`` is the operator's word and wins where it is given. Without it `$WS` is the
    folder that holds `.safeconduct/`, else the working directory. A file that names a
    workspace of its own is refused for any other.
    """
    return compile_policy(read_policy_file(path), workspace=workspace)


def compile_policy(file: PolicyFile, *, workspace: Path | None = None) -> Policy:
    """Compile a file that has been read; the workspace is chosen as in `load_policy`."""
    default = Path.cwd()
    holder = Path(os.path.abspath(file.path)).parent
    if holder.name == POLICY_FOLDER:
        default = holder.parent
    return _compile(
        file.data, name=str(file.path), named=workspace, default=default, locate=_real_folder
    )


def parse_policy(data: bytes, *, name: str, workspace: Path) -> Policy:
    """Compile policy bytes for a workspace without touching the file system.

    ``workspace`` must be a real path; it need not exist here (replay runs on other machines).
    ``name`` stands for the file in errors.
    """
    return _compile(data, name=name, named=workspace, default=workspace, locate=_checked_folder)


def _compile(
    data: bytes, *, name: str, named: Path | None, default: Path, locate: Callable[[Path], str]
) -> Policy:
    source = Source(name, parse_syntax(data, name=name))
    spec = read_spec(source)
    position = source.node(("workspace",)).position
    declared = None if spec.workspace == _PROJECT else Path(spec.workspace)
    if declared is not None and not declared.is_absolute():
        hint = f"write workspace: {_PROJECT}, or an absolute path"
        raise source.error(position, "a workspace is an absolute path", hint=hint)
    try:
        real = locate(named or declared or default)
        foreign = declared is not None and locate(declared) != real
    except (OSError, ValueError) as error:
        hint = "name an existing folder whose path is UTF-8 and holds none of * ? [ ] { } \\"
        message = f"the workspace cannot be used: {error}"
        raise source.error(position, message, hint=hint, code="policy.workspace") from error
    if foreign:
        message = f"this policy is for the workspace {spec.workspace!r} and no other"
        hint = f"run it there, or write workspace: {_PROJECT}"
        raise source.error(position, message, hint=hint, code="policy.workspace")
    version = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return assemble(spec, source, version=version, workspace=real)


def _real_folder(path: Path) -> str:
    real = os.path.realpath(path, strict=True)
    if not os.path.isdir(real):
        raise ValueError(f"{real!a} is not a folder")
    return _checked_folder(Path(real))


def _checked_folder(path: Path) -> str:
    real = str(path)
    real.encode("utf-8")
    if real == "/" or not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{real!a} is not the absolute path of a folder below /")
    # A `*` in the workspace's own path would turn $WS itself into a pattern.
    if not set("*?[]{}\\").isdisjoint(real) or any(character < " " for character in real):
        raise ValueError(f"{real!a} holds characters that patterns use")
    return real
