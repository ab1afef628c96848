"""The signer under a user id of its own: started through sudo, one key for each user who calls.

``safeconduct setup --apply`` puts a copy of this package, which only root can change, below
``/usr/lib/safeconduct-signer`` and lets users start ``run`` there, without arguments, as the user
``safeconduct-signer``. Keys and memory lie where only that user can look. So started it ends no
key: every program of the user may ask it.
docs/design/0010-signer-user.md says why it is done so.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from safeconduct.errors import TraceInvalid

from .key import write_key
from .signer_process import serve
from .signer_request import ANSWER_BAD, error_frame, send

USER: Final = "safeconduct-signer"
PROGRAM: Final = "/usr/lib/safeconduct-signer/run"
ROTATE: Final = "rotate"
HOME: Final = "/var/lib/safeconduct-signer"
# LIMIT: what the kernel gives as a uid; -1 means none.
_MAX_UID = 2**32 - 2


def main(
    environment: Mapping[str, str], arguments: Sequence[str] = (), home: Path = Path(HOME)
) -> int:
    """Serve the user who called sudo; the channel is descriptor 0.

    With the argument ``rotate`` the key may be ended too. The rule that needs no password allows
    no argument, so that this takes the sudo rights which an operator has anyway.
    """
    channel = socket.socket(fileno=0)
    os.umask(0o077)
    try:
        if list(arguments) not in ([], [ROTATE]):
            raise TraceInvalid("the signer does not know its arguments", code="signer.user")
        folder = _folder(environment, home)
        key = folder / "log.key"
        if not key.exists():
            _make_key(key)
    except TraceInvalid as error:
        send(channel, ANSWER_BAD + error_frame(error))
        return 1
    except OSError as error:
        lost = TraceInvalid(f"the signer's folder: {error.strerror}", code="signer.state")
        send(channel, ANSWER_BAD + error_frame(lost))
        return 1
    return serve(channel, key, folder / "state", rotates=list(arguments) == [ROTATE])


def _folder(environment: Mapping[str, str], home: Path) -> Path:
    """Return the caller's folder. sudo(8) sets SUDO_UID itself, whatever the caller says."""
    caller = environment.get("SUDO_UID", "")
    if not caller.isdecimal() or not caller.isascii() or int(caller) > _MAX_UID:
        raise TraceInvalid("not started through sudo", code="signer.user")
    if os.geteuid() in (0, int(caller)) or os.getuid() != os.geteuid():
        raise TraceInvalid(f"not running as {USER}", code="signer.user")
    folder = home / str(int(caller))
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _make_key(key: Path) -> None:
    try:
        write_key(key, f"safeconduct-{secrets.token_hex(4)}")
    except TraceInvalid as error:
        if error.code != "key.exists":  # another signer of the same user was faster
            raise
