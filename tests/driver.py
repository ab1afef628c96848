"""Run programs through the product, one per line of stdin, as whoever started this.

A line is the argv as JSON; the answer is one line of JSON with what came of it. Tests start it
where the product has to run as another user, or on another machine, than the tests themselves.
"""

from __future__ import annotations

import json
import os
import sys

from safeconduct.call import Tier
from safeconduct.errors import Error
from safeconduct.runtime.supervisor import Runtime


def main(policy: str, workspace: str, tier: str) -> None:
    """Say which tier is in force or why it is not, then answer until stdin ends."""
    trace = f"{os.environ['HOME']}/trace"
    try:
        runtime = Runtime.from_policy(
            policy, workspace=workspace, trace=trace, tier=Tier(tier), environment=os.environ
        )
    except Error as error:
        print(json.dumps({"refused": f"{error.code}: {error.message}"}), flush=True)
        return
    with runtime:
        print(json.dumps({"ready": str(runtime.confinement.tier)}), flush=True)
        for line in sys.stdin:
            argv: list[str] = json.loads(line)
            print(json.dumps(answer(runtime, argv)), flush=True)


def answer(runtime: Runtime, argv: list[str]) -> dict[str, str]:
    """Perform one Call and say what came of it."""
    try:
        outcome = runtime.perform(runtime.new_call("shell.run", {"argv": argv}))
    except Error as error:
        return {"output": error.message, "end": f"error {error.code}"}
    output = (outcome.stdout + outcome.stderr).decode(errors="replace")
    return {"output": output, "end": str(outcome.limit or outcome.exit_code)}


if __name__ == "__main__":
    main(*sys.argv[1:])
