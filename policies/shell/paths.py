"""Step 2, shell text: the text of a Call becomes the arguments that are judged.

A text of one command alone is the Call that its argv would be: one spelling for both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from safeconduct.call import Json
from safeconduct.errors import Denied
from safeconduct.policies.paths import PathResolver, Resolved, check_holds

from .form import Redirect, ShellText, Simple, write_shell
from .reader import read_shell

# Nothing is read from it and nothing kept in it, so that no rule needs to grant it.
NULL_DEVICE: Final = "/dev/null"


def take_text(given: dict[str, Json]) -> ShellText | None:
    """Replace ``command`` by what it says: ``argv`` if it is one command, ``cwd`` if it enters one.

    Returns what is more than one argv. Raises Denied ``shell.*`` and ``call.bad_argument``.
    """
    command, cwd = given.pop("command"), given.get("cwd", "")
    if not isinstance(command, str) or not isinstance(cwd, str):
        raise Denied("command and cwd must be texts", code="call.bad_argument")
    text = read_shell(command)
    if text.folder is not None:
        given["cwd"] = os.path.join(cwd, text.folder)
    first, *others = text.commands
    if others or first.redirects:
        return text
    given["argv"] = list(first.argv)
    return None


def resolve_text(
    text: ShellText, resolver: PathResolver, folder: str, descriptors: dict[str, Resolved]
) -> dict[str, Json]:
    """Return the arguments of shell text, the paths of its redirections resolved from ``folder``.

    They are judged on their objects as those of `fs.read` and `fs.write` are, before anything of
    the text runs: what a command of it makes, a later one cannot be redirected to.
    """
    commands: list[Simple] = []
    for command in text.commands:
        redirects: list[Redirect] = []
        for one in command.redirects:
            if one.operator != ">&" and one.target != NULL_DEVICE:
                found = _resolve(one, resolver, os.path.join(folder, one.target))
                descriptors[f"redirection {len(descriptors)}"] = found
                one = replace(one, target=found.path)
            redirects.append(one)
        commands.append(replace(command, redirects=tuple(redirects)))
    return {"command": write_shell(commands), "commands": _commands_json(commands)}


def _resolve(redirect: Redirect, resolver: PathResolver, path: str) -> Resolved:
    found = resolver.existing(path) if redirect.operator == "<" else resolver.new(path)
    if found.fd is not None:
        try:
            check_holds(found.fd, folder=False)
            if redirect.operator != "<" and os.fstat(found.fd).st_nlink > 1:
                message = "the file has other names too, which are not judged"
                raise Denied(message, code="path.hard_link")
        except Denied:
            os.close(found.fd)
            raise
    return found


def _commands_json(commands: Sequence[Simple]) -> list[Json]:
    return [
        {
            "join": command.join.value,
            "argv": list(command.argv),
            "redirects": [
                {"fd": one.descriptor, "operator": one.operator, "target": one.target}
                for one in command.redirects
            ],
        }
        for command in commands
    ]
