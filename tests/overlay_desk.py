"""A runtime over one workspace whose profiles have overlays, and all that it records."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.overlay_kit import fill

from safeconduct.attestation import TraceWriter
from safeconduct.call import EntryKind, Json, KeptChanges, Outcome, Tier
from safeconduct.runtime.supervisor import Runtime

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**", "OTHER/**"], write: ["$WS/**"], workspace: overlay, limits: LIMITS}
  parts: {like: base, write: ["$WS/sub/**", "$WS/.github/**"]}
  apart: {like: base, write: ["$WS/**", "APART/**"]}
  plain: {read: ["$WS/**", "OTHER/**"], write: ["$WS/**"], limits: {wall: 20s}}
  file: {read: ["$WS/**"], write: ["$WS/file"], workspace: overlay}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.list: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}}
  python.run: {allow: {code: any}}
  shell.run:
    - {allow: {argv: [sh, -c, any]}}
    - {allow: {argv: [dash, -c, any]}, profile: parts}
    - {allow: {argv: [bash, -c, any]}, profile: apart}
    - {allow: {argv: [env, sh, -c, any]}, profile: plain}
    - {allow: {argv: [env, dash, -c, any]}, profile: file}
"""
FILES = {
    "file": "file\n",
    "sub/inner": "inner\n",
    "sub/other": "other\n",
    ".git/HEAD": "ref: refs/heads/main\n",
    ".git/config": "[core]\n",
}


@dataclass(frozen=True)
class Entry:
    """What the real writer was given."""

    kind: EntryKind
    body: Mapping[str, object]
    committed: Mapping[str, object]


@dataclass
class Desk:
    """A runtime over one workspace, and folders beside it."""

    folder: Path
    runtime: Runtime
    state: Path
    limits: str = "{wall: 20s}"
    entries: list[Entry] = field(default_factory=list[Entry])

    def last(self, kind: EntryKind) -> Entry:
        """Return what was last recorded of this kind."""
        return [entry for entry in self.entries if entry.kind is kind][-1]

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    def run(
        self,
        script: str,
        *,
        under: tuple[str, ...] = ("sh",),
        seen: Callable[[], None] | None = None,
    ) -> Outcome:
        """Run a script; ``seen`` is called as soon as it has printed something."""
        call = self.runtime.new_call("shell.run", {"argv": [*under, "-c", script]})
        return self.runtime.perform(call, sink=lambda stream, data: seen() if seen else None)

    def kept(self, script: str, *, under: tuple[str, ...] = ("sh",)) -> KeptChanges:
        """Run a script that must succeed and leave one set."""
        outcome = self.run(script, under=under)
        assert outcome.ok, outcome.stderr
        (kept,) = outcome.changes
        return kept


def policy_of(folder: Path, limits: str, policy: str = POLICY) -> str:
    """Return the policy with the folders of one desk."""
    text = policy.replace("OTHER", str(folder / "other")).replace("APART", str(folder / "apart"))
    return text.replace("LIMITS", limits)


@contextmanager
def seated(
    monkeypatch: pytest.MonkeyPatch, limits: str = "{wall: 20s}", policy: str = POLICY
) -> Generator[Desk]:
    """Make a workspace and start a runtime over it; skip where there are no overlays."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="calls-", dir="/var/tmp")))
    folder.chmod(0o755)
    for name in ("workspace", "other", "apart", "state"):
        (folder / name).mkdir()
    fill(folder / "workspace", FILES)
    (folder / "policy.yaml").write_text(policy_of(folder, limits, policy))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        entries: list[Entry] = []
        real = TraceWriter.append

        def append(
            writer: TraceWriter,
            kind: EntryKind,
            body: Mapping[str, Json],
            *,
            session: str,
            committed: Mapping[str, Json | bytes] | None = None,
            **options: object,
        ) -> object:
            entries.append(Entry(kind, body, committed or {}))
            return real(writer, kind, body, session=session, committed=committed, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(TraceWriter, "append", append)
        runtime = stack.enter_context(start(folder))
        if runtime.confinement.tier is not Tier.FULL:
            pytest.skip("needs tier full: an overlay is a mount")
        yield Desk(folder, runtime, folder / "state", entries=entries)


def start(folder: Path, tier: Tier | None = None) -> Runtime:
    """Start a runtime over the workspace of a desk."""
    return Runtime.from_policy(
        folder / "policy.yaml",
        workspace=folder / "workspace",
        tier=tier,
        environment={**os.environ, "XDG_STATE_HOME": str(folder / "state")},
    )
