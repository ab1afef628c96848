"""One call from the command line, as a person would try it."""

from __future__ import annotations

import os
from pathlib import Path

from safeconduct.errors import Exit

from .desk import command, execute, policy, process
from .registry import STOCK, USER_UID, check


@check(*STOCK, uids=(0,), scopes=("session",))
@check(*STOCK, uids=(USER_UID,), scopes=("delegated",))
def exec_runs_confines_and_records() -> None:
    """The program's own code, a denial; every layer named; the trace verifies."""
    Path("notes.txt").write_text("hello from the project")
    file = policy(require="tier: full, cgroup: true")
    probe = "cat notes.txt; id -u >mine; cat /root/x /etc/shadow 2>/dev/null; exit 7"
    done = execute(file, "sh", "-c", probe, by=process)
    assert (done.code, done.out) == (7, "hello from the project"), done
    assert Path("mine").read_text().strip() not in ("", "0")
    assert Path("mine").stat().st_uid == os.geteuid(), "files made inside belong to the owner"
    layers = done.outcome["confinement"]["layers"]
    assert {"cgroup-v2", "seccomp", "user-ns", "pid-ns", "mount-ns", "net-ns"} <= set(layers), (
        layers
    )
    assert ("own-uid" in layers) is (os.geteuid() == 0), layers
    assert done.outcome["confinement"]["held"]["memory"] == "tree"
    assert done.outcome["usage"]["peak_memory_bytes"] > 0
    assert execute(file, "rm", "-r", "/").code == Exit.DENIED
    trace = command("trace", "ls", "--json").json[0]["name"]
    key = command("keys", "show").out.strip()
    verified = command("trace", "verify", trace, "--key", key)
    assert verified.code == Exit.OK, verified
