"""Step "sandbox": what the overlays of a call and the sandbox around them say to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Final, Protocol, TypeVar

from safeconduct.call import KeptChanges
from safeconduct.errors import SandboxFailed

# LIMIT: how long a new sandbox may take to tell of its overlays.
_MOUNT_SECONDS: Final = 20.0


class Mounting(Protocol):
    """The line to a sandbox that is being made."""

    def tell(self, document: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send what it waits for."""
        ...

    def next(self, seconds: float | None = None) -> object | None:
        """Take its next message; None for one that came before its program ended."""
        ...

    def take_layers(self) -> list[int]:
        """Hand over the descriptors that it sent of its layers."""
        ...


class Waiting(Protocol):
    """A sandbox that is being made."""

    @property
    def channel(self) -> Mounting:
        """The line to it."""
        ...

    def close(self) -> None:
        """End it."""
        ...


WaitingT = TypeVar("WaitingT", bound=Waiting)


class Layers(Protocol):
    """What takes the changes of one call."""

    def mount(self, take: Callable[[], WaitingT]) -> WaitingT:
        """Have a sandbox made whose overlays begin now.

        ``take`` asks for one and waits for it. INVARIANT: it gives none that was made before: its
        overlays would still see what the base was then, and the snapshot would not tell.
        """
        ...

    def keep(self) -> tuple[KeptChanges, ...]:
        """Keep what is to be kept after this call. INVARIANT: all that it started has ended."""
        ...

    def close(self) -> None:
        """Let go of everything. May be called again."""
        ...


def arriving(channel: Mounting, count: int) -> Generator[int]:
    """Yield ``count`` descriptors of layers as the sandbox sends them; the caller owns each.

    They come in the order of the mounts, native/launcher/src/root.rs.
    """
    found: list[int] = []
    try:
        while count:
            if channel.next(_MOUNT_SECONDS) is not None:
                raise SandboxFailed("The sandbox ended before its program.", step="overlay")
            found += channel.take_layers()
            while found and count:
                count -= 1
                yield found.pop(0)
    finally:
        for fd in found:
            os.close(fd)
