"""Step "execute": the tools this runtime executes, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from safeconduct.call import Outcome
from safeconduct.errors import ToolFailed
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.shield import Shields
from safeconduct.runtime.sandbox.wasm import WasmEngine

from . import files, http, python, shell, wasm
from .function import Functions
from .task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """Everything a tool may need, made once per runtime."""

    native: NativeSandbox
    wasm: WasmEngine
    python: PythonEngine
    shields: Shields
    # Count the system calls that programs are refused.
    explain: bool = False
    functions: Functions = field(default_factory=Functions)

    def run(self, task: Task) -> Outcome:
        """Run a judged Call. Blocks until it is over.

        Raises ToolFailed for a tool that is judged here but executed elsewhere, and whatever the
        tool and its sandbox raise.
        """
        table: Mapping[str, Callable[[], Outcome]] = {
            "fs.read": lambda: files.read(task),
            "fs.list": lambda: files.list_folder(task),
            "fs.write": lambda: files.write(task),
            "shell.run": lambda: shell.run(task, self.native, self.shields, explain=self.explain),
            "http.get": lambda: http.get(task, self.native),
            "wasm.run": lambda: wasm.run(task, self.wasm),
            "python.run": lambda: python.run(task, self.python, self.shields, explain=self.explain),
        }
        function = self.functions.get(task.document.tool)
        if function is not None:
            return python.call(task, function, self.python, self.shields, explain=self.explain)
        run = table.get(task.document.tool)
        if run is None:
            raise ToolFailed(
                f"{task.document.tool} is not a tool that this runtime executes.",
                code="tool.unknown",
            )
        return run()
