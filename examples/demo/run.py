"""The demo, what ``make run`` shows: an agent's calls judged, confined, recorded and audited.

It leaves ``./demo-trace`` and prints the command that verifies it. Nothing else stays: no
process, no temporary folder, however it ends. Exit code 0 is a story told to its end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

_TRACE = "demo-trace"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130


def main() -> int:
    """Tell the story and clean up. An interrupt at any time ends it in order."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        return _run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nInterrupted: nothing is left running.", flush=True)
        return _INTERRUPTED
    finally:
        _end_children()


def _run(arguments: list[str]) -> int:
    # Imported late: loading takes longer than a second on a cold machine, and may be interrupted.
    from argparse import ArgumentParser

    from chapters import ContainmentFailed, leave, tell
    from stage import Refused, set_stage
    from story import Story

    from safeconduct import Error, Tier

    parser = ArgumentParser(description="The Safeconduct demo.")
    parser.add_argument("--tier", type=Tier, choices=list(Tier), help="use exactly this tier")
    options = parser.parse_args(arguments)
    story = Story()
    try:
        with set_stage(Path.cwd() / _TRACE, options.tier) as stage:
            tell(stage, story)
            leave(stage, story)
    except ContainmentFailed as failure:
        story.event("failed", "CONTAINMENT FAILED", str(failure))
        return 1
    except Refused as refusal:
        print(f"demo: {refusal}", file=sys.stderr)
        return 2
    except Error as error:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # What an interrupt broke is not told as a failure of its own.
            raise KeyboardInterrupt from error
        print(f"demo: {error} [{error.code}]", file=sys.stderr)
        return error.exit_code
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the story once; further signals do not disturb the cleaning up, which is bounded."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_children() -> None:
    """Kill what is left of our own processes, should an interrupt have hit the cleaning up."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


if __name__ == "__main__":
    sys.exit(main())
