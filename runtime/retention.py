"""Retention by age: erase what this user's traces open to, once it is as old as the policy says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.attestation.privacy.elapsed import newest_ms
from safeconduct.attestation.privacy.erasure import has_openings, keep_retention
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.errors import TraceInvalid

from .places import Places

# LIMIT: traces looked at in one go, the oldest names first.
_TRACES_MAX = 10_000


def kept_traces(places: Places, *, before_ms: int) -> list[Path]:
    """Return the traces in the state folder with openings that may be that old; no links."""
    paths = sorted(places.traces.glob("*"))[:_TRACES_MAX]
    return [path for path in paths if _is_trace(path) and has_openings(path, before_ms=before_ms)]


def keep_terms(
    writer: TraceWriter, *, places: Places, trace: Path, days: int, now_ms: int,
    signer: SignerClient, vault: Vault, tell: Callable[[str], object],
) -> None:  # fmt: skip
    """Erase what is older than so many days: in the trace that is written, and in all others.

    A clock that seems wrong is told, erases nothing, and keeps nobody from working.
    """
    try:
        keep_retention(writer, days=days, now_ms=now_ms, seen_ms=partial(_newest, places))
    except TraceInvalid as error:
        if error.code != "retention.clock":
            raise
        tell(_not_erased(trace, days, error))
    expire_kept(
        places, besides=trace, days=days, now_ms=now_ms, signer=signer, vault=vault, tell=tell
    )


def expire_kept(
    places: Places,
    *,
    besides: Path,
    days: int,
    now_ms: int,
    signer: SignerClient,
    vault: Vault,
    tell: Callable[[str], object],
) -> None:
    """Erase what is older than so many days in all traces of the state folder but one.

    A trace that another runtime writes is left to that one; what else keeps one from being erased
    is told, and keeps nobody from working.
    """
    seen = cache(partial(_newest, places))
    for path in kept_traces(places, before_ms=now_ms - days * 86_400_000):
        if path.resolve() == besides.resolve():
            continue
        try:
            with TraceWriter.open(path, signer=signer, vault=vault) as writer:
                keep_retention(writer, days=days, now_ms=now_ms, seen_ms=seen)
        except TraceInvalid as error:
            if error.code != "trace.locked":
                tell(_not_erased(path, days, error))


def _newest(places: Places) -> frozenset[int]:
    """Return when this user's traces were last written, by their own entries."""
    paths = sorted(places.traces.glob("*"))[:_TRACES_MAX]
    found = (newest_ms(path) for path in paths if _is_trace(path))
    return frozenset(time for time in found if time is not None)


def _not_erased(path: Path, days: int, error: TraceInvalid) -> str:
    why = f"{error.message}; {error.hint}" if error.hint else error.message
    return f"{path.name} is older than {days} days and was not erased: {why}"


def _is_trace(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / "checkpoint").exists()
