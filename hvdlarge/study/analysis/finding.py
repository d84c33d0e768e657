"""What an analysis gives: a verdict, a table, a figure, and the numbers; and how numbers are
written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdlarge.study.analysis.intervals import Interval
from hvdlarge.study.analysis.plots import Plot

UNKNOWN = "—"


@dataclass(frozen=True)
class Finding:
    """The result of an analysis.

    Attributes:
        kind: of the analysis.
        title: of its section in a report.
        verdict: a sentence with the numbers and their uncertainty.
        table: rows of text, the first is the heading; empty: none.
        plot: what its figure shows; None: none.
        notes: sentences on what the verdict leaves out.
        facts: the numbers, as JSON has them; None: not known.
    """

    kind: str
    title: str
    verdict: str
    table: list[tuple[str, ...]]
    plot: Plot | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def number(value: float | None) -> str:
    """A number in a table or sentence.

    >>> number(0.98765), number(8192), number(None)
    ('0.9877', '8192', '—')
    """
    if value is None:
        return UNKNOWN
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:.0f}"
    return f"{value:.4g}"


def rounded(value: float | None) -> str:
    """An estimate of a number of samples or steps: its first three digits.

    >>> rounded(12345.6), rounded(224.86)
    ('12300', '225')
    """
    return UNKNOWN if value is None else number(float(f"{value:.3g}"))


def signed(value: float | None) -> str:
    """A difference, with its sign.

    >>> signed(0.0123), signed(0)
    ('+0.0123', '0')
    """
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def mean_text(found: Interval, with_sign: bool = False) -> str:
    """A mean, as exact as its interval is: two digits of the interval's width.

    >>> mean_text(Interval(0.00123, -0.00612, 0.00891, 8), with_sign=True)
    '+0.001'
    """
    if found.mean is None:
        return UNKNOWN
    mean = found.mean if found.known or not with_sign else float(f"{found.mean:.3g}")
    return _to_places(mean, _places(found), with_sign)


def ends_text(found: Interval, with_sign: bool = False) -> str:
    """The ends of an interval, to two digits of its width.

    >>> ends_text(Interval(0.00123, -0.00612, 0.00891, 8), with_sign=True)
    '[-0.006, +0.009]'
    """
    if found.low is None or found.high is None:
        return UNKNOWN
    places = _places(found)
    return f"[{', '.join(_to_places(end, places, with_sign) for end in (found.low, found.high))}]"


def mean_and_ends(found: Interval, with_sign: bool = False) -> str:
    """A mean with the ends of its interval, or with the number of seeds, too few for one."""
    mean = mean_text(found, with_sign)
    if found.mean is None:
        return mean
    if found.known:
        return f"{mean} {ends_text(found, with_sign)}"
    return f"{mean} (no interval: {counted(found.seeds, 'seed')})"


def _places(found: Interval) -> int | None:
    """Decimal places of the second digit of an interval's width; None if it has none."""
    if found.low is None or found.high is None:
        return None
    width = found.high - found.low
    if width <= 1e-9 * max(abs(found.low), abs(found.high)):
        return None
    return 1 - math.floor(math.log10(width))


def _to_places(value: float, places: int | None, with_sign: bool) -> str:
    if places is None:
        return signed(value) if with_sign else number(value)
    value = round(value, places)
    if value == 0:
        return "0"
    return f"{value:{'+' if with_sign else ''}.{max(places, 0)}f}"


def percent(confidence: float) -> str:
    """A confidence level.

    >>> percent(0.95), percent(0.999)
    ('95 %', '99.9 %')
    """
    return f"{100 * confidence:.6g} %"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number of things.

    >>> counted(1, "seed"), counted(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence; from `most` on they are only counted.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def interval_facts(found: Interval) -> dict[str, Any]:
    """An interval as JSON has it."""
    return dict(found._asdict())
