"""Figures as text: units a person reads, and as many digits as mean something."""

from __future__ import annotations

import json
from typing import Any

from dtrain.measure.runfiles import number

NONE = "–"
"""Stands where there is no figure."""
_GLUE = "\N{NO-BREAK SPACE}"  # between a figure and its unit


def digits(value: float | None, significant: int = 3) -> str:
    """A number with so many significant digits, thousands set apart, never in powers of ten unless tiny or huge."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{significant - 1}e}"
    places = 0
    while places < 9 and abs(value) * 10**places < 10 ** (significant - 1):
        places += 1
    return f"{value:,.{places}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def fixed(value: float | None, places: int = 2) -> str:
    """With so many decimals, for columns whose figures are to stand beneath each other."""
    return NONE if value is None else f"{value:.{places}f}"


def nbytes(value: float | None) -> str:
    """Bytes, as B, kB, MB, GB or TB (powers of 1000)."""
    if value is None:
        return NONE
    size = abs(value)
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{digits(value / 10**power)}{_GLUE}{unit}"
    return f"{value:.0f}{_GLUE}B"


def percent(part: float | None) -> str:
    """A part of one."""
    if part is None:
        return NONE
    places = 0 if abs(part) >= 0.1 or part == 0 else 1
    return f"{100 * part:.{places}f}{_GLUE}%"


def ms(value: float | None) -> str:
    return NONE if value is None else f"{digits(value)}{_GLUE}ms"


def seconds(value: float | None) -> str:
    """A length of time: ms, s, min or h."""
    if value is None:
        return NONE
    if 0 < abs(value) < 1:
        return ms(1e3 * value)
    if abs(value) < 120:
        return f"{digits(value)}{_GLUE}s"
    return f"{value / 60:.0f}{_GLUE}min" if abs(value) < 7200 else f"{value / 3600:.1f}{_GLUE}h"


def score(name: str, value: float | None) -> str:
    """A score of the model: an accuracy in per cent, others as numbers."""
    if value is None:
        return NONE
    return f"{100 * value:.2f}{_GLUE}%" if name == "accuracy" else digits(value, 4)


def plain(value: Any) -> str:
    """Any value of a configuration or a summary, in full: numbers to six digits, the rest as JSON has it."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if (found := number(value)) is not None:
        return str(value) if isinstance(value, int) else f"{found:.6g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) if value else "none"
    return json.dumps(value, ensure_ascii=False)


def short(text: str, most: int = 24) -> str:
    """A label for a picture: its end, where it is too long, which tells more of a dotted name."""
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


def named(name: str) -> str:
    """A field's name as words: bytes_sent_per_step -> bytes sent per step."""
    return name.replace("_", " ")


def plural(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
