"""Step "sandbox": the worker process that runs Wasm modules, itself inside a native sandbox.

``wasm.py`` starts this file as a script, one process per session, and imports the frames from
it. The worker holds no key, no network and no workspace. It trusts its requests; its modules are
hostile, so they are counted before they are compiled. Whatever is not foreseen here ends the
process, which the supervisor reports as a failed sandbox.

It is one file, longer than others, because the sandbox is granted this file and no other of ours.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast


def admit(folders: Sequence[str]) -> None:
    """Load the named package folders and nothing beside them.

    The folder they are installed in is not granted, so it cannot be searched through sys.path.
    """
    for folder in folders:
        name = os.path.basename(folder)
        spec = importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        if spec is None or spec.loader is None:
            raise ImportError(name)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "__main__":
    admit(sys.argv[1:])
if TYPE_CHECKING or __name__ == "__main__":
    # Only the worker loads the engine: the supervisor imports this file for its frames.
    import wasmtime

import msgspec  # noqa: E402  (the worker must admit it first)

VERSION = 1
# LIMIT: a module is read and compiled as a whole, and compiling cannot be interrupted.
MODULE_BYTES_MAX = 8 << 20
# LIMIT: compiled modules kept between calls, as many as fit in MODULE_BYTES_MAX together.
MODULES_MAX = 8
HEADER_BYTES_MAX = 256 << 10
NAME_BYTES_MAX = 1024
# The most parameters or results a function type can have:
# https://webassembly.github.io/spec/js-api/#limits
VALUES_MAX = 1000
_I64_MIN, _I64_MAX, _U64_MAX = -(1 << 63), (1 << 63) - 1, (1 << 64) - 1

# LIMIT: items per section, by section id: what a compiler of real programs emits, and no more.
_SECTION_ITEMS_MAX = {
    1: 10_000,  # types
    2: 1,  # imports: one is enough to refuse the module and name it
    3: 20_000,  # functions
    4: 4,  # tables
    5: 1,  # memories
    6: 10_000,  # globals
    7: 2_000,  # exports: each one costs time at every instantiation
    9: 10_000,  # element segments
    10: 20_000,  # function bodies
    11: 10_000,  # data segments
}
_SECTIONS_MAX = 1_000
# LIMIT: of one function and of all: five bytes can declare 50,000 locals, and 50,000 that are in
# use in a loop took 51 s to compile.
_FUNCTION_LOCALS_MAX, _LOCALS_MAX = 2_000, 500_000
# LIMIT: compiling takes more than linear time and memory in the size of one function: 1 MB of
# nested branches took more than 300 MiB.
_BODY_BYTES_MAX = 256 << 10
TABLE_ELEMENTS_MAX = 100_000
_PAGE_BYTES = 64 << 10
_HEADER = b"\0asm\x01\0\0\0"
_TICK_SECONDS = 0.01

_FEATURES = {
    "consume_fuel": True,
    "epoch_interruption": True,
    # The same module and arguments give the same bytes on every machine.
    "cranelift_nan_canonicalization": True,
    "wasm_relaxed_simd_deterministic": True,
    # One executing thread; and atomic waits would not end by fuel or epoch.
    "parallel_compilation": False,
    "wasm_threads": False,
    "shared_memory": False,
    # Copy-on-write images need a memfd that may be executable, which seccomp refuses.
    "memory_init_cow": False,
    # Not needed by what compilers emit by default: less to attack.
    "gc_support": False,
    "wasm_component_model": False,
    "wasm_custom_page_sizes": False,
    "wasm_exceptions": False,
    "wasm_function_references": False,
    "wasm_gc": False,
    "wasm_memory64": False,
    "wasm_multi_memory": False,
    "wasm_stack_switching": False,
    "wasm_tail_call": False,
    "wasm_wide_arithmetic": False,
}

_Integer = Annotated[int, msgspec.Meta(ge=_I64_MIN, le=_I64_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=_I64_MAX)]
# JSON has no such numbers; the spelling is that of Protocol Buffers' JSON.
_Special = Literal["NaN", "Infinity", "-Infinity"]
Value: TypeAlias = int | float | _Special

Code = Literal[
    "wasm.invalid", "wasm.import", "wasm.export", "wasm.trap", "wasm.too_large",
    "fuel", "wall", "cpu", "memory",
]  # fmt: skip


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One call. ``module_bytes`` raw bytes follow; 0 means the worker still holds ``module``."""

    number: int
    module: str
    module_bytes: Annotated[int, msgspec.Meta(ge=0, le=MODULE_BYTES_MAX)]
    forget: list[str]
    function: str
    arguments: Annotated[list[int | float], msgspec.Meta(max_length=VALUES_MAX)]
    fuel: _Count
    wall_ms: _Count
    cpu_ms: _Count | None
    memory_bytes: _Count


class Ready(msgspec.Struct, forbid_unknown_fields=True, tag="ready"):
    """The first frame: the worker has loaded its engine."""

    version: int


class Done(msgspec.Struct, forbid_unknown_fields=True, tag="done"):
    """The function returned."""

    number: int
    values: Annotated[list[_Integer | float | _Special], msgspec.Meta(max_length=VALUES_MAX)]
    fuel: _Count
    cpu_ms: _Count


class Failed(msgspec.Struct, forbid_unknown_fields=True, tag="failed"):
    """The call ended otherwise; a ``code`` without a dot names a limit."""

    number: int
    code: Code
    detail: Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
    kept: bool


class Refusal(Exception):
    """The module or the call is refused, and why."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code: Code = code
        self.detail = detail


class Cursor:
    """Reads the binary format: https://webassembly.github.io/spec/core/binary/"""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        if end > len(data):
            raise Refusal("wasm.invalid", f"A section ends after the module, at {end}.")
        self.data, self.at, self.end = data, start, end

    def number(self) -> int:
        """Read an unsigned LEB128 number of at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            if self.at >= self.end:
                break
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise Refusal("wasm.invalid", f"Unreadable number at {self.at}.")

    def skip(self, count: int) -> int:
        """Step over ``count`` bytes and return where they begin."""
        start = self.at
        if count > self.end - start:
            raise Refusal("wasm.invalid", f"A part ends outside its section, at {start}.")
        self.at += count
        return start

    def part(self) -> bytes:
        """Read a vector of bytes."""
        length = self.number()
        start = self.skip(length)
        return self.data[start : start + length]


class Inventory:
    """Counts what a module would cost before it is compiled, and reads its signatures.

    It does not validate: wasmtime does. Signatures are read here because wasmtime's C API aborts
    the process when it is asked for a type that mentions v128. Raises Refusal.
    """

    def __init__(self, module: bytes) -> None:
        self.memory_bytes = 0
        self.signatures: dict[str, tuple[bytes, bytes]] = {}
        self._types: list[tuple[bytes, bytes]] = []
        self._functions: list[int] = []
        if module[:8] != _HEADER:
            # INVARIANT: wasmtime's Python module would take other bytes for the text format.
            raise Refusal("wasm.invalid", "These bytes are not a core module of version 1.")
        readers: Mapping[int, Callable[[Cursor], None]] = {
            1: self._type, 2: self._import, 3: self._function, 4: self._table, 5: self._memory,
            7: self._export,
        }  # fmt: skip
        cursor, sections = Cursor(module, 8, len(module)), 0
        while cursor.at < cursor.end:
            sections += 1
            kind = module[cursor.skip(1)]
            length = cursor.number()
            section = Cursor(module, cursor.skip(length), cursor.at)
            items = section.number() if kind in _SECTION_ITEMS_MAX else 0
            if items > _SECTION_ITEMS_MAX.get(kind, 0) or sections > _SECTIONS_MAX:
                raise Refusal("wasm.too_large", f"{items} items in section {kind}.")
            if reader := readers.get(kind):
                for _ in range(items):
                    reader(section)
            if kind == 10:
                _count_locals(section, items)

    def _type(self, section: Cursor) -> None:
        section.skip(1)  # the form: only functions are enabled
        self._types.append((section.part(), section.part()))

    def _import(self, section: Cursor) -> None:
        names = b".".join(part[:64] for part in (section.part(), section.part()))
        name = names.decode("utf-8", "replace")
        raise Refusal("wasm.import", f"The module imports {name}; nothing is granted.")

    def _function(self, section: Cursor) -> None:
        self._functions.append(section.number())

    def _table(self, section: Cursor) -> None:
        section.skip(1)  # the type of its elements
        elements = _least(section)
        if elements > TABLE_ELEMENTS_MAX:
            raise Refusal("memory", f"A table starts with {elements} elements.")

    def _memory(self, section: Cursor) -> None:
        self.memory_bytes = _least(section) * _PAGE_BYTES

    def _export(self, section: Cursor) -> None:
        name = section.part().decode("utf-8", "replace")
        kind, index = section.data[section.skip(1)], section.number()
        if kind != 0:
            return
        # INVARIANT: nothing is imported, so functions count from the module's own.
        if index >= len(self._functions) or self._functions[index] >= len(self._types):
            raise Refusal("wasm.invalid", "An export names no function.")
        self.signatures[name] = self._types[self._functions[index]]


def _least(section: Cursor) -> int:
    """Read the limits of a table or memory and return the minimum."""
    bounded = section.number() & 1
    least = section.number()
    if bounded:
        section.number()
    return least


def _count_locals(section: Cursor, bodies: int) -> None:
    total = 0
    for _ in range(bodies):
        length = section.number()
        if length > _BODY_BYTES_MAX:
            raise Refusal("wasm.too_large", f"A function of {length} bytes.")
        body = Cursor(section.data, section.skip(length), section.at)
        own = 0
        for _ in range(min(body.number(), length)):
            own += body.number()
            body.skip(1)  # numeric and reference types are one byte
        total += own
        if own > _FUNCTION_LOCALS_MAX or total > _LOCALS_MAX:
            raise Refusal("wasm.too_large", f"A function of {own} locals, {total} in all.")


class Deadline:
    """Interrupts the running call through the engine's epoch, at a wall or cpu bound.

    A thread of its own looks every tick while calls come, and sleeps when there are none.
    """

    def __init__(self, engine: wasmtime.Engine) -> None:
        self.cause: Literal["wall", "cpu"] = "wall"
        self._engine = engine
        self._lock = threading.Lock()
        self._busy = threading.Event()
        self._bounds: tuple[float, float] | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, bounds: tuple[float, float]) -> None:
        """Watch until ``end``; the bounds, wall and cpu, are absolute seconds of their clocks."""
        with self._lock:
            self._bounds = bounds
        self._busy.set()

    def end(self) -> None:
        """Stop watching: after this no tick can hit the next call."""
        with self._lock:
            self._bounds = None

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            pause = _TICK_SECONDS
            with self._lock:
                if self._bounds is None:
                    self._busy.clear()
                    continue
                wall, cpu = self._bounds
                if (left := wall - time.monotonic()) <= 0 or time.process_time() >= cpu:
                    self.cause = "wall" if left <= 0 else "cpu"
                    self._engine.increment_epoch()
                    self._bounds = None
                pause = min(pause, max(left, 0.0))
            time.sleep(pause)


@dataclass(slots=True, kw_only=True)
class _Loaded:
    module: wasmtime.Module
    memory_bytes: int
    signatures: Mapping[str, tuple[bytes, bytes]]


class Worker:
    """One engine, the modules it has compiled, and the calls, one after the other."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        for name, value in _FEATURES.items():
            setattr(config, name, value)
        self._engine = wasmtime.Engine(config)
        self._deadline = Deadline(self._engine)
        self._loaded: dict[str, _Loaded] = {}

    def answer(self, request: Request, module: bytes) -> Done | Failed:
        """Run one call in a fresh store and instance."""
        wall = time.monotonic() + request.wall_ms / 1000
        started = time.process_time()
        cpu = float("inf") if request.cpu_ms is None else started + request.cpu_ms / 1000
        for name in request.forget:
            self._loaded.pop(name, None)
        try:
            if module or (request.module_bytes == 0 and request.module not in self._loaded):
                self._loaded[request.module] = self._load(module)
            loaded = self._loaded[request.module]
            arguments = _arguments(loaded, request)
            if loaded.memory_bytes > request.memory_bytes:
                raise Refusal("memory", f"It starts with {loaded.memory_bytes} bytes of memory.")
            values, fuel = self._call(loaded, request, arguments, (wall, cpu))
        except Refusal as refusal:
            kept = request.module in self._loaded
            detail = refusal.detail[:NAME_BYTES_MAX]
            return Failed(number=request.number, code=refusal.code, detail=detail, kept=kept)
        used = int((time.process_time() - started) * 1000)
        return Done(number=request.number, values=values, fuel=fuel, cpu_ms=used)

    def _load(self, module: bytes) -> _Loaded:
        inventory = Inventory(module)
        try:
            compiled = wasmtime.Module(self._engine, module)
        except wasmtime.WasmtimeError as error:
            raise Refusal("wasm.invalid", " ".join(str(error).split())) from error
        return _Loaded(
            module=compiled,
            memory_bytes=inventory.memory_bytes,
            signatures=inventory.signatures,
        )

    def _call(
        self,
        loaded: _Loaded,
        request: Request,
        arguments: Sequence[int | float],
        bounds: tuple[float, float],
    ) -> tuple[list[Value], int]:
        store = wasmtime.Store(self._engine)
        try:
            store.set_fuel(request.fuel)
            store.set_epoch_deadline(1)
            store.set_limits(
                memory_size=request.memory_bytes,
                table_elements=TABLE_ELEMENTS_MAX,
                instances=1,
                tables=_SECTION_ITEMS_MAX[4],
                memories=1,
            )
            # INVARIANT: the store counts its one tick from here, so watching starts after it.
            self._deadline.begin(bounds)
            function = _instantiate(store, loaded.module)[request.function]
            # The signature was looked at: this is a function that returns numbers.
            result: Any = cast("wasmtime.Func", function)(store, *arguments)
            fuel = request.fuel - store.get_fuel()
        except wasmtime.Trap as trap:
            raise self._refusal(trap, request) from trap
        finally:
            self._deadline.end()
            store.close()
        if result is None:
            return [], fuel
        values = cast("list[int | float]", result if isinstance(result, list) else [result])
        return [_value(value) for value in values], fuel

    def _refusal(self, trap: wasmtime.Trap, request: Request) -> Refusal:
        code = trap.trap_code
        if code is wasmtime.TrapCode.OUT_OF_FUEL:
            return Refusal("fuel", f"It used its {request.fuel} units of fuel.")
        if code is wasmtime.TrapCode.INTERRUPT:
            return Refusal(self._deadline.cause, "It was interrupted.")
        # The text of a trap holds names that the module chose; its code does not.
        return Refusal("wasm.trap", code.name.lower().replace("_", " ") if code else "unknown")


def _instantiate(store: wasmtime.Store, module: wasmtime.Module) -> Mapping[str, object]:
    try:
        return wasmtime.Instance(store, module, []).exports(store)
    except wasmtime.WasmtimeError as error:
        # The module is valid and imports nothing: what is left is a lack of room.
        raise Refusal("memory", str(error)) from error


# The binary format's number types: https://webassembly.github.io/spec/core/binary/types.html
_RANGES = {0x7F: (-(1 << 31), (1 << 32) - 1), 0x7E: (_I64_MIN, _U64_MAX)}
_NUMBERS = b"\x7f\x7e\x7d\x7c"


def _arguments(loaded: _Loaded, request: Request) -> list[int | float]:
    """Fit the arguments to the signature; integers may be meant as signed or unsigned."""
    signature = loaded.signatures.get(request.function)
    if signature is None:
        raise Refusal("wasm.export", "The module exports no such function.")
    params, results = signature
    if (params + results).strip(_NUMBERS):
        raise Refusal("wasm.export", "Only numbers can be its arguments and results.")
    if len(params) != len(request.arguments):
        raise Refusal(
            "wasm.export", f"It takes {len(params)} arguments, not {len(request.arguments)}."
        )
    return [_argument(*pair) for pair in zip(params, request.arguments, strict=True)]


def _argument(kind: int, value: int | float) -> int | float:
    if kind not in _RANGES:
        return float(value)
    low, high = _RANGES[kind]
    if not isinstance(value, int) or not low <= value <= high:
        raise Refusal("wasm.export", f"{value} is not an integer of {high.bit_length()} bits.")
    return value


def _value(value: int | float) -> Value:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _read(count_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < count_bytes:
        part = os.read(0, count_bytes - len(data))
        if not part:
            raise SystemExit  # the supervisor has closed the line: nothing is left to do
        data += part
    return bytes(data)


def frame(message: Request | Ready | Done | Failed) -> bytes:
    """Encode a message as it crosses the pipe: its length in four bytes, then JSON."""
    data = msgspec.json.encode(message)
    return len(data).to_bytes(4, "little") + data


def _write(message: Ready | Done | Failed) -> None:
    view = memoryview(frame(message))
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Answer requests until the supervisor closes the line."""
    worker = Worker()
    decode = msgspec.json.Decoder(Request).decode
    _write(Ready(version=VERSION))
    while True:
        length = int.from_bytes(_read(4), "little")
        if length > HEADER_BYTES_MAX:
            raise SystemExit("header too large")
        request = decode(_read(length))
        _write(worker.answer(request, _read(request.module_bytes)))


if __name__ == "__main__":
    main()
