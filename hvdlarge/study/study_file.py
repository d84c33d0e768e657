"""The study file: what a study is, as frozen sections whose fields are the keys of the YAML."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hvdlarge.config import yaml_source
from hvdlarge.config.nearest import nearest
from hvdlarge.exits import JobError
from hvdlarge.study.analysis.sections import Analysis

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
MOST_RUNS = 100_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Numbers(_Section):
    """A range of numbers to search."""

    low: float
    """The smallest value."""
    high: float
    """The largest value."""
    log: bool = False
    """Whether the logarithm of the value is searched uniformly, as is usual for learning rates."""

    @model_validator(mode="after")
    def _ordered(self) -> Numbers:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}: with log it must be positive")
        return self

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and self.low <= value <= self.high
        )


class WholeNumbers(Numbers):
    """A range for a key whose values are whole numbers, as both ends are; made of `Numbers`, not
    written so.
    """

    @property
    def first(self) -> int:
        """The smallest value."""
        return int(self.low)

    @property
    def last(self) -> int:
        """The largest value."""
        return int(self.high)


class Choices(_Section):
    """Values to choose from."""

    choices: tuple[bool | int | float | str | None, ...] = Field(min_length=2)
    """The values, at least two."""

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return any(value == choice and type(value) is type(choice) for choice in self.choices)


_FINALIST_SEEDS = 1_000_000  # of a finalist, beyond `tune.seed`: far from those of repetitions

Space = Numbers | Choices
Search = dict[str, Space]


class Tune(_Section):
    """A search for the best settings of each cell."""

    search: Search = Field(default_factory=dict)
    """What is searched: for each key of the job a range or choices. A level of a named factor may
    have more, under `tune`."""
    trials: Count
    """Runs of the search, for each cell that is tuned. The first takes the settings of the job."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """What suggests the settings: Optuna's tree-structured Parzen estimator or Gaussian process
    (which needs scipy), random values, or a grid of `trials` points with the ends of each range."""
    pruner: Literal["none", "median", "halving"] = "none"
    """What ends hopeless runs early, by their evaluations: Optuna's median rule or successive
    halving. Which runs these are depends on how many run at the same time."""
    round: Count = 4
    """Trials of a cell that are suggested at once, without the results of one another: as many can
    run at the same time. Suggestions do not depend on how many do."""
    seed: Seed = 0
    """The job's seed in all trials, and the sampler's."""
    metric: str | None = None
    """The result by which trials are compared; default: the study's. Where many trials share the
    best accuracy, the smoother `test_loss` chooses better."""
    finalists: Count = 1
    """The best trials of a cell that are trained again with `finalist_seeds` further seeds; the one
    with the best mean gives the settings. 1: the best trial does. One seed may favour a rate that
    is unstable with others."""
    finalist_seeds: Count = 2
    """Further seeds of each finalist; they serve for nothing else."""
    at: Mapping[str, Any] | tuple[Mapping[str, Any], ...] | None = None
    """Levels by their factors: only cells with these levels are tuned; with a list, cells that have
    those of any of its mappings. Another cell takes the settings of the tuned cell that has these
    levels and otherwise its own; of a list, by the first mapping for which there is such a cell."""

    @model_validator(mode="after")
    def _finalists_are_trials(self) -> Tune:
        if self.finalists > self.trials:
            raise ValueError(f"finalists: {self.finalists} of {self.trials} trials")
        return self

    @property
    def finalist_runs(self) -> int:
        """Runs of the finalists of a cell, beside their trials."""
        return self.finalists * self.finalist_seeds if self.finalists > 1 else 0

    def seed_of_finalist(self, number: int) -> int:
        """The seed of a finalist's run: the same ones for each finalist.

        Args:
            number: of the run, in the cell.
        """
        return self.seed + _FINALIST_SEEDS + number % self.finalist_seeds


class Budget(_Section):
    """Limits of the work."""

    trials: Count | None = None
    """Runs of the whole study, of all processes: no further one is started."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which a process starts no more runs. Those that run then are finished."""


class Study(_Section):
    """A study file."""

    name: Name
    """The name of the study. Its files go to runs/<name>, unless --folder names another place."""
    job: str | dict[str, Any]
    """The job that all runs vary: a path, relative to the study file, the name of a shipped job, or
    the keys of a job."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the job, as `lr.base: 0.1`, for all runs."""
    factors: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """What is compared, in a grid. A key of the job with a list of values; or any other name with a
    mapping of levels to keys of the job, as `lars: {optimizer.name: lars}`. A level may have
    `tune`: what is searched there beside or instead of `tune.search`."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Cells that the grid leaves out: those that have all the levels of one of these mappings."""
    tune: Tune | None = None
    """The search for the best settings of each cell."""
    seeds: Annotated[int, Field(ge=0, le=10_000)] | tuple[Seed, ...] = 1
    """Repetitions of each cell with its best settings: seeds of the job that are not `tune.seed`,
    or how many of them; then they are `tune.seed` + 1 and so on."""
    budget: Budget = Budget()
    """Limits of the work."""
    metric: str = "accuracy"
    """The result that is compared: a key of the summary of a run, as `accuracy` or `test_loss`."""
    direction: Literal["maximize", "minimize"] | None = None
    """Which values are better; default: as the metric declares."""
    workers: Count = 1
    """Workers of each run; more than one are started by hvdlarge.launch."""
    threads: Count = 1
    """Threads of each worker, on CPUs."""
    analysis: tuple[Analysis, ...] = ()
    """What is made of the results; default: a comparison of all cells."""

    @model_validator(mode="after")
    def _seeds_are_new(self) -> Study:
        if not isinstance(self.seeds, int):
            if len(set(self.seeds)) < len(self.seeds):
                raise ValueError("seeds: a seed is there twice")
            if self.tune is not None and self.tune.seed in self.seeds:
                raise ValueError(
                    f"seeds: {self.tune.seed} is the seed of the tuning; a repetition shows "
                    "nothing with a seed for which its settings were chosen"
                )
            finalists = range(0 if self.tune is None else self.tune.finalist_runs)
            for number in finalists:
                if self.tune is not None and self.tune.seed_of_finalist(number) in self.seeds:
                    raise ValueError(
                        f"seeds: {self.tune.seed_of_finalist(number)} is a seed of the finalists"
                    )
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds of the repetitions."""
        if not isinstance(self.seeds, int):
            return self.seeds
        first = 1 if self.tune is None else self.tune.seed + 1
        return tuple(range(first, first + self.seeds))


def read_study(path: str) -> Study:
    """Read and validate a study file.

    Raises:
        JobError: with one message that lists every problem with its line.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise JobError(f"{path}: no such study file (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JobError(f"{path}: the study file cannot be read: {reason}") from None
    try:
        source = yaml_source.read(text, os.environ)
    except yaml_source.SourceError as error:
        line = "" if error.line is None else f":{error.line}"
        raise JobError(f"{path}{line}: {error}") from None
    if not isinstance(source.values, dict):
        raise JobError(f"{path}: a study file is a mapping of keys to values: name, job, factors …")
    values = {"name": _default_name(path), **source.values}
    try:
        return Study.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = [_describe(problem, path, source) for problem in error.errors(include_url=False)]
        unique = list(dict.fromkeys(problems))
        heading = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
        raise JobError("\n".join([f"{path}: {heading} in the study file", *unique])) from None


def _default_name(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-") or "study"


_KINDS = re.compile(r"^(function-|Numbers$|Choices$|str$|int$|dict\[|list\[|tuple\[|Mapping)")


def _describe(problem: Any, path: str, source: yaml_source.Source) -> str:
    where = [
        part for part in problem["loc"] if isinstance(part, int) or not _KINDS.search(str(part))
    ]
    if where[:1] == ["analysis"] and len(where) > 2 and isinstance(where[1], int):
        del where[2]  # the kind of an analysis
    line = source.line(tuple(where))
    place = path if line is None else f"{path}:{line}"
    name = ".".join(map(str, where))
    if problem["type"] == "missing":
        return f"  {place}: the key {name!r} is missing"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        hint = nearest(str(where[-1]), known)
        return f"  {place}: unknown key {name!r}{'; ' if hint else ''}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    if isinstance(value, (dict, list)):
        return f"  {place}: {f'{name}: ' if name else ''}{message}"
    return f"  {place}: {name} is {json.dumps(value)}: {message[0].lower()}{message[1:]}"


def _known_keys(where: list[str | int]) -> list[str]:
    sections: Mapping[tuple[str, ...], type[BaseModel]] = {
        (): Study,
        ("tune",): Tune,
        ("budget",): Budget,
    }
    section = sections.get(tuple(map(str, where)))
    return [] if section is None else list(section.model_fields)
