"""How long does a whole mediated call take (judge, record, confine, run), next to posix_spawn?

The path is the real one: ``Runtime.call`` with its launcher, its signer and a trace on disk. Before
each call, untimed, all sandboxes have come to rest.

call_ratio   `shell.run` of /usr/bin/true: judged, intent and decision recorded (volatile: it is a
             local tool), started in a waiting sandbox, outcome recorded; over posix_spawn with
             output captured by pipes and waited for
fs_read_us   `fs.read` of a small file, which needs no sandbox
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from safeconduct import Runtime

from .harness import Measured, Options, columns, interleave, spread
from .subject import rest, spawn

_POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/src/**"], net: none}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  shell.run: {allow: {argv: [/usr/bin/true]}}
"""


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
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
                before=rest,
            )
            facts = {
                "tier": str(runtime.confinement.tier),
                "layers": " ".join(runtime.confinement.layers),
            }
    base = statistics.median(samples["posix_spawn"])
    return Measured(
        figures={
            "call_ratio": round(statistics.median(samples["shell.run"]) / base, 2),
            "fs_read_us": round(statistics.median(samples["fs.read"]) * 1e6, 1),
        },
        details={f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()},
        facts=facts,
    )


if __name__ == "__main__":
    columns(__doc__, measure)
