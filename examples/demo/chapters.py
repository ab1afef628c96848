"""The chapters of the demo's story, in order, and what it leaves behind."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import agent
import attacks
import audit
import guest
import server
from stage import Stage
from story import Story

from safeconduct import Error, Runtime


class ContainmentFailed(Exception):
    """An attack got through."""


def tell(stage: Stage, story: Story) -> None:
    """Go through the chapters. The sessions of all policies are in one trace."""
    policy = stage.policy("policy.yaml")
    with stage.runtime(policy) as runtime:
        _banner(runtime, story)
        story.chapter("a", "An agent works: every call is judged, confined and recorded")
        agent.work(runtime, stage, story)
        story.chapter("b", "It turns hostile: what the policy does not grant is refused")
        with attacks.prepare(stage, runtime, policy) as prepared:
            for attack in prepared:
                _refuse(runtime, attack, story)
    _contain(stage, story)
    story.chapter("c", "A Wasm tool computes, and can do no more")
    with stage.runtime(policy) as runtime:
        guest.compute(runtime, stage, story)
    story.chapter("d", "A public MCP server, wrapped; the client is the official one")
    server.drive(stage, story)
    story.chapter("e", "Anybody with the public key verifies the trace")
    audit.verify(stage, story)
    story.chapter("f", "A stricter policy judges the same calls again; nothing runs")
    audit.replay(stage, story)


def _banner(runtime: Runtime, story: Story) -> None:
    confinement = runtime.confinement
    held: dict[str, list[str]] = {}
    for limit, how in confinement.held.items():
        held.setdefault(str(how), []).append(limit)
    story.banner(confinement.tier, confinement.layers, held)


def _refuse(runtime: Runtime, attack: attacks.Attack, story: Story) -> None:
    why = attacks.refused(runtime, attack)
    if not why:
        raise ContainmentFailed(f"{attack.name}: the policy let it pass")
    story.event("denied", attack.name, why)


def _contain(stage: Stage, story: Story) -> None:
    """Allow every attack by a policy that is too wide, and look from outside what came of it."""
    wide = stage.policy("wide.yaml")
    with stage.runtime(wide) as runtime, attacks.prepare(stage, runtime, wide) as prepared:
        controls = [attack for attack in prepared if attack.control]
        useless = [one.name for one in controls if not one.works_unconfined(stage.workspace)]
        if useless:
            raise Error(f"Without a sandbox this must work, and does not: {', '.join(useless)}.")
        story.say(
            f"Without a sandbox {len(controls)} of them succeed (the fork bomb is not tried)."
        )
        story.say(
            "A policy that is too wide now allows all. Looked at from outside, none gets through:"
        )
        for attack in prepared:
            result = attacks.confined(runtime, attack)
            if result.broken:
                raise ContainmentFailed(f"{attack.name}: {result.broken} ({result.held})")
            story.event("contained", attack.name, result.held)


def leave(stage: Stage, story: Story) -> None:
    """Say what stays. The private key is gone, so nobody can extend this trace."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = folder / "safeconduct-demo" / f"{stage.trace.name}.pub"
    try:
        # Never inside the trace: who can change a trace could change a key beside it as well.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(stage.key + "\n")
        kept = f"also in {file}"
    except OSError as error:
        kept = f"not kept in a file: {error.strerror}"
    installed = Path(sys.executable).with_name("safeconduct")
    words = [installed] if installed.exists() else [Path(sys.executable), "-m", "safeconduct"]
    program = shlex.join(_short(word) for word in words)
    story.chapter("*", f"Done in {story.seconds:.0f} s. Verify it yourself (the key is {kept}):")
    story.code(f"{program} trace verify ./{stage.trace.name} --key '{stage.key}'")


def _short(word: Path | str) -> str:
    """Spell a program as one would type it here."""
    near = isinstance(word, Path) and word.is_relative_to(Path.cwd())
    return os.path.relpath(word) if near else str(word)
