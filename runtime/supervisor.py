"""The supervisor: everything one agent's run needs, put up once and taken down as one.

It starts two processes, the launcher (makes sandboxes) and the signer (holds the log key), opens
the Trace and hands Calls to the pipeline. It holds no key itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import anyio.to_thread

from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.call import (
    Call,
    Confinement,
    Engine,
    Json,
    Outcome,
    Profile,
    Tier,
    WorkspaceMode,
)
from safeconduct.errors import LimitExceeded, SandboxUnavailable, TraceInvalid
from safeconduct.policies import PROTECTED, Judged, Resolution, resolve_policy

from .changes import KeptSets, Recording
from .pipeline import Approver, Pipeline, nobody
from .places import Places
from .record import Recorder
from .sandbox import cgroup
from .sandbox.launcher import Launcher
from .sandbox.layout import inside
from .sandbox.machine import Machine
from .sandbox.native import NativeSandbox, survey
from .sandbox.overlay import Keeper, Recovered, Recovery
from .sandbox.python import PythonEngine
from .sandbox.shield import Shields
from .sandbox.wasm import WasmEngine
from .tools.function import Functions
from .tools.task import Sink
from .tools.toolbox import Toolbox

# LIMIT: profiles of a policy whose first calls find sandboxes that wait.
_PREPARED_MAX = 4
_FunctionT = TypeVar("_FunctionT", bound=Callable[..., object])


class Runtime:
    """Runs Calls under one policy, in one session of one Trace. Safe to use from threads.

    A context manager; ``close`` ends every process it started and signs the Trace.
    """

    def __init__(
        self, stack: ExitStack, pipeline: Pipeline, *, native: NativeSandbox, shields: Shields,
        recorder: Recorder, resolution: Resolution, machine: Machine, trace: Path,
        functions: Functions, changes: KeptSets, recovered: Mapping[str, Recovery],
    ) -> None:  # fmt: skip
        """Take over what ``from_policy`` put up; use that."""
        self.pipeline, self.native, self.shields = pipeline, native, shields
        self.resolution, self.machine, self.trace = resolution, machine, trace
        self.session = recorder.session
        # What calls left in overlays, and how commits ended that a crash had broken off.
        self.changes, self.recovered = changes, recovered
        self._functions = functions
        self._stack = stack
        self._pid = os.getpid()

    @classmethod
    def from_policy(
        cls,
        policy: str | Path | None = None,
        *,
        workspace: str | Path | None = None,
        trace: str | Path | None = None,
        tier: Tier | None = None,
        approver: Approver = nobody,
        caller: str = "local",
        origin: str = "sdk",
        environment: Mapping[str, str] | None = None,
        explain: bool = False,
    ) -> Runtime:
        """Put up a runtime. Starts two processes; creates a key and a trace folder if needed.

        Without ``policy`` it is discovered (docs/policy-language.md). ``tier`` asks for exactly
        that tier by name. ``environment`` replaces ``os.environ`` for finding files. With
        ``explain`` an Outcome says which system calls were refused (``refused``). Raises
        PolicyError, SandboxUnavailable, SandboxFailed or TraceInvalid, and leaves nothing running.
        A commit of changes that a crash broke off is ended first (``recovered``).
        """
        surroundings = os.environ if environment is None else environment
        resolution = resolve_policy(
            explicit=Path(policy) if policy is not None else None,
            start=Path.cwd(),
            environment=surroundings,
            workspace=Path(workspace) if workspace is not None else None,
        )
        places = Places.of(surroundings)
        folder = Path(trace) if trace is not None else places.new_trace()
        judged = resolution.policy
        _refuse_inside(judged.workspace, folder, places)
        places.prepare()
        with ExitStack() as stack:
            keeper = Keeper(places.changes, workspace=judged.workspace, protected=PROTECTED)
            machine, native = _confinement(stack, judged, tier, keeper)
            shields = _shields(stack, resolution, places, folder)
            toolbox = Toolbox(
                native=native,
                wasm=_wasm(stack, native),
                python=_python(stack, native, machine),
                shields=shields,
                explain=explain,
            )
            recorder = _recorder(stack, places, folder, judged.workspace, caller, origin)
            recorder.policy(
                judged.version, str(resolution.found.path), resolution.why, native.promises()
            )
            pipeline = Pipeline(judged, recorder, toolbox, approver)
            changes = KeptSets(places=places, recording=_recording(pipeline, recorder.session))
            recovered = _recover(judged, changes)
            return cls(
                stack.pop_all(), pipeline, native=native, shields=shields, recorder=recorder,
                resolution=resolution, machine=machine, trace=folder, functions=toolbox.functions,
                changes=changes, recovered=recovered,
            )  # fmt: skip

    @property
    def policy(self) -> Judged:
        """The policy in force."""
        return self.resolution.policy

    @property
    def confinement(self) -> Confinement:
        """What enforces Calls here."""
        return self.native.promises()

    def tool(
        self, *, name: str | None = None, profile: str | None = None
    ) -> Callable[[_FunctionT], _FunctionT]:
        """Return a decorator that registers a function as a tool, judged under its name.

        ``call`` then runs it in a fork of a confined interpreter (docs/python-tools.md); calling
        the function itself stays an ordinary, unconfined call. With ``profile`` it runs in that
        profile of the policy or not at all. The decorator raises ToolFailed ``python.function``
        where the function uses state that cannot cross.
        """

        def register(function: _FunctionT) -> _FunctionT:
            self._functions.add(function, name, profile)
            return function

        return register

    def new_call(self, tool: str, arguments: Mapping[str, Json], *, origin: str = "sdk") -> Call:
        """Name a new Call of this session."""
        return Call(
            id=secrets.token_hex(8),
            tool=tool,
            arguments=arguments,
            session=self.session,
            origin=origin,
        )

    def call(self, tool: str, /, **arguments: Json) -> Outcome:
        """Judge, run and record one Call; blocks until it is over.

        A program that exits with another code than 0 is an Outcome, not an error. Raises Denied,
        ApprovalRequired, ToolFailed, LimitExceeded, SandboxFailed, SandboxUnavailable or
        TraceInvalid.
        """
        outcome = self.perform(self.new_call(tool, arguments))
        if outcome.limit is not None:
            raise LimitExceeded(
                f"The call was ended by its {outcome.limit} limit.",
                limit=outcome.limit,
                outcome=outcome,
            )
        return outcome

    async def acall(self, tool: str, /, **arguments: Json) -> Outcome:
        """Do what ``call`` does in a worker thread, without blocking the event loop.

        Cancelling ends the waiting, not the call: it runs to its end or limit and is recorded.
        """
        return await anyio.to_thread.run_sync(lambda: self.call(tool, **arguments))

    def perform(self, call: Call, *, sink: Sink | None = None) -> Outcome:
        """Take a Call along the pipeline; an Outcome with a limit is returned, not raised."""
        return self.pipeline.perform(call, sink=sink)

    def close(self) -> None:
        """End every sandbox, sign the Trace, end the launcher and the signer.

        Does nothing in a forked child: all of it belongs to the process that started it.
        """
        if os.getpid() == self._pid:
            self._stack.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await anyio.to_thread.run_sync(self.close)


def _refuse_inside(workspace: str, trace: Path, places: Places) -> None:
    for path in (trace, places.state):
        if inside(os.path.realpath(path), workspace):
            raise TraceInvalid(
                f"{path} lies inside the workspace, where tools could reach it.",
                code="trace.inside_workspace",
                hint="Name a folder outside with --trace (or XDG_STATE_HOME).",
            )


def _confinement(
    stack: ExitStack, policy: Judged, tier: Tier | None, keeper: Keeper
) -> tuple[Machine, NativeSandbox]:
    cgroups = cgroup.discover()
    if cgroups is not None:
        stack.callback(cgroups.close)
    launcher = Launcher()
    stack.callback(launcher.close)
    machine = survey(launcher, cgroups)
    chosen = machine.choose(policy.require_tier, cgroup=policy.require_cgroup)
    if tier is not None and Tier(tier) is not chosen:
        tier = Tier(tier)
        if policy.require_tier is Tier.FULL or machine.tiers[tier]:
            raise SandboxUnavailable(
                f"Tier {tier} was asked for by name. {machine.tiers[tier]}".rstrip(),
                missing=f"tier:{tier}",
                hint="Leave the tier to the machine and the policy.",
            )
        chosen = tier
    native = NativeSandbox(launcher, tier=chosen, cgroups=cgroups, keeper=keeper)
    stack.callback(native.close)
    for part in policy.parts:
        for profile in islice(part.profiles.values(), _PREPARED_MAX):
            if profile.engine is Engine.NATIVE:
                native.prepare(profile)
    return machine, native


def _shields(stack: ExitStack, resolution: Resolution, places: Places, trace: Path) -> Shields:
    workspace = resolution.policy.workspace
    files = [os.path.abspath(file) for file in resolution.files]
    frozen = [*files, *(os.path.realpath(file) for file in files)]
    absent = [os.path.realpath(path) for path in (places.state, trace)]
    shields = Shields(workspace, PROTECTED, absent, frozen=frozen, lock=places.lock(workspace))
    stack.callback(shields.close)
    return shields


def _recording(pipeline: Pipeline, session: str) -> Recording:
    """Return what records a deed of the operator on a workspace as a Call of this session."""

    @contextmanager
    def record(tool: str, arguments: dict[str, Json]) -> Generator[Callable[[Json], None]]:
        call = Call(
            id=secrets.token_hex(8), tool=tool, arguments=arguments, session=session,
            caller="operator", origin="operator",
        )  # fmt: skip
        with pipeline.operate(call, Profile(name="operator")) as admitted:
            yield lambda value: pipeline.settle(admitted, Outcome(call=call.id, value=value))

    return record


def _recover(policy: Judged, changes: KeptSets) -> dict[str, Recovery]:
    """End broken commits to the workspace, and to other folders that have overlays."""
    folders = {policy.workspace}
    for part in policy.parts:
        for profile in part.profiles.values():
            if profile.workspace is WorkspaceMode.OVERLAY:
                folders |= {path for path in profile.write if not inside(path, policy.workspace)}
    found = {path: changes.recover(path) for path in sorted(folders) if os.path.isdir(path)}
    return {path: one for path, one in found.items() if one.done is not Recovered.NOTHING}


def _wasm(stack: ExitStack, native: NativeSandbox) -> WasmEngine:
    engine = WasmEngine(native)
    stack.callback(engine.close)
    return engine


def _python(stack: ExitStack, native: NativeSandbox, machine: Machine) -> PythonEngine:
    engine = PythonEngine(native, machine.cgroups)
    stack.callback(engine.close)
    return engine


def _recorder(
    stack: ExitStack, places: Places, trace: Path, workspace: str, caller: str, origin: str
) -> Recorder:
    forbidden = [trace, Path(workspace)]
    signer = SignerClient.start(places.key, state=places.signer, forbidden=forbidden)
    stack.callback(signer.close)
    writer = TraceWriter.open(trace, signer=signer)
    stack.callback(writer.close)
    recorder = Recorder(writer, caller=caller, origin=origin)
    stack.callback(recorder.close)
    return recorder
