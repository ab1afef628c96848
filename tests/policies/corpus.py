"""The pitfall corpus (tests/vectors/policy): how its files are read and its calls judged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, cast

from safeconduct.call import Call, Effect, Facts, Json
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import Judged, canonicalize, decide, parse_policy

FOLDER = Path(__file__).parents[1] / "vectors" / "policy"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# A long run is written once: the unit, then how often.
_RUN = re.compile("\u27e6(.+?)\u00d7([0-9]+)\u27e7", re.DOTALL)
NO_FILES = Path("/srv/space")
# Whatever JSON holds: the checks below look at it, not its type.
Value: TypeAlias = Any
# A part of the language that may not be there yet, and a policy that uses nothing else of it.
FEATURES = {
    "email": "tools: {t: {allow: {x: {email: any}}}}",
    "host": "tools: {t: {allow: {x: {host: any}}}}",
    "json": "tools: {t: {allow: {x: {json: {type: string}}}}}",
    "not": 'tools: {t: {allow: {x: {path: ["/a/**"], not: ["/a/b"]}}}}',
    "regex": "tools: {t: {allow: {x: {regex: a}}}}",
    "roles": "roles: {r: {t: {allow: any}}}",
    "when": "tools: {t: {allow: any, when: call.a == 1}}",
    "wildcards": 'tools: {"files.*": {allow: any}}',
}


@dataclass(frozen=True)
class Case:
    """One case of one file; ``fields`` are what its kind needs."""

    file: str
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return cast("str", self.fields["id"])

    @property
    def kind(self) -> str:
        return cast("str", self.fields["kind"])

    @property
    def needs(self) -> list[str]:
        """Return the features without which the case says nothing."""
        needs = self.fields.get("needs", [])
        return [needs] if isinstance(needs, str) else needs

    def policy(self) -> bytes:
        """Return the policy file of a call: named at the head of the file, or written out."""
        text = self.fields["policy"]
        return cast("str", expand(read(self.file)["policies"].get(text, text))).encode()

    def __getitem__(self, key: str) -> Value:
        return expand(self.fields[key])


@cache
def read(name: str) -> dict[str, Any]:
    """Return one file as it is written."""
    return cast("dict[str, Any]", json.loads((FOLDER / f"{name}.json").read_text()))


def cases(*kinds: str) -> list[Case]:
    """Return the cases of all files, or those of some kinds."""
    found = [Case(name, case) for name in NAMES for case in read(name)["cases"]]
    return [case for case in found if not kinds or case.kind in kinds]


def expand(value: Value, workspace: str | None = None) -> Value:
    """Write out the runs in every text, and where it is given, the path that `$WS` stands for."""
    if isinstance(value, str):
        text = _RUN.sub(lambda found: found[1] * int(found[2]), value)
        return text if workspace is None else text.replace("$WS", workspace)
    if isinstance(value, list):
        return [expand(item, workspace) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        return {expand(key, workspace): expand(item, workspace) for key, item in table.items()}
    return value


def plant(workspace: Path, tree: list[str]) -> None:
    """Make the files of a corpus file: `folder/`, `link -> target`, `fifo |` or a plain name."""
    for entry in tree:
        name, arrow, target = entry.partition(" -> ")
        path = workspace / name.removesuffix(" |")
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrow:
            path.symlink_to(target.replace("$WS", str(workspace)))
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif name.endswith(" |"):
            os.mkfifo(path)
        else:
            path.write_text("x")


def load(data: bytes, workspace: Path) -> Judged:
    """Parse a policy of the corpus."""
    return parse_policy(data, name="policy.yaml", workspace=workspace)


def judge(case: Case, workspace: Path) -> tuple[Effect, str]:
    """Judge a call as the runtime does: the effect, and the code of a refusal."""
    policy = load(case.policy(), workspace)
    facts = dict(case.fields.get("facts", {}))
    if "role" in case.fields:
        facts["role"] = case["role"]
    try:
        # A policy of one role is judged for sessions of that role.
        for_role = getattr(policy, "for_role", None)
        judged = policy if for_role is None else cast("Judged", for_role(facts.get("role")))
        arguments = cast("dict[str, Json]", expand(case.fields["arguments"], str(workspace)))
        call = Call(id="1", tool=case["tool"], arguments=arguments, session="s")
        with canonicalize(judged, call) as canonical:
            decide_with = cast("Callable[..., Any]", decide)
            extra = (Facts(**facts),) if facts else ()
            decision = decide_with(judged, canonical.document, *extra)
        return decision.effect, decision.code
    except Denied as denied:
        return Effect.DENY, denied.code
    except PolicyError as error:
        if error.code != "policy.unknown_role":
            raise
        return Effect.DENY, error.code


@cache
def has(feature: str) -> bool:
    """Tell whether the loader knows a part of the language."""
    if feature == "command":
        return _takes_commands()
    try:
        load(f"version: 1\n{FEATURES[feature]}\n".encode(), NO_FILES)
    except PolicyError:
        return False
    return True


def _takes_commands() -> bool:
    policy = load(b"version: 1\ntools: {shell.run: {allow: {argv: [ls]}}}\n", NO_FILES)
    call = Call(id="1", tool="shell.run", arguments={"command": "ls; ls"}, session="s")
    try:
        with canonicalize(policy, call) as canonical:
            return decide(policy, canonical.document).code != "policy.error"
    except Denied as denied:
        return denied.code not in ("call.extra_argument", "call.missing_argument")
