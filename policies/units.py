"""Policy step 2a: the units of limits: `30s`, `512MiB`, `5G`. Whole numbers only."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,14})([A-Za-z]*)", re.ASCII)
_DURATION_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
_SIZE_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_COUNT = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_duration_ms(value: object) -> int:
    """Parse `500ms`, `30s`, `10m` or `1h` into milliseconds."""
    return _parse(value, _DURATION_MS, "a duration such as 500ms, 30s or 10m")


def parse_size_bytes(value: object) -> int:
    """Parse `4KiB`, `512MiB` or `2GiB` into bytes."""
    return _parse(value, _SIZE_BYTES, "a size such as 4KiB, 512MiB or 2GiB")


def parse_count(value: object) -> int:
    """Parse `64`, `2M` or `5G`; K, M and G are powers of ten."""
    return _parse(value, _COUNT, "a count such as 64, 2M or 5G")


def _parse(value: object, units: Mapping[str, int], expected: str) -> int:
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    factor = units.get(found[2]) if found else None
    if found is None or factor is None:
        raise ValueError(f"expected {expected}")
    return int(found[1]) * factor
