"""What `policy explain` says of each limit: its value, and what holds it on which machine.

The words are those of ``call.Held``; what a call got in fact stands in its Outcome. The rules are
those of runtime/sandbox/bounds.py, said without trying the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safeconduct.call import LIMIT_FIELDS, Engine, Limits, Profile, WorkspaceMode

_NATIVE: Mapping[str, str] = {
    "wall": "tree (a clock in the sandbox)",
    "cpu": "polled; without a cgroup process (an rlimit)",
    "idle": "polled; without a cgroup none",
    "memory": "tree (a cgroup); without one process (an rlimit)",
    "pids": "tree; in tier landlock without a cgroup process (an rlimit)",
    "files": "process (an rlimit)",
    "disk": "tree (file systems of its own); in tier landlock polled",
    "inodes": "tree (file systems of its own); in tier landlock polled",
    "depth": "none: nothing is written directly",
    "file": "process (an rlimit)",
    "output": "tree (the rest is dropped)",
}
# Folders on the host that are written without an overlay.
_DIRECT: Mapping[str, str] = {
    "disk": "polled in folders written directly; tree in /tmp, in tier landlock polled too",
    "inodes": "polled in folders written directly; tree in /tmp, in tier landlock polled too",
    "depth": "polled in folders written directly",
}
_WASM: Mapping[str, str] = {
    "wall": "tree (the engine's clock)",
    "cpu": "tree (the engine's clock)",
    "memory": "tree (the engine)",
    "fuel": "tree (the engine counts instructions)",
}


def limit_lines(profile: Profile) -> Iterator[str]:
    """Yield a line for each limit that means something to the engine of ``profile``."""
    held = _WASM if profile.engine is Engine.WASM else _NATIVE
    direct = profile.write and profile.workspace is WorkspaceMode.DIRECT
    if direct and profile.engine is Engine.NATIVE:
        held = {**held, **_DIRECT}
    for name, how in held.items():
        yield f"{name:<7} {_value(profile.limits, name):<10} {how}"


def _value(limits: Limits, name: str) -> str:
    field = LIMIT_FIELDS[name]
    value: int | None = getattr(limits, field)
    if value is None:
        return "as disk" if name == "file" else "none"
    if field.endswith("_ms"):
        return f"{value} ms"
    if field.endswith("_bytes"):
        return f"{value >> 20} MiB" if value % (1 << 20) == 0 else f"{value >> 10} KiB"
    return str(value)
