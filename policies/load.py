"""Policy steps 1 to 3 joined: a file, read once, becomes a policy that carries its digest.

A file that `extends` another is judged with it: the other is the wider one, and both must agree.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from safeconduct.errors import PolicyError

from .assembly import assemble
from .cache import PolicyCache
from .capability import narrowed
from .files import PolicyFile, read_policy_file, version_of
from .language import read_spec
from .rules import Judged, Policy, Server
from .syntax import Source, parse_syntax
from .trace_terms import DEFAULT_TERMS, join_terms, refuse_weaker

__all__ = [
    "POLICY_FILE",
    "POLICY_FOLDER",
    "PolicyFile",
    "compile_elsewhere",
    "compile_policy",
    "load_policy",
    "parse_policy",
    "read_policy_file",
]

POLICY_FOLDER = ".safeconduct"
POLICY_FILE = "policy.yaml"
_PROJECT = "project"


def load_policy(
    path: Path, *, workspace: Path | None = None, cache: PolicyCache | None = None
) -> Judged:
    """Load a policy file for a workspace; PolicyError says what is wrong and where.

    ``workspace`` is the operator's word and wins where it is given. Without it `$WS` is the
    folder that holds `.safeconduct/`, else the working directory. A file that names a
    workspace of its own is refused for any other. ``cache`` keeps what a large file compiles to.
    """
    return compile_policy(read_policy_file(path), workspace=workspace, cache=cache)


def compile_policy(
    file: PolicyFile, *, workspace: Path | None = None, cache: PolicyCache | None = None
) -> Judged:
    """Compile a file that has been read; the workspace is chosen as in `load_policy`."""
    default = Path.cwd()
    holder = Path(os.path.abspath(file.path)).parent
    if holder.name == POLICY_FOLDER:
        default = holder.parent
    place = _Place(named=workspace, default=default, locate=_real_folder)
    return _compile_chain(file, place, cache)


def compile_elsewhere(file: PolicyFile, *, workspace: Path) -> Judged:
    """Compile a file for a workspace that need not exist here: replay runs on other machines."""
    place = _Place(named=workspace, default=workspace, locate=_checked_folder)
    return _compile_chain(file, place)


def parse_policy(data: bytes, *, name: str, workspace: Path) -> Policy:
    """Compile the bytes of one policy for a workspace without touching the file system.

    ``workspace`` must be a real path; it need not exist here. ``name`` stands for the file in
    errors. A policy that extends another is a file and is refused.
    """
    place = _Place(named=workspace, default=workspace, locate=_checked_folder)
    return _compile(data, name, place, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where `$WS` may be: what the operator named, else the file, else the default."""

    named: Path | None
    default: Path
    locate: Callable[[Path], str]


def _compile_chain(file: PolicyFile, place: _Place, cache: PolicyCache | None = None) -> Judged:
    """Compile a file and those it extends, the widest first."""
    parts: list[Policy] = []
    servers: dict[str, Server] = {}
    trace = DEFAULT_TERMS
    for one in reversed(file.chain):
        with _uncollected():
            part = _kept(one, place, parts, cache)
        if parts:
            refuse_weaker(trace, part.trace, part.file)
        trace = join_terms(trace, part.trace) if parts else part.trace
        for name, server in part.servers.items():
            if servers.setdefault(name, server) != server:
                raise PolicyError(
                    f"the server {name!r} is another one in the policy that this one extends",
                    file=part.file,
                    hint="give it another name",
                )
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return narrowed(parts, servers=MappingProxyType(servers), trace=trace)


@contextmanager
def _uncollected() -> Generator[None]:
    """Keep the garbage collector from walking over a policy again and again while it grows.

    Nothing in it is garbage; the walks are a third of the time that a large file takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _kept(
    file: PolicyFile, place: _Place, wider: Sequence[Policy], cache: PolicyCache | None
) -> Policy:
    """Compile a file, or find what it was compiled to."""
    name, last = str(file.path), wider[-1] if wider else None
    workspace = _likely_workspace(place)
    if cache is None or workspace is None or cache.lies_in(workspace):
        return _compile(file.data, name, place, last)
    inputs = [file.data, os.fsencode(name), os.fsencode(workspace)]
    inputs += [part.version.encode() for part in wider]
    found = cache.find(inputs)
    return found or _compile(file.data, name, place, last, partial(cache.keep, inputs))


def _likely_workspace(place: _Place) -> str | None:
    """Return the workspace of a policy that names none; where there is none, compiling says so."""
    try:
        return place.locate(place.named or place.default)
    except (OSError, ValueError):
        return None


def _nowhere(_: Policy) -> None:
    """Keep nothing."""


def _compile(
    data: bytes,
    name: str,
    place: _Place,
    wider: Policy | None,
    keep: Callable[[Policy], None] = _nowhere,
) -> Policy:
    source = Source(name, parse_syntax(data, name=name))
    spec = read_spec(source)
    if spec.extends is not None and wider is None:
        position = source.node(("extends",)).position
        hint = "load it as a file; a policy text stands alone"
        message = "what this policy extends has not been read"
        raise source.error(position, message, hint=hint, code="policy.extends")
    position = source.node(("workspace",)).position
    declared = None if spec.workspace == _PROJECT else Path(spec.workspace)
    if declared is not None and not declared.is_absolute():
        hint = f"write workspace: {_PROJECT}, or an absolute path"
        raise source.error(position, "a workspace is an absolute path", hint=hint)
    try:
        real = place.locate(place.named or declared or place.default)
        foreign = declared is not None and place.locate(declared) != real
    except (OSError, ValueError) as error:
        hint = "name an existing folder whose path is UTF-8 and holds none of * ? [ ] { } \\"
        message = f"the workspace cannot be used: {error}"
        raise source.error(position, message, hint=hint, code="policy.workspace") from error
    if foreign:
        message = f"this policy is for the workspace {spec.workspace!r} and no other"
        hint = f"run it there, or write workspace: {_PROJECT}"
        raise source.error(position, message, hint=hint, code="policy.workspace")
    policy = assemble(spec, source, version=version_of(data), workspace=real, wider=wider)
    if declared is None:
        # Whether one that names its workspace is in the right one is found out each time.
        keep(policy)
    return policy


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
