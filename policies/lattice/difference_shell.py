"""Policy lattice: shell text as an example: programs that one sandbox may now run together.

Also what nobody knows before it runs: a program that is fed by another one, a file it writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from safeconduct.call import Document, Json
from safeconduct.policies.binding import Rule
from safeconduct.policies.match import Argv
from safeconduct.policies.shell.form import Join, Redirect, Simple, write_shell

from .examples import examples

# LIMIT: programs that are tried with one another.
MAX_PROGRAMS: Final = 36


def joined_calls(workspace: str, rules: Sequence[Rule]) -> Iterator[Document]:
    """Yield texts of two programs that rules speak of, in their canonical form."""
    for first, second in itertools.permutations(_programs(rules), 2):
        yield _text(
            workspace, Simple(join=Join.FIRST, argv=first), Simple(join=Join.THEN, argv=second)
        )


def fed_calls(workspace: str, rules: Sequence[Rule]) -> Iterator[Document]:
    """Yield texts in which one program that rules of `shell.run` speak of feeds another one."""
    for second, first in itertools.product(_programs(rules), repeat=2):
        yield _text(
            workspace, Simple(join=Join.FIRST, argv=first), Simple(join=Join.PIPE, argv=second)
        )


def writing_calls(
    workspace: str, rules: Sequence[Rule], paths: Iterable[str]
) -> Iterator[Document]:
    """Yield texts in which a program that rules of `shell.run` speak of writes a file."""
    programs = _programs(rules)
    for path, argv in itertools.product(paths, programs):
        redirects = (Redirect(descriptor=1, operator=">", target=path),)
        yield _text(workspace, Simple(join=Join.FIRST, argv=argv, redirects=redirects))


def _programs(rules: Sequence[Rule]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("x",)]
    for rule in rules:
        matcher = (rule.matchers or {}).get("argv")
        if isinstance(matcher, Argv):
            found += [
                tuple(str(word) for word in value)
                for value in examples(matcher)[:3]
                if isinstance(value, Sequence)
            ]
    return list(dict.fromkeys(found))[:MAX_PROGRAMS]


def _text(workspace: str, *commands: Simple) -> Document:
    described: list[Json] = [_described(one) for one in commands]
    arguments: dict[str, Json] = {
        "command": write_shell(commands),
        "commands": described,
        "cwd": workspace,
    }
    return Document(tool="shell.run", arguments=arguments, workspace=workspace)


def _described(command: Simple) -> Json:
    redirects: list[Json] = [
        {"fd": one.descriptor, "operator": one.operator, "target": one.target}
        for one in command.redirects
    ]
    return {"join": command.join.value, "argv": [*command.argv], "redirects": redirects}
