"""Arguments and options that several verbs share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeconduct.call import Tier

PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", "-p", help="Policy file; without it the usual places are searched."),
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        help="The folder that $WS stands for (default: the policy's project, else here).",
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Folder to record in (default: a new one in your state folder)."),
]
TierOption = Annotated[
    Tier | None,
    typer.Option("--tier", help="Use exactly this tier, where machine and policy allow it."),
]
ExplainOption = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Show the system calls a program was refused, and what would allow them; slower.",
    ),
]
RoleOption = Annotated[
    str | None, typer.Option("--role", help="The policy's role to run in (default: its tools).")
]
ObserveOption = Annotated[
    bool,
    typer.Option(
        "--observe",
        help="Record what no rule grants, and run it all the same in the default profile.",
    ),
]
OutcomeOption = Annotated[
    Path | None,
    typer.Option("--outcome", help="Write how the call ended to this file, as JSON."),
]
KeysOption = Annotated[
    list[str] | None,
    typer.Option("--key", help="A public key line you trust, or a file of such. Repeatable."),
]
TrustOption = Annotated[
    Path | None, typer.Option("--trust", help="A folder of *.pub files with such lines.")
]
OriginOption = Annotated[
    str | None, typer.Option("--origin", help="The log it must be, not just any of the key.")
]
WitnessPolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="A tlog-policy file of yours: logs, witnesses, quorum."),
]
OperatorOption = Annotated[
    list[str] | None,
    typer.Option("--operator", help="A witness of that file that is the operator's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TraceArgument = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace folder, or a name from `trace ls`.")
]
