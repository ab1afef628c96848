"""Step "sandbox": run one program in a native sandbox and tell what came of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace

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
from .layout import (
    SEARCH,
    Layout,
    environment_of,
    lay_out,
    lay_out_base,
    lay_out_grants,
)
from .plan import Plan, Setting, identity
from .pool import AHEAD, Pool, Pools
from .refused import Refusals
from .running import Running
from .scratch import Scratches
from .shield import Shield

# How long the launcher may take to clone the mounts of one call.
_CLONE_SECONDS = 20.0

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
        late: bool = False,
    ) -> Outcome:
        """Run ``program`` to its end and return its Outcome; blocks.

        ``sink`` receives output as it comes, within the limit. ``explain`` counts what seccomp
        refuses. ``late`` takes a sandbox that was made without the profile's folders also where
        one with them could wait; the first call of each kind does so anyway. Raises ToolFailed
        where there is no such program and SandboxFailed where the sandbox broke; then nothing is
        left running.
        """
        with ExitStack() as held:
            given: dict[int, int] = dict(enumerate(program.descriptors, start=3))
            if program.stdin:
                given[0] = seccomp.memory_file(program.stdin)
                held.callback(os.close, given[0])
            setting = Setting(
                profile=profile,
                workspace=workspace,
                shield=shield,
                cwd=program.cwd,
                explain=explain,
            )
            running = self._begin(program, setting, given, late=late)
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
        # Such a program lives long: nobody waits for the next one.
        setting = Setting(
            profile=profile, workspace=workspace, shield=shield, cwd=program.cwd, ahead=0
        )
        told, tell = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                running = self._begin(program, setting, {**given, -1: tell})
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

    def prepare(self, profile: Profile) -> None:
        """Have sandboxes made for first calls with the limits of ``profile``. Does not wait."""
        setting = Setting(profile=profile, workspace="/", shield=Shield(), cwd="/")
        if setting.can_be_late(self.tier):
            self._base_pool(setting).give_back()

    def _begin(
        self,
        program: Program,
        setting: Setting,
        given: Mapping[int, int],
        *,
        late: bool = False,
    ) -> Running:
        """Take a sandbox and tell it its program."""
        if not program.argv:
            raise ToolFailed("There is no program to run.", code="tool.not_found")
        try:
            # A template that died takes its waiting sandboxes along; nothing ran in them.
            for attempt in ("first", "last"):
                key = setting.key
                bound = setting.can_be_late(self.tier) and (
                    late or (not self._pools.has(key) and self._pools.has(setting.base_key))
                )
                pool = self._base_pool(setting) if bound else self._pool(key, setting)
                try:
                    running = self._take(pool, program, setting, given, bound=bound)
                except SandboxFailed as error:
                    if error.step not in ("template", "channel") or attempt == "last":
                        raise
                    continue
                if bound and not late:
                    self._pool(key, setting).give_back()
                return running
            raise SandboxFailed("There is no sandbox.", step="pool")
        except OSError as error:
            raise SandboxFailed(
                f"The sandbox could not be made: {error}.", step="prepare", errno=error.errno or 0
            ) from error

    def _take(
        self,
        pool: Pool,
        program: Program,
        setting: Setting,
        given: Mapping[int, int],
        *,
        bound: bool,
    ) -> Running:
        waiting: Waiting | None = None
        try:
            waiting = pool.take()
            if bound:
                self._bind(waiting, setting)
            scratch = self._scratches.path(waiting.scratch)
            environment = {**environment_of(self.tier, scratch), **program.environment}
            run = encode(
                {
                    "argv": program.argv,
                    "environment": [f"{name}={value}" for name, value in environment.items()],
                    "cwd": program.cwd,
                    "search": SEARCH,
                    "wall_ms": setting.profile.limits.wall_ms,
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
            profile=setting.profile,
            name=program.argv[0],
            scratch=scratch,
            scratches=self._scratches,
            cgroups=self._cgroups,
            confinement=self._confinement(setting.profile, watched=setting.ahead is None),
        )

    def _bind(self, waiting: Waiting, setting: Setting) -> None:
        """Attach the folders of one call to a sandbox that was made without any."""
        ids, mapped = identity(setting.workspace, self.tier)
        ids |= {"uid": waiting.uid, "gid": waiting.uid if mapped else ids["gid"]}
        grants = lay_out_grants(
            setting.profile, cwd=setting.cwd, shield=setting.shield, mapped=mapped
        )
        binds = [mount for mount in grants.mounts if mount["kind"] == "bind"]
        trees = self._launcher.clone(ids, binds, _CLONE_SECONDS) if binds else []
        try:
            bind = encode({"mounts": grants.mounts, "landlock": grants.landlock})
            waiting.channel.tell(bind, trees)
        finally:
            for tree in trees:
                os.close(tree)

    def _pool(self, key: Hashable, setting: Setting) -> Pool:
        return self._pools.reserve(key, lambda: self._template(setting), ahead=setting.ahead)

    def _base_pool(self, setting: Setting) -> Pool:
        return self._pools.reserve(setting.base_key, lambda: self._base(setting.profile))

    def _template(self, setting: Setting) -> Template:
        ids, mapped = identity(setting.workspace, self.tier)
        layout = lay_out(
            setting.profile, self.tier, cwd=setting.cwd, shield=setting.shield, mapped=mapped
        )
        plan = self._plan(setting.profile, layout, ids, explain=setting.explain)
        program = self._filter(setting.profile, explain=setting.explain)
        return self._launcher.template(self.tier, asdict(plan), program)

    def _base(self, profile: Profile) -> Template:
        ids, _ = identity(None, self.tier)
        plan = replace(self._plan(profile, lay_out_base(profile), ids), late=True)
        return self._launcher.template(self.tier, asdict(plan), self._filter(profile))

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
