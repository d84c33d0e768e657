"""Results to reach, as `accuracy=0.98`: the time to them compares runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hvdlarge.exits import JobError

_TARGET = re.compile(r"(.+?)(<=|>=|=)([^<>=]+)")
_LOWER_IS_BETTER = ("loss", "perplexity", "error")


class Target(NamedTuple):
    """A value of a result of evaluations.

    Attributes:
        name: of the result.
        value: to reach.
        lower: whether at most that value is meant; None: where the result's name says so.
    """

    name: str
    value: float
    lower: bool | None = None

    def reached(self, value: float, job: Mapping[str, Any]) -> bool:
        """Whether a result of a run with this job, as its resolved YAML holds it, reaches it."""
        return value <= self.value if self.is_lower(job) else value >= self.value

    def is_lower(self, job: Mapping[str, Any]) -> bool:
        """Whether at most the value is meant: as written, as the job has it, or by the name."""
        if self.lower is not None:
            return self.lower
        own = self.name.removeprefix("ema_")
        evaluate = job.get("evaluate")
        metrics = evaluate.get("metrics") if isinstance(evaluate, Mapping) else None
        metric = metrics.get(own) if isinstance(metrics, Mapping) else None
        higher = metric.get("higher_is_better") if isinstance(metric, Mapping) else None
        if isinstance(higher, bool):
            return not higher
        return any(word in own for word in _LOWER_IS_BETTER)

    def text(self, job: Mapping[str, Any]) -> str:
        """The target in words."""
        return f"{self.name} {'≤' if self.is_lower(job) else '≥'} {self.value:g}"


def parse_target(text: str) -> Target:
    """A target as `accuracy=0.98`, `accuracy>=0.98` or `perplexity<=80`.

    Raises:
        JobError: if it is none.

    >>> parse_target("perplexity<=80")
    Target(name='perplexity', value=80.0, lower=True)
    """
    match = _TARGET.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        name, sign, value = match[1].strip(), match[2], float(match[3])
        if value != value:
            raise ValueError
    except ValueError:
        raise JobError(
            f"--target {text}: a result of the evaluations and a number are expected, as "
            "accuracy=0.98, or perplexity<=80"
        ) from None
    return Target(name, value, {"<=": True, ">=": False}.get(sign))
