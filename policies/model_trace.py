"""Policy step 2: the shape of `trace`: how the log of a session is kept."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from safeconduct.call import Durability

from .model_words import MAX_PATTERNS, Model, ToolName
from .units import parse_duration_ms, parse_size_bytes

# LIMIT: how long an entry may wait for the disk, how much a log may hold, how long it is kept.
MAX_BATCH_MS = 1000
MIN_QUOTA_BYTES, MAX_QUOTA_BYTES = 1 << 20, 1 << 50
MAX_RETAIN_DAYS = 36_500
_DAYS = re.compile(r"([1-9][0-9]{0,5})d", re.ASCII)


def read_flag(value: object) -> bool:
    """Read `true` or `false`."""
    if value not in ("true", "false"):
        raise ValueError("expected true or false")
    return value == "true"


def read_mark(value: object) -> bool:
    """Read `true`, which is all that may stand there: a mark is set or left out."""
    if value != "true":
        raise ValueError("expected true; leave it out where it is not meant, as nothing unsets it")
    return True


def _days(value: object) -> int:
    found = _DAYS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected a number of days such as 90d")
    return int(found[1])


def _absolute(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/") or not path.isprintable():
        raise ValueError("expected the absolute path of a file")
    return path


class WitnessSpec(Model):
    """Who cosigns the checkpoints, and whether calls need them to."""

    policy: Annotated[
        str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_absolute)
    ]
    require: Annotated[bool, BeforeValidator(read_flag)] = False


class TraceSpec(Model):
    """How the log is kept."""

    durability: Durability | None = None
    batch: (
        Annotated[int, BeforeValidator(parse_duration_ms), Field(ge=1, le=MAX_BATCH_MS)] | None
    ) = None
    irreversible: Annotated[list[ToolName], Field(min_length=1, max_length=MAX_PATTERNS)] | None = (
        None
    )
    quota: (
        Annotated[
            int,
            BeforeValidator(parse_size_bytes),
            Field(ge=MIN_QUOTA_BYTES, le=MAX_QUOTA_BYTES),
        ]
        | None
    ) = None
    retain: Annotated[int, BeforeValidator(_days), Field(le=MAX_RETAIN_DAYS)] | None = None
    witness: WitnessSpec | None = None
