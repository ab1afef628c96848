"""Step "execute": ``wasm.run``, one function of a core module in the Wasm worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from safeconduct.call import Outcome
from safeconduct.errors import ToolFailed
from safeconduct.runtime.sandbox.wasm import WasmEngine

from . import files
from .task import Task


def run(task: Task, engine: WasmEngine) -> Outcome:
    """Read the judged module and run ``function`` on ``arguments`` in a fresh instance."""
    module = files.read_bytes(task.objects["module"], engine.module_bytes_max + 1)
    if len(module) > engine.module_bytes_max:
        raise ToolFailed("The module is too large.", code="wasm.too_large")
    arguments = task.document.arguments
    return engine.run(
        task.call,
        module=module,
        function=str(arguments["function"]),
        arguments=cast("Sequence[int]", arguments["arguments"]),
        profile=task.profile,
    )
