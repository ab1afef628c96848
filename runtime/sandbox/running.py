"""Step "sandbox": one sandbox that lives, from its program's start until all of it is gone."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass

from safeconduct.call import (
    Confinement,
    KeptChanges,
    Outcome,
    Profile,
    Refused,
    Tier,
    Usage,
    WorkspaceMode,
)
from safeconduct.errors import Error, SandboxFailed, ToolFailed

from . import bounds, cgroup_plan, share, shortfall
from .accounts import Charge
from .capture import GRACE_SECONDS
from .cgroup import Cgroup, Cgroups
from .channel import STALE, Channel, Exit
from .overlay import Layers
from .pool import Pool
from .scratch import Scratches
from .template import Waiting
from .watch import Watch

_START_SECONDS = 20.0


@dataclass(slots=True, kw_only=True)
class Running:
    """A sandbox that lives. ``close`` ends its whole process tree and frees what it held."""

    waiting: Waiting
    pool: Pool
    profile: Profile
    name: str
    scratch: str
    scratches: Scratches
    cgroups: Cgroups | None
    confinement: Confinement
    # The overlays that it writes to, and what they held in the end.
    layers: Layers | None = None
    changes: tuple[KeptChanges, ...] = ()
    # Keep that also when it is closed.
    keeps: bool = False
    # The program has ended and with it all that it started.
    ended: bool = False
    _cgroup: Cgroup | None = None
    _closed: bool = False

    @property
    def channel(self) -> Channel:
        """The line to the sandbox."""
        return self.waiting.channel

    @property
    def streams(self) -> tuple[int, int]:
        """Descriptors to read stdout and stderr from."""
        return self.waiting.stdout, self.waiting.stderr

    def await_exec(self, told: int) -> None:
        """Wait until the program executes; ``told`` is a pipe whose other end it then closes.

        Raises ToolFailed where there is no such program.
        """
        if not select.select([told], [], [], _START_SECONDS)[0]:
            raise SandboxFailed("The program did not start in time.", step="exec")
        try:
            # What the stub had to say, it said before its end of the pipe was closed.
            self.channel.refuse_failure()
        except SandboxFailed as error:
            raise self.translated(error) from error

    def translated(self, error: SandboxFailed) -> Error:
        """Tell a program that cannot be run from a sandbox that cannot be made.

        After one that was made for what has changed since, its template is not used again.
        """
        if error.code == STALE:
            self.pool.failed = True
        if error.code != "sandbox.exec":
            return shortfall.typed(error)
        return ToolFailed(
            f"Cannot run {self.name!r} inside the sandbox: {os.strerror(error.errno)}.",
            code="tool.not_found",
            errno=error.errno,
            hint=shortfall.place_hint(self.confinement.tier or Tier.FULL, error.errno),
        )

    def watch(self) -> Watch:
        """Return what looks at the limits that the kernel does not hold."""
        direct = self.profile.workspace is WorkspaceMode.DIRECT
        roots = [*(self.profile.write if direct else ())]
        if self.confinement.tier is Tier.LANDLOCK:
            roots.append(self.scratch)
        limits = self.profile.limits
        part = share.of_call(self.cgroups, self._opened, self.waiting.init, limits.pids)
        if self.cgroups is None:
            return Watch(limits, roots, share=part)
        return Watch(
            limits,
            roots,
            lambda: self._opened().charge(),
            members=lambda: self._opened().members(),
            share=part,
        )

    def outcome(
        self,
        call: str,
        end: Exit,
        *,
        stdout: bytes,
        stderr: bytes,
        cut: bool,
        polled: str | None = None,
        refused: tuple[Refused, ...] = (),
    ) -> Outcome:
        """Translate the end of the program. ``polled`` is the limit that the watch ended it for."""
        charge = cgroup_plan.charge(self.cgroups, end.accounts) if self.cgroups else Charge()
        usage = Usage(
            wall_ms=end.wall_us // 1000,
            cpu_ms=(end.cpu_us if charge.cpu_us is None else charge.cpu_us) // 1000,
            throttled_ms=None if charge.throttled_us is None else charge.throttled_us // 1000,
            peak_memory_bytes=charge.peak_memory_bytes or end.peak_rss_kib * 1024,
            oom_kills=charge.oom_kills,
            peak_pids=charge.peak_pids,
            refused_forks=charge.refused_forks,
            read_bytes=end.read_bytes if charge.read_bytes is None else charge.read_bytes,
            written_bytes=(
                end.written_bytes if charge.written_bytes is None else charge.written_bytes
            ),
        )
        return Outcome(
            call=call,
            exit_code=end.code,
            signal=end.signal,
            stdout=stdout,
            stderr=stderr,
            truncated=cut,
            limit=bounds.limit_of(end, charge, self.profile.limits, polled=polled, full=end.full),
            refused=refused,
            usage=usage,
            confinement=self.confinement,
        )

    def keep(self) -> tuple[KeptChanges, ...]:
        """Keep what the program changed in overlays. INVARIANT: all that it started has ended.

        Raises LimitExceeded or SandboxFailed; then nothing is kept.
        """
        layers, self.layers = self.layers, None
        if layers is not None:
            try:
                self.changes = layers.keep()
            finally:
                layers.close()
        return self.changes

    def close(self) -> None:
        """End the sandbox if it still lives and wait until its processes are gone.

        Raises SandboxFailed with step "close" where nobody can say that they are.
        """
        if self._closed:
            return
        self._closed = True
        ended = self.ended
        try:
            ended = ended or self.channel.drain(GRACE_SECONDS) or self._kill()
            if ended and self.keeps:
                self.keep()
        finally:
            if self.layers is not None:
                self.layers.close()
            if self._cgroup is not None:
                self._cgroup.accounts.close()
            self.pool.give_back(self.waiting)
            self.scratches.remove(self.waiting.scratch)
        if not ended:
            raise SandboxFailed(
                "The sandbox did not end when it was told to.",
                step="close",
                hint="Processes of the call may still be running; end them by hand.",
            )

    def _kill(self) -> bool:
        """End a sandbox whose init does not listen any more; False where some of it may be left."""
        self.pool.failed = True  # its others may have met the same
        killed = self.waiting.kill(GRACE_SECONDS)
        # Without a pid namespace the template ends what the init leaves, and nobody tells when.
        return killed and self.confinement.tier is Tier.FULL

    def _opened(self) -> Cgroup:
        if self._cgroup is None:
            if self.cgroups is None:
                raise SandboxFailed("There is no cgroup.", step="cgroup")
            name = f"{self.pool.template.name}-{self.waiting.number}"
            self._cgroup = cgroup_plan.opened(self.cgroups, name)
        return self._cgroup
