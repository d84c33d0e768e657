"""Studies with made-up results: what the analyses should find in them is known."""

import itertools

import numpy as np

from hvdlarge.study.results import REPETITION, TRIAL, Level, Point, Range, RunResult, Setup

LR = Range(0.01, 10.0, True)
NOISES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) - 1,
    "heavy-tailed": lambda rng, size: rng.standard_t(3, size=size),
}


def setup_of(factors, seeds=8, trials=4, lower=False, tuned=True):
    """A setup whose factors have labels, or numbers for keys of a job, as levels."""
    levels = {
        name: tuple(
            Level(str(each), None if isinstance(each, str) else float(each)) for each in values
        )
        for name, values in factors.items()
    }
    cells = tuple(itertools.product(*([level.label for level in each] for each in levels.values())))
    return Setup(
        name="simulated",
        metric="loss" if lower else "accuracy",
        lower_is_better=lower,
        factors=levels,
        cells=cells,
        ranges={cell: {"lr.base": LR} for cell in cells} if tuned else {},
        tuned_at={cell: cell if tuned else None for cell in cells},
        trials=trials,
        repetitions=seeds,
    )


def repetitions(cell, values, lr=0.5, **more):
    """Finished repetitions with these values; None: one that diverged.

    A list of `curve`, `distance` or `noise` holds those of each repetition.
    """
    runs = []
    for number, value in enumerate(values):
        own = {key: each[number] if isinstance(each, list) else each for key, each in more.items()}
        state = "finished" if value is not None else "diverged"
        runs.append(
            RunResult(
                cell,
                REPETITION,
                number,
                number + 1,
                {"lr.base": lr},
                state,
                reason="" if value is not None else "the loss is nan",
                value=None if value is None else float(value),
                **{"epochs": 10.0, **own},
            )
        )
    return runs


def trials(cell, values, seed=0):
    """Trials at these rates with these values, None for diverged ones: pairs of both."""
    return [
        RunResult(
            cell,
            TRIAL,
            number,
            seed,
            {"lr.base": float(lr)},
            "finished" if value is not None else "diverged",
            value=value,
        )
        for number, (lr, value) in enumerate(values)
    ]


def noisy(setup, means, noise=0.0, seed=0, kind="normal", shared=0.0):
    """Repetitions of each cell around its mean, with noise of their own and some shared by seed."""
    rng = np.random.default_rng(seed)
    by_seed = shared * rng.normal(size=setup.repetitions)
    return [
        run
        for cell, mean in zip(setup.cells, means, strict=True)
        for run in repetitions(cell, mean + by_seed + noise * NOISES[kind](rng, setup.repetitions))
    ]


def points(steps, values, lr=0.1, per_epoch=100):
    """A curve as runs log it; `lr` is a number, or one for each point."""
    rates = lr if isinstance(lr, (list, tuple)) else [lr] * len(steps)
    return tuple(
        Point(int(step), step / per_epoch, float(value), rate)
        for step, value, rate in zip(steps, values, rates, strict=True)
    )
