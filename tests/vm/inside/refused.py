"""User namespaces refused by a setting: tier landlock where the kernel can, else nothing runs."""

from __future__ import annotations

import os
from pathlib import Path

from safeconduct.errors import Exit

from .desk import Done, execute, landlock_abi, layers, policy
from .registry import STOCK, USER_UID, check

_NONE_AT_ALL = {"user.max_user_namespaces": "0"}
_NOT_FOR_USERS = {"kernel.unprivileged_userns_clone": "0"}
# Signal scopes, without which one sandbox could end another (machine.py).
_ABI_ALONE = 6


@check(*STOCK, uids=(0, USER_UID), settings=_NONE_AT_ALL)
def no_user_namespaces_at_all() -> None:
    """Refused to everybody."""
    _less("user.max_user_namespaces")


@check(*STOCK, uids=(USER_UID,), settings=_NOT_FOR_USERS)
def no_user_namespaces_for_users() -> None:
    """Debian's own setting."""
    _less("kernel.unprivileged_userns_clone")


@check(*STOCK, settings=_NOT_FOR_USERS)
def root_and_a_setting_for_users() -> None:
    """Root gives up being root before it makes the namespace: it works, or it is refused and said.

    It must not depend on who asks: `doctor` and `exec` agree.
    """
    full = layers()["tier full"]["available"]
    done = execute(policy(require="tier: full"), "sh", "-c", "echo ran")
    if full:
        assert (done.code, done.out) == (Exit.OK, "ran\n"), done
    else:
        _refused(done)


def _less(knob: str) -> None:
    """Expect tier landlock, or a refusal that names the cause, and never a weaker start."""
    made = _made()
    told = layers()
    assert not told["tier full"]["available"], told["tier full"]
    if os.geteuid() != 0:
        assert knob in told["user namespaces"]["note"], told["user namespaces"]
        assert told["user namespaces"]["get"], told["user namespaces"]
    done = execute(policy(), "sh", "-c", f"echo ran; echo >{made}; cat /etc/shadow; true")
    if landlock_abi() >= _ABI_ALONE:
        assert told["tier landlock"]["used"], told["tier landlock"]
        assert (done.code, done.out) == (Exit.OK, "ran\n"), done
        confinement = done.outcome["confinement"]
        assert confinement["tier"] == "landlock", confinement
        assert not any(layer.endswith("-ns") for layer in confinement["layers"]), confinement
        made.unlink()
    else:
        assert not told["tier landlock"]["available"], told["tier landlock"]
        _refused(done)
    _refused(execute(policy(require="tier: full"), "sh", "-c", f"echo >{made}"))
    assert not made.exists()


def _made() -> Path:
    """Return a file that any program could make, were it run; root's is a stranger here.

    It is not at the top of the workspace: there tier landlock lets nothing new be made
    (docs/design/0003-protected-names-are-held.md).
    """
    folder = Path("out")
    folder.mkdir()
    for each in (Path.cwd(), folder):
        each.chmod(0o777)
    return folder / "made"


def _refused(done: Done) -> None:
    assert done.code == Exit.FAILURE, done
    assert done.outcome["error"]["code"] == "sandbox.unavailable", done
    # The line after the message is what to do.
    assert "doctor" in done.err, done
