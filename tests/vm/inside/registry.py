"""The checks of the test machines by name: the outside asks for each one's result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

OLDEST, NEWER, NO_LANDLOCK = "oldest", "newer", "no-landlock"
STOCK = (OLDEST, NEWER)
# The ordinary user of a test machine.
USER_UID = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One function that runs inside, who runs it, in which kind of cgroup (cgroups.py).

    ``settings`` are those of sysctl(8) while it runs.
    """

    name: str
    boots: tuple[str, ...]
    uid: int
    scope: str
    run: Callable[[], None]
    settings: Mapping[str, str] = field(default_factory=dict[str, str])


CHECKS: dict[str, Check] = {}


def check(
    *boots: str,
    uids: tuple[int, ...] = (0,),
    scopes: tuple[str, ...] = ("session",),
    settings: Mapping[str, str] | None = None,
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function once for each user and each kind of cgroup."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        for uid in uids:
            for scope in scopes:
                name = "-".join((run.__name__, "user" if uid else "root", scope))
                CHECKS[name] = Check(
                    name=name, boots=boots, uid=uid, scope=scope, run=run, settings=settings or {}
                )
        return run

    return register
