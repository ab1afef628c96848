"""Step "sandbox": run one program in a native sandbox and tell what came of it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field

from safeconduct.call import (
    Confinement,
    Limits,
    Outcome,
    Profile,
    Refused,
    Tier,
    WorkspaceMode,
)
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import bounds, cgroup, cgroup_plan, machine, seccomp
from .capture import Capture, Sink
from .launcher import Launcher, Template, Waiting, encode
from .layout import INSIDE_UID, SEARCH, Layout, environment_of, lay_out
from .pool import AHEAD, Pool, Pools
from .refused import Refusals
from .running import Running
from .scratch import Scratches
from .shield import Shield

# Each template made by root takes a block of host ids, one for each sandbox that lives,
# template.rs LIVING_MAX.
_ID_BLOCK = 1024

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What native/launcher/src/request.rs calls a Plan; the names are the same."""

    layers: Sequence[str]
    identity: Mapping[str, object]
    network: str = "shared"
    mounts: Sequence[Mapping[str, object]] = ()
    landlock: Sequence[Mapping[str, object]] = ()
    rlimits: Sequence[Mapping[str, object]] = ()
    cgroups: Sequence[Mapping[str, object]] = ()
    name: str = ""
    scratch: str | None = None
    late: bool = False
    explain: bool = False


class NativeSandbox:
    """Starts programs under one tier. Safe to use from several threads.

    ``ahead`` is how many sandboxes of each plan wait for the next calls. A plan is used again
    for every call with the same profile and shield.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        tier: Tier,
        cgroups: cgroup.Cgroups | None,
        ahead: int = AHEAD,
    ) -> None:
        self.tier = Tier(tier)
        self._launcher = launcher
        self._cgroups = cgroups
        self._scratches = Scratches()
        self._pools = Pools(ahead=ahead)
        self._confinements: dict[tuple[Limits, bool, bool], Confinement] = {}

    def run(
        self,
        call: str,
        program: Program,
        profile: Profile,
        *,
        workspace: str,
        shield: Shield,
        sink: Sink | None = None,
        explain: bool = False,
    ) -> Outcome:
        """Run ``program`` to its end and return its Outcome; blocks.

        ``sink`` receives output as it comes, within the limit. ``explain`` counts what seccomp
        refuses. Raises ToolFailed where there is no such program and SandboxFailed where the
        sandbox broke; then nothing is left running.
        """
        with ExitStack() as held:
            given: dict[int, int] = dict(enumerate(program.descriptors, start=3))
            if program.stdin:
                given[0] = seccomp.memory_file(program.stdin)
                held.callback(os.close, given[0])
            running = self._begin(program, profile, workspace, shield, given, explain=explain)
            held.callback(running.close)
            capture = Capture(profile.limits.output_bytes, sink)
            refusals = _Listening(held, profile, self._filter(profile)) if explain else None
            with closing(running.watch()) as watch:
                try:
                    end = capture.follow(
                        running.channel,
                        running.streams,
                        profile.limits.wall_ms,
                        watch,
                        arrived=(lambda: refusals.take(running)) if refusals else None,
                    )
                except SandboxFailed as error:
                    raise running.translated(error) from error
            running.ended = True
            return running.outcome(
                call,
                end,
                stdout=capture.stdout,
                stderr=capture.stderr,
                cut=capture.cut,
                polled=capture.exceeded,
                refused=refusals.found() if refusals else (),
            )

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
        given = dict(enumerate((*stdio, *program.descriptors)))
        told, tell = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                running = self._begin(
                    program, profile, workspace, shield, {**given, -1: tell}, ahead=0
                )
            finally:
                os.close(tell)
            try:
                running.await_exec(told)
            except BaseException:
                running.close()
                raise
            return running
        finally:
            os.close(told)

    def close(self) -> None:
        """End every waiting sandbox and remove what is left of scratch folders."""
        self._pools.close()
        self._scratches.close()

    def _begin(
        self,
        program: Program,
        profile: Profile,
        workspace: str,
        shield: Shield,
        given: Mapping[int, int],
        *,
        explain: bool = False,
        ahead: int | None = None,
    ) -> Running:
        """Take a sandbox of the plan and tell it its program."""
        if not program.argv:
            raise ToolFailed("There is no program to run.", code="tool.not_found")
        try:
            # A template that died takes its waiting sandboxes along; nothing ran in them.
            for attempt in ("first", "last"):
                pool = self._reserve(profile, workspace, shield, program.cwd, explain, ahead)
                try:
                    return self._take(pool, program, profile, given, watched=ahead is None)
                except SandboxFailed as error:
                    if error.step not in ("template", "channel") or attempt == "last":
                        raise
            raise SandboxFailed("There is no sandbox.", step="pool")
        except OSError as error:
            raise SandboxFailed(
                f"The sandbox could not be made: {error}.", step="prepare", errno=error.errno or 0
            ) from error

    def _take(
        self,
        pool: Pool,
        program: Program,
        profile: Profile,
        given: Mapping[int, int],
        *,
        watched: bool,
    ) -> Running:
        waiting: Waiting | None = None
        try:
            waiting = pool.take()
            scratch = self._scratches.path(waiting.scratch)
            environment = {**environment_of(self.tier, scratch), **program.environment}
            run = encode(
                {
                    "argv": program.argv,
                    "environment": [f"{name}={value}" for name, value in environment.items()],
                    "cwd": program.cwd,
                    "search": SEARCH,
                    "wall_ms": profile.limits.wall_ms,
                    "rlimits": (),
                    "descriptors": list(given),
                }
            )
            waiting.channel.tell(run, list(given.values()))
        except BaseException as error:
            if isinstance(error, SandboxFailed) and error.step == "channel":
                pool.failed = True
            if waiting is not None:
                waiting.close()
            pool.give_back()
            raise
        return Running(
            waiting=waiting,
            pool=pool,
            profile=profile,
            name=program.argv[0],
            scratch=scratch,
            scratches=self._scratches,
            cgroups=self._cgroups,
            confinement=self._confinement(profile, watched=watched),
        )

    def _reserve(
        self,
        profile: Profile,
        workspace: str,
        shield: Shield,
        cwd: str,
        explain: bool,
        ahead: int | None,
    ) -> Pool:
        # A folder that is not shown has to be made for a program to start in.
        shown = any(cwd == root or cwd.startswith(f"{root}/") for root in _roots(profile))
        granted = tuple(_object(path) for path in (*profile.read, *profile.write))
        key: Hashable = (
            profile, shield, workspace, None if shown else cwd, explain, ahead, granted,
        )  # fmt: skip
        return self._pools.reserve(
            key, lambda: self._template(profile, workspace, shield, cwd, explain), ahead=ahead
        )

    def _template(
        self, profile: Profile, workspace: str, shield: Shield, cwd: str, explain: bool
    ) -> Template:
        identity, mapped = _identity(workspace, self.tier)
        layout = lay_out(profile, self.tier, cwd=cwd, shield=shield, mapped=mapped)
        plan = self._plan(profile, layout, identity, explain=explain)
        program = self._filter(profile, explain=explain)
        return self._launcher.template(self.tier, asdict(plan), program)

    def _filter(self, profile: Profile, *, explain: bool = False) -> bytes:
        return seccomp.compile_filter(self.tier, profile.syscalls, explain=explain)

    def _plan(
        self,
        profile: Profile,
        layout: Layout,
        identity: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        layers = ["landlock", "seccomp", "capabilities"]
        if self.tier is Tier.FULL:
            layers.append("namespaces")
        limits = profile.limits
        name = self._cgroups.new_name() if self._cgroups else secrets.token_hex(4)
        return Plan(
            layers=layers,
            identity=identity,
            mounts=layout.mounts,
            landlock=layout.landlock,
            rlimits=bounds.rlimits(limits, self.tier, in_cgroup=self._cgroups is not None),
            cgroups=cgroup_plan.plan(self._cgroups, limits) if self._cgroups else (),
            name=name,
            scratch=self._scratches.base if self.tier is Tier.LANDLOCK else None,
            explain=explain,
        )

    def promises(self) -> Confinement:
        """Say what will enforce a program started here."""
        return self._confinement(Profile(name="any", write=("/any",)), watched=True)

    def _confinement(self, profile: Profile, *, watched: bool) -> Confinement:
        direct = bool(profile.write) and profile.workspace is WorkspaceMode.DIRECT
        key = profile.limits, direct, watched
        found = self._confinements.get(key)
        if found is None:
            found = self._confinements[key] = self._promise(*key)
        return found

    def _promise(self, limits: Limits, direct: bool, watched: bool) -> Confinement:
        layers = [f"landlock-abi{self._launcher.landlock_abi}", "seccomp", "no-capabilities"]
        if self.tier is Tier.FULL:
            layers = [*NAMESPACE_LAYERS, *layers]
        if self._cgroups is not None:
            layers.append(f"cgroup-v{self._cgroups.version}")
        if machine.is_root():
            layers.append("own-uid")
        in_cgroup = self._cgroups is not None
        held = bounds.held(limits, self.tier, in_cgroup=in_cgroup, direct=direct, watched=watched)
        return Confinement(tier=self.tier, layers=tuple(layers), held=held)


class _Listening:
    """Counts what seccomp refuses in one call, once its listener has come."""

    def __init__(self, held: ExitStack, profile: Profile, program: bytes) -> None:
        self._held, self._profile, self._program = held, profile, program
        self._refusals: Refusals | None = None

    def take(self, running: Running) -> None:
        listener, running.channel.listener = running.channel.listener, None
        if listener is not None and self._refusals is None:
            self._refusals = Refusals(listener, self._program)
            self._held.enter_context(self._refusals.start())

    def found(self) -> tuple[Refused, ...]:
        return self._refusals.found(self._profile.name) if self._refusals else ()


def _roots(profile: Profile) -> tuple[str, ...]:
    return (*profile.read, *profile.write, "/usr", "/tmp")  # noqa: S108 - inside the sandbox


def _object(path: str) -> tuple[int, ...]:
    """Name what is at ``path`` now: a folder that was replaced needs a new plan."""
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


def _identity(workspace: str, tier: Tier) -> tuple[Mapping[str, object], bool]:
    """Choose the host ids; True when the workspace must be id-mapped to them."""
    if not machine.is_root():
        ids = {"uid": os.geteuid(), "gid": os.getegid(), "inside": INSIDE_UID, "owner": None}
        return ids, False
    block = secrets.randbelow(machine.OWN_ID_COUNT // _ID_BLOCK)
    uid = machine.OWN_ID_FIRST + block * _ID_BLOCK
    mapped = tier is Tier.FULL
    status = os.stat(workspace)
    owner = (status.st_uid, status.st_gid) if mapped else None
    return {"uid": uid, "gid": uid, "inside": INSIDE_UID, "owner": owner}, mapped


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
    profile = Profile(name="survey", limits=Limits(wall_ms=10_000))
    program = Program(argv=["true"], cwd="/usr")
    with closing(NativeSandbox(launcher, tier=tier, cgroups=None, ahead=0)) as sandbox:
        try:
            outcome = sandbox.run("survey", program, profile, workspace="/usr", shield=Shield())
        except (SandboxFailed, SandboxUnavailable, ToolFailed) as error:
            return error.message
    if outcome.signal is not None:
        return f"A trial program was ended by signal {outcome.signal}."
    return "" if outcome.ok else f"A trial program ended with {outcome.exit_code}."
