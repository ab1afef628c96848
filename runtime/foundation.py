"""The supervisor's parts, each put up on one stack that takes all of them down in reverse."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from safeconduct.attestation import Checkpoint, TraceWriter
from safeconduct.attestation.privacy.erasure import finish_erasures
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.writing.appending import BATCH_S
from safeconduct.call import Call, Engine, Json, KeptChanges, Outcome, Profile, Tier
from safeconduct.errors import SandboxUnavailable, TraceInvalid
from safeconduct.mounts import Mounts
from safeconduct.policies import PROTECTED, Judged, Resolution, beside

from .changes import KeptSets, Recording, Tell
from .cosigning import Cosigning
from .pipeline import Pipeline
from .places import Places
from .record import Recorder
from .retention import keep_terms
from .sandbox import cgroup
from .sandbox.launcher import Launcher
from .sandbox.layout import inside
from .sandbox.machine import Machine
from .sandbox.native import NativeSandbox
from .sandbox.overlay import Keeper, Recovered, Recovery
from .sandbox.python import PythonEngine
from .sandbox.shield import Shields
from .sandbox.survey import survey
from .sandbox.wasm import WasmEngine
from .signing import start_signer
from .tools.toolbox import Toolbox
from .witnesses import load_trust

# LIMIT: profiles of a policy whose first calls find sandboxes that wait.
_PREPARED_MAX = 4


def refuse_inside(workspace: str, trace: Path, places: Places) -> None:
    """Raise TraceInvalid where tools could reach the trace or the state folder, by any name."""
    mounts = Mounts()
    for path in (trace, places.state):
        if inside(os.path.realpath(path), workspace):
            why = "lies inside the workspace, where tools could reach it."
        elif names := mounts.names_below(workspace, str(path)):
            why = f"can be reached through the workspace, as {names[0]}."
        else:
            continue
        raise TraceInvalid(
            f"{path} {why}",
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
    witness = resolution.policy.trace.witness
    named += [] if witness is None else [Path(witness.policy)]
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


class _Watched:
    """Shows signed heads to witnesses once there are some: who they are follows from the log."""

    def __init__(self) -> None:
        self._cosigning: Cosigning | None = None

    def noticed(self, head: Checkpoint, note: bytes) -> None:
        """Take a signed head."""
        if self._cosigning is not None:
            self._cosigning.noticed(head, note)

    def begin(self, cosigning: Cosigning, writer: TraceWriter) -> None:
        """Show heads from now on, the first one at once."""
        self._cosigning = cosigning
        cosigning.attach_with(writer.add_cosignatures)
        writer.checkpoint()

    def close(self) -> None:
        """Show the last head, when the writer has closed the trace."""
        if self._cosigning is not None:
            self._cosigning.close()


def session_recorder(
    stack: ExitStack, places: Places, trace: Path, policy: Judged,
    *, caller: str, origin: str, tell: Callable[[str], object],
) -> Recorder:  # fmt: skip
    """Start the signer, open the vault, the trace and a session in it; begin to ask witnesses."""
    terms, forbidden = policy.trace, [trace, Path(policy.workspace)]
    trusted = None if terms.witness is None else load_trust(Path(terms.witness.policy))
    signer = start_signer(places, os.environ, forbidden=forbidden)
    stack.callback(signer.close)
    vault = Vault.open(places.vault_key, forbidden=forbidden)
    watched = _Watched()
    stack.callback(watched.close)
    writer = TraceWriter.open(
        trace, signer=signer, vault=vault, on_checkpoint=watched.noticed,
        quota_bytes=terms.quota_bytes,
        batch_s=BATCH_S if terms.batch_ms is None else terms.batch_ms / 1000,
    )  # fmt: skip
    stack.callback(writer.close)
    finish_erasures(writer)  # what was ordered before, and in the end what is ordered meanwhile
    stack.callback(finish_erasures, writer)
    if terms.retain_days is not None:
        now_ms = time.time_ns() // 1_000_000
        keep_terms(
            writer, places=places, trace=trace, days=terms.retain_days, now_ms=now_ms,
            signer=signer, vault=vault, tell=tell,
        )  # fmt: skip
    recorder = Recorder(writer, caller=caller, origin=origin)
    stack.callback(recorder.close)

    def told(text: str) -> None:
        tell(text)

    if trusted is not None and terms.witness is not None:
        cosigning = Cosigning(
            trusted, directory=trace, origin=writer.origin, log_keys=lambda: [signer.key],
            tell=told,
        )  # fmt: skip
        watched.begin(cosigning, writer)
        if terms.witness.require:
            recorder.watched = cosigning.require
    return recorder
