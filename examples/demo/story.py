"""Prints the demo's story: short lines in columns, coloured on a terminal, plain in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.text import Text

from safeconduct import Tier
from safeconduct.attestation import Report

# LIMIT: characters of one line. Longer text is cut, so that hostile output cannot flood a terminal.
_LINE_CHARACTERS = 118
_LAYERS_A_LINE = 8
_STYLES: Final = {
    "allowed": "green",
    "denied": "red",
    "contained": "yellow",
    "verified": "green",
    "failed": "bold red",
    "skipped": "dim",
}


class Story:
    """Writes lines to standard output, each at once."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._console = Console(
            file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True
        )

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._started

    def banner(self, tier: Tier | None, layers: Iterable[str], held: dict[str, list[str]]) -> None:
        """Name the tier in force, its layers and how the limits hold."""
        names = list(layers)
        rows = [names[at : at + _LAYERS_A_LINE] for at in range(0, len(names), _LAYERS_A_LINE)]
        cgroups = [name for name in names if name.startswith("cgroup-v")]
        self._print("Safeconduct demo: an agent, its tools, and what holds them", style="bold")
        self.fact("tier", f"{tier}")
        for number, row in enumerate(rows):
            self.fact("" if number else "layers", " ".join(row))
        for how, limits in held.items():
            if limits:
                self.fact(f"by {how}", " ".join(limits))
        none = "none delegated to this process: limits hold as told above"
        self.fact("cgroups", cgroups[0] if cgroups else none)
        own = "root, so each sandbox has a user id of its own"
        self.fact("user", own if os.geteuid() == 0 else "an ordinary one")

    def chapter(self, letter: str, title: str) -> None:
        """Begin a part of the story."""
        self._console.print()
        self._print(f"({letter}) {title}", style="bold")

    def event(self, verdict: str, what: str, why: str) -> None:
        """Tell of one call: what was tried, the verdict, and what decided it."""
        self._print(f"  {verdict:<10}{what:<38}  {why}", style=_STYLES.get(verdict, ""), at=10)

    def say(self, text: str) -> None:
        """Tell something between the events."""
        self._print(f"  {text}")

    def fact(self, name: str, text: str) -> None:
        """Tell a fact under its name."""
        self._print(f"  {name:<12}{text}")

    def code(self, text: str) -> None:
        """Show a line to copy, uncut."""
        self._console.print(Text(f"  {text}"))

    def report(self, report: Report) -> None:
        """Show a verification: its verdict, where it failed, and what it cannot tell."""
        lines = report.lines()
        self.event("verified" if report.status == 0 else "failed", lines[0], "")
        for line in lines[1:]:
            if "NOT CHECKED" not in line:
                self._print(f"  {line}")

    def _print(self, line: str, *, style: str = "", at: int | None = None) -> None:
        text = Text(shown(line.rstrip(), _LINE_CHARACTERS))
        text.stylize(style, 0, None if at is None else at + 2)
        self._console.print(text)


def shown(text: str, characters: int) -> str:
    """Make untrusted text fit for a line of a terminal: no control characters, bounded."""
    plain = "".join(mark if mark.isprintable() else "?" for mark in text)
    return plain if len(plain) <= characters else plain[: characters - 3] + "..."
