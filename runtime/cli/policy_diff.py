"""``safeconduct policy diff``: does a new policy allow anything that the old one refused?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit
from safeconduct.policies import Judged, compile_elsewhere, parse_policy, read_policy_file
from safeconduct.policies.lattice.difference import Widening, difference
from safeconduct.policies.preset import read_preset

from .options import JsonOption
from .source import read_source
from .terminal import clip, print_json, print_line

_PRESET = "preset:"
_VALUE_CHARACTERS = 300


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD|preset:NAME|-", help="The policy so far.")],
    new: Annotated[str, typer.Argument(metavar="NEW|preset:NAME|-", help="The one in its place.")],
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", "-w", help="What $WS stands for in both (default: here)."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say where NEW is wider than OLD, each time with a call that shows it.

    What cannot be shown to be no wider counts as a finding too, and says "perhaps". Roles,
    profiles, limits, rates and budgets are compared. Exits with 0 where nothing is wider, else 20.
    """
    folder = Path(os.path.realpath(workspace or Path.cwd()))
    before, after = _load(old, folder), _load(new, folder)
    found = difference(before, after)
    if as_json:
        print_json(
            {
                "old": before.version,
                "new": after.version,
                "wider": bool(found),
                "certain": any(one.certain for one in found),
                "widenings": [one.to_json() for one in found],
            }
        )
    else:
        _print(found, old, new)
    return Exit.FINDINGS if found else Exit.OK


def _load(name: str, workspace: Path) -> Judged:
    if name == "-":
        return parse_policy(read_source(name), name="stdin", workspace=workspace)
    if name.startswith(_PRESET):
        data = read_preset(name.removeprefix(_PRESET))
        return parse_policy(data, name=name, workspace=workspace)
    return compile_elsewhere(read_policy_file(Path(name)), workspace=workspace)


def _print(found: tuple[Widening, ...], old: str, new: str) -> None:
    for one in found:
        where = f"{one.file}:{one.line}:{one.column}: " if one.line else ""
        role = f" in role {one.role}" if one.role else ""
        print_line(f"{where}{one.code}{role}: {one.message}")
        if one.example is not None and one.old is not None and one.new is not None:
            shown = clip(json.dumps(one.example.arguments, ensure_ascii=False), _VALUE_CHARACTERS)
            print_line(f"  {one.example.tool} {shown}: {one.old} → {one.new}")
    certain = sum(one.certain for one in found)
    if found:
        print_line(
            f"{new} is wider than {old}: {certain} times surely, {len(found) - certain} perhaps"
        )
    else:
        print_line(f"{new} allows nothing that {old} refuses")
