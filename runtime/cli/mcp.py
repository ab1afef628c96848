"""``safeconduct mcp``: put a confined MCP server behind the policy, over stdio."""

from __future__ import annotations

import itertools
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from safeconduct.errors import Error, PolicyError, ToolFailed
from safeconduct.policies import BUILT_IN, Resolution
from safeconduct.runtime.adapters.mcp_server import (
    Server,
    choose_profile,
    confined,
    ended,
    exit_code,
    named_server,
    reason,
    recorded,
    rules_of,
    unseen,
)  # fmt: skip
from safeconduct.runtime.adapters.mcp_stdio import Event, Line, Proxy
from safeconduct.runtime.adapters.stderr import relay
from safeconduct.runtime.pipeline import Admitted
from safeconduct.runtime.supervisor import Runtime

from .options import (
    ObserveOption,
    PolicyOption,
    RoleOption,
    TierOption,
    TraceOption,
    WorkspaceOption,
)
from .outcome import announce, error_code, tell_changes
from .terminal import tell, tell_error

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# A server of such a name would take the place of our own tools, or of the record of its start.
_RESERVED = frozenset(tool.partition(".")[0] for tool in BUILT_IN) | {
    "mcp", "agent", "workspace",
}  # fmt: skip
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# LIMIT: notes about dropped frames in one session.
_NOTES_MAX = 100


def mcp(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME | -- COMMAND...",
            help="A server of the policy, or a server and its arguments, after --.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the policy calls this command: its tools are NAME.TOOL."),
    ] = None,
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    trace: TraceOption = None,
    tier: TierOption = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Run the server in it (default: NAME, else base)."),
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option(
            "--env", help="NAME=VALUE, or NAME to hand on ours. Nothing else is handed on."
        ),
    ] = None,
    role: RoleOption = None,
    observe: ObserveOption = False,
) -> int:
    """Run an MCP server confined; judge and record each tool call it gets.

    A policy file that changes comes into force before the next call (SIGUSR1 has it loaded anyway);
    one that is wrong, or that changes the profile the server runs in, leaves the old one.

    Exits as the server does; 0 once the client has left, 124 the session's limit of 24 hours, 125
    our failure or a server that left calls without answer, 127 not found, 128+n signal.
    """
    name, given = _asked(command, name)
    variables = dict(_variable(text) for text in environment or [])
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with (
        _signals(events),
        Runtime.from_policy(
            policy, workspace=workspace, trace=trace, tier=tier, caller=name, origin="mcp",
            role=role, observe=observe, watch=True, tell=tell,
        ) as runtime,
        _reloading(runtime),
    ):  # fmt: skip
        announce(runtime, explicit=policy is not None)
        judged = runtime.standing.policy
        argv, within = named_server(judged, name, given, profile)
        server = Server(
            name=name,
            argv=argv,
            profile=choose_profile(judged, name, within),
            environment=variables,
        )
        _warn(runtime, server)
        runtime.reloader.demand(partial(_same_server, runtime, server, given, profile))
        try:
            with recorded(runtime, server) as start:
                return _serve(runtime, server, start, events)
        except ToolFailed as error:
            tell_error(error)
            return error_code(error)


def _asked(command: list[str], name: str | None) -> tuple[str, list[str] | None]:
    """Return the name of the server and its command; None where the policy has the command."""
    if name is None and len(command) > 1:
        raise typer.BadParameter("a command needs a name for its tools", param_hint="--name")
    name, given = (command[0], None) if name is None else (name, command)
    if _NAME.fullmatch(name) is None or name in _RESERVED:
        raise typer.BadParameter(f"{name!r} cannot name a server", param_hint="--name")
    return name, given


def _same_server(
    runtime: Runtime,
    server: Server,
    given: list[str] | None,
    profile: str | None,
    found: Resolution,
) -> None:
    """Refuse a policy under which the same command line would start something else."""
    judged = runtime.standing.of_role(found.policy)
    argv, within = named_server(judged, server.name, given, profile)
    same = choose_profile(judged, server.name, within) == server.profile
    if not same or tuple(argv) != tuple(server.argv):
        changed = "command" if same else "profile"
        raise PolicyError(
            f"the {changed} of the running server {server.name} would be another one",
            file=str(found.found.path),
            code=f"policy.{changed}_changed",
            hint="start the server anew",
        )


@contextmanager
def _reloading(runtime: Runtime) -> Generator[None]:
    """Let SIGUSR1 have the policy loaded anew."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: runtime.reloader.ask())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _serve(
    runtime: Runtime, server: Server, start: Admitted, events: queue.SimpleQueue[Event]
) -> int:
    """Start the server, carry the session, record how the server ended."""
    line, stderr, theirs = _pipes()
    proxy: Proxy | None = None
    owed = 0
    why: Error = ToolFailed("The session broke.", code="mcp.server_gone")
    try:
        with confined(runtime, server, theirs) as running:
            threading.Thread(target=relay, args=(stderr, 2, server.name), daemon=True).start()
            proxy = Proxy(
                runtime.pipeline, running, line, start=start.call, note=_notes(), events=events
            )
            end = proxy.serve()
            why = reason(end, client_left=proxy.client_left)
            outcome = ended(start, running, end)
    except Error as error:
        why = error
        raise
    finally:
        if proxy is not None:
            lost = proxy.finish(why)
            owed = 0 if proxy.client_left else lost
    runtime.pipeline.settle(start, replace(outcome, changes=running.changes))
    tell_changes((*running.changes, *runtime.changes.keep_session()))
    return exit_code(end, lost=owed)


def _pipes() -> tuple[Line, int, tuple[int, int, int]]:
    """Make the pipes to the server: our ends, the one of its stderr, and its ends.

    They stay open to the end of this process: a thread that waits for a client that reads nothing
    must never find another file under their numbers.
    """
    server_in = os.pipe2(os.O_CLOEXEC)
    server_out = os.pipe2(os.O_CLOEXEC)
    server_error = os.pipe2(os.O_CLOEXEC)
    line = Line(client_in=0, client_out=1, server_in=server_in[1], server_out=server_out[0])
    return line, server_error[0], (server_in[0], server_out[1], server_error[1])


def _warn(runtime: Runtime, server: Server) -> None:
    """Say beforehand what would only show as a server that fails or denies everything."""
    note = _notes()
    parts = runtime.standing.policy.parts
    if not any(rules_of(part, server.name) for part in parts):
        note(f"the policy grants no tool of {server.name!r}: every call will be denied")
    for path in unseen(server.argv, server.profile):
        note(f"profile {server.profile.name} does not show {path} to the server")


def _notes() -> Callable[[str], None]:
    """Return what tells the operator of something on stderr, a bounded number of times."""
    left = itertools.count(_NOTES_MAX, -1)

    def note(text: str) -> None:
        more = next(left)
        if more > 0:
            ending = " (no more of these will be told)" if more == 1 else ""
            tell(f"{text}{ending}")

    return note


def _variable(text: str) -> tuple[str, str]:
    """Read one --env option."""
    name, given, value = text.partition("=")
    if _VARIABLE.fullmatch(name) is None or name.startswith("SAFECONDUCT_"):
        raise typer.BadParameter(f"{name!r} cannot name a variable", param_hint="--env")
    if not given and name not in os.environ:
        raise typer.BadParameter(f"{name} is not set here", param_hint="--env")
    return name, value if given else os.environ[name]


@contextmanager
def _signals(events: queue.SimpleQueue[Event]) -> Generator[None]:
    """Let signals end the session in order, whenever they come: the Trace gets its signature."""
    before = {
        number: signal.signal(number, lambda received, _: events.put(received))
        for number in _SIGNALS
    }
    # Outside of `_reloading` it asks for nothing; its default would end us without a signature.
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda received, _: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
