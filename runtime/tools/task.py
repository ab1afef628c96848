"""Step "execute": what a tool is handed, after the Call was judged and its intent recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from safeconduct.call import Document, Profile

Sink = Callable[[str, bytes], None]


class Object(Protocol):
    """A path argument as it was judged: an O_PATH descriptor, or the folder to create it in."""

    @property
    def path(self) -> str:
        """The absolute real path that was judged."""
        ...

    @property
    def fd(self) -> int | None:
        """Descriptor of the object, or None where it does not exist yet."""
        ...

    @property
    def parent_fd(self) -> int | None:
        """Descriptor of the folder to create it in."""
        ...

    @property
    def name(self) -> str | None:
        """Name to create."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One judged Call, ready to run. ``hides`` says which absolute paths must stay absent."""

    call: str
    document: Document
    profile: Profile
    objects: Mapping[str, Object] = field(default_factory=dict[str, Object])
    hides: Callable[[str], bool] = lambda _: False
    sink: Sink | None = None
