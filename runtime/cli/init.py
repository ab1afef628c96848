"""``safeconduct init``: write a first policy for a project from a preset."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit, PolicyError
from safeconduct.policies import PRESETS, read_preset
from safeconduct.policies.preset import read_preset_tests

from .places import refuse_inside_sandbox
from .terminal import print_line, tell

_FOLDER, _FILE, _TESTS = ".safeconduct", "policy.yaml", "policy.test.yaml"
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEFAULT = next(iter(PRESETS))


def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="The project.")] = Path("."),
    preset: Annotated[
        str,
        typer.Option("--preset", metavar="NAME", help=f"One of: {', '.join(PRESETS)}; see --list."),
    ] = _DEFAULT,
    listing: Annotated[
        bool, typer.Option("--list", help="Say what each preset is for, and write nothing.")
    ] = False,
) -> int:
    """Write .safeconduct/policy.yaml from a preset, with its tests beside it.

    An existing file is never overwritten.
    """
    if listing:
        for name, purpose in PRESETS.items():
            print_line(f"{name:<18} {purpose}")
        return Exit.OK
    refuse_inside_sandbox("init")
    data, tests = read_preset(preset), read_preset_tests(preset)
    path = directory / _FOLDER / _FILE
    try:
        _write(directory, data, tests)
    except FileExistsError as error:
        raise PolicyError(
            "there is a policy already",
            file=str(path),
            code="policy.exists",
            hint="edit it, or remove it first",
        ) from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(
            f"cannot be written: {why}",
            file=str(path),
            code="policy.unwritable",
            hint="name a folder you can write to",
        ) from error
    print_line(str(path))
    tell("next: read it, then check and test it", f"safeconduct policy check {path}")
    tell(f"and: safeconduct policy test {path}", f"edit its tests with it: {_TESTS} beside it")
    tell(f"then: safeconduct trust {path}", "and: safeconduct exec -- COMMAND")
    return Exit.OK


def _write(directory: Path, data: bytes, tests: bytes) -> None:
    """Write the files through descriptors, so that a link in the project leads nowhere else."""
    project = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(FileExistsError):  # it must be a folder then: opening it says so
            os.mkdir(_FOLDER, 0o755, dir_fd=project)
        folder = os.open(_FOLDER, _OPEN_FOLDER, dir_fd=project)
        try:
            _create(folder, _FILE, data)
            with suppress(FileExistsError):  # tests that a person has written already
                _create(folder, _TESTS, tests)
        finally:
            os.close(folder)
    finally:
        os.close(project)


def _create(folder: int, name: str, data: bytes) -> None:
    with os.fdopen(os.open(name, _CREATE, 0o644, dir_fd=folder), "wb") as file:
        file.write(data)
