"""Policy step 2c: `rate` and `budget` of a rule become obligations of the Decisions it makes.

A Bound says how much; the runtime counts. What a Call will use is not known before it ran, so a
Bound over a session or a day reserves the `/call` amount of the same unit. Bytes are measured:
without an amount for one Call the least is reserved, which is to say that some must be left.
Nobody measures money and tokens for us, so there each Call counts as its `/call` amount unless
its tool reports what it used; a budget without one would bound nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from safeconduct.call import Bound, Per, Unit

from .units import parse_count, parse_size_bytes

_SPAN_MS: Final[Mapping[str, int]] = MappingProxyType(
    {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
)
_PERIODS: Final = (Per.CALL, Per.SESSION, Per.DAY)
# Whole units and at most six places: money is counted in millionths.
_MONEY = re.compile(r"(0|[1-9][0-9]{0,11})(?:\.([0-9]{1,6}))?", re.ASCII)
# LIMIT: what a JSON reader of a trace still counts exactly (RFC 8259 section 6).
MAX_AMOUNT: Final = (1 << 53) - 1
_EXAMPLES: Final = MappingProxyType(
    {
        Unit.CALLS: "50/session or 200/day",
        Unit.BYTES: "100MiB/day or [1MiB/call, 100MiB/day]",
        Unit.MONEY: "[0.05/call, 2.50/day]",
        Unit.TOKENS: "[4K/call, 1M/day]",
    }
)


def parse_rate(text: str) -> tuple[int, int]:
    """Parse `20/h` into how many and the window in milliseconds; ValueError says what is wrong."""
    number, _, span = text.partition("/")
    window_ms = _SPAN_MS.get(span)
    if window_ms is None:
        raise ValueError("expected a rate such as 5/s, 30/m, 20/h or 100/d")
    return _positive(parse_count(number)), window_ms


def parse_amount(unit: Unit, text: str) -> tuple[int, Per]:
    """Parse `100MiB/day` into how much and for what; without a period it is for the session."""
    number, slash, period = text.partition("/")
    if slash and period not in _PERIODS:
        raise ValueError(f"expected an amount such as {_EXAMPLES[unit]}")
    per = Per(period) if slash else Per.SESSION
    if unit is Unit.CALLS and per is Per.CALL:
        raise ValueError("each call is one call; write for example 50/session")
    return _positive(_parse_number(unit, number)), per


def check_amounts(unit: Unit, amounts: Sequence[tuple[int, Per]]) -> None:
    """Raise ValueError where the amounts of one unit would bound nothing, or not be clear."""
    periods = [per for _, per in amounts]
    example = f"write for example {_EXAMPLES[unit]}"
    if len({*periods}) < len(periods):
        raise ValueError("two amounts for the same period; keep the smaller one")
    if {*periods} <= {Per.CALL}:
        raise ValueError(f"an amount for each call counts towards nothing alone; {example}")
    if unit in (Unit.MONEY, Unit.TOKENS) and Per.CALL not in periods:
        raise ValueError(f"nobody measures {unit}, so say what each call counts for; {example}")
    smallest = min(most for most, per in amounts if per is not Per.CALL)
    if any(most > smallest for most, per in amounts if per is Per.CALL):
        raise ValueError("one call would need more than there is, so none could run")


def _parse_number(unit: Unit, number: str) -> int:
    if unit is Unit.BYTES:
        return parse_size_bytes(number)
    if unit is not Unit.MONEY:
        return parse_count(number)
    found = _MONEY.fullmatch(number)
    if found is None:
        raise ValueError("expected an amount of money such as 2 or 0.05, at most six places")
    return int(found[1]) * 10**6 + int((found[2] or "").ljust(6, "0"))


def _positive(number: int) -> int:
    if not 0 < number <= MAX_AMOUNT:
        raise ValueError(f"expected a number from 1 to {MAX_AMOUNT}; to allow none, write no rule")
    return number


def compile_bounds(
    rule: str,
    rates: Sequence[tuple[int, int]],
    budget: Mapping[Unit, Sequence[tuple[int, Per]]],
) -> tuple[Bound, ...]:
    """Make the Bounds of one rule; each is counted under the rule's id, its unit and period."""
    bounds = [
        Bound(
            id=f"{rule}:rate/{window_ms}ms",
            unit=Unit.CALLS,
            most=most,
            per=Per.WINDOW,
            reserve=1,
            window_ms=window_ms,
        )
        for most, window_ms in rates
    ]
    for unit, amounts in budget.items():
        each = next((most for most, per in amounts if per is Per.CALL), 1)
        bounds += [
            Bound(
                id=f"{rule}:{unit}/{per}",
                unit=unit,
                most=most,
                per=per,
                reserve=each,
            )
            for most, per in amounts
            if per is not Per.CALL
        ]
    return tuple(bounds)


def describe_bound(bound: Bound) -> str:
    """Write a Bound the way a policy does."""
    amount = _spell(bound.unit, bound.most)
    if bound.window_ms is not None:
        span = next(name for name, span_ms in _SPAN_MS.items() if span_ms == bound.window_ms)
        return f"rate {amount}/{span}"
    each = f", {_spell(bound.unit, bound.reserve)}/call" if bound.reserve > 1 else ""
    return f"budget {bound.unit} {amount}/{bound.per}{each}"


def _spell(unit: Unit, amount: int) -> str:
    if unit is Unit.MONEY:
        whole, millionths = divmod(amount, 10**6)
        return f"{whole}.{millionths:06}".rstrip("0").rstrip(".")
    return f"{amount}B" if unit is Unit.BYTES else str(amount)
