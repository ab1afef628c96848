"""A Rego policy compiled to WebAssembly by OPA, in this process: the fastest Rego there is here.

The interface is https://www.openpolicyagent.org/docs/wasm, ABI 1.2 or newer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import wasmtime

_PAGE_BYTES = 65536
_JSON = 0


class WasmPolicy:
    """One compiled policy; `evaluate` may be called any number of times."""

    def __init__(self, module: bytes) -> None:
        engine = wasmtime.Engine()
        self._store = wasmtime.Store(engine)
        compiled = wasmtime.Module(engine, module)
        self._memory = wasmtime.Memory(self._store, wasmtime.MemoryType(wasmtime.Limits(2, None)))
        self._builtins: dict[int, str] = {}
        exports = wasmtime.Instance(self._store, compiled, self._imports(compiled)).exports(
            self._store
        )
        self._eval = cast("Callable[..., int]", exports["opa_eval"])
        self._load = cast("Callable[..., int]", exports["opa_json_parse"])
        self._malloc = cast("Callable[..., int]", exports["opa_malloc"])
        top = cast("Callable[..., int]", exports["opa_heap_ptr_get"])
        self._data = self._parse(b"{}")
        self._names = json.loads(
            self._read(
                cast("Callable[..., int]", exports["opa_json_dump"])(
                    self._store,
                    cast("Callable[..., int]", exports["builtins"])(self._store),
                )
            )
        )
        if self._names:
            raise RuntimeError(f"the policy needs functions of its host: {sorted(self._names)}")
        # The input lies at the end of what is used, in front of the heap of each evaluation.
        self._base = top(self._store)

    def evaluate(self, document: bytes) -> bytes:
        """Return the JSON of the results for the JSON of an input."""
        self._reserve(self._base + len(document))
        self._memory.write(self._store, document, self._base)
        heap = self._base + len(document)
        return self._read(
            self._eval(self._store, 0, 0, self._data, self._base, len(document), heap, _JSON)
        )

    def _reserve(self, end: int) -> None:
        missing = end - self._memory.data_len(self._store)
        if missing > 0:
            self._memory.grow(self._store, -(-missing // _PAGE_BYTES))

    def _parse(self, document: bytes) -> int:
        at = self._malloc(self._store, len(document))
        self._memory.write(self._store, document, at)
        return self._load(self._store, at, len(document))

    def _read(self, at: int) -> bytes:
        chunks: list[bytes] = []
        while True:
            chunk = bytes(self._memory.read(self._store, at, at + 256))
            end = chunk.find(b"\0")
            if end >= 0:
                return b"".join([*chunks, chunk[:end]])
            chunks.append(chunk)
            at += len(chunk)

    def _imports(self, compiled: wasmtime.Module) -> list[wasmtime.Memory | wasmtime.Func]:
        found: list[wasmtime.Memory | wasmtime.Func] = []
        for wanted in compiled.imports:
            if isinstance(wanted.type, wasmtime.MemoryType):
                found.append(self._memory)
            elif isinstance(wanted.type, wasmtime.FuncType):
                found.append(wasmtime.Func(self._store, wanted.type, _refuse))
        return found


def _refuse(*_: object) -> int:
    raise RuntimeError("the policy aborted, or called a function of its host")
