"""What ``doctor`` says of each layer: available, used, why not, how to get it."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safeconduct.call import Limits, Tier
from safeconduct.errors import Error
from safeconduct.runtime.places import Places
from safeconduct.runtime.sandbox import causes, delegation, executable, share, shortfall
from safeconduct.runtime.sandbox.causes import Cause
from safeconduct.runtime.sandbox.interpreter import interpreter
from safeconduct.runtime.sandbox.machine import LANDLOCK_ABI_ALONE

if TYPE_CHECKING:
    from safeconduct.runtime.sandbox.cgroup import Cgroups
    from safeconduct.runtime.sandbox.facts import Facts
    from safeconduct.runtime.sandbox.machine import Machine

_KERNEL_MIN = (6, 1)
# What each namespace keeps from a program; the order is that of the table.
_NAMESPACES = {
    "mount": "sees only the files it is granted",
    "pid": "sees and signals no process outside; the whole tree dies",
    "net": "has no network",
    "ipc": "shares no System V memory",
    "uts": "cannot rename the machine",
    "cgroup": "does not see the cgroups around",
}


class _SeccompVersion(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. ``available`` here, ``used`` by a run without options; ``note`` says more."""

    name: str
    available: bool
    used: bool
    note: str = ""
    get: str = ""


def _layer(name: str, cause: Cause | None, *, used: bool, note: str = "") -> Layer:
    if cause is None:
        return Layer(name=name, available=True, used=used, note=note)
    return Layer(name=name, available=False, used=False, note=cause.note, get=cause.get)


def layers(facts: Facts, machine: Machine | None, tier: Tier | None, why: str) -> list[Layer]:
    """Return every layer. Without a ``machine``, ``why`` says what kept the tiers from a trial."""
    full = tier is Tier.FULL
    found = [_kernel(), _python(), _around(facts), _launcher(machine is not None, why)]
    found += _namespaces(facts, full=full)
    ids = "each sandbox of root has a user id of its own"
    own_ids = causes.own_ids(facts)
    found += [
        _layer("separate user ids", own_ids, used=own_ids is None and tier is not None, note=ids),
        _layer(
            "id-mapped mounts",
            causes.mapped_mounts(facts),
            used=full and own_ids is None,
            note="tried on this folder: show it to such a user id",
        ),
        _landlock(facts, used=tier is not None),
        _seccomp(facts, used=tier is not None),
        _cgroups(machine.cgroups if machine else None),
    ]
    if machine is not None:
        found += [_tier(facts, machine, one, used=one is tier) for one in Tier]
    else:
        get = "see the row launcher" if executable.trouble(executable.launcher_path()) else ""
        lost = Cause(note=why, get=get or "see the message; install libseccomp2")
        found.append(_layer("tier", lost, used=False))
    return [*found, _wasm(used=tier is not None), _signer(), *_folders()]


def _kernel() -> Layer:
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    note = f"Linux {release}"
    old = Cause(note=note, get="Linux 6.1 or newer") if version < _KERNEL_MIN else None
    return _layer("kernel", old, used=True, note=note)


def _python() -> Layer:
    note, get = platform.python_version(), ""
    closed = shortfall.closed_above(interpreter()[0]) if os.geteuid() == 0 else ""
    if closed:
        note += f"; below {closed}, so tier landlock started by root cannot run it"
        get = "a Python in a folder that every user may enter, for that tier"
    return Layer(name="python", available=True, used=True, note=note, get=get)


def _around(facts: Facts) -> Layer:
    around = facts.around
    seen = [
        text
        for text, there in (
            ("a safeconduct sandbox", around.ours),
            (f"signs of a container ({around.container})", bool(around.container)),
            ("a user namespace", not around.ids_mapped),
            ("a seccomp filter", around.seccomp_filter),
            ("a masked /proc", bool(around.proc_masked) and not facts.trial("proc").ok),
            ("no_new_privs", around.no_new_privileges),
            (f"the AppArmor profile {around.apparmor}", bool(around.apparmor)),
            (
                "root without CAP_SYS_ADMIN",
                facts.root and "CAP_SYS_ADMIN" not in facts.capabilities,
            ),
        )
        if there
    ]
    note = ", ".join(seen) if seen else "nothing is around this process"
    return Layer(name="surroundings", available=True, used=False, note=note)


def _launcher(starts: bool, why: str) -> Layer:
    path = executable.launcher_path()
    cause = executable.trouble(path)
    if cause is None and not starts:
        cause = Cause(note=why, get="install safeconduct again (from a checkout: make setup)")
    return _layer("launcher", cause, used=True, note=f"starts, of this version: {path}")


def _namespaces(facts: Facts, *, full: bool) -> Iterator[Layer]:
    def layer(name: str, cause: Cause | None, note: str) -> Layer:
        if full and cause is not None:
            # A profile of AppArmor may name the launcher, which this interpreter is not.
            cause, note = None, f"{note} (the launcher may use them, other programs may not)"
        return _layer(name, cause, used=full, note=note)

    user = causes.user_namespaces(facts)
    if user is not None:
        user = causes.without_admin(facts, user)
    yield layer("user namespaces", user, "a program has no right outside its own")
    for kind, note in _NAMESPACES.items():
        yield layer(f"{kind} namespaces", causes.namespace(facts, kind), f"a program {note}")
    yield layer("tmpfs", causes.mounts(facts, "tmpfs"), "private root and /tmp")
    yield layer("fresh /proc", causes.mounts(facts, "proc"), "a program sees its own processes")
    time = "not used: clocks are no secret"
    yield _layer("time namespaces", causes.namespace(facts, "time"), used=False, note=time)
    overlay = "for workspaces of kind overlay"
    yield _layer("overlayfs", causes.mounts(facts, "overlay"), used=False, note=overlay)


def _landlock(facts: Facts, *, used: bool) -> Layer:
    cause = causes.landlock(facts)
    if cause is not None:
        return _layer("landlock", cause, used=False)
    abi = facts.landlock_abi
    lacks = causes.landlock_lacks(abi)
    note = f"ABI {abi}" + (f", lacks: {lacks}" if lacks else "")
    short = abi < LANDLOCK_ABI_ALONE
    get = f"Linux 6.12 for tier landlock (ABI {LANDLOCK_ABI_ALONE})" if short else ""
    return Layer(name="landlock", available=True, used=used, note=note, get=get)


def _seccomp(facts: Facts, *, used: bool) -> Layer:
    cause = causes.seccomp(facts)
    if cause is not None:
        return _layer("seccomp", cause, used=False)
    name, get = "seccomp", "install libseccomp 2.5 or newer (Debian, Ubuntu: libseccomp2)"
    library = ctypes.util.find_library("seccomp")
    if library is None:
        return _layer(name, Cause(note="no libseccomp", get=get), used=False)
    try:
        ask: Callable[[], object] = ctypes.CDLL(library).seccomp_version  # seccomp_version(3)
    except (OSError, AttributeError) as error:
        return _layer(name, Cause(note=str(error), get=get), used=False)
    ask.restype = ctypes.POINTER(_SeccompVersion)  # type: ignore[attr-defined]
    found: _SeccompVersion = ask().contents  # type: ignore[attr-defined]
    note = f"a filter held; libseccomp {found.major}.{found.minor}.{found.micro}"
    return _layer(name, None, used=used, note=note)


def _cgroups(found: Cgroups | None) -> Layer:
    weaker = "; until then memory, and in tier landlock pids, hold per process, and what puts a "
    weaker += f"long call behind others is {share.means(None)}"
    if found is None:
        cause = delegation.why_none()
        return _layer("cgroups", Cause(note=cause.note + weaker, get=cause.get), used=False)
    controllers = ", ".join(sorted(found.bases))
    try:
        found.retire(found.make(Limits()))
    except Error as error:
        cause = Cause(note=error.message + weaker, get="let this process write its own cgroup")
        return _layer("cgroups", cause, used=False)
    note = f"v{found.version}: {controllers}; limits hold for whole process trees"
    note += f"; what puts a long call behind others: {share.means(found)}"
    return _layer("cgroups", None, used=True, note=note)


def _tier(facts: Facts, machine: Machine, tier: Tier, *, used: bool) -> Layer:
    why = machine.tiers[tier]
    name = f"tier {tier}"
    if not why:
        note = "a trial program ran in it" if used else "tried, not needed"
        return _layer(name, None, used=used, note=note)
    cause = _tier_cause(facts, tier)
    if cause is None:
        get = "please report this with the output of: safeconduct doctor --json"
        return _layer(name, Cause(note=why, get=get), used=False)
    return _layer(name, cause, used=False)


def _tier_cause(facts: Facts, tier: Tier) -> Cause | None:
    """Return the first layer that a tier needs and that is missing."""
    found = [causes.seccomp(facts), causes.landlock(facts)]
    if tier is Tier.FULL:
        user = causes.user_namespaces(facts)
        found.append(user if user is None else causes.without_admin(facts, user))
        found += [causes.namespace(facts, kind) for kind in _NAMESPACES]
        found += [causes.mounts(facts, name) for name in ("root", "tmpfs", "proc")]
    elif 0 < facts.landlock_abi < LANDLOCK_ABI_ALONE:
        note = f"Landlock ABI {facts.landlock_abi}, and ABI {LANDLOCK_ABI_ALONE} is needed"
        found.append(Cause(note=note, get="Linux 6.12 or newer"))
    if facts.root and not facts.around.ids_mapped:
        note = "root of a user namespace, which may not become anybody else"
        found.append(Cause(note=note, get="start it there as an ordinary user"))
    return next((cause for cause in found if cause is not None), None)


def _wasm(*, used: bool) -> Layer:
    name = "wasm engine"
    try:
        version = importlib.metadata.version("wasmtime")
    except importlib.metadata.PackageNotFoundError:
        cause = Cause(note="no wasmtime", get="install safeconduct again")
        return _layer(name, cause, used=False)
    return _layer(
        name, None, used=used, note=f"wasmtime {version}, in a worker inside a native sandbox"
    )


def _signer() -> Layer:
    from safeconduct.attestation.signing.signer import ISOLATION, ISOLATION_USER
    from safeconduct.runtime.signing import has_own_user

    if has_own_user(os.environ):
        note = f"isolation: {ISOLATION_USER}; its own process under a user id of its own"
        return Layer(name="signer", available=True, used=True, note=note, get="")
    return Layer(
        name="signer",
        available=True,
        used=True,
        note=f"isolation: {ISOLATION}; its own process under your user id",
        get="a user id of its own, for ordinary users: safeconduct setup",
    )


def _folders() -> Iterator[Layer]:
    state = Places.of(os.environ).state
    name, note = "state folder", f"keys and traces: {state}"
    above = next(one for one in (state, *state.parents) if one.exists())
    closed = Cause(
        note=f"{above} cannot be written by this user",
        get="set XDG_STATE_HOME to a folder of your own, outside every workspace",
    )
    yield _layer(
        name, None if os.access(above, os.W_OK | os.X_OK) else closed, used=True, note=note
    )
    scratch = Path(tempfile.gettempdir())
    note = f"{scratch}"
    if os.statvfs(scratch).f_flag & os.ST_NOEXEC:
        note += "; mounted noexec: in tier landlock nothing that a program builds there runs"
    yield Layer(name="temporary folder", available=True, used=True, note=note)
