"""Step "execute": a Python function as a tool: its text, and the schema of its arguments.

What crosses into the sandbox is source text, never a pickle: the function's own ``def`` without
decorators, defaults and annotations, and an import for each module or name that it uses. State of
this process cannot cross, so a function that uses any is refused when it is registered.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import msgspec

from safeconduct.call import Call, Json
from safeconduct.errors import Denied, ToolFailed

# Names under these are built in.
_RESERVED = frozenset({"agent", "fs", "http", "python", "shell", "wasm"})
_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_NAME_CHARACTERS_MAX = 128
# LIMIT: bytes of one function's text.
_SOURCE_BYTES_MAX = 256 << 10
_PLAIN: tuple[object, ...] = (type(None), None, bool, int, float, str, object, typing.Any)
_MESSAGE_CHARACTERS_MAX = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """One registered function. ``entry`` is its name within ``source``."""

    name: str
    source: str
    entry: str
    profile: str | None
    arguments: type[msgspec.Struct]


class Functions:
    """The functions registered with one runtime, by tool name."""

    def __init__(self) -> None:
        self._known: dict[str, Function] = {}

    def get(self, tool: str) -> Function | None:
        """Return the function of that name."""
        return self._known.get(tool)

    def add(self, function: Callable[..., object], name: str | None, profile: str | None) -> None:
        """Register a function. Raises ToolFailed ``python.function`` where it cannot cross."""
        made = describe(function, name, profile)
        if made.name in self._known:
            raise _refused(made.name, "this name is taken", "Give it another with name=.")
        self._known[made.name] = made

    def close_arguments(self, call: Call) -> Call:
        """Return the Call with arguments checked against the type hints, defaults filled in.

        Calls of other tools are returned as they are. Raises Denied ``call.bad_argument``.
        """
        function = self._known.get(call.tool) if type(call.tool) is str else None
        if function is None:
            return call
        try:
            found = msgspec.convert(dict(call.arguments), function.arguments)
            closed: dict[str, Json] = msgspec.to_builtins(found)
        except (msgspec.ValidationError, RecursionError, TypeError) as error:
            text = "".join(c if " " <= c <= "~" else "?" for c in str(error))
            message = f"{function.name}: {text[:_MESSAGE_CHARACTERS_MAX]}"
            raise Denied(message, code="call.bad_argument") from error
        return replace(call, arguments=closed)


def describe(function: Callable[..., object], name: str | None, profile: str | None) -> Function:
    """Take a function apart. Raises ToolFailed ``python.function`` where it cannot cross."""
    if not isinstance(function, types.FunctionType) or function.__name__ == "<lambda>":
        raise _refused(str(name), "it is no plain function", "Define it with def.")
    tool = function.__name__ if name is None else name
    if len(tool) > _NAME_CHARACTERS_MAX or not _NAME.fullmatch(tool):
        raise _refused(tool, "it is no name of a tool", "Use letters, digits, _, - and dots.")
    if tool.partition(".")[0] in _RESERVED:
        raise _refused(tool, "this name belongs to a built-in tool", "Give it another with name=.")
    if function.__code__.co_freevars:
        names = ", ".join(function.__code__.co_freevars)
        raise _refused(tool, f"it is a closure over {names}", "Pass what it needs as arguments.")
    definition = _definition(tool, function)
    lines = [*_imports(tool, function, ast.unparse(definition)), ast.unparse(definition)]
    source = "\n".join(lines)
    if len(source.encode("utf-8", "surrogatepass")) > _SOURCE_BYTES_MAX:
        raise _refused(tool, "its text is too long", "Move what it does into a module.")
    return Function(
        name=tool,
        source=source,
        entry=function.__name__,
        profile=profile,
        arguments=_arguments(tool, function),
    )


def _definition(tool: str, function: types.FunctionType) -> ast.FunctionDef:
    """Return the ``def`` alone: every argument is given, so defaults and hints stay here."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise _refused(tool, "its source is not in a file", "Define it in a module.") from error
    definition = tree.body[0] if tree.body else None
    if not isinstance(definition, ast.FunctionDef):
        raise _refused(tool, "it is no plain function", "Use def, not async def or a class.")
    if len(definition.decorator_list) > 1:
        raise _refused(tool, "another decorator changes it", "Let tool be the only decorator.")
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    arguments.defaults = []
    arguments.kw_defaults = [None for _ in arguments.kwonlyargs]
    for argument in (*arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return definition


def _imports(tool: str, function: types.FunctionType, text: str) -> Iterator[str]:
    """Yield an import for each global name; refuse what cannot be imported."""
    for name in sorted(set(_globals(compile(text, tool, "exec"))) - {function.__name__}):
        if name not in function.__globals__:
            continue  # a builtin, or a name that is missing here as well
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            yield f"import {value.__name__} as {name}"
            continue
        home, own = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if value is getattr(builtins, name, None):
            continue
        if home == function.__module__ or not _importable(home, own, value):
            raise _refused(
                tool,
                f"it uses {name} of its own module",
                f"Define {name} inside the function, or pass it as an argument.",
            )
        yield f"from {home} import {own} as {name}"


def _importable(home: object, own: object, value: object) -> bool:
    if not (isinstance(home, str) and isinstance(own, str) and own.isidentifier()):
        return False
    module = sys.modules.get(home) or importlib.import_module(home)
    return getattr(module, own, None) is value


def _globals(code: types.CodeType) -> Iterator[str]:
    waiting = [code]
    while waiting:
        current = waiting.pop()
        for instruction in dis.get_instructions(current):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield str(instruction.argval)
        waiting += [part for part in current.co_consts if isinstance(part, types.CodeType)]


def _arguments(tool: str, function: types.FunctionType) -> type[msgspec.Struct]:
    """Return the closed schema of the arguments, from the type hints."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError) as error:
        raise _refused(tool, f"its type hints fail: {error}", "Correct them.") from error
    fields: list[tuple[str, object] | tuple[str, object, object]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise _refused(tool, f"{name} takes any number or no name", "Name each argument.")
        if name not in hints or not _is_json(hints[name]):
            hint = "Use None, bool, int, float, str, list[…], dict[str, …], | and Literal."
            raise _refused(tool, f"the type of {name} is not JSON", hint)
        if parameter.default is parameter.empty:
            fields.append((name, hints[name]))
        else:
            default = typing.cast("object", parameter.default)
            fields.append((name, hints[name], _default(tool, name, default, hints[name])))
    return msgspec.defstruct(
        "Arguments", typing.cast("typing.Any", fields), forbid_unknown_fields=True, kw_only=True
    )


def _default(tool: str, name: str, value: object, hint: object) -> object:
    """Return the default as a msgspec field, a fresh copy for each Call."""
    try:
        plain = msgspec.json.encode(value)
        decode = msgspec.json.Decoder(typing.cast("type[object]", hint)).decode
        decode(plain)
    except (TypeError, ValueError) as error:
        raise _refused(tool, f"the default of {name} is not JSON", "Use plain values.") from error
    return msgspec.field(default_factory=lambda: decode(plain))


def _is_json(hint: object) -> bool:
    """Tell whether every value of a type is plain JSON."""
    if any(hint is plain for plain in _PLAIN):
        return True
    origin: object = typing.get_origin(hint)
    parts: tuple[object, ...] = typing.get_args(hint)
    if origin is typing.Literal:
        return all(isinstance(part, str | int | bool | None) for part in parts)
    if origin is typing.Union or origin is types.UnionType or origin is list:
        return all(_is_json(part) for part in parts)
    if origin is dict or origin is Mapping:
        return len(parts) == 2 and parts[0] is str and _is_json(parts[1])
    return hint is list or hint is dict


def _refused(tool: str, why: str, hint: str) -> ToolFailed:
    return ToolFailed(f"{tool} cannot be a tool: {why}. {hint}", code="python.function")
