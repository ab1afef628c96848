"""Step "record": a passphrase kept in the kernel's keyring of this user, for a while.

A key of type "user" in the user keyring (keyrings(7), user-keyring(7)), gone after its time or at
the next boot. Every process of this uid outside our sandboxes can read it, as with an agent for
ssh keys: what it saves is typing, and a file. Our sandboxes have no keyctl(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
from hashlib import sha256
from typing import Final

from safeconduct.errors import TraceInvalid

# Numbers of add_key and keyctl: x86-64 has its own table, others the generic one (syscalls(2)).
_CALLS: Final = {"x86_64": (248, 250), "aarch64": (217, 219), "riscv64": (217, 219)}
_USER_KEYRING: Final = -4  # KEY_SPEC_USER_KEYRING, keyctl(2)
_SET_PERMISSIONS, _UNLINK, _SEARCH, _READ, _SET_TIMEOUT = 5, 9, 10, 11, 15
# Possessor: all. User: view, read, search, as not every session possesses its user keyring.
_PERMISSIONS: Final = 0x3F0B0000
# LIMIT: what a passphrase may have (protected_key.py), and one more to see that it has not more.
_MAX_BYTES: Final = 1025
_TYPE: Final = b"user"


def keep(line: str, passphrase: bytes, *, seconds: int) -> None:
    """Keep the passphrase of the key with this public line. Raise ``key.keyring``."""
    name = _name(line)
    key = _call(0, _TYPE, name, passphrase, len(passphrase), _USER_KEYRING)
    if key >= 0 and _keyctl(_SET_PERMISSIONS, key, _PERMISSIONS) >= 0:
        if _keyctl(_SET_TIMEOUT, key, seconds) >= 0:
            return
        forget(line)
    raise TraceInvalid(
        f"the kernel keeps no passphrase here: {os.strerror(ctypes.get_errno())}",
        code="key.keyring",
        hint="set SAFECONDUCT_KEY_PASSPHRASE_FILE instead",
    )


def kept(line: str) -> bytes | None:
    """Return the passphrase kept for this key, or None."""
    key = _keyctl(_SEARCH, _USER_KEYRING, _TYPE, _name(line), 0)
    if key < 0:
        return None
    buffer = ctypes.create_string_buffer(_MAX_BYTES)
    size = _keyctl(_READ, key, buffer, _MAX_BYTES)
    return buffer.raw[:size] if 0 < size < _MAX_BYTES else None


def forget(line: str) -> bool:
    """Forget it; tell whether there was something to forget."""
    key = _keyctl(_SEARCH, _USER_KEYRING, _TYPE, _name(line), 0)
    return key >= 0 and _keyctl(_UNLINK, key, _USER_KEYRING) >= 0


def _name(line: str) -> bytes:
    """Return what the kernel calls it: the key's name, which a rotation does not change."""
    name = line.partition("+")[0]
    return b"safeconduct:" + sha256(name.encode()).hexdigest()[:32].encode()


def _keyctl(operation: int, *arguments: object) -> int:
    return _call(1, operation, *arguments)


def _call(which: int, *arguments: object) -> int:
    """Make one of the two calls; -1 and errno where the kernel, or a filter, has it not."""
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        return -1
    # SAFETY: add_key and keyctl read and write only the buffers given here, whose sizes they are
    # told; libc.syscall is variadic, so each integer is passed as a long.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    long = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(libc.syscall(ctypes.c_long(numbers[which]), *long))
