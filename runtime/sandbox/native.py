"""Step "sandbox": run one program in a native sandbox and tell what came of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from safeconduct.call import Confinement, Held, Limits, Outcome, Profile, Tier, Usage
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import bounds, cgroup, machine, seccomp
from .capture import GRACE_SECONDS, Capture, Sink, Streams
from .launcher import Channel, Exit, Launcher, Request
from .layout import INSIDE_UID, SEARCH, Layout, lay_out
from .scratch import Scratches
from .shield import Shield

# Host ids of sandboxes started by root: above every range that distributions and containers hand
# out (systemd's container ids end at 0x6FFFFFFF), below what a signed 32-bit id allows.
_UID_BASE, _UID_COUNT = 0x7000_0000, 0x0F00_0000
_START_SECONDS = 20.0

NAMESPACE_LAYERS = ("user-ns", "mount-ns", "pid-ns", "net-ns", "ipc-ns", "uts-ns", "cgroup-ns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run: ``argv``, its folder, its stdin bytes and additions to its environment.

    ``descriptors`` become 3, 4, … of the program.
    """

    argv: Sequence[str]
    cwd: str
    stdin: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    descriptors: Sequence[int] = ()


@dataclass(slots=True, kw_only=True)
class Running:
    """A sandbox that lives. ``close`` ends its whole process tree and frees what it held."""

    channel: Channel
    confinement: Confinement
    limits: Limits
    _cgroup: cgroup.Cgroup | None
    _discard: Callable[[], None]

    def outcome(self, call: str, end: Exit, *, stdout: bytes, stderr: bytes, cut: bool) -> Outcome:
        """Translate the end of the program; read the accounts before ``close``."""
        charge = self._cgroup.charge() if self._cgroup else cgroup.Charge()
        usage = Usage(
            wall_ms=end.wall_us // 1000,
            cpu_ms=end.cpu_us // 1000 if charge.cpu_ms is None else charge.cpu_ms,
            peak_memory_bytes=charge.peak_memory_bytes or end.peak_rss_kib * 1024,
            refused_forks=charge.refused_forks,
        )
        return Outcome(
            call=call,
            exit_code=end.code,
            signal=end.signal,
            stdout=stdout,
            stderr=stderr,
            truncated=cut,
            limit=bounds.limit_of(end, charge, self.limits),
            usage=usage,
            confinement=self.confinement,
        )

    def close(self) -> None:
        """End the sandbox if it still lives and wait until its processes are gone."""
        ended = False
        try:
            ended = self.channel.drain(GRACE_SECONDS)
        finally:
            self.channel.close()
            self._discard()
        if not ended:
            raise SandboxFailed("The sandbox did not end when it was told to.", step="close")


class NativeSandbox:
    """Starts programs under one tier. Safe to use from several threads."""

    def __init__(self, launcher: Launcher, *, tier: Tier, cgroups: cgroup.Cgroups | None) -> None:
        self.tier = Tier(tier)
        self._launcher = launcher
        self._cgroups = cgroups
        self._scratches = Scratches()

    def run(
        self,
        call: str,
        program: Program,
        profile: Profile,
        *,
        workspace: str,
        shield: Shield,
        sink: Sink | None = None,
    ) -> Outcome:
        """Run ``program`` to its end and return its Outcome; blocks.

        ``sink`` receives output as it comes, within the limit. Raises ToolFailed where there is
        no such program and SandboxFailed where the sandbox broke; then nothing is left running.
        """
        if not program.argv:
            raise ToolFailed("There is no program to run.", code="tool.not_found")
        try:
            streams = Streams(program.stdin)
        except OSError as error:
            raise _exhausted(error) from error
        try:
            running = self.start(
                program, profile, workspace=workspace, shield=shield, stdio=streams.given
            )
            try:
                streams.hand_over()
                capture = Capture(profile.limits.output_bytes, sink)
                wall_ms = profile.limits.wall_ms
                end = capture.follow(running.channel, streams.stdout, streams.stderr, wall_ms)
                stdout, stderr = capture.streams["stdout"], capture.streams["stderr"]
                return running.outcome(call, end, stdout=stdout, stderr=stderr, cut=capture.cut)
            finally:
                running.close()
        finally:
            streams.close()

    def start(
        self,
        program: Program,
        profile: Profile,
        *,
        workspace: str,
        shield: Shield,
        stdio: tuple[int, int, int],
    ) -> Running:
        """Start ``program`` on the given stdin, stdout and stderr and return once it executes."""
        try:
            identity, mapped = _identity(workspace, self.tier)
            ids = int(str(identity["uid"])), int(str(identity["gid"]))
            scratch = self._scratches.make(*ids) if self.tier is Tier.LANDLOCK else None
        except OSError as error:
            raise _exhausted(error) from error
        made = None
        try:
            layout = lay_out(
                profile,
                self.tier,
                scratch=scratch or "/tmp",  # noqa: S108
                cwd=program.cwd,
                shield=shield,
                mapped=mapped,
            )
            made = self._cgroups.make(profile.limits) if self._cgroups else None
            request = self._request(program, profile.limits, layout, identity, made)
            channel = self._launcher.start(
                request,
                program=seccomp.compile_filter(self.tier),
                stdio=stdio,
                extra=program.descriptors,
            )
        except OSError as error:
            self._discard(made, scratch)
            raise _exhausted(error) from error
        except BaseException:
            self._discard(made, scratch)
            raise
        running = Running(
            channel=channel,
            confinement=self._confinement(made.version if made else None),
            limits=profile.limits,
            _cgroup=made,
            _discard=partial(self._discard, made, scratch),
        )
        try:
            _await_start(channel, program.argv[0])
        except BaseException:
            running.close()
            raise
        return running

    def _discard(self, made: cgroup.Cgroup | None, scratch: str | None) -> None:
        if self._cgroups and made:
            self._cgroups.retire(made)
        if scratch:
            self._scratches.remove(scratch)

    def _request(
        self,
        program: Program,
        limits: Limits,
        layout: Layout,
        identity: Mapping[str, object],
        made: cgroup.Cgroup | None,
    ) -> Request:
        layers = ["landlock", "seccomp", "capabilities"]
        if self.tier is Tier.FULL:
            layers.append("namespaces")
        environment = {**layout.environment, **program.environment}
        return Request(
            layers=layers,
            argv=program.argv,
            environment=[f"{name}={value}" for name, value in environment.items()],
            cwd=program.cwd,
            search=SEARCH,
            identity=identity,
            mounts=layout.mounts,
            landlock=layout.landlock,
            rlimits=list(bounds.rlimits(limits, self.tier, in_cgroup=made is not None)),
            cgroups=made.procs if made else (),
            wall_ms=limits.wall_ms,
        )

    def promises(self) -> Confinement:
        """Say what will enforce a program started here."""
        return self._confinement(self._cgroups.version if self._cgroups else None)

    def _confinement(self, cgroup_version: int | None) -> Confinement:
        tree = cgroup_version is not None
        layers = [f"landlock-abi{self._launcher.landlock_abi}", "seccomp", "no-capabilities"]
        if self.tier is Tier.FULL:
            layers = [*NAMESPACE_LAYERS, *layers]
        if cgroup_version is not None:
            layers.append(f"cgroup-v{cgroup_version}")
        if machine.is_root():
            layers.append("own-uid")
        own_processes = tree or self.tier is Tier.FULL
        held = {
            "wall": Held.TREE,
            "cpu": Held.PROCESS,
            "memory": Held.TREE if tree else Held.PROCESS,
            "pids": Held.TREE if own_processes else Held.PROCESS,
            "files": Held.PROCESS,
            "disk": Held.PROCESS,
            "output": Held.TREE,
        }
        return Confinement(tier=self.tier, layers=tuple(layers), held=held)


def _await_start(channel: Channel, name: str) -> None:
    try:
        message = channel.receive(_START_SECONDS)
    except SandboxFailed as error:
        if error.code != "sandbox.exec":
            raise
        raise ToolFailed(
            f"Cannot run {name!r} inside the sandbox: {os.strerror(error.errno)}.",
            code="tool.not_found",
            errno=error.errno,
        ) from error
    if message != "started":
        raise SandboxFailed("The sandbox ended before it started.", step="channel")


def _identity(workspace: str, tier: Tier) -> tuple[Mapping[str, object], bool]:
    """Choose the host ids; True when the workspace must be id-mapped to them."""
    if not machine.is_root():
        ids = {"uid": os.geteuid(), "gid": os.getegid(), "inside": INSIDE_UID, "owner": None}
        return ids, False
    uid = _UID_BASE + secrets.randbelow(_UID_COUNT)
    mapped = tier is Tier.FULL
    status = os.stat(workspace)
    owner = (status.st_uid, status.st_gid) if mapped else None
    return {"uid": uid, "gid": uid, "inside": INSIDE_UID, "owner": owner}, mapped


def _exhausted(error: OSError) -> SandboxFailed:
    return SandboxFailed(
        f"The sandbox could not be made: {error}.", step="prepare", errno=error.errno or 0
    )


def survey(launcher: Launcher, cgroups: cgroup.Cgroups | None) -> machine.Machine:
    """Try each tier with a program that does nothing, and say what this machine gives."""
    tiers: dict[Tier, str] = {}
    for tier in Tier:
        shortfall = machine.landlock_shortfall(launcher.landlock_abi, tier)
        tiers[tier] = shortfall or _try(launcher, tier)
    return machine.Machine(
        tiers=tiers,
        landlock_abi=launcher.landlock_abi,
        cgroups=cgroups,
        root=machine.is_root(),
    )


def _try(launcher: Launcher, tier: Tier) -> str:
    sandbox = NativeSandbox(launcher, tier=tier, cgroups=None)
    profile = Profile(name="survey", limits=Limits(wall_ms=10_000))
    program = Program(argv=["true"], cwd="/usr")
    try:
        outcome = sandbox.run("survey", program, profile, workspace="/usr", shield=Shield())
    except (SandboxFailed, SandboxUnavailable, ToolFailed) as error:
        return error.message
    return "" if outcome.ok else f"A trial program ended with {outcome.exit_code}."
