"""What a program can do to its init, and to the sandbox after it, without being large itself."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Tier
from safeconduct.runtime.sandbox.cgroup import Cgroups

if TYPE_CHECKING:
    from tests.conftest import Box

# Fills a file and has next to no memory of its own.
SMALL = """
#include <fcntl.h>
#include <unistd.h>
static char page[4096];
int main(void) {
    int file = open("/tmp/filled", O_CREAT | O_WRONLY, 0600);
    for (int n = 0; n < 12000; n++) if (write(file, page, sizeof page) < 0) return 3;
    return 0;
}
"""


def test_memory_that_a_small_program_uses_up_is_named(
    box: Box, cgroups: Cgroups | None, tmp_path: Path
) -> None:
    """The kernel ends what has most memory of its own, which here was our init."""
    if cgroups is None or box.tier is not Tier.FULL:
        pytest.skip("needs a cgroup, and a tmpfs that counts towards its memory")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (tmp_path / "small.c").write_text(SMALL)
    build = ["gcc", "-O1", "-static", "-o", str(box.workspace / "small"), "small.c"]
    subprocess.run(build, check=True, cwd=tmp_path)
    ample = Limits(wall_ms=20_000, memory_bytes=256 << 20)
    assert box.run("./small", limits=ample).ok
    for _ in range(3):
        tight = replace(ample, memory_bytes=24 << 20)
        assert box.run("./small", limits=tight).limit == "memory"


def test_flags_of_stdin_are_not_those_of_the_next_call(box: Box) -> None:
    code = """
import fcntl, os
flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in range(3)]
print(any(found & os.O_APPEND for found in flags))
for fd, found in enumerate(flags): fcntl.fcntl(fd, fcntl.F_SETFL, found | os.O_APPEND)
"""
    for _ in range(3):
        assert box.python(code).stdout == b"False\n"


def test_what_a_call_met_between_two_looks_is_named(box: Box) -> None:
    tight = Limits(wall_ms=20_000, disk_bytes=8 << 20)
    code = "with open('whole', 'wb', buffering=0) as file: file.write(bytes(SIZE)); os.fsync(file)"
    full = box.python(f"import os\nSIZE = 9 << 20\n{code}\nraise SystemExit(3)", limits=tight)
    assert (full.exit_code, full.limit) == (3, "disk")
    (box.workspace / "whole").unlink()
    small = box.python(f"import os\nSIZE = 1 << 20\n{code}\nraise SystemExit(3)", limits=tight)
    assert (small.exit_code, small.limit) == (3, None)
