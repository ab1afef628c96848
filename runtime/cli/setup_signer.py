"""What ``setup`` does so that the signer runs under a user id of its own.

A copy of the signer's code that only root can change, a user, a folder that only this user can
look into, and one sudo rule. docs/design/0010-signer-user.md says why. ``python -I -m
safeconduct.runtime.cli.setup_signer install|remove`` is what the step runs, as root.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from safeconduct import errors
from safeconduct.attestation.signing.signer_user import HOME, PROGRAM, USER
from safeconduct.errors import Error

from .setup_steps import MARK, State, Step, is_ours

SUDOERS = "/etc/sudoers.d/safeconduct-signer"
_SUDO = "/usr/bin/sudo"
_CODE = os.path.dirname(PROGRAM)
_OURS = ("__init__.py", "call.py", "errors.py", "mounts.py")
_FOLDERS = ("attestation", "attestation/signing", "attestation/proofs")
_FOREIGN = ("cryptography", "msgspec", "_cffi_backend")
_SECONDS = 60
_WHY = "without it the log key lies under your own user id, and so within reach of what you run"


def signer_step(root: Path) -> Step:
    """Return the step as it stands on the machine whose files lie below ``root``."""
    name = "signer user"
    module = [sys.executable, "-I", "-m", __name__]
    undo = [[*module, "remove"]]
    text = _rule()
    if _rule_in_force(root) == text:
        why = f"the signer runs as {USER}, with a key that only it can read"
        return Step(name=name, state=State.DONE, why=why, file=SUDOERS, text=text, undo=undo)
    if not os.path.lexists(root / _SUDO.lstrip("/")):
        why = f"{_WHY}; sudo, which would start it as another user, is not installed"
        return Step(name=name, state=State.IMPOSSIBLE, why=why)
    if interpreter() is None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        why = f"{_WHY}; it needs a {version} that only root can change, as in /usr/bin"
        return Step(name=name, state=State.IMPOSSIBLE, why=why)
    return Step(
        name=name,
        state=State.NEEDED,
        why=_WHY,
        file=SUDOERS,
        text=text,
        apply=[("visudo", "-cqf", SUDOERS), [*module, "install"]],
        undo=undo,
        warning=(
            f"it is a new key for every user: hand out the line of `safeconduct keys show` again; "
            f"what is installed now is copied to {_CODE}, so do this again after an upgrade; "
            f"--undo leaves {HOME} and the user, for the keys in it"
        ),
    )


def _rule_in_force(root: Path) -> str:
    """Return the rule as it was written; its copy beside the code, where only root may look."""
    file = SUDOERS if is_ours(root, SUDOERS) else f"{_CODE}/rule"
    folder = (root / SUDOERS.lstrip("/")).parent
    if file != SUDOERS and os.access(folder, os.R_OK | os.X_OK):
        return ""
    try:
        return (root / file.lstrip("/")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def interpreter() -> str | None:
    """Return an interpreter of our version that everybody may run and only root may change."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        path = Path(os.path.realpath(candidate))
        if _of_root(path) and _of_root(path.parents[1] / "lib" / version):
            return str(path)
    return None


def _of_root(path: Path) -> bool:
    """Tell whether only root can change what lies there, or put something else in its place."""
    for one in (path, *path.parents):
        try:
            status = one.stat()
        except OSError:
            return False
        if status.st_uid != 0 or status.st_mode & 0o022 or not status.st_mode & 0o001:
            return False
    return True


def _rule() -> str:
    return (
        f"{MARK}# code {_digest()}\n"
        # The channel is the program's standard input, a socket that no pty may stand in for.
        f"Defaults!{PROGRAM} env_reset, !use_pty, !requiretty, !log_input, !log_output\n"
        f'ALL ALL=({USER}) NOPASSWD: {PROGRAM} ""\n'
    )


def _files() -> Iterator[tuple[str, Path]]:
    """Yield (path below the copy, source) of everything that the signer loads."""
    package = Path(errors.__file__).parent
    sources = [package / name for name in _OURS]
    sources += sorted(path for folder in _FOLDERS for path in (package / folder).glob("*.py"))
    for source in sources:
        yield f"lib/safeconduct/{source.relative_to(package)}", source
    for name in _FOREIGN:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise Error(f"there is no {name} to copy.", code="setup.signer", hint="install it")
        origin = Path(spec.origin)
        folder = origin.parent
        if not spec.submodule_search_locations:
            yield f"lib/{origin.name}", origin
            continue
        for source in sorted(folder.rglob("*")):
            if source.suffix in (".py", ".so") and source.is_file():
                yield f"lib/{name}/{source.relative_to(folder)}", source


def _digest() -> str:
    """Hash what would be copied, so that an upgrade shows as a step to do."""
    digest = sha256((interpreter() or "").encode())
    for name, source in _files():
        digest.update(f"\n{name} {source.stat().st_size} ".encode())
        digest.update(sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def install() -> None:
    """Make user, folder and code. Run as root; done again it replaces the code."""
    python = interpreter()
    if python is None or os.geteuid() != 0:
        raise Error("This needs root and an interpreter of root's.", code="setup.signer")
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        _run(["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent",
              "--shell", "/usr/sbin/nologin", USER])  # fmt: skip
        user = pwd.getpwnam(USER)
    os.makedirs(HOME, mode=0o700, exist_ok=True)
    os.chown(HOME, user.pw_uid, user.pw_gid)
    os.chmod(HOME, 0o700)
    made = Path(tempfile.mkdtemp(prefix=".safeconduct-signer-", dir=os.path.dirname(_CODE)))
    try:
        _copy(made, python)
        _replace(made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def remove() -> None:
    """Remove the code; the keys stay, and so does the user whose uid guards them."""
    shutil.rmtree(_CODE, ignore_errors=True)


def _copy(target: Path, python: str) -> None:
    for name, source in _files():
        path = target / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        path.chmod(0o644)
    program = target / "run"
    # Neither environment nor site-packages of anybody have a say: -I and -S.
    program.write_text(
        f"#!{python} -IS\nimport os, sys\nsys.dont_write_bytecode = True\n"
        f"sys.path.insert(0, {f'{_CODE}/lib'!r})\n"
        "from safeconduct.attestation.signing.signer_user import main\n"
        "raise SystemExit(main(os.environ, sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    (target / "rule").write_text(_rule(), encoding="utf-8")
    (target / "rule").chmod(0o644)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(0o755)


def _replace(made: Path) -> None:
    old = made.with_name(made.name + ".old")
    if os.path.lexists(_CODE):
        os.rename(_CODE, old)
    os.rename(made, _CODE)
    shutil.rmtree(old, ignore_errors=True)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip()
        raise Error(f"{command[0]} failed: {why}", code="setup.signer", hint="run it yourself")


if __name__ == "__main__":
    try:
        {"install": install, "remove": remove}[sys.argv[1]]()
    except Error as failure:
        raise SystemExit(str(failure)) from failure
