"""How long does a whole mediated call take (judge, record, confine, run), next to posix_spawn?

The path is the real one: ``Runtime.call`` with its launcher, its signer and a trace on disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from safeconduct import Runtime

from .bench_start import spawn
from .harness import finish, interleave, options, spread

_POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/src/**"], net: none}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  shell.run: {allow: {argv: [/usr/bin/true]}}
"""


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder, "workspace")
        (workspace / "src").mkdir(parents=True)
        (workspace / "file.txt").write_text("x")
        policy = Path(folder, "policy.yaml")
        policy.write_text(_POLICY)
        environment = {**os.environ, "XDG_STATE_HOME": f"{folder}/state"}
        with Runtime.from_policy(policy, workspace=workspace, environment=environment) as runtime:
            samples = interleave(
                {
                    "posix_spawn": spawn,
                    "shell.run": lambda: runtime.call("shell.run", argv=["/usr/bin/true"]),
                    "fs.read": lambda: runtime.call("fs.read", path="file.txt"),
                },
                chosen.rounds(400),
            )
            tier = str(runtime.confinement.tier)
    base = statistics.median(samples["posix_spawn"])
    figures: dict[str, object] = {
        "call_ratio": round(statistics.median(samples["shell.run"]) / base, 2),
        "fs_read_us": round(statistics.median(samples["fs.read"]) * 1e6, 1),
        "tier": tier,
    }
    details = {f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()}
    finish(__doc__ or "", figures, details, chosen)


if __name__ == "__main__":
    main()
