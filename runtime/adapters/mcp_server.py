"""Step "adapter": the MCP server process, confined for the length of a session.

The operator's command line names the server, so no rule judges its start. The trace still shows
it as a Call of the tool ``mcp.start`` with origin ``operator``: which argv, in which folder, with
which variables (names only), under which profile; and how it ended. Calls of its tools name it as
their parent.

A server outlives every single call, so the wall limit of its profile is replaced by that of a
session, and ``output`` bounds nothing here (frames.py does). The other limits hold for the server.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from safeconduct.call import Call, Engine, Json, Outcome, Profile
from safeconduct.errors import Error, Exit, PolicyError, SandboxUnavailable, ToolFailed
from safeconduct.policies import Judged, Policy, Rule, hidden_by, narrow_profiles
from safeconduct.runtime.pipeline import Admitted
from safeconduct.runtime.sandbox.channel import Exit as End
from safeconduct.runtime.sandbox.layout import SEARCH, inside
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.supervisor import Runtime

# LIMIT: the wall limit of a session.
SESSION_WALL_MS = 24 * 3600 * 1000
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
# LIMIT: symbolic links followed to tell which folder a program needs.
_LINKS_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the operator asked for: a name for the tools, a command and where it runs."""

    name: str
    argv: Sequence[str]
    profile: Profile
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def choose_profile(policy: Judged, server: str, asked: str | None) -> Profile:
    """Return the profile a server runs in: the one asked for, its namesake, ``base``, the default.

    Each part of a policy chooses in that order among its own profiles, and the server gets what
    all of them grant: an untrusted part that leaves a profile out, or adds one, never leads the
    operator's own part to a wider one.

    Raises PolicyError ``mcp.profile_unknown`` where no part has the one asked for;
    ``mcp.profile_conflict`` where a rule for a tool of this server names another profile than its
    part chose, since one process cannot be in two; Denied ``policy.profile_conflict`` where the
    parts choose different engines.
    """
    known = sorted({name for part in policy.parts for name in part.profiles})
    if asked is not None and asked not in known:
        raise PolicyError(
            f"There is no profile {asked!r}.",
            code="mcp.profile_unknown",
            hint=f"There are: {', '.join(known) or 'none'}.",
        )
    chosen = [_chosen(part, server, asked) for part in policy.parts]
    profile = functools.reduce(narrow_profiles, chosen)
    return replace(profile, limits=replace(profile.limits, wall_ms=SESSION_WALL_MS))


def _chosen(part: Policy, server: str, asked: str | None) -> Profile:
    """Choose among the profiles of one part; refuse a rule of it that names another."""
    profile = part.profile_of_server(server, asked)
    elsewhere = [x for x in rules_of(part, server) if x.profile not in (None, profile.name)]
    if elsewhere:
        rule = elsewhere[0]
        raise PolicyError(
            f"Rule {rule.id} ({rule.where}) runs in profile {rule.profile}, "
            f"and the server runs in {profile.name}.",
            code="mcp.profile_conflict",
            hint=f"Start it with --profile {rule.profile}, or write profile: {profile.name} there.",
        )
    return profile


def rules_of(part: Policy, server: str) -> list[Rule]:
    """Return the rules that some tool of a server may meet."""
    named = [
        rule for tool, found in part.tools.items() if _is_of(server, tool) for rule in found.all
    ]
    for wildcard in part.wildcards:
        pattern = wildcard.pattern.pattern
        if wildcard.pattern.overlaps(f"{server}.*") or _is_of(server, pattern):
            named += wildcard.all
    return named


def _is_of(server: str, tool: str) -> bool:
    return tool.startswith(f"{server}.")


def named_server(
    policy: Judged, name: str, argv: Sequence[str] | None, profile: str | None
) -> tuple[Sequence[str], str | None]:
    """Return the command of a server and the name of its profile, if one was named.

    A name that stands under ``servers`` means the command there and no other: its rules were
    written for that. Raises PolicyError ``mcp.server_unknown`` or ``mcp.server_other``.
    """
    found = policy.servers.get(name)
    if found is None and argv is not None:
        return argv, profile
    if found is None:
        raise PolicyError(
            f"There is no server {name!r} in the policy.",
            code="mcp.server_unknown",
            hint=f"Write it under servers, or: safeconduct mcp --name {name} -- COMMAND",
        )
    if argv is not None and tuple(argv) != found.run:
        raise PolicyError(
            f"The policy names another command for the server {name}.",
            code="mcp.server_other",
            hint=f"Start it with: safeconduct mcp {name}",
        )
    if profile is not None and found.profile not in (None, profile):
        raise PolicyError(
            f"The policy runs the server {name} in profile {found.profile}.",
            code="mcp.profile_conflict",
            hint="Leave out --profile.",
        )
    return found.run, profile or found.profile


@contextmanager
def recorded(runtime: Runtime, server: Server) -> Generator[Admitted]:
    """Record the start of a server; whoever enters settles its Outcome."""
    arguments: dict[str, Json] = {
        "argv": list(server.argv),
        "cwd": runtime.policy.workspace,
        "environment": sorted(server.environment),
        "profile": server.profile.name,
        "server": server.name,
    }
    call = Call(
        id=secrets.token_hex(8), tool="mcp.start", arguments=arguments, session=runtime.session,
        caller="operator", origin="operator",
    )  # fmt: skip
    with runtime.pipeline.operate(call, server.profile) as admitted:
        yield admitted


@contextmanager
def confined(runtime: Runtime, server: Server, stdio: tuple[int, int, int]) -> Generator[Running]:
    """Run the server in its sandbox; on leaving, its whole process tree is gone.

    Closes ``stdio`` here, so that the server alone holds it. Raises ToolFailed
    ``tool.not_found`` naming the missing grant, SandboxFailed or SandboxUnavailable.
    """
    profile, workspace = server.profile, runtime.policy.workspace
    if profile.engine is not Engine.NATIVE:
        raise SandboxUnavailable(
            f"A server needs a native profile, and {profile.name} has engine: wasm.",
            missing="engine:native",
            hint="Name another one with --profile.",
        )
    program = Program(argv=server.argv, cwd=workspace, environment=server.environment)
    with runtime.shields.raised(profile, functools.partial(hidden_by, profile.hide)) as shield:
        try:
            running = runtime.native.start(
                program, profile, workspace=workspace, shield=shield, stdio=stdio
            )
        except ToolFailed as error:
            raise _explained(error, server.argv[0], profile) from error
        finally:
            for fd in stdio:
                os.close(fd)
        try:
            yield running
        finally:
            running.close()


def ended(admitted: Admitted, running: Running, end: End | int) -> Outcome:
    """Tell how the server ended, or by which signal we ended it; before its sandbox is closed."""
    call = admitted.call.id
    if isinstance(end, End):
        return running.outcome(call, end, stdout=b"", stderr=b"", cut=False)
    return Outcome(call=call, signal=signal.SIGKILL, confinement=running.confinement)


def exit_code(end: End | int, *, lost: int) -> int:
    """Say how the command ends: as the server did, 125 if it owed its client ``lost`` answers.

    0 where the client left first and the server had to be killed; 128+n after signal n.
    """
    if not isinstance(end, End):
        return Exit.OK if end == signal.SIGKILL else Exit.SIGNAL + end
    if end.wall_limit:
        return Exit.LIMIT
    if end.signal is not None:
        return Exit.SIGNAL + end.signal
    return end.code or (Exit.FAILURE if lost else Exit.OK)


def reason(end: End | int, *, client_left: bool) -> ToolFailed:
    """Say why calls without an answer will get none."""
    if client_left:
        return ToolFailed("The client left.", code="mcp.client_gone")
    if isinstance(end, End):
        return ToolFailed("The server ended.", code="mcp.server_gone")
    return ToolFailed("The session was interrupted.", code="mcp.interrupted")


def unseen(argv: Sequence[str], profile: Profile) -> list[str]:
    """Return the arguments that are paths of this machine which the sandbox will not show."""
    return [
        word
        for word in argv
        if os.path.isabs(word) and os.path.lexists(word) and _missing(word, profile)
    ]


def _explained(error: ToolFailed, program: str, profile: Profile) -> Error:
    """Say which grant a program, or its interpreter, lacks inside; else return the error."""
    found = program if "/" in program else shutil.which(program)
    if error.code != "tool.not_found" or found is None or not os.path.lexists(found):
        return error
    missing = _missing(os.path.abspath(found), profile)
    interpreter = _interpreter(found)
    if not missing and interpreter:
        missing = _missing(interpreter, profile)
    explained = ToolFailed(
        f"Cannot run {program!r} inside the sandbox: profile {profile.name} does not show "
        f"{', '.join(missing) or found}.",
        code=error.code,
        errno=error.errno,
    )
    if missing:
        grants = ", ".join(f'"{os.path.dirname(path)}/**"' for path in missing)
        explained.hint = f"Grant it in the policy: profiles: {profile.name}: read: [{grants}]"
    elif "/" not in program:
        explained.hint = f"Inside, PATH is {':'.join(SEARCH)}: give the full path, {found}."
    return explained


def _missing(path: str, profile: Profile) -> list[str]:
    """Return each step of a path's chain of symbolic links that is not shown inside."""
    shown = (*_SYSTEM, *profile.read, *profile.write)
    steps: list[str] = []
    for _ in range(_LINKS_MAX):
        steps.append(path)
        if not os.path.islink(path):
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    steps.append(os.path.realpath(path))
    return [
        step for step in dict.fromkeys(steps) if not any(inside(step, folder) for folder in shown)
    ]


def _interpreter(path: str) -> str:
    try:
        with open(path, "rb") as file:
            line = file.readline(256)
    except OSError:
        return ""
    words = line[2:].split() if line.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else ""
