"""(e) and (f) The audit: verify the trace, break a copy, judge the past by a stricter policy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from stage import Stage
from story import Story

from safeconduct import Error
from safeconduct.attestation import Opening, read_entries, read_opened, verify_trace
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.replay import replay_policy
from safeconduct.policies import load_policy

# The arguments that tell what a call is about.
_TELLING = ("path", "argv", "module", "function")
# LIMIT: calls listed one by one.
_LISTED_MAX = 12


def verify(stage: Stage, story: Story) -> None:
    """Verify the trace with the key, then a copy with one bit of one byte turned over."""
    report = verify_trace(stage.trace, [stage.key])
    story.report(report)
    if report.status != 0:
        raise Error("The demo's own trace does not verify.")
    copy = stage.root / "copy"
    shutil.copytree(stage.trace, copy)
    _flip(copy, b'"effect":"deny"')
    report = verify_trace(copy, [stage.key])
    if report.status == 0:
        raise Error("A changed trace passes.")
    first = report.findings[0]
    what = next(entry for index, entry in read_entries(stage.trace) if index == first.index)
    story.event("failed", "one bit flipped in a copy", f"{first.code}: {first.message}")
    story.fact("", f"  that is {what.kind} of call {what.body['call']} [{first.path}]")


def replay(stage: Stage, story: Story) -> None:
    """Judge every recorded call by the stricter policy and list those it would have refused."""
    policy = load_policy(stage.policy("strict.yaml"), workspace=stage.workspace)
    report = replay_policy(stage.trace, policy, vault=Vault.find(stage.vault_key))
    documents = dict(_arguments(stage))
    refused = [change for change in report.changes if change.new == "deny"]
    for change in refused[:_LISTED_MAX]:
        verdict = change.reason.partition(":")[0]
        what = f"entry {change.index:>3}  {change.tool}"
        story.event("denied", what, f"{verdict}: {documents.get(change.index, '')}")
    if len(refused) > _LISTED_MAX:
        story.fact("", f"and {len(refused) - _LISTED_MAX} more")
    story.fact(
        "replayed",
        f"{report.calls} calls: {len(refused)} would be refused, {report.same} judged alike, "
        f"{report.unjudged} by the operator, {len(report.undecidable)} undecidable",
    )
    if not refused:
        raise Error("The stricter policy refused nothing.")


def _arguments(stage: Stage) -> Iterator[tuple[int, str]]:
    """Yield what each recorded call was asked to do, from what opens its commitment."""
    vault = Vault.find(stage.vault_key)
    for index, entry, opened in read_opened(stage.trace, vault=vault):
        document = opened.get("document")
        if entry.kind != "call.intent" or not isinstance(document, Opening):
            continue
        # None where the call was refused before it had a canonical form.
        arguments: dict[str, object] = document.json()["arguments"] or {}
        named = (arguments.get(name) for name in _TELLING)
        told = " ".join(str(value) for value in named if value)
        yield index, told.replace(str(stage.workspace), "$WS")


def _flip(trace: Path, text: bytes) -> None:
    """Turn over one bit in the newest entries that hold ``text``."""
    bundles = [file for file in (trace / "tile" / "entries").rglob("*") if file.is_file()]
    bundle = max(bundles, key=lambda file: file.stat().st_size)
    data = bytearray(bundle.read_bytes())
    data[data.index(text) + len(text) - 3] ^= 0x01
    bundle.write_bytes(data)
