"""Step 2 of the path of one Call: what a Call says it needs, in the grammar of `limits`.

It can only ask for less than the policy allows: `runtime/sandbox/bounds.py` takes the minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import ValidationError

from safeconduct.call import Json
from safeconduct.errors import Denied

from .model import LimitsSpec
from .paths import show

# A size, a duration and a count in their smallest unit: one spelling for one value.
_UNITS: Final = {"wall": "ms", "cpu": "ms", "idle": "ms"} | dict.fromkeys(
    ("memory", "disk", "file", "output"), "B"
)
# `fuel` bounds what shell.run never runs.
_UNFIT: Final = frozenset({"fuel"})


def canonical_resources(name: str, value: Json) -> dict[str, Json]:
    """Return ``{wall: 5m, pids: 8}`` as ``{"pids": "8", "wall": "300000ms"}``.

    Raises Denied ``call.bad_argument`` where a policy could not have it under `limits`.
    """
    if not isinstance(value, Mapping):
        raise Denied(f"{name} must be a map of limits", code="call.bad_argument")
    # JSON has numbers where the policy's YAML has text.
    written = {key: str(item) if type(item) is int else item for key, item in value.items()}
    for key in written:
        if key in _UNFIT:
            raise Denied(f"{name}: {key} is no limit of this tool", code="call.bad_argument")
    try:
        spec = LimitsSpec.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = show(str(first["loc"][0])) if first["loc"] else name
        what = "no such limit" if first["type"] == "extra_forbidden" else first["msg"]
        what = what.removeprefix("Value error, ")
        raise Denied(f"{name}: {key}: {what}", code="call.bad_argument") from error
    found = spec.model_dump(exclude_unset=True)
    # A null is a limit that the call does not speak of.
    return {
        key: f"{found[key]}{_UNITS.get(key, '')}" for key in sorted(found) if found[key] is not None
    }
