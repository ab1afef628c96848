"""Real shells as judges of what a text means: which programs run with which words, which files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# No name of these does harm, should a shell take it for its own instead.
PROGRAMS = ("a", "b", "c", "echo", "test", "printf", "x y", "if", "cd")
BASH = ("bash", "--norc", "--noprofile", "-c")
# As a `/bin/sh` that is bash: the mode of POSIX.
BASH_AS_SH = ("bash", "--posix", "--norc", "--noprofile", "-c")
DASH = ("dash", "-c")
BUSYBOX = ("busybox", "sh", "-c")
SHELLS = tuple(shell for shell in (DASH, BASH, BASH_AS_SH, BUSYBOX) if shutil.which(shell[0]))
# Built to prefer its own applets, busybox runs those as the programs.
SEARCHING = tuple(shell for shell in SHELLS if shell is not BUSYBOX)
_SHIM = '#!/bin/sh\nprintf \'%s\\0\' "$#" "${0##*/}" "$@" >>"$LOG"\n'
_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Ran:
    """What ran: the argv of every program, sorted, and the files that there are afterwards."""

    programs: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]


class Bench:
    """A folder of programs that only write down their argv. Nothing else is in their PATH."""

    def __init__(self, folder: Path) -> None:
        self._shims = folder / "shims"
        self._shims.mkdir()
        for name in PROGRAMS:
            shim = self._shims / name
            shim.write_text(_SHIM)
            shim.chmod(0o755)

    def run(
        self, shell: Sequence[str], text: str | Callable[[str], str], *, files: Sequence[str] = ()
    ) -> Ran:
        """Run a text in a folder that holds ``files``; it may be made for that folder."""
        path = shutil.which(shell[0])
        assert path is not None
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as log:
            for name in files:
                Path(folder, name).touch()
            environment = {"PATH": str(self._shims), "HOME": "/home-of-nobody", "LOG": log.name}
            subprocess.run(
                [path, *shell[1:], text if isinstance(text, str) else text(folder)],
                cwd=folder,
                env=environment | {"LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                check=False,
            )
            return Ran(tuple(sorted(_parse(log.read()))), tuple(sorted(os.listdir(folder))))


def _parse(data: bytes) -> list[tuple[str, ...]]:
    words = data.decode("utf-8", "surrogateescape").split("\0")[:-1]
    found: list[tuple[str, ...]] = []
    while words:
        count = int(words[0]) + 2
        found.append(tuple(words[1:count]))
        words = words[count:]
    return found
