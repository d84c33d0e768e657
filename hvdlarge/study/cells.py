"""The cells of a study: each combination of levels, with the job and the search space of its runs.

Every cell's job is validated before the first run: with the settings of the file, and at both ends
of each searched range.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hvdlarge.config.job import AVERAGED, Job
from hvdlarge.config.job_file import job_path, parse_job, read_job
from hvdlarge.config.nearest import nearest
from hvdlarge.config.yaml_source import write
from hvdlarge.exits import JobError
from hvdlarge.reporting.targets import Target
from hvdlarge.study.results import Cell, Level, Range, Setup
from hvdlarge.study.study_file import (
    MOST_RUNS,
    Choices,
    Numbers,
    Search,
    Space,
    Study,
    WholeNumbers,
)

_SPACE: TypeAdapter[Space] = TypeAdapter(Space)
_TUNE = "tune"  # of a level: not a key of a job
_OURS = ("name", "run_dir", "seed")  # set for each run
_LIMIT = "stop_after_minutes"  # would stop every run of a study again and again


@dataclass(frozen=True)
class CellPlan:
    """A cell, and what its runs are.

    Attributes:
        cell: the label of its level of each factor.
        slug: a name for files.
        settings: keys of the job that the file sets for it.
        job: validated, with these settings.
        search: what is searched; empty if its settings are tuned at another cell, or not at all.
        base: the job's own values of the searched keys: the settings of the first trial.
        tuned_at: the cell whose best settings its repetitions take; None if nothing is tuned.
    """

    cell: Cell
    slug: str
    settings: Mapping[str, Any]
    job: Job
    search: Search
    base: Mapping[str, Any]
    tuned_at: Cell | None


@dataclass(frozen=True)
class JobSource:
    """The job that all runs vary.

    Args:
        path: of the file that the runs are started with.
        text: of a job whose keys are in the study file; None for one in a file.
        place: the file beside which its own parts are looked for.
    """

    path: Path
    text: str | None
    place: Path

    def read(self, settings: Mapping[str, Any]) -> Job:
        """The job with other settings.

        Raises:
            JobError: if it is invalid.
        """
        changes = overrides(settings)
        if self.text is None:
            return read_job(str(self.path), changes)
        return parse_job(self.text, str(self.place), changes)


def job_source(study: Study, file: Path, folder: Path) -> JobSource:
    """The job of a study.

    Args:
        study: with the job's path, or its keys.
        file: the study file.
        folder: of the study, for a job whose keys are in the study file.
    """
    if isinstance(study.job, str):
        beside = file.parent / study.job
        path = beside if beside.is_file() else Path(job_path(study.job))
        path = path if path.is_file() else beside
        return JobSource(path.absolute(), None, path)
    keys = {"name": study.name, **study.job}
    if isinstance(keys.get("extends"), str):
        keys["extends"] = str((file.parent / keys["extends"]).absolute())
    return JobSource(folder.absolute() / "job.yaml", write(keys), file)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them.

    >>> overrides({"lr.base": 0.5, "optimizer.name": "lars"})
    ['lr.base=0.5', 'optimizer.name="lars"']
    """
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def plan_cells(study: Study, source: JobSource) -> list[CellPlan]:
    """All cells, in the order of the grid; the last factor changes fastest.

    Raises:
        JobError: if a cell's job is invalid, or its search space; each problem with its cell.
    """
    if (count := math.prod(map(len, study.factors.values()))) > MOST_RUNS:
        sizes = " × ".join(f"{len(levels):,}" for levels in study.factors.values())
        raise JobError(f"factors: {sizes} = {count:,} combinations: more than {MOST_RUNS:,}")
    combinations = list(_combinations(study))
    if not combinations:
        raise JobError("exclude leaves no cell")
    source.read({})  # its own mistakes first, without a cell's name
    cells = {tuple(label for label, _ in levels): dict(levels) for levels in combinations}
    if len(cells) < len(combinations):
        raise JobError("factors: a level is there twice")
    plans, problems = [], []
    for levels, cell in zip(combinations, cells, strict=True):
        try:
            plan = _plan(study, source, cell, [keys for _, keys in levels], list(cells))
        except JobError as error:
            problems.append(f"{in_words(study, cell)}: {error}")
            if len(problems) == 5:
                break
            continue
        plans.append(plan)
    if problems:
        raise JobError("\n".join(dict.fromkeys(problems)))
    _check_number(study, plans)
    return plans


def _check_number(study: Study, plans: Sequence[CellPlan]) -> None:
    tuned, trials = 0, 0
    if study.tune is not None:
        tuned = sum(bool(plan.search) for plan in plans)
        trials = study.tune.trials + study.tune.finalist_runs
    seeds = len(study.seed_list)
    total = tuned * trials + len(plans) * seeds
    if total > MOST_RUNS:
        raise JobError(
            f"{tuned:,} tuned cells × {trials:,} trials + {len(plans):,} cells × {seeds:,} seeds = "
            f"{total:,} runs: more than {MOST_RUNS:,}"
        )


def in_words(study: Study, cell: Cell) -> str:
    """A cell as messages name it, as `batch.base 32, arm lars`."""
    if not cell:
        return "the job"
    return ", ".join(f"{name} {label}" for name, label in zip(study.factors, cell, strict=True))


def setup_of(study: Study, plans: Sequence[CellPlan]) -> Setup:
    """What the analyses must know."""
    factors = {
        name: tuple(Level(label_of(value), _number(value)) for value in levels)
        for name, levels in study.factors.items()
    }
    job = plans[0].job.resolved()
    direction = study.direction
    by = None if study.tune is None else study.tune.metric
    tuned_by = by if by is not None and by != study.metric else ""
    lower = direction == "minimize" if direction else Target(study.metric, 0.0).is_lower(job)
    return Setup(
        name=study.name,
        metric=study.metric,
        lower_is_better=lower,
        factors=factors,
        cells=tuple(plan.cell for plan in plans),
        ranges={
            plan.cell: {
                key: Range(space.low, space.high, space.log)
                for key, space in plan.search.items()
                if isinstance(space, Numbers)
            }
            for plan in plans
            if plan.search
        },
        tuned_at={plan.cell: plan.tuned_at for plan in plans},
        trials=0 if study.tune is None else study.tune.trials,
        repetitions=len(study.seed_list),
        tuned_by=tuned_by,
        score_lower_is_better=bool(tuned_by) and Target(tuned_by, 0.0).is_lower(job),
    )


def signature(plan: CellPlan) -> dict[str, Any]:
    """Everything that decides the results of a cell's runs, but for seeds and tuning."""
    job = {key: value for key, value in plan.job.resolved().items() if key not in _OURS}
    return {
        "job": job,
        "search": {key: space.model_dump(mode="json") for key, space in plan.search.items()},
        "tuned_at": None if plan.tuned_at is None else list(plan.tuned_at),
    }


def label_of(value: Any) -> str:
    """The label of a level: the value as JSON, or its name.

    >>> label_of(32), label_of("lars"), label_of({"policy": "none"})
    ('32', 'lars', '{"policy": "none"}')
    """
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def _combinations(study: Study) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The levels of each cell: labels, and the keys they set."""
    levels = []
    for name, values in study.factors.items():
        if not values:
            raise JobError(f"factors: {name} has no level")
        if isinstance(values, dict):
            levels.append([(label, dict(keys)) for label, keys in values.items()])
        else:
            levels.append([(label_of(value), {name: value}) for value in values])
    excluded = [_matching(study, each, "exclude") for each in study.exclude]
    for combination in itertools.product(*levels):
        labels = dict(zip(study.factors, (label for label, _ in combination), strict=True))
        if not any(each.items() <= labels.items() for each in excluded):
            yield list(combination)


def _matching(study: Study, levels: Mapping[str, Any], key: str) -> dict[str, str]:
    """Labels by factors, as `exclude` and `tune.at` name them.

    Raises:
        JobError: if there is no such factor or level.
    """
    labels = {}
    for name, value in levels.items():
        if name not in study.factors:
            raise JobError(f"{key}: {name} is not a factor; {nearest(name, study.factors)}")
        known = [label_of(each) for each in study.factors[name]]
        if label_of(value) not in known:
            hint = nearest(label_of(value), known)
            raise JobError(f"{key}: {label_of(value)} is not a level of {name}; {hint}")
        labels[name] = label_of(value)
    return labels


def _plan(
    study: Study,
    source: JobSource,
    cell: Cell,
    levels: Sequence[Mapping[str, Any]],
    cells: Sequence[Cell],
) -> CellPlan:
    settings: dict[str, Any] = dict(study.set)
    search = {} if study.tune is None else dict(study.tune.search)
    for keys in levels:
        for key, value in keys.items():
            if key == _TUNE:
                search |= _level_search(study, value)
            else:
                settings[key] = value
    for key in _OURS:
        if key in settings:
            raise JobError(f"{key} cannot be set: the study sets it for each run")
    for key in search:
        if isinstance(study.factors.get(key), list):
            raise JobError(f"tune: {key} is a factor: its values are given, not searched")
    tuned_at = _tuned_at(study, cell, cells)
    searched_here = tuned_at == cell
    if study.tune is not None and searched_here and not search:
        raise JobError(
            "tune: nothing is searched here; tune.search, or `tune` of a level, is missing"
        )
    job = source.read(settings)
    _check_metric("metric", study.metric, job)
    if study.tune is not None and study.tune.metric is not None:
        _check_metric("tune.metric", study.tune.metric, job)
    if job.stop_after_minutes is not None:
        raise JobError(f"{_LIMIT} cannot be set: budget.minutes is the limit of a study")
    resolved = job.resolved()
    _check_levels(study, levels, resolved)
    base = {key: _value_at(resolved, key) for key in (search if searched_here else ())}
    search = {key: _typed(key, search[key], value) for key, value in base.items()}
    for key, space in search.items():
        if study.tune is not None and study.tune.sampler != "grid":
            _check_space(key, space, base[key])
        for value in _ends(space):
            _check_end(source, settings, key, value)
    return CellPlan(cell, _slug(cell), settings, job, search, base, tuned_at)


def _level_search(study: Study, value: Any) -> Search:
    if study.tune is None:
        raise JobError("a level has `tune`, but the study has not: tune.trials is missing")
    if not isinstance(value, dict):
        raise JobError("tune of a level is a mapping of keys to ranges or choices")
    search: Search = {}
    for key, space in value.items():
        try:
            search[key] = _SPACE.validate_json(json.dumps(space), strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise JobError(f"tune: {key}: {message}") from None
    return search


def _tuned_at(study: Study, cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    if study.tune is None:
        return None
    if study.tune.at is None:
        return cell
    at = study.tune.at
    labels = dict(zip(study.factors, cell, strict=True))
    tuned = [
        _matching(study, levels, "tune.at") for levels in ([at] if isinstance(at, Mapping) else at)
    ]
    if any(levels.items() <= labels.items() for levels in tuned):
        return cell
    for levels in tuned:
        other = tuple((labels | levels).values())
        if other in cells:
            return other
    raise JobError("tune.at: no cell with those levels is like this one in the others")


def _check_levels(
    study: Study, levels: Sequence[Mapping[str, Any]], resolved: Mapping[str, Any]
) -> None:
    """See that no factor overwrites the value of another one."""
    for name, keys in zip(study.factors, levels, strict=True):
        if not isinstance(study.factors[name], list):
            continue
        others = {key for other in levels if other is not keys for key in other}
        if not any(_overlap(name, key) for key in others):
            continue
        value, found = keys[name], None
        with contextlib.suppress(JobError):  # another section has no such key
            found = _value_at(resolved, name)
        if not _holds(found, value):
            raise JobError(
                f"factors: {name} is {json.dumps(found)} in this cell, not {json.dumps(value)}: "
                "another factor sets it too"
            )


def _overlap(one: str, other: str) -> bool:
    """Whether one key is the other, or in its section."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _holds(found: Any, value: Any) -> bool:
    """Whether a resolved value, with all defaults, has what was given."""
    if isinstance(found, Mapping) and isinstance(value, Mapping):
        return all(key in found and _holds(found[key], each) for key, each in value.items())
    return bool(found == value)


def _check_metric(key: str, metric: str, job: Job) -> None:
    known = ["loss", "test_loss", *job.evaluate.named]
    known += [AVERAGED + name for name in known[1:]] if job.ema is not None else []
    if metric not in known:
        raise JobError(f"{key}: no run writes {metric!r} to its summary; {nearest(metric, known)}")


def _check_space(key: str, space: Space, base: Any) -> None:
    if space.holds(base):
        return
    if isinstance(space, Numbers):
        what = f"low {space.low:g} to high {space.high:g}"
    else:
        what = f"the choices {', '.join(map(json.dumps, space.choices))}"
    raise JobError(
        f"tune: {key} is {json.dumps(base)} in the job, which {what} exclude; the first trial "
        "takes the settings of the job"
    )


def _check_end(source: JobSource, settings: Mapping[str, Any], key: str, value: Any) -> None:
    try:
        source.read({**settings, key: value})
    except JobError as error:
        raise JobError(f"tune: {key} cannot be {json.dumps(value)}: {error}") from None


def _typed(key: str, space: Space, base: Any) -> Space:
    """The range of the whole numbers in it, if the job has one for the key."""
    if not isinstance(space, Numbers) or not isinstance(base, int) or isinstance(base, bool):
        return space
    first, last = math.ceil(space.low), math.floor(space.high)
    if first >= last:
        raise JobError(f"tune: {key} is a whole number, and its range has fewer than two")
    return WholeNumbers(low=first, high=last, log=space.log)


def _ends(space: Space) -> Sequence[Any]:
    if isinstance(space, Choices):
        return space.choices
    return (space.first, space.last) if isinstance(space, WholeNumbers) else (space.low, space.high)


def _value_at(resolved: Mapping[str, Any], key: str) -> Any:
    value: Any = resolved
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = list(value) if isinstance(value, Mapping) else []
            raise JobError(f"tune: the job has no key {key!r}; {nearest(part, known)}".rstrip("; "))
        value = value[part]
    return value


def _slug(cell: Cell) -> str:
    """A name for files: the labels; with a digest where that would not be unique or too long.

    >>> _slug(("32", "lars")), _slug(())
    ('32_lars', 'all')
    """
    if not cell:
        return "all"
    plain = "_".join(re.sub(r"[^A-Za-z0-9.-]", "-", label) for label in cell)
    if plain.split("_") == list(cell) and len(plain) <= 60 and not plain.startswith("."):
        return plain
    return f"c-{plain[:40]}-{hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:8]}"
