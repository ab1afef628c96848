"""One test machine: a stock kernel under QEMU's software emulation, this machine's root inside.

The kernel comes from scripts/vm-packages.sh. The initramfs holds a static busybox, the modules and
`inside/init`; the root is this machine's own, read-only over 9p under a tmpfs, so the checkout and
its .venv are found at their own paths. Results come over the second serial line.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
KERNELS = CHECKOUT / "build" / "vm"
QEMU = "qemu-system-x86_64"
BUSYBOX = "/bin/busybox"
_INSIDE = Path(__file__).parent / "inside"
_MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay", "crc32c_generic", "ext4")
# -1: a panic ends QEMU at once. The rest is about speed and a readable console.
_APPEND = "console=ttyS0 panic=-1 quiet loglevel=5 mitigations=off nokaslr tsc=reliable"
_DISK_BYTES = 1 << 30
# LIMIT: seconds for one machine, from power on to power off.
_SECONDS = 900
_FOLDER, _FILE, _DEVICE = 0o40755, 0o100755, 0o20600


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """A machine to start: which of the kernels, and what its command line adds."""

    name: str
    kernel: str
    append: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out of a machine: its facts, each check's detail (empty is good), its console."""

    facts: dict[str, object] = field(default_factory=dict[str, object])
    details: dict[str, str] = field(default_factory=dict[str, str])
    ended: bool = False
    console: str = ""
    seconds: float = 0.0


def missing(kernels: Iterable[str]) -> str:
    """Say what this machine lacks to start a test machine; empty where nothing."""
    lacking = [name for name in (QEMU, BUSYBOX, "mke2fs") if _find(name) is None]
    lacking += [f"kernel {name}" for name in kernels if not (KERNELS / name / ".ready").exists()]
    return f"needs {', '.join(lacking)}: scripts/vm-packages.sh gets it" if lacking else ""


def start(boot: Boot, folder: Path) -> Report:
    """Run one machine to its end and read what it told; ``folder`` keeps its files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    initramfs, disk, results = folder / "initramfs", folder / "disk", folder / "results"
    console = folder / "console"
    kernel = KERNELS / boot.kernel
    initramfs.write_bytes(_pack(kernel, ["/bin/sh", str(_INSIDE / "start.sh"), *_start(boot)]))
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run([str(_find("mke2fs")), "-q", "-t", "ext4", "-F", str(disk)], check=True)
    results.touch()
    (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
    options = {
        "-machine": "pc",
        "-accel": "tcg,thread=multi",
        "-cpu": "max",
        "-smp": "2",
        "-m": "2048",
        "-display": "none",
        "-kernel": str(vmlinuz),
        "-initrd": str(initramfs),
        "-append": f"{_APPEND} {boot.append}",
        "-virtfs": "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-drive": f"file={disk},if=virtio,format=raw,cache=unsafe",
    }
    words = [word for pair in options.items() for word in pair]
    serial = ["-serial", f"file:{console}", "-serial", f"file:{results}"]
    begun = time.monotonic()
    said = _watch([QEMU, "-nodefaults", "-no-user-config", "-no-reboot", *words, *serial])
    disk.unlink()
    text = console.read_text(errors="replace") if console.exists() else ""
    return _report(results.read_text(errors="replace"), text + said, time.monotonic() - begun)


def _start(boot: Boot) -> Sequence[str]:
    return [sys.executable, str(CHECKOUT), boot.name]


def _watch(argv: Sequence[str]) -> str:
    """Run QEMU; return what it says itself, and that it was ended where it had to be."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as machine:
        try:
            _, said = machine.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            machine.kill()
            _, said = machine.communicate()
            said += f"\nthe machine did not end within {_SECONDS} s".encode()
        except BaseException:
            machine.kill()
            raise
    return said.decode(errors="replace")


def _report(results: str, console: str, seconds: float) -> Report:
    facts: dict[str, object] = {}
    details: dict[str, str] = {}
    ended = False
    for line in results.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            console += f"\nunreadable result: {line}"
            continue
        facts.update(event.get("facts", {}))
        if "check" in event:
            details[event["check"]] = event["detail"]
            console += f"\n{event['seconds']:6.1f} s  {event['check']}"
        ended = ended or "end" in event
    return Report(facts=facts, details=details, ended=ended, console=console, seconds=seconds)


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.defpath, "/usr/sbin", "/sbin"]))


def _pack(kernel: Path, command: Sequence[str]) -> bytes:
    """Return an initramfs: what `inside/init` needs until the root is up."""
    files = [_entry(name, _FOLDER) for name in ("bin", "modules", "proc", "sys", "dev")]
    files += [_entry(name, _FOLDER) for name in ("host", "upper", "root")]
    files.append(_entry("dev/console", _DEVICE, device=(5, 1)))
    files.append(_entry("bin/busybox", _FILE, Path(BUSYBOX).read_bytes()))
    files.append(_entry("init", _FILE, (_INSIDE / "init").read_bytes()))
    names: list[str] = []
    for module in _modules(kernel):
        data = module.read_bytes()
        names.append(module.name.removesuffix(".xz"))
        plain = lzma.decompress(data) if module.suffix == ".xz" else data
        files.append(_entry(f"modules/{names[-1]}", _FILE, plain))
    files.append(_entry("modules/order", _FILE, "".join(f"{name}\n" for name in names).encode()))
    files.append(_entry("command", _FILE, "\n".join(command).encode()))
    files.append(_entry("TRAILER!!!", 0))
    return b"".join(files)


def _entry(name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> bytes:
    """Encode one file of a cpio archive of the format "newc", cpio(5)."""
    path = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _modules(kernel: Path) -> list[Path]:
    """List the modules in the order of loading: each after those it needs."""
    release = (kernel / ".ready").read_text().strip()
    folder = kernel / "lib" / "modules" / release
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.split(".")[0]: path for path in needs}
    order: list[str] = []
    # What is built in has no file: nothing to load.
    waiting = [by_name[name] for name in reversed(_MODULES) if name in by_name]
    while waiting:
        path = waiting[-1]
        open_needs = [need for need in needs[path] if need not in order]
        if open_needs:
            waiting += open_needs
            continue
        waiting.pop()
        if path not in order:
            order.append(path)
    return [folder / path for path in order]
