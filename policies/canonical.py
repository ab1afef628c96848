"""Step 2 of the path of one Call: a Call becomes the one Document that is judged.

The arguments are closed by the tool's signature, defaults filled, paths resolved to objects
and URLs to their one spelling. Every failure is Denied with a stable code; nothing ran.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, cast

from safeconduct.call import Call, Document, Json
from safeconduct.errors import Denied

from .arguments import MAX_INTEGER, copy_json
from .paths import PathResolver, Resolved, check_holds, show
from .resources import canonical_resources
from .rules import Judged
from .shell.commands import parts_of
from .shell.paths import resolve_text, take_text
from .signatures import (
    BUILT_IN,
    MAX_LIST,
    WORKSPACE_DEFAULT,
    Argument,
    Holds,
    Kind,
    Signature,
)
from .spelling import bad_argument, open_document, spell_url, take_argv, take_text_value
from .wildcards import is_ours

MAX_TOOL_CHARACTERS: Final = 128
MAX_ARGUMENTS: Final = 64
_TOOL = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_PATHS: Final = frozenset({Kind.PATH, Kind.NEW_PATH})
_INT64: Final = range(-(1 << 63), 1 << 63)


class Canonical:
    """The Document of one Call and the descriptors of the objects it names.

    A context manager: leaving it closes the descriptors. ``descriptors`` holds an entry for
    each path that a Call gives to one of our own tools; a default is not opened, and a tool
    that opens paths itself gets none.
    """

    def __init__(self, document: Document, descriptors: Mapping[str, Resolved]) -> None:
        self.document = document
        self.descriptors = descriptors

    @property
    def written(self) -> tuple[str, ...]:
        """The paths that the Call itself writes, rather than a program that it runs."""
        calls = (self.document, *(part.document for part in parts_of(self.document)))
        signatures = [(one, BUILT_IN.get(one.tool)) for one in calls]
        return tuple(
            str(one.arguments[name])
            for one, signature in signatures
            for name in (signature.writes if signature else ())
        )

    def __enter__(self) -> Canonical:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors; safe to call twice."""
        if not self.descriptors:
            return
        descriptors = self.descriptors
        self.descriptors = dict[str, Resolved]()
        _close(descriptors)


def canonicalize(policy: Judged, call: Call, *, unknown: Signature | None = None) -> Canonical:
    """Bring a Call to the form that is judged, recorded and executed; the caller closes it.

    ``unknown`` is the signature of tools that the policy does not speak of; without it, or under
    our own names, there are none.

    Raises Denied, and nothing else: what the kernel will not resolve (no descriptor is left, say)
    is refused as ``path.refused``.
    """
    signature = _signature(policy, call.tool, unknown)
    in_text = signature.as_text is not None and "command" in call.arguments
    given = _plain_arguments(signature.as_text or signature if in_text else signature, call)
    text = take_text(given) if in_text else None
    if not signature.closed:
        return Canonical(open_document(policy.workspace, call.tool, signature, given), {})
    descriptors: dict[str, Resolved] = {}
    values: dict[str, Json] = {}
    resolver: PathResolver | None = None
    try:
        for name, value in given.items():
            argument = signature.arguments[name]
            if argument.kind in _PATHS:
                resolver = resolver or PathResolver(policy.workspace)
                values[name] = _path(resolver, name, argument, value, descriptors)
            else:
                values[name] = _value(name, argument, value)
        if text is not None:
            resolver = resolver or PathResolver(policy.workspace)
            folder = str(values.get("cwd", policy.workspace))
            values |= resolve_text(text, resolver, folder, descriptors)
    except OSError as error:
        _close(descriptors)
        raise Denied("the kernel refuses to resolve a path", code="path.refused") from error
    except BaseException:
        _close(descriptors)
        raise
    finally:
        if resolver is not None:
            resolver.close()
    arguments = _fill_defaults(signature, values, policy.workspace)
    document = Document(tool=call.tool, arguments=arguments, workspace=policy.workspace)
    return Canonical(document, descriptors)


def _close(descriptors: Mapping[str, Resolved]) -> None:
    for resolved in descriptors.values():
        for fd in (resolved.fd, resolved.parent_fd):
            if fd is None:
                continue
            try:
                os.close(fd)
            except OSError:
                # Closed already; nothing depends on it.
                continue


def _signature(policy: Judged, tool: object, unknown: Signature | None) -> Signature:
    # Exactly str: a subclass could answer one way here and another way later.
    if type(tool) is not str:
        raise Denied("the name of a tool is a text", code="call.unknown_tool")
    if len(tool) > MAX_TOOL_CHARACTERS or _TOOL.fullmatch(tool) is None:
        message = f"{show(tool)} is not the name of a tool"
        raise Denied(message, code="call.unknown_tool")
    signature = policy.signature(tool)
    if signature is None and not is_ours(tool):
        signature = unknown
    if signature is None:
        raise Denied(f"there is no tool {tool}", code="call.unknown_tool")
    return signature


def _plain_arguments(signature: Signature, call: Call) -> dict[str, Json]:
    """Copy the arguments as plain, bounded JSON and refuse unknown and missing ones."""
    if len(call.arguments) > MAX_ARGUMENTS:
        raise Denied(f"more than {MAX_ARGUMENTS} arguments", code="call.extra_argument")
    plain = copy_json(call.arguments, max_integer=_largest_integer(signature))
    given = cast("dict[str, Json]", plain)
    for name in given:
        if signature.closed and name not in signature.arguments:
            message = f"{call.tool} takes no argument {show(name)}"
            raise Denied(message, code="call.extra_argument")
        if len(name) > MAX_TOOL_CHARACTERS:
            raise bad_argument(name, "an argument with a shorter name")
    for name, argument in signature.arguments.items():
        if argument.required and name not in given:
            message = f"{call.tool} needs the argument {name}"
            raise Denied(message, code="call.missing_argument")
    return given


def _largest_integer(signature: Signature) -> int:
    for argument in signature.arguments.values():
        if argument.kind is Kind.INTEGERS:
            return 1 << 63
    return MAX_INTEGER


def _fill_defaults(
    signature: Signature, values: dict[str, Json], workspace: str
) -> dict[str, Json]:
    """Add what was left out; sorted, so that one Document has one order."""
    for name, argument in signature.arguments.items():
        if name in values or argument.default is None:
            continue
        values[name] = workspace if argument.default == WORKSPACE_DEFAULT else argument.default
    return {name: values[name] for name in sorted(values)} if len(values) > 1 else values


def _value(name: str, argument: Argument, value: Json) -> Json:
    check = _CHECKS.get(argument.kind)
    return value if check is None else check(name, value)


def _path(
    resolver: PathResolver,
    name: str,
    argument: Argument,
    value: Json,
    descriptors: dict[str, Resolved],
) -> Json:
    text = take_text_value(name, value)
    new = argument.kind is Kind.NEW_PATH
    resolved = resolver.new(text) if new else resolver.existing(text)
    descriptors[name] = resolved
    if resolved.fd is not None and argument.holds is not Holds.ANYTHING:
        check_holds(resolved.fd, folder=argument.holds is Holds.FOLDER)
    return resolved.path


def _integers(name: str, value: Json) -> list[Json]:
    if not isinstance(value, list) or len(value) > MAX_LIST:
        raise bad_argument(name, f"a list of at most {MAX_LIST} integers")
    if not all(type(item) is int and item in _INT64 for item in value):
        raise bad_argument(name, "a list of 64-bit integers")
    return value


_CHECKS: Final[Mapping[Kind, Callable[[str, Json], Json]]] = MappingProxyType(
    {
        Kind.URL: spell_url,
        Kind.TEXT: take_text_value,
        Kind.ARGV: take_argv,
        Kind.INTEGERS: _integers,
        Kind.RESOURCES: canonical_resources,
    }
)
