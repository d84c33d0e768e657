"""What an analysis gives: a verdict, a table, a figure, and the numbers; and how numbers are
written.
"""

from __future__ import annotations

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


def between(low: float | None, high: float | None, with_sign: bool = False) -> str:
    """The ends of an interval.

    >>> between(0.1, 0.25)
    '[0.1, 0.25]'
    """
    if low is None or high is None:
        return UNKNOWN
    write = signed if with_sign else number
    return f"[{write(low)}, {write(high)}]"


def mean_and_ends(found: Interval, with_sign: bool = False) -> str:
    """A mean with the ends of its interval, or with the number of seeds, too few for one."""
    if found.mean is None:
        return UNKNOWN
    mean = signed(found.mean) if with_sign else number(found.mean)
    if found.known:
        return f"{mean} {between(found.low, found.high, with_sign)}"
    return f"{mean} (no interval: {counted(found.seeds, 'seed')})"


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
