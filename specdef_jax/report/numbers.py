"""Numbers as text: one rule for significant digits, exponents, lower bounds and missing values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

MISSING = "n/a"
THIN = "\u202f"  # narrow no-break space: parts groups of digits and never breaks a line
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
    """Return 10 to an exponent, as text.

    >>> power_of_ten(-14)
    '10⁻¹⁴'
    """
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def number(value: Any, digits: int = 3) -> str:
    """Return a number with so many significant digits; "n/a" for NaN, "∞" for infinity.

    Args:
      value: anything float() takes.
      digits: significant digits, >= 1; integers below 100,000 are shown in full.
    """
    value = float(value)
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    sign, size = ("−" if value < 0 else ""), abs(value)
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -3 <= power < 5:
        whole = size.is_integer() or power >= digits - 1
        return sign + (grouped(round(size)) if whole else f"{size:.{digits - 1 - power}f}")
    if size == 10.0**power:
        return sign + power_of_ten(power)
    return f"{sign}{mantissa}{THIN}×{THIN}{power_of_ten(power)}"


def given(value: Any) -> str:
    """Return a number that was chosen, not measured: no zeros after the last digit that says something."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def alpha_is(value: Any) -> str:
    """Return "α = 16" on one line."""
    return f"α\u00a0=\u00a0{given(value)}"


def grouped(value: int) -> str:
    """Return an integer in groups of three digits, from five digits on."""
    return str(value) if abs(value) < 10_000 else f"{value:,}".replace(",", THIN)


def share(value: Any) -> str:
    """Return a fraction as a percentage."""
    value = float(value)
    return f"{number(100 * value, 2)}{THIN}%" if math.isfinite(value) else number(value)


def seconds(value: Any) -> str:
    """Return a duration in seconds, two digits."""
    value = float(value)
    return f"{number(value, 2)}{THIN}s" if math.isfinite(value) else number(value)


def factor(ratio: dict[str, Any]) -> str:
    """Return the value of a Ratio: "2.35×", "≥ 6.58×" where censored, "n/a" where nothing is known."""
    value = float(ratio["value"])
    if math.isnan(value):
        return MISSING
    return f"≥{THIN}{multiple(value)}" if ratio["censored"] else multiple(value)


def multiple(value: float) -> str:
    """Return a factor: 2.35 as "2.35×"; a scientific number in brackets."""
    if math.isnan(value):
        return MISSING
    text = f"{value:.2f}" if 0.995 <= value < 1.005 else number(value)
    return f"({text})×" if "×" in text else f"{text}×"


def interval(ratio: dict[str, Any]) -> str:
    """Return the 95% interval of a Ratio, empty where there is none (one seed, or nothing to compare)."""
    low, high = float(ratio["low"]), float(ratio["high"])
    if math.isnan(low) or math.isnan(float(ratio["value"])):
        return ""
    ends = [f"{v:.2f}" if 0.995 <= v < 1.005 else number(v) for v in (low, high)]
    return f"[{ends[0]}, {ends[1]}{')' if math.isinf(high) else ']'}"


def spread(values: Iterable[Any], digits: int = 3) -> str:
    """Return the finite values as "low to high", one number where they print alike."""
    finite = [float(v) for v in values if math.isfinite(float(v))]
    if not finite:
        return MISSING
    low, high = number(min(finite), digits), number(max(finite), digits)
    return low if low == high else f"{low} to {high}"


def count(value: Any) -> str:
    """Return a whole number in full; "n/a" for NaN."""
    value = float(value)
    return grouped(round(value)) if math.isfinite(value) else number(value)


def named(label: str) -> str:
    """Return the label of an arm as the report writes it, with the sign α."""
    return re.sub(r"\balpha (?=[0-9])", "α\u00a0=\u00a0", label)


def listed(parts: list[str]) -> str:
    """Join parts as English does: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
