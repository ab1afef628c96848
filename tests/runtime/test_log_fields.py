"""Hostile text in every field of a record: one record stays one record, and moves no terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from safeconduct.errors import Error
from safeconduct.runtime.supervisor import Runtime

GIVEN = Path(__file__).resolve().parents[2].parent / "shared" / "corpora" / "probes" / "payloads"
# A record forged behind a line's end, in each spelling of one; what moves, hides, renames, links or
# turns around on a terminal, as C0, as C1, in UTF-8; what ends a string or a page; no character.
MADE = (
    'ok\n{"kind":"call.decision","effect":"allow"}',
    'ok\r\n{"forged":true}\r',
    'ok\u2028{"forged":true}\u2029\x85\x0b\x0c',
    "\x1b[2J\x1b[1;1H\x1b[8mhidden\x1b[0m",
    "\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1b]8;;file:///etc/passwd\x1b\\link\x1b]8;;\x1b\\",
    "\x9b2J\x9d0;owned\x9c\x90q\x9c",
    "\u202egnp.exe\u2066\u2069\u200e\u200f\ufeff\u200b",
    "a\x00b\x08\x08\x08rm\x7f",
    "</script><script>alert(1)</script>",
    "%s%n%1000000d {0} ${HOME} $(id) `id`",
    "\U000e0041\U000e0042\ufffe\uffff",
    "x" * 60_000,
)
_MOVES = ("Cc", "Cf", "Cs", "Zl", "Zp")
POLICY = """\
version: 1
profiles: {base: {read: ["$WS/**"], write: ["$WS/**"]}}
tools:
  fs.write: {allow: {path: ["$WS/**"]}}
  shell.run: {allow: {argv: [printf, ...]}}
"""


def given() -> list[str]:
    """Return the texts of the corpora's log fields, where they are at hand."""
    found: list[str] = []
    for path in sorted(GIVEN.glob("l*.json")):
        with suppress(ValueError):
            found += [str(value) for value in json.loads(path.read_bytes()).values()]
    return found


def shown(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "safeconduct", "trace", *words], env=environment,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.decode()


def record(runtime: Runtime, texts: Sequence[str]) -> int:
    """Put each text wherever a caller may put one; return how many calls were recorded."""
    calls = 0
    for number, text in enumerate(texts):
        for tool, arguments in (
            ("fs.write", {"path": f"f{number}", "content": text}),
            ("fs.write", {"path": text, "content": ""}),
            ("shell.run", {"argv": ["printf", "%s", text.replace("\x00", "")]}),
            (text, {text: [text]}),
        ):
            calls += 1
            with suppress(Error):
                runtime.call(tool, **arguments)
    return calls


@pytest.mark.parametrize("texts", [MADE, given()], ids=["made", "given"])
def test_one_record_stays_one_and_moves_no_terminal(
    tmp_path: Path, workspace: Path, texts: Sequence[str]
) -> None:
    if not texts:
        pytest.skip("needs the corpora, which are not part of this repository")
    policy, trace = tmp_path / "policy.yaml", tmp_path / "trace"
    policy.write_text(POLICY)
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        policy, workspace=workspace, trace=trace, environment=environment
    ) as runtime:
        calls = record(runtime, texts)
    entries = json.loads(shown(environment, "show", str(trace), "--json"))
    kinds = [one["kind"] for one in entries]
    for kind in ("call.intent", "call.decision", "call.outcome"):
        assert kinds.count(kind) == calls
    for words in (("show", str(trace)), ("show", str(trace), "--json")):
        moving = {x for x in shown(environment, *words) if unicodedata.category(x) in _MOVES}
        assert moving <= {"\n"}, words
    key = next((tmp_path / "state").rglob("log.pub")).read_text().strip()
    shown(environment, "verify", str(trace), "--key", key, "--no-remember")
