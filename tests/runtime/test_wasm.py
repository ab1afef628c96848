"""Step "sandbox": Wasm calls through the real launcher and worker, and what must not work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime

from safeconduct.call import Held, Limits, Outcome, Profile, Tier
from safeconduct.errors import LimitExceeded, SandboxFailed, SandboxUnavailable, ToolFailed
from safeconduct.runtime.sandbox import cgroup, wasm, wasm_worker
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield
from safeconduct.runtime.sandbox.survey import survey
from safeconduct.runtime.sandbox.wasm import WasmEngine
from safeconduct.runtime.sandbox.wasm_worker import Inventory, Refusal

_VECTORS = Path(__file__).parents[1] / "vectors" / "wasm"
_HUGE_FUEL = 1 << 60
_EMPTY = b"\0asm\1\0\0\0"


@pytest.fixture(scope="module")
def wasm_launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module", params=list(Tier))
def sandbox(request: pytest.FixtureRequest, wasm_launcher: Launcher) -> Iterator[NativeSandbox]:
    tier = Tier(request.param)
    if missing := survey(wasm_launcher, None).tiers[tier]:
        pytest.skip(f"tier {tier}: {missing}")
    cgroups = cgroup.discover()
    sandbox = NativeSandbox(wasm_launcher, tier=tier, cgroups=cgroups)
    engine = WasmEngine(sandbox)
    try:
        call(engine, "arithmetic", "nothing")
    except SandboxUnavailable as error:
        if tier is Tier.FULL or os.geteuid() != 0:
            raise
        # Root gives the worker another user's view, which may not reach root's own Python.
        pytest.skip(f"tier {tier}: {error.message}")
    finally:
        engine.close()
    yield sandbox
    if cgroups:
        cgroups.close()


@pytest.fixture(scope="module")
def engine(sandbox: NativeSandbox) -> Iterator[WasmEngine]:
    engine = WasmEngine(sandbox)
    yield engine
    engine.close()


def assemble(name: str) -> bytes:
    # Threads are off in our engine only, so the assembler takes every vector.
    return bytes(wasmtime.wat2wasm((_VECTORS / f"{name}.wat").read_text()))


def call(
    engine: WasmEngine,
    name: str,
    function: str = "run",
    *arguments: int | float,
    limits: Limits | None = None,
) -> Outcome:
    profile = Profile(name="test", limits=limits or Limits(wall_ms=10_000))
    return engine.run(
        "call-1", module=assemble(name), function=function, arguments=arguments, profile=profile
    )


@pytest.mark.parametrize(
    ("function", "arguments", "value"),
    [
        ("add", (2, 3), [5]),
        ("add", (0xFFFF_FFFF, 0), [-1]),
        ("factorial", (20,), [2432902008176640000]),
        ("factorial", (21,), [-4249290049419214848]),
        ("half", (3,), [1.5]),
        ("half", (1e-320,), [5e-321]),
        ("special", (), ["NaN", "-Infinity", 1.5]),
        ("nothing", (), []),
    ],
)
def test_returns_numbers(
    engine: WasmEngine, function: str, arguments: tuple[int | float, ...], value: list[object]
) -> None:
    outcome = call(engine, "arithmetic", function, *arguments)
    assert outcome.value == value
    assert outcome.ok


def test_says_what_held_and_what_was_used(engine: WasmEngine, sandbox: NativeSandbox) -> None:
    outcome = call(engine, "arithmetic", "factorial", 20)
    again = call(engine, "arithmetic", "factorial", 20)
    assert outcome.confinement.tier is sandbox.tier
    assert {"seccomp", "wasm-fuel", "wasm-epoch", "wasm-memory"} <= {*outcome.confinement.layers}
    assert outcome.confinement.held["fuel"] is Held.TREE
    assert outcome.usage.fuel == again.usage.fuel
    assert outcome.usage.fuel is not None
    assert 100 < outcome.usage.fuel < 1000


def test_fuel_ends_a_loop(engine: WasmEngine) -> None:
    with pytest.raises(LimitExceeded, match="its 1000 units") as caught:
        call(engine, "endless", limits=Limits(fuel=1000))
    assert caught.value.code == "limit.fuel"


@pytest.mark.parametrize(
    ("limit", "limits"),
    [
        ("wall", Limits(wall_ms=100, fuel=_HUGE_FUEL)),
        ("cpu", Limits(wall_ms=10_000, cpu_ms=100, fuel=_HUGE_FUEL)),
    ],
)
def test_deadlines_end_a_loop_and_the_worker_lives_on(
    engine: WasmEngine, limit: str, limits: Limits
) -> None:
    with pytest.raises(LimitExceeded, match="interrupted") as caught:
        call(engine, "endless", limits=limits)
    assert caught.value.limit == limit
    assert call(engine, "arithmetic", "add", 1, 1).value == [2]


def test_memory_is_refused_to_the_guest(engine: WasmEngine) -> None:
    limits = Limits(memory_bytes=4 << 20)
    assert call(engine, "memory", "grow", 63, limits=limits).value == [1]
    assert call(engine, "memory", "grow", 64, limits=limits).value == [-1]


def test_each_call_gets_a_fresh_instance(engine: WasmEngine) -> None:
    assert [call(engine, "memory", "count").value for _ in range(2)] == [[1], [1]]


@pytest.mark.parametrize("name", ["memory_huge", "table_huge"])
def test_a_module_that_starts_too_large_is_refused(engine: WasmEngine, name: str) -> None:
    with pytest.raises(LimitExceeded) as caught:
        call(engine, name)
    assert caught.value.limit == "memory"


@pytest.mark.parametrize("function", ["unreachable", "divide", "bounds", "stack"])
def test_a_trap_is_the_tools_failure(engine: WasmEngine, function: str) -> None:
    with pytest.raises(ToolFailed) as caught:
        call(engine, "traps", function)
    assert caught.value.code == "wasm.trap"


@pytest.mark.parametrize(
    ("name", "function", "arguments", "code"),
    [
        ("trap_at_start", "run", (), "wasm.trap"),
        ("imports", "run", (), "wasm.import"),
        ("shared_wait", "run", (), "wasm.invalid"),
        ("arithmetic", "missing", (), "wasm.export"),
        ("arithmetic", "missing\ud800", (), "wasm.export"),
        ("arithmetic", "x" * 2000, (), "wasm.export"),
        ("arithmetic", "add", (1,), "wasm.export"),
        ("arithmetic", "add", (1, 2, 3), "wasm.export"),
        ("arithmetic", "add", (1, 2.5), "wasm.export"),
        ("arithmetic", "add", (1, True), "wasm.export"),
        ("arithmetic", "add", (1, 1 << 32), "wasm.export"),
        ("arithmetic", "add", (1, 1 << 64), "wasm.export"),
        ("arithmetic", "half", (float("nan"),), "wasm.export"),
        ("arithmetic", "add", (1,) * 1001, "wasm.export"),
        # wasmtime's C API aborts the process when asked for such a type.
        ("arithmetic", "vector", (), "wasm.export"),
    ],
)
def test_what_cannot_be_called_is_refused(
    engine: WasmEngine, name: str, function: str, arguments: tuple[int | float, ...], code: str
) -> None:
    with pytest.raises(ToolFailed) as caught:
        call(engine, name, function, *arguments)
    assert caught.value.code == code
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (b"", "wasm.invalid"),
        (b'(module (func (export "run")))', "wasm.invalid"),  # the text format is no module
        (b"\0asm\x0d\0\1\0", "wasm.invalid"),  # a component
        (_EMPTY + b"\1\xff\xff\xff\xff\x0f", "wasm.invalid"),  # a section of 4 GiB
        (_EMPTY + b"\1\5\xff\xff\xff\xff\x0f", "wasm.too_large"),  # 4 billion types
        (_EMPTY + b"\1" + b"\x80" * 20, "wasm.invalid"),  # a number without end
        (_EMPTY + b"\1\4\1\x60\0\0" * 2, "wasm.invalid"),  # a section twice
        (_EMPTY + b"\0\1\0" * 1001, "wasm.too_large"),  # too many sections
        (_EMPTY + b"\7\5\1\1f\0\0", "wasm.invalid"),  # exports a function it has not
        (bytes((8 << 20) + 1), "wasm.too_large"),
    ],
)
def test_invalid_bytes_are_refused(engine: WasmEngine, module: bytes, code: str) -> None:
    profile = Profile(name="test")
    with pytest.raises(ToolFailed) as caught:
        engine.run("call-1", module=module, function="run", arguments=(), profile=profile)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "body",
    [
        b"\1\xd1\x0f\x7f\x0b",  # 2,001 locals
        b"\0" + b"\1" * (256 << 10) + b"\x0b",  # 256 KiB of code
    ],
)
def test_what_compiles_too_long_is_refused_before(body: bytes) -> None:
    section = b"\1" + _leb128(len(body)) + body
    with pytest.raises(Refusal) as caught:
        Inventory(_EMPTY + b"\x0a" + _leb128(len(section)) + section)
    assert caught.value.code == "wasm.too_large"


def test_a_killed_worker_fails_the_call_and_the_next_works(sandbox: NativeSandbox) -> None:
    before = _workers()
    engine = WasmEngine(sandbox)
    try:
        call(engine, "arithmetic", "nothing")
        (worker,) = _workers() - before
        killer = threading.Timer(0.2, os.kill, (worker, signal.SIGKILL))
        killer.start()
        with pytest.raises(SandboxFailed):
            call(engine, "endless", limits=Limits(fuel=_HUGE_FUEL))
        killer.join()
        assert call(engine, "arithmetic", "add", 1, 1).value == [2]
        (second,) = _workers() - before
        os.kill(second, signal.SIGKILL)
    finally:
        engine.close()
    assert _workers() == before
    with pytest.raises(SandboxFailed):
        call(engine, "arithmetic", "nothing")


def test_a_stopped_worker_is_killed_at_the_wall_limit(sandbox: NativeSandbox) -> None:
    before = _workers()
    engine = WasmEngine(sandbox)
    try:
        call(engine, "arithmetic", "nothing")
        (worker,) = _workers() - before
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(LimitExceeded, match="killed"):
            call(engine, "arithmetic", "nothing", limits=Limits(wall_ms=100))
        assert _workers() == before
        assert call(engine, "arithmetic", "add", 1, 1).value == [2]
    finally:
        engine.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff\xff\xff\xff",  # a frame of 4 GiB
        b"\2\0\0\0{}",
        b"\5\0\0\0\x80\x02K\x01.",  # a pickle
        wasm_worker.frame(wasm_worker.Ready(version=1)),
        wasm_worker.frame(wasm_worker.Done(number=2, values=[], fuel=0, cpu_ms=0)),
        wasm_worker.frame(wasm_worker.Done(number=1, values=[], fuel=_HUGE_FUEL, cpu_ms=0)),
        wasm_worker.frame(wasm_worker.Done(number=1, values=[1 << 63], fuel=0, cpu_ms=0)),
        wasm_worker.frame(wasm_worker.Done(number=1, values=[0] * 1001, fuel=0, cpu_ms=0)),
        b"",  # says nothing and ends
    ],
)
def test_a_hostile_worker_is_not_believed(
    sandbox: NativeSandbox, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = wasm_worker.frame(wasm_worker.Ready(version=1))
    liar = f"import os\nos.write(1, {ready!r})\nos.read(0, 1 << 20)\nos.write(1, {reply!r})\n"
    monkeypatch.setattr(wasm, "interpreter", lambda: [*_PYTHON, "-c", liar])
    engine = WasmEngine(sandbox)
    try:
        with pytest.raises(SandboxFailed):
            call(engine, "arithmetic", "nothing")
    finally:
        engine.close()


_PYTHON = wasm.interpreter()
_PROBE = """
import os, socket, sys
def attempt(name, act):
    try:
        act()
    except OSError as error:
        print(name, "refused", error.errno)
    else:
        print(name, "reached")
attempt("secret", lambda: open(sys.argv[1]).read())
attempt("network", lambda: socket.socket(socket.AF_INET))
attempt("package", lambda: open(sys.argv[2]).read())
attempt("write", lambda: open(sys.argv[3], "a"))
print("environment", "SAFECONDUCT_TEST_SECRET" in os.environ)
"""


def test_the_worker_sees_no_secret(
    sandbox: NativeSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack with the worker's own native profile; outside, the same attacks work."""
    monkeypatch.setenv("SAFECONDUCT_TEST_SECRET", "1")
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    script = os.path.realpath(wasm_worker.__file__)
    argv = [*_PYTHON, "-c", _PROBE, str(secret), os.path.realpath(pytest.__file__), script]
    outside = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for name in ("secret reached", "network reached", "package reached", "environment True"):
        assert name in outside
    outcome = sandbox.run(
        "call-1",
        Program(argv=argv, cwd="/usr"),
        wasm.worker_profile(64 << 20),
        workspace=os.path.realpath(sys.base_prefix),
        shield=Shield(),
    )
    lines = outcome.stdout.decode().splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["secret", "refused"], ["network", "refused"], ["package", "refused"], ["write", "refused"],
    ]  # fmt: skip
    assert lines[4] == "environment False"
    assert secret.read_text() == "x"


def test_the_supervisor_does_not_load_wasmtime() -> None:
    code = (
        "import sys, safeconduct.runtime.sandbox.wasm as w; w.worker_profile(1); "
        "sys.exit('wasmtime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _workers() -> set[int]:
    """Find the workers that run below this process, by what they were started with."""
    found: set[int] = set()
    script = os.path.realpath(wasm_worker.__file__).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            lines = (folder / "status").read_text().splitlines()
        except OSError:
            continue
        dead = any(line.startswith("State:\tZ") for line in lines)
        if script in argv and not dead and _ours(int(folder.name)):
            found.add(int(folder.name))
    return found


def _ours(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        pid = int(fields[1])
    return pid == os.getpid()


def _leb128(number: int) -> bytes:
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])
