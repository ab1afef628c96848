"""The command ``safeconduct-verify``: check traces and proofs with nothing else installed.

It is what the wheel of `make verifier` holds: no runtime, no policies, no native code. What it
prints is all a stranger needs; `safeconduct trace verify` says the same.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from safeconduct.attestation.proofs.handed_on import Handed, check_handed
from safeconduct.errors import Exit, TraceInvalid

from .bringing import ProgressLine, Wish, verify_wish
from .remembered import Memory, memory_folder

_PROGRAM: Final = "safeconduct-verify"
_KINDS: Final = ("trace", "proof", "bundle", "statement")
_ABOUT = """\
Check a trace folder, or a proof, session bundle or statement made from one. Offline.

  safeconduct-verify --key 'NAME+HASH+BASE64' TRACE-FOLDER
  safeconduct-verify --key 'NAME+HASH+BASE64' FILE.tlog-proof

The key line must come from the log's operator by another way than the trace: a key that came
with a log proves nothing about it. Exit codes: 0 verified, 10 tampered, 11 incomplete,
12 trust not established, 13 unreadable; 2 when the command line is wrong.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _KINDS:
        words = words[1:]  # what it is is seen anyway: a folder is a trace, a file says it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a log says may hold what the encoding lacks: it must not cost the verdict.
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(words)
    path: Path = options.path
    try:
        if not os.path.lexists(path):
            raise TraceInvalid(f"{path} does not exist", hint="name a trace folder or a proof file")
        return _trace(options) if os.path.isdir(path) else _file(options)
    except TraceInvalid as error:
        print(f"{_PROGRAM}: {_clean(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"  {_clean(error.hint)}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:
        # Python would try to write what is left once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.SIGNAL + 13
    except KeyboardInterrupt:
        return Exit.SIGNAL + 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a trace folder or a proof file")
    add = parser.add_argument
    add(
        "--key",
        action="append",
        default=[],
        metavar="KEY",
        help="a public key line you trust, or a file of such lines",
    )
    add("--trust", type=Path, metavar="DIR", help="a folder of *.pub files with such lines")
    add("--origin", help="the log it must be, not just any of the key")
    add(
        "--checkpoint",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a checkpoint of this log that you kept: it must be extended",
    )
    add("--policy", type=Path, metavar="FILE", help="a tlog-policy of yours: witnesses, quorum")
    add("--operator", action="append", default=[], help="a witness that is the operator's own")
    add("--entry", type=Path, metavar="FILE", help="the entry it must be about, or hold")
    add("--jobs", type=int, help="processes (default: one for each processor)")
    add("--no-remember", action="store_true", help="do not use or keep remembered checkpoints")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def _trace(options: argparse.Namespace) -> int:
    progress = ProgressLine()
    wish = Wish(
        trace=options.path,
        keys=options.key,
        trust=options.trust,
        origin=options.origin,
        checkpoints=options.checkpoint,
        policy=options.policy,
        operators=options.operator,
        memory=None if options.no_remember else Memory(memory_folder(os.environ)),
        jobs=options.jobs,
    )
    try:
        report = verify_wish(wish, progress)
    finally:
        progress.clear()
    if options.json:
        fields = {**asdict(report), "status": int(report.status), "verdict": report.status.name}
        print(json.dumps({**fields, "integrity": report.integrity, "complete": report.complete}))
    else:
        print("\n".join(report.lines(_PROGRAM)))
    return report.status


def _file(options: argparse.Namespace) -> int:
    handed = Handed(
        file=options.path,
        keys=options.key,
        trust=options.trust,
        origin=options.origin,
        policy=options.policy,
        operators=options.operator,
        entry=options.entry,
    )
    found = check_handed(handed)
    if options.json:
        fields = {**asdict(found), "status": int(found.status), "verdict": found.status.name}
        print(json.dumps(fields))
    else:
        print("\n".join(found.lines(_PROGRAM)))
    return found.status


def _clean(text: str) -> str:
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)


if __name__ == "__main__":
    sys.exit(main())
