"""The supervisor: everything one agent's run needs, put up once and taken down as one.

It starts two processes, the launcher (makes sandboxes) and the signer (holds the log key), opens
the Trace and hands Calls to the pipeline. It holds no key itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from safeconduct.call import (
    Bound,
    Call,
    Confinement,
    Json,
    KeptChanges,
    Outcome,
    Tier,
)
from safeconduct.errors import (
    PolicyError,
)
from safeconduct.policies import Judged, Resolution, load_policy, resolve_policy

from . import foundation
from .changes import KeptSets
from .delegate import Delegate, result, whole
from .ledger import Ledger
from .pipeline import Approver, Pipeline, nobody
from .places import Places
from .record import Recorder
from .reload import Reloader
from .sandbox.machine import Machine
from .sandbox.native import NativeSandbox
from .sandbox.overlay import Recovery
from .sandbox.shield import Shields
from .standing import Standing
from .threads import in_own_thread, in_thread
from .tools.function import Functions
from .tools.task import Sink

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., object])


def _nobody_listens(text: str) -> None:
    """Take the place of whoever is told about policies that did not come into force."""


class Runtime:
    """Runs Calls under one policy, in one session of one Trace. Safe to use from threads.

    A context manager; ``close`` ends every process it started and signs the Trace.
    """

    def __init__(
        self, stack: ExitStack, pipeline: Pipeline, *, native: NativeSandbox, shields: Shields,
        recorder: Recorder, standing: Standing, reloader: Reloader, machine: Machine, trace: Path,
        functions: Functions, changes: KeptSets, recovered: Mapping[str, Recovery],
    ) -> None:  # fmt: skip
        """Take over what ``from_policy`` put up; use that."""
        self.pipeline, self.native, self.shields = pipeline, native, shields
        self.standing = standing
        self.reloader, self.machine, self.trace = reloader, machine, trace
        self.session = recorder.session
        # What calls left in overlays, and how commits ended that a crash had broken off.
        self.changes, self.recovered = changes, recovered
        # What the session's overlay held in the end.
        self.kept: tuple[KeptChanges, ...] = ()
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
        role: str | None = None,
        observe: bool = False,
        watch: bool = False,
        tell: Callable[[str], object] = _nobody_listens,
    ) -> Runtime:
        """Put up a runtime. Starts two processes; creates a key and a trace folder if needed.

        Without ``policy`` it is discovered (docs/policy-language.md). ``tier`` asks for exactly
        that tier by name. ``environment`` replaces ``os.environ`` for finding files. With
        ``explain`` an Outcome says which system calls were refused (``refused``). ``role`` is the
        one role of this session. With ``observe`` a Call that no rule grants, or that a rule asks
        about, runs all the same in the profile that is enforced by default, and the Trace says
        so; what a rule denies stays denied. With ``watch`` changed policy files come into force
        before the next Call (``reload``); ``tell`` is told when one does not, and of witnesses.
        A commit of changes that a crash broke off is ended first (``recovered``). Raises
        PolicyError, SandboxUnavailable, SandboxFailed or TraceInvalid, and leaves nothing running.
        """
        surroundings = os.environ if environment is None else environment
        resolve = partial(
            resolve_policy,
            # What is read again later must be the same file, wherever this process goes.
            explicit=Path.cwd() / policy if policy is not None else None,
            start=Path.cwd(),
            environment=surroundings,
        )
        resolution = resolve(workspace=Path(workspace) if workspace is not None else None)
        places = Places.of(surroundings)
        folder = Path(trace) if trace is not None else places.new_trace()
        judged = resolution.policy
        foundation.refuse_inside(judged.workspace, folder, places)
        places.prepare()
        with ExitStack() as stack:
            keeper = foundation.overlay_keeper(stack, places, judged.workspace)
            machine, native = foundation.confinement(stack, judged, tier, keeper)
            shields = foundation.raise_shields(stack, resolution, places, folder)
            toolbox = foundation.toolbox(stack, native, machine, shields, explain=explain)
            recorder = foundation.session_recorder(
                stack, places, folder, judged, caller=caller, origin=origin, tell=tell
            )
            standing = Standing(judged, role=role, observe=observe)
            ledger = Ledger(places.budgets, scope=judged.workspace)
            stack.callback(ledger.close)
            pipeline = Pipeline(standing, recorder, ledger, toolbox, approver)
            reloader = Reloader(
                resolution, partial(resolve, workspace=Path(judged.workspace)),
                standing=standing, recorder=recorder, machine=machine,
                promised=native.promises(), tell=tell,
            )  # fmt: skip
            if watch:
                standing.watch = reloader.look
            recording = foundation.operator_recording(pipeline, recorder.session)
            changes = KeptSets(places=places, recording=recording, overlay=keeper.session)
            recovered = foundation.recover_commits(judged, changes)
            return cls(
                stack.pop_all(), pipeline, native=native, shields=shields, recorder=recorder,
                standing=standing, reloader=reloader, machine=machine, trace=folder,
                functions=toolbox.functions, changes=changes, recovered=recovered,
            )  # fmt: skip

    @property
    def resolution(self) -> Resolution:
        """The policy in force, where it was found and why it counts."""
        return self.reloader.current

    @property
    def policy(self) -> Judged:
        """The policy in force."""
        return self.resolution.policy

    def reload(self) -> Resolution:
        """Put what the policy's files say now into force, for every Call that begins later.

        It is believed, compiled and tested (``policy.test.yaml`` beside it) as a whole. Raises
        PolicyError where something is wrong with it; then the old one stays, and the Trace says so.
        """
        return self.reloader.reload()

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
        return result(self.perform(self.new_call(tool, arguments)))

    async def acall(self, tool: str, /, **arguments: Json) -> Outcome:
        """Do what ``call`` does in a worker thread, without blocking the event loop.

        Cancelling ends the waiting, not the call: it runs to its end or limit and is recorded.
        """
        return await in_thread(self, lambda: self.call(tool, **arguments))

    def delegate(
        self,
        name: str,
        *,
        tools: Sequence[str] | None = None,
        policy: str | Path | None = None,
        profile: str | None = None,
        bounds: Sequence[Bound] = (),
        lasts_ms: int | None = None,
    ) -> Delegate:
        """Hand on less than this session may, to a sub-agent that ``name`` names in the Trace.

        ``tools`` are names (`*` stands for part of a word), ``policy`` a file that must agree to
        each Call too, ``profile`` one of this policy that bounds where Calls run, ``bounds`` what
        they may use, ``lasts_ms`` how long it lasts. Whatever is given, it only narrows. Raises
        PolicyError where something of it cannot be meant.
        """
        mine = self.standing.policy
        file = None if policy is None else load_policy(Path(policy), workspace=Path(mine.workspace))
        if profile is not None and profile not in mine.profiles:
            raise PolicyError(
                f"there is no profile {profile!r}",
                code="capability.invalid",
                hint=f"there are: {', '.join(sorted(mine.profiles)) or 'none'}",
            )
        bound = None if profile is None else mine.profiles[profile]
        held = whole(self.pipeline, self.session, self.standing)
        return held.delegate(
            name, tools=tools, policy=file, profile=bound, bounds=bounds, lasts_ms=lasts_ms
        )

    def perform(self, call: Call, *, sink: Sink | None = None) -> Outcome:
        """Take a Call along the pipeline; an Outcome with a limit is returned, not raised."""
        return self.pipeline.perform(call, sink=sink)

    def close(self) -> None:
        """End every sandbox, sign the Trace, end the launcher and the signer.

        What is left in the session's overlay is kept before (``kept``); where it cannot be, it is
        lost and that error raised in the end.
        Does nothing in a forked child: all of it belongs to the process that started it.
        """
        if os.getpid() == self._pid:
            with self._stack:
                self.kept += self.changes.keep_session()

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
        await in_own_thread(self.close)
