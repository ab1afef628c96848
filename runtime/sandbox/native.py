"""Step "sandbox": run one program in a native sandbox and tell what came of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from safeconduct.call import (
    Confinement,
    Outcome,
    Profile,
    Tier,
    WorkspaceMode,
)
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import bounds, cgroup, cgroup_plan, seccomp, shortfall
from .capture import Capture, Sink
from .channel import STALE, encode
from .launcher import Launcher
from .layout import (
    SEARCH,
    Layout,
    environment_of,
    overlaid,
)
from .overlay import Keeper, Layers
from .plan import Plan, Setting
from .pool import AHEAD, Pool
from .promise import Promises
from .refused import Listening
from .running import Running
from .scratch import Scratches
from .shield import Shield
from .stock import Stock
from .template import Waiting

# With the template bound to the call's folders, with one bound to none, and with a new one.
_ATTEMPTS = 3

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run: ``argv``, its folder, its stdin bytes and additions to its environment.

    ``source`` is a descriptor that takes the place of the stdin bytes. ``descriptors`` become
    3, 4, … of the program.
    """

    argv: Sequence[str]
    cwd: str
    stdin: bytes = b""
    source: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    descriptors: Sequence[int] = ()


class NativeSandbox:
    """Starts programs under one tier. Safe to use from several threads.

    ``ahead`` is how many sandboxes of each plan wait for the next calls. A plan is used again
    for every call with the same profile and shield. ``keeper`` keeps what calls change in
    overlays; without one no profile may ask for them.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        tier: Tier,
        cgroups: cgroup.Cgroups | None,
        ahead: int = AHEAD,
        keeper: Keeper | None = None,
    ) -> None:
        self.tier = Tier(tier)
        self._keeper = keeper
        self._launcher = launcher
        self._cgroups = cgroups
        self._scratches = Scratches()
        self._stock = Stock(launcher, self.tier, self, cgroups=cgroups, ahead=ahead)
        self._promises = Promises(self.tier, launcher, cgroups)

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
        begun: Callable[[Running], object] | None = None,
    ) -> Outcome:
        """Run ``program`` to its end and return its Outcome; blocks.

        ``sink`` receives output as it comes, within the limit, and ``begun`` the sandbox once it
        was told its program. ``explain`` counts what seccomp refuses. ``late`` takes a sandbox
        that was made without the profile's folders also where one with them could wait; the
        first call of each kind does so anyway. Raises ToolFailed
        where there is no such program and SandboxFailed where the sandbox broke; then nothing is
        left running.
        """
        setting = self._stock.setting(profile, workspace, shield, program.cwd, explain=explain)
        return _again_if_stale(
            lambda: self._run(call, program, setting, sink=sink, late=late, begun=begun)
        )

    def _run(
        self, call: str, program: Program, setting: Setting, *, sink: Sink | None, late: bool,
        begun: Callable[[Running], object] | None,
    ) -> Outcome:  # fmt: skip
        profile, explain = setting.profile, setting.explain
        given: dict[int, int] = dict(enumerate(program.descriptors, start=3))
        if program.source is not None:
            given[0] = program.source
        elif program.stdin:
            given[0] = seccomp.memory_file(program.stdin)
        with ExitStack() as held:
            try:
                running = self._begin(held, program, setting, given, late=late)
            finally:
                if program.stdin and program.source is None:
                    os.close(given[0])
            if begun is not None:
                begun(running)
            running.pool.reach()
            capture = Capture(profile.limits.output_bytes, sink)
            refusals = Listening(held, profile, self.program(profile)) if explain else None
            with closing(running.watch()) as watch:
                try:
                    end = capture.follow(
                        running.channel,
                        running.streams,
                        profile.limits.wall_ms,
                        watch,
                        arrived=(lambda: refusals.take(running.channel)) if refusals else None,
                    )
                except SandboxFailed as error:
                    if error.step == "channel":
                        running.pool.failed = True  # its others may die of the same
                    elif error.step == "launcher":
                        self._stock.pools.distrust()
                    raise running.translated(error) from error
                if capture.exceeded is None and not end.wall_limit and (end.code or end.signal):
                    capture.exceeded = watch.last()
                if capture.exceeded == "depth":
                    watch.flatten()
            running.ended = True
            outcome = running.outcome(
                call,
                end,
                stdout=capture.stdout,
                stderr=capture.stderr,
                cut=capture.cut,
                polled=capture.exceeded,
                refused=refusals.found() if refusals else (),
            )
            changes = running.keep()
            return replace(outcome, changes=changes) if changes else outcome

    def start(
        self,
        program: Program,
        profile: Profile,
        *,
        workspace: str,
        shield: Shield,
        stdio: tuple[int, int, int],
        explain: bool = False,
    ) -> Running:
        """Start ``program`` on the given stdin, stdout and stderr and return once it executes.

        What it changes in overlays is kept when it is closed. With ``explain`` the listener of its
        filter comes over the channel, and whoever asked has to answer it.
        """
        given = dict(enumerate((*stdio, *program.descriptors)))
        # Such a program lives long: nobody waits for the next one.
        setting = Setting(
            profile=profile,
            workspace=workspace,
            shield=shield,
            cwd=program.cwd,
            explain=explain,
            ahead=0,
            tier=self.tier,
        )
        return _again_if_stale(lambda: self._start(program, setting, given))

    def _start(self, program: Program, setting: Setting, given: Mapping[int, int]) -> Running:
        told, tell = os.pipe2(os.O_CLOEXEC)
        try:
            with ExitStack() as held:
                try:
                    running = self._begin(held, program, setting, {**given, -1: tell})
                finally:
                    os.close(tell)
                running.await_exec(told)
                running.keeps = True
                held.pop_all()
                return running
        finally:
            os.close(told)

    def close(self) -> None:
        """End every waiting sandbox and remove what is left of scratch folders."""
        self._stock.close()
        self._scratches.close()

    def prepare(self, profile: Profile) -> None:
        """Have sandboxes made for first calls with the limits of ``profile``. Does not wait."""
        self._stock.prepare_first(profile)

    def _begin(
        self,
        held: ExitStack,
        program: Program,
        setting: Setting,
        given: Mapping[int, int],
        *,
        late: bool = False,
    ) -> Running:
        """Take a sandbox and tell it its program. Whatever comes, leaving ``held`` ends it."""
        if not program.argv:
            raise ToolFailed("There is no program to run.", code="tool.not_found")
        try:
            # A template that died takes its waiting sandboxes along, and one that was killed is not
            # made again ("sandbox"); nothing of this call ran in them.
            for attempt in range(_ATTEMPTS):
                pool, bound = self._stock.reserve(setting, late=late)
                try:
                    running = self._take(held, pool, program, setting, given, bound=bound)
                except SandboxFailed as error:
                    again = error.step in ("template", "channel", "sandbox") or error.code == STALE
                    if not again or attempt == _ATTEMPTS - 1:
                        raise
                    continue
                if bound and not late:
                    self._stock.prepare(setting)
                return running
            raise SandboxFailed("There is no sandbox.", step="pool")
        except SandboxFailed as error:
            raise shortfall.typed(error) from error
        except OSError as error:
            raise SandboxFailed(
                f"The sandbox could not be made: {error}.", step="prepare", errno=error.errno or 0
            ) from error

    def _take(
        self,
        held: ExitStack,
        pool: Pool,
        program: Program,
        setting: Setting,
        given: Mapping[int, int],
        *,
        bound: bool,
    ) -> Running:
        running = self._reserved(pool, setting, program.argv[0])
        # From before it is told anything: an interrupt may come at any line from here on.
        held.callback(running.close)
        waiting = running.waiting
        try:
            if bound:
                self._stock.bind(waiting, setting)
            environment = {**environment_of(self.tier, running.scratch), **program.environment}
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
            if isinstance(error, SandboxFailed) and (
                error.step == "channel" or error.code == STALE
            ):
                pool.failed = True
            running.close()
            raise
        return running

    def _reserved(self, pool: Pool, setting: Setting, name: str) -> Running:
        """Take a sandbox for a program of that name."""
        waiting: Waiting | None = None
        layers: Layers | None = None
        try:
            layers = self._layers(setting)
            waiting = layers.mount(pool.take) if layers is not None else pool.take()
            return Running(
                waiting=waiting,
                layers=layers,
                pool=pool,
                profile=setting.profile,
                name=name,
                scratch=self._scratches.path(waiting.scratch),
                scratches=self._scratches,
                cgroups=self._cgroups,
                confinement=self._promises.of(setting.profile, watched=setting.ahead is None),
            )
        except BaseException:
            if layers is not None:
                layers.close()
            pool.give_back(waiting)
            raise

    def _layers(self, setting: Setting) -> Layers | None:
        """Open what the call will see through overlays; None for nothing."""
        profile = setting.profile
        roots = overlaid(profile)
        if not roots and profile.workspace is not WorkspaceMode.SESSION:
            return None
        if self._keeper is None:
            raise SandboxUnavailable(
                "Nothing here keeps what a call changes in an overlay.",
                missing="overlay:keeper",
                hint="Use workspace: direct in this profile.",
            )
        shield = setting.shield
        return self._keeper.begin(
            profile,
            roots,
            shielded=(*shield.protected, *shield.hidden),
            lasting=setting.ahead is not None,
        )

    def program(self, profile: Profile, *, explain: bool = False) -> bytes:
        """Return the seccomp filter of a profile."""
        return seccomp.filter_of(self.tier, profile, explain=explain)

    def plan(
        self, profile: Profile, layout: Layout, ids: Mapping[str, object], *, explain: bool = False
    ) -> Plan:
        """Return what a template of this profile is made of."""
        layers = ["landlock", "seccomp", "capabilities"]
        if self.tier is Tier.FULL:
            layers.append("namespaces")
        limits = profile.limits
        name = self._cgroups.new_name() if self._cgroups else secrets.token_hex(4)
        return Plan(
            layers=layers,
            identity=ids,
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
        return self._promises.of(Profile(name="any", write=("/any",)), watched=True)


def _again_if_stale(attempt: Callable[[], _T]) -> _T:
    """Try again where somebody changed what the sandbox hides or protects after it was made, or
    ended its template: its program was not started.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except SandboxFailed as error:
            if error.code != STALE:
                raise
    return attempt()
