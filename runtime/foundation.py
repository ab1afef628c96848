"""The supervisor's parts, each put up on one stack that takes all of them down in reverse."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.call import Call, Engine, Json, KeptChanges, Outcome, Profile, Tier
from safeconduct.errors import SandboxUnavailable, TraceInvalid
from safeconduct.policies import PROTECTED, Judged, Resolution, beside

from .changes import KeptSets, Recording, Tell
from .pipeline import Pipeline
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
from .tools.toolbox import Toolbox

# LIMIT: profiles of a policy whose first calls find sandboxes that wait.
_PREPARED_MAX = 4


def refuse_inside(workspace: str, trace: Path, places: Places) -> None:
    """Raise TraceInvalid where tools could reach the trace or the state folder."""
    for path in (trace, places.state):
        if inside(os.path.realpath(path), workspace):
            raise TraceInvalid(
                f"{path} lies inside the workspace, where tools could reach it.",
                code="trace.inside_workspace",
                hint="Name a folder outside with --trace (or XDG_STATE_HOME).",
            )


def overlay_keeper(stack: ExitStack, places: Places, workspace: str) -> Keeper:
    """Make what keeps the changes that calls leave in overlays."""
    keeper = Keeper(places.changes, workspace=workspace, protected=PROTECTED)
    stack.callback(keeper.session.close)
    return keeper


def confinement(
    stack: ExitStack, policy: Judged, tier: Tier | None, keeper: Keeper
) -> tuple[Machine, NativeSandbox]:
    """Start the launcher, see what this machine gives, and choose the tier.

    Raises SandboxUnavailable where that is less than the policy requires, or not ``tier``.
    """
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


def raise_shields(stack: ExitStack, resolution: Resolution, places: Places, trace: Path) -> Shields:
    """Put the policies in force, keys and traces out of reach of every sandbox."""
    workspace = resolution.policy.workspace
    # Tests beside a policy could keep a changed one from coming into force.
    named = [one for file in resolution.files for one in (file, beside(file))]
    files = [os.path.abspath(file) for file in named]
    frozen = [*files, *(os.path.realpath(file) for file in files)]
    absent = [os.path.realpath(path) for path in (places.state, trace)]
    shields = Shields(workspace, PROTECTED, absent, frozen=frozen, lock=places.lock(workspace))
    stack.callback(shields.close)
    return shields


def operator_recording(pipeline: Pipeline, session: str) -> Recording:
    """Return what records a deed of the operator on a workspace as a Call of this session."""

    @contextmanager
    def record(tool: str, arguments: dict[str, Json]) -> Generator[Tell]:
        call = Call(
            id=secrets.token_hex(8), tool=tool, arguments=arguments, session=session,
            caller="operator", origin="operator",
        )  # fmt: skip
        with pipeline.operate(call, Profile(name="operator")) as admitted:

            def tell(value: Json, changes: Sequence[KeptChanges] = ()) -> None:
                outcome = Outcome(call=call.id, value=value, changes=tuple(changes))
                pipeline.settle(admitted, outcome)

            yield tell

    return record


def recover_commits(policy: Judged, changes: KeptSets) -> dict[str, Recovery]:
    """End broken commits to the workspace, and to other folders that have overlays."""
    folders = {policy.workspace}
    for part in policy.parts:
        for profile in part.profiles.values():
            if profile.workspace.overlaid:
                folders |= {path for path in profile.write if not inside(path, policy.workspace)}
    found = {path: changes.recover(path) for path in sorted(folders) if os.path.isdir(path)}
    return {path: one for path, one in found.items() if one.done is not Recovered.NOTHING}


def toolbox(
    stack: ExitStack, native: NativeSandbox, machine: Machine, shields: Shields, *, explain: bool
) -> Toolbox:
    """Put up the engines that tools run in."""
    wasm = WasmEngine(native)
    stack.callback(wasm.close)
    python = PythonEngine(native, machine.cgroups)
    stack.callback(python.close)
    return Toolbox(native=native, wasm=wasm, python=python, shields=shields, explain=explain)


def session_recorder(
    stack: ExitStack, places: Places, trace: Path, workspace: str, caller: str, origin: str
) -> Recorder:
    """Start the signer, open the trace and a session in it."""
    forbidden = [trace, Path(workspace)]
    signer = SignerClient.start(places.key, state=places.signer, forbidden=forbidden)
    stack.callback(signer.close)
    writer = TraceWriter.open(trace, signer=signer)
    stack.callback(writer.close)
    recorder = Recorder(writer, caller=caller, origin=origin)
    stack.callback(recorder.close)
    return recorder
