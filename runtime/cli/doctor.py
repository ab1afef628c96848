"""``safeconduct doctor``: what this machine can enforce, layer by layer, and how to get more."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safeconduct.call import Tier
from safeconduct.errors import Error, Exit

from .options import JsonOption
from .terminal import print_json, print_table, tell

if TYPE_CHECKING:
    from safeconduct.runtime.sandbox.cgroup import Cgroups
    from safeconduct.runtime.sandbox.machine import Machine

_KERNEL_MIN = (6, 1)
_USERNS_KNOBS = (
    ("user.max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("kernel.unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel.apparmor_restrict_unprivileged_userns",
        "1",
        "an AppArmor profile with `userns,` for the launcher, or "
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)
_TIER_HELP = {
    Tier.FULL: "allow user namespaces (see above), or start as root",
    Tier.LANDLOCK: "Linux 6.12 or newer with Landlock enabled",
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


def doctor(as_json: JsonOption = False) -> int:
    """Try every layer and say which are in force here.

    Exits with 0 where some tier is in force, 125 where nothing can be confined.
    """
    layers = _host()
    found, why = _survey()
    tier: Tier | None = None
    if found is None:
        get = "see the message; reinstall safeconduct, and install libseccomp2"
        layers.append(Layer(name="tier", available=False, used=False, note=why, get=get))
    else:
        tier = next((one for one in Tier if not found.tiers[one]), None)
        layers += _sandbox(found, tier)
    layers += _rest()
    if as_json:
        shown = [asdict(layer) for layer in layers]
        print_json({"tier": str(tier) if tier else None, "layers": shown})
    else:
        print_table(("layer", "available", "used", "note", "how to get it"), _rows(layers))
    if tier is None:
        tell("no tier is in force here: nothing can run", "see the column 'how to get it'")
        return Exit.FAILURE
    tell(f"tier {tier} is in force")
    return Exit.OK


def _rows(layers: list[Layer]) -> list[list[str]]:
    yes = {True: "yes", False: "no"}
    return [[one.name, yes[one.available], yes[one.used], one.note, one.get] for one in layers]


def _host() -> list[Layer]:
    release = platform.release()
    kernel = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    return [
        Layer(
            name="kernel",
            available=kernel >= _KERNEL_MIN,
            used=True,
            note=f"Linux {release}",
            get="" if kernel >= _KERNEL_MIN else "Linux 6.1 or newer",
        ),
        Layer(name="python", available=True, used=True, note=platform.python_version()),
        _user_namespaces(),
        _identity(),
        _launcher(),
        _seccomp(),
    ]


def _user_namespaces() -> Layer:
    name = "user namespaces"
    if os.geteuid() == 0:
        return Layer(name=name, available=True, used=True, note="started as root")
    for knob, closed, get in _USERNS_KNOBS:
        try:
            value = Path("/proc/sys", *knob.split(".")).read_text().strip()
        except OSError:
            continue  # the kernel does not know this knob
        if value == closed:
            return Layer(name=name, available=False, used=False, note=f"{knob} = {value}", get=get)
    return Layer(name=name, available=True, used=True, note="no setting forbids them")


def _identity() -> Layer:
    root = os.geteuid() == 0
    note = "root: a user id of its own for each sandbox" if root else "your own user id, mapped"
    get = "" if root else "start it as root"
    return Layer(name="separate user ids", available=root, used=root, note=note, get=get)


def _launcher() -> Layer:
    path = Path(__file__).parent.parent / "bin" / "safeconduct-launcher"
    there = os.access(path, os.X_OK)
    get = "" if there else "build it: make setup"
    note = "inside the package" if there else "missing"
    return Layer(name="launcher", available=there, used=there, note=note, get=get)


def _seccomp() -> Layer:
    name, get = "seccomp", "install libseccomp2"
    library = ctypes.util.find_library("seccomp")
    if library is None:
        return Layer(name=name, available=False, used=False, note="no libseccomp", get=get)
    try:
        ask = ctypes.CDLL(library).seccomp_version  # seccomp_version(3)
    except (OSError, AttributeError) as error:
        return Layer(name=name, available=False, used=False, note=str(error), get=get)
    ask.restype = ctypes.POINTER(_SeccompVersion)
    found: _SeccompVersion = ask().contents
    note = f"libseccomp {found.major}.{found.minor}.{found.micro}"
    return Layer(name=name, available=True, used=True, note=note)


def _survey() -> tuple[Machine | None, str]:
    """Try the tiers with the real launcher; without an answer say why there is none."""
    try:
        from safeconduct.runtime.sandbox import cgroup
        from safeconduct.runtime.sandbox.launcher import Launcher
        from safeconduct.runtime.sandbox.native import survey
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the runtime cannot be loaded: {error}"
    try:
        launcher = Launcher()
    except Error as error:
        return None, error.message
    except OSError as error:
        return None, f"the launcher cannot be started: {error.strerror}"
    try:
        return survey(launcher, cgroup.discover()), ""
    except Error as error:
        return None, error.message
    finally:
        launcher.close()


def _sandbox(found: Machine, used: Tier | None) -> list[Layer]:
    from safeconduct.runtime.sandbox.machine import LANDLOCK_ABI_ALONE

    abi = found.landlock_abi
    more = abi < LANDLOCK_ABI_ALONE
    layers = [
        Layer(
            name="landlock",
            available=abi > 0,
            used=abi > 0 and used is not None,
            note=f"ABI {abi}" + (f"; tier landlock needs {LANDLOCK_ABI_ALONE}" if more else ""),
            get="Linux 6.12 or newer, with landlock in the lsm= list of the kernel" if more else "",
        ),
        _cgroups(found.cgroups),
    ]
    for tier in Tier:
        why = found.tiers[tier]
        note = why or ("a trial program ran in it" if tier is used else "tried, not needed")
        get = _TIER_HELP[tier] if why else ""
        layers.append(
            Layer(name=f"tier {tier}", available=not why, used=tier is used, note=note, get=get)
        )
    return layers


def _cgroups(found: Cgroups | None) -> Layer:
    if found is None:
        return Layer(
            name="cgroups",
            available=False,
            used=False,
            note="none is delegated to this process: memory and pids hold per process",
            get="systemd-run --user --scope -p Delegate=yes COMMAND, or start as root",
        )
    controllers = ", ".join(sorted(found.bases))
    note = f"v{found.version}: {controllers}; limits hold for whole process trees"
    return Layer(name="cgroups", available=True, used=True, note=note)


def _rest() -> list[Layer]:
    from safeconduct.attestation.signer import ISOLATION

    return [
        _wasm(),
        Layer(
            name="signer",
            available=True,
            used=True,
            note=f"isolation: {ISOLATION}; its own process under your user id",
            get="a user id of its own for the signer is not in this version",
        ),
    ]


def _wasm() -> Layer:
    try:
        version = importlib.metadata.version("wasmtime")
    except importlib.metadata.PackageNotFoundError:
        get = "install safeconduct again"
        return Layer(name="wasm engine", available=False, used=False, note="no wasmtime", get=get)
    note = f"wasmtime {version}, in a worker inside a native sandbox"
    return Layer(name="wasm engine", available=True, used=True, note=note)
