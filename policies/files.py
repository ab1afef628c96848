"""Policy step 0: the bytes of a policy file, and of those it extends, each read once.

`extends: FILE` names the wider policy. It lies in the folder of the file that names it, or
below, and no link leads to it; one that lies elsewhere is named by its absolute path and
belongs to the user or to root alone. What a project brings along can thus name no file that
somebody else prepared.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from safeconduct.errors import PolicyError

from .preset import read_preset
from .syntax import MAX_BYTES, Scalar, Source, Table, parse_syntax

# LIMIT: each file more is one policy more that must agree to every Call.
MAX_EXTENDS: Final = 4
PRESET: Final = "preset:"
_KEY: Final = "extends"
# O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever.
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# O_PATH needs no right to list the folder; with O_NOFOLLOW a link is not a folder (open(2)).
_WALK: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """The bytes of a policy file with what the kernel said about the object they came from.

    ``wider`` is the file it extends. A preset has no object: it belongs to us.
    """

    path: Path
    data: bytes
    owner_uid: int
    mode: int
    wider: PolicyFile | None = None

    @property
    def chain(self) -> tuple[PolicyFile, ...]:
        """Return this file, the one it extends, and so on."""
        chain: list[PolicyFile] = [self]
        while (wider := chain[-1].wider) is not None:
            chain.append(wider)
        return tuple(chain)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return where these files are; a preset is none."""
        return tuple(one.path for one in self.chain if not str(one.path).startswith(PRESET))

    @property
    def digest(self) -> str:
        """Return the policy version: `sha256:<hex>` of the bytes, or over those of all files."""
        return join_versions([version_of(file.data) for file in reversed(self.chain)])


def version_of(data: bytes) -> str:
    """Return the version of one file: `sha256:<hex>` of its bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def join_versions(versions: Sequence[str]) -> str:
    """Return the version of policies that are judged together, the widest first."""
    if len(versions) == 1:
        return versions[0]
    return version_of("".join(f"{version}\n" for version in versions).encode())


def read_policy_file(path: Path) -> PolicyFile:
    """Read a policy file and those it extends, each once; a file has at most 1 MiB.

    Never blocks on a FIFO or a device. PolicyError says which file is wrong, and where.
    """
    chain = [_read(path, lambda: os.open(path, _READ))]
    while (wider := _read_wider(chain)) is not None:
        chain.append(wider)
    file = chain.pop()
    while chain:
        file = replace(chain.pop(), wider=file)
    return file


def _read_wider(chain: list[PolicyFile]) -> PolicyFile | None:
    """Read what the last file of the chain extends; None where it extends nothing."""
    file = chain[-1]
    # Most files have no such key and are parsed once, later. One that hides it behind escapes
    # is refused then, because nothing was read for it.
    if _KEY.encode() not in file.data:
        return None
    source = Source(str(file.path), parse_syntax(file.data, name=str(file.path)))
    root = source.root
    named = root.entries[_KEY][1] if isinstance(root, Table) and _KEY in root.entries else None
    if not isinstance(named, Scalar):
        return None

    def refuse(message: str, hint: str) -> PolicyError:
        return source.error(named.position, message, hint=hint, code="policy.extends")

    if len(chain) > MAX_EXTENDS:
        hint = f"policies extend one another along at most {MAX_EXTENDS} steps, in no circle"
        raise refuse("extends never ends", hint)
    if named.text.startswith(PRESET):
        return _preset(named.text)
    written = Path(named.text)
    if ".." in written.parts or not written.parts:
        hint = "put it into the folder of this policy, or name it by its absolute path"
        raise refuse("extends leads out of the folder of this policy", hint)
    folder = Path("/") if written.is_absolute() else Path(os.path.abspath(file.path)).parent
    wider = folder / written
    if any(Path(os.path.abspath(one.path)) == wider for one in chain):
        raise refuse("a policy cannot extend itself", "remove extends from one of the files")
    read = _read(wider, lambda: _open_beneath(folder, wider.relative_to(folder)))
    if written.is_absolute() and (read.owner_uid not in (0, os.geteuid()) or read.mode & 0o022):
        hint = "own it yourself and let nobody else write it, or put it beside this policy"
        raise refuse(f"others can change {str(wider)!a}", hint)
    return read


def _preset(name: str) -> PolicyFile:
    return PolicyFile(
        path=Path(name), data=read_preset(name.removeprefix(PRESET)), owner_uid=0, mode=0o444
    )


def _open_beneath(folder: Path, path: Path) -> int:
    """Open a file below a folder; no component is a link."""
    at = os.open(folder, _WALK)
    try:
        for component in path.parts[:-1]:
            inner = os.open(component, _WALK | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(path.name, _READ | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def _read(path: Path, open_file: Callable[[], int]) -> PolicyFile:
    """Read a regular file of at most 1 MiB, once."""

    def refuse(message: str, hint: str) -> PolicyError:
        return PolicyError(message, file=str(path), code="policy.unreadable", hint=hint)

    try:
        fd = open_file()
    except FileNotFoundError as error:
        raise PolicyError(
            "there is no such policy file",
            file=str(path),
            code="policy.not_found",
            hint="check the path, or write one with: safeconduct init",
        ) from error
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        hint = "check the path and its mode; no link may lead to a policy that is extended"
        raise refuse(f"cannot be opened: {text}", hint) from error
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
