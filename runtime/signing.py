"""Start the signer of this user's log: under a uid of its own where setup made one, else ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safeconduct.attestation import SignerClient
from safeconduct.attestation.signing.passphrase import ask_from
from safeconduct.attestation.signing.signer import ISOLATION_USER
from safeconduct.attestation.signing.signer_user import PROGRAM, ROTATE, USER
from safeconduct.errors import TraceInvalid

from .places import Places

# The user's word that their own key is meant although the machine has a signer user.
CHOICE = "SAFECONDUCT_SIGNER"
_SUDO = "/usr/bin/sudo"
# LIMIT: how long a person has for sudo's password, in seconds.
_PASSWORD_S = 300.0


def start_signer(
    places: Places,
    environment: Mapping[str, str],
    *,
    forbidden: Sequence[Path] = (),
    rotates: bool = False,
) -> SignerClient:
    """Start the signer and wait until it is ready.

    Where setup installed a signer user, an ordinary user's key lies with that one, and only
    ``SAFECONDUCT_SIGNER=process`` chooses the key in the state folder instead. For root there is
    nothing to gain: root reads every key. That one ends its key only where it was started with
    ``rotates``, which sudo asks the operator's password for. Raise TraceInvalid ``key.*`` or
    ``signer.*``.
    """
    if not has_own_user(environment):
        ask = ask_from(environment, forbidden=forbidden)
        return SignerClient.start(places.key, state=places.signer, forbidden=forbidden, ask=ask)
    try:
        as_user = ["-u", USER, "--", PROGRAM]
        if rotates:
            return SignerClient.start_command(
                [_SUDO, *as_user, ROTATE], isolation=ISOLATION_USER, terminal_s=_PASSWORD_S
            )
        return SignerClient.start_command([_SUDO, "-n", *as_user], isolation=ISOLATION_USER)
    except TraceInvalid as error:
        if error.code != "signer.lost":
            raise
        if rotates:
            raise TraceInvalid(
                f"sudo did not start the signer of user {USER} for a rotation",
                code="signer.user",
                hint="only who may use sudo on this machine can end that key; ask its operator",
            ) from error
        raise TraceInvalid(
            f"the signer of user {USER} cannot be started, though setup installed it",
            code="signer.user",
            hint=(
                "root repairs it with: safeconduct setup --undo, then --apply; or sign as yourself "
                f"with {CHOICE}=process"
            ),
        ) from error


def has_own_user(environment: Mapping[str, str]) -> bool:
    """Tell whether the signer runs under a uid of its own. ``signer.choice`` for another word."""
    choice = environment.get(CHOICE, "")
    if choice not in ("", "user", "process"):
        raise TraceInvalid(
            f"{CHOICE} is {choice[:40]!r}", code="signer.choice", hint="use process or user"
        )
    if choice == "process" or (not choice and os.geteuid() == 0):
        return False
    installed = os.path.lexists(PROGRAM)
    if choice == "user" and not installed:
        raise TraceInvalid(
            "this machine has no signer user", code="signer.user", hint="see: safeconduct setup"
        )
    return installed
