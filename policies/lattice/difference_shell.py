"""Policy lattice: shell text as an example: two programs that one sandbox may now run together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from safeconduct.call import Document, Json
from safeconduct.policies.binding import Rule
from safeconduct.policies.match import Argv
from safeconduct.policies.shell.form import Join, Simple, write_shell

from .examples import examples

# LIMIT: programs that are tried with one another.
MAX_PROGRAMS: Final = 36


def joined_calls(workspace: str, rules: Sequence[Rule]) -> Iterator[Document]:
    """Yield texts of two programs that rules speak of, in their canonical form."""
    found: list[tuple[str, ...]] = [("x",)]
    for rule in rules:
        matcher = (rule.matchers or {}).get("argv")
        if isinstance(matcher, Argv):
            found += [
                tuple(str(word) for word in value)
                for value in examples(matcher)[:3]
                if isinstance(value, Sequence)
            ]
    programs = list(dict.fromkeys(found))[:MAX_PROGRAMS]
    for first, second in itertools.permutations(programs, 2):
        commands = [Simple(join=Join.FIRST, argv=first), Simple(join=Join.THEN, argv=second)]
        described: list[Json] = [
            {"join": one.join.value, "argv": list(one.argv), "redirects": []} for one in commands
        ]
        arguments: dict[str, Json] = {
            "command": write_shell(commands),
            "commands": described,
            "cwd": workspace,
        }
        yield Document(tool="shell.run", arguments=arguments, workspace=workspace)
