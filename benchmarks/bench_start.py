"""How long does a confined `true` take, next to posix_spawn and bubblewrap?

Both run `/usr/bin/true` to its end. ``cold_ratio`` is a whole sandbox made for the call, with its
own namespaces, mounts, cgroup and workspace; there are no prepared pools in this version, so there
is no warm figure. bubblewrap, where installed, mounts about as much and has no seccomp, no limits.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack

from safeconduct.call import Profile, Tier
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program, survey
from safeconduct.runtime.sandbox.shield import Shield

from .harness import finish, interleave, options, spread

_PROGRAM = "/usr/bin/true"
_BWRAP = [
    "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
    "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
    "--unshare-all", "--die-with-parent", "--new-session",
]  # fmt: skip


def spawn() -> None:
    """Run the program unconfined."""
    os.waitpid(os.posix_spawn(_PROGRAM, [_PROGRAM], {}), 0)


def bubblewrap(path: str) -> None:
    """Run the program in bubblewrap."""
    subprocess.run([path, *_BWRAP, _PROGRAM], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    with ExitStack() as stack:
        workspace = stack.enter_context(tempfile.TemporaryDirectory())
        # Tier landlock started by root has a user id of its own and no mounts: it must get in.
        os.chmod(workspace, 0o755)  # noqa: S103 - meant
        launcher = Launcher()
        stack.callback(launcher.close)
        cgroups = cgroup.discover()
        if cgroups is not None:
            stack.callback(cgroups.close)
        found = survey(launcher, cgroups)
        profile = Profile(name="bench", read=(workspace,), write=(workspace,))
        subjects: dict[str, Callable[[], object]] = {"posix_spawn": spawn}

        def confined(sandbox: NativeSandbox) -> Callable[[], object]:
            program = Program(argv=[_PROGRAM], cwd=workspace)
            return lambda: sandbox.run(
                "bench", program, profile, workspace=workspace, shield=Shield()
            )

        for tier in Tier:
            if not found.tiers[tier]:
                sandbox = NativeSandbox(launcher, tier=tier, cgroups=cgroups)
                subjects[str(tier)] = confined(sandbox)
        bwrap = shutil.which("bwrap")
        if bwrap:
            subjects["bubblewrap"] = lambda: bubblewrap(bwrap)
        samples = interleave(subjects, chosen.rounds(400))
    base = statistics.median(samples["posix_spawn"])
    ratios = {name: round(statistics.median(times) / base, 2) for name, times in samples.items()}
    figures: dict[str, object] = {
        "cold_ratio": ratios.get("full"),
        "landlock_cold_ratio": ratios.get("landlock"),
        "bubblewrap_ratio": ratios.get("bubblewrap", "bubblewrap is not installed"),
        "missing_tiers": {str(tier): why for tier, why in found.tiers.items() if why},
    }
    details = {f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()}
    finish(__doc__ or "", figures, details, chosen)


if __name__ == "__main__":
    main()
