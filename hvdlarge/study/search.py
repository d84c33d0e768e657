"""Suggests settings to try, with Optuna, and keeps the trials in a journal for all processes.

Suggestions are a function of the results before: they are drawn in rounds, each trial with a
sampler of its own seed, which sees the trials of earlier rounds with the ranks of their results.
Runs that failed rank last. Trials of the same round count as the worst, so that they spread.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hvdlarge.exits import InvalidEnvironmentError, JobError
from hvdlarge.study.study_file import Choices, Numbers, Search, Tune, WholeNumbers
from hvdlarge.telemetry.console import print_status

if TYPE_CHECKING:
    import optuna


_MOST_ATTEMPTS = 20  # at settings that were not tried; choices may be used up


class Tried(NamedTuple):
    """A trial.

    Attributes:
        settings: values of the searched keys.
        loss: its result, the smaller the better; infinite for a failed run; None for one of the
            same round.
    """

    settings: Mapping[str, Any]
    loss: float | None


def check_available(tune: Tune) -> None:
    """See that Optuna is installed, and what its sampler needs.

    Raises:
        InvalidEnvironmentError: if it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise InvalidEnvironmentError(
            "a study with `tune` needs Optuna: pip install 'hvdlarge[study]'"
        ) from None
    if tune.sampler == "gp":
        try:
            import scipy  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            raise InvalidEnvironmentError(
                "tune.sampler: gp needs scipy: pip install 'hvdlarge[study]'"
            ) from None


def suggest(tune: Tune, search: Search, cell: str, tried: Sequence[Tried]) -> dict[str, Any]:
    """The settings of the next trial, of number `len(tried)`.

    Args:
        tune: the sampler and its seed.
        search: what is searched.
        cell: a name, so that cells have random numbers of their own.
        tried: the trials before, in order.
    """
    if tune.sampler == "grid":
        return grid(search, tune.trials)[len(tried)]
    import optuna

    _quieten()
    study = optuna.create_study(sampler=_sampler(tune, cell, len(tried)))
    distributions = {key: _distribution(space) for key, space in search.items()}
    for each, rank in zip(tried, _ranks([each.loss for each in tried]), strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=_inside(each.settings, search), distributions=distributions, value=rank
            )
        )
    before = [dict(each.settings) for each in tried]
    asked: dict[str, Any] = {}
    at_random = optuna.samplers.RandomSampler(seed=_seed_of(tune, cell, -len(tried)))
    for _ in range(_MOST_ATTEMPTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # samplers still marked as experimental
            params = study.ask(distributions).params
        asked = {key: params[key] for key in search}
        if asked not in before:
            break
        # The same settings and seed would give the same result again
        study.sampler = at_random
    return asked


def _quieten() -> None:
    """Optuna tells of each study that it creates, and of packages that would make it faster."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


def grid(search: Search, trials: int) -> list[dict[str, Any]]:
    """The points of a grid: all choices, and as many values of each range as make up the number.

    Raises:
        JobError: if no grid has this number of points.

    >>> [point["lr"] for point in grid({"lr": Numbers(low=1, high=100, log=True)}, 3)]
    [1.0, 10.0, 100.0]
    """
    numbers = [space for space in search.values() if isinstance(space, Numbers)]
    choices = math.prod(len(each.choices) for each in search.values() if isinstance(each, Choices))
    points = round((trials / choices) ** (1 / len(numbers))) if numbers else 1
    if choices * points ** len(numbers) != trials or (numbers and points < 2):
        numbers_of_points = [choices * each ** len(numbers) for each in (2, 3, 4, 5)]
        possible = ", ".join(map(str, numbers_of_points)) + " …" if numbers else str(choices)
        raise JobError(f"tune.trials is {trials}: a grid of this search has {possible}")
    axes = [_axis(space, points) for space in search.values()]
    for key, axis in zip(search, axes, strict=True):
        if len({*map(repr, axis)}) < len(axis):
            raise JobError(f"tune: {key} has fewer whole numbers than the grid has points")
    return [dict(zip(search, point, strict=True)) for point in product(*axes)]


def _axis(space: Numbers | Choices, points: int) -> list[Any]:
    if isinstance(space, Choices):
        return list(space.choices)
    shares = [number / (points - 1) for number in range(points)]
    if space.log:
        # 12 digits: of 1, 10, 100 no rounding of the exponential is left
        values = [space.low * (space.high / space.low) ** share for share in shares]
    else:
        values = [space.low + (space.high - space.low) * share for share in shares]
    rounded = [space.low, *(float(f"{value:.12g}") for value in values[1:-1]), space.high]
    if isinstance(space, WholeNumbers):
        return [round(value) for value in rounded]
    return rounded


def _sampler(tune: Tune, cell: str, number: int) -> optuna.samplers.BaseSampler:
    import optuna

    seed = _seed_of(tune, cell, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options still marked as experimental
        if tune.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        first = max(2, min(10, tune.trials // 3))
        if tune.sampler == "gp":
            # The same settings and seed give the same result
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=first, deterministic_objective=True
            )
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, multivariate=True)


def _seed_of(tune: Tune, cell: str, number: int) -> int:
    text = f"{tune.seed} {cell} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _distribution(space: Numbers | Choices) -> optuna.distributions.BaseDistribution:
    import optuna

    if isinstance(space, Choices):
        return optuna.distributions.CategoricalDistribution(space.choices)
    if isinstance(space, WholeNumbers):
        return optuna.distributions.IntDistribution(space.first, space.last, log=space.log)
    return optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)


def _inside(settings: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """Settings in the types of the distributions."""
    return {
        key: value if isinstance(search[key], (Choices, WholeNumbers)) else float(value)
        for key, value in settings.items()
    }


def _ranks(losses: Sequence[float | None]) -> list[float]:
    """The place of each loss, from 0 to 1; equal ones share theirs; those not known are last."""
    known = sorted(loss for loss in losses if loss is not None)
    most = max(1, len(known) - 1)

    def rank(loss: float | None) -> float:
        if loss is None:
            return 1.0
        below = sum(each < loss for each in known)
        equal = sum(each == loss for each in known)
        return (below + (equal - 1) / 2) / most

    return [rank(loss) for loss in losses]


class Journal:
    """Optuna's journal of a study: one of its studies for each tuned cell. It holds what was
    suggested, and for pruning the evaluations of trials.

    The caller holds a lock of all processes while it calls a method. The records of the runs are
    the truth: a journal that is damaged, was removed or contradicts them is begun anew, and filled
    from them by the caller. Any process may do so at any time.

    Args:
        path: of the file; it is created if it is missing.
        tune: the pruner.
        lower_is_better: of the metric.
    """

    def __init__(self, path: Path, tune: Tune, lower_is_better: bool) -> None:
        _quieten()
        self._path = path
        self._tune = tune
        self._direction: Literal["minimize", "maximize"] = (
            "minimize" if lower_is_better else "maximize"
        )
        self._storage: optuna.storages.JournalStorage | None = None
        self._studies: dict[str, optuna.Study] = {}
        self._first_line = b""

    def begin_anew(self) -> None:
        """Set the journal aside as `optuna.journal.old`; all processes go on with an empty one."""
        self._path.replace(self._path.with_name(f"{self._path.name}.old"))

    def settings(self, slug: str) -> list[dict[str, Any]]:
        """What was suggested for a cell, in order."""
        trials = self._study(slug).get_trials(deepcopy=False)
        return [dict(trial.params) for trial in trials]

    def add(self, slug: str, settings: Mapping[str, Any], search: Search) -> None:
        """Record a suggestion."""
        import optuna

        distributions = {key: _distribution(space) for key, space in search.items()}
        trial = optuna.trial.create_trial(
            params=_inside(settings, search),
            distributions=distributions,
            state=optuna.trial.TrialState.RUNNING,
        )
        self._study(slug).add_trial(trial)

    def has_finished(self, slug: str, number: int) -> bool:
        """Whether the end of a trial is recorded."""
        trials = self._study(slug).get_trials(deepcopy=False)
        return number < len(trials) and trials[number].state.is_finished()

    def finish(self, slug: str, number: int, value: float | None, pruned: bool) -> None:
        """Record the end of a trial, unless it is recorded."""
        from optuna.trial import TrialState

        if self.has_finished(slug, number):
            return
        study = self._study(slug)
        if pruned:
            study.tell(number, state=TrialState.PRUNED)
        elif value is None:
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, value)

    def prune(self, slug: str, number: int, evaluations: Sequence[float]) -> bool:
        """Whether the pruner ends a trial after these evaluations, of which the journal gets those
        that it has not. One that it has not, since another process has begun it anew, goes on.
        """
        import optuna

        study = self._study(slug)
        trials = study.get_trials(deepcopy=False)
        if number >= len(trials):
            return False
        frozen = trials[number]
        trial = optuna.trial.Trial(study, frozen._trial_id)
        for place in range(len(frozen.intermediate_values), len(evaluations)):
            trial.report(evaluations[place], place)
        return bool(trial.should_prune())

    def _study(self, slug: str) -> optuna.Study:
        """The study of a cell, up to date."""
        _cut_off_half_line(self._path)  # another process may have been killed within a line
        try:
            return self._read(slug)
        except (ValueError, LookupError, TypeError, AssertionError):  # at a line of no process
            self.begin_anew()
            with contextlib.suppress(OSError):
                print_status(
                    f"note     {self._path} was damaged; it is made again from the records, and "
                    f"the old one is kept as {self._path.name}.old"
                )
            return self._read(slug)

    def _read(self, slug: str) -> optuna.Study:
        import optuna

        if self._storage is None or _first_line(self._path) != self._first_line:
            self._open()
        assert self._storage is not None
        if slug not in self._studies:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._studies[slug] = optuna.create_study(
                    storage=self._storage,
                    study_name=slug,
                    direction=self._direction,
                    load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(),
                    pruner=_pruner(self._tune),
                )
        self._first_line = self._first_line or _first_line(self._path)
        self._studies[slug].get_trials(deepcopy=False)  # reads what is new
        return self._studies[slug]

    def _open(self) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        self._storage, self._studies = None, {}
        self._first_line = _first_line(self._path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # still marked as experimental
            backend = JournalFileBackend(
                str(self._path),
                lock_obj=_NoLock(),  # type: ignore[arg-type]
            )
            self._storage = optuna.storages.JournalStorage(backend)


def _first_line(path: Path) -> bytes:
    """The line that tells a journal from one that was begun anew: the name of its writer is in it;
    empty if there is none.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return file.readline()
    return b""


class _NoLock:
    """A lock for Optuna that does nothing: the study's own is released when a process is killed,
    while Optuna's is a file that stays.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _cut_off_half_line(path: Path) -> None:
    """Remove the last line of a file if its writer was killed within it."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() in (b"", b"\n"):
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _pruner(tune: Tune) -> optuna.pruners.BasePruner:
    import optuna

    if tune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if tune.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.NopPruner()
