"""The `analysis` list of a study file: a section for each analysis, and their comparison with the
study's factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hvdlarge.config.nearest import nearest
from hvdlarge.study.results import Level, Setup

if TYPE_CHECKING:
    from hvdlarge.config.job import Log

LevelName = str | int | float  # a level as a study file has it
Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Confidence = Annotated[float, Field(ge=0.5, le=0.999)]


class Section(BaseModel):
    """A section of the list: strict, and frozen once it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Compare(Section):
    """Means with intervals of all cells; differences of arms, paired by seed."""

    kind: Literal["compare"] = "compare"
    """`compare`."""

    baseline: dict[str, LevelName] | None = None
    """The arm that the others are compared with: a level for each factor of `by`. Without it, each
    arm is compared with the best one, and the p-values are corrected for all pairs of arms."""

    by: str | list[str] | None = None
    """Factors whose levels are the arms. Default: those of `baseline`, or else all that are not in
    `within`. At each combination of the other factors' levels, arms are compared separately."""

    within: list[str] = []
    """Factors at each of whose levels the arms are compared separately."""

    tolerance: Tolerance = 0.0
    """The largest loss that is accepted, in the unit of the metric: an arm is within tolerance if
    its interval excludes a larger loss. 0: not judged."""

    confidence: Confidence = 0.95
    """Confidence level of the intervals; 1 minus it is the rate of false positives of the whole
    table."""


class BatchLimit(Section):
    """The largest batch whose tuned result is within a tolerance of that of the smallest."""

    kind: Literal["batch_limit"] = "batch_limit"
    """`batch_limit`."""

    batch: str
    """The factor whose levels are batches, as `batch.base`."""

    tolerance: Tolerance
    """The largest loss that is accepted, in the unit of the metric."""

    baseline: Number | None = None
    """The batch that the others are compared with. Default: the smallest."""

    target: Number | None = None
    """A value of the metric: the steps to it are compared over the batches. Default: they are
    not."""

    confidence: Confidence = 0.95
    """Confidence level of the intervals."""


class Ladder(Section):
    """Techniques that are added one after another: what each adds to the one before."""

    kind: Literal["ladder"] = "ladder"
    """`ladder`."""

    factor: str
    """The factor whose levels are the steps."""

    steps: list[LevelName] | None = None
    """The levels that are the steps, the first one first. Default: all, in the order of the
    file."""

    confidence: Confidence = 0.95
    """Confidence level of the intervals; 1 minus it is the rate of false positives of the whole
    table."""


class LrRange(Section):
    """The range of a tuned key within which trials come close to the best one."""

    kind: Literal["lr_range"] = "lr_range"
    """`lr_range`."""

    key: str = "lr.base"
    """The tuned key."""

    within: Tolerance
    """How far from the best trial of the cell a good one may be, in the unit of the metric."""

    separately: list[str] | None = None
    """Factors at each of whose levels ranges are compared separately. Default: those whose levels
    are numbers, as batches."""


class Diffusion(Section):
    """The distance of the weights from their start, fitted by a · ln t + b and by a · t^p."""

    kind: Literal["diffusion"] = "diffusion"
    """`diffusion`."""

    from_epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Points before it are left out, as those of the warmup."""

    until_epoch: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Points after it are left out. Default: the end of the stretch of constant rate."""

    until_update: Annotated[int, Field(gt=0)] | None = None
    """Points after it are left out: the same updates for all batches. Default: none is."""

    min_points: Annotated[int, Field(ge=8)] = 12
    """Points that the stretch of a run must have."""

    confidence: Confidence = 0.95
    """Confidence level of the intervals."""


class NoiseScale(Section):
    """The measured gradient noise scale against the batch limit that was found."""

    kind: Literal["noise_scale"] = "noise_scale"
    """`noise_scale`."""

    batch: str
    """The factor whose levels are batches, as `batch.base`."""

    tolerance: Tolerance
    """The largest loss that is accepted, in the unit of the metric, as of `batch_limit`."""

    baseline: Number | None = None
    """The batch that the others are compared with. Default: the smallest."""

    target: Number | None = None
    """A value of the metric: the noise scale is compared with the critical batch of the steps to
    it too. Default: it is not."""

    confidence: Confidence = 0.95
    """Confidence level of the intervals."""


Analysis = Annotated[
    Compare | BatchLimit | Ladder | LrRange | Diffusion | NoiseScale, Field(discriminator="kind")
]
AnalysisSection = Compare | BatchLimit | Ladder | LrRange | Diffusion | NoiseScale


def check(sections: Sequence[AnalysisSection], setup: Setup) -> list[str]:
    """What the study does not have of what its analyses name: a sentence each; mostly none.

    Args:
        sections: the `analysis` list.
        setup: of the study.
    """
    problems = []
    for number, section in enumerate(sections):
        for key, problem in _problems(section, setup):
            problems.append(f"analysis.{number}.{key} ({section.kind}): {problem}")
    return problems


def unlogged(sections: Sequence[AnalysisSection], logs: Mapping[str, Log]) -> list[str]:
    """The analyses whose measurements no cell logs: a sentence each; mostly none.

    Args:
        sections: the `analysis` list.
        logs: what the job of each cell logs, by the cell's name.
    """
    problems = []
    for number, section in enumerate(sections):
        if isinstance(section, Diffusion):
            there = any(log.distances for log in logs.values())
            setting = "log.distances: true"
        elif isinstance(section, NoiseScale):
            there = any(log.noise_every_steps is not None for log in logs.values())
            setting = "log.noise_every_steps, for example 20"
        else:
            continue
        if not there:
            problems.append(
                f"analysis.{number} ({section.kind}): no cell logs what it reads, neither the "
                f"first, {next(iter(logs))}, nor another; set {setting}"
            )
    return problems


def is_level(name: LevelName, level: Level) -> bool:
    """Whether a name as a study file has it means a level: by its label or its number."""
    if isinstance(name, str):
        return name == level.label
    return level.value == name or str(name) == level.label


def _problems(section: AnalysisSection, setup: Setup) -> Iterator[tuple[str, str]]:
    if isinstance(section, Compare):
        yield from _compare(section, setup)
    elif isinstance(section, (BatchLimit, NoiseScale)):
        yield from _batches(section, setup)
    elif isinstance(section, Ladder):
        yield from _ladder(section, setup)
    elif isinstance(section, LrRange):
        tuned = list(dict.fromkeys(key for each in setup.ranges.values() for key in each))
        if not tuned:
            yield "key", "no key is searched over a range of numbers, so there are no rates"
        elif section.key not in tuned:
            yield "key", f"{section.key!r} is not tuned; {nearest(section.key, tuned, 'tuned:')}"
        for name in section.separately or []:
            if problem := _factor(name, setup):
                yield "separately", problem
    elif section.until_epoch is not None and section.until_epoch <= section.from_epoch:
        yield (
            "until_epoch",
            f"{section.until_epoch:g} is not after from_epoch, {section.from_epoch:g}",
        )


def _factor(name: str, setup: Setup) -> str | None:
    if name in setup.factors:
        return None
    if not setup.factors:
        return f"{name!r} is no factor of the study, which has none"
    return f"{name!r} is no factor of the study; {nearest(name, setup.factors, 'its factors:')}"


def _level(name: LevelName, factor: str, setup: Setup) -> str | None:
    levels = setup.factors[factor]
    if any(is_level(name, level) for level in levels):
        return None
    shown = repr(name) if isinstance(name, str) else f"{name:g}"
    likely = nearest(shown.strip("'"), [level.label for level in levels], "its levels:")
    return f"{shown} is no level of {factor}; {likely}"


def _compare(section: Compare, setup: Setup) -> Iterator[tuple[str, str]]:
    by = [section.by] if isinstance(section.by, str) else section.by
    for key, names in (("by", by or []), ("within", section.within)):
        for name in names:
            if problem := _factor(name, setup):
                yield key, problem
        for name in {name for name in names if names.count(name) > 1}:
            yield key, f"{name!r} is named twice"
    if by == []:
        yield "by", "an empty list has no arms; leave the key out, or name a factor"
    for name in sorted(set(by or section.baseline or []) & set(section.within)):
        yield "within", f"{name!r} distinguishes the arms: they cannot be compared within it"
    if by is not None and section.within:
        for name in [each for each in setup.factors if each not in by + section.within]:
            yield "within", f"{name!r} is in neither by nor within; leave within out, or add it"
    for name, level in (section.baseline or {}).items():
        if problem := _factor(name, setup) or _level(level, name, setup):
            yield "baseline", problem
        elif by is not None and name not in by:
            yield "baseline", f"{name!r} is not in by: {', '.join(by)}"
    if section.baseline is not None:
        for name in by or []:
            if name not in section.baseline:
                yield "baseline", f"a level of {name!r} is missing, which is in by"
        if not section.baseline:
            yield "baseline", "an empty mapping is no arm; leave the key out, or name a level"


def _batches(section: BatchLimit | NoiseScale, setup: Setup) -> Iterator[tuple[str, str]]:
    if problem := _factor(section.batch, setup):
        yield "batch", problem
        return
    levels = setup.factors[section.batch]
    unusable = [each.label for each in levels if each.value is None or each.value <= 0]
    if unusable:
        yield (
            "batch",
            f"levels of {section.batch} are no batches: {', '.join(unusable)}; numbers are "
            "expected, with the key of the job as the factor's name",
        )
    elif section.baseline is not None:
        if problem := _level(section.baseline, section.batch, setup):
            yield "baseline", problem
        elif section.baseline == max(each.value or 0 for each in levels):
            yield "baseline", f"{section.baseline:g} is the largest batch: none is above it"


def _ladder(section: Ladder, setup: Setup) -> Iterator[tuple[str, str]]:
    if problem := _factor(section.factor, setup):
        yield "factor", problem
        return
    levels = setup.factors[section.factor]
    if len(levels) < 2:
        yield "factor", f"{section.factor} has one level: a ladder has at least two"
    elif section.steps is not None:
        unknown = [_level(name, section.factor, setup) for name in section.steps]
        yield from (("steps", problem) for problem in unknown if problem)
        named = [each.label for name in section.steps for each in levels if is_level(name, each)]
        for label in sorted({label for label in named if named.count(label) > 1}):
            yield "steps", f"{label!r} is named twice"
        if len(section.steps) < 2:
            yield "steps", "a ladder has at least two steps"
