"""Which policy counts: the first that is found, and whether it is believed.

`--policy` and `$SAFECONDUCT_POLICY` are the operator's word. A file found in a project came
with the project: it only narrows the user's own policy until a person trusts its digest.
It counts only where it lies: one reached through a link would carry the trust in another project.
A file found in the user's or the system's configuration must be writable by them alone.
Whichever it is, a managed policy of the machine stands above it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from safeconduct.errors import PolicyError

from .cache import cache_of
from .capability import both
from .load import POLICY_FILE, POLICY_FOLDER, PolicyFile, compile_policy, read_policy_file
from .rules import Judged
from .trust import TrustStore

SYSTEM_POLICY: Final = Path("/etc/safeconduct") / POLICY_FILE
# What the machine's owner lays down for everybody, beside it: every other policy only narrows it.
MANAGED_FILE: Final = "managed.yaml"
VARIABLE: Final = "SAFECONDUCT_POLICY"
# LIMIT: folders are walked upwards this far at most.
MAX_PARENTS: Final = 256


class Origin(StrEnum):
    """Where a policy file was found, hence whose word it is."""

    EXPLICIT = "explicit"
    ENVIRONMENT = "environment"
    PROJECT = "project"
    USER = "user"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A policy file and one sentence why it is the one."""

    path: Path
    origin: Origin
    why: str

    def refuse_link(self) -> None:
        """Raise PolicyError ``policy.link`` where a project policy, or its folder, is a link.

        Trust is pinned to the real file. A hostile project that links to a policy trusted
        elsewhere would have its grants, over the hostile project's own ``$WS``.
        """
        if self.origin is not Origin.PROJECT:
            return
        file = Path(os.path.abspath(self.path))
        for path in (file.parent, file):
            if path.is_symlink():
                raise PolicyError(
                    f"{path.name} is a symbolic link, and a project's policy must lie in it",
                    file=str(self.path),
                    code="policy.link",
                    hint="put a copy in its place and read it, or name the file with --policy",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The policy that counts. ``why`` says in one sentence which file won, and how far.

    ``files`` are all files in force as they were named, links not followed: of a narrowed pair
    the project's and the user's own.
    """

    policy: Judged
    found: Found
    why: str
    files: tuple[Path, ...]
    trusted: bool = True


def discover_policy(
    *,
    explicit: Path | None = None,
    start: Path,
    environment: Mapping[str, str],
    system: Path = SYSTEM_POLICY,
) -> Found:
    """Return the first policy file in order; PolicyError `policy.not_found` if there is none.

    ``start`` is the folder to look upwards from. Outside a repository only ``start`` itself
    is looked at, since the folders above it may be anybody's.
    """
    if explicit is not None:
        return Found(path=explicit, origin=Origin.EXPLICIT, why="it was named with --policy")
    if named := environment.get(VARIABLE):
        why = f"${VARIABLE} names it"
        return Found(path=start / named, origin=Origin.ENVIRONMENT, why=why)
    for folder in _project_folders(start):
        path = folder / POLICY_FOLDER / POLICY_FILE
        if os.path.lexists(path):
            why = f"it is the nearest {POLICY_FOLDER}/{POLICY_FILE} up to the repository root"
            return Found(path=path, origin=Origin.PROJECT, why=why)
    own = _own_policy(environment, system)
    if own is None:
        raise PolicyError(
            "there is no policy: nothing is allowed",
            code="policy.not_found",
            hint="name one with --policy, or write one with: safeconduct init",
        )
    return own


def resolve_policy(
    *,
    explicit: Path | None = None,
    start: Path,
    environment: Mapping[str, str],
    workspace: Path | None = None,
    trust: TrustStore | None = None,
    system: Path = SYSTEM_POLICY,
) -> Resolution:
    """Find, believe and load the policy that counts; see `discover_policy` for the order.

    An untrusted project policy is joined with the user's own, which it can only narrow;
    without one, PolicyError `policy.untrusted` names the command that trusts it. One behind a
    symbolic link is refused, PolicyError `policy.link`. A ``managed.yaml`` beside ``system`` is
    joined with what is found, which can then only narrow it.
    """
    resolution = _resolve(explicit, start, environment, workspace, trust, system)
    return _managed(resolution, system.parent / MANAGED_FILE)


def _managed(resolution: Resolution, path: Path) -> Resolution:
    """Put the machine's managed policy above the one that was found."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return resolution
    except OSError as error:
        # Not `lexists`: what cannot be looked at is not absent.
        raise PolicyError(
            f"the machine's managed policy cannot be looked at: {error.strerror}",
            file=str(path),
            code="policy.unreadable",
            hint=f"let everybody read it: chmod 755 {path.parent}",
        ) from error
    file = read_policy_file(path)
    _refuse_not_roots(file)
    managed = compile_policy(file, workspace=Path(resolution.policy.workspace))
    # The machine's owner names servers for everybody; others are named as without them.
    servers = MappingProxyType({**resolution.policy.servers, **managed.servers})
    return replace(
        resolution,
        policy=both(managed, resolution.policy, servers=servers),
        why=f"{resolution.why}, within {path}",
        files=(*resolution.files, *file.paths),
    )


def _resolve(
    explicit: Path | None,
    start: Path,
    environment: Mapping[str, str],
    workspace: Path | None,
    trust: TrustStore | None,
    system: Path,
) -> Resolution:
    found = discover_policy(explicit=explicit, start=start, environment=environment, system=system)
    found.refuse_link()
    file = read_policy_file(found.path)
    if found.origin is Origin.PROJECT:
        store = trust or TrustStore.of(environment)
        if not store.is_trusted(found.path, file.digest):
            return _narrowed(found, file, _own_policy(environment, system), workspace)
    elif found.origin in (Origin.USER, Origin.SYSTEM):
        _refuse_shared(file)
    else:
        _refuse_world_writable(file)
    policy = compile_policy(file, workspace=workspace, cache=cache_of(environment))
    why = f"using {found.path}: {found.why}"
    return Resolution(policy=policy, found=found, why=why, files=file.paths)


def _narrowed(
    found: Found, file: PolicyFile, own: Found | None, workspace: Path | None
) -> Resolution:
    if own is None:
        raise PolicyError(
            "this policy came with the project and nobody has trusted it",
            file=str(found.path),
            code="policy.untrusted",
            hint=f"read it, then run: safeconduct trust {_quoted(found.path)}",
        )
    # One workspace for both: the project's folder, unless the operator named another.
    folder = workspace or Path(os.path.abspath(found.path)).parent.parent
    mine = read_policy_file(own.path)
    _refuse_shared(mine)
    policy = both(compile_policy(mine, workspace=folder), compile_policy(file, workspace=folder))
    why = f"using {own.path}, narrowed by {found.path}, which is not trusted"
    files = (*file.paths, *mine.paths)
    return Resolution(policy=policy, found=found, why=why, files=files, trusted=False)


def _project_folders(start: Path) -> list[Path]:
    """Return the folders from ``start`` up to its repository root, or ``start`` alone."""
    here = Path(os.path.abspath(start))
    folders = [here, *here.parents][:MAX_PARENTS]
    for index, folder in enumerate(folders):
        if os.path.lexists(folder / ".git"):
            return folders[: index + 1]
    return [here]


def _own_policy(environment: Mapping[str, str], system: Path) -> Found | None:
    """Return the policy of the user, else of the machine."""
    configuration = Path(environment.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        home = Path(environment.get("HOME", ""))
        configuration = home / ".config"
    path = configuration / "safeconduct" / POLICY_FILE
    if path.is_absolute() and os.path.lexists(path):
        return Found(path=path, origin=Origin.USER, why="it is your own policy")
    if os.path.lexists(system):
        return Found(path=system, origin=Origin.SYSTEM, why="it is the policy of this machine")
    return None


def _quoted(path: Path) -> str:
    # The name came with the project: it must not forge a second line or command.
    text = str(path)
    return shlex.quote(text) if text.isprintable() else ascii(text)


def _refuse_shared(file: PolicyFile) -> None:
    """Refuse a file that others could have changed. Its digest is pinned nowhere."""
    for one in file.chain:
        if one.owner_uid not in (0, os.geteuid()):
            raise PolicyError(
                "this policy belongs to another user",
                file=str(one.path),
                code="policy.owner",
                hint="own it yourself, or name it with --policy if you mean it",
            )
        if one.mode & 0o022:
            raise PolicyError(
                "others can change this policy",
                file=str(one.path),
                code="policy.mode",
                hint=f"chmod go-w {one.path}",
            )


def _refuse_not_roots(file: PolicyFile) -> None:
    """Refuse a managed policy that anybody but the machine's owner could have written."""
    for one in file.chain:
        if one.owner_uid != 0 or one.mode & 0o022:
            raise PolicyError(
                "the machine's managed policy must belong to root, and to nobody else",
                file=str(one.path),
                code="policy.owner",
                hint=f"chown root {one.path} && chmod 644 {one.path}",
            )


def _refuse_world_writable(file: PolicyFile) -> None:
    """Refuse even a named file that everybody can change. A group may be the operator's own."""
    for one in file.chain:
        if one.mode & 0o002:
            raise PolicyError(
                "everybody can change this policy",
                file=str(one.path),
                code="policy.mode",
                hint=f"chmod o-w {one.path}",
            )
