"""Policy lattice: two shapes, part by part. A yes is sure; a doubt is a no."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safeconduct.call import Json
from safeconduct.policies.match_json import Shape
from safeconduct.policies.shapes import Form, Type

_ANY = Form(type=Type.ANY)


def shape_subsumes(wide: Shape, narrow: Shape) -> bool:
    """Tell whether ``wide`` surely matches every value that ``narrow`` matches.

    What a granting shape matches, the restricting one of the same form matches too, so only the
    opposite pair cannot be compared.
    """
    if narrow.restricts and not wide.restricts:
        return False
    return _subsumes(wide.form, narrow.form, restricts=narrow.restricts)


def _subsumes(wide: Form, narrow: Form, *, restricts: bool) -> bool:
    # LIMIT: recursion ends with the shapes (match_json.py).
    if wide in (_ANY, narrow):
        return True
    if narrow.enum is not None:
        values = [value for text in narrow.enum for value in spelled(text)]
        fitting = [value for value in values if narrow.holds(value, restricts=restricts)]
        return all(wide.holds(value, restricts=restricts) for value in fitting)
    if wide.enum is not None or not _has_type(wide.type, narrow.type):
        return False
    return (
        _bounded(wide.max_length, narrow.max_length)
        and _bounded(wide.maximum, narrow.maximum)
        and _above(wide.minimum, narrow.minimum)
        and _items(wide, narrow, restricts=restricts)
        and _members(wide, narrow, restricts=restricts)
    )


def _has_type(wide: Type, narrow: Type) -> bool:
    return wide is narrow or (wide is Type.NUMBER and narrow is Type.INTEGER)


def _bounded(wide: int | None, narrow: int | None) -> bool:
    return wide is None or (narrow is not None and narrow <= wide)


def _above(wide: int | None, narrow: int | None) -> bool:
    return wide is None or (narrow is not None and narrow >= wide)


def _items(wide: Form, narrow: Form, *, restricts: bool) -> bool:
    if not _bounded(wide.max_items, narrow.max_items):
        return False
    return wide.items is None or _subsumes(wide.items, narrow.items or _ANY, restricts=restricts)


def _members(wide: Form, narrow: Form, *, restricts: bool) -> bool:
    open_ = narrow.open or restricts
    names = {*wide.properties, *narrow.properties}
    if len({name.casefold() for name in names}) < len(names):
        return False
    if not wide.required <= narrow.required or (open_ and not (wide.open or restricts)):
        return False
    for name, form in narrow.properties.items():
        covering = wide.properties.get(name, _ANY if wide.open or restricts else None)
        if covering is None or not _subsumes(covering, form, restricts=restricts):
            return False
    others = wide.properties.keys() - narrow.properties.keys()
    if restricts:
        return all(wide.properties[name] == _ANY for name in others)
    # What it names it takes in no other case, whatever the value is.
    return not (open_ and others)


def spelled(text: str) -> Iterator[Json]:
    """Yield every value that `scalar_text` spells so."""
    yield text
    named: Mapping[str, Json] = {"true": True, "false": False, "null": None}
    if text in named:
        yield named[text]
        return
    try:
        if str(int(text)) == text:
            yield int(text)
            yield float(text)
        elif str(float(text)) == text:
            yield float(text)
    except (ValueError, OverflowError):
        return
